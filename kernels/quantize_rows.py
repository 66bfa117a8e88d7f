"""q, scale = quantize_rows(x, dtype): each row of x by the scale that takes its largest value to the top.

    a = max(max|x|, 1e-30);  scale = a / top;  q = round(x * (top / a));  top = 127 of int8, 448 of float8

Shapes     x: [..., K]; dtype: torch.int8 or torch.float8_e4m3fn. Returns q: [..., K] in `dtype`,
           contiguous; scale: [..., 1] in float32, float64 where x is.
Numerics   fp32 (fp64 for fp64): division and product round once each, then q to nearest, ties to even.
           A row that holds an inf or a NaN has that as its scale and whatever as its q: what is multiplied
           by its scale is not finite. Nothing raises.
Cost       on the CPU four passes with one temporary; on a GPU x is read once, rows above ROW_MAX twice, the
           second time from L2.
Limits     float64 on a GPU runs the composition. No derivative: one that is asked for raises.
Source     dynamic scales a token: Yao et al. 2022, "ZeroQuant", arXiv:2206.01861.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxaccel.kernels import _operator, _quantized, _quantized_rows
from fxaccel.kernels._norm import unless_double


def reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The meaning of this op: what every test compares with."""
    kind, top = _quantized.wide(x.dtype), _quantized.TOP[dtype]
    f = x.to(kind).contiguous()
    a = f.abs().amax(-1, True) if f.numel() else f.new_zeros((*f.shape[:-1], 1))
    a = a.clamp(min=_quantized.LEAST)
    q = f * torch.full_like(a, top).div(a)
    q = q.round() if dtype == torch.int8 else q.clamp(-top, top)
    return q.to(dtype), a / torch.full_like(a, top)


def unsupported(x: Tensor, dtype: torch.dtype) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks and dtypes."""
    yield from _quantized.unfit(x)
    if dtype not in _quantized.TOP:
        yield f"dtype {dtype} is not one of {', '.join(map(str, _quantized.TOP))}"


def compose(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The CPU kernel: as few passes, and as little fresh memory, as PyTorch's operators allow."""
    if not x.numel():
        return reference(x, dtype)
    x = x if x.is_contiguous() else x.contiguous()
    top, spent = _quantized.TOP[dtype], x.abs()
    a = spent.amax(-1, True)
    if x.dtype.itemsize == 2:
        a = a.float()  # which the product with x becomes too
        t = x * _quantized.constant(top, a.dtype, x.device).div(a.clamp_min_(_quantized.LEAST))
    else:
        factor = _quantized.constant(top, a.dtype, x.device).div(a.clamp_min_(_quantized.LEAST))
        t = torch.mul(x, factor, out=spent)
    q = t.round_() if dtype == torch.int8 else t.clamp_(-top, top)
    return q.to(dtype), a.div_(_quantized.constant(top, a.dtype, x.device))


def launch(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel. No checks: the caller has asked `unsupported`."""
    return _quantized_rows.launch_rows(x, dtype)


def _fake(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = x.new_empty((*x.shape[:-1], 1), dtype=_quantized.wide(x.dtype))
    return x.new_empty(x.shape, dtype=dtype), scale


op = _operator.define(
    "quantize_rows(Tensor x, ScalarType dtype) -> (Tensor q, Tensor scale)",
    cpu=compose,
    cuda=unless_double(launch, compose),
    fake=_fake,
)
_quantized.no_derivative(op)


def direct(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The op on a CPU tensor, past the dispatcher where no gradient is wanted."""
    if torch.is_grad_enabled() and x.requires_grad:
        return op(x, dtype)
    return compose(x, dtype)
