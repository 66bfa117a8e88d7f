"""A Monarch matrix: two block-diagonal factors with a permutation between; every slice has a low rank.

    W[(s l), (k p)] = sum_t left[l, s, (k t)] right[k, (t l), p]

Shapes     right: [k, q, p], left: [l, s, r], with k blocks of p = ceil(columns / k) inputs, l interleaved
           blocks of s = ceil(rows / l) outputs, q = t * l, r = k * t; t is the rank of a slice. Zeros pad
           the inputs, the first `rows` outputs are kept.
Fit        without a gram the optimum: slices are disjoint, and each is truncated by itself. With one, slices
           of a row are coupled: block by block each slice is set to its optimum beside the others (a
           truncated decomposition, exact), of a small matrix from many starts and then by L-BFGS to the end,
           of a larger one from the best start, 4 to 20 sweeps (`_descent`). A local optimum, never worse
           than the plain fit.
Cost       k q p + l s r parameters, 2 flop of each a row. Square with b blocks and t = n / b**2, so that
           q = p: 2 / b of dense.
Source     Dao et al. 2022, "Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
           arXiv:2204.00595.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxaccel.kernels import kernel
from fxaccel.passes._linear_form import expect
from fxaccel.passes._target import Target, padded, root
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
from fxaccel.passes.structured._descent import alternate, starts
from fxaccel.passes.structured.low_rank import balanced, truncated
from fxaccel.pattern import Ops

NEARLY = 0.95  # of the parameters that would fit: what a better shape of the blocks may cost


@dataclass(frozen=True)
class Monarch(StructuredMatrix):
    """A matrix of blocks_out x blocks_in interleaved slices of rank `rank`."""

    blocks_in: int
    blocks_out: int
    rank: int = 1

    name: ClassVar[str] = "monarch"
    parts: ClassVar[tuple[str, ...]] = ("right", "left")

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "blocks_in", self.blocks_in, 1, self.columns)
        expect(self, "blocks_out", self.blocks_out, 1, self.rows)
        expect(self, "rank", self.rank, 1, min(self._s, self._p))

    def __str__(self) -> str:
        k, l = self.blocks_in, self.blocks_out  # noqa: E741
        blocks = f"{k} blocks" if k == l else f"{k} x {l} blocks"
        published = k == l and self.rank * l == self._p  # as MonarchLinear(nblocks=k) is known
        return f"monarch({blocks})" if published else f"monarch({blocks}, rank {self.rank})"

    @property
    def _p(self) -> int:
        return blocks_of(self.columns, self.blocks_in)

    @property
    def _s(self) -> int:
        return blocks_of(self.rows, self.blocks_out)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        right = (self.blocks_in, self.rank * self.blocks_out, self._p)
        return right, (self.blocks_out, self._s, self.blocks_in * self.rank)

    @classmethod
    def sized(cls, rows: int, columns: int, share: float) -> Monarch | None:
        """With k = l blocks; among about equally many parameters, both factors' blocks nearest to square."""
        budget = shared(share) * rows * columns
        fits = []
        for b in _counts(rows, columns):
            s, p = blocks_of(rows, b), blocks_of(columns, b)
            rank = min(int(budget // (b * b * (p + s))), s, p)
            step = TILE // math.gcd(TILE, b) if min(rows, columns) >= LARGE else 1
            rank = rank - rank % step if rank >= step else rank
            if rank:
                fits.append(cls(rows, columns, b, b, rank))
        return fullest(fits, NEARLY, lambda m: abs(math.log(m.rank * m.blocks_out / (m._p * m._s) ** 0.5)))

    def project(self, target: Target, seed: int) -> Factors:
        k, l, s, p = self.blocks_in, self.blocks_out, self._s, self._p  # noqa: E741
        w = padded(target.weight, s * l, k * p).reshape(s, l, k, p).permute(1, 2, 0, 3)
        if target.gram is None:
            return self._packed(*truncated(w, self.rank))
        gram = target.gram_padded(k * p)
        assert gram is not None, "the target has a gram"
        return self._packed(*self._coupled(w, gram.reshape(k, p, k, p), seed))

    def _packed(self, left: Tensor, right: Tensor) -> Factors:
        """Factors from the slices' own: left [l, k, s, t], right [l, k, t, p]."""
        right_shape, left_shape = self.shapes
        return right.permute(1, 2, 0, 3).reshape(right_shape), left.permute(0, 2, 1, 3).reshape(left_shape)

    def _coupled(self, w: Tensor, gram: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The slices' factors that lower sum |(w - slices) x|^2; w [l, k, s, p], gram [k, p, k, p]."""
        blocks = range(self.blocks_in)
        halves = root(torch.stack([gram[k, :, k] for k in blocks]))
        inverse = torch.linalg.solve_triangular(halves, torch.eye(self._p).to(halves), upper=False)

        def near(seen: Tensor, k: int) -> tuple[Tensor, Tensor]:
            """The best factors for slices k whose products with halves[k] these are."""
            up, down = truncated(seen, self.rank)
            return up, down @ inverse[k]

        def sweep(state: list[Tensor]) -> list[Tensor]:
            """Each slice in turn set to its optimum beside the others of its row."""
            up, down = (f.clone() for f in state)
            rest = w - up @ down
            for k in blocks:
                rest[..., k, :, :] = w[:, k]
                flat = rest.transpose(-3, -2).flatten(-2)  # [..., l, s, (j p)]: one product, not k
                seen = flat @ gram[:, :, k].flatten(0, 1)
                up[..., k, :, :], down[..., k, :, :] = near(seen @ inverse[k].mH, k)
                rest[..., k, :, :] -= up[..., k, :, :] @ down[..., k, :, :]
            return [up, down]

        def square(state: list[Tensor]) -> Tensor:
            e = w - state[0] @ state[1]
            return (torch.einsum("...lksp,kpjq->...ljsq", e, gram) * e.conj()).real.sum((-3, -2, -1))

        scaled = [near(w[:, k] @ halves[k], k) for k in blocks]
        up, down = (torch.stack(part, 1) for part in zip(*scaled, strict=True))
        begun = [truncated(w, self.rank), (up, down)]
        begun.append((torch.zeros_like(begun[0][0]), torch.zeros_like(begun[0][1])))
        generator = torch.Generator().manual_seed(seed)
        size = (w.abs().square().mean() / self.rank).sqrt().sqrt()
        for _ in range(starts(w.numel())):
            drawn = [torch.randn(f.shape, generator=generator, dtype=f.dtype).to(f) * size for f in begun[0]]
            begun.append((drawn[0], drawn[1]))
        state = [torch.stack(part) for part in zip(*begun, strict=True)]
        none = square([torch.zeros_like(f[:1]) for f in state])
        up, down = alternate(sweep, square, state, w.numel(), none)  # rows of other l are independent
        return balanced(up, down)

    def random(
        self, variance: float, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Factors:
        """As StructuredMatrix has it; between the factors activations have the variance of the input."""
        right = normal(self.shapes[0], 1 / self._p, generator, dtype)
        return right, normal(self.shapes[1], variance * self._p / self.rank, generator, dtype)

    def dense(self, op: Ops, *factors: Any) -> Any:
        right, left = factors
        k, l, s, p, t = self.blocks_in, self.blocks_out, self._s, self._p, self.rank  # noqa: E741
        right = op.aten.permute.default(op.aten.reshape.default(right, [k, t, l, p]), [2, 0, 1, 3])
        left = op.aten.permute.default(op.aten.reshape.default(left, [l, s, k, t]), [0, 2, 1, 3])
        w = op.aten.permute.default(op.aten.matmul.default(left, right), [2, 0, 1, 3])
        w = op.aten.reshape.default(w, [s * l, k * p])
        return cut(op, w, (self.rows, s * l), (self.columns, k * p))

    def linear(self, op: Ops, x: Any, factors: Iterable[Any], bias: Any) -> Any:
        right, left = factors
        return op(kernel("monarch").op, x, right, left, bias, self.rows)


def _counts(rows: int, columns: int) -> list[int]:
    """Numbers of blocks to choose from, to about sqrt(n): divisors of both sizes, powers of two, the root.

    Of large matrices those alone, where there are any, whose blocks are multiples of 16.
    """
    small, n = min(rows, columns), max(rows, columns)
    last = min(small, math.isqrt(n - 1) + 1)
    counts = [b for b in range(2, last + 1) if rows % b == columns % b == 0 or b & (b - 1) == 0 or b == last]
    even = [b for b in counts if rows % (b * TILE) == columns % (b * TILE) == 0]
    return even if even and small >= LARGE else counts
