"""Code that looks like a norm and is not, or not one the kernel takes, each with the reason.

"" as the reason: it is a norm after all, of less or of other operands than a careless pattern would take, and
the rewrite must keep their meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.norm_programs import BF16, EPS, FP32, E, S, rms, wide

LOOK_ALIKES: dict[str, tuple[Any, str, torch.dtype, torch.dtype | None]] = {}


def look_alike(
    why: str, dtype: torch.dtype = FP32, weights: torch.dtype | None = None
) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        LOOK_ALIKES[function.__name__] = (function, why, dtype, weights)
        return function

    return add


def moments(x: Tensor, dims: Any = -1) -> tuple[Tensor, Tensor]:
    return x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)


# -- dimensions ------------------------------------------------------------------------------------------


@look_alike("the mean is over [1] of 3 dimensions, not over the last")
def over_the_rows(m, x, r):
    return m.w * x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + EPS)


@look_alike("the mean is over [1] of 3 dimensions, not over the last")
def standard_over_the_rows(m, x, r):
    """LayerNorm of an image with the channels first (ConvNeXt)."""
    mean, variance = moments(x, 1)
    return m.w * (x - mean) / torch.sqrt(variance + EPS) + m.b


@look_alike("the mean is over [0, 1] of 3 dimensions, not over the last")
def batch_norm(m, x, r):
    mean, variance = moments(x, (0, 1))
    return (x - mean) * torch.rsqrt(variance + EPS) * m.w + m.b


@look_alike("the mean is over [1, 2] of 3 dimensions, not over the last")
def over_two_dimensions(m, x, r):
    return x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS)


@look_alike(f"it normalises over [{S}, {E}]; the kernel takes the last dimension, {E}")
def called_over_two_dimensions(m, x, r):
    return F.layer_norm(x, (S, E), eps=EPS)


@look_alike(f"it normalises over [{S}, {E}]; the kernel takes the last dimension, {E}")
def called_with_weights_over_two_dimensions(m, x, r):
    return F.layer_norm(x, (S, E), m.seq, m.seq, EPS)


@look_alike("what is subtracted is not the mean that the variance is about")
def mean_over_another_dimension(m, x, r):
    return (x - x.mean(1, keepdim=True)) * torch.rsqrt(moments(x)[1] + EPS) * m.w + m.b


@look_alike("")
def weight_over_two_dimensions(m, x, r):
    return rms(x) * m.seq


@look_alike("")
def bias_over_two_dimensions(m, x, r):
    return F.layer_norm(x, (E,), m.w, None, EPS) + m.seq


@look_alike("")
def weight_of_one_element(m, x, r):
    return m.lin(rms(x) * m.w[:1])


# -- statistics ------------------------------------------------------------------------------------------


@look_alike("the variance divides by n - 1, not by n")
def unbiased(m, x, r):
    return m.w * (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + EPS) + m.b


@look_alike("the root is of a sum, not of a mean")
def unit_length(m, x, r):
    return m.w * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)


@look_alike("it divides by the length of a vector, not by the root of a mean of squares")
def normalized(m, x, r):
    return F.normalize(x, dim=-1) * E**0.5 * m.w


@look_alike("the mean is of aten.abs, not of squares")
def mean_of_magnitudes(m, x, r):
    return m.w * x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + EPS)


@look_alike("the mean is of aten.pow.Tensor_Scalar, not of squares")
def mean_of_fourth_powers(m, x, r):
    return m.w * x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS)


@look_alike("what is scaled is another tensor than the squares are of")
def root_of_another_tensor(m, x, r):
    return m.w * r * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


@look_alike("what is scaled is another tensor than the squares are of")
def root_of_the_double(m, x, r):
    return m.w * x * torch.rsqrt((3 * x).pow(2).mean(-1, keepdim=True) + EPS)


@look_alike("what is subtracted is not the mean that the variance is about")
def mean_of_another_tensor(m, x, r):
    return (x - r.mean(-1, keepdim=True)) * torch.rsqrt(moments(x)[1] + EPS) * m.w + m.b


@look_alike("what is scaled is another tensor than the variance is of")
def variance_of_another_tensor(m, x, r):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(moments(r)[1] + EPS) * m.w + m.b


@look_alike("the mean is not subtracted")
def not_centred(m, x, r):
    return x * torch.rsqrt(moments(x)[1] + EPS) * m.w + m.b


@look_alike("")
def centred_by_another_mean(m, x, r):
    """RMSNorm of the difference."""
    return rms(x - r.mean(-1, keepdim=True)) * m.w


@look_alike("the mean drops the dimension that it is over")
def rows_scaled_by_columns(m, x, r):
    """The root of row i scales column i."""
    square = m.lin(x)[:, :S, :S]
    return square * torch.rsqrt(square.pow(2).mean(-1) + EPS)[:, None]


@look_alike("the last dimension has no fixed size")
def size_that_varies(m, x, r):
    return rms(x)


# -- eps -------------------------------------------------------------------------------------------------


@look_alike("eps is added to the root, not under it")
def eps_outside(m, x, r):
    return m.w * x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + EPS)


@look_alike("eps is a tensor; the kernel takes a number")
def eps_learned(m, x, r):
    return m.w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.v[:1].abs())


@look_alike("eps is a tensor; the kernel takes a number")
def eps_computed(m, x, r):
    return m.w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + r.abs().mean(-1, keepdim=True))


@look_alike("no eps is added under the root")
def no_eps(m, x, r):
    return m.w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))


@look_alike("what is under the root is clamped, where a norm adds eps")
def square_clamped(m, x, r):
    return m.w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=EPS))


@look_alike("the root is clamped, where a norm adds eps under it")
def root_clamped(m, x, r):
    return m.w * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True)).clamp(min=EPS)


@look_alike("eps is left to the dtype; the kernel needs a number")
def eps_of_the_dtype(m, x, r):
    return F.rms_norm(x, (E,), m.w)


# -- dtypes ----------------------------------------------------------------------------------------------


@look_alike("the root is rounded to torch.bfloat16 before it scales", BF16)
def root_rounded(m, x, r):
    return m.w * (x * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + EPS).to(x.dtype))


@look_alike("dtypes differ: x is torch.bfloat16, w torch.float16", BF16)
def weight_in_another_half(m, x, r):
    return F.rms_norm(x, (E,), m.w.to(torch.float16 if x.dtype is BF16 else x.dtype), EPS)


# -- operands --------------------------------------------------------------------------------------------


@look_alike("the weight is shifted by a tensor; the kernel takes a number")
def weight_shifted_by_a_tensor(m, x, r):
    return F.rms_norm(x, (E,), m.w + m.v, EPS)


@look_alike("")
def residual_added_to_the_norm(m, x, r):
    return F.rms_norm(x, (E,), m.w, EPS) + x


@look_alike("")
def bias_before_the_weight(m, x, r):
    return (F.layer_norm(x, (E,), eps=EPS) + m.b) * m.w


@look_alike("")
def scaled_between(m, x, r):
    return torch.relu(rms(x)) * m.w + m.b
