"""y = quantized_linear(q, scale, w, w_scale, b, dtype) = (q w^T) * scale * w_scale^T + b, in bytes.

Shapes     q: [..., K] of int8 or float8_e4m3fn; w: [N, K] of q's dtype; scale: [..., 1], one a row, or [1] or
           [], one for all; w_scale: [N, 1] or [1, 1]; b: [N] or None; dtype: what y is. Returns y: [..., N].
Numerics   int8: exact sums in int32. float8: exact products, sums in fp32 (fp64 for fp64). The sums times
           scale, times w_scale, plus b in fp32 (fp64 for fp64), in whichever order; one rounding to `dtype`.
Cost       2 M N K operations of a byte. On the CPU of more rows than one, where w or y has more than LARGE
           elements, w is wanted as oneDNN lays it out (`shared`); below, to lay it out at each call costs
           less than oneDNN's own call does. With 4096 x 4096, ms at 1, 4, 32, 128 rows: 0.56, 1.09, 3.04,
           10.7, where float32's linear takes 4.1, 9.3, 19, 71 (one thread of an AMD EPYC with VNNI, torch
           2.13, 2026-11-22).
Limits     int32 is exact up to K = 133,000. Without VNNI the CPU multiplies floats, exactly and no faster
           than a float linear. float8 on the CPU is dequantized: smaller, not faster. dtype float64 on a GPU
           runs the composition; float8 is multiplied as such on NVIDIA's from Ada Lovelace on, and elsewhere
           as float16, which holds every float8. No derivative: one that is asked for raises.
Source     Jacob et al. 2018, arXiv:1712.05877; Micikevicius et al. 2022, "FP8 Formats for Deep Learning",
           arXiv:2209.05433.
"""

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxaccel.kernels import _operator, _quantized, _quantized_gemm
from fxaccel.kernels._norm import DTYPES
from fxaccel.kernels.quantize_tensor import one_number

LARGE = 2**18  # elements of w, and of y, up to which oneDNN's call costs more than to lay w out each time


class Laid(NamedTuple):
    """A weight as the CPU's kernels read it: oneDNN's layout of int8, or fp32.

    scales, zeros    [N], of the weight's rows; for oneDNN
    """

    w: Tensor
    scales: Tensor
    zeros: Tensor


def reference(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, b: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The meaning of this op: what every test compares with. fp64 holds each sum of int8."""
    kind = _quantized.wide(dtype)
    made = torch.float64 if q.dtype == torch.int8 else kind
    y = (q.to(made) @ w.to(made).t()).to(kind) * scale.to(kind) * w_scale.to(kind).t().reshape(-1)
    return (y if b is None else y + b.to(kind)).to(dtype)


def unsupported(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, b: Tensor | None, dtype: torch.dtype
) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    odd = [*_quantized.unfit(q, tuple(_quantized.TOP), "q"), *_ranks(w, w_scale, b)]
    yield from odd
    if dtype not in DTYPES:
        yield f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
    if odd:
        return
    if w.dtype != q.dtype:
        yield f"dtypes differ: q is {q.dtype}, w {w.dtype}"
    if _operator.differ(w.shape[1], q.shape[-1]):
        yield f"q has {q.shape[-1]} columns, and w {w.shape[1]}"
    if q.dtype == torch.int8 and (_operator.known(w.shape[1]) or 0) > _quantized.MOST:
        yield f"{w.shape[1]} columns; int32 holds the sums of {_quantized.MOST:,} products of int8"
    rows = [*q.shape[:-1], 1]
    if len(rows) != scale.ndim or any(map(_operator.differ, rows, scale.shape)):
        yield from one_number("scale", scale)
    elif scale.dtype not in (torch.float32, torch.float64):
        yield f"scale is {scale.dtype}, not float32 or float64"
    whole = _operator.known(w_scale.shape[0]) == 1
    if _operator.differ(w_scale.shape[1], 1) or not (
        whole or not _operator.differ(w_scale.shape[0], w.shape[0])
    ):
        yield f"w_scale is {list(w_scale.shape)}; the kernel takes [{w.shape[0]}, 1] or [1, 1]"
    if b is not None and _operator.differ(b.shape[0], w.shape[0]):
        yield f"b has {b.shape[0]} elements, and w {w.shape[0]} rows"


def _ranks(w: Tensor, w_scale: Tensor, b: Tensor | None) -> Iterator[str]:
    """Why the numbers of dimensions, or the dtypes beside q's, are not for our kernels."""
    for name, t, ndim in (("w", w, 2), ("w_scale", w_scale, 2), ("b", b, 1)):
        if t is not None and t.ndim != ndim:
            yield f"{name} has {t.ndim} dimensions; the kernel takes {ndim}"
    for name, t in (("w_scale", w_scale), ("b", b)):
        if t is not None and t.dtype not in DTYPES:
            yield f"{name} is {t.dtype}, not one of {', '.join(map(str, DTYPES))}"


def column(scale: Tensor) -> Tensor:
    """scale, of one number or one a row, beside sums [M, N]: a view costs what a short row's product does."""
    return scale if scale.ndim <= 2 else scale.reshape(-1, 1)


def finish(y: Tensor, scale: Tensor, w_scale: Tensor, b: Tensor | None) -> Tensor:
    """Sums y [M, N], in the dtype of the result's arithmetic, times the scales, plus b: in place."""
    kind = y.dtype
    y.mul_(column(scale if scale.dtype == kind else scale.to(kind)))
    factor = (w_scale if w_scale.dtype == kind else w_scale.to(kind)).reshape(-1)
    if b is None:
        return y.mul_(factor)
    return torch.addcmul(b if b.dtype == kind else b.to(kind), y, factor, out=y)


def compose(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, b: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The CPU kernel."""
    flat = q if q.ndim == 2 else q.reshape(q.shape[:-1].numel(), q.shape[-1])
    kind = _quantized.wide(dtype)
    if q.dtype == torch.int8:
        y = _quantized.integers(flat, w)
        y = y.double() if kind == torch.float64 else y.float()
    else:
        y = torch.mm(flat.to(kind), w.to(kind).t())
    y = finish(y, scale, w_scale, b)
    y = y if kind == dtype else y.to(dtype)
    return y if q.ndim == 2 else y.view(*q.shape[:-1], len(w))


def launch(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, b: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Run the Triton kernel. No checks: the caller has asked `unsupported`."""
    return _quantized_gemm.launch(q, scale, w, w_scale, b, dtype)


def _fake(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, b: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return q.new_empty((*q.shape[:-1], w.shape[0]), dtype=dtype)


op = _operator.define(
    "quantized_linear(Tensor q, Tensor scale, Tensor w, Tensor w_scale, Tensor? b, ScalarType dtype)"
    " -> Tensor",
    cpu=compose,
    cuda=_quantized.on_gpu(launch, reference, 5),
    fake=_fake,
)
_quantized.no_derivative(op)
_operator.count_flops(op, lambda q, scale, w, *args, **kwargs: 2 * prod(q) * w[0])


def pack(w: Tensor, w_scale: Tensor) -> Laid:
    """w as the CPU's kernels read it, for `direct`."""
    scales = w_scale.reshape(-1).to(torch.float32).expand(len(w)).contiguous()
    zeros = torch.zeros(len(w), dtype=torch.int32)
    if w.dtype == torch.int8 and _quantized.exact() and w.numel():
        return Laid(torch.ops.onednn.qlinear_prepack(w.contiguous(), None), scales, zeros)
    return Laid(w.float(), scales, zeros)


def worth(given: dict[str, Any]) -> bool:
    """Whether `direct` uses what `pack` makes: not of one row, nor of a small weight and result, of int8."""
    q, w = (_quantized.shape_of(given[name]) for name in ("q", "w"))
    if any(_operator.known(size) is None for size in w.shape):
        return False
    if w.dtype != torch.int8 or not _quantized.exact():
        return True
    rows = _operator.known(prod(q.shape[:-1]))  # Size.numel would fix a symbolic size
    small = w.numel() <= LARGE and rows is not None and rows * w.shape[0] <= LARGE
    return rows != 1 and not small


shared = _operator.Shared(pack, (), ("w", "w_scale"), worth, ahead=True)


def _laid(
    q: Tensor, scale: Tensor, w_scale: Tensor, b: Tensor | None, dtype: torch.dtype, laid: Laid
) -> Tensor:
    """y [M, N] from a weight that was laid out, in fp32 or already in `dtype`."""
    if not laid.w.is_mkldnn:
        if q.dtype == torch.int8:
            return finish(_quantized.floats(q, laid.w).float(), scale, laid.scales, b)
        return finish(torch.mm(q.float(), laid.w.t()), scale, laid.scales, b)
    whole = scale.numel() == 1
    kind = torch.bfloat16 if whole and dtype == torch.bfloat16 else torch.float32
    factor = scale.item() if whole else 1.0
    bias = b.float() if whole and b is not None else None
    y = torch.ops.onednn.qlinear_pointwise.default(
        q.view(torch.uint8) ^ 128, factor, 128, laid.w, laid.scales, laid.zeros, bias, 1.0, 0, kind,
        "none", [], "",
    )  # fmt: skip
    if whole:
        return y
    scale = column(scale.float())
    return y.mul_(scale) if b is None else torch.addcmul(b.float(), y, scale, out=y)


def direct(
    q: Tensor,
    scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    b: Tensor | None,
    dtype: torch.dtype,
    shared: Laid | None = None,
) -> Tensor:
    """The op on CPU tensors, past the dispatcher where no gradient is wanted.

    shared   the weight as `pack` laid it out. int8 multiplies bytes as if they were unsigned, 128 above q
    """
    if torch.is_grad_enabled() and torch._C._any_requires_grad(scale, w_scale, b):
        return op(q, scale, w, w_scale, b, dtype)
    rows = q.shape[:-1].numel()
    if shared is None or dtype == torch.float64 or not (q.numel() and w.numel()):
        return compose(q, scale, w, w_scale, b, dtype)
    if shared.w.is_mkldnn and (rows == 1 or (w.numel() <= LARGE and rows * len(w) <= LARGE)):
        return compose(q, scale, w, w_scale, b, dtype)
    y = _laid(q if q.ndim == 2 else q.reshape(rows, q.shape[-1]), scale, w_scale, b, dtype, shared)
    y = y if y.dtype == dtype else y.to(dtype)
    return y if q.ndim == 2 else y.view(*q.shape[:-1], len(w))
