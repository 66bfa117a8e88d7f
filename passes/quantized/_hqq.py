"""HQQ: zeros, or scales, that suit most weights of a group and let its few outliers be far off. No data.

Steps      |w - w^|_p^p with p below 1 is lessened by turns: errors beyond what is usual are set aside as E,
           by the generalized soft threshold x - |x|^(p-1) / beta, and what remains, w - E, is fitted by least
           squares for the codes that are now the nearest. Errors are in units of the group's first scale: so
           beta means the same for every weight, and a weight times a power of two has the same codes.
Source     Badri & Shaji 2023, "Half-Quadratic Quantization of large machine learning models",
           https://mobiusml.github.io/hqq_blog/.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fxaccel.errors import OptionError
from fxaccel.passes.quantized._grid import Grid, Parts, Scales, checked

BETA, GROWTH = 10.0, 1.01  # the published ones: of the first step, and from one to the next
STEPS = 20


@torch.no_grad()
def half_quadratic(grid: Grid, weight: Tensor, p: float = 0.7, steps: int = STEPS) -> Scales:
    """Scales by at most so many steps for each group, from those of its range.

    Fits       with zeros the zero, as published: the scale stays. Without, the scale: of the codes that are
               now the nearest the values are linear in it too, and its least squares is as closed a form.
    Exact      of each group the best of all steps and of the range's scales, in the sum of |w - w^|^p: never
               above rounding to nearest there. A group ends at the step that does not improve it.
    """
    if not 0 < p < 1:
        raise OptionError(f"p is {p!r}, expected a number between 0 and 1")
    return grid.by_rows(functools.partial(_fitted, grid, p, steps), checked(weight))


def hqq(grid: Grid, weight: Tensor, p: float = 0.7, steps: int = STEPS) -> Parts:
    """The parts of a weight by `half_quadratic`."""
    return grid.quantize(weight, half_quadratic(grid, weight, p, steps))


def distance(grid: Grid, weight: Tensor, parts: Parts, p: float = 0.7) -> Tensor:
    """The sum of |w - w^|^p for each scale, [N, G]: what `half_quadratic` lessens."""
    gap = weight.double() - grid.dense(parts, weight.shape[1])
    return grid.reduced(grid.grouped(gap.abs_().pow_(p)).sum(-1))


def _fitted(grid: Grid, p: float, steps: int, rows: Tensor) -> Scales:
    w = grid.grouped(rows)
    real = grid.grouped(torch.ones_like(rows[:1], dtype=torch.float64))  # 0 behind the last column
    scale, zero = grid.scales(rows)
    unit = scale.double()[..., None]
    best, least = (scale, zero), torch.full_like(scale, torch.inf, dtype=torch.float64)
    for step in range(steps + 1):
        level, gap = _rounded(grid, w, scale, zero)
        x = gap.div_(unit).mul_(real)
        loss = grid.reduced(x.abs().pow_(p).sum(-1))
        lower = loss < least
        if not bool(lower.any()):
            break
        least = torch.where(lower, loss, -1.0)  # of those that end nothing is below
        best = _kept(lower, (scale, zero), best)
        kept = (w - _shrunk(x, p, BETA * GROWTH**step).mul_(unit)).mul_(real)
        scale, zero = _solved(grid, kept, level.mul_(real), scale, zero, real)
    return best


def _rounded(grid: Grid, w: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """The levels nearest to w [N, G, width], and what is left."""
    step = scale.double()[..., None]
    x = w if zero is None else w - zero.double()[..., None]
    level = grid.nearest(x / step)
    return level, x - level * step


def _shrunk(x: Tensor, p: float, beta: float) -> Tensor:
    """What of errors x is set aside; of 0 nothing, where the power is infinite."""
    size = x.abs()
    return (size - size.pow(p - 1) / beta).clamp_min_(0.0).mul_(x.sign())


def _solved(
    grid: Grid, kept: Tensor, level: Tensor, scale: Tensor, zero: Tensor | None, real: Tensor
) -> Scales:
    """The zero, or the scale, of least squares |kept - level * scale - zero|, as it is stored."""
    if zero is not None:
        left = (kept - level * scale.double()[..., None] * real).sum(-1)
        return scale, (left / real.sum(-1)).to(zero.dtype)
    over, under = (grid.reduced((level * other).sum(-1)) for other in (kept, level))
    found = grid.stored(over / under)  # not a number where all levels are 0, and so is `over`
    return torch.where((over > 0) & torch.isfinite(found), found, scale), None


def _kept(lower: Tensor, one: Scales, other: Scales) -> Scales:
    """Of two scales the first where it is the lower."""
    zero = None if one[1] is None or other[1] is None else torch.where(lower, one[1], other[1])
    return torch.where(lower, one[0], other[0]), zero
