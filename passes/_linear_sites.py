"""The weights of a graph that linears read, what the linears are to the model, and which may be replaced."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxaccel.derived import standing
from fxaccel.ir import Program, arguments, is_call, number, source, target_name

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
    """A parameter and the linears that read it as their weight, or the embeddings whose table it is.

    name       in the model's state_dict
    readers    the calls
    flipped    whether it is [inputs, outputs]: read transposed, or a table, whose inputs are its rows
    role       one of ROLES, "" for any other linear
    """

    name: str
    node: fx.Node
    readers: tuple[fx.Node, ...]
    flipped: bool
    role: str

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the linear."""
        rows, columns = (int(s) for s in self.node.meta["val"].shape)
        return (columns, rows) if self.flipped else (rows, columns)

    @property
    def inputs(self) -> list[fx.Node]:
        """What the readers read, indices of a table included."""
        return [r.args[1 if self.role == TABLE else 0] for r in self.readers]

    def rows(self, program: Program) -> int:
        """How many rows the readers are given in a call of the captured sizes."""
        shapes = [x.meta["val"].shape for x in self.inputs]
        return sum(
            math.prod(number(s, program.hints) for s in (v if self.role == TABLE else v[:-1])) for v in shapes
        )


def sites(program: Program) -> Iterator[LinearSite | tuple[fx.Node, str]]:
    """Each site; where a linear's weight cannot be replaced, the linear and the reason."""
    seen = set[fx.Node]()
    for node in program.graph.nodes:
        if is_call(node, LINEAR):
            weight, transposed = _parameter(program, arguments(node)["weight"])
        elif is_call(node, EMBEDDING):
            weight, transposed = _parameter(program, arguments(node)["weight"])
            if weight is not None and any(is_call(u, LINEAR) for u in weight.users):
                continue  # told of with the linear
        else:
            continue
        if weight is None:
            yield node, "its weight is computed, not a parameter of the model"
        elif weight not in seen:
            seen.add(weight)
            why = _obstacle(program, weight, transposed)
            yield (node, why) if why else _site(program, weight, transposed)


def _parameter(program: Program, weight: Any) -> tuple[fx.Node | None, bool]:
    """The parameter that is read, and whether through a transposition."""
    transposed = is_call(weight, PERMUTE) and list(weight.args[1]) == [1, 0]
    weight = weight.args[0] if transposed else weight
    slot = program.state.get(weight.name) if isinstance(weight, fx.Node) else None
    known = slot is not None and slot.kind == "parameter"
    return (weight if known else None), transposed


def _readers(weight: fx.Node, transposed: bool) -> list[fx.Node]:
    if not transposed:
        return list(weight.users)
    return [u for p in weight.users for u in (p.users if is_call(p, PERMUTE) else [p])]


def _obstacle(program: Program, weight: fx.Node, transposed: bool) -> str:
    """Why the weight stays, "" for no reason."""
    val, name = weight.meta["val"], program.state[weight.name].name
    others = [n for group in program.ties if name in group for n in group if n != name]
    if others:
        return f"its weight is one tensor with {', '.join(others)}"
    if val.dim() != 2 or not val.dtype.is_floating_point:
        return f"its weight is {val.dtype} of {val.dim()} dimensions, expected a real matrix"
    readers = _readers(weight, transposed)
    for user in readers:
        bound = (
            arguments(user) if user.target is readers[0].target and is_call(user, LINEAR, EMBEDDING) else {}
        )
        if user.op == "output":
            return "its weight is also an output of the model"
        if _parameter(program, bound.get("weight")) != (weight, transposed):
            by, at = target_name(user.target), source(user) or "no known line"
            return f"its weight is also read by {by} at {at}"
        if bound.get("scale_grad_by_freq") or bound.get("sparse"):
            return "its table has gradients that are sparse or scaled by frequency"
        if bound.get("padding_idx", -1) >= 0 and program.grad:
            return f"row {bound['padding_idx']} of its table is padding, which has no gradient"
    return ""


def _site(program: Program, weight: fx.Node, transposed: bool) -> LinearSite:
    readers = tuple(_readers(weight, transposed))
    if is_call(readers[0], EMBEDDING):
        role = TABLE
    elif any(_after_attention(r) for r in readers):
        role = ATTENTION
    else:
        role = HEAD if any(_ends(program, r) for r in readers) else ""
    flipped = transposed != (role == TABLE)
    return LinearSite(program.state[weight.name].name, weight, readers, flipped, role)


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
