"""y = dropout(x, dropout_p) = x * kept / (1 - dropout_p): torch's dropout, by bytes that are kept.

Shapes     x: of any shape; dropout_p: the probability with which an element becomes 0, between 0 and 1.
           Returns y: of x's shape and strides.
Numerics   bit for bit torch's dropout on the CPU, of the same random numbers: kept / (1 - dropout_p) is
           rounded to x's dtype, and so is its product with x.
Cost       the random numbers: 7 ns each, 0.93 of the whole (one thread of an Intel Xeon, torch 2.13,
           2026-11-23). For backward a byte an element is kept, where torch keeps a number of x's dtype; to
           make that of the byte takes about a tenth of the time of dropout and its gradient.
Limits     on a GPU the same composition, which draws other numbers than torch's dropout there.
Source     Srivastava et al. 2014, "Dropout", JMLR 15; torch, aten/src/ATen/native/Dropout.cpp.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels import _operator
from fxaccel.kernels._norm import DTYPES


def reference(x: Tensor, dropout_p: float) -> Tensor:
    """The meaning of this op: what every test compares with."""
    kept = torch.empty_like(x).bernoulli_(1 - dropout_p)
    return x * kept.div_(1 - dropout_p)


def unsupported(x: Tensor, dropout_p: float) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot."""
    if x.dtype not in DTYPES:
        yield f"dtype {x.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if not 0 < dropout_p < 1:
        yield f"the probability is {dropout_p}; numbers are drawn between 0 and 1"


def factor(kept: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """What each element is multiplied by."""
    return kept.to(dtype).div_(1 - dropout_p)


def save(x: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """y, and what was kept: 1 or 0 in a byte, for torch takes four times as long to read a bool."""
    kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout_p).view(torch.uint8)
    y = factor(kept, dropout_p, x.dtype)
    return torch.mul(x, y, out=y), kept


def compose(x: Tensor, dropout_p: float) -> Tensor:
    """The kernel without a gradient."""
    return save(x, dropout_p)[0]


op = _operator.define(
    "dropout(Tensor x, float dropout_p) -> Tensor",
    cpu=compose,
    cuda=compose,
    fake=lambda x, dropout_p: torch.empty_like(x),
    random=True,
)
save_op = _operator.define(
    "dropout_save(Tensor x, float dropout_p) -> (Tensor y, Tensor kept)",
    cpu=save,
    cuda=save,
    fake=lambda x, dropout_p: (torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)),
    random=True,
)


class Dropout(torch.autograd.Function):
    """The derivative, from the bytes."""

    @staticmethod
    def forward(ctx, x, dropout_p):
        """Keep a byte an element."""
        y, kept = save_op(x, dropout_p)
        ctx.save_for_backward(kept)
        ctx.dropout_p = dropout_p
        return y

    @staticmethod
    def backward(ctx, dy):
        """The gradient of x, which has one itself."""
        (kept,) = ctx.saved_tensors
        return dy * factor(kept, ctx.dropout_p, dy.dtype), None


_operator.differentiate(op, Dropout.apply)


def _flops(x: Any, dropout_p: float, **_: Any) -> int:
    return 2 * prod(x)


_operator.count_flops(op, _flops)
_operator.count_flops(save_op, _flops)


def direct(x: Tensor, dropout_p: float) -> Tensor:
    """The op on a CPU tensor, past the dispatcher where no gradient is wanted."""
    if torch.is_grad_enabled() and x.requires_grad:
        return op(x, dropout_p)
    return compose(x, dropout_p)
