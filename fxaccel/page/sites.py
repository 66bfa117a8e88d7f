"""Every site as a row: where it is, what was said of it, its proof, and what it costs before and after.

Sites of one pass with one rule, line, sentence and proof are one row, with all their paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fxaccel.about import About, Graphs
from fxaccel.page.blocks import Found
from fxaccel.page.figures import Figures, counted, sides, sized
from fxaccel.page.markup import Markup, count, folded, joined, table, tag
from fxaccel.proof import Claim, Proof
from fxaccel.rule import EXACT
from fxaccel.stopwatch import Times

TITLES = {"applied": "Rewritten", "refused": "Refused", "near_misses": "Near misses"}
SHOWN = 3  # paths of a row, beyond which they are folded


def groups_of(found: Sequence[Found], prefix: str) -> dict[Found, str]:
    """Site -> the anchor of its row."""
    rows: dict[tuple[str, ...], str] = {}
    return {f: rows.setdefault(_key(f), f"{prefix}s{len(rows)}") for f in found}


def _key(one: Found) -> tuple[str, ...]:
    site = one.site
    return one.by, one.kind, site.rule, site.source, site.why, site.proof


def sites_of(
    found: Sequence[Found], anchors: Mapping[Found, str], about: About | None, graphs: Sequence[Graphs]
) -> Iterator[Markup]:
    """A section for each kind of site that there is."""
    rows: dict[str, list[Found]] = {}
    for one in found:
        rows.setdefault(anchors[one], []).append(one)
    for kind, title in TITLES.items():
        own = {a: group for a, group in rows.items() if group[0].kind == kind}
        if not own:
            continue
        number = sum(map(len, own.values()))
        made = [_row(anchor, group, about, graphs) for anchor, group in own.items()]
        summary = [tag("h3", title), " ", tag("span", count(number, "site"), cls="muted")]
        yield tag("section", folded(summary, joined(made), "sites", len(own) <= 12))


def _row(anchor: str, group: Sequence[Found], about: About | None, graphs: Sequence[Graphs]) -> Markup:
    one = group[0]
    head = [tag("b", one.by), " ", tag("span", one.site.rule, cls="kind")]
    if len(group) > 1:
        head += [" ", tag("span", f"x {len(group)}", cls="times")]
    where = [tag("div", head), *_paths([f.site.path or "(root)" for f in group]), *_source(one, about)]
    said = [tag("p", one.site.why, cls="why")] if one.site.why else []
    if one.site.change:
        said.append(tag("p", f"it would be taken with: {one.site.change}", cls="muted"))
    facts = list(_facts(one, graphs))
    said += [tag("div", facts, cls="facts")] if facts else []
    return tag("div", [tag("div", where, cls="where"), tag("div", said)], cls=f"site l {one.kind}", id=anchor)


def _paths(paths: Sequence[str]) -> Iterator[Markup]:
    if len(paths) <= SHOWN:
        yield tag("div", ", ".join(paths), cls="path")
    else:
        yield folded(f"{paths[0]} ... {paths[-1]}", ", ".join(paths), "path")


def _source(one: Found, about: About | None) -> Iterator[Markup]:
    if one.site.source:
        yield tag("div", one.site.source, cls="muted")
    text = about.line(one.site.source) if about else ""
    if text:
        yield tag("code", text)


# -- proof and cost --------------------------------------------------------------------------------


def _facts(one: Found, graphs: Sequence[Graphs]) -> Iterator[Markup]:
    """How it was proved, and what it costs."""
    key, rows = one.site.proof, list[list[str]]()
    graph = next((g for g in graphs if key and key in g.manifest.proofs), None)
    times = Times.told(one.site.why)
    if times is not None:
        rows.append(["time, measured on this machine", f"{times.old:.3g} ms", f"{times.new:.3g} ms"])
    if graph is not None:
        claim = graph.manifest.claims[key]
        yield _proved(graph.manifest.proofs[key], claim, graph.manifest.sites.get(key, 0), graph.program.grad)
        found = sides(claim, graph.program.hints)
        rows += () if found is None else _computed(*found)
    elif key:
        yield tag("p", f"rests on the proof {key}, which is not in this page", cls="muted")
    elif one.kind == "applied":
        yield tag("p", "no proof of its own; the whole graph is compared with the model", cls="muted")
    if rows:
        yield table(("", "before", "after"), rows, "cost")


def _computed(before: Figures, after: Figures) -> Iterator[list[str]]:
    yield ["FLOPs, computed", counted(before.flops), counted(after.flops)]
    yield ["bytes read and written, computed", sized(before.moved), sized(after.moved)]
    yield ["bytes of results, computed", sized(before.made), sized(after.made)]


def _proved(proof: Proof, claim: Claim, sites: int, backward: bool) -> Markup:
    """The error as a share of the tolerance, of outputs and where gradients flow of these."""
    exact = claim.numerics in EXACT
    word = f"proved ({claim.numerics})" if exact else f"measured ({claim.numerics}: no tolerance holds it)"
    bars = [_bar("outputs", proof.error)]
    bars += [_bar("gradients", proof.grad_error)] if backward else []
    more = f"proof {proof.key}, on which {count(sites, 'site rests', 'sites rest')}{claim.note}; tried with: "
    return tag("div", [
        tag("p", [tag("b", word), ", largest error as a share of the tolerance:"]), *bars,
        folded("trials", more + "; ".join(proof.trials)),
    ], cls="proof")  # fmt: skip


def _bar(what: str, share: float) -> Markup:
    full = min(max(share, 0.0), 1.0)
    fill = tag("span", style=f"width:{100 * full:.1f}%", cls="" if share <= 1 else "over")
    return tag(
        "div", [tag("span", what), tag("span", fill, cls="bar"), tag("span", f"{share:.3g}")], cls="error"
    )
