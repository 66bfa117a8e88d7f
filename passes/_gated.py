"""Gated activations as models write them: activation(gate) * up."""

from typing import Any

from torch import Tensor

from fxaccel.ir import expr
from fxaccel.rule import Match, Ops, Refusals

NAMES = {
    "silu": "SwiGLU",
    "gelu": "GeGLU",
    "gelu_tanh": "GeGLU with a tanh",
    "relu": "ReGLU",
    "sigmoid": "GLU",
}


def written(op: Ops, gate: Any, up: Any) -> Any:
    """The product, whose activation is one of NAMES."""
    activated = op.either(
        silu=op.aten.silu.default(gate),
        gelu=op.aten.gelu.default(gate),
        gelu_tanh=op.aten.gelu.default(gate, approximate="tanh"),
        relu=op.aten.relu.default(gate),
        sigmoid=op.aten.sigmoid.default(gate),
    )
    return op.aten.mul.Tensor(activated, up)


def activation(m: Match) -> str:
    """Which one matched."""
    return next(name for name in NAMES if m.chose(name))


def unequal(gate: Tensor, up: Tensor) -> Refusals:
    """Why sizes that no kernel can tell apart are not those of one shape: a size of 1 may be one of them."""
    sizes = [[expr(s) for s in t.shape] for t in (gate, up)]
    if sizes[0] != sizes[1]:
        yield f"gate is {sizes[0]} and up {sizes[1]}, which are not known to be equal"
