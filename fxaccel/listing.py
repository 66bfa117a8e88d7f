"""The graph as text: one line a node, the same text for the same model on every machine.

    %out = op(args)                                    # type  file:line  by pass

Operators carry no `.default`; results of a multi-output operator stand left of the `=`; sizes that vary
are s0, s1, ... in the order in which the inputs mention them. Goldens and `fxaccel diff` use this text.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fxaccel.ir import Program, SizeSpec, expr, is_call, is_tensor, path, source, target_name
from fxaccel.schedule import HIDDEN
from fxaccel.stages import parts

STAGE = "stage"  # what stands for an operator in the line where a stage begins

_DTYPES: dict[Any, str] = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "b8", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One node of the listing.

    results   names on the left of the `=`
    op        operator name; "input", "parameter", "buffer", "constant" or "return" for the ends
    args      argument text, `%name` for nodes
    type      "f32[2,8,64]", one for each result
    path, source, by, regions   where the node came from
    """

    results: tuple[str, ...]
    op: str
    args: str
    type: str
    path: str
    source: str
    by: str
    regions: str

    def __str__(self) -> str:
        left = f"{', '.join('%' + r for r in self.results)} = " if self.results else ""
        text = f"{left}{self.op}({self.args})"
        notes = [n for n in (self.type, self.source, self.regions, self.by and f"by {self.by}") if n]
        return f"{text:<75} # {'  '.join(notes)}" if notes else text


class Namer:
    """Names of sizes and dtypes as a reader sees them."""

    def __init__(self, program: Program) -> None:
        order = sorted(program.sizes, key=lambda s: program.sizes[s])
        self.symbols = {sympy.Symbol(s): sympy.Symbol(f"s{i}") for i, s in enumerate(order)}
        self.by_name = {str(old): new for old, new in self.symbols.items()}

    def size(self, size: Any) -> str:
        if isinstance(size, int):
            return str(size)
        e = expr(size)
        return str(e.xreplace({s: self.by_name.get(str(s), s) for s in e.free_symbols})).replace(" ", "")

    def type(self, val: Any) -> str:
        if is_tensor(val):
            dtype = _DTYPES.get(val.dtype, str(val.dtype).removeprefix("torch."))
            return f"{dtype}[{','.join(self.size(s) for s in val.shape)}]"
        if isinstance(val, (tuple, list)):
            return " ".join(self.type(v) for v in val)
        if isinstance(val, (torch.SymInt, SizeSpec)):
            return f"int {self.size(val)}"
        return "" if val is None else type(val).__name__.lower()

    def argument(self, arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return f"%{arg.name}"
        if isinstance(arg, (list, tuple)):
            return f"[{', '.join(self.argument(a) for a in arg)}]"
        if isinstance(arg, (torch.dtype, torch.memory_format, torch.layout)):
            return _DTYPES.get(arg, str(arg).removeprefix("torch."))
        return repr(arg)


def lines(program: Program, *, ends: bool = False) -> list[tuple[fx.Node, Line]]:
    """Each operator call with its line; with `ends`, the inputs, state and outputs as well.

    Before the first call of a stage of a pipeline stands a line of its own, with what the stage receives.
    """
    namer = Namer(program)
    out = []
    stages = {} if program.stages is None else dict(_stages(program, namer))
    for node in program.graph.nodes:
        if node.name in stages:
            out.append((node, stages[node.name]))
        if is_call(node, operator.getitem) and _folds(node):
            continue
        if node.op != "call_function" and not ends:
            continue
        out.append((node, _line(program, namer, node)))
    return out


def _stages(program: Program, namer: Namer) -> Iterator[tuple[str, Line]]:
    """Name of the first call of each stage but the first -> its line."""
    assert program.stages is not None, "the program is not cut"
    cut = zip(program.stages.begins, program.facts(parts)[1:], strict=True)
    for number, (begin, part) in enumerate(cut, 1):
        words = [str(number), *map(namer.argument, part.receives)]
        types = " ".join(namer.type(n.meta["val"]) for n in part.receives)
        yield begin, Line((), STAGE, ", ".join(words), types, "", "", "", "")


def listing(program: Program, *, ends: bool = False) -> str:
    """The whole graph as text."""
    return "\n".join(str(line) for _, line in lines(program, ends=ends))


def _folds(node: fx.Node) -> bool:
    """Whether this getitem is shown as a result of its producer."""
    producer = node.args[0]
    return isinstance(producer, fx.Node) and isinstance(producer.meta.get("val"), (tuple, list))


def _results(node: fx.Node) -> tuple[str, ...]:
    val = node.meta.get("val")
    if not isinstance(val, (tuple, list)) or node.op != "call_function":
        return (node.name,)
    names = ["_"] * len(val)
    for user in node.users:
        if is_call(user, operator.getitem) and isinstance(user.args[1], int):
            names[user.args[1]] = user.name
    return tuple(names)


def _line(program: Program, namer: Namer, node: fx.Node) -> Line:
    if node.op == "placeholder":
        slot = program.state.get(node.name)
        op, args = ("input", "") if slot is None else (slot.kind, slot.name)
    elif node.op == "output":
        op, args = "return", namer.argument(node.args[0])[1:-1]
    elif node.op == "get_attr":
        op, args = "subgraph", str(node.target)
    else:
        op = target_name(node.target)
        words = [namer.argument(a) for a in node.args]
        args = ", ".join([*words, *(f"{k}={namer.argument(v)}" for k, v in node.kwargs.items())])
    return Line(
        results=() if node.op == "output" else _results(node),
        op=op, args=args, type=namer.type(node.meta.get("val")), path=path(node),
        source=source(node), by=node.meta.get("by", ""),
        regions=" ".join([*map(str, node.meta.get("regions", ())), *_kept(program, node)]),
    )  # fmt: skip


def _kept(program: Program, node: fx.Node) -> list[str]:
    """What a schedule says of the results of a node: they are not kept for backward, or not on the device."""
    stages = () if program.stages is None else program.stages.schedules
    made, found = {*_results(node), node.name + HIDDEN}, list[str]()
    for schedule in filter(None, (program.schedule, *stages)):
        found += ["not kept"] * (not made.isdisjoint(schedule.dropped))
        found += ["moved to the host"] * (not made.isdisjoint(one.value for one in schedule.moved))
    return list(dict.fromkeys(found))
