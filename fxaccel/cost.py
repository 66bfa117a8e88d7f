"""What a program costs, symbolic in the sizes of its inputs: FLOPs and bytes.

A multiply and an add count as two. Products, convolutions and attention are counted, element-wise
operators are not (as torch.utils.flop_counter does, whose formulas are used where it has them; it has none
for the composite operators of the training IR). Causal attention counts in full.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from fxaccel.ir import Program, TensorSpec, arguments, expr, is_tensor, value_of

aten = torch.ops.aten
PER_ELEMENT = 16  # FLOPs an output element up to which a custom operator is no product: ATen's norms count 0


def flops(program: Program) -> sympy.Expr:
    """FLOPs of one forward run, a polynomial in the size symbols."""
    total: sympy.Expr = sympy.Integer(0)
    known: dict[Any, sympy.Expr] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            key = (node.target, _shapes(node))
            if key not in known:
                known[key] = node_flops(node)
            total += known[key]
    return sympy.expand(total)


def node_flops(node: fx.Node) -> sympy.Expr:
    """FLOPs of one call."""
    formula = _FORMULAS.get(node.target)
    if formula is not None:
        return formula(value_of(arguments(node)), node.meta["val"])
    packet = getattr(node.target, "overloadpacket", None)
    if packet in flop_registry:
        val = node.meta["val"]
        args, kwargs, out = _plain((value_of(node.args), value_of(dict(node.kwargs)), val))
        count = expr(flop_registry[packet](*args, **kwargs, out_val=out))
        share = sympy.cancel(count / _size((val[0] if isinstance(val, (tuple, list)) else val).shape))
        if node.target.namespace == "aten" or not (share.is_number and share <= PER_ELEMENT):
            return count
    return sympy.Integer(0)


def _plain(values: Any) -> Any:
    """With shapes in the place of what a loaded graph knows: torch's formulas read those of tensors."""
    return pytree.tree_map(lambda v: tuple(v.shape) if isinstance(v, TensorSpec) else v, values)


def _size(shape: Any) -> sympy.Expr:
    return sympy.prod([expr(s) for s in shape]) if len(shape) else sympy.Integer(1)


def _linear(a: dict[str, Any], out: Tensor) -> sympy.Expr:
    return 2 * _size(out.shape) * expr(a["weight"].shape[-1])


def _matmul(a: dict[str, Any], out: Tensor) -> sympy.Expr:
    first: Any = a.get("self", a.get("input"))
    return 2 * _size(out.shape) * expr(first.shape[-1])


def _attention(a: dict[str, Any], out: Tensor) -> sympy.Expr:
    q, k, v = a["query"], a["key"], a["value"]
    rows = _size(q.shape[:-1])
    return 2 * rows * expr(k.shape[-2]) * (expr(q.shape[-1]) + expr(v.shape[-1]))


def _convolution(a: dict[str, Any], out: Tensor) -> sympy.Expr:
    return 2 * _size(out.shape) * _size(a["weight"].shape[1:])


_FORMULAS: dict[Any, Any] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.scaled_dot_product_attention.default: _attention,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
}


def _shapes(node: fx.Node) -> str:
    values = [*value_of(list(node.all_input_nodes)), node.meta.get("val")]
    return str([[str(expr(s)) for s in v.shape] if is_tensor(v) else str(v) for v in values])


def parameter_bytes(program: Program) -> int:
    """Bytes of the parameters that the graph reads, each once."""
    tied = {name: group[0] for group in program.ties for name in group}
    sizes: dict[str, int] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        slot = program.state.get(node.name)
        if slot is not None and slot.kind == "parameter":
            val = node.meta["val"]
            sizes[tied.get(slot.name, slot.name)] = val.numel() * val.element_size()
    return sum(sizes.values())
