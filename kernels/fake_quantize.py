"""v = fake_quantize(w, scale, zero, format, group, zeros): the value nearest to w that 8 or 4 bits can hold.

    x = (w - zero) / scale;  level = the nearest of the format;  v = level * scale + zero
    dw = dv where x is in reach of the levels, else 0
    dscale = share * sum of dv * (level - x in reach, level beyond);  dzero = share * sum of dv beyond reach
    share = 1 / sqrt(n top), of the n elements that share the scale; top is the largest level

Shapes     w: [N, K]; scale, zero: [N, G], G = ceil(K / group), of any float dtype; group -1: any w by one
           scale, of one element. No scale: that which reaches the largest absolute value of its group, taken
           from w at each call and held fixed in the derivative; `zeros` says whether groups have a zero,
           which only int4 has, and agrees with `zero` where that is given. Returns v: as w, contiguous.
Levels     int8: -127 to 127; int4: -7 to 7, with zeros -8 to 7; nf4: NF4; float8: those of e4m3fn. Ties to
           the even code. Reach is half a step beyond the ends.
Numerics   fp32 (fp64 for fp64), one rounding at the end: v is what `dequantize` makes of the codes, bit for
           bit. Scales count as they will be stored: bf16 of 4 bits, else fp32; |scale|, at least the least
           normal number, so that one that training carries past 0 comes back from it.
Cost       a read of w and a write of v on a GPU, and in the derivative two reads and a write; without a scale
           another read. On the CPU eight passes, ten in the derivative.
Limits     float64 on a GPU runs the composition. No second derivative: one that is asked for raises.
Source     straight-through: Bengio et al. 2013, arXiv:1308.3432; learned scales and their share of the
           gradient: Esser et al. 2020, "Learned Step Size Quantization", arXiv:1902.08153; learned zeros:
           Bhalgat et al. 2020, "LSQ+", arXiv:2004.09576.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxaccel.kernels import _fake, _fake_tiles, _operator, _quantized
from fxaccel.kernels._norm import unless_double


def reference(
    w: Tensor, scale: Tensor | None, zero: Tensor | None, format: str, group: int, zeros: bool = False
) -> Tensor:
    """The meaning of this op: what every test compares with."""
    if scale is None:
        scale, zero = _fake.observed(w, format, group, zeros)
    x = _fake.units(w, scale, zero, format, group)
    return _fake.values(_fake.nearest(x, format, zeros), scale, zero, format, group, w)


def unsupported(
    w: Tensor, scale: Tensor | None, zero: Tensor | None, format: str, group: int, zeros: bool = False
) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    yield from _quantized.unfit(w, name="w")
    if format not in _quantized.FORMATS:
        yield f"format {format!r} is not one of {', '.join(_quantized.FORMATS)}"
        return
    if zeros and format != "int4":
        yield f"{format} has no zero"
    if (scale is None and zero is not None) or (scale is not None and zeros != (zero is not None)):
        yield f"zeros is {zeros}, with {'a' if zero is not None else 'no'} zero beside {_told(scale)}"
    if group == 0 or group < -1:
        yield f"a group has {group} columns; the kernel takes at least 1, or -1 for one scale"
        return
    if group > 0 and w.ndim != 2:
        yield f"w has {w.ndim} dimensions; with groups the kernel takes 2"
        return
    for name, t in (("scale", scale), ("zero", zero)):
        if t is not None:
            yield from _unlike(name, t, w, group)


def _told(scale: Tensor | None) -> str:
    return "no scale" if scale is None else "a scale"


def _unlike(name: str, t: Tensor, w: Tensor, group: int) -> Iterator[str]:
    """Why t is no scale or zero of w."""
    if t.dtype not in _quantized.SCALES:
        yield f"{name} is {t.dtype}, not one of {', '.join(map(str, _quantized.SCALES))}"
    if group < 0:
        if any(_operator.differ(size, 1) for size in t.shape):
            yield f"{name} is {list(t.shape)}; the kernel takes one element"
        return
    wanted = [w.shape[0], _quantized.groups(w.shape[1], group)]
    if t.ndim != 2 or any(_operator.differ(a, b) for a, b in zip(t.shape, wanted, strict=True)):
        yield f"{name} is {list(t.shape)}; w has {wanted[0]} rows of {wanted[1]} groups"


def compose(
    w: Tensor, scale: Tensor | None, zero: Tensor | None, format: str, group: int, zeros: bool = False
) -> Tensor:
    """The CPU kernel."""
    if not w.numel():
        return w.new_empty(w.shape)
    return reference(w, scale, zero, format, group, zeros)


def compose_backward(
    dy: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, scales: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w, and of scale and zero where `scales`: else they are empty."""
    zeros, kind = zero is not None, _quantized.wide(w.dtype)
    if not w.numel():
        dscale, dzero = (
            torch.zeros_like(t) if scales and t is not None else w.new_empty(0) for t in (scale, zero)
        )
        return w.new_empty(w.shape), dscale, dzero
    x = _fake.units(w, scale, zero, format, group)
    moves, dy = _fake.inside(x, format, zeros), _fake.split(dy.to(kind), group)
    dw = _fake.joined(torch.where(moves, dy, 0.0), w)
    if not scales:
        return dw, w.new_empty(0), w.new_empty(0)
    level = _fake.nearest(x, format, zeros)
    sums = (dy * torch.where(moves, level - x, level)).sum(-1)
    beyond = torch.where(moves, 0.0, dy).sum(-1) if zeros else sums
    return dw, *_fake.shared(sums, beyond, w, scale, zero, format, group)


def launch(
    w: Tensor, scale: Tensor | None, zero: Tensor | None, format: str, group: int, zeros: bool = False
) -> Tensor:
    """Run the Triton kernel. No checks: the caller has asked `unsupported`."""
    if scale is None and w.numel():
        scale, zero = _fake.observed(w, format, group, zeros)
    return w.new_empty(w.shape) if scale is None else _fake_tiles.launch(w, scale, zero, format, group)


def launch_backward(
    dy: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, scales: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the derivative."""
    run = _fake_tiles.launch_backward if w.numel() else compose_backward
    return run(dy, w, scale, zero, format, group, scales)


def _fake_value(
    w: Tensor, scale: Tensor | None, zero: Tensor | None, format: str, group: int, zeros: bool = False
) -> Tensor:
    return w.new_empty(w.shape)


def _backward_fake(
    dy: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, scales: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dscale, dzero = (
        t.new_empty(t.shape) if scales and t is not None else w.new_empty(0) for t in (scale, zero)
    )
    return w.new_empty(w.shape), dscale, dzero


op = _operator.define(
    "fake_quantize(Tensor w, Tensor? scale, Tensor? zero, str format, int group, bool zeros=False) -> Tensor",
    cpu=compose,
    cuda=unless_double(launch, compose),
    fake=_fake_value,
)
backward_op = _operator.define(
    "fake_quantize_backward(Tensor dy, Tensor w, Tensor scale, Tensor? zero, str format, int group,"
    " bool scales) -> (Tensor dw, Tensor dscale, Tensor dzero)",
    cpu=compose_backward,
    cuda=unless_double(launch_backward, compose_backward),
    fake=_backward_fake,
)


class FakeQuantize(torch.autograd.Function):
    """Straight through to w, and to scales that are given."""

    @staticmethod
    def forward(ctx, w, scale, zero, format, group, zeros):
        """The values; a scale that is observed is kept for the way back."""
        if scale is None and w.numel():
            scale, zero = _fake.observed(w, format, group, zeros)
        ctx.save_for_backward(w, scale, zero)
        ctx.stored = format, group
        return op(w, scale, zero, format, group, zeros)

    @staticmethod
    @_operator.once_differentiable
    def backward(ctx, dy):
        """Gradients of w, scale and zero."""
        w, scale, zero = ctx.saved_tensors
        scales = any(ctx.needs_input_grad[1:3])
        if scale is None:  # of a w without elements
            return dy.clone(), None, None, None, None, None
        made = backward_op(dy, w, scale, zero, *ctx.stored, scales)
        wanted = ctx.needs_input_grad[:3]
        return *(g if n else None for g, n in zip(made, wanted, strict=True)), None, None, None


_operator.differentiate(op, FakeQuantize.apply)


def direct(
    w: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    format: str,
    group: int,
    zeros: bool = False,
) -> Tensor:
    """The op on CPU tensors, past the dispatcher where no gradient is wanted."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(w, scale, zero):
        return op(w, scale, zero, format, group, zeros)
    return compose(w, scale, zero, format, group, zeros)
