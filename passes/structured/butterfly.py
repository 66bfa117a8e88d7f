"""A butterfly matrix: log2(n) factors that each join features in pairs, as a fast Fourier transform does.

Shapes     twiddle: [stacks, L, n / 2, 2, 2]; n = 2**L is the next power of two of `columns`, and stacks =
           ceil(rows / n) products are laid above each other. Factor i has stride s = 2**i and is seen as
           [D, s, 2, 2], D = n / (2 s): y[d, a, t] = sum_b T[d, t, a, b] x[d, b, t], feature (d, a, t) being
           2 s d + s a + t; factors apply i = 0 .. L-1. With `reversed` the features are first put into
           bit-reversed order.
Fit        peeling by rank-one pieces in three orders, exact where W is such a product, then alternating
           least squares of one factor: of a small matrix also from random factors and then by L-BFGS to the
           end, of a larger one from the best start, 4 to 20 sweeps (`_descent`). A local optimum. The
           matrix is padded with zeros: products are closed under setting rows or columns to zero, so that
           loses nothing.
Cost       2 n L parameters a stack, 4 n L flop a row.
Source     Dao et al. 2019, "Learning Fast Algorithms for Linear Transforms Using Butterfly Factorizations",
           arXiv:1903.05895; the fit: Le, Zheng, Gribonval & Riccietti 2022, arXiv:2110.01230.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxaccel.errors import OptionError
from fxaccel.kernels import kernel
from fxaccel.passes._target import Target, padded
from fxaccel.passes.structured import _peeling
from fxaccel.passes.structured._base import Factors, StructuredMatrix, blocks_of, cut, shared
from fxaccel.passes.structured._descent import alternate, starts
from fxaccel.pattern import Ops


@dataclass(frozen=True)
class Butterfly(StructuredMatrix):
    """A radix-2 butterfly product, or several above each other."""

    reversed: bool = False

    name: ClassVar[str] = "butterfly"
    parts: ClassVar[tuple[str, ...]] = ("twiddle",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.reversed, bool):
            raise OptionError(f"reversed of a Butterfly is {self.reversed!r}, expected True or False")

    def __str__(self) -> str:
        return f"butterfly({self._n}{', reversed' if self.reversed else ''})"

    @property
    def _levels(self) -> int:
        return max(1, (self.columns - 1).bit_length())

    @property
    def _n(self) -> int:
        return 2**self._levels

    @property
    def _stacks(self) -> int:
        return blocks_of(self.rows, self._n)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self._stacks, self._levels, self._n // 2, 2, 2),)

    @classmethod
    def sized(cls, rows: int, columns: int, share: float) -> Butterfly | None:
        """The one there is, where it fits."""
        made = cls(rows, columns)
        return made if made.parameters <= shared(share) * rows * columns else None

    def nearer(self, weight: Tensor, gram: Tensor | None = None, *, seed: int = 0) -> Butterfly:
        """This one, or the one of the other order of features where its fit has the smaller error."""
        both = (self, replace(self, reversed=not self.reversed))
        return min(both, key=lambda m: m.error(weight, m.fit(weight, gram, seed=seed), gram))

    def project(self, target: Target, seed: int) -> Factors:
        n, stacks = self._n, self._stacks
        w = padded(target.weight, stacks * n, n)
        gram = target.gram_padded(n)
        if self.reversed:
            order = kernel("butterfly").bit_reversed(n, w.device)
            w, gram = w[:, order], None if gram is None else gram[order][:, order]
        w = w.reshape(stacks, n, n)
        state = self._begun(w, gram, seed)

        def square(factors: list[Tensor]) -> Tensor:
            e = w - _peeling.multiplied(factors)
            return ((e if gram is None else e @ gram) * e.conj()).real.sum((-2, -1))

        scale = square([torch.zeros_like(f[:1]) for f in state])[0]
        state = alternate(lambda f: _peeling.sweep(f, w, gram), square, state, w.numel(), scale)
        twiddle = torch.stack([f.reshape(stacks, n // 2, 2, 2) for f in state], 1)
        return (twiddle,)

    def _begun(self, w: Tensor, gram: Tensor | None, seed: int) -> list[Tensor]:
        """Factors to sweep from, [starts, stacks, D, s, 2, 2]; w [stacks, n, n]."""
        orders = ("first", "middle", "last") if self._levels > 2 else ("first",)
        found = [_peeling.peel(w, order) for order in orders]
        if gram is not None:  # inputs by their sizes: exact where none are correlated
            size = gram.diagonal().real.sqrt()
            for order in orders:
                first, *rest = _peeling.peel(w * size, order)
                found.append([first / size.reshape(-1, 1, 1, 2), *rest])
        generator = torch.Generator().manual_seed(seed)
        for _ in range(starts(w.numel())):
            drawn = [torch.randn(f.shape, generator=generator, dtype=f.dtype).to(f) for f in found[0]]
            found.append(drawn)
        return [torch.stack(level) for level in zip(*found, strict=True)]

    def random(
        self, variance: float, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Factors:
        """As StructuredMatrix has it; each 2 x 2 is a rotation or a reflection, all of one size.

        So every factor is orthogonal but for that size, and activations keep it from one to the next.
        """
        (shape,) = self.shapes
        drawn = torch.float64 if dtype == torch.float64 else torch.float32
        angle = torch.rand(shape[:-2], generator=generator, dtype=drawn) * (2 * math.pi)
        turn = (torch.rand(shape[:-2], generator=generator, dtype=drawn) < 0.5).to(drawn) * 2 - 1
        cos, sin = angle.cos(), angle.sin()
        twiddle = torch.stack([cos, -turn * sin, sin, turn * cos], -1).reshape(shape)
        # an entry of the product is a product of L entries of mean square size**2 / 2, one of each factor
        return ((twiddle * (math.sqrt(2) * variance ** (0.5 / self._levels))).to(dtype),)

    def dense(self, op: Ops, *factors: Any) -> Any:
        """Every entry is one product of L entries: blocks of s x s become blocks of 2 s x 2 s."""
        (twiddle,) = factors
        aten, n, stacks = op.aten, self._n, self._stacks
        w = aten.select.int(twiddle, 1, 0)  # [stacks, n / 2, 2, 2]
        for i in range(1, self._levels):
            s, d = 2**i, n // 2 ** (i + 1)
            factor = aten.reshape.default(aten.select.int(twiddle, 1, i), [stacks, d, s, 2, 2, 1])
            factor = aten.permute.default(factor, [0, 1, 3, 2, 4, 5])  # [stacks, d, a, t, b, 1]
            below = aten.permute.default(aten.reshape.default(w, [stacks, d, 2, s, s]), [0, 1, 3, 2, 4])
            below = aten.reshape.default(below, [stacks, d, 1, s, 2, s])
            w = aten.reshape.default(aten.mul.Tensor(factor, below), [stacks, d, 2 * s, 2 * s])
        if self.reversed:
            bits = aten.reshape.default(w, [stacks * n, *[2] * self._levels])
            w = aten.permute.default(bits, [0, *range(self._levels, 0, -1)])
        w = aten.reshape.default(w, [stacks * n, n])
        return cut(op, w, (self.rows, stacks * n), (self.columns, n))

    def linear(self, op: Ops, x: Any, factors: Iterable[Any], bias: Any) -> Any:
        (twiddle,) = factors
        return op(kernel("butterfly").op, x, twiddle, bias, self.rows, self.reversed)
