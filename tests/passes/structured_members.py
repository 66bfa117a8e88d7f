"""Structured matrices of all kinds and sizes, and problems to fit them to, for the tests of their package."""

import functools

import torch

from fxaccel.passes.structured import BlockLowRank, Butterfly, LowRank, Monarch

D = torch.float64
EPS = torch.finfo(D).eps
SIZES = [(16, 16), (7, 5), (48, 20), (100, 64), (64, 100), (1, 6), (6, 1)]


def members(rows, columns):
    """Of each kind, with and without padding, at least one of these sizes."""
    blocks = [(2, 4), (3, 3)] if min(rows, columns) >= 5 else [(1, 1)]
    grid = 4 if min(rows, columns) >= 4 else 1
    return [
        LowRank(rows, columns, max(1, min(rows, columns) // 3)),
        *(Monarch(rows, columns, k, n, t) for t, (k, n) in enumerate(blocks, 1)),
        Butterfly(rows, columns),
        Butterfly(rows, columns, reversed=True),
        BlockLowRank(rows, columns, grid, 0, 1),
        BlockLowRank(rows, columns, grid, grid.bit_length() - 1, 0),
    ]


MEMBERS = [m for size in SIZES for m in members(*size)]
SMALL = [
    LowRank(8, 12, 3), Monarch(9, 12, 3, 2, 2), Monarch(8, 8, 2, 4), Butterfly(8, 8), Butterfly(10, 7, True),
    BlockLowRank(12, 10, 4, 1, 2), BlockLowRank(8, 8, 4, 0, 1),
]  # fmt: skip


def named(m):
    return f"{m.rows}x{m.columns}-{m}"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(m, seed=0, dtype=D):
    """Factors of a member, its entries of about unit size."""
    return m.random(1.0, generator(seed), dtype)


def weight(m, seed=0, dtype=D):
    """A dense matrix of no structure."""
    return torch.randn(m.rows, m.columns, generator=generator(100 + seed), dtype=dtype)


def gram(m, seed=0, rank=None):
    """Of correlated inputs whose sizes span a factor of 10; of a lower rank where there are fewer inputs."""
    n = m.columns
    x = torch.randn(n, rank or 2 * n, generator=generator(200 + seed), dtype=D)
    mix = torch.randn(n, n, generator=generator(300 + seed), dtype=D) * torch.logspace(0, -1, n, dtype=D)
    x = mix @ x
    return x @ x.T


@functools.cache
def problem(m, weighted):
    """A weight without structure and a gram or None; the fit of them; none of which a test may change."""
    w, g = weight(m), gram(m) if weighted else None
    return w, g, m.fit(w, g)
