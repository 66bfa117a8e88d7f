"""Quantized weights: the grids they are rounded to, and methods that choose how. Tensors alone, no graphs.

A method takes a Grid and a weight [N, K] and gives Parts, which is what is stored; a Scaler gives scales
alone, to round by or to hand to a method.
"""

from fxaccel.passes.quantized._awq import awq
from fxaccel.passes.quantized._clip import clipped, percentile
from fxaccel.passes.quantized._error import error
from fxaccel.passes.quantized._gptq import Scaler, gptq
from fxaccel.passes.quantized._grid import Grid, Parts, Scales
from fxaccel.passes.quantized._hqq import distance, half_quadratic, hqq
from fxaccel.passes.quantized._observer import Observer
from fxaccel.passes.quantized._smooth import smooth, smoothest

__all__ = [
    "Grid", "Observer", "Parts", "Scaler", "Scales", "awq", "clipped", "distance", "error", "gptq",
    "half_quadratic", "hqq", "percentile", "smooth", "smoothest",
]  # fmt: skip
