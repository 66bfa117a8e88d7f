"""Norms written in many ways, each with the one call that it must be raised to.

E and D name sizes as everywhere: of the model and of a head. `wide` is the cast to float32 that models write,
and leaves the float64 copy alone that is the yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, S, H, D = 2, 3, 2, 32
E = H * D
EPS = 1e-6
FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
Function = Callable[[Any, Tensor, Tensor], Any]


class Model(nn.Module):
    """A function of x, a residual r and weights of its own."""

    def __init__(self, function: Function, dtype: torch.dtype = FP32, weights: torch.dtype | None = None):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        for name, size in (("w", E), ("b", E), ("v", E), ("head_w", D), ("head_b", D), ("seq", S * E)):
            value = torch.randn(size, generator=g).to(weights or dtype)
            setattr(self, name, nn.Parameter(value.view(S, E) if name == "seq" else value))
        self.lin = nn.Linear(E, E, dtype=dtype)
        self.function = function

    def forward(self, x: Tensor, r: Tensor) -> Any:
        return self.function(self, x, r)


def inputs(dtype: torch.dtype = FP32, batch: int = B, length: int = S, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(batch, length, E, generator=g) + 0.5).to(dtype) for _ in range(2))


@dataclass(frozen=True)
class Program:
    """A function, the dtypes of its input and weights, and the line of the listing that it becomes."""

    function: Function
    line: str
    dtype: torch.dtype
    weights: torch.dtype | None

    @property
    def name(self) -> str:
        return self.function.__name__


PROGRAMS: list[Program] = []


def norm(line: str, dtype: torch.dtype = FP32, weights: torch.dtype | None = None) -> Callable[[Any], Any]:
    def add(function: Function) -> Function:
        PROGRAMS.append(Program(function, line, dtype, weights))
        return function

    return add


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, FP32))


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def standard(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)


def heads(x: Tensor) -> Tensor:
    """[B, H, S, D], its rows not beside each other."""
    return x.view(x.shape[0], x.shape[1], H, D).transpose(1, 2)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


# -- RMSNorm ---------------------------------------------------------------------------------------------

PLAIN = "fxaccel.rms_norm(%x, %p_w, 1e-06)"
BARE = "fxaccel.rms_norm(%x, None, 1e-06)"
SHIFTED = "fxaccel.rms_norm(%x, %p_w, 1e-06, 1.0)"
ROUNDED = "fxaccel.rms_norm(%x, %p_w, 1e-06, 0.0, True)"
BIASED = "fxaccel.rms_norm(%x, %p_w, 1e-06, 0.0, False, %p_b)"


@norm(PLAIN)
def rms_called(m, x, r):
    return F.rms_norm(x, (E,), m.w, EPS)


@norm(BARE)
def rms_without_weight(m, x, r):
    return F.rms_norm(x, (E,), eps=EPS)


@norm(PLAIN)
def rms_with_statistics(m, x, r):
    return torch.ops.aten._fused_rms_norm(x, (E,), m.w, EPS)[0]


@norm(PLAIN)
def rms_written(m, x, r):
    return m.w * rms(x)


@norm(BARE)
def rms_written_without_weight(m, x, r):
    return m.lin(x / torch.sqrt(torch.mean(x**2, -1, keepdim=True) + EPS))


@norm(PLAIN)
def rms_by_division(m, x, r):
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / E + EPS) * m.w


@norm(PLAIN)
def rms_by_power(m, x, r):
    return x * ((x.square().mean(dim=2, keepdim=True) + EPS) ** -0.5 * m.w)


@norm(PLAIN)
def rms_by_length(m, x, r):
    return x / torch.sqrt(x.norm(dim=-1, keepdim=True) ** 2 / E + EPS) * m.w


@norm(SHIFTED)
def rms_shifted(m, x, r):
    return rms(x) * (1 + m.w)


@norm("fxaccel.rms_norm(%x, %p_w, 1e-06, -0.5)")
def rms_shifted_by_another_number(m, x, r):
    return F.rms_norm(x, (E,), m.w - 0.5, EPS)


@norm(BIASED)
def rms_biased(m, x, r):
    return rms(x) * m.w + m.b


@norm(BIASED, BF16)
def rms_called_and_biased(m, x, r):
    return m.b + F.rms_norm(x, (E,), m.w, EPS)


@norm(BIASED)
def rms_addcmul(m, x, r):
    return torch.addcmul(m.b, rms(x), m.w)


@norm("fxaccel.rms_norm(%x, None, 1e-06, 0.0, False, %p_b)")
def rms_biased_without_weight(m, x, r):
    return rms(x) + m.b


@norm(BIASED, FP64)
def rms_in_float64(m, x, r):
    return rms(x) * m.w + m.b


@norm(ROUNDED, BF16)
def llama(m, x, r):
    return m.w * rms(wide(x)).to(x.dtype)


@norm(ROUNDED, FP16)
def llama_in_fp16(m, x, r):
    return m.w * rms(wide(x)).to(x.dtype)


@norm("fxaccel.rms_norm(%x, %p_w, 1e-06, 0.0, True, %p_b)", BF16)
def llama_biased(m, x, r):
    return m.w * rms(wide(x)).to(x.dtype) + m.b


@norm("fxaccel.rms_norm(%x, %p_w, 1e-06, 1.0, True)", BF16)
def llama_shifted(m, x, r):
    return (1 + m.w) * rms(wide(x)).to(x.dtype)


@norm(ROUNDED, BF16)
def t5(m, x, r):
    variance = wide(x).pow(2).mean(-1, keepdim=True)
    return m.w * (x * torch.rsqrt(variance + EPS)).to(m.w.dtype)


@norm(SHIFTED, BF16)
def gemma(m, x, r):
    return (rms(wide(x)) * (1.0 + wide(m.w))).type_as(x)


@norm("fxaccel.rms_norm(%x, %p_w, 1e-06, 1.0, False, %p_b)", BF16)
def gemma_biased(m, x, r):
    return (rms(wide(x)) * (1.0 + wide(m.w)) + wide(m.b)).type_as(x)


@norm(BIASED, BF16)
def weights_promoted(m, x, r):
    return (m.w * rms(wide(x)) + m.b).to(x.dtype)


@norm(PLAIN, BF16)
def float_and_back(m, x, r):
    return F.rms_norm(wide(x), (E,), wide(m.w), EPS).to(x.dtype)


@norm(BARE, BF16)
def float_and_back_without_weight(m, x, r):
    return m.lin(rms(wide(x)).to(x.dtype))


@norm(BIASED, BF16, FP32)
def float_weights(m, x, r):
    return (rms(wide(x)) * m.w + m.b).to(x.dtype)


@norm(PLAIN, BF16, FP32)
def float_weights_called(m, x, r):
    return F.rms_norm(x, (E,), m.w, EPS)


@norm(PLAIN)
def cast_to_another_dtype(m, x, r):
    return F.rms_norm(x, (E,), m.w, EPS).to(BF16 if x.dtype is FP32 else x.dtype)


# -- LayerNorm -------------------------------------------------------------------------------------------

LAYER = "fxaccel.layer_norm(%x, %p_w, %p_b, 1e-06)"


@norm(LAYER)
def layer_called(m, x, r):
    return F.layer_norm(x, (E,), m.w, m.b, EPS)


@norm("fxaccel.layer_norm(%x, None, None, 1e-06)")
def layer_without_weights(m, x, r):
    return F.layer_norm(x, (E,), eps=EPS)


@norm("fxaccel.layer_norm(%x, %p_w, None, 1e-06)", BF16)
def layer_without_bias(m, x, r):
    return F.layer_norm(x, (E,), m.w, None, EPS)


@norm("fxaccel.layer_norm(%x, None, %p_b, 1e-06)")
def layer_with_bias_alone(m, x, r):
    return standard(x) + m.b


@norm(LAYER)
def layer_with_statistics(m, x, r):
    return torch.native_layer_norm(x, (E,), m.w, m.b, EPS)[0]


@norm(LAYER)
def layer_written(m, x, r):
    return standard(x) * m.w + m.b


@norm(LAYER)
def layer_by_var_mean(m, x, r):
    variance, mean = torch.var_mean(x, -1, keepdim=True, unbiased=False)
    return m.b + m.w * ((x - mean) / torch.sqrt(variance + EPS))


@norm(LAYER)
def layer_by_deviation(m, x, r):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (x.std(-1, keepdim=True, correction=0).square() + EPS).sqrt() * m.w + m.b


@norm(LAYER)
def layer_by_moments(m, x, r):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x * x).mean(-1, keepdim=True) - mean**2 + EPS) * m.w + m.b


@norm("fxaccel.layer_norm(%x, %add, %p_b, 1e-06)")
def layer_shifted(m, x, r):
    return F.layer_norm(x, (E,), 1 + m.w, m.b, EPS)


@norm(LAYER, BF16)
def layer_float_and_back(m, x, r):
    return F.layer_norm(wide(x), (E,), wide(m.w), wide(m.b), EPS).type_as(x)


@norm(LAYER, BF16, FP32)
def layer_float_weights(m, x, r):
    return F.layer_norm(wide(x), (E,), m.w, m.b, EPS).to(x.dtype)


@norm(LAYER, FP16, FP32)
def layer_float_weights_called(m, x, r):
    return F.layer_norm(x, (E,), m.w, m.b, EPS)


@norm("fxaccel.layer_norm(%x, None, None, 1e-06)", BF16)
def layer_cast_back(m, x, r):
    return m.lin(standard(wide(x)).to(x.dtype))


@norm(LAYER, BF16)
def layer_cast_first(m, x, r):
    return m.w * standard(wide(x)).to(x.dtype) + m.b


@norm("fxaccel.layer_norm(%x, %p_w, None, 1e-06)", BF16)
def layer_cast_first_without_bias(m, x, r):
    return m.w * F.layer_norm(wide(x), (E,), eps=EPS).to(x.dtype)


@norm(LAYER, BF16)
def layer_written_in_float(m, x, r):
    return (m.w * standard(wide(x)) + m.b).to(x.dtype)


# -- after a residual add --------------------------------------------------------------------------------


@norm("fxaccel.add_rms_norm(%x, %r, %p_w, 1e-06)")
def add_rms(m, x, r):
    h = x + r
    return rms(h) * m.w, h


@norm("fxaccel.add_rms_norm(%x, %r, %p_w, 1e-06, 0.0, False, %p_b)")
def add_rms_biased(m, x, r):
    h = r + x
    return F.rms_norm(h, (E,), m.w, EPS) + m.b, h


@norm("fxaccel.add_rms_norm(%x, %r, %p_w, 1e-06, 0.0, True)", BF16)
def add_llama(m, x, r):
    h = x + r
    return m.w * rms(wide(h)).to(x.dtype), h


@norm("fxaccel.add_rms_norm(%x, %r, %p_w, 1e-06, 1.0)", BF16)
def add_gemma(m, x, r):
    h = x + r
    return (rms(wide(h)) * (1.0 + wide(m.w))).to(x.dtype), h


@norm("fxaccel.add_rms_norm(%to, %to_1, %p_w, 1e-06)", BF16, FP32)
def add_after_the_cast(m, x, r):
    """The residual stream is in float32, the model in bfloat16."""
    h = wide(x) + wide(r)
    return F.rms_norm(h, (E,), m.w, EPS).to(x.dtype), h


@norm("fxaccel.add_rms_norm(%add, %linear, %p_w, 1e-06)")
def add_of_three(m, x, r):
    h = x + r + m.lin(x)
    return F.rms_norm(h, (E,), m.w, EPS)


@norm("fxaccel.add_layer_norm(%x, %r, %p_w, %p_b, 1e-06)")
def add_layer(m, x, r):
    h = x + r
    return F.layer_norm(h, (E,), m.w, m.b, EPS), h


@norm("fxaccel.add_layer_norm(%x, %r, %p_w, %p_b, 1e-06)")
def add_layer_written(m, x, r):
    return standard(x + r) * m.w + m.b


@norm("fxaccel.add_layer_norm(%x, %r, %p_w, %p_b, 1e-06)", BF16, FP32)
def add_layer_float_and_back(m, x, r):
    h = x + r
    return F.layer_norm(wide(h), (E,), m.w, m.b, EPS).to(x.dtype), h


@norm("fxaccel.rms_norm(%x, %p_w, 1e-06)")
def add_after_the_norm(m, x, r):
    """The residual is no bias."""
    return r + F.rms_norm(x, (E,), m.w, EPS)


# -- on heads --------------------------------------------------------------------------------------------


@norm("fxaccel.rms_norm(%permute, %p_head_w, 1e-06)")
def heads_after_the_transpose(m, x, r):
    return scores(rms(heads(x)) * m.head_w, heads(r))


@norm("fxaccel.rms_norm(%reshape, %p_head_w, 1e-06)")
def heads_before_the_transpose(m, x, r):
    q = F.rms_norm(m.lin(x).unflatten(-1, (H, D)), (D,), m.head_w, EPS)
    return scores(q.transpose(1, 2), heads(r))


@norm("fxaccel.rms_norm(%permute, %p_head_w, 1e-06, 0.0, True)", BF16)
def heads_in_llama(m, x, r):
    q = heads(x)
    return scores(m.head_w * rms(wide(q)).to(x.dtype), heads(r))


@norm("fxaccel.layer_norm(%permute, %p_head_w, %p_head_b, 1e-06)")
def heads_in_layer_norm(m, x, r):
    return scores(F.layer_norm(heads(x), (D,), m.head_w, m.head_b, EPS), heads(r))
