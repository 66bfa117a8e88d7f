"""Before and after beside each other, block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from fxaccel.listing import Line
from fxaccel.page.blocks import Block, Found, Row
from fxaccel.page.markup import Markup, count, folded, joined, tag
from fxaccel.page.modules import WORDS, badges

CONTEXT = 1  # unchanged lines that are shown beside a changed one
FEW = 3  # unchanged lines that are not worth folding
SMALL = 60  # lines up to which what has changed is open at first


def graphs_of(root: Block, groups: Mapping[Found, str]) -> Markup:
    """The blocks of a graph; groups: site -> the anchor of its row in the tables."""
    small = sum(1 for _ in root.rows) <= SMALL
    head = tag("div", [tag("div", "before"), tag("div", "after")], cls="sides")
    return tag("div", [head, _block(root, groups, small, True)], cls="graph")


def _block(block: Block, groups: Mapping[Found, str], small: bool, opened: bool = False) -> Markup:
    while not block.sites and len(block.parts) == 1 and isinstance(block.parts[0], Block) and (
        len(block.alike) < 2 and len(block.parts[0].alike) < 2
    ):  # fmt: skip
        block = block.parts[0]
    rows = list(block.rows)
    changed = sum(r.changed for r in rows)
    name: list[str] = [tag("b", block.path or "(root)")]
    if len(block.alike) > 1:
        name += [" ", tag("span", f"x {len(block.alike)}", cls="times")]
    head = [
        *name, " ", tag("span", count(len(rows), "line"), cls="muted"), " ",
        tag("span", f"{changed} changed", cls="badge changed") if changed else "", " ",
        *badges(Counter(f.kind for f in block.every_site())),
    ]  # fmt: skip
    inside = list[Markup]()
    if len(block.alike) > 1:
        inside.append(tag("p", f"The same in {', '.join(block.alike)}.", cls="alike l"))
    inside += _sites(block.sites, groups)
    inside += _parts(block.parts, groups, small)
    cls, paths = "m" if changed else "m same", " ".join(block.alike or [block.path])
    return folded(head, joined(inside), cls, opened or (small and bool(changed)), data_paths=paths)


def _sites(sites: Sequence[Found], groups: Mapping[Found, str]) -> Iterator[Markup]:
    for one in sites:
        text = [
            tag("span", WORDS[one.kind][0], cls=f"badge {one.kind}"), " ",
            tag("a", f"{one.by} {one.site.rule}", href=f"#{groups[one]}"), " ",
            tag("span", one.site.source, cls="muted"), " ", one.site.why,
        ]  # fmt: skip
        yield tag("p", text, cls="at")


def _parts(parts: Sequence[Row | Block], groups: Mapping[Found, str], small: bool) -> Iterator[Markup]:
    """Rows and blocks in order, long runs of unchanged rows folded."""
    place = 0
    while place < len(parts):
        part = parts[place]
        if isinstance(part, Block):
            yield _block(part, groups, small)
            place += 1
            continue
        end = place
        while end < len(parts) and _same(parts[end]):
            end += 1
        if end == place:
            yield _row(part)
            place += 1
            continue
        first = place + CONTEXT * (place > 0 and isinstance(parts[place - 1], Row))
        last = end - CONTEXT * (end < len(parts) and isinstance(parts[end], Row))
        run = [p for p in parts[place:end] if isinstance(p, Row)]
        hidden = run[first - place : last - place]
        if len(hidden) <= FEW:
            yield from map(_row, run)
        else:
            yield from map(_row, run[: first - place])
            yield folded(f"{count(len(hidden), 'unchanged line')}", joined(map(_row, hidden)), "run")
            yield from map(_row, run[last - place :])
        place = end


def _same(part: Row | Block) -> bool:
    return isinstance(part, Row) and not part.changed


def _row(row: Row) -> Markup:
    kind = (
        "l" if not row.changed else "l new" if row.old is None else "l old" if row.new is None else "l both"
    )
    return tag("div", [_line(row.old), _line(row.new)], cls=kind)


def _line(line: Line | None) -> Markup:
    """One side of a row."""
    if line is None:
        return tag("p")
    made = f"{', '.join('%' + r for r in line.results)} = " if line.results else ""
    notes = [tag("i", "  ".join(n for n in (line.type, line.source, line.regions) if n))]
    if line.by:
        notes.append(tag("u", f"by {line.by}"))
    words = [made, tag("b", line.op), f"({line.args}) "]
    return tag("p", [*words, joined([n for note in notes for n in (note, " ")])])
