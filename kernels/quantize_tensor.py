"""q = quantize_tensor(x, scale, dtype): all of x by one scale that is given, as calibration found it.

    q = round(min(max(x / scale, -top), top));  top = 127 of int8, 448 of float8_e4m3fn

Shapes     x: any, [..., K]; scale: [] or [1], float32 or float64; dtype: torch.int8 or torch.float8_e4m3fn.
           Returns q: like x, contiguous.
Numerics   fp32 (fp64 for fp64); to nearest, ties to even. What lies beyond the top, inf included, becomes the
           top, NaN becomes 0, as torch.nan_to_num has them: calibration has not seen what it should be.
Cost       one read of x and one write of q, of a byte an element; on the CPU five passes.
Limits     as quantize_rows. No derivative: one that is asked for raises.
Source     Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
           Integer-Arithmetic-Only Inference", arXiv:1712.05877.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxaccel.kernels import _operator, _quantized, _quantized_rows
from fxaccel.kernels._norm import unless_double


def reference(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The meaning of this op: what every test compares with."""
    kind, top = _quantized.wide(x.dtype), _quantized.TOP[dtype]
    q = x.to(kind).contiguous() / scale.to(kind)
    q = q.nan_to_num(0.0, top, -top).clamp(-top, top)
    return (q.round() if dtype == torch.int8 else q).to(dtype)


def unsupported(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    yield from _quantized.unfit(x)
    if dtype not in _quantized.TOP:
        yield f"dtype {dtype} is not one of {', '.join(map(str, _quantized.TOP))}"
    yield from one_number("scale", scale)


def one_number(name: str, t: Tensor) -> Iterator[str]:
    """Why t is no single float32 or float64."""
    if t.dtype not in (torch.float32, torch.float64):
        yield f"{name} is {t.dtype}, not float32 or float64"
    if t.ndim > 1 or any(_operator.differ(size, 1) for size in t.shape):
        yield f"{name} is {list(t.shape)}; the kernel takes [] or [1]"


def compose(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The CPU kernel."""
    kind, top = _quantized.wide(x.dtype), _quantized.TOP[dtype]
    scale = scale if scale.dtype == kind else scale.to(kind)
    f = x if x.dtype == kind else x.to(kind)
    t = torch.div(f if f.is_contiguous() else f.contiguous(), scale)
    t.clamp_(-top, top).nan_to_num_(0.0)
    return (t.round_() if dtype == torch.int8 else t).to(dtype)


def launch(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Run the Triton kernel. No checks: the caller has asked `unsupported`."""
    return _quantized_rows.launch_tensor(x, scale, dtype)


def _fake(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


op = _operator.define(
    "quantize_tensor(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    cpu=compose,
    cuda=unless_double(launch, compose),
    fake=_fake,
)
_quantized.no_derivative(op)


def direct(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The op on a CPU tensor, past the dispatcher where no gradient is wanted."""
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return op(x, scale, dtype)
    return compose(x, scale, dtype)
