"""Grids of 8 and 4 bits: the scales of a range, those in force, the nearest levels, where these move.

Shapes     w: [N, K] by groups [N, G, group], zeros behind its columns; any w as [1, 1, n] where one scale
           serves it all (group -1).
Numerics   fp32 (fp64 for fp64), scales that are observed in fp64. A scale in force is what will be stored:
           bf16 of 4 bits, else fp32, its sign dropped and no smaller than the least normal number.
"""

import itertools
import math
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fxaccel.kernels import _quantized

TOP = {"int8": 127.0, "int4": 7.0, "nf4": 1.0, "float8": 448.0}  # the largest level
LOW = -8.0  # of int4 with zeros, whose codes are 0 to 15
HALF8 = 16.0  # half a step of float8 at its top
LEAST8 = 2.0**-6  # the least normal number of float8_e4m3fn: below it steps are equal
EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000),
}  # fmt: skip
"""Where the exponent lies in the bits of a float."""

Scales: TypeAlias = tuple[Tensor, Any]
"""scale, zero or None."""


def stored(format: str) -> torch.dtype:
    """The dtype in which scales and zeros are kept beside the codes."""
    return torch.bfloat16 if format in _quantized.GROUPED else torch.float32


def split(w: Tensor, group: int) -> Tensor:
    """w by groups, with zeros behind its columns."""
    if group < 0:
        return w.reshape(1, 1, -1)
    short = -w.shape[1] % group
    return torch.nn.functional.pad(w, (0, short)).reshape(w.shape[0], -1, group)


def joined(groups: Tensor, like: Tensor) -> Tensor:
    """The elements of `like`, in its dtype, that are in groups as `split` makes them."""
    if groups.shape[0] == groups.shape[1] == 1 and groups.shape[2] == like.numel():
        return groups.reshape(like.shape).to(like.dtype)
    return groups.flatten(1)[:, : like.shape[1]].to(like.dtype).contiguous()


def observed(w: Tensor, format: str, group: int, zeros: bool) -> Scales:
    """Scales that reach the largest absolute value of each group; with zeros its range, and 0 within it."""
    low, high = split(w.detach(), group).aminmax(dim=-1)
    return reaching(low, high, format, zeros)


def reaching(low: Tensor, high: Tensor, format: str, zeros: bool) -> Scales:
    """Scales of ranges, each widened to hold 0."""
    low, high = low.double().clamp_max(0.0), high.double().clamp_min(0.0)
    step = (high - low) / 15.0 if zeros else high.maximum(-low) / TOP[format]
    scale = kept(step, format)
    if not zeros:
        return scale, None
    # levels reach from -8 to 7: half a step above their middle is the middle of the range
    zero = (low + high) / 2 + scale.double() / 2
    return scale, torch.where(step > 0, zero, 0.0).to(scale.dtype)


def kept(step: Tensor, format: str) -> Tensor:
    """Scales as they are stored, from positive ones in fp64, or 0."""
    kind = stored(format)
    return torch.where(step > 0, step.to(kind).clamp_min(torch.finfo(kind).smallest_normal), 1.0)


def in_force(scale: Tensor, zero: Tensor | None, format: str) -> Scales:
    """What the values of trained scales are, in the dtype in which they will be stored."""
    kind = stored(format)
    scale = scale.abs().clamp_min(torch.finfo(kind).smallest_normal).to(kind)
    return scale, None if zero is None else zero.to(kind)


def units(w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int) -> Tensor:
    """w in units of the scales in force, by groups."""
    kind, shape = _quantized.wide(w.dtype), (1, 1) if group < 0 else scale.shape
    scale, zero = in_force(scale, zero, format)
    x = split(w.to(kind), group)
    x = x if zero is None else x - zero.to(kind).view(shape).unsqueeze(-1)
    return x / scale.to(kind).view(shape).unsqueeze(-1)


def values(
    levels: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, like: Tensor
) -> Tensor:
    """What levels, by groups, stand for, in the shape and dtype of `like`: as dequantize has it."""
    shape = (1, 1) if group < 0 else scale.shape
    scale, zero = in_force(scale, zero, format)
    value = levels * scale.to(levels.dtype).view(shape).unsqueeze(-1)
    if zero is not None:
        value = value + zero.to(levels.dtype).view(shape).unsqueeze(-1)
    return joined(value, like)


def nearest(x: Tensor, format: str, zeros: bool) -> Tensor:
    """The levels nearest to x, ties to the even code; a NaN stays one."""
    if format == "nf4":
        table = _quantized.constant(_quantized.NF4, x.dtype, x.device)
        return torch.where(x.isnan(), x, table[normal_codes(x).int()])
    if format == "float8":
        x = x.clamp(-448.0, 448.0)
        # an exponent alone is a power of two: numbers from it to the next are 8 steps
        whole, exponent = EXPONENTS[x.dtype]
        step = (x.view(whole) & exponent).view(x.dtype).clamp_min_(LEAST8).div_(8.0)
        return x.div_(step).round_().mul_(step)
    return x.round().clamp_(LOW if zeros else -TOP[format], TOP[format])


def normal_codes(x: Tensor) -> Tensor:
    """The codes of NF4 nearest to x: how many bounds each is above, none for a NaN."""
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for bound in normal_float(x.dtype):  # a search in the sorted bounds takes longer than all of these
        codes += x > bound
    return codes


def inside(x: Tensor, format: str, zeros: bool) -> Tensor:
    """Whether the nearest level moves with x: it is within half a step of the levels' ends."""
    low, high = reach(format, zeros)
    return (x > low) & (x < high)


def reach(format: str, zeros: bool) -> tuple[float, float]:
    """Half a step below the lowest level, and above the highest."""
    if format == "nf4":
        levels = _quantized.NF4
        return (3 * levels[0] - levels[1]) / 2, (3 * levels[-1] - levels[-2]) / 2
    half = HALF8 if format == "float8" else 0.5
    return (LOW if zeros else -TOP[format]) - half, TOP[format] + half


@lru_cache
def normal_float(kind: torch.dtype) -> tuple[float, ...]:
    """The bounds between the levels of NF4: a number above a bound belongs to the upper level.

    A number in the middle belongs to the level of the even code, so that where the lower code is odd the
    bound is just below. In fp32 it is the next number below that fp32 holds, which what is fp32 cannot be
    between.
    """
    bounds = []
    for code, (low, high) in enumerate(itertools.pairwise(_quantized.NF4)):
        middle = (low + high) / 2
        exact = torch.tensor(math.nextafter(middle, -math.inf) if code % 2 else middle, dtype=torch.float64)
        held = exact.to(kind)
        lower = held.double() > exact
        bounds.append(float(torch.nextafter(held, held.new_tensor(-math.inf)) if lower else held))
    return tuple(bounds)


def counts(w: Tensor, group: int) -> Tensor:
    """How many elements of w share each scale of a row: [G], or [1]."""
    if group < 0:
        return torch.full((1,), w.numel(), device=w.device)
    n = torch.full((_quantized.groups(w.shape[1], group),), group, device=w.device)
    n[-1:] = w.shape[1] - group * (len(n) - 1)
    return n


def shared(
    sums: Tensor, beyond: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int
) -> Scales:
    """Gradients of scale and zero, of their sums over groups [N, G]: empty for no zero."""
    share = counts(w, group).to(sums.dtype).mul_(TOP[format]).rsqrt_()
    signs = torch.where(scale < 0, -1.0, 1.0).to(sums.dtype)
    dscale = (sums * share).view(scale.shape).mul_(signs).to(scale.dtype)
    if zero is None:
        return dscale, w.new_empty(0)
    return dscale, (beyond * share).view(zero.shape).to(zero.dtype)
