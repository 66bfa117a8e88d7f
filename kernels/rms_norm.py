"""y = rms_norm(x, w, eps, offset=0, round_first=False, b=None) = x / rms(x) * (w + offset) + b.

with rms(x) = sqrt(mean(x**2) + eps).

Shapes     x: [..., C]; w: [C] or None, which is no factor at all; b: [C] or None; both of one dtype, x's or
           that of the statistics. Returns y: contiguous, like x.
Numerics   fp32 (fp64 for fp64), one rounding at the end, after b. With `round_first` the normalised x is
           rounded to x.dtype before the weight (Llama, T5), without it after (Gemma, which has offset 1).
           The gradient of w uses the unrounded value either way.
Cost       2 * x.nbytes of traffic forward, 3 * x.nbytes backward; 4 and 9 flop an element, one more each
           with b: memory-bound.
Limits     none on C. float64 on a GPU runs a composition. No second derivative: asking for it raises.
Source     Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxaccel.kernels import _norm, _operator, _rows

SMALL = 2**16  # elements up to which PyTorch's operators train faster than one of ours costs to call


def reference(
    x: Tensor,
    w: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    b: Tensor | None = None,
) -> Tensor:
    """The meaning of this op: what every test compares with."""
    low = x.dtype not in _norm.WIDE  # a cast that does nothing costs 3 of a small norm's 90 us
    f = x.float() if low else x
    z = f * ((f * f).mean(-1, True) + eps).rsqrt()
    if round_first and low:
        z = z.to(x.dtype).to(f.dtype)
    if w is not None:
        z = z * (w.to(f.dtype) + offset if offset else w)
    if b is not None:
        z = z + b
    return (z.to(x.dtype) if low else z).contiguous()


def unsupported(
    x: Tensor,
    w: Tensor | None,
    eps: float = 0.0,
    offset: float = 0.0,
    round_first: bool = False,
    b: Tensor | None = None,
) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    yield from _norm.unsupported(x, w=w, b=b)


def launch(
    x: Tensor,
    w: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    b: Tensor | None = None,
) -> Tensor:
    """Run the Triton kernel. No checks: the caller has asked `unsupported`."""
    return _rows.launch_forward(x, None, w, b, eps, offset, centred=False, round_first=round_first)[0]


def compose(
    x: Tensor,
    w: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    b: Tensor | None = None,
) -> Tensor:
    """The CPU kernel."""
    return _norm.compose_rms(x, w, eps, offset, round_first, b)[0]


def _fake(
    x: Tensor,
    w: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    b: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


op = _operator.define(
    "rms_norm(Tensor x, Tensor? w, float eps, float offset=0.0, bool round_first=False, Tensor? b=None)"
    " -> Tensor",
    cpu=compose,
    cuda=_norm.unless_double(launch, compose),
    fake=_fake,
)
_norm.register(
    op,
    lambda x, w, eps, offset, round_first, b: _norm.Norm.apply(
        x, None, w, b, eps, offset, round_first, False
    ),
)


def direct(
    x: Tensor,
    w: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    b: Tensor | None = None,
) -> Tensor:
    """The op on a CPU tensor, past the dispatcher where no gradient is wanted or its call would cost most."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, w, b):
        train = reference if x.numel() <= SMALL else op
        return train(x, w, eps, offset, round_first, b)
    return compose(x, w, eps, offset, round_first, b)
