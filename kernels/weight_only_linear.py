"""y = weight_only_linear(x, w, scale, zero, b, format, group) = x W^T + b, W being stored in 8 or 4 bits.

    W of int8, float8: w * scale;  of int4: (code - 8) * scale + zero;  of nf4: NF4[code] * scale

Shapes     x: [..., K]; w: [N, K] of int8 or float8_e4m3fn, of int4 and nf4 uint8 [N, G * group / 2] with
           G = ceil(K / group), the even column in the low nibble; columns from K on mean nothing. scale,
           zero: [N, G] or [1, 1], of any float dtype; zero is int4's, and 0 where absent; b: [N] or None, of
           x's dtype. Returns y: [..., N].
Numerics   W in fp32 (fp64 for fp64), rounded to x.dtype; sums in fp32, one rounding with b at the end. On the
           CPU few rows of bf16 may be multiplied with W's codes and scales in bf16, and b added after y has
           rounded: `direct` with `shared`.
Cost       2 M N K flop. Of few rows the weight is what is read: half a byte or a byte an element and 2 to 8
           bytes a group. On a GPU a program dequantizes its tile between memory and the product; of few rows
           the columns are split among programs, and a second kernel sums their shares in a fixed order.
           On the CPU: kernels/_quantized_cpu.py.
Limits     groups of 4 bits are even. float64 on a GPU runs the composition. Derivatives are of x and b: of a
           scale or a zero, one that is asked for raises.
Source     Frantar et al. 2022, "GPTQ", arXiv:2210.17323 (the kernel that dequantizes); Dettmers et al. 2023,
           arXiv:2305.14314; split sums: Osama et al. 2023, "Stream-K", arXiv:2301.03598.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxaccel.kernels import _operator, _quantized, _quantized_cpu, _quantized_weights, dequantize
from fxaccel.kernels._norm import unless_double


def reference(
    x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, b: Tensor | None, format: str, group: int
) -> Tensor:
    """The meaning of this op: what every test compares with."""
    dense = dequantize.reference(w, scale, zero, format, group, x.shape[-1], x.dtype)
    kind = _quantized.wide(x.dtype)
    return F.linear(x.to(kind), dense.to(kind), None if b is None else b.to(kind)).to(x.dtype)


def unsupported(
    x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, b: Tensor | None, format: str, group: int
) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    odd = list(_quantized.unfit(x))
    yield from odd
    if odd:
        return
    yield from _quantized.odd(w, scale, zero, format, group, x.shape[-1])
    if b is None:
        return
    if b.dtype != x.dtype:
        yield f"dtypes differ: x is {x.dtype}, b {b.dtype}"
    if b.ndim != 1:
        yield f"b has {b.ndim} dimensions; the kernel takes 1"
    elif w.ndim == 2 and _operator.differ(b.shape[0], w.shape[0]):
        yield f"b has {b.shape[0]} elements, and w {w.shape[0]} rows"


def _dense(
    x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, k: int
) -> Tensor:
    """The weight, rounded to x.dtype, in the dtype that the CPU multiplies rows of it in."""
    made = _quantized.dequantized(w, scale, zero, format, group, k, x.dtype)
    return made.to(_quantized_cpu.computed(x.dtype)) if x.is_cpu else made


def compose(
    x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, b: Tensor | None, format: str, group: int
) -> Tensor:
    """The CPU kernel."""
    return _quantized_cpu.linear(x, _dense(x, w, scale, zero, format, group, x.shape[-1]), b)


def compose_backward(
    dy: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, columns: int
) -> Tensor:
    """The gradient of x [..., columns]."""
    dense = _dense(dy, w, scale, zero, format, group, columns)
    dx = dy.to(dense.dtype).reshape(dy.shape[:-1].numel(), len(w)) @ dense
    return dx.to(dy.dtype).view(*dy.shape[:-1], columns)


def launch(
    x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, b: Tensor | None, format: str, group: int
) -> Tensor:
    """Run the Triton kernels. No checks: the caller has asked `unsupported`."""
    return _quantized_weights.launch(x, w, scale, zero, b, format, group)


def _fake(
    x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, b: Tensor | None, format: str, group: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _backward_fake(
    dy: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, columns: int
) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], columns))


op = _operator.define(
    "weight_only_linear(Tensor x, Tensor w, Tensor scale, Tensor? zero, Tensor? b, str format, int group)"
    " -> Tensor",
    cpu=compose,
    cuda=unless_double(launch, compose),
    fake=_fake,
)
backward_op = _operator.define(
    "weight_only_linear_backward(Tensor dy, Tensor w, Tensor scale, Tensor? zero, str format, int group,"
    " int columns) -> Tensor",
    cpu=compose_backward,
    cuda=unless_double(_quantized_weights.launch_backward, compose_backward),
    fake=_backward_fake,
)


class WeightOnlyLinear(torch.autograd.Function):
    """The derivative of x, dy W, and of b."""

    @staticmethod
    def forward(ctx, x, w, scale, zero, b, format, group):
        """The product; of x only its size is kept."""
        ctx.save_for_backward(w, scale, zero)
        ctx.stored = format, group, x.shape[-1]
        return op(x, w, scale, zero, b, format, group)

    @staticmethod
    def backward(ctx, dy):
        """Gradients of x and b."""
        x_grad, _, *frozen, b_grad = ctx.needs_input_grad[:5]
        if any(frozen):
            raise NotImplementedError(
                "fxaccel::weight_only_linear has no derivative for a scale or a zero\n"
                "hint: freeze them, requires_grad_(False)"
            )
        w, scale, zero = ctx.saved_tensors
        dx = db = None
        if x_grad:
            dx = Input.apply(dy, w, scale, zero, *ctx.stored)
        if b_grad:
            db = dy.sum(list(range(dy.ndim - 1))) if dy.ndim > 1 else dy
        return dx, None, None, None, db, None, None


class Input(torch.autograd.Function):
    """The gradient of x, dy W: linear in dy, so that the derivative of it is the product again."""

    @staticmethod
    def forward(ctx, dy, w, scale, zero, format, group, columns):
        """dy W."""
        ctx.save_for_backward(w, scale, zero)
        ctx.stored = format, group
        return backward_op(dy, w, scale, zero, format, group, columns)

    @staticmethod
    def backward(ctx, ddx):
        """The gradient of dy."""
        w, scale, zero = ctx.saved_tensors
        return op(ddx, w, scale, zero, None, *ctx.stored), None, None, None, None, None, None


def _backward_flops(dy, w, scale, zero, format, group, columns, **kwargs) -> int:
    return 2 * prod(dy) * columns


_operator.differentiate(op, WeightOnlyLinear.apply)
X_AND_B = (0, 4)  # scales, and weights of float8, stay as they are
_operator.autocast(op, "cpu", lambda: torch.get_autocast_dtype("cpu"), X_AND_B)  # as PyTorch's linear
_operator.autocast(op, "cuda", lambda: torch.get_autocast_dtype("cuda"), X_AND_B)
_operator.count_flops(op, lambda x, w, *args, **kwargs: 2 * prod(x) * w[0])
_operator.count_flops(backward_op, _backward_flops)


def worth(given: dict[str, Any]) -> bool:
    """Whether `direct` uses what `Kept` makes: always, of a weight of known sizes."""
    w = _quantized.shape_of(given["w"])
    return all(_operator.known(size) is not None for size in w.shape)


shared = _operator.Shared(
    _quantized_cpu.Kept, (), ("w", "scale", "zero", "format", "group"), worth, ahead=True
)


def direct(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    b: Tensor | None,
    format: str,
    group: int,
    shared: _quantized_cpu.Kept | None = None,
) -> Tensor:
    """The op on CPU tensors, past the dispatcher where neither a gradient is wanted nor a cast.

    shared   the weight in the forms that calls have asked for
    """
    trained = torch.is_grad_enabled() and torch._C._any_requires_grad(x, scale, zero, b)
    if trained or torch.is_autocast_enabled("cpu"):
        return op(x, w, scale, zero, b, format, group)
    if shared is None:
        return compose(x, w, scale, zero, b, format, group)
    return shared(x, b)
