"""Both sides of a diff as blocks: one for each module, in the order of the calls, equal ones put together.

A row has the line before and the line after; a block has the rows of a module and the blocks of what is
called in it. Two blocks of one module are equal where their rows are the same up to the names of values and
to the module's own path, and so are their sites.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fxaccel.diff import Diff
from fxaccel.listing import Line
from fxaccel.report import KINDS, CaptureReport, Site

SMALLEST = 4  # lines of a block that is put together with others; of a smaller one each has a name to be seen


@dataclass(frozen=True)
class Row:
    """A line before and the one beside it after; None where there is none."""

    old: Line | None
    new: Line | None
    changed: bool

    @property
    def path(self) -> str:
        """Module path of the line that is there now, or was."""
        line = self.new or self.old
        return "" if line is None else line.path


@dataclass(frozen=True)
class Found:
    """A site with the name of its pass and its kind, one of fxaccel.report.KINDS."""

    by: str
    kind: str
    site: Site


@dataclass
class Block:
    """What is called in one run of a module.

    sites     those of this module, at its first run
    alike     paths of the blocks that this one stands for, its own first
    """

    path: str
    parts: list[Row | Block] = field(default_factory=list)
    sites: list[Found] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)

    @property
    def rows(self) -> Iterator[Row]:
        """All rows, those of inner blocks among them; of equal blocks those of the first."""
        for part in self.parts:
            if isinstance(part, Row):
                yield part
            else:
                yield from part.rows

    def every_site(self) -> Iterator[Found]:
        """All sites, those of inner blocks among them, each as often as it is there."""
        yield from self.sites
        for part in self.parts:
            if isinstance(part, Block):
                for found in part.every_site():
                    yield from [found] * len(part.alike)


def found_sites(capture: CaptureReport) -> list[Found]:
    """Every site of a capture, pass by pass."""
    return [
        Found(one.name, kind, site) for one in capture.passes for kind in KINDS for site in getattr(one, kind)
    ]


def block_of(diff: Diff, sites: Iterable[Found]) -> Block:
    """The root's block."""
    waiting: dict[str, list[Found]] = {}
    for one in sites:
        waiting.setdefault(one.site.path, []).append(one)
    root = Block("", sites=waiting.pop("", []))
    stack = [root]
    for row in rows(diff):
        while stack[-1].path and not f"{row.path}.".startswith(f"{stack[-1].path}."):
            stack.pop()
        for path in _between(stack[-1].path, row.path):
            made = Block(path, sites=waiting.pop(path, []))
            stack[-1].parts.append(made)
            stack.append(made)
        stack[-1].parts.append(row)
    for left in waiting.values():  # of modules that have no line on either side
        root.sites += left
    names = {n: s.name for p in (diff.before, diff.after) for n, s in p.state.items()}
    _join(root, names)
    return root


def _between(outer: str, inner: str) -> Iterator[str]:
    """Paths from a module, left out, to one inside it."""
    words = inner.split(".") if inner else []
    start = len(outer.split(".")) if outer else 0
    for end in range(start, len(words)):
        yield ".".join(words[: end + 1])


def rows(diff: Diff) -> Iterator[Row]:
    """Both sides beside each other; in a changed run, lines whose first values have one name are."""
    for equal, old, new in diff.runs:
        if equal:
            yield from (Row(a, b, False) for a, b in zip(old, new, strict=True))
        else:
            yield from _beside(old, new)


def _beside(old: Sequence[Line], new: Sequence[Line]) -> Iterator[Row]:
    place = {line.results[0]: i for i, line in enumerate(new) if line.results}
    done = 0
    for line in old:
        at = place.get(line.results[0], -1) if line.results else -1
        if at < done:
            yield Row(line, None, True)
            continue
        yield from (Row(None, one, True) for one in new[done:at])
        yield Row(line, new[at], True)
        done = at + 1
    yield from (Row(None, one, True) for one in new[done:])


# -- equal blocks ----------------------------------------------------------------------------------


def _join(block: Block, names: Mapping[str, str]) -> None:
    """Leave of equal blocks within `block` the first, from the inside out."""
    first: dict[str, Block] = {}
    kept = list[Row | Block]()
    for part in block.parts:
        if isinstance(part, Row):
            kept.append(part)
            continue
        _join(part, names)
        few = sum(1 for _ in part.rows) < SMALLEST
        one = part if few else first.setdefault(_Shape(part.path, names).of(part), part)
        one.alike.append(part.path)
        if one is part:
            kept.append(part)
    block.parts = kept


class _Shape:
    """The text of a block in which values are numbered as they come, and its module's path is left out."""

    def __init__(self, path: str, names: Mapping[str, str]) -> None:
        self.path, self.names = path, names
        self.numbers: dict[str, str] = {}

    def of(self, block: Block) -> str:
        """All of a block."""
        parts = [self.relative(block.path), *map(self.relative, block.alike)]
        parts += [
            f"{s.by} {s.kind} {self.relative(s.site.path)} {s.site.rule} {s.site.source} {s.site.proof} "
            f"{self.renamed(s.site.why)}"
            for s in block.sites
        ]
        for part in block.parts:
            parts.append(f"{part.changed}{self.line(part.old)}\n{self.line(part.new)}"
                         if isinstance(part, Row) else self.of(part))  # fmt: skip
        return "\n".join([*parts, "end"])

    def line(self, line: Line | None) -> str:
        """One side of a row."""
        if line is None:
            return ""
        made = self.renamed(" ".join(f"%{n}" for n in line.results))
        regions = re.sub(r"\[\d+\]", "", line.regions)
        words = (line.op, self.renamed(line.args), line.type, line.source, line.by, regions)
        return f"{made} {' | '.join(words)} {self.relative(line.path)}"

    def renamed(self, text: str) -> str:
        """With numbers for the names of values."""
        return re.sub(r"%(\w+)", lambda m: self.number(m[1]), text)

    def number(self, name: str) -> str:
        slot = self.names.get(name)
        if slot is not None and f"{slot}.".startswith(f"{self.path}."):
            return f"%{self.relative(slot)}"
        return self.numbers.setdefault(name, f"%{len(self.numbers)}")

    def relative(self, path: str) -> str:
        inside = f"{path}.".startswith(f"{self.path}.") if self.path else True
        return f".{path[len(self.path) :]}" if inside else path
