"""W = up @ down: a low-rank matrix.

Shapes     down: [rank, columns]; up: [rows, rank].
Fit        the optimum, by a truncated singular value decomposition of W, or with a gram G = R R^T of W R
           (Eckart & Young 1936); the singular values are shared evenly between the factors.
Cost       rank * (rows + columns) parameters, two linears; less than dense below rows * columns / (rows +
           columns).
Source     Eckart & Young 1936, "The approximation of one matrix by another of lower rank"; the weighted
           form is Wang et al. 2024, "SVD-LLM", arXiv:2403.07378.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxaccel.passes._linear_form import expect
from fxaccel.passes._target import Target
from fxaccel.passes.structured._base import LARGE, TILE, Factors, StructuredMatrix, normal, shared
from fxaccel.pattern import Ops


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up [..., m, rank], down [..., rank, n]): the nearest product to [..., m, n], its factors balanced."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    half = s[..., :rank].sqrt()
    return u[..., :rank] * half[..., None, :], half[..., None] * v[..., :rank, :]


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product by factors that have its singular values evenly."""
    (q, r), (p, t) = torch.linalg.qr(up), torch.linalg.qr(down.mH)
    u, v = truncated(r @ t.mH, up.shape[-1])
    return q @ u, v @ p.mH


@dataclass(frozen=True)
class LowRank(StructuredMatrix):
    """A matrix of rank `rank`, as two linears."""

    rank: int

    name: ClassVar[str] = "low-rank"
    tables: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("down", "up")

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "rank", self.rank, 1, min(self.rows, self.columns))

    def __str__(self) -> str:
        return f"low-rank({self.rank})"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.rank, self.columns), (self.rows, self.rank)

    @classmethod
    def sized(cls, rows: int, columns: int, share: float) -> LowRank | None:
        """The largest rank that fits; of large matrices its largest multiple of 16, where that is not 0."""
        rank = int(shared(share) * rows * columns) // (rows + columns)
        if min(rows, columns) >= LARGE and rank >= TILE:
            rank -= rank % TILE
        return cls(rows, columns, rank) if rank else None

    def project(self, target: Target, seed: int) -> Factors:
        if target.root is None:
            up, down = truncated(target.weight, self.rank)
            return down, up
        up, down = truncated(target.weight @ target.root, self.rank)
        down = torch.linalg.solve_triangular(target.root, down, upper=False, left=False)
        up, down = balanced(up, down)
        return down, up

    def random(
        self, variance: float, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Factors:
        """As StructuredMatrix has it; between the factors activations have the variance of the input."""
        down = normal(self.shapes[0], 1 / self.columns, generator, dtype)
        return down, normal(self.shapes[1], variance * self.columns / self.rank, generator, dtype)

    def dense(self, op: Ops, *factors: Any) -> Any:
        down, up = factors
        return op.aten.matmul.default(up, down)

    def linear(self, op: Ops, x: Any, factors: Iterable[Any], bias: Any) -> Any:
        down, up = factors
        return op.aten.linear.default(op.aten.linear.default(x, down), up, bias)

    def lookup(self, op: Ops, indices: Any, factors: Iterable[Any]) -> Any:
        down, up = factors
        return op.aten.matmul.default(op.aten.embedding.default(up, indices), down)
