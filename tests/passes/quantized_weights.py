"""Grids and weights of all kinds, for the tests of quantized weights."""

import pytest
import torch

from fxaccel.passes.quantized import Grid

D = torch.float64
EPS = torch.finfo(D).eps
GRIDS = [
    Grid("int8"), Grid("int8", 8), Grid("int4"), Grid("int4", 8), Grid("int4", 8, True),
    Grid("int4", 0, True), Grid("nf4", 8), Grid("nf4"), Grid("float8"), Grid("float8", 8), Grid("float8", -1),
]  # fmt: skip
grids = pytest.mark.parametrize("grid", GRIDS, ids=str)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights():
    """Weights of all kinds, named."""
    w = drawn(5, 20)
    outlier, silent = w.clone(), w.clone()
    outlier[:, 3] *= 1000
    silent[1], silent[2, 8:16] = 0, 0
    return {
        "normal": w, "bfloat16": w.bfloat16(), "float64": drawn(3, 24, dtype=D), "one row": w[:1],
        "one column": w[:, :1], "one number": w[:1, :1], "outlier": outlier, "zeros": silent,
        "nothing": torch.zeros(3, 9), "positive": w.abs() + 1, "negative": -w.abs() - 1, "tiny": w * 1e-39,
        "strided": drawn(20, 5).mT,
    }  # fmt: skip


WEIGHTS = weights()
every = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=list(WEIGHTS))


def correlated(columns, rows=None, seed=0):
    """The gram of inputs that hang together and are of unlike sizes."""
    x = drawn(rows or 4 * columns, columns, seed=seed, dtype=D)
    x = (x + 0.8 * x.roll(1, 1) + 0.5 * x[:, :1]) * torch.linspace(0.3, 3, columns, dtype=D)
    return x.mT @ x


def same(one, other):
    """Whether parts are equal bit for bit."""
    pairs = [(p, q) for p, q in zip(one, other, strict=True) if p is not None or q is not None]
    return all(p.dtype == q.dtype and torch.equal(p.view(torch.uint8), q.view(torch.uint8)) for p, q in pairs)


def squares(gap, gram):
    """The squared error of each row."""
    return ((gap @ gram) * gap).sum(1)
