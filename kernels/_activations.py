"""Activations of one value by name: as torch computes them, as a Triton kernel does, and their derivatives.

    silu          x sigmoid(x)                    tanh          tanh(x)
    gelu          x (1 + erf(x / sqrt 2)) / 2     sigmoid       1 / (1 + exp(-x))
    gelu_tanh     its approximation by a tanh     mish          x tanh(log(1 + exp(x)))
    quick_gelu    x sigmoid(1.702 x)              hardswish     x min(max(x + 3, 0), 6) / 6
    relu          max(x, 0)                       relu_squared  max(x, 0)**2

Numerics   in Triton fp32, by exponentials of what cannot overflow where the quotient must be finite; erf and
           exp are good to a few eps.
Source     silu, gelu: Hendrycks & Gimpel 2016, arXiv:1606.08415, which has quick_gelu too; relu_squared: So
           et al. 2021, "Primer", arXiv:2109.08668; mish: Misra 2019, arXiv:1908.08681; hardswish: Howard et
           al. 2019, "Searching for MobileNetV3", arXiv:1905.02244.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels._triton import tl, triton

aten = torch.ops.aten
_nn: Any = torch._C._nn


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x * 1.702)


def _relu_squared(x: Tensor) -> Tensor:
    return torch.relu(x) ** 2


def _quick_gelu_sparing(x: Tensor) -> Tensor:
    return (x * 1.702).sigmoid_().mul_(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _nn.silu,
    "gelu": _nn.gelu,
    "gelu_tanh": partial(_nn.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": torch.relu,
    "relu_squared": _relu_squared,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": _nn.mish,
    "hardswish": _nn.hardswish,
}
OVER: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _nn.silu_,
    "gelu": _nn.gelu_,
    "gelu_tanh": partial(_nn.gelu_, approximate="tanh"),
    "quick_gelu": _quick_gelu_sparing,
    "relu": torch.relu_,
    "relu_squared": lambda x: torch.relu_(x).square_(),
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
    "mish": _nn.mish_,
    "hardswish": _nn.hardswish_,
}
"""The same bits, written over the argument, or at least over what is made on the way."""
SEVERAL = ("quick_gelu", "relu_squared")  # of which torch has no operator
FORWARD = {  # flop an element
    "silu": 4, "gelu": 5, "gelu_tanh": 9, "quick_gelu": 5, "relu": 1, "relu_squared": 2, "tanh": 6,
    "sigmoid": 3, "mish": 9, "hardswish": 5,
}  # fmt: skip
BACKWARD = {  # of the derivative and its product
    "silu": 7, "gelu": 10, "gelu_tanh": 14, "quick_gelu": 9, "relu": 2, "relu_squared": 4, "tanh": 10,
    "sigmoid": 6, "mish": 18, "hardswish": 6,
}  # fmt: skip


def slope_times(dy: Tensor, x: Tensor, y: Tensor, activation: str) -> Tensor:
    """dy times the derivative at x, where the activation is y; may be written over dy."""
    match activation:
        case "sigmoid":  # whose derivative, as that of tanh, reads the result
            return aten.sigmoid_backward.grad_input(dy, y, grad_input=dy)
        case "tanh":
            return aten.tanh_backward.grad_input(dy, y, grad_input=dy)
        case "silu":
            return aten.silu_backward.grad_input(dy, x, grad_input=dy)
        case "relu":
            return aten.threshold_backward.grad_input(dy, x, 0, grad_input=dy)
        case "relu_squared":
            return dy.mul_(torch.relu(x).mul_(2))
        case "mish":
            return aten.mish_backward(dy, x)
        case "hardswish":
            return aten.hardswish_backward.out(dy, x, out=dy)
        case "quick_gelu":
            s = torch.sigmoid(x * 1.702)
            return dy.mul_((1 - s).mul_(y).mul_(1.702).add_(s))
    kind = "tanh" if activation == "gelu_tanh" else "none"
    return aten.gelu_backward.grad_input(dy, x, approximate=kind, grad_input=dy)


@triton.jit
def activated(g, ACTIVATION: tl.constexpr):  # noqa: PLR0915  one branch is compiled
    """The activation of g in fp32, and its derivative, which forward does not read and never computes."""
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-g))
        a = g * s
        slope = s + a * (1.0 - s)
    elif ACTIVATION == "gelu":
        s = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        a = g * s
        slope = s + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(t)) / 2 is the sigmoid of 2 t
        t = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        s = 1.0 / (1.0 + tl.exp(-t))
        a = g * s
        h = s * (1.0 - s)  # 0 where g * g may be infinite
        slope = s + tl.where(h > 0.0, a * (1.0 - s) * (1.5957691216057308 + 0.21406868 * g * g), 0.0)
    elif ACTIVATION == "quick_gelu":
        s = 1.0 / (1.0 + tl.exp(-1.702 * g))
        a = g * s
        slope = s + 1.702 * a * (1.0 - s)
    elif ACTIVATION == "relu":
        a = tl.where(g < 0.0, 0.0, g)  # a NaN stays
        slope = tl.where(g <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu_squared":
        r = tl.where(g < 0.0, 0.0, g)
        a = r * r
        slope = 2.0 * r
    elif ACTIVATION == "tanh":
        e = tl.exp(-2.0 * tl.abs(g))
        q = g * g  # near 0 the quotient cancels; what the series leaves out is below eps
        series = g * (
            1.0 + q * (-0.3333333333 + q * (0.1333333333 + q * (-0.05396825397 + q * 0.02186948854)))
        )
        t = (1.0 - e) / (1.0 + e)
        a = tl.where(q < 0.0625, series, tl.where(g < 0.0, -t, t))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    elif ACTIVATION == "mish":  # tanh(log(1 + exp(g))) as a quotient t = n / d of powers of exp(-|g|) <= 1
        e = tl.exp(-tl.abs(g))
        d = tl.where(g < 0.0, e * e + 2.0 * e + 2.0, 1.0 + 2.0 * e + 2.0 * e * e)
        t = tl.where(g < 0.0, e * e + 2.0 * e, 1.0 + 2.0 * e) / d
        rest = tl.where(g < 0.0, 2.0, 2.0 * e * e) / d  # 1 - t, which would cancel
        a = g * t
        slope = t + g * rest * (1.0 + t) * tl.where(g < 0.0, e, 1.0) / (1.0 + e)
    elif ACTIVATION == "hardswish":
        a = g * tl.minimum(tl.maximum(g + 3.0, 0.0), 6.0) / 6.0
        slope = tl.where(g <= -3.0, 0.0, tl.where(g >= 3.0, 1.0, g / 3.0 + 0.5))
    else:
        a = 1.0 / (1.0 + tl.exp(-g))
        slope = a * (1.0 - a)
    return a, slope
