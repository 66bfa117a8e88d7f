"""Butterfly factors of a dense matrix: peeling by rank-one pieces, and alternating exact steps.

A list of factors of an n x n product holds for i = 0 .. L-1, of stride s = 2**i and D = n / (2 s),
T_i [..., D, s, 2, 2]: y[d, a, t] = sum_b T_i[d, t, a, b] x[d, b, t]. Leading dimensions are a batch.

With A = T_{L-1} .. T_{i+1} and B = T_{i-1} .. T_0, an entry T_i[d, t, a, b] adds A[:, (d a t)] B[(d b t), :],
and no two of these pieces share an entry of the matrix: A joins only features that are equal modulo 2 s, and
B only those in one block of s. Hence both methods:

peel       a product of two groups of factors is n pieces that are disjoint, each the outer product of two
           vectors: the best is one truncated decomposition a piece (Le, Zheng, Gribonval & Riccietti 2022,
           arXiv:2110.01230). Then each group by itself. Exact where the matrix is a butterfly product.
alternate  the least squares of one factor beside the others: entry by entry without a gram; with one, the
           entries that write the same outputs are coupled.

Rows or columns of zeros, which pad a matrix, cost nothing: a butterfly product with a row or column set to
zero is one too, and the other rows and columns have not changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-13  # pulls towards the present factor, in units of the mean: a piece that counts nothing stays


def peel(matrix: Tensor, order: str) -> list[Tensor]:
    """Factors of [batch, n, n]; order: which factor comes off first, "first", "last" or "middle" (halves)."""
    batch, n, _ = matrix.shape
    levels = n.bit_length() - 1
    if levels == 1:
        return [matrix.reshape(batch, 1, 1, 2, 2)]
    at = {"first": 1, "last": levels - 1, "middle": levels // 2}[order]
    s, e = 2**at, n // 2**at
    pieces = matrix.reshape(batch, e, s, e, s).permute(0, 2, 3, 1, 4)  # [batch, row in s, block, row, column]
    u, v = outer(pieces)
    left = peel(u.permute(0, 1, 3, 2).reshape(batch * s, e, e), order)
    right = peel(v.transpose(1, 2).reshape(batch * e, s, s), order)
    factors = [f.reshape(batch, e * f.shape[1], *f.shape[2:]) for f in right]
    for f in left:
        _, d, t, _, _ = f.shape
        factors.append(
            f.reshape(batch, s, d, t, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(batch, d, t * s, 2, 2)
        )
    return factors


def outer(pieces: Tensor) -> tuple[Tensor, Tensor]:
    """u [..., a], v [..., b] of the nearest u v^T to [..., a, b], of equal norms."""
    left, s, right = torch.linalg.svd(pieces, full_matrices=False)
    half = s[..., :1].sqrt()
    return left[..., 0] * half, right[..., 0, :] * half


def multiplied(factors: list[Tensor]) -> Tensor:
    """The product [..., n, n]."""
    return prefixes(factors)[-1].squeeze(-3)


def prefixes(factors: list[Tensor]) -> list[Tensor]:
    """B_0 .. B_L: before factor i, blocks [..., n / s, s, s]; the last is the product."""
    first = factors[0]
    found = [first.new_ones(*first.shape[:-4], 2 * first.shape[-4], 1, 1)]
    for factor in factors:
        found.append(longer(factor, found[-1]))
    return found


def longer(factor: Tensor, before: Tensor) -> Tensor:
    """T_i B_i: [..., D, 2 s, 2 s] from [..., 2 D, s, s]."""
    *batch, d, s, _, _ = factor.shape
    grown = torch.einsum("...dtab,...dbtc->...datbc", factor, before.reshape(*batch, d, 2, s, s))
    return grown.reshape(*batch, d, 2 * s, 2 * s)


def suffixes(factors: list[Tensor]) -> list[Tensor]:
    """A_0 .. A_{L-1}: after factor i, for each residue modulo 2 s [..., 2 s, D, D]."""
    last = factors[-1]
    found = [last.new_ones(*last.shape[:-4], 2 * last.shape[-3], 1, 1)]
    for factor in factors[:0:-1]:
        found.append(taller(factor, found[-1]))
    return found[::-1]


def taller(factor: Tensor, after: Tensor) -> Tensor:
    """A_i T_i: [..., s, 2 D, 2 D] from [..., 2 s, D, D]."""
    *batch, d, s, _, _ = factor.shape
    grown = torch.einsum("...atrd,...dtab->...tradb", after.reshape(*batch, 2, s, d, d), factor)
    return grown.reshape(*batch, s, 2 * d, 2 * d)


def sweep(factors: list[Tensor], matrix: Tensor, gram: Tensor | None) -> list[Tensor]:
    """Each factor in turn, first to last and back, set to its least squares; matrix [..., n, n]."""
    factors = list(factors)
    after = suffixes(factors)
    before = [prefixes(factors[:1])[0]]
    for i in range(len(factors)):
        factors[i] = solved(factors[i], after[i], before[i], matrix, gram)
        before.append(longer(factors[i], before[i]))
    above = after[-1]
    for i in reversed(range(len(factors))):
        factors[i] = solved(factors[i], above, before[i], matrix, gram)
        above = taller(factors[i], above)
    return balanced(factors)


def solved(factor: Tensor, after: Tensor, before: Tensor, matrix: Tensor, gram: Tensor | None) -> Tensor:
    """The factor that minimises |matrix - A T B|, the others as they are."""
    *batch, d, s, _, _ = factor.shape
    a, b = after.reshape(*batch, 2, s, d, d), before.reshape(*batch, d, 2, s, s)
    if gram is None:
        w = matrix.reshape(*matrix.shape[:-2], d, 2, s, d, 2, s)
        seen = torch.einsum("...ratebc,...ebtc->...rateb", w, b.conj())
        right = torch.einsum("...atre,...rateb->...etab", a.conj(), seen)
        weights = torch.einsum("...ate,...ebt->...etab", norms(a, -2), norms(b, -1))
        return factor + (right - weights * factor) / (
            weights + ridge(weights.flatten(-4))[..., None, None, None]
        )
    return coupled(factor, a, b, matrix, gram)


def coupled(factor: Tensor, a: Tensor, b: Tensor, matrix: Tensor, gram: Tensor) -> Tensor:
    """As `solved`, in the norm of a gram [n, n]: for each a and t a system in the 2 D entries of d, b."""
    *batch, d, s, _, _ = factor.shape
    n = 2 * d * s
    g = gram.reshape(n, 2 * d, s)
    rows = b.reshape(*batch, 2 * d, s, s)  # [block, t, c]
    seen = torch.einsum("nec,...etc->...tne", g, rows.conj())
    inner = torch.einsum("...etc,...tecf->...tef", rows, seen.reshape(*batch, s, 2 * d, s, 2 * d))
    w = matrix.reshape(*matrix.shape[:-2], d, 2, s, n).transpose(-4, -2)  # [t, a, row, n]
    read = (w @ seen[..., None, :, :]).reshape(*batch, s, 2, d, d, 2)
    right = torch.einsum("...atrd,...tardb->...atdb", a.conj(), read).reshape(*batch, 2, s, 2 * d)
    outside = torch.einsum("...atrd,...atre->...atde", a.conj(), a)
    inner = inner.reshape(*batch, s, d, 2, d, 2)
    system = torch.einsum("...atde,...tecdb->...atdbec", outside, inner)
    system = system.reshape(*batch, 2, s, 2 * d, 2 * d)
    old = factor.permute(*range(len(batch)), -2, -3, -4, -1).reshape(*batch, 2, s, 2 * d)
    pull = ridge(torch.diagonal(system, dim1=-2, dim2=-1).real)
    gap = right - (system @ old[..., None])[..., 0]
    damped = system + torch.diag_embed(pull.expand(gap.shape).to(system.dtype))
    new = old + torch.linalg.solve(damped, gap[..., None])[..., 0]
    return new.reshape(*batch, 2, s, d, 2).permute(*range(len(batch)), -2, -3, -4, -1)


def norms(x: Tensor, dim: int) -> Tensor:
    return (x * x.conj()).real.sum(dim)


def ridge(weights: Tensor) -> Tensor:
    """RIDGE of the mean over the last dimension, which stays; never 0."""
    return RIDGE * weights.mean(-1, True) + torch.finfo(weights.dtype).tiny ** 0.5


def balanced(factors: list[Tensor]) -> list[Tensor]:
    """The same product; weights that write a feature are as large as those that read it, unless one is 0."""
    factors = list(factors)
    for i in range(len(factors) - 1):
        *batch, d, s, _, _ = factors[i].shape
        writes = norms(factors[i], -1)  # [d, t, a]
        reads = norms(factors[i + 1], -2)  # [d / 2, (a t), b]
        reads = reads.reshape(*batch, d // 2, 2, s, 2).permute(*range(len(batch)), -4, -1, -2, -3)
        reads = reads.reshape(*batch, d, s, 2)
        some = (writes > 0) & (reads > 0)
        scale = torch.where(some, reads / writes.where(some, writes.new_ones(())), 1.0) ** 0.25
        factors[i] = factors[i] * scale[..., None]
        back = scale.reshape(*batch, d // 2, 2, s, 2).permute(*range(len(batch)), -4, -1, -2, -3)
        factors[i + 1] = factors[i + 1] / back.reshape(*batch, d // 2, 2 * s, 1, 2)
    return factors
