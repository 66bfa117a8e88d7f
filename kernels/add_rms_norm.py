"""y, h = add_rms_norm(x, r, w, eps, offset=0, round_first=False, b=None): h = x + r, y = rms_norm(h, w, ...).

Shapes     x, r: [..., C], of one shape; w, b: [C] or None each. Returns y, h: contiguous, like x.
Numerics   h is rounded to x.dtype first, as the unfused graph does, and is bit-equal to x + r; from there
           y is rms_norm(h) in fp32 (fp64 for fp64) with one rounding.
Cost       4 * x.nbytes of traffic forward and, where h has a gradient, 4 * x.nbytes backward, against 5
           and 6 unfused; 5 and 10 flop an element, one more each with b: memory-bound.
Limits     x and r do not broadcast. Otherwise as rms_norm.
Source     Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxaccel.kernels import _norm, _operator, _rows, rms_norm


def reference(
    x: Tensor,
    r: Tensor,
    w: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The meaning of this op: what every test compares with."""
    h = (x + r).contiguous()
    return rms_norm.reference(h, w, eps, offset, round_first, b), h


def unsupported(
    x: Tensor,
    r: Tensor,
    w: Tensor | None,
    eps: float = 0.0,
    offset: float = 0.0,
    round_first: bool = False,
    b: Tensor | None = None,
) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    yield from _norm.unsupported(x, r, w=w, b=b)


def launch(
    x: Tensor,
    r: Tensor,
    w: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel. No checks: the caller has asked `unsupported`."""
    y, h, *_ = _rows.launch_forward(x, r, w, b, eps, offset, centred=False, round_first=round_first)
    return y, h


def compose(
    x: Tensor,
    r: Tensor,
    w: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The CPU kernel."""
    h = torch.add(x, r).contiguous()
    return _norm.compose_rms(h, w, eps, offset, round_first, b)[0], h


def _fake(
    x: Tensor,
    r: Tensor,
    w: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y)


op = _operator.define(
    "add_rms_norm(Tensor x, Tensor r, Tensor? w, float eps, float offset=0.0, bool round_first=False,"
    " Tensor? b=None) -> (Tensor y, Tensor h)",
    cpu=compose,
    cuda=_norm.unless_double(launch, compose),
    fake=_fake,
)
_norm.register(
    op,
    lambda x, r, w, eps, offset, round_first, b: _norm.Norm.apply(
        x, r, w, b, eps, offset, round_first, False
    ),
)


def direct(
    x: Tensor,
    r: Tensor,
    w: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The op on CPU tensors; the norm past the dispatcher where no gradient is wanted."""
    h = torch.add(x, r).contiguous()
    return rms_norm.direct(h, w, eps, offset, round_first, b), h
