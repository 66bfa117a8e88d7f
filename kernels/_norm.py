"""What the four norms share: compositions for the CPU, the operators that training adds, the derivative.

Numerics   as the norms say: fp32 (fp64 for fp64) inside, one rounding at the end.
Cost       RMSNorm in three passes over the data with one new tensor, where PyTorch's own takes four and
           three; its backward in two of PyTorch's fused CPU kernels, where autograd runs about twelve.
Limits     no second derivative: asking for one raises.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels import _operator as operator
from fxaccel.kernels import _rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

WIDE = (torch.float32, torch.float64)  # computed in as they are

aten = torch.ops.aten


def statistics(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a norm of `dtype` computes in, and keeps its mean and rstd in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unsupported(x: Tensor, r: Tensor | None = None, **vectors: Tensor | None) -> Iterator[str]:
    """Why a norm of x (or x + r) with these weights over the last dimension is not for our kernels."""
    if x.dtype not in DTYPES:
        yield f"dtype {x.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if x.ndim == 0:
        yield "x has no dimension to normalise over"
        return
    if r is not None:
        yield from operator.unlike("x", x, "r", r)
    for name, w in vectors.items():
        if w is None:
            continue
        if w.dtype not in (x.dtype, statistics(x.dtype)):
            yield f"dtypes differ: x is {x.dtype}, {name} {w.dtype}"
        if w.ndim != 1:
            yield f"{name} has {w.ndim} dimensions; the kernel takes one"
        elif operator.differ(w.shape[0], x.shape[-1]):
            yield f"{name} has {w.shape[0]} elements, and x {x.shape[-1]} in its last dimension"
    if len({w.dtype for w in vectors.values() if w is not None}) > 1:
        yield "dtypes differ: " + ", ".join(f"{n} is {w.dtype}" for n, w in vectors.items() if w is not None)


@lru_cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def compose_rms(
    x: Tensor,
    w: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y, and rstd as [..., 1]."""
    f = x if x.dtype in WIDE else x.float()  # x.to, even to its own dtype, costs as much as an operator
    if not f.is_contiguous():
        f = f.contiguous()
    if not f.numel():
        return torch.empty_like(f, dtype=x.dtype), f.new_empty((*f.shape[:-1], 1))
    norm = torch.linalg.vector_norm(f, 2, -1, True)
    rstd = _constant(eps, f.dtype, f.device).addcmul(norm, norm, value=1 / f.shape[-1]).rsqrt_()
    y = f * rstd if f is x else f.mul_(rstd)
    if round_first and f.dtype != x.dtype:
        y = y.to(x.dtype).to(f.dtype)
    if w is not None:
        y.mul_(w.to(f.dtype) + offset if offset else w)
    if b is not None:
        y.add_(b)
    return y if f.dtype == x.dtype else y.to(x.dtype), rstd


def compose_layer(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and rstd as [..., 1]; float weights make PyTorch keep both in float."""
    f = statistics(x.dtype)
    if w is None and f != x.dtype:
        w = x.new_ones(x.shape[-1:], dtype=f)
    w, b = (None if t is None else t.to(f) for t in (w, b))
    return torch.native_layer_norm(x, x.shape[-1:], w, b, eps)


def compose_rms_backward(
    dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, offset: float, ask: list[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dw and db through the gradients of two relatives that PyTorch has as single CPU kernels.

    Weight norm, v * g / |v|, subtracts no mean and, told that |v| is sqrt(C) / rstd and that g is sqrt(C),
    differentiates to dx. Layer norm, told that the mean is 0, differentiates to dw and db.
    """
    c, kind = x.shape[-1], rstd.dtype
    if not x.numel():
        dw, db = (rstd.new_zeros(c) if asked else None for asked in ask)
        return torch.empty_like(x, memory_format=torch.contiguous_format), dw, db
    z, u = (t.to(kind).reshape(-1, c).contiguous() for t in (x, dy))
    rstd, dw, db = rstd.reshape(-1, 1), None, None
    if any(ask):
        one = torch.ones(c, dtype=kind, device=x.device)
        mean = torch.zeros_like(rstd)
        _, dw, db = aten.native_layer_norm_backward(u, z, [c], mean, rstd, one, one, [False, *ask])
    if w is not None:
        u = u * (w.to(kind) + offset if offset else w.to(kind))
    root = torch.full_like(rstd, c**0.5)
    dx = aten._weight_norm_interface_backward(u, z, root, root / rstd, 0)[0]
    return dx.view(x.shape).to(x.dtype), dw, db


def compose_layer_backward(
    dy: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, rstd: Tensor, ask: list[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dw and db; the last two in the dtype of the statistics.

    PyTorch sums dw and db in the dtype of x: over 2,048 rows of bfloat16 it is off by 6 %.
    """
    kind, low = rstd.dtype, x.dtype
    w = rstd.new_ones(x.shape[-1:]) if w is None else w.to(kind)
    if any(ask):
        dy, x = dy.to(kind), x.to(kind)
    dy, x = dy.contiguous(), x.contiguous()
    dx, dw, db = aten.native_layer_norm_backward(dy, x, x.shape[-1:], mean, rstd, w, w, [True, *ask])
    return dx.to(low), dw, db


def _save_cpu(
    x: Tensor,
    r: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    offset: float,
    round_first: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = x if r is None else torch.add(x, r).contiguous()
    if centred:
        y, mean, rstd = compose_layer(h, w, b, eps)
    else:
        y, rstd = compose_rms(h, w, eps, offset, round_first, b)
        mean = rstd.new_empty(0)
    return y, x.new_empty(0) if r is None else h, mean, rstd


def _save_cuda(
    x: Tensor,
    r: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    offset: float,
    round_first: bool,
    centred: bool,
) -> tuple[Any, ...]:
    y, h, mean, rstd = _rows.launch_forward(
        x, r, w, b, eps, offset, centred=centred, round_first=round_first, save=True
    )
    return y, *(t.new_empty(0) if s is None else s for t, s in ((x, h), (rstd, mean), (rstd, rstd)))


def _save_fake(
    x: Tensor,
    r: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    offset: float,
    round_first: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=statistics(x.dtype))
    return (
        y,
        x.new_empty(0) if r is None else torch.empty_like(y),
        torch.empty_like(rstd) if centred else rstd.new_empty(0),
        rstd,
    )


def _backward_cpu(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    w: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Any, ...]:
    ask = [weight_grad, bias_grad]
    if mean is None:
        dx, dw, db = compose_rms_backward(dy, h, w, rstd, offset, ask)
    else:
        dx, dw, db = compose_layer_backward(dy, h, w, mean, rstd, ask)
    if dh is not None:
        dx.add_(dh)
    return dx, *(rstd.new_empty(0) if t is None else t for t in (dw, db))


def _backward_cuda(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    w: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Any, ...]:
    dx, dw, db = _rows.launch_backward(
        dy, dh, h, w, mean, rstd, offset, weight_grad=weight_grad, bias_grad=bias_grad
    )
    return dx, *(rstd.new_empty(0) if t is None else t for t in (dw, db))


def _backward_fake(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    w: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dw = rstd.new_empty(h.shape[-1:] if weight_grad else (0,))
    return dx, dw, rstd.new_empty(h.shape[-1:] if bias_grad else (0,))


def unless_double(launch: Callable[..., Any], composition: Callable[..., Any]) -> Callable[..., Any]:
    """The GPU's kernel: `launch`, and the composition for float64, which Triton's kernels leave out."""

    def kernel(*args: Any) -> Any:
        return (composition if args[0].dtype == torch.float64 else launch)(*args)

    return kernel


save_op = operator.define(
    "norm_save(Tensor x, Tensor? r, Tensor? w, Tensor? b, float eps, float offset, bool round_first,"
    " bool centred) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    cpu=_save_cpu,
    cuda=unless_double(_save_cuda, _save_cpu),
    fake=_save_fake,
)
backward_op = operator.define(
    "norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? w, Tensor? mean, Tensor rstd, float offset,"
    " bool weight_grad, bool bias_grad) -> (Tensor dx, Tensor dw, Tensor db)",
    cpu=_backward_cpu,
    cuda=unless_double(_backward_cuda, _backward_cpu),
    fake=_backward_fake,
)


class Norm(torch.autograd.Function):
    """The derivative of all four; returns y, or y and h where there is an r."""

    @staticmethod
    def forward(ctx, x, r, w, b, eps, offset, round_first, centred):
        """Run the norm and keep what its gradient reads."""
        y, h, mean, rstd = save_op(x, r, w, b, eps, offset, round_first, centred)
        ctx.save_for_backward(x if r is None else h, w, mean if centred else None, rstd)
        ctx.offset, ctx.bias_dtype = offset, None if b is None else b.dtype
        ctx.set_materialize_grads(False)
        return y if r is None else (y, h)

    @staticmethod
    @operator.once_differentiable
    def backward(ctx, dy, dh=None):
        """Gradients of x, r, w and b; dy or dh is None where nothing reads that output."""
        h, w, mean, rstd = ctx.saved_tensors
        _, needs_r, needs_w, needs_b = ctx.needs_input_grad[:4]
        if dy is None:
            return dh, dh if needs_r else None, *[None] * 6
        dx, dw, db = backward_op(dy, dh, h, w, mean, rstd, ctx.offset, needs_w, needs_b)
        return (
            dx,
            dx if needs_r else None,
            dw.to(w.dtype) if needs_w else None,
            db.to(ctx.bias_dtype) if needs_b else None,
            *[None] * 4,
        )


def register(op: operator.Op, derivative: Callable[..., Any]) -> None:
    """Give a norm its derivative, its autocast rule and its FLOP formula."""
    operator.differentiate(op, derivative)
    operator.autocast(op, "cuda", lambda: torch.float32)  # as PyTorch's; on the CPU it has no rule
    _count_flops(op)


def _count_flops(op: operator.Op) -> None:
    """Square, sum, rstd, weight; centred: mean, subtraction, bias. PyTorch's own formulas count no norm."""
    names = [a.name for a in op._schema.arguments]
    layer = "layer" in op._opname

    def formula(*args: Any, **kwargs: Any) -> int:
        given = dict(zip(names, args, strict=False))
        each = 7 if given.get("centred", layer) else 4 + (given.get("b") is not None)
        return (each + (given.get("r") is not None)) * prod(given["x"])

    operator.count_flops(op, formula)


def _backward_flops(
    dy: Any,
    dh: Any,
    h: Any,
    w: Any,
    mean: Any,
    rstd: Any,
    offset: float,
    weight: bool,
    bias: bool,
    **kwargs: Any,
) -> int:
    return ((9 + bias if mean is None else 13) + (dh is not None)) * prod(dy)


_count_flops(save_op)
operator.count_flops(backward_op, _backward_flops)
