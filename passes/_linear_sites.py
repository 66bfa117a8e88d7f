"""The weights of a graph that linears read, what the linears are to the model, and which may be replaced."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxaccel.derived import standing
from fxaccel.ir import Program, arguments, is_call, number, source, target_name
from fxaccel.passes._advice import NO_GRAD, OWN
from fxaccel.rule import Refusal

aten = torch.ops.aten
LINEAR, EMBEDDING, PERMUTE = aten.linear.default, aten.embedding.default, aten.permute.default
ATTENTION, HEAD, TABLE = "attention-outputs", "heads", "embeddings"
ROLES = (ATTENTION, HEAD, TABLE)
_MOVES = {
    "reshape", "permute", "contiguous", "clone", "dropout", "slice", "select", "squeeze", "unsqueeze", "to",
    "_to_copy", "flatten", "transpose", "detach", "expand", "getitem",
}  # fmt: skip
_PRODUCTS = {"linear", "matmul", "conv1d", "conv2d", "conv3d", "embedding", "attention"}


@dataclass(frozen=True)
class LinearSite:
    """A parameter and the linears that read it as their weight, or the embeddings whose table it is, or both.

    name       in the model's state_dict; `aliases` other names of the same parameter
    readers    the calls
    flipped    whether it is read transposed, [inputs, outputs]
    roles      of ROLES; none for linears of the inside
    """

    name: str
    node: fx.Node
    readers: tuple[fx.Node, ...]
    flipped: bool
    roles: tuple[str, ...]
    aliases: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the linear; rows and columns of a table."""
        rows, columns = (int(s) for s in self.node.meta["val"].shape)
        return (columns, rows) if self.flipped else (rows, columns)

    @property
    def linears(self) -> list[fx.Node]:
        """The readers that multiply."""
        return [r for r in self.readers if is_call(r, LINEAR)]

    @property
    def inputs(self) -> list[fx.Node]:
        """What the linears read."""
        return [r.args[0] for r in self.linears]

    def among(self, nodes: Mapping[str, fx.Node]) -> LinearSite:
        """The same site in a copy of its graph, whose nodes are given by name."""
        return replace(self, node=nodes[self.node.name], readers=tuple(nodes[r.name] for r in self.readers))

    def rows(self, program: Program) -> int:
        """How many rows the linears are given in a call of the captured sizes; how many are looked up."""
        shapes = [x.meta["val"].shape[:-1] for x in self.inputs]
        shapes = shapes or [r.args[1].meta["val"].shape for r in self.readers]
        return sum(math.prod(number(s, program.hints) for s in shape) for shape in shapes)

    def given(self, program: Program) -> tuple[int, ...]:
        """The shape of what takes as long as all that the readers are given, at the captured sizes."""
        rows = (self.rows(program),)
        return (*rows, self.shape[1]) if self.linears else rows

    def called(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a reader computes of such a value with a dense weight [outputs, inputs]."""
        return F.linear(x, weight, bias) if self.linears else F.embedding(x, weight)


def sites(program: Program) -> Iterator[LinearSite | tuple[fx.Node, str]]:
    """Each site; where a linear's weight cannot be replaced, the linear and the reason."""
    seen = set[fx.Node]()
    for node in program.graph.nodes:
        if not is_call(node, LINEAR, EMBEDDING):
            continue
        weight, transposed = parameter(program, arguments(node)["weight"])
        if weight is None:
            yield (
                node,
                Refusal("its weight is computed, not a parameter of the model", "a parameter in its place"),
            )
        elif weight not in seen:
            seen.add(weight)
            why = _obstacle(program, weight, transposed)
            yield (node, why) if why else _site(program, weight, transposed)


def parameter(program: Program, weight: Any) -> tuple[fx.Node | None, bool]:
    """The parameter that is read, and whether through a transposition."""
    transposed = is_call(weight, PERMUTE) and list(weight.args[1]) == [1, 0]
    weight = weight.args[0] if transposed else weight
    slot = program.state.get(weight.name) if isinstance(weight, fx.Node) else None
    known = slot is not None and slot.kind == "parameter"
    return (weight if known else None), transposed


def names(program: Program, weight: fx.Node) -> tuple[str, tuple[str, ...]]:
    """The name of a parameter, and other names of the same one."""
    name = program.state[weight.name].name
    return name, tuple(n for group in program.ties if name in group for n in group if n != name)


def also_read(user: fx.Node) -> str:
    """Why a weight stays that something reads which is no call of its kind."""
    if user.op == "output":
        return Refusal("its weight is also an output of the model", OWN)
    by, at = target_name(user.target), source(user) or "no known line"
    return Refusal(f"its weight is also read by {by} at {at}", OWN)


def _readers(weight: fx.Node, transposed: bool) -> list[fx.Node]:
    if not transposed:
        return list(weight.users)
    return [u for p in weight.users for u in (p.users if is_call(p, PERMUTE) else [p])]


def _obstacle(program: Program, weight: fx.Node, transposed: bool) -> str:
    """Why the weight stays, "" for no reason."""
    val = weight.meta["val"]
    if val.dim() != 2 or not val.dtype.is_floating_point:
        return f"its weight is {val.dtype} of {val.dim()} dimensions, expected a real matrix"
    for user in _readers(weight, transposed):
        bound = arguments(user) if is_call(user, LINEAR, EMBEDDING) else {}
        if parameter(program, bound.get("weight")) != (weight, transposed):
            return also_read(user)
        if bound.get("scale_grad_by_freq") or bound.get("sparse"):
            return Refusal(
                "its table has gradients that are sparse or scaled by frequency",
                "sparse=False and scale_grad_by_freq=False",
            )
        if bound.get("padding_idx", -1) >= 0 and program.grad:
            return Refusal(
                f"row {bound['padding_idx']} of its table is padding, which has no gradient", NO_GRAD
            )
    return ""


def _site(program: Program, weight: fx.Node, transposed: bool) -> LinearSite:
    readers = tuple(_readers(weight, transposed))
    linears = [r for r in readers if is_call(r, LINEAR)]
    is_a = {
        TABLE: len(linears) < len(readers),
        ATTENTION: any(map(_after_attention, linears)),
        HEAD: any(_ends(program, r) for r in linears),
    }
    roles = tuple(role for role in ROLES if is_a[role])
    name, aliases = names(program, weight)
    return LinearSite(name, weight, readers, transposed, roles, aliases)


def _opname(node: fx.Node) -> str:
    return getattr(node.target, "_opname", getattr(node.target, "__name__", ""))


def _after_attention(linear: fx.Node) -> bool:
    """Whether a linear reads the heads of an attention, put side by side."""
    x: Any = linear.args[0]
    while isinstance(x, fx.Node) and x.op == "call_function":
        name = _opname(x)
        if name == "matmul":  # of two computed values: probabilities by values
            return all(isinstance(a, fx.Node) and a.op == "call_function" for a in x.args[:2])
        if name in ("attention", "scaled_dot_product_attention"):
            return True
        if name not in _MOVES:
            return False
        x = x.args[0]
    return False


def _ends(program: Program, linear: fx.Node) -> bool:
    """Whether all that becomes of a linear's result is an output: no product, norm or sum follows."""
    fixed, seen, queue = program.facts(standing), {linear}, [linear]
    while queue:
        for user in queue.pop().users:
            if user.op == "output" or user in seen or "loss" in _opname(user):
                continue
            mixed = any(
                a not in seen and a not in fixed and a.op == "call_function" for a in user.all_input_nodes
            )
            name = _opname(user)
            if name in _PRODUCTS or "norm" in name or (mixed and name not in _MOVES):
                return False
            seen.add(user)
            queue.append(user)
    return True
