"""Two programs side by side, aligned by where their nodes come from and not by what they are called."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import sympy
from torch import fx

from fxaccel import cost
from fxaccel.ir import Program, path, source
from fxaccel.listing import STAGE, Line, Namer, lines

SCHEMA = "fxaccel-diff/1"


@dataclass(frozen=True)
class Change:
    """One line of a diff: sign "-", "+" or " ", and the line of the listing."""

    sign: str
    line: Line

    def __str__(self) -> str:
        return f"{self.sign}{self.line}"


@dataclass(frozen=True)
class Totals:
    """Sizes of one side: operator calls, bytes of parameters, FLOPs (symbolic)."""

    nodes: int
    parameter_bytes: int
    flops: sympy.Expr

    @classmethod
    def of(cls, program: Program) -> Totals:
        symbols = {sympy.Symbol(k, integer=True, positive=True): v for k, v in Namer(program).by_name.items()}
        count = cost.flops(program)
        named = count.xreplace(
            {s: next((v for k, v in symbols.items() if k.name == s.name), s) for s in count.free_symbols}
        )
        calls = sum(line.op != STAGE for _, line in lines(program))
        return cls(calls, cost.parameter_bytes(program), named)


@dataclass(frozen=True)
class Diff:
    """The difference between two programs; `print(diff)` shows it as a unified diff.

    `bool(diff)` is False where both are the same.
    """

    before: Program
    after: Program

    @cached_property
    def runs(self) -> list[tuple[bool, list[Line], list[Line]]]:
        """Both sides in order, as runs of lines: whether they are equal, those before, those after."""
        old, new = lines(self.before), lines(self.after)
        keys = [_keys(self.before, old), _keys(self.after, new)]
        matcher = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False)
        return [
            (tag == "equal", [line for _, line in old[a:b]], [line for _, line in new[c:d]])
            for tag, a, b, c, d in matcher.get_opcodes()
        ]

    @cached_property
    def changes(self) -> list[Change]:
        """Every line of both sides, in order."""
        out: list[Change] = []
        for equal, old, new in self.runs:
            if equal:
                out += [Change(" ", line) for line in new]
            else:
                out += [Change("-", line) for line in old]
                out += [Change("+", line) for line in new]
        return out

    def __bool__(self) -> bool:
        return any(c.sign != " " for c in self.changes)

    def hunks(self, context: int = 1) -> Iterator[list[Change]]:
        """Runs of changed lines with `context` unchanged ones around them."""
        near = {
            j
            for i, c in enumerate(self.changes)
            if c.sign != " "
            for j in range(i - context, i + context + 1)
        }
        hunk: list[Change] = []
        for i, change in enumerate(self.changes):
            if i in near:
                hunk.append(change)
            elif hunk:
                yield hunk
                hunk = []
        if hunk:
            yield hunk

    @cached_property
    def totals(self) -> tuple[Totals, Totals]:
        """Sizes before and after."""
        return Totals.of(self.before), Totals.of(self.after)

    def operators(self) -> dict[str, tuple[int, int]]:
        """Operators whose number of calls changed, with both numbers."""
        old = Counter(line.op for _, line in lines(self.before))
        new = Counter(line.op for _, line in lines(self.after))
        return {op: (old[op], new[op]) for op in sorted(old | new) if old[op] != new[op]}

    def __str__(self) -> str:
        old, new = self.totals
        text = []
        for hunk in self.hunks():
            text += ["@@", *map(str, hunk)]
        text += [f"{op}: {a} -> {b}" for op, (a, b) in self.operators().items()]
        text.append(f"nodes: {old.nodes} -> {new.nodes}")
        text.append(f"parameter bytes: {old.parameter_bytes} -> {new.parameter_bytes}")
        text.append(f"flops: {old.flops} -> {new.flops}")
        return "\n".join(text)

    def to_json(self) -> str:
        """The diff as JSON; the schema is described in README.md."""
        sides = [
            {"nodes": t.nodes, "parameter_bytes": t.parameter_bytes, "flops": str(t.flops)}
            for t in self.totals
        ]
        return json.dumps(
            {
                "schema": SCHEMA,
                "before": sides[0],
                "after": sides[1],
                "operators": self.operators(),
                "hunks": [[_as_json(c) for c in hunk] for hunk in self.hunks()],
            },
            indent=2,
        )


def _as_json(change: Change) -> dict[str, Any]:
    return {"sign": change.sign, "text": str(change.line), **asdict(change.line)}


def _keys(program: Program, listed: list[tuple[fx.Node, Line]]) -> list[tuple[Any, ...]]:
    """For each line what it is, with its arguments named by their origin."""

    def origin(node: fx.Node) -> str:
        slot = program.state.get(node.name) if node.op == "placeholder" else None
        if slot is not None:
            return slot.name
        return node.name if node.op == "placeholder" else f"{path(node)} {source(node)}"

    return [
        (line.path, line.source, line.op, line.type, line.regions, _shape_free(node, origin))
        for node, line in listed
    ]


def _shape_free(node: fx.Node, origin: Any) -> str:
    return str(fx.map_arg((node.args, dict(node.kwargs)), origin))
