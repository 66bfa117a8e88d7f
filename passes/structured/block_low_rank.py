"""W = B + up @ down: blocks of a butterfly's places, and a low rank: a pixelated butterfly.

Shapes     blocks: [g, f + 1, s, p], down: [rank, columns], up: [rows, rank]; a grid of g x g blocks, g a
           power of two, of s = ceil(rows / g) by p = ceil(columns / g). Block row i of B holds block
           columns i, blocks[i, 0], and i ^ 2**j for j < f, blocks[i, j + 1]; with f = 0 B is
           block-diagonal. Rank 0 leaves down and up away.
Fit        alternating: `up` and all blocks together are a least squares of `down`, exact; `down` and all
           blocks together one of `up`, by conjugate gradients. A small matrix from many starts and then by
           L-BFGS to the end, a larger one from the best start, 4 to 20 sweeps (`_descent`). A local optimum.
Cost       (f + 1) / g of dense and rank * (rows + columns) parameters, 2 flop of each a row.
Source     Chen et al. 2022, "Pixelated Butterfly: Simple and Efficient Sparse Training for Neural Network
           Models", arXiv:2112.00029.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxaccel.errors import OptionError
from fxaccel.passes._linear_form import expect, sizes
from fxaccel.passes._target import Target, padded
from fxaccel.passes.structured._base import (
    LARGE,
    TILE,
    Factors,
    StructuredMatrix,
    blocks_of,
    cut,
    fullest,
    normal,
    shared,
)
from fxaccel.passes.structured._completion import Completion
from fxaccel.passes.structured._descent import alternate, starts
from fxaccel.passes.structured.low_rank import balanced, truncated
from fxaccel.pattern import Ops

NEARLY = 0.9  # of the parameters that would fit: what a better division between blocks and rank may cost
BLOCK_SHARE = 2 / 3  # of the parameters that are to be blocks: what the paper found to serve


@dataclass(frozen=True)
class BlockLowRank(StructuredMatrix):
    """grid x grid blocks, of which each row has strides + 1, and a matrix of rank `rank`."""

    grid: int
    strides: int
    rank: int

    name: ClassVar[str] = "block-diagonal-low-rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "grid", self.grid)
        if self.grid & (self.grid - 1):
            raise OptionError(
                f"grid of a BlockLowRank is {self.grid}, expected a power of two",
                f"take {2 ** (self.grid.bit_length() - 1)} or {2 ** self.grid.bit_length()}",
            )
        expect(self, "strides", self.strides, 0, self.grid.bit_length() - 1)
        expect(self, "rank", self.rank, 0, min(self.rows, self.columns))

    def __str__(self) -> str:
        return f"{self.name}({self.strides + 1} of {self.grid} blocks, rank {self.rank})"

    @property
    def _s(self) -> int:
        return blocks_of(self.rows, self.grid)

    @property
    def _p(self) -> int:
        return blocks_of(self.columns, self.grid)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("blocks", "down", "up") if self.rank else ("blocks",)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        low = ((self.rank, self.columns), (self.rows, self.rank)) if self.rank else ()
        return (self.grid, self.strides + 1, self._s, self._p), *low

    @classmethod
    def sized(cls, rows: int, columns: int, share: float) -> BlockLowRank | None:
        """With about two thirds of the parameters in the blocks, among the largest."""
        budget, small = int(shared(share) * rows * columns), min(rows, columns)
        step = TILE if small >= LARGE else 1
        fits = []
        for exponent in range(1, small.bit_length()):
            for strides in range(exponent + 1):
                blocks = cls(rows, columns, 2**exponent, strides, 0)
                rank = min((budget - blocks.parameters) // (rows + columns), small)
                if rank >= 0:
                    fits.append(cls(rows, columns, 2**exponent, strides, rank - rank % step))
        wishes = (_apt(fits, multiple, least) for multiple, least in ((step, step), (1, step), (1, 1)))
        fits = next(filter(None, wishes), fits)
        return fullest(fits, NEARLY, lambda m: abs(math.prod(m.shapes[0]) / budget - BLOCK_SHARE))

    def project(self, target: Target, seed: int) -> Factors:
        rows, columns = self.grid * self._s, self.grid * self._p
        w = padded(target.weight, rows, columns)
        problem = Completion(w, target.gram_padded(columns), self._places(w.device), self.grid)
        if not self.rank:
            return (self._packed(problem.blocks(w)),)
        state = self._begun(target, w, problem, seed)
        none = problem.square([torch.zeros_like(f[:1]) for f in state])
        up, down = alternate(problem.sweep, problem.square, state, w.numel(), none)
        up, down = balanced(*problem.risen(up[0], down[0]))
        blocks = self._packed(problem.blocks(w - up @ down))
        return blocks, down[:, : self.columns], up[: self.rows]

    def _places(self, device: torch.device) -> Tensor:
        """The columns that each block row holds, [g, (f + 1) p]."""
        row = torch.arange(self.grid, device=device)
        held = torch.stack([row, *(row ^ 2**j for j in range(self.strides))], 1)
        return (held[..., None] * self._p + torch.arange(self._p, device=device)).flatten(1)

    def _packed(self, blocks: Tensor) -> Tensor:
        """[g, s, (f + 1) p] as [g, f + 1, s, p]."""
        return blocks.unflatten(-1, (self.strides + 1, self._p)).transpose(1, 2)

    def _begun(self, target: Target, w: Tensor, problem: Completion, seed: int) -> list[Tensor]:
        """up, down to sweep from, [starts, 1, ...]: of W, of W outside of the blocks, and random ones."""
        found = []
        for whole in (w, problem.outside(w)):
            inside = whole[: self.rows, : self.columns]
            up, down = truncated(inside if target.root is None else inside @ target.root, self.rank)
            if target.root is not None:
                down = torch.linalg.solve_triangular(target.root, down, upper=False, left=False)
            found.append((padded(up, len(w), self.rank), padded(down, self.rank, w.shape[1])))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(starts(w.numel())):
            drawn = [torch.randn(f.shape, generator=generator, dtype=f.dtype).to(f) for f in found[0]]
            found.append((drawn[0], drawn[1]))
        return [torch.stack(part)[:, None] for part in zip(*found, strict=True)]

    def random(
        self, variance: float, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Factors:
        """Entries have mean 0, no two are correlated, and each row's variances sum to columns * variance.

        Not the same for every entry: low-rank entries have variance / 2 everywhere, and the places of B the
        other half of their row in equal parts; all of it with rank 0. (A block row all of whose places are
        padding has only the low rank.) So `linear` has the variance that a dense weight gives.
        """
        held = (self._places(torch.device("cpu")) < self.columns).sum(1).clamp_min(1)
        each = variance * self.columns / held.to(torch.float64) / (2 if self.rank else 1)
        blocks = normal(self.shapes[0], each[:, None, None, None], generator, dtype)
        if not self.rank:
            return (blocks,)
        down = normal(self.shapes[1], 1 / self.columns, generator, dtype)
        return blocks, down, normal(self.shapes[2], variance * self.columns / self.rank / 2, generator, dtype)

    def dense(self, op: Ops, *factors: Any) -> Any:
        aten, g, s, p = op.aten, self.grid, self._s, self._p
        w = None
        for place in range(self.strides + 1):
            block = aten.permute.default(aten.select.int(factors[0], 1, place), [1, 2, 0])  # [s, p, g]
            term = aten.diag_embed.default(block)  # [s, p, g, g], of the last two the block row and column
            if place:
                term = aten.flip.default(aten.reshape.default(term, [s, p, g, *self._pairs(place)]), [4])
                term = aten.reshape.default(term, [s, p, g, g])
            w = term if w is None else aten.add.Tensor(w, term)
        w = aten.reshape.default(aten.permute.default(w, [2, 0, 3, 1]), [g * s, g * p])
        w = cut(op, w, (self.rows, g * s), (self.columns, g * p))
        return aten.add.Tensor(w, aten.matmul.default(factors[2], factors[1])) if self.rank else w

    def _pairs(self, place: int) -> tuple[int, int, int]:
        """g as [above, bit, below]: i ^ 2**(place - 1) turns the bit over."""
        below = 2 ** (place - 1)
        return self.grid // (2 * below), 2, below

    def linear(self, op: Ops, x: Any, factors: Iterable[Any], bias: Any) -> Any:
        """One batched product for all blocks: the g block rows each read f + 1 of the g parts of x."""
        aten, g, s, p = op.aten, self.grid, self._s, self._p
        blocks, *low = factors
        *lead, _ = sizes(op, x)
        z = x if g * p == self.columns else aten.constant_pad_nd.default(x, [0, g * p - self.columns])
        read = [aten.reshape.default(z, [-1, g, p])]
        for place in range(1, self.strides + 1):
            bits = aten.reshape.default(z, [-1, *self._pairs(place), p])
            read.append(aten.reshape.default(aten.flip.default(bits, [2]), [-1, g, p]))
        parts = read[0] if len(read) == 1 else aten.cat.default(read, -1)
        w = aten.reshape.default(aten.permute.default(blocks, [0, 1, 3, 2]), [g, (self.strides + 1) * p, s])
        y = aten.matmul.default(aten.permute.default(parts, [1, 0, 2]), w)  # [g, -1, s]
        y = aten.reshape.default(aten.permute.default(y, [1, 0, 2]), [-1, g * s])
        y = y if g * s == self.rows else aten.slice.Tensor(y, 1, 0, self.rows)
        y = aten.reshape.default(y, [*lead, self.rows])
        if low:
            down, up = low
            bias = aten.linear.default(aten.linear.default(x, down), up, bias)
        return y if bias is None else aten.add.Tensor(y, bias)


def _apt(fits: list[BlockLowRank], multiple: int, least: int) -> list[BlockLowRank]:
    """Those whose blocks have sides that are such multiples and no smaller, and none only of padding."""
    return [
        m
        for m in fits
        if m._s % multiple == m._p % multiple == 0
        and min(m._s, m._p) >= least
        and (m.grid - 1) * m._s < m.rows
        and (m.grid - 1) * m._p < m.columns
    ]
