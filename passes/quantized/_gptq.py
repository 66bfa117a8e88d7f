"""GPTQ: columns are rounded one after another, and what rounding one did to outputs the next make up for.

Numerics   float64. The gram H of the inputs is M M^T with M upper triangular, so that (E M)_k, of errors E =
           W^ - W, holds nothing of columns after k: the column that makes it least is the one nearest to
           w_k - sum_{j < k} E_j M_jk / M_kk. That is the published update, which has the triangular root of
           the inverse; here nothing is inverted.
Cost       of N rows and K columns: K^3 / 3 + 3 N K^2 multiplications and additions.
Source     Frantar et al. 2022, "GPTQ: Accurate post-training quantization for generative pre-trained
           transformers", arXiv:2210.17323; the update without an inverse: Chen et al. 2025, "The geometry of
           LLM quantization: GPTQ as Babai's nearest plane algorithm", arXiv:2507.18553.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from fxaccel.errors import OptionError
from fxaccel.passes._target import DAMPING, root
from fxaccel.passes.quantized._error import squares, symmetric
from fxaccel.passes.quantized._grid import Grid, Parts, Scales, checked

BLOCK = 128  # columns after which the others are told of the errors
ROWS = 1024  # rows that are worked on together: a block of their columns stays in cache
ORDERS = ("columns", "descending")

Scaler: TypeAlias = Callable[[Grid, Tensor], Scales]
"""How scales of a weight are chosen: Grid.scales, or one of `_clip` or `_hqq`."""


@torch.no_grad()
def gptq(
    grid: Grid,
    weight: Tensor,
    gram: Tensor,
    *,
    damp: float = 0.01,
    order: str = "columns",
    scaler: Scaler = Grid.scales,
) -> Parts:
    """The parts of a weight [N, K] for inputs of this gram [K, K] = sum x x^T, or a multiple of it.

    damp       added to the gram's diagonal, in units of its mean
    order      "columns": as they stand; scales of a group are those of its weights when it is reached, with
               what they make up for. "descending": the largest inputs first, while most columns are left to
               make up for them; scales are those of the given weight, groups those of its columns
    Exact      of each row what has the smaller error in the gram's norm, this or rounding to nearest: so it
               is never worse. An input that is always zero has its weights rounded to nearest.
    """
    weight, nearest = checked(weight), scaler(grid, weight)
    if not (isinstance(damp, (int, float)) and 0 <= damp < math.inf):
        raise OptionError(f"damp is {damp!r}, expected a number from 0")
    if order not in ORDERS:
        raise OptionError(f"the order is {order!r}, expected one of {', '.join(ORDERS)}")
    gram = symmetric(weight, gram)
    mean = float(gram.diagonal().mean())
    plain = grid.codes(weight, *nearest)
    if mean <= 0:
        return grid.pack(plain, *nearest)  # no input but zero was seen
    gram.div_(mean)
    places = torch.arange(len(gram), device=gram.device)
    if order == "descending":
        places = gram.diagonal().argsort(descending=True, stable=True)
    half = _upper(gram if order == "columns" else gram[places][:, places], damp)
    static = nearest if order == "descending" or grid.group <= 0 else None
    made = [
        _Rows(grid, half, places, scaler, rows, None if static is None else _cut(grid, static, at)).rounded()
        for at, rows in zip(range(0, len(weight), ROWS), weight.double().split(ROWS), strict=True)
    ]
    codes, scales, zeros = zip(*made, strict=True)
    scale = nearest[0] if grid.group < 0 else torch.cat(scales)
    found = torch.cat(codes), (scale, torch.cat(zeros) if grid.zeros else None)
    return _lower(grid, weight.double(), gram, found, (plain, nearest))


def _upper(gram: Tensor, damp: float) -> Tensor:
    """M, upper triangular, with M M^T the damped gram; its mean diagonal is 1."""
    gram = gram.clone()
    gram.diagonal().add_(max(damp, DAMPING))  # the root of a singular gram would take its eigenvalues
    return root(gram.flip(0, 1)).flip(0, 1)


def _cut(grid: Grid, scales: Scales, at: int) -> Scales:
    """The scales of ROWS rows from one on."""
    scale, zero = scales
    if grid.group < 0:
        return scales
    return scale[at : at + ROWS], None if zero is None else zero[at : at + ROWS]


def _lower(
    grid: Grid, weight: Tensor, gram: Tensor, one: tuple[Tensor, Scales], other: tuple[Tensor, Scales]
) -> Parts:
    """The parts of codes and scales of that of two that has the smaller error in each row."""
    first, second = (squares(weight - grid.values(codes, *s), gram) for codes, s in (one, other))
    better = (first < second)[:, None]
    scale, zero = (
        None if a is None or b is None else a if grid.group < 0 else torch.where(better, a, b)
        for a, b in zip(one[1], other[1], strict=True)
    )
    assert scale is not None, "a zero alone is no scale"
    # float8 has no `where` of its own
    codes = torch.where(better, one[0].view(torch.uint8), other[0].view(torch.uint8)).view(one[0].dtype)
    return grid.pack(codes, scale, zero)


class _Rows:
    """Some rows of a weight while they are rounded; their columns are the rows of what is held here.

    half       M of the columns in the order that they are rounded in
    places     where these columns stand in the weight
    static     scales that are chosen already; None: those of a group when it is reached
    """

    def __init__(
        self, grid: Grid, half: Tensor, places: Tensor, scaler: Scaler, rows: Tensor, static: Scales | None
    ) -> None:
        self.grid, self.half, self.places, self.scaler = grid, half, places, scaler
        self.weight = rows.mT[places].contiguous()  # [K, N]
        self.levels = torch.empty_like(self.weight)
        self.owed = torch.zeros_like(self.weight)  # sum_j E_j M_jk of the columns j that are rounded
        self.width = grid.width(len(half))
        self.static = static
        self.scales: list[Scales] = []

    def rounded(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes [N, K], scales and zeros."""
        for start, stop in self._blocks():
            errors = self._block(start, stop)
            if stop < len(self.half):
                self.owed[stop:].addmm_(self.half[start:stop, stop:].mT, errors)
        levels = torch.empty_like(self.levels)
        levels[self.places] = self.levels
        codes = self.grid.codes_of(levels.mT.contiguous())
        if self.static is not None:
            return codes, *self.static
        scales, zeros = zip(*self.scales, strict=True)
        zero = torch.cat(zeros, 1) if self.grid.zeros else None
        return codes, torch.cat(scales, 1), zero

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """From and to: whole groups, or parts of one; so what a group owes is known when it is reached."""
        columns = len(self.half)
        if self.static is not None or self.width <= BLOCK:
            size = BLOCK if self.static is not None else BLOCK // self.width * self.width
            yield from ((at, min(at + size, columns)) for at in range(0, columns, size))
            return
        for group in range(0, columns, self.width):
            end = min(group + self.width, columns)
            yield from ((at, min(at + BLOCK, end)) for at in range(group, end, BLOCK))

    def _block(self, start: int, stop: int) -> Tensor:
        """Rounds the columns of a block; their errors."""
        errors = torch.empty_like(self.weight[start:stop])
        diagonal = self.half.diagonal()[start:stop].tolist()
        for k in range(start, stop):
            scale, zero = self._scale(k)
            wanted = self.weight[k] - self.owed[k] / diagonal[k - start]
            level = self.grid.nearest((wanted if zero is None else wanted - zero) / scale)
            self.levels[k] = level
            value = level * scale
            error = (value if zero is None else value + zero) - self.weight[k]
            errors[k - start] = error
            self.owed[k + 1 : stop].addr_(self.half[k, k + 1 : stop], error)
        return errors

    def _scale(self, k: int) -> tuple[Tensor, Tensor | None]:
        """The scale and zero of a column, [N] or [1], float64."""
        group = int(self.places[k]) // self.width
        if self.static is None:
            if k % self.width == 0:
                self.scales.append(self._reached(k, min(k + self.width, len(self.half))))
            scale, zero = (None if s is None else s[:, 0] for s in self.scales[-1])
        else:
            scale, zero = (None if s is None else s[:, group] for s in self.static)
        assert scale is not None, "a zero alone is no scale"
        return scale.double(), None if zero is None else zero.double()

    def _reached(self, start: int, stop: int) -> Scales:
        """Scales of a group of columns as they are to be rounded: less what makes up for those before."""
        square = self.half[start:stop, start:stop]
        made_up = torch.linalg.solve_triangular(square.mT, self.owed[start:stop], upper=False)
        return self.scaler(self.grid, (self.weight[start:stop] - made_up).mT)
