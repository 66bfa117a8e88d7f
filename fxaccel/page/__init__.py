"""A report as one HTML page: no network, no other file; it folds without scripts and searches with one.

    html(report)    str

What comes from the model or from passes (paths, lines, reasons, names of values) is escaped in
fxaccel/page/markup.py. Equal reports over equal graphs give equal pages.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.resources import files

import torch

from fxaccel.about import About, Graphs
from fxaccel.diff import Diff, Totals
from fxaccel.listing import Namer
from fxaccel.page.blocks import Found, block_of, found_sites
from fxaccel.page.figures import counted, sized
from fxaccel.page.graphs import graphs_of
from fxaccel.page.markup import Markup, count, folded, joined, table, tag
from fxaccel.page.modules import modules_of
from fxaccel.page.sites import groups_of, sites_of
from fxaccel.picture import Picture
from fxaccel.report import CaptureReport, PassReport, Report

NO_GRAPHS = (
    "This page was made of a report alone, which was read from JSON or narrowed to one module: it has no "
    "graphs, proofs or pictures."
)


def html(report: Report, raw: bool = False) -> str:
    """The page; raw: before is the graph as captured, not its canonical form."""
    about = report.about
    title = f"fxaccel: {about.model if about else 'report'}"
    sections = [
        _capture(number, capture, about, about.graphs[number] if about else (), raw)
        for number, capture in enumerate(report.captures)
    ]
    if not sections:
        sections = [tag("p", str(report), cls="note")]
    if about is None:
        sections.insert(0, tag("p", NO_GRAPHS, cls="note"))
    head = [
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", _file("page.css")),
    ]
    body = [_bar(title), tag("main", sections), tag("script", _file("page.js"))]
    page = tag("html", [tag("head", head), tag("body", body)], lang="en")
    return f"<!doctype html>\n{page}\n"


def _file(name: str) -> Markup:
    return Markup(files("fxaccel.page").joinpath(name).read_text(encoding="utf-8"))


def _bar(title: str) -> Markup:
    """What stays at the top: the title, the search, and what opens and folds."""
    versions = f"fxaccel {version('fxaccel')}, torch {torch.__version__}, Python {platform.python_version()}"
    return tag("header", [
        tag("h1", title),
        tag("span", versions, cls="muted"),
        tag("input", type="search", id="search", placeholder="search lines, sites, modules",
            aria_label="search"),
        tag("span", "", id="hits", cls="muted", role="status"),
        tag("button", "open all", id="open", type="button"),
        tag("button", "fold all", id="fold", type="button"),
        tag("label", [tag("input", type="checkbox", id="changes"), " changes only"]),
    ])  # fmt: skip


def _capture(
    number: int, capture: CaptureReport, about: About | None, graphs: Sequence[Graphs], raw: bool
) -> Markup:
    """Everything of one capture."""
    found, diffs = found_sites(capture), [one.diff(raw) for one in graphs]
    groups = groups_of(found, f"c{number}")
    content = [
        tag("h2", f"captured for {capture.mode}"),
        *(tag("p", note, cls="note") for note in (*capture.notes, *filter(None, [capture.check]))),
        *([_totals(graphs, diffs, raw)] if graphs else ()),
        _passes(capture),
        *_pictures(graphs),
        *sites_of(found, groups, about, graphs),
        *_graphs(diffs, found, groups),
        *([modules_of(about.modules, found)] if about else ()),
    ]  # fmt: skip
    return tag("section", content, id=f"c{number}")


def _titled(title: str, content: Markup, cls: str = "") -> Markup:
    return tag("section", [tag("h3", title), content], cls=cls)


# -- sizes -----------------------------------------------------------------------------------------


def _totals(graphs: Sequence[Graphs], diffs: Sequence[Diff], raw: bool) -> Markup:
    """Nodes, bytes and FLOPs of each graph, and the operators that are called more or less often."""
    parts = []
    for place, (one, diff) in enumerate(zip(graphs, diffs, strict=True), 1):
        old, new = diff.totals
        rows = [
            ["operator calls", f"{old.nodes:,}", f"{new.nodes:,}"],
            ["bytes of parameters", sized(old.parameter_bytes), sized(new.parameter_bytes)],
            ["FLOPs of one forward run", _flops(old, one), _flops(new, one)],
        ]
        piece = [tag("p", f"piece {place} of {len(graphs)}", cls="muted")] if len(graphs) > 1 else []
        parts += [*piece, table(["", "before", "after"], rows, "sizes")]
        calls = [[op, f"{a:,}", f"{b:,}"] for op, (a, b) in diff.operators().items()]
        if calls:
            head = f"{count(len(calls), 'operator')} called more or less often"
            parts.append(folded(head, table(["", "before", "after"], calls, "sizes")))
    what = "before the canonical form" if raw else "in the canonical form, before the passes"
    parts.append(tag("p", f"Before is the graph {what}. FLOPs are computed from shapes.", cls="muted"))
    return _titled("Sizes", joined(parts))


def _flops(totals: Totals, one: Graphs) -> str:
    """The number at the example's sizes, and where sizes vary the formula."""
    if totals.flops.is_number:
        return counted(float(totals.flops))
    named = {str(new): one.program.hints[old] for old, new in Namer(one.program).by_name.items()}
    at = {s: named[str(s)] for s in totals.flops.free_symbols if str(s) in named}
    sizes = ", ".join(f"{s} = {v}" for s, v in sorted(at.items(), key=lambda i: str(i[0])))
    return f"{counted(float(totals.flops.xreplace(at)))} at {sizes}: {totals.flops}"


# -- passes ----------------------------------------------------------------------------------------


def _passes(capture: CaptureReport) -> Markup:
    rows = [
        [tag("b", p.name), *(f"{len(s):,}" for s in (p.applied, p.refused, p.near_misses)),
         f"{p.seconds:.2f}", _said(p)]
        for p in capture.passes
    ]  # fmt: skip
    return _titled("Passes", table(["pass", "applied", "refused", "near misses", "s", ""], rows, "passes"))


def _said(one: PassReport) -> Markup:
    """What there is to say of a pass as a whole."""
    parts = list[Markup]()
    if one.error:
        parts.append(tag("p", f"changed nothing: {one.error}"))
    if one.change is not None:
        parts.append(tag("p", f"changes the outputs by {one.change:.2g} of their size"))
    if one.plan:
        parts.append(folded("plan", tag("pre", one.plan)))
    return joined(parts)


def _pictures(graphs: Sequence[Graphs]) -> Iterator[Markup]:
    """What the passes have to show."""
    found = [p for one in graphs for a in one.passes for p in a.pictures(one.program)]
    if found:
        yield _titled("Pictures", tag("div", joined(map(_picture, found)), cls="pictures"))


def _picture(one: Picture) -> Markup:
    caption = [tag("b", one.title), *(tag("p", text) for text in one.lines)]
    return tag("figure", [Markup(one.svg), tag("figcaption", caption)])


def _graphs(diffs: Sequence[Diff], found: list[Found], groups: dict[Found, str]) -> Iterator[Markup]:
    """Before and after beside each other."""
    for place, diff in enumerate(diffs, 1):
        piece = f", piece {place} of {len(diffs)}" if len(diffs) > 1 else ""
        own = found if len(diffs) == 1 else []  # whose piece a site is of is not on record
        root = block_of(diff, own)
        rows = sum(1 for _ in root.rows)
        head = f"{count(rows, 'line')} shown, equal blocks once"
        yield _titled(
            f"Before and after{piece}", joined([tag("p", head, cls="muted"), graphs_of(root, groups)])
        )
