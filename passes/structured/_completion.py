"""The nearest low-rank matrix to one whose entries in some blocks are free: what a block-low-rank fit is.

The blocks B of a block row i are a least squares of the rest, so only U and V are sought: with P_i the
columns that the row holds and G the gram, they minimise

    sum_i tr(E_i S_i E_i^H),   E = W - U V,   S_i = G - G P_i (P_i^H G P_i)^-1 P_i^H G.

For V as it is, that is a small system a block row; for U as it is, one in all of V, which conjugate
gradients lower. Batches are leading dimensions: up [..., rows, rank], down [..., rank, columns].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxaccel.passes._target import root
from fxaccel.passes.structured._peeling import ridge

ITERATIONS = 8  # of conjugate gradients a sweep; without blocks the first one is exact


class Completion:
    """The problem for W [rows, columns], whose block row i holds the columns places[i]."""

    def __init__(self, weight: Tensor, gram: Tensor | None, places: Tensor, grid: int) -> None:
        self.weight, self.gram, self.places, self.grid = weight, gram, places, grid
        self.half = None
        if gram is not None:
            self.half = root(gram[places[:, :, None], places[:, None, :]])
        self.seen = self._by_gram(weight)

    def _by_gram(self, x: Tensor) -> Tensor:
        return x if self.gram is None else x @ self.gram

    def _held(self, x: Tensor) -> Tensor:
        """Of one [..., m, columns] for all block rows, what each holds: [..., g, m, held]."""
        return x[..., self.places].transpose(-3, -2)

    def _own(self, x: Tensor) -> Tensor:
        """Of [..., rows, columns], what each block row holds of its own rows: [..., g, s, held]."""
        x = x.unflatten(-2, (self.grid, -1))
        return x.gather(-1, self.places[:, None].expand(*x.shape[:-1], -1))

    def _solve(self, x: Tensor) -> Tensor:
        """x (P^H G P)^-1 for x [..., g, m, held]."""
        if self.half is None:
            return x
        return torch.cholesky_solve(x.mH, self.half.expand(*x.shape[:-2], *self.half.shape[-2:])).mH

    def blocks(self, rest: Tensor) -> Tensor:
        """The best B beside W - U V = rest [..., rows, columns]: [..., g, s, held]."""
        return self._solve(self._own(self._by_gram(rest)))

    def outside(self, matrix: Tensor) -> Tensor:
        """The matrix with zeros where there are blocks."""
        split = matrix.unflatten(-2, (self.grid, -1))
        return split.scatter(-1, self.places[:, None].expand(*split.shape[:-1], -1), 0.0).flatten(-3, -2)

    def square(self, state: list[Tensor]) -> Tensor:
        """The squared error with the best blocks, of [up, down]."""
        rest = self.weight - state[0] @ state[1]
        blocks = self.blocks(rest)
        split = rest.unflatten(-2, (self.grid, -1))
        places = self.places[:, None].expand(blocks.shape)
        e = split.scatter_add(-1, places, -blocks).flatten(-3, -2)
        return (self._by_gram(e) * e.conj()).real.sum((-2, -1))

    def sweep(self, state: list[Tensor]) -> list[Tensor]:
        """U by least squares, then V."""
        up, down = self.risen(*state)
        return [up, self.lowered(up, down)]

    def risen(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The best U beside V, both of equal norms: neither may run away from the other."""
        seen = self._by_gram(down)
        held = self._held(seen)
        solved = self._solve(held)
        system = (seen @ down.mH)[..., None, :, :] - solved @ held.mH
        right = (self.seen @ down.mH).unflatten(-2, (self.grid, -1)) - self._own(self.seen) @ solved.mH
        old = up.unflatten(-2, (self.grid, -1))
        gap = (right - old @ system).mH
        new = old + torch.linalg.solve(system + _ridge(system), gap).mH
        up = new.flatten(-3, -2)
        u, v = (x.abs().square().sum((-2, -1), keepdim=True) for x in (up, down))
        scale = torch.where((u > 0) & (v > 0), v / u.clamp_min(torch.finfo(u.dtype).tiny), 1.0) ** 0.25
        return up * scale, down / scale

    def lowered(self, up: Tensor, down: Tensor) -> Tensor:
        """A V that is better beside U, by conjugate gradients.

        The system is V -> sum_i U_i^H U_i V S_i = Z(V) G; its part without blocks, (U^H U) V G, is the
        preconditioner, so that a residual Z G needs no inverse of G.
        """
        split = up.unflatten(-2, (self.grid, -1))
        each = split.mH @ split  # [..., g, rank, rank]
        whole = each.sum(-3)
        whole = whole + _ridge(whole)

        def scattered(x: Tensor) -> Tensor:
            """The sum over block rows of [..., g, rank, held] at its places: [..., rank, columns]."""
            laid = x.transpose(-3, -2).flatten(-2)
            return torch.zeros_like(down).index_add(-1, self.places.flatten(), laid)

        def times(v: Tensor, seen: Tensor) -> Tensor:
            return each.sum(-3) @ v - scattered(self._solve(each @ self._held(seen)))

        def inner(x: Tensor, y: Tensor) -> Tensor:
            return (x * y.conj()).real.sum((-2, -1), keepdim=True)

        own = self._solve(self._own(self.seen))
        left = up.mH @ self.weight - scattered(split.mH @ own) - times(down, self._by_gram(down))
        residual = self._by_gram(left)
        step = torch.linalg.solve(whole, left)
        way, seen = step, torch.linalg.solve(whole, residual)
        size = inner(residual, step)
        floor = torch.finfo(size.dtype).eps ** 2 * size  # below it what is left is rounding
        for _ in range(ITERATIONS):
            moved = times(way, seen)
            bend = inner(moved, seen)
            goes = (bend > 0) & (size > floor)
            length = torch.where(goes, size / torch.where(goes, bend, 1.0), 0.0)
            down, left = down + length * way, left - length * moved
            residual, step = self._by_gram(left), torch.linalg.solve(whole, left)
            now = inner(residual, step)
            ratio = torch.where(goes, now / torch.where(goes, size, 1.0), 0.0)
            way, seen = step + ratio * way, torch.linalg.solve(whole, residual) + ratio * seen
            size = now
        return down


def _ridge(system: Tensor) -> Tensor:
    pull = ridge(torch.diagonal(system, dim1=-2, dim2=-1).real)
    return pull[..., None] * torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
