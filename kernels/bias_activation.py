"""y = bias_activation(x, b, activation) = activation(x + b).

Shapes     x: [..., K], rows of any stride; b: [K] of x's dtype, or None, which adds nothing; activation: a
           name of `_activations`. Returns y: [..., K], contiguous.
Numerics   on a GPU fp32 from the sum to the one rounding of y: the sum itself, which the two operators round,
           is not. db is a sum in fp32 of what dx is before it is rounded; the result does not depend on the
           order in which programs run. On the CPU y is that of the two operators bit for bit.
Cost       on a GPU 2 tensor-sized transfers forward and 3 backward, db included, where the operators take 2
           for the sum and 2 for the activation, and 3 and one more for db; 2 to 10 flop an element forward,
           3 to 19 backward. For backward x is kept, and b. On the CPU the activation is written over the sum.
Limits     b is no more than a row. float64 on a GPU runs the composition. No second derivative: asking for it
           raises.
Source     as `_activations` says; bias and activation as one kernel: Shoeybi et al. 2019, "Megatron-LM",
           arXiv:1909.08053.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels import _activations, _operator, _rows
from fxaccel.kernels._activations import ACTIVATIONS, OVER, SEVERAL, activated
from fxaccel.kernels._glu import _grid, config
from fxaccel.kernels._norm import DTYPES, unless_double
from fxaccel.kernels._triton import tl, triton

__all__ = ["ACTIVATIONS", "SEVERAL", "direct", "launch", "launch_backward", "op", "reference", "unsupported"]

WAVES = 4  # programs of backward for each multiprocessor, where they sum db


def reference(x: Tensor, b: Tensor | None, activation: str) -> Tensor:
    """The meaning of this op: what every test compares with."""
    return ACTIVATIONS[activation](x if b is None else x + b).contiguous()


def unsupported(x: Tensor, b: Tensor | None, activation: str) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    if x.dtype not in DTYPES:
        yield f"dtype {x.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if x.ndim == 0:
        yield "x has no dimension"
    elif b is not None:
        if b.ndim != 1 or _operator.differ(b.shape[0], x.shape[-1]):
            yield f"b is {list(b.shape)}; the kernel adds one row to x, which is {list(x.shape)}"
        if b.dtype != x.dtype:
            yield f"dtypes differ: x is {x.dtype}, b {b.dtype}"
    if activation not in ACTIVATIONS:
        yield f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"


@triton.jit
def _sum(x_ptr, b, at, mask):
    """A tile of x + b in fp32; 0 + b outside."""
    return tl.load(x_ptr + at, mask, other=0.0).to(tl.float32) + b[None, :]


@triton.jit
def _bias(b_ptr, col, K, BLOCK: tl.constexpr):
    """The columns of b in fp32; 0 where there is none."""
    if b_ptr is None:
        b = tl.zeros((BLOCK,), tl.float32)
    else:
        b = tl.load(b_ptr + col, col < K, other=0.0).to(tl.float32)
    return b


@triton.jit
def forward_kernel(
    x_ptr, b_ptr, y_ptr, N, K, x_stride, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile of ROWS x BLOCK a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # row * K passes 2**31
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < N)[:, None] & (col < K)[None, :]
    f = _sum(x_ptr, _bias(b_ptr, col, K, BLOCK), row[:, None] * x_stride + col[None, :], mask)
    y, _ = activated(f, ACTIVATION)
    tl.store(y_ptr + row[:, None] * K + col[None, :], y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, b_ptr, dx_ptr, db_ptr, N, K, dy_stride, x_stride, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs stride over tiles of BLOCK columns and keep their share of db in registers."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    step = tl.num_programs(0) * ROWS
    lane = tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = _bias(b_ptr, col, K, BLOCK)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, N, step):
        row = start + lane
        mask = (row < N)[:, None] & (col < K)[None, :]
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask, other=0.0).to(tl.float32)
        _, slope = activated(_sum(x_ptr, b, row[:, None] * x_stride + col[None, :], mask), ACTIVATION)
        dx = dy * slope
        tl.store(dx_ptr + row[:, None] * K + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask)
        if db_ptr is not None:
            db += tl.where(mask, dx, 0.0)  # 0 * slope(b) would be NaN where that is
    if db_ptr is not None:
        tl.store(db_ptr + tl.program_id(0) * K + col, tl.sum(db, axis=0), col < K)


def launch(x: Tensor, b: Tensor | None, activation: str) -> Tensor:
    """y. No checks: the caller has asked `unsupported`."""
    y = x.new_empty(x.shape)
    if y.numel():
        x = _rows.flat(x)
        (b,), (n, k), cut = _rows._contiguous(b), x.shape, config(x.shape[1])
        forward_kernel[_grid(n, k, cut)](
            x, b, y, n, k, x.stride(0), ACTIVATION=activation, ROWS=cut.rows, BLOCK=cut.block,
            num_warps=cut.warps,
        )  # fmt: skip
    return y


def launch_backward(
    dy: Tensor, x: Tensor, b: Tensor | None, activation: str, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    """dx, and db, which is empty where it is not asked for."""
    dx = x.new_empty(x.shape)
    if not dx.numel():
        return dx, x.new_zeros(x.shape[-1:] if bias_grad else (0,))
    dy, x = _rows.flat(dy), _rows.flat(x)
    (b,), (n, k), cut = _rows._contiguous(b), x.shape, config(x.shape[1])
    tiles, columns = _grid(n, k, cut)
    if bias_grad:
        tiles = min(tiles, max(1, WAVES * _rows._multiprocessors(x.device) // columns))
    db = x.new_empty((tiles, k), dtype=torch.float32) if bias_grad else None
    backward_kernel[(tiles, columns)](
        dy, x, b, dx, db, n, k, dy.stride(0), x.stride(0), ACTIVATION=activation, ROWS=cut.rows,
        BLOCK=cut.block, num_warps=cut.warps,
    )  # fmt: skip
    return dx, x.new_empty(0) if db is None else db.sum(0).to(x.dtype)


def compose(x: Tensor, b: Tensor | None, activation: str) -> Tensor:
    """The CPU kernel."""
    if b is not None:
        y = OVER[activation](torch.add(x, b))
    elif activation == "relu_squared":
        y = torch.relu(x).square_()
    else:
        y = (OVER if activation in SEVERAL else ACTIVATIONS)[activation](x)
    return y.contiguous()


def compose_backward(
    dy: Tensor, x: Tensor, b: Tensor | None, activation: str, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    """dx, and db, which is empty where it is not asked for."""
    x = x if b is None else x + b
    y = ACTIVATIONS[activation](x)
    dx = _activations.slope_times(dy.contiguous().clone(), x.contiguous(), y.contiguous(), activation)
    db = dx.sum(tuple(range(dx.ndim - 1))) if bias_grad and dx.ndim > 1 else dx.clone()
    return dx, db if bias_grad else x.new_empty(0)


def _fake(x: Tensor, b: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    dy: Tensor, x: Tensor, b: Tensor | None, activation: str, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1:] if bias_grad else (0,))


op = _operator.define(
    "bias_activation(Tensor x, Tensor? b, str activation) -> Tensor",
    cpu=compose,
    cuda=unless_double(launch, compose),
    fake=_fake,
)
backward_op = _operator.define(
    "bias_activation_backward(Tensor dy, Tensor x, Tensor? b, str activation, bool bias_grad)"
    " -> (Tensor dx, Tensor db)",
    cpu=compose_backward,
    cuda=unless_double(launch_backward, compose_backward),
    fake=_backward_fake,
)


class BiasActivation(torch.autograd.Function):
    """The derivative; neither the sum nor its activation is kept."""

    @staticmethod
    def forward(ctx, x, b, activation):
        """Keep x and b."""
        ctx.save_for_backward(x, b)
        ctx.activation = activation
        return op(x, b, activation)

    @staticmethod
    @_operator.once_differentiable
    def backward(ctx, dy):
        """Gradients of x and b."""
        x, b = ctx.saved_tensors
        needs_x, needs_b, _ = ctx.needs_input_grad
        dx, db = backward_op(dy, x, b, ctx.activation, needs_b)
        return dx if needs_x else None, db if needs_b else None, None


_operator.differentiate(op, BiasActivation.apply)


def _flops(x: Any, b: Any, activation: str, **_: Any) -> int:
    return (_activations.FORWARD[activation] + (b is not None)) * prod(x)


def _backward_flops(dy: Any, x: Any, b: Any, activation: str, bias_grad: bool, **_: Any) -> int:
    return (_activations.BACKWARD[activation] + (b is not None) + bias_grad) * prod(dy)


_operator.count_flops(op, _flops)
_operator.count_flops(backward_op, _backward_flops)


def direct(x: Tensor, b: Tensor | None, activation: str) -> Tensor:
    """The op on CPU tensors, past the dispatcher; where a gradient is wanted, the operators of PyTorch."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, b):
        return reference(x, b, activation)
    return compose(x, b, activation)
