"""y = layer_norm(x, w, b, eps) = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * w + b.

Shapes     x: [..., C]; w, b: [C] or None each, of one dtype, x's or that of the statistics. Returns y:
           contiguous, like x.
Numerics   fp32 (fp64 for fp64), one rounding at the end.
Cost       2 * x.nbytes of traffic forward, 3 * x.nbytes backward; 7 and 13 flop an element: memory-bound.
Limits     none on C. float64 on a GPU runs a composition. No second derivative: asking for it raises.
Source     Ba, Kiros & Hinton 2016, "Layer Normalization", arXiv:1607.06450.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxaccel.kernels import _norm, _operator, _rows


def reference(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """The meaning of this op: what every test compares with."""
    f = x.to(_norm.statistics(x.dtype))
    z = f - f.mean(-1, keepdim=True)
    z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    if w is not None:
        z = z * w.to(f.dtype)
    return (z if b is None else z + b.to(f.dtype)).to(x.dtype).contiguous()


def unsupported(x: Tensor, w: Tensor | None, b: Tensor | None = None, eps: float = 0.0) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    yield from _norm.unsupported(x, w=w, b=b)


def launch(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """Run the Triton kernel. No checks: the caller has asked `unsupported`."""
    return _rows.launch_forward(x, None, w, b, eps, centred=True)[0]


def compose(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """The CPU kernel."""
    return _norm.compose_layer(x, w, b, eps)[0]


def _fake(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


op = _operator.define(
    "layer_norm(Tensor x, Tensor? w, Tensor? b, float eps) -> Tensor",
    cpu=compose,
    cuda=_norm.unless_double(launch, compose),
    fake=_fake,
)
_norm.register(
    op,
    lambda x, w, b, eps: _norm.Norm.apply(x, None, w, b, eps, 0.0, False, True),
)


def direct(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """The op on a CPU tensor, by torch's: in fp32 where it would sum the gradient of a weight in less."""
    if x.dtype not in _norm.WIDE and torch.is_grad_enabled() and torch._C._any_requires_grad(w, b):
        w, b = (None if t is None else t.float() for t in (w, b))
        return torch.layer_norm(x.float(), x.shape[-1:], w, b, eps).to(x.dtype)
    return torch.layer_norm(x, x.shape[-1:], w, b, eps)
