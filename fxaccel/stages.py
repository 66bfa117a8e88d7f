"""A program cut into stages: what each of them computes, what it receives and what it sends on.

A stage is what stands between two places of the graph. What it reads of earlier stages it receives from the
one before it, which relays what it did not make itself, so only neighbours talk. Values that are made of
sizes, buffers and inputs alone, and that cost no products, are not sent: each stage that reads them makes
them again (masks, positions, tables of rotations), unless what they are made of has more bytes than they.
So are views of parameters, and sizes, which a stage reads off any tensor that it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxaccel.cost import node_flops
from fxaccel.effects import aliased_arguments, flowing, has_effect, learned, written
from fxaccel.errors import OptionError
from fxaccel.ir import Program, expr, is_tensor, number
from fxaccel.schedule import Schedule

_SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Stages:
    """Where a program is cut.

    begins          name of the first call of each stage but the first, in the order of the graph
    microbatches    that the captured batch is to be cut into
    in_flight       of how many of them each stage holds what waits for backward; empty for one
    schedules       which values autograd does not keep of each stage; empty where it keeps all of all
    """

    begins: tuple[str, ...]
    microbatches: int = 1
    in_flight: tuple[int, ...] = ()
    schedules: tuple[Schedule | None, ...] = ()

    def flight(self, number: int) -> int:
        """Microbatches of which a stage holds what waits for backward."""
        return self.in_flight[number] if self.in_flight else 1

    def schedule(self, number: int) -> Schedule | None:
        """That of a stage."""
        return self.schedules[number] if self.schedules else None


@dataclass(frozen=True)
class Part:
    """A stage of a program, by the nodes of that program, and as a program of its own.

    receives    what it takes: the inputs of the program, or what the stage before it sends
    sends       what it returns; of the last stage nothing, which returns the outputs
    program     takes and returns these, under the same names; structures, sizes and guards are not its own
    """

    receives: tuple[fx.Node, ...]
    sends: tuple[fx.Node, ...]
    program: Program


# -- what is made again ----------------------------------------------------------------------------


def leaves(program: Program) -> dict[fx.Node, frozenset[fx.Node]]:
    """Node -> what a stage that reads it has to receive for that, if it does not make it (an analysis).

    The node itself, or what it is made of if each stage makes it again; nothing for state and for what
    follows from state and sizes.
    """
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    light: set[fx.Node] = program.facts(cheap)
    for node in program.graph.nodes:
        if node.name in program.state or node.op == "get_attr" or _is_input_size(node):
            found[node] = frozenset()  # a size is that of some tensor, and a stage has one
        elif node not in light or node.op == "placeholder":
            found[node] = frozenset([node])
        else:
            below = frozenset[fx.Node]().union(*(found[a] for a in node.all_input_nodes))
            small = sum(nbytes(program, n) for n in below) <= nbytes(program, node)
            found[node] = below if small or not is_tensor(node.meta["val"]) else frozenset([node])
    return found


def _is_input_size(node: fx.Node) -> bool:
    return node.target is _SIZE and all(a.op == "placeholder" for a in node.all_input_nodes)


def cheap(program: Program) -> set[fx.Node]:
    """What may be made in several stages and costs little: of state, inputs and sizes (an analysis)."""
    writers, learns = program.facts(written), program.facts(learned)
    standing, found = set[fx.Node](), set[fx.Node]()
    for node in program.graph.nodes:
        read = node.all_input_nodes
        if node in writers or (has_effect(node) and node.op != "placeholder"):
            continue
        if node.name in program.state or node.op == "get_attr" or _is_input_size(node):
            standing.add(node)
            found.add(node)
        elif node.op == "placeholder":
            found.add(node)
        elif node in learns:
            if standing.issuperset(read) and aliased_arguments(node):  # a view of a parameter
                standing.add(node)
                found.add(node)
        elif found.issuperset(read) and _is_one(node) and number(node_flops(node), program.hints) == 0:
            found.add(node)
    return found


def _is_one(node: fx.Node) -> bool:
    return not isinstance(node.meta["val"], (tuple, list))


def nbytes(program: Program, node: fx.Node) -> int:
    """Bytes of a tensor at the sizes that the program was captured with."""
    val = node.meta["val"]
    return number(val.numel(), program.hints) * val.element_size() if is_tensor(val) else 0


def again(program: Program) -> set[fx.Node]:
    """The calls that each stage makes for itself (an analysis)."""
    return {n for n, of in program.facts(leaves).items() if n.op != "placeholder" and n not in of}


def closure(made_again: set[fx.Node], read: Iterable[fx.Node]) -> set[fx.Node]:
    """What is to be made again so that these values are there."""
    found, waiting = set[fx.Node](), [n for n in read if n in made_again]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [a for a in node.all_input_nodes if a in made_again]
    return found


# -- the parts -------------------------------------------------------------------------------------


def parts(program: Program) -> list[Part]:
    """The stages of a program that is cut (an analysis)."""
    assert program.stages is not None, "the program is not cut"
    made_again, begins = program.facts(again), set(program.stages.begins)
    own: list[list[fx.Node]] = [[]]
    for node in program.graph.nodes:
        if node.name in begins:
            own.append([])
        if node.op in ("call_function", "get_attr") and node not in made_again:
            own[-1].append(node)
    return _Cut(program, own, made_again).parts()


class _Cut:
    """Goes through the stages from the last to the first: each says what the one before it has to send."""

    def __init__(self, program: Program, own: Sequence[list[fx.Node]], made_again: set[fx.Node]) -> None:
        self.program, self.own, self.made_again = program, own, made_again
        self.leaves = program.facts(leaves)
        self.index = {n: i for i, n in enumerate(program.graph.nodes)}
        self.outputs = program.graph.output_node().all_input_nodes
        assert program.stages is not None, "the program is cut"
        self.stages, self.hints = program.stages, microbatch(program, program.stages.microbatches)

    def parts(self) -> list[Part]:
        found, sends = list[Part](), list[fx.Node]()
        for i in reversed(range(len(self.own))):
            found.append(self.part(i, sends))
            sends = list(found[-1].receives)
        return found[::-1]

    def part(self, number: int, sends: list[fx.Node]) -> Part:
        own, first, last = self.own[number], number == 0, number == len(self.own) - 1
        outputs, made = self.outputs if last else [], set(own)
        read = dict.fromkeys([a for n in own for a in n.all_input_nodes] + outputs)
        inside = closure(self.made_again, read)
        for node in sorted(inside, key=self.index.__getitem__):
            if not _is_input_size(node):
                read.update(dict.fromkeys(node.all_input_nodes))
        wanted = {leaf for n in read if n not in self.made_again for leaf in self.leaves[n]}
        wanted = (wanted | set(sends)) - made
        there = self.program.input_nodes() if first else sorted(wanted, key=self.index.__getitem__)
        sizes = dict[fx.Node, tuple[fx.Node, int]]()
        for node in sorted(inside, key=self.index.__getitem__):
            if node.target is _SIZE:
                self.carried(node, there, {*made, *inside}, sizes)
        nodes = sorted([*own, *inside], key=self.index.__getitem__)
        receives = there if first else sorted(there, key=self.index.__getitem__)
        shown = self.program.graph.output_node().args[0] if last else sends
        inner = alone(self.program, nodes, receives, shown, sizes)
        inner = replace(inner, schedule=self.stages.schedule(number), hints=self.hints)
        return Part(tuple(receives), tuple(sends), inner)

    def carried(
        self, node: fx.Node, there: list[fx.Node], made: set[fx.Node],
        sizes: dict[fx.Node, tuple[fx.Node, int]],
    ) -> None:  # fmt: skip
        """Find a tensor that has this size; where there is none, the one that was asked is received, too."""
        asked = node.args[0]
        assert isinstance(asked, fx.Node), "a size is that of a tensor"
        if asked in there or asked in made or asked.name in self.program.state:
            return
        size = expr(node.meta["val"])
        for tensor in there:
            for d, other in enumerate(tensor.meta["val"].shape if is_tensor(tensor.meta["val"]) else ()):
                if expr(other) == size:
                    sizes[node] = tensor, d
                    return
        there.append(asked)


# -- microbatches ----------------------------------------------------------------------------------


def batch(program: Program) -> str:
    """The symbol of the batch: the first dimension of the first input. OptionError where that is fixed."""
    symbol = _head(next(iter(program.input_nodes()), None))
    if symbol is None:
        first = next((n for n in program.inputs if n is not None), "the first input")
        raise OptionError(
            f"the first dimension of {first} is fixed, so there is no batch to choose",
            "capture with a batch of two or more",
        )
    return symbol


def _head(node: fx.Node | None) -> str | None:
    """The symbol that is the first dimension of an input, None where that is a number, or nothing."""
    shape: Sequence[Any] = node.meta["val"].shape if node is not None else ()
    return str(expr(shape[0])) if len(shape) and expr(shape[0]).is_Symbol else None


def batches(program: Program) -> set[str]:
    """The symbols of the batch: first dimensions of inputs, of its size, tied to it by a guard; none where
    it is fixed (an analysis)."""
    symbols = [_head(node) for node in program.input_nodes()]
    if not symbols or (first := symbols[0]) is None:
        return set()
    heads, found, more = program.hints.keys() & symbols, set[str](), {first}
    tied = [set(re.findall(r"\w+", g)) for g in program.guards if "==" in g]
    while more:
        found |= more
        near = {s for names in tied if names & found for s in names & heads}
        more = {s for s in near if program.hints[s] == program.hints[first]} - found
    return found


def microbatch(program: Program, count: int) -> dict[str, int]:
    """The sizes of one of so many equal parts of the captured batch."""
    if count == 1:
        return program.hints
    size, rest = divmod(program.hints[batch(program)], count)
    if rest:
        raise OptionError(
            f"the captured batch of {size * count + rest} cannot be cut into {count} equal microbatches"
        )
    return {**program.hints, **dict.fromkeys(program.facts(batches), size)}


# -- a stage as a program --------------------------------------------------------------------------


def alone(
    program: Program, nodes: Sequence[fx.Node], receives: Sequence[fx.Node], shown: Any,
    sizes: Mapping[fx.Node, tuple[fx.Node, int]],
) -> Program:  # fmt: skip
    """These nodes as a program that takes what they receive and returns what is shown, names as they were.

    sizes    call for a size -> the tensor that has it and the dimension, where that is not the one asked
    """
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    made, shown = {*nodes, *receives}, list(shown)
    read = {a for n in nodes if n not in sizes for a in n.all_input_nodes if a not in made}
    read |= {n for n in shown if isinstance(n, fx.Node) and n not in made}
    state = [n for n in program.graph.find_nodes(op="placeholder") if n in read]
    for node in [*state, *receives]:
        env[node] = graph.create_node("placeholder", node.name, name=node.name)
        env[node].meta = {**node.meta, "val": _received(program, node)}
    for node in nodes:
        asked = (env[sizes[node][0]], sizes[node][1]) if node in sizes else None
        if asked is None:
            env[node] = graph.node_copy(node, env.__getitem__)
        else:
            env[node] = graph.create_node(node.op, node.target, asked, name=node.name)
        env[node].meta = dict(node.meta)
    output = graph.output(fx.map_arg(shown, env.__getitem__))
    output.meta = dict(program.graph.output_node().meta)
    assert all(new.name == node.name for node, new in env.items()), "names are as they were"
    slots = {n.name: program.state[n.name] for n in state}
    names = {slot.name for slot in slots.values() if slot.kind == "constant"}
    return replace(
        program, graph=graph, state=slots, inputs=tuple(n.name for n in receives), baked={}, sizes={},
        constants={k: v for k, v in program.constants.items() if k in names}, guards=(), notes=[],
        contiguous=frozenset(), schedule=None, stages=None, _facts={},
    )  # fmt: skip


def _received(program: Program, node: fx.Node) -> Any:
    """The value of a node as an input: with a gradient where one flows back."""
    val = node.meta["val"]
    if isinstance(val, Tensor) and node.op != "placeholder":
        return val.detach().requires_grad_(node in program.facts(flowing))
    return val
