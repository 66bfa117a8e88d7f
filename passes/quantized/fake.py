"""A float weight that is rounded to a grid at each call, to be trained as what it is converted to.

Parts      weight: [N, K], as the model has it. Where scales are learned, in float32: log_scale [N, G], to
           base 2, zero [N, G] of grids with zeros, log_input_scale [1] of "static-int8".
Linear     of what the integer model would see: the weight on its grid, once more on that of int8 by rows
           where products are of integers and the weight has 4 bits, the inputs rounded as they will be.
Gradients  straight through, to the weight and the inputs, but not where a value lies beyond the grid; to
           learned scales and zeros as LSQ has them. Observed scales follow the weight and have none, and the
           calibrated one of static inputs is held fixed beside them. Learned ones train as logarithms: a step
           of Adam is as large as its rate whatever the gradient, and the scale of an 8-bit weight is smaller
           than that; of a logarithm it is a share of the scale. Decay of weights would draw scales to 1: give
           them none.
Convert    codes of the weight by the scales in force, as the kernel rounds it: what the linear reads is equal
           before and after, bit for bit. Only sums differ, in their order and precision.
State      a state_dict holds the weight alone, by the original's name: learned scales are chosen anew where
           one is loaded. `save` and pickle keep them.
Source     Esser et al. 2020, "Learned Step Size Quantization", arXiv:1902.08153; logarithms: Jain et al.
           2019, "Trained Quantization Thresholds", arXiv:1903.08066; training with rounding simulated: Jacob
           et al. 2018, arXiv:1712.05877.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxaccel.calibration import Moments
from fxaccel.errors import OptionError
from fxaccel.ir import Replacement
from fxaccel.kernels import _fake, kernel
from fxaccel.passes._linear_fits import Way
from fxaccel.passes._linear_form import LinearForm, Parts
from fxaccel.passes._target import Target
from fxaccel.passes.quantized._clip import clipped
from fxaccel.passes.quantized._grid import Scales, checked
from fxaccel.passes.quantized.matrix import QuantizedMatrix
from fxaccel.pattern import Ops


@dataclass(frozen=True)
class FakeQuantizedMatrix(LinearForm):
    """A matrix that is trained for a grid.

    into       what it is converted to
    learned    whether scales are trained; else they are those of the weight's largest values, at each call
    trains     whether gradients flow: without them products are as narrow as the integer model's
    """

    into: QuantizedMatrix
    learned: bool = False
    trains: bool = False

    name: ClassVar[str] = "fake-quantized"
    tables: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("nearest", "mse") if self.learned else ("nearest",)
        if self.into.method not in known:
            raise OptionError(
                f"method is {self.into.method} beside {'learned' if self.learned else 'observed'} scales, "
                f"expected {' or '.join(known)}",
                "gptq and hqq choose codes, which training would move away from at once",
            )

    def __str__(self) -> str:
        return f"{self.into}, to train with {'learned' if self.learned else 'observed'} scales"

    @property
    def _static(self) -> bool:
        return self.into.inputs == "static-int8"

    @property
    def parts(self) -> tuple[str, ...]:
        logs = (part if part == "zero" else f"log_{part}" for part in self.into.parts[1:])
        return ("weight", *(logs if self.learned else ()))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.rows, self.columns), *(self.into.shapes[1:] if self.learned else ()))

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        return (dtype, *(torch.float32 for _ in self.parts[1:]))

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes once converted: what a choice of formats is made by."""
        return self.into.nbytes(dtype)

    def work(self) -> tuple[float, str]:
        share, words = self.into.work()
        return share, f"{words} once converted"

    def serving(self, grad: bool) -> LinearForm:
        return dataclasses.replace(self, trains=grad)

    def rounding(self, seen: Moments) -> float:
        return self.into.rounding(seen)

    # -- parts ------------------------------------------------------------------------------------

    def fitted(self, weight: Tensor, target: Target, options: Any) -> Parts:
        if self.into.method == "mse":
            return self._with_scales(weight, clipped(self.into.grid, weight, target.gram))
        return self.plain(weight)

    def plain(self, weight: Tensor) -> Parts:
        return self._with_scales(weight, self.into.grid.scales(weight) if self.learned else None)

    def _with_scales(self, weight: Tensor, scales: Scales | None) -> Parts:
        if scales is None:
            return (weight.contiguous(),)
        scale, zero = scales
        held = [scale.float().log2(), *([] if zero is None else [zero.float()])]
        return (weight.contiguous(), *held, *([self._calibrated(weight).log2()] if self._static else []))

    def _calibrated(self, like: Tensor) -> Tensor:
        return torch.tensor([self.into.input_scale], dtype=torch.float32, device=like.device)

    def integers(self, parts: Iterable[Tensor]) -> tuple[QuantizedMatrix, Parts]:
        """The matrix that is stored in few bits, and its parts: the scales are those in force."""
        weight, *given = parts
        checked(weight)
        into, grid, group = self.into, self.into.grid, self._group
        named = dict(zip(self.parts[1:], given, strict=True))
        if self.learned:
            scale, zero = _fake.in_force(named["log_scale"].exp2(), named.get("zero"), grid.format)
        else:
            scale, zero = _fake.observed(weight, grid.format, group, grid.zeros)
        levels = _fake.nearest(_fake.units(weight, scale, zero, grid.format, group), grid.format, grid.zeros)
        codes = grid.codes_of(_fake.joined(levels.double(), weight.double()))
        held = [p.contiguous() for p in grid.pack(codes, scale, zero) if p is not None]
        if self._static:
            log = named.get("log_input_scale")
            by = self._calibrated(weight) if log is None else _fake.in_force(log.exp2(), None, "int8")[0]
            into = dataclasses.replace(into, input_scale=float(by))
            held.append(by)
        return into, tuple(held)

    # -- linear -----------------------------------------------------------------------------------

    @property
    def _group(self) -> int:
        grid = self.into.grid
        return grid.group if grid.group < 0 else grid.width(self.columns)

    def dense(self, op: Ops, *parts: Any) -> Any:
        """The weight on its grid; the float one is `Trained.inverse`."""
        named = dict(zip(self.parts, parts, strict=True))
        grid, fake = self.into.grid, kernel("fake_quantize").op
        scale = op.aten.exp2.default(named["log_scale"]) if self.learned else None
        return op(fake, named["weight"], scale, named.get("zero"), grid.format, self._group, grid.zeros)

    def ready(self, op: Ops, parts: Iterable[Any]) -> tuple[Any, ...]:
        """The weight that tables are looked up in, that which linears read, the scale of the inputs."""
        parts = tuple(parts)
        weight = seen = self.dense(op, *parts)
        if self.into.inputs != "none" and self.into.grid.bits == 4:
            seen = op(kernel("fake_quantize_rows").op, weight, torch.int8)
        static = parts[-1:] if self.learned and self._static else ()
        return (weight, seen, *(op.aten.exp2.default(p) for p in static))

    def linear(self, op: Ops, x: Any, parts: Iterable[Any], bias: Any) -> Any:
        _, weight, *static = parts
        x = self._rounded(op, x, static)
        if not self.into.narrow or self.trains:
            return op.aten.linear.default(x, weight, bias)
        x, weight, bias = (t if t is None else op.aten.to.dtype(t, torch.bfloat16) for t in (x, weight, bias))
        return op.aten.to.dtype(op.aten.linear.default(x, weight, bias), self.into.dtype)

    def definition(self, op: Ops, x: Any, parts: Iterable[Any], bias: Any) -> Any:
        """The same of parts that are not ready: what is proved is where they go."""
        return self.linear(op, x, self.ready(op, parts), bias)

    def lookup(self, op: Ops, indices: Any, parts: Iterable[Any]) -> Any:
        table, *_ = parts
        return op.aten.embedding.default(table, indices)

    def _rounded(self, op: Ops, x: Any, static: Iterable[Any]) -> Any:
        """The inputs as the integer model will see them."""
        if self.into.inputs == "none":
            return x
        if self._static:
            scale = next(iter(static), None)
            if scale is None:
                at = self.into.input_scale
                scale = op.aten.new_full.default(x, [1], at, dtype=torch.float32)
            return op(kernel("fake_quantize").op, x, scale, None, "int8", -1)
        dtype = torch.int8 if self.into.inputs == "dynamic-int8" else torch.float8_e4m3fn
        return op(kernel("fake_quantize_rows").op, x, dtype)


@dataclass(frozen=True)
class Trained(Way):
    """The way to a weight that is trained for a grid: back leads to the float weight."""

    def inverse(self, *parts: Tensor) -> tuple[Tensor]:
        return (parts[0].mT.contiguous() if self.flipped else parts[0],)

    def converted(self, one: Replacement, *parts: Tensor) -> Replacement:
        """What takes the place of `one`, whose tensors these are, once training is over."""
        assert isinstance(self.form, FakeQuantizedMatrix)
        form, held = self.form.integers(parts)
        way = Way(form, self.flipped)
        names = tuple(f"{one.old[0]}_{part}" for part in form.parts)
        return Replacement(one.by, one.old, names, way, way.inverse, held, form.frozen, one.aliases)
