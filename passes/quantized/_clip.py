"""Scales that leave the largest weights out of their range, so that steps are finer for the others.

Source     the search over shrunk ranges in the norm of a group's outputs: Lin et al. 2023, "AWQ",
           arXiv:2306.00978; by squares of the weights: Frantar et al. 2022, "GPTQ", arXiv:2210.17323 (its
           code); percentiles: Wu et al. 2020, "Integer quantization for deep learning inference",
           arXiv:2004.09602.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxaccel.errors import OptionError
from fxaccel.passes.quantized._error import squares, symmetric
from fxaccel.passes.quantized._grid import Grid, Scales, checked

FACTORS = tuple(1 - i / 32 for i in range(20))
"""Of a range, what is tried of it: from all to 0.4; of normal weights int4 is best at 0.6 to 0.9."""

ROWS = 256  # that are multiplied by a gram at once: of fewer, reading it takes longer than the products


@torch.no_grad()
def percentile(grid: Grid, weight: Tensor, share: float = 0.999) -> Scales:
    """Scales of the least ranges that hold this share of each group's weights; with zeros on each side."""
    if not 0 < share <= 1:
        raise OptionError(f"the share is {share!r}, expected a number above 0 and up to 1")

    def made(rows: Tensor) -> Scales:
        w = grid.grouped(rows)
        behind = w.shape[1] * w.shape[2] - rows.shape[1]
        sides = (w.clamp_min(0.0), w.neg().clamp_min(0.0)) if grid.zeros else (w.abs(),)
        high, *low = (_reached(grid, side, share, behind) for side in sides)
        return grid.fitting(-low[0] if low else torch.zeros_like(high), high)

    return grid.by_rows(made, checked(weight))


def _reached(grid: Grid, sizes: Tensor, share: float, behind: int) -> Tensor:
    """The least of each group's sizes >= 0 that is not below this share of them.

    behind     columns of the last group that are none of the weight's: they sort before all others
    """
    if grid.group < 0:
        return sizes.flatten().kthvalue(math.ceil(share * sizes.numel())).values.reshape(1, 1)
    order, width = sizes.sort(-1).values, sizes.shape[-1]
    found = order[..., math.ceil(share * width) - 1].clone()
    found[:, -1] = order[:, -1, behind + math.ceil(share * (width - behind)) - 1]
    return found


@torch.no_grad()
def clipped(
    grid: Grid, weight: Tensor, gram: Tensor | None = None, factors: Sequence[float] = FACTORS
) -> Scales:
    """Scales of ranges shrunk by that factor, of each group, that has the least error.

    Norm       |w - w^|^2 of the group's weights; with gram [K, K] of its part G of the group,
               (w - w^) G (w - w^)^T: what the group adds to the output, as if inputs of other groups were
               independent of it.
    Exact      of the factors tried the best of each group; never above the unshrunk range's error, of which
               the factor 1 is tried first whether given or not.
    """
    weight = checked(weight)
    blocks = None if gram is None else _blocks(grid, symmetric(weight, gram))
    make = functools.partial(_searched, grid, blocks, (1.0, *factors))
    return grid.by_rows(make, weight, ROWS if blocks is not None and len(blocks) == 1 else 1)


def _blocks(grid: Grid, gram: Tensor) -> Tensor:
    """The diagonal blocks of a gram, one a group: [G, width, width]."""
    groups, width = grid.groups(len(gram)), grid.width(len(gram))
    behind = groups * width - len(gram)
    gram = torch.nn.functional.pad(gram, (0, behind, 0, behind)).reshape(groups, width, groups, width)
    return gram.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _searched(grid: Grid, blocks: Tensor | None, factors: Sequence[float], rows: Tensor) -> Scales:
    w = grid.grouped(rows)
    low, high = w.aminmax(dim=-1)
    low, high = grid.reduced(low, torch.amin).clamp_max(0.0), grid.reduced(high, torch.amax).clamp_min(0.0)
    behind = w.shape[1] * w.shape[2] - rows.shape[1]
    least, best = None, None
    for factor in factors:
        scale, zero = grid.fitting(low * factor, high * factor)
        loss = grid.reduced(_loss(grid, w, scale, zero, blocks, behind))
        if least is None or best is None:
            least, best = loss, (scale, zero)
            continue
        lower = loss < least
        kept = None if zero is None or best[1] is None else torch.where(lower, zero, best[1])
        least, best = torch.where(lower, loss, least), (torch.where(lower, scale, best[0]), kept)
    assert best is not None, "the factor 1 is always tried"
    return best


def _loss(
    grid: Grid, w: Tensor, scale: Tensor, zero: Tensor | None, blocks: Tensor | None, behind: int
) -> Tensor:
    """The squared error [N, G] of rounding w [N, G, width]."""
    step = scale.double()[..., None]
    shift = None if zero is None else zero.double()[..., None]
    gap = grid.nearest((w if shift is None else w - shift) / step).mul_(step)
    gap = w - (gap if shift is None else gap + shift)
    if behind:
        gap[:, -1, -behind:] = 0.0
    if blocks is None:
        return gap.square_().sum(-1)
    if len(blocks) == 1:
        return squares(gap[:, 0], blocks[0])[:, None]
    return ((gap.transpose(0, 1) @ blocks).transpose(0, 1) * gap).sum(-1)
