"""W = scales * codes: a matrix of few bits a number, and the product with inputs that may be rounded too.

Parts      q, scale, zero where the grid has zeros, input_scale where inputs are rounded by a fixed one: as
           `Grid` stores them.
Linear     inputs "none": the weight is dequantized in the kernel; on the CPU for float32 inputs in bfloat16
           "dynamic-int8", "dynamic-float8": inputs are rounded by a scale for each row, and the product is
           one of integers (of float8); weights of 4 bits are rounded once more, to int8 of their rows
           "static-int8": by one scale, calibrated
           Where gradients flow, inputs are not rounded and the weight is held fixed.
Fit        by method: nearest, mse (scales clipped to least error), gptq, hqq
Source     fxaccel.passes.quantized has the methods and their papers.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxaccel.calibration import Moments
from fxaccel.errors import OptionError
from fxaccel.kernels import kernel
from fxaccel.passes._linear_form import LinearForm, Parts, sizes
from fxaccel.passes._target import Target
from fxaccel.passes.quantized._clip import clipped
from fxaccel.passes.quantized._gptq import gptq
from fxaccel.passes.quantized._grid import Grid
from fxaccel.passes.quantized._hqq import hqq
from fxaccel.pattern import Ops

INPUTS = {
    "none": ("int8", "int4", "nf4", "float8"),
    "dynamic-int8": ("int8", "int4", "nf4"),
    "static-int8": ("int8", "int4", "nf4"),
    "dynamic-float8": ("float8",),
}
"""How inputs are rounded, and the formats of weights that go with it."""

METHODS = ("nearest", "mse", "gptq", "hqq")
TOP = 127  # of int8


@dataclass(frozen=True)
class QuantizedMatrix(LinearForm):
    """A matrix on a grid.

    grid         what its numbers are rounded to
    dtype        of the weight, in which `dense` is
    inputs       how the inputs are rounded: one of INPUTS
    method       how the codes are chosen: one of METHODS
    input_scale  of "static-int8"
    narrow       whether products of float32 inputs are made in bfloat16
    trains       whether gradients flow to the inputs
    scales       dtype of scales and zeros, None for the grid's own
    """

    grid: Grid
    dtype: torch.dtype
    inputs: str = "none"
    method: str = "nearest"
    input_scale: float = 0.0
    narrow: bool = False
    trains: bool = False
    scales: torch.dtype | None = None

    name: ClassVar[str] = "quantized"
    tables: ClassVar[bool] = True
    frozen: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid.format not in INPUTS[self.inputs]:
            raise OptionError(
                f"inputs are {self.inputs} beside weights of {self.grid}, expected weights of "
                f"{', '.join(INPUTS[self.inputs])}"
            )

    def __str__(self) -> str:
        by = "" if self.method == "nearest" else f" by {self.method}"
        rounded = "" if self.inputs == "none" else f", inputs {self.inputs}"
        return f"{self.grid}{by}{rounded}"

    @property
    def parts(self) -> tuple[str, ...]:
        static = ("input_scale",) if self.inputs == "static-int8" else ()
        return ("q", "scale", *(("zero",) if self.grid.zeros else ()), *static)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        held = self.grid.empty(self.rows, self.columns)
        static = ((1,),) if self.inputs == "static-int8" else ()
        return (*(tuple(p.shape) for p in held if p is not None), *static)

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        held = self.grid.empty(self.rows, self.columns)
        static = (torch.float32,) if self.inputs == "static-int8" else ()
        kind = self.scales or self.grid.scale_dtype
        return (held.q.dtype, kind, *((kind,) if held.zero is not None else ()), *static)

    def work(self) -> tuple[float, str]:
        share = self.nbytes(self.dtype) / (self.rows * self.columns * self.dtype.itemsize)
        return share, f"{share:.2f} of the bytes"

    # -- fit --------------------------------------------------------------------------------------

    def fitted(self, weight: Tensor, target: Target, options: Any) -> Parts:
        grid, gram = self.grid, target.gram
        if self.method == "gptq" and gram is not None:
            return self._with_input(weight, gptq(grid, weight, gram, damp=0.0))  # it has been damped
        if self.method == "hqq":
            return self._with_input(weight, hqq(grid, weight))
        if self.method == "mse":
            return self._with_input(weight, grid.quantize(weight, clipped(grid, weight, gram)))
        return self.plain(weight)

    def plain(self, weight: Tensor) -> Parts:
        return self._with_input(weight, self.grid.quantize(weight))

    def _with_input(self, weight: Tensor, held: Iterable[Tensor | None]) -> Parts:
        parts = tuple(p.contiguous() for p in held if p is not None)
        parts = tuple(p.to(d) for p, d in zip(parts, self.dtypes(self.dtype), strict=False))
        if self.inputs == "static-int8":
            parts = (*parts, torch.tensor([self.input_scale], dtype=torch.float32, device=weight.device))
        return parts

    def error(self, weight: Tensor, parts: Iterable[Tensor], gram: Tensor | None = None) -> float:
        return LinearForm.error(dataclasses.replace(self, dtype=torch.float64), weight, parts, gram)

    def _widened(self, parts: Iterable[Tensor]) -> list[Tensor]:
        return list(parts)

    def rounding(self, seen: Moments) -> float:
        if self.inputs == "static-int8":
            return seen.rows * self.input_scale**2 / 12
        if self.inputs == "dynamic-int8":
            return seen.peaks / TOP**2 / 12
        if self.inputs == "dynamic-float8":  # three bits behind the first: a step of a sixteenth at most
            return float(seen.gram.diagonal().mean()) / 16**2 / 12 * 4 / 3
        return 0.0

    # -- linear -----------------------------------------------------------------------------------

    def serving(self, grad: bool) -> LinearForm:
        return dataclasses.replace(self, trains=grad)

    @property
    def _rounds(self) -> bool:
        return self.inputs != "none" and not self.trains

    @property
    def _group(self) -> int:
        return self.grid.width(self.columns)

    def _named(self, parts: Iterable[Any]) -> tuple[Any, Any, Any, Any]:
        """q, scale, zero or None, input_scale or None."""
        named = dict(zip(self.parts, parts, strict=False))  # what is made ready comes after
        return named["q"], named["scale"], named.get("zero"), named.get("input_scale")

    def dense(self, op: Ops, *parts: Any) -> Any:
        return self._dense(op, parts, self.dtype)

    def _dense(self, op: Ops, parts: Iterable[Any], dtype: torch.dtype) -> Any:
        q, scale, zero, _ = self._named(parts)
        form, group = self.grid.format, self._group
        return op(kernel("dequantize").op, q, scale, zero, form, group, self.columns, dtype)

    def ready(self, op: Ops, parts: Iterable[Any]) -> tuple[Any, ...]:
        parts = tuple(parts)
        if not self._rounds or self.grid.bits == 8:
            return parts
        rows = op(kernel("quantize_rows").op, self._dense(op, parts, self.dtype), torch.int8)
        return (*parts, op(operator.getitem, rows, 0), op(operator.getitem, rows, 1))

    def linear(self, op: Ops, x: Any, parts: Iterable[Any], bias: Any) -> Any:
        if not self._rounds:
            q, scale, zero, _ = self._named(parts)
            x, bias = self._narrowed(op, x), self._narrowed(op, bias)
            form, group = self.grid.format, self._group
            y = op(kernel("weight_only_linear").op, x, q, scale, zero, bias, form, group)
            return op.aten.to.dtype(y, self.dtype) if self.narrow else y
        parts = tuple(parts)
        codes, by = self._rounded(op, x, parts)
        q, scale = parts[:2] if self.grid.bits == 8 else parts[-2:]
        return op(kernel("quantized_linear").op, codes, by, q, scale, bias, self.dtype)

    def definition(self, op: Ops, x: Any, parts: Iterable[Any], bias: Any) -> Any:
        parts = tuple(parts)
        if not self._rounds:
            kind = torch.bfloat16 if self.narrow else self.dtype
            x, bias = self._narrowed(op, x), self._narrowed(op, bias)
            y = op.aten.linear.default(x, self._dense(op, parts, kind), bias)
            return op.aten.to.dtype(y, self.dtype) if self.narrow else y
        codes, by = self._rounded(op, x, parts)
        if self.grid.bits == 8:
            weight = self._dense(op, parts, torch.float32)
        else:
            q, scale = self.ready(op, parts)[-2:]
            weight = op.aten.mul.Tensor(op.aten.to.dtype(q, torch.float32), scale)
        seen = op.aten.mul.Tensor(op.aten.to.dtype(codes, torch.float32), by)
        bias = None if bias is None else op.aten.to.dtype(bias, torch.float32)
        return op.aten.to.dtype(op.aten.linear.default(seen, weight, bias), self.dtype)

    def lookup(self, op: Ops, indices: Any, parts: Iterable[Any]) -> Any:
        q, scale, zero, _ = self._named(parts)
        rows = [
            None if p is None else op.aten.index_select.default(p, 0, op.aten.reshape.default(indices, [-1]))
            for p in (q, None if self.grid.group < 0 else scale, zero)
        ]
        held = rows[0], scale if self.grid.group < 0 else rows[1], *([] if zero is None else [rows[2]])
        flat = dataclasses.replace(self, inputs="none")._dense(op, held, self.dtype)
        return op.aten.reshape.default(flat, [*sizes(op, indices), self.columns])

    def _narrowed(self, op: Ops, x: Any) -> Any:
        return x if x is None or not self.narrow else op.aten.to.dtype(x, torch.bfloat16)

    def _rounded(self, op: Ops, x: Any, parts: Iterable[Any]) -> tuple[Any, Any]:
        """Codes of the inputs, and their scales."""
        *_, static = self._named(parts)
        if static is not None:
            return op(kernel("quantize_tensor").op, x, static, torch.int8), static
        dtype = torch.int8 if self.inputs == "dynamic-int8" else torch.float8_e4m3fn
        rows = op(kernel("quantize_rows").op, x, dtype)
        return op(operator.getitem, rows, 0), op(operator.getitem, rows, 1)
