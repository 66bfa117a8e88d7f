"""Activations of one value as models write them, in canonical form: what is matched and what is written."""

from typing import Any

from torch import fx

from fxaccel.ir import Program
from fxaccel.pattern import Match, Pattern
from fxaccel.rule import Ops

SEVERAL = ("quick_gelu", "relu_squared")  # made of several operators
NAMES = (
    *SEVERAL, "silu", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid", "mish", "hardswish",
)  # fmt: skip


def spelled(op: Ops, name: str, x: Any) -> Any:
    """One of NAMES of x."""
    match name:
        case "quick_gelu":
            return op.aten.mul.Tensor(x, op.aten.sigmoid.default(op.aten.mul.Tensor(x, 1.702)))
        case "relu_squared":
            return op.aten.pow.Tensor_Scalar(op.aten.relu.default(x), 2)
        case "gelu_tanh":
            return op.aten.gelu.default(x, approximate="tanh")
    return getattr(op.aten, name).default(x)


def written(op: Ops, x: Any, names: tuple[str, ...] = NAMES) -> Any:
    """Any of these activations of x."""
    return op.either(**{name: spelled(op, name, x) for name in names})


def activation(m: Match) -> str:
    """Which one matched."""
    return next(name for name in NAMES if m.chose(name))


class _Whole:
    def pattern(self, op: Ops, x: Any) -> Any:
        return written(op, x, SEVERAL)


_WHOLE = Pattern.trace(_Whole().pattern)


def whole(program: Program, node: fx.Node) -> str:
    """The activation of several operators that a call is one part of, "" for none."""
    for user in {u for n in (node, *node.users) for u in n.users}:
        found = _WHOLE.find(program, user)
        if isinstance(found, Match) and node in found.nodes - {found.root}:
            return activation(found)
    return ""
