"""y, h = add_layer_norm(x, r, w, b, eps): h = x + r, y = layer_norm(h, w, b, eps).

Shapes     x, r: [..., C], of one shape; w, b: [C] or None each. Returns y, h: contiguous, like x.
Numerics   h is rounded to x.dtype first, as the unfused graph does, and is bit-equal to x + r; from there
           y is layer_norm(h) in fp32 (fp64 for fp64) with one rounding.
Cost       4 * x.nbytes of traffic forward and, where h has a gradient, 4 * x.nbytes backward, against 5
           and 6 unfused; 8 and 14 flop an element: memory-bound.
Limits     x and r do not broadcast. Otherwise as layer_norm.
Source     Ba, Kiros & Hinton 2016, "Layer Normalization", arXiv:1607.06450.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxaccel.kernels import _norm, _operator, _rows, layer_norm


def reference(x: Tensor, r: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The meaning of this op: what every test compares with."""
    h = (x + r).contiguous()
    return layer_norm.reference(h, w, b, eps), h


def unsupported(
    x: Tensor, r: Tensor, w: Tensor | None, b: Tensor | None = None, eps: float = 0.0
) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    yield from _norm.unsupported(x, r, w=w, b=b)


def launch(x: Tensor, r: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel. No checks: the caller has asked `unsupported`."""
    y, h, *_ = _rows.launch_forward(x, r, w, b, eps, centred=True)
    return y, h


def compose(x: Tensor, r: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The CPU kernel."""
    h = torch.add(x, r).contiguous()
    return _norm.compose_layer(h, w, b, eps)[0], h


def _fake(x: Tensor, r: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y)


op = _operator.define(
    "add_layer_norm(Tensor x, Tensor r, Tensor? w, Tensor? b, float eps) -> (Tensor y, Tensor h)",
    cpu=compose,
    cuda=_norm.unless_double(launch, compose),
    fake=_fake,
)
_norm.register(
    op,
    lambda x, r, w, b, eps: _norm.Norm.apply(x, r, w, b, eps, 0.0, False, True),
)


def direct(x: Tensor, r: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The op on CPU tensors; the norm as `layer_norm.direct`."""
    h = torch.add(x, r).contiguous()
    return layer_norm.direct(h, w, b, eps), h
