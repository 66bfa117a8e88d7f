"""y = glu(gate, up, activation) = activation(gate) * up.

Shapes     gate, up: [..., K], of one shape and dtype, rows of any stride; activation: silu, gelu, gelu_tanh,
           relu or sigmoid. Returns y: [..., K], contiguous.
Numerics   the activation is computed in fp32 (fp64 for fp64) and rounded to gate.dtype, the product with up
           is rounded once more, as two operators do it. On the CPU y is theirs bit for bit.
Cost       on a GPU 3 tensor-sized transfers forward and 5 backward, where the two operators take 5 and 8;
           about 6 and 12 flop an element. For backward gate and up are kept, and the activation, which the
           two operators keep too, is computed again. On the CPU, where computing again takes longer than
           reading, what emitted code calls keeps it; without gradients the product is written over it.
Limits     gate and up do not broadcast. float64 on a GPU runs the composition. No second derivative: asking
           for it raises.
Source     Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202; sigmoid: Dauphin et al. 2016,
           arXiv:1612.08083.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels import _activations, _operator
from fxaccel.kernels._glu import ACTIVATIONS, launch, launch_backward
from fxaccel.kernels._norm import DTYPES, unless_double

__all__ = ["ACTIVATIONS", "compose", "direct", "launch", "launch_backward", "op", "reference", "unsupported"]

_FORWARD = {name: _activations.FORWARD[name] + 1 for name in ACTIVATIONS}  # flop an element
_BACKWARD = {name: _activations.BACKWARD[name] + 2 for name in ACTIVATIONS}


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The meaning of this op: what every test compares with."""
    return (ACTIVATIONS[activation](gate) * up).contiguous()


def unsupported(gate: Tensor, up: Tensor, activation: str) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    if gate.dtype not in DTYPES:
        yield f"dtype {gate.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if gate.ndim == 0:
        yield "gate has no dimension"
    yield from _operator.unlike("gate", gate, "up", up)
    if activation not in ACTIVATIONS:
        yield f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"


def compose(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The CPU kernel."""
    return ACTIVATIONS[activation](gate).mul_(up).contiguous()


def compose_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate and dup, with no tensor besides them."""
    dup = ACTIVATIONS[activation](gate)
    dgate = _activations.slope_times(dy * up, gate, dup, activation)
    return dgate.contiguous(), dup.mul_(dy).contiguous()


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward_fake(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


op = _operator.define(
    "glu(Tensor gate, Tensor up, str activation) -> Tensor",
    cpu=compose,
    cuda=unless_double(launch, compose),
    fake=_fake,
)
backward_op = _operator.define(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)",
    cpu=compose_backward,
    cuda=unless_double(launch_backward, compose_backward),
    fake=_backward_fake,
)


class GLU(torch.autograd.Function):
    """The derivative; the activation is not kept."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        """Keep gate and up."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return op(gate, up, activation)

    @staticmethod
    @_operator.once_differentiable
    def backward(ctx, dy):
        """Gradients of gate and up."""
        made = backward_op(dy, *ctx.saved_tensors, ctx.activation)
        return *(g if n else None for g, n in zip(made, ctx.needs_input_grad, strict=False)), None


_operator.differentiate(op, GLU.apply)


def _flops(each: dict[str, int], first: Any, activation: Any) -> int:
    return each[activation] * prod(first)


_operator.count_flops(op, lambda gate, up, activation, **_: _flops(_FORWARD, gate, activation))
_operator.count_flops(backward_op, lambda dy, gate, up, activation, **_: _flops(_BACKWARD, dy, activation))


def direct(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The op on CPU tensors, past the dispatcher; where a gradient is wanted, the operators of PyTorch."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(gate, up):
        return reference(gate, up, activation)
    return compose(gate, up, activation)
