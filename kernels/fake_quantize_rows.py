"""v = fake_quantize_rows(x, dtype): what quantize_rows keeps of x, and the identity in its derivative.

    q, scale = quantize_rows(x, dtype);  v = q * scale;  dx = dv

Shapes     x: [..., K]; dtype: torch.int8 or torch.float8_e4m3fn. Returns v: as x, contiguous.
Numerics   fp32 (fp64 for fp64), and one rounding to x.dtype. The scale of a row follows its largest value, so
           that nothing lies beyond the grid and the gradient passes everywhere.
Cost       quantize_rows, and a pass over q.
Limits     as quantize_rows.
Source     Bengio et al. 2013, arXiv:1308.3432 (straight-through).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxaccel.kernels import _operator, quantize_rows
from fxaccel.kernels._norm import unless_double


def reference(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The meaning of this op: what every test compares with."""
    q, scale = quantize_rows.reference(x, dtype)
    return (q.to(scale.dtype) * scale).to(x.dtype)


def unsupported(x: Tensor, dtype: torch.dtype) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks and dtypes."""
    yield from quantize_rows.unsupported(x, dtype)


def _values(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return q.to(scale.dtype).mul_(scale).to(dtype)


def compose(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The CPU kernel."""
    return _values(*quantize_rows.compose(x, dtype), x.dtype)


def launch(x: Tensor, dtype: torch.dtype) -> Tensor:
    """quantize_rows by Triton, and a pass over q. No checks: the caller has asked `unsupported`."""
    return _values(*quantize_rows.launch(x, dtype), x.dtype)


def _fake(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape)


op = _operator.define(
    "fake_quantize_rows(Tensor x, ScalarType dtype) -> Tensor",
    cpu=compose,
    cuda=unless_double(launch, compose),
    fake=_fake,
)


class FakeQuantizeRows(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, x, dtype):
        """The values."""
        return op(x, dtype)

    @staticmethod
    def backward(ctx, dy):
        """The gradient as it comes."""
        return dy, None


_operator.differentiate(op, FakeQuantizeRows.apply)


def direct(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The op on a CPU tensor, past the dispatcher where no gradient is wanted."""
    if torch.is_grad_enabled() and x.requires_grad:
        return op(x, dtype)
    return compose(x, dtype)
