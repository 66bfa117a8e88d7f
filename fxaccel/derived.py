"""Weights made of weights: what a pass computes from parameters alone runs once in inference.

A pass that changes a weight writes the change into the graph: `w - w.mean(0)`, `w * scale`. Where gradients
flow, that is what runs at each call, and training is the original's. In a capture without gradients such
values are computed at the first call and kept; they are computed again when a tensor that they were made of
has changed: written to, exchanged in its module, or moved. A write through `tensor.data` or from another
framework counts in no version of the tensor and is not noticed; write within `torch.no_grad()`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxaccel.effects import has_effect, storage_owner, written
from fxaccel.ir import Program, number, tensors

_version = operator.attrgetter("_version")


def standing(program: Program) -> set[fx.Node]:
    """Parameters and buffers that no call writes to, and what follows from them alone (an analysis)."""
    writers, outputs = program.facts(written), program.graph.output_node()
    shown = {storage_owner(n) for n in outputs.all_input_nodes}
    found = {n for n in program.graph.nodes if n.name in program.state and n not in writers}
    for node in program.graph.nodes:
        read = node.all_input_nodes
        kept = not (has_effect(node) or node in writers or node in shown)
        if kept and read and found.issuperset(read):
            found.add(node)
    return found


def derived(program: Program) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that are computed ahead, in order, and those of them that the rest of the graph reads."""
    if program.grad:
        return [], []
    found = program.facts(standing)
    ahead = {n for n in found if n.op == "call_function" and n.meta.get("by")}
    nodes = []
    for node in reversed(program.graph.nodes):
        if node in ahead:
            nodes.append(node)
            ahead.update(a for a in node.all_input_nodes if a.op == "call_function")
    nodes.reverse()
    return nodes, [n for n in nodes if not ahead.issuperset(n.users)]


def note(program: Program) -> str:
    """A sentence for the report on the values that are kept, "" where there are none."""
    _, kept = derived(program)
    owned = [n for n in kept if getattr(storage_owner(n), "op", "call_function") == "call_function"]
    values = [t for n in owned for t in tensors(n.meta["val"])]
    if not values:
        return ""
    what = f"{len(values)} values of {mebibytes(program, owned):.3g} MiB"
    return f"{what} are computed from parameters once, and again when those change"


def mebibytes(program: Program, nodes: Iterable[fx.Node]) -> float:
    """The size of what the nodes compute, at the sizes of the example."""
    values = [t for n in nodes for t in tensors(n.meta["val"])]
    return sum(number(t.numel(), program.hints) * t.element_size() for t in values) / 2**20


class Derived:
    """Calls `compute()` for the values, and again only when what `sources()` returns has changed."""

    def __init__(self, sources: Callable[[], tuple[Tensor, ...]], compute: Callable[[], Any]) -> None:
        self.sources, self.compute = sources, compute
        self.read: tuple[Tensor, ...] = ()
        self.state: Any = None
        self.values: Any = None

    def __call__(self) -> Any:
        if torch.compiler.is_compiling():
            return self.compute()
        read = self.sources()
        if list(map(id, read)) != list(map(id, self.read)):
            self.read, self.state = read, None
        if any(type(t) not in (Tensor, nn.Parameter) for t in read):
            return self.compute()
        try:
            state = [*map(_version, read), *map(Tensor.data_ptr, read)]
        except RuntimeError:  # tensors of inference mode and of functorch do not count their writes
            return self.compute()
        if state != self.state:
            self.values, self.state = self.compute(), state
        return self.values
