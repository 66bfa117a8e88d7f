"""q, scale, h = norm_quantize(x, r, w, b, eps, centred, offset, round_first, dtype).

    h = x + r;  y = layer_norm(h, w, b, eps) if centred else rms_norm(h, w, eps, offset, round_first, b)
    q, scale = quantize_rows(y, dtype)

Shapes     x: [..., C]; r: like x, or None, for which h is x; w, b: [C] or None each; dtype: torch.int8 or
           torch.float8_e4m3fn. Returns q: [..., C] in `dtype`, contiguous; scale: [..., 1] in float32,
           float64 where x is; h: like x, contiguous, or [0] where there is no r.
Numerics   as the operators that it is made of: h and y are rounded to x.dtype on the way. On the CPU q and
           scale are theirs bit for bit; on a GPU too, but for how the compiler contracts the products and
           sums of a norm: a last place of y may differ, and with it a code that lies at a tie.
Cost       on the CPU the same work as theirs. On a GPU x.nbytes read and a byte an element written, where a
           norm and quantize_rows write and read y between: 3 bytes an element of bf16 instead of 7, and with
           an r 7 instead of 11.
Limits     x and r do not broadcast. float64 on a GPU runs the composition. No derivative: one that is asked
           for raises.
Source     layer_norm, rms_norm and quantize_rows name their papers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxaccel.kernels import (
    _norm,
    _norm_quantize,
    _operator,
    _quantized,
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    quantize_rows,
    rms_norm,
)


def reference(
    x: Tensor,
    r: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
    round_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of this op: what every test compares with."""
    h = x if r is None else x + r
    rms = (offset, round_first, b)
    y = layer_norm.reference(h, w, b, eps) if centred else rms_norm.reference(h, w, eps, *rms)
    return *quantize_rows.reference(y, dtype), x.new_empty(0) if r is None else h


def unsupported(
    x: Tensor,
    r: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
    round_first: bool,
    dtype: torch.dtype,
) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    yield from _norm.unsupported(x, r, w=w, b=b)
    if centred and (offset or round_first):
        yield f"a centred norm has offset {offset} and round_first {round_first}; the kernel takes neither"
    if dtype not in _quantized.TOP:
        yield f"codes of {dtype} are not one of {', '.join(map(str, _quantized.TOP))}"


def launch(
    x: Tensor,
    r: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
    round_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the Triton kernel. No checks: the caller has asked `unsupported`."""
    return _norm_quantize.launch_rows(
        x, r, w, b, eps, offset, dtype, centred=centred, round_first=round_first
    )


def compose(
    x: Tensor,
    r: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
    round_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU kernel."""
    h = x if r is None else torch.add(x, r).contiguous()
    rms = (offset, round_first, b)
    y = layer_norm.compose(h, w, b, eps) if centred else rms_norm.compose(h, w, eps, *rms)
    return *quantize_rows.compose(y, dtype), x.new_empty(0) if r is None else h


def _fake(
    x: Tensor,
    r: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
    round_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = x.new_empty((*x.shape[:-1], 1), dtype=_quantized.wide(x.dtype))
    return x.new_empty(x.shape, dtype=dtype), scale, x.new_empty((0,) if r is None else x.shape)


op = _operator.define(
    "norm_quantize(Tensor x, Tensor? r, Tensor? w, Tensor? b, float eps, bool centred, float offset,"
    " bool round_first, ScalarType dtype) -> (Tensor q, Tensor scale, Tensor h)",
    cpu=compose,
    cuda=_norm.unless_double(launch, compose),
    fake=_fake,
)
_quantized.no_derivative(op)
_operator.autocast(op, "cuda", lambda: torch.float32)  # as that of the norms
_norm._count_flops(op)  # of the norm: quantize_rows counts none


def direct(
    x: Tensor,
    r: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
    round_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op on CPU tensors, past the dispatcher where no gradient is wanted."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, r, w, b):
        return op(x, r, w, b, eps, centred, offset, round_first, dtype)
    rms = (offset, round_first, b)
    if r is None:
        y = layer_norm.direct(x, w, b, eps) if centred else rms_norm.direct(x, w, eps, *rms)
        return *quantize_rows.compose(y, dtype), _quantized.constant((), x.dtype, x.device)
    added = add_layer_norm.direct(x, r, w, b, eps) if centred else add_rms_norm.direct(x, r, w, eps, *rms)
    return *quantize_rows.compose(added[0], dtype), added[1]
