"""AWQ: weights of large inputs are multiplied before they are rounded, and their inputs divided.

W x = (W s) (x / s) with a factor s for each input: a group's scale grows little by it, but the errors of the
weights that matter are divided by s.

Source     Lin et al. 2023, "AWQ: Activation-aware weight quantization for LLM compression and acceleration",
           arXiv:2306.00978.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxaccel.errors import OptionError
from fxaccel.passes.quantized._error import squares, symmetric
from fxaccel.passes.quantized._gptq import Scaler
from fxaccel.passes.quantized._grid import Grid, Parts, checked

EXPONENTS = 20  # that are tried: 0, 1/20, .. 19/20
ROWS = 512  # of a weight that exponents are compared on; the best is then compared with none on all
FLOOR = 1e-4  # of the mean size of inputs: no input counts as less


@torch.no_grad()
def awq(
    grid: Grid,
    weight: Tensor,
    gram: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    exponents: int = EXPONENTS,
    scaler: Scaler = Grid.scales,
) -> tuple[Parts, Tensor]:
    """The parts of Q(W s), and the factors s [K] in float64 that the caller divides the inputs by.

    gram       [K, K] = sum x x^T, or a multiple: what errors are measured in
    sizes      [K], of each input: mean |x|; without them the roots of the gram's diagonal. Without a gram
               errors are measured as if inputs were independent and of these sizes.
    Factors    sizes**a for the a of least error |(W - Q(W s) / s) x|, over the middle of their extremes
    Exact      s is 1 where that is as good: so the error is never above that of rounding to nearest
    """
    weight = checked(weight).double()
    gram, sizes = _measured(weight, gram, sizes)
    some = weight[:: -(-len(weight) // ROWS)]
    tried = [_factors(sizes, i / exponents) for i in range(1, exponents)]

    def loss(rows: Tensor, s: Tensor) -> float:
        return float(squares(rows - _rounded(grid, rows * s, scaler)[0] / s, gram).sum())

    one = torch.ones_like(sizes)
    s = min([one, *tried], key=lambda s: loss(some, s))
    if len(some) < len(weight) and loss(weight, one) <= loss(weight, s):
        s = one
    return _rounded(grid, weight * s, scaler)[1], s


def _rounded(grid: Grid, weight: Tensor, scaler: Scaler) -> tuple[Tensor, Parts]:
    parts = grid.quantize(weight, scaler(grid, weight))
    return grid.dense(parts, weight.shape[1]), parts


def _measured(weight: Tensor, gram: Tensor | None, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """What errors are measured in, and sizes of the inputs, from one of them or both."""
    if gram is not None:
        gram = symmetric(weight, gram)
    if sizes is None:
        if gram is None:
            raise OptionError("neither a gram nor sizes of the inputs are given, expected one of them")
        return gram, gram.diagonal().clamp_min(0.0).sqrt()
    sizes = inputs(weight.shape[1], sizes).to(weight.device)
    return (sizes.square() if gram is None else gram), sizes


def inputs(columns: int, sizes: Tensor) -> Tensor:
    """Sizes of inputs in float64; OptionError where they are none of so many columns."""
    if tuple(sizes.shape) != (columns,):
        raise OptionError(f"the sizes of inputs are {list(sizes.shape)}, expected [{columns}]")
    if not bool((torch.isfinite(sizes) & (sizes >= 0)).all()):
        raise OptionError("the sizes of inputs hold numbers that are negative or not finite, expected sizes")
    return sizes.detach().double()


def _factors(sizes: Tensor, exponent: float) -> Tensor:
    """sizes**exponent, so that the largest is one over the least."""
    mean = float(sizes.mean())
    if mean <= 0:
        return torch.ones_like(sizes)
    s = (sizes / mean).clamp_min(FLOOR).pow(exponent)
    return s / (s.max() * s.min()).sqrt()
