"""The code of a program with a schedule: forward says what is not kept, a function a point of backward computes it again.

    def forward(x):                              def again_7(run, x, w):
        run = Run(table)                             linear = linear(x, w)
        with run:                                    gelu = gelu(linear)
            run.at(5)                                run.fill(0, linear); run.fill(1, gelu)
            linear = linear(x, fc['weight'])
            run.drop(0, linear)
            run.at(6)
            gelu = gelu(linear); del linear
            run.drop(1, gelu)
            run.at(7, again_7, x, fc['weight'])
            y = linear(gelu, ...)
        return [y]

A value that is moved to the host has `run.move` in the place of `run.drop`, and no function that makes it.
fxaccel.recompute holds what runs.
"""  # noqa: E501

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxaccel import emit
from fxaccel.effects import is_random, last_uses
from fxaccel.emit import indented
from fxaccel.ir import Program, Region, arguments, is_tensor
from fxaccel.recompute import Run, Timetable, random_state, redrawn
from fxaccel.schedule import HIDDEN, Again, Schedule

_BATCH_NORM = torch.ops.aten.batch_norm.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class Emitter(emit.Emitter):
    """Writes the functions of a program that has a schedule."""

    def __init__(self, program: Program, outer: emit.Emitter | None = None) -> None:
        super().__init__(program, outer)
        self.schedule = program.schedule or Schedule()
        nodes = list(program.graph.nodes)
        self.node = {n.name: n for n in nodes}
        self.index = {n.name: i for i, n in enumerate(nodes)}
        self.moved = {one.value: one for one in self.schedule.moved}
        self.slot = {name: i for i, name in enumerate([*self.schedule.dropped, *self.moved])}
        self.again = {self.node[one.before]: Part(self, one) for one in self.schedule.again}
        self.run = self.local("run")
        self.start: Any = Run
        self.states = {n: self.local(f"state_{n.name}") for part in self.again.values() for n in part.random}
        self.noted = {n for part in self.again.values() for n in part.nodes if part.rerun(n)}

    def body(self, body: list[fx.Node], output: fx.Node) -> list[str]:
        made = set(body)
        also = {node: [n for n in part.given if n in made] for node, part in self.again.items()}
        lines = self.block(body, last_uses(body, output.all_input_nodes, also), 0)
        self.functions = [part.lines(node) for node, part in self.again.items()]
        start, table = self.constant("Run", self.start), self.constant("timetable", self.timetable())
        return [
            f"{self.run} = {start}({table})",
            f"with {self.run}:",
            *indented(lines),
            f"return {self.argument(list(output.args[0]))}",
        ]

    def timetable(self) -> Timetable:
        again = {self.index[node.name]: part for node, part in self.again.items()}
        fills = {i: [self.slot[value] for value, _ in part.one.held] for i, part in again.items()}
        takes = {i: [self.slot[n.name] for n in part.taken_up] for i, part in again.items()}
        held = [one for part in again.values() for one in part.one.held]
        held += [(one.value, one.until) for one in self.schedule.moved]
        frees = sorted(((self.index[until], self.slot[value]) for value, until in held), reverse=True)
        fetches = sorted(
            ((self.index[m.fetch], self.index[m.until], self.slot[m.value]) for m in self.schedule.moved),
            reverse=True,
        )
        return Timetable(fills, takes, frees, fetches)

    def regions(self, node: fx.Node) -> tuple[Region, ...]:
        return tuple(
            r for r in super().regions(node) if r.kind != "checkpoint"
        )  # the schedule says what is kept

    def statements(self, node: fx.Node, last_use: dict[fx.Node, list[fx.Node]]) -> list[str]:
        before = [] if node.target is operator.getitem or not tensors_of(node) else self.before(node)
        dead = last_use.get(node, [])
        deleted = [f"del {', '.join(self.names[n] for n in dead)}"] if dead else []
        shared = self.prepared(node)  # of several calls: what autograd saves of it is none of this one's
        return [*shared, *before, self.statement(node, {}), *self.after(node), *deleted]

    def before(self, node: fx.Node) -> list[str]:
        """Where the run is, and what the backward of the call computes first."""
        words = [str(self.index[node.name])]
        part = self.again.get(node)
        if part is not None:
            words += [part.name, *(self.names[n] for n in part.given), *(self.states[n] for n in part.random)]
        lines = []
        if node in self.states:
            state = self.constant("random_state", random_state)
            lines.append(f"{self.states[node]} = {state}({self.argument(_device(node))})")
        return [*lines, f"{self.run}.at({', '.join(words)})"]

    def after(self, node: fx.Node) -> Iterable[str]:
        """What autograd is not to keep of the call, and what lies in the host's memory."""
        name = self.names[node]
        if not node.users:
            return  # the result has no name, and no gradient
        if node in self.noted:
            yield f"{self.run}.note({', '.join([*_given(self, node), *_common(self, node)])})"
        if node.name + HIDDEN in self.slot:
            read = "".join(f"{self.names[n]}, " for n in node.all_input_nodes)
            made = f"[{name}[i] for i in {_read(node)}]" if _read(node) is not None else name
            yield f"{self.run}.hide({self.slot[node.name + HIDDEN]}, ({read}), {made})"
        results = [(u, f"{name}[{u.args[1]}]") for u in node.users if u.target is operator.getitem]
        own = [(node, name)] if node.target is not operator.getitem else []
        for value, text in [*own, *results]:
            if value.name in self.slot:
                word = "move" if value.name in self.moved else "drop"
                yield f"{self.run}.{word}({self.slot[value.name]}, {text})"


class Part(emit.Emitter):
    """Writes one function that computes values again.

    given     nodes that forward hands to it; the random states of `random` follow
    """

    def __init__(self, outer: Emitter, one: Again) -> None:
        super().__init__(outer.program, outer)
        self.outer, self.one = outer, one
        self.name = self.title(f"again_{one.before}")
        self.nodes, inside = [outer.node[name] for name in one.nodes], set(one.nodes)
        read = dict.fromkeys(a for n in self.nodes for a in reads(n) if a.name not in inside)
        self.taken_up = [n for n in read if n.name in outer.slot]
        self.given = [n for n in read if n.name not in outer.slot]
        self.random = [n for n in self.nodes if is_random(n)]
        self.hidden = {value: outer.slot[value] for value, _ in one.held if value.endswith(HIDDEN)}
        self.states: dict[fx.Node, str] = {}
        self.run = ""

    def lines(self, node: fx.Node) -> list[str]:
        """The function, for what is computed before the backward of `node`."""
        self.run = self.local("run")
        for n in [*self.given, *self.taken_up]:
            self.names[n] = self.local(n.name)
        for n in self.nodes:
            if moves_statistics(n):  # they have been moved once, and have no part in the result
                self.names.update(dict.fromkeys(_statistics(n), "None"))
        self.states = {n: self.local(f"state_{n.name}") for n in self.random}
        words = [self.run, *(self.names[n] for n in self.given), *self.states.values()]
        slot, at = self.outer.slot, self.outer.index[node.name]
        held = [self.outer.node[value] for value, _ in self.one.held if not value.endswith(HIDDEN)]
        return [
            f"def {self.name}({', '.join(words)}):",
            *(f"    {self.names[n]} = {self.run}.need({slot[n.name]}, {at})" for n in self.taken_up),
            *indented(self.block(self.nodes, last_uses(self.nodes, held), 0)),
            *(f"    {self.run}.fill({slot[n.name]}, {self.names[n]})" for n in held),
        ]

    def regions(self, node: fx.Node) -> tuple[Region, ...]:
        return tuple(r for r in super().regions(node) if r.kind == "autocast")

    def statements(self, node: fx.Node, last_use: dict[fx.Node, list[fx.Node]]) -> list[str]:
        lines = super().statements(node, last_use)
        if node not in self.states:
            return lines
        words = f"{self.argument(_device(node))}, {self.states[node]}"
        return [f"with {self.constant('redrawn', redrawn)}({words}):", *indented(lines)]

    def expression(self, node: fx.Node) -> str:
        text = super().expression(node)
        if not self.rerun(node):
            return text
        given, common = _given(self, node), _common(self, node)
        call = f"lambda {', '.join([*given, *common])}: {text}"
        hidden = str(self.hidden.get(node.name + HIDDEN))
        words = [str(self.outer.index[node.name]), hidden, str(_read(node)), call, f"({', '.join(given)},)"]
        return f"{self.run}.rerun({', '.join([*words, *common])})"

    def rerun(self, node: fx.Node) -> bool:
        """Whether a call is made with gradients: for what it hides, or since it chooses its way by them."""
        target = node.target
        chooses = getattr(target, "namespace", "") == "fxaccel" or target is _ATTENTION
        return bool(_tensor_inputs(node)) and (node.name + HIDDEN in self.hidden or chooses)


def _device(node: fx.Node) -> torch.device:
    return tensors_of(node)[0].device


def moves_statistics(node: fx.Node) -> bool:
    """Whether it is a batch norm in training."""
    return node.target is _BATCH_NORM and bool(arguments(node)["training"])


def _statistics(node: fx.Node) -> list[fx.Node]:
    return [a for name in ("running_mean", "running_var") if (a := arguments(node)[name]) is not None]


def reads(node: fx.Node) -> list[fx.Node]:
    """What a call reads when it is computed again."""
    unread = _statistics(node) if moves_statistics(node) else []
    return [a for a in node.all_input_nodes if a not in unread]


def _read(node: fx.Node) -> tuple[int, ...] | None:
    """Which results of a call are read; None where it has one. What is saved of the others is hidden."""
    if not isinstance(node.meta["val"], (list, tuple)):
        return None
    return tuple(u.args[1] for u in node.users if u.target is operator.getitem)


def _given(writer: emit.Emitter, node: fx.Node) -> list[str]:
    """The names of the tensors that a call reads."""
    return [writer.names[n] for n in _tensor_inputs(node)]


def _common(writer: emit.Emitter, node: fx.Node) -> list[str]:
    """The name of what it has in common with other calls, if there is such a thing."""
    return [writer.takes[node]] if node in writer.takes else []


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [a for a in reads(node) if tensors_of(a)]


def tensors_of(node: fx.Node) -> list[Any]:
    """The tensors that a node makes, as far as the graph knows them."""
    return [leaf for leaf in pytree.tree_leaves(node.meta["val"]) if is_tensor(leaf)]
