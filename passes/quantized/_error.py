"""How far a quantized weight is from the one that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from fxaccel.passes import _target
from fxaccel.passes._target import relative, wide
from fxaccel.passes.quantized._grid import Grid, Parts

BLOCK = 1024  # columns of a gram that are worked on together


def symmetric(weight: Tensor, gram: Tensor) -> Tensor:
    """The gram of this weight's inputs in float64, symmetric; OptionError where it is none of theirs."""
    _target.checked(weight, gram)
    gram = wide(gram).to(weight.device)
    return (gram + gram.mT) / 2


def squares(gap: Tensor, gram: Tensor | None = None) -> Tensor:
    """e G e^T of each row e of gap [N, K]: [N].

    gram       [K, K], symmetric; [K]: its diagonal, and nothing beside it; None: the identity
    """
    if gram is None or gram.ndim == 1:
        return (gap * gap if gram is None else gap * gap * gram).sum(1)
    total = gap.new_zeros(len(gap))
    for at in range(0, gap.shape[1], BLOCK):  # each block with itself, and twice with those before it
        now = gap[:, at : at + BLOCK]
        product = now @ gram[at : at + BLOCK, at : at + BLOCK]
        if at:
            product.addmm_(gap[:, :at], gram[:at, at : at + BLOCK], alpha=2.0)
        total += (product * now).sum(1)
    return total


@torch.no_grad()
def error(weight: Tensor, parts: Parts, grid: Grid, gram: Tensor | None = None) -> float:
    """|W - W^| / |W|, of W^ what the parts stand for; 0 where both are 0.

    Norm       Frobenius; with gram [K, K] = sum x x^T over inputs, or a multiple, sum |(W - W^) x|^2.
    """
    gram = None if gram is None else symmetric(weight, gram)
    weight = wide(weight)
    gap = weight - grid.dense(parts, weight.shape[1])
    return relative(*(squares(e, gram).sum() for e in (gap, weight)))
