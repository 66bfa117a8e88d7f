"""SmoothQuant: what is hard to round in the inputs is moved into the weights, which are rounded more finely.

x W^T = (x / s) (W s)^T with a factor s for each input, shared by all weights that read them.

Source     Xiao et al. 2022, "SmoothQuant: Accurate and efficient post-training quantization for large
           language models", arXiv:2211.10438.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxaccel.errors import OptionError
from fxaccel.passes.quantized._awq import inputs
from fxaccel.passes.quantized._grid import Grid, checked

STRENGTHS = tuple(i / 20 for i in range(21))
INT8 = Grid("int8")  # a scale for each row
FLOOR = 1e-5  # of the largest weight: a column of less counts as this much


@torch.no_grad()
def smooth(largest: Tensor, weights: Sequence[Tensor], strength: float = 0.5) -> Tensor:
    """Factors s [K] in float64: the inputs are divided by them, the columns of the weights multiplied.

    largest    [K]: max |x_j| over inputs
    weights    [N_i, K], all that read these inputs
    Factors    max|x_j|**a / max|w_j|**(1 - a), a the strength; an input that is always zero counts as one of
               mean size, so that it is no outlier where it comes after all; a column of zeros as FLOOR
    """
    if not 0 <= strength <= 1:
        raise OptionError(f"the strength is {strength!r}, expected a number from 0 to 1")
    if not weights:
        raise OptionError("there are no weights, expected one at least")
    columns = weights[0].shape[-1]
    x = inputs(columns, largest)
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != columns:
            raise OptionError(f"a weight is {list(weight.shape)}, expected [N, {columns}] as the first is")
    w = torch.stack([checked(weight).abs().amax(0).double().to(x.device) for weight in weights]).amax(0)
    live = x > 0
    if not bool(live.any()) or not bool((w > 0).any()):
        return torch.ones_like(x)
    x = torch.where(live, x, x[live].log().mean().exp())
    return x**strength / w.clamp_min(FLOOR * float(w.max())) ** (1 - strength)


@torch.no_grad()
def smoothest(
    largest: Tensor,
    weights: Sequence[Tensor],
    rows: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    grid: Grid = INT8,
) -> tuple[Tensor, float | None]:
    """`smooth` by the strength of least error on rows [M, K] of inputs, and it; (1s, None) where none helps.

    Error      sum |x W^T - Q(x / s) Q(W s)^T|^2 over rows and weights, both rounded to this grid: each row of
               inputs has its own scale, as in a product of dynamically quantized inputs
    """
    x = checked(rows).double()
    wide = [checked(weight).double() for weight in weights]
    none = torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
    tried = [(none, None), *((smooth(largest, weights, a).to(x), a) for a in strengths)]

    def rounded(matrix: Tensor) -> Tensor:
        return grid.dense(grid.quantize(matrix), matrix.shape[1])

    def loss(s: Tensor) -> float:
        y = rounded(x / s)
        return sum(float((x @ w.mT - y @ rounded(w * s).mT).square().sum()) for w in wide)

    return min(tried, key=lambda one: loss(one[0]))
