"""The grids that weights are rounded to: what is stored, how a scale is chosen, how a weight is rounded.

Shapes     weight: [N, K]; a scale belongs to `width` columns of a row, G = ceil(K / width) of them.
Stored     q:     int8 [N, K];  float8_e4m3fn [N, K];  4 bits: uint8 [N, G * width / 2], the even column in
                  the low nibble, columns from K on rounded from zero
           scale: float32 of 8 bits, bfloat16 of 4; [N, G], or [1, 1] where one serves the whole tensor
           zero:  bfloat16 [N, G], of int4 alone
Values     int8 and float8: q * scale;  int4: (code - 8) * scale + zero;  nf4: NF4[code] * scale
Numerics   float64. A scale is rounded to what is stored before a weight is divided by it, so that codes fit
           the scale that is kept. Nearest, ties to the even code. A group of zeros has scale 1, and no scale
           is below the least normal number: kernels may read a smaller one as 0.
Source     NF4: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314; float8_e4m3fn: Micikevicius et al. 2022,
           "FP8 formats for deep learning", arXiv:2209.05433.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fxaccel.errors import OptionError
from fxaccel.kernels import _fake, _quantized

MIDDLE = 8  # the code of int4 that stands for 0 steps
AT_ONCE = 2**17  # elements of rows that are worked on together: a few float64 copies of them stay in cache

Scales: TypeAlias = tuple[Tensor, "Tensor | None"]
"""What is stored beside the codes: scale, zero."""


class Parts(NamedTuple):
    """A quantized weight as it is stored."""

    q: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(part.nbytes for part in self if part is not None)


@dataclass(frozen=True)
class Grid:
    """The values that a weight may take.

    format     "int8", "int4", "nf4" or "float8"
    group      columns that share a scale; 0: the whole row; -1, of float8: the whole tensor
    zeros      int4 alone: a zero beside each scale, so that a group's range need not be symmetric
    Errors     OptionError of settings that make no grid, or a weight that has no place on one.
    """

    format: str
    group: int = 0
    zeros: bool = False

    def __post_init__(self) -> None:
        if self.format not in _fake.TOP:
            raise OptionError(f"the format is {self.format!r}, expected one of {', '.join(_fake.TOP)}")
        least = -1 if self.format == "float8" else 0
        even = self.bits == 4
        sound = isinstance(self.group, int) and not isinstance(self.group, bool) and self.group >= least
        if not sound or (even and self.group % 2):
            what = f"an {'even ' if even else ''}integer from {least}"
            hint = "0 is a scale a row; -1, of float8 alone, one for the tensor"
            raise OptionError(f"group of a grid of {self.format} is {self.group!r}, expected {what}", hint)
        if not isinstance(self.zeros, bool) or (self.zeros and self.format != "int4"):
            raise OptionError(
                f"zeros of a grid of {self.format} is {self.zeros!r}, expected "
                f"{'True or False' if self.format == 'int4' else 'False: int4 alone has them'}"
            )

    def __str__(self) -> str:
        of = " of the tensor" if self.group < 0 else f"-g{self.group}" if self.group else ""
        return f"{self.format}{of}{' with zeros' if self.zeros else ''}"

    @property
    def bits(self) -> int:
        """Of one code."""
        return 4 if self.format in ("int4", "nf4") else 8

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of scales and zeros."""
        return torch.bfloat16 if self.bits == 4 else torch.float32

    def width(self, columns: int) -> int:
        """Columns that a scale covers in a row; a row of 4 bits is whole bytes."""
        if self.group > 0:
            return self.group
        return columns + columns % 2 if self.bits == 4 else columns

    def groups(self, columns: int) -> int:
        """Scales that a row has, or shares with the others."""
        return -(-columns // self.width(columns))

    def empty(self, rows: int, columns: int) -> Parts:
        """Parts of such a weight, on the meta device: their shapes, dtypes and bytes."""
        for what, size in (("rows", rows), ("columns", columns)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise OptionError(f"{what} of a weight are {size!r}, expected an integer from 1")
        groups = self.groups(columns)
        held = groups * self.width(columns) // 2 if self.bits == 4 else columns
        shape = (1, 1) if self.group < 0 else (rows, groups)
        q = torch.empty(rows, held, dtype=_quantized.FORMATS[self.format], device="meta")
        scale = torch.empty(shape, dtype=self.scale_dtype, device="meta")
        return Parts(q, scale, torch.empty_like(scale) if self.zeros else None)

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of the parts of such a weight."""
        return self.empty(rows, columns).nbytes

    # levels: values in units of the scale, float64, element by element

    def nearest(self, x: Tensor) -> Tensor:
        """The levels nearest to these numbers."""
        return _fake.nearest(x, self.format, self.zeros)

    def codes_of(self, levels: Tensor) -> Tensor:
        """The codes of levels that are on the grid."""
        if self.format == "nf4":
            return _fake.normal_codes(levels)
        return (levels + MIDDLE if self.format == "int4" else levels).to(_quantized.FORMATS[self.format])

    def levels(self, codes: Tensor) -> Tensor:
        """The levels of codes."""
        if self.format == "nf4":
            table = torch.tensor(_quantized.NF4, dtype=torch.float64, device=codes.device)
            return table[codes.long()]
        levels = codes.double()
        return levels.sub_(MIDDLE) if self.format == "int4" else levels

    # groups: [N, G, width]

    def grouped(self, matrix: Tensor) -> Tensor:
        """A matrix [N, K] by groups [N, G, width] in float64, with zeros behind its columns."""
        rows, columns = matrix.shape
        groups, width = self.groups(columns), self.width(columns)
        matrix = torch.nn.functional.pad(matrix.double(), (0, groups * width - columns))
        return matrix.reshape(rows, groups, width)

    def reduced(self, sums: Tensor, how: Callable[[Tensor], Tensor] = torch.sum) -> Tensor:
        """A number for each scale from numbers [N, G] for each group."""
        return how(sums).reshape(1, 1) if self.group < 0 else sums

    def by_rows(self, make: Callable[[Tensor], Scales], weight: Tensor, least: int = 1) -> Scales:
        """Scales of a weight, some rows at once, or `least`; all of them where they share their scale."""
        if self.group < 0:
            return make(weight)
        made = [make(rows) for rows in weight.split(max(least, AT_ONCE // weight.shape[1]))]
        scales, zeros = zip(*made, strict=True)
        return torch.cat(scales), torch.cat(zeros) if self.zeros else None

    # scales

    def scales(self, weight: Tensor) -> Scales:
        """Scales that reach each group's largest absolute value; with zeros its range, and 0 within it."""

        def made(rows: Tensor) -> Scales:
            low, high = self.grouped(rows).aminmax(dim=-1)
            return self.fitting(self.reduced(low, torch.amin), self.reduced(high, torch.amax))

        return self.by_rows(made, checked(weight))

    def fitting(self, low: Tensor, high: Tensor) -> Scales:
        """Scales of ranges [N, G], or [1, 1]; each is widened to hold 0."""
        scale, zero = _fake.reaching(low, high, self.format, self.zeros)
        if not bool(torch.isfinite(scale).all()):
            raise OptionError(
                f"the weight reaches {float(high.maximum(-low).max())}, of which the scale is not finite in "
                f"{self.scale_dtype}"
            )
        return scale, zero

    def stored(self, step: Tensor) -> Tensor:
        """Scales as they are stored, from positive ones in float64, or 0."""
        return _fake.kept(step, self.format)

    # codes

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """The codes [N, K] of the values nearest to a weight: int8, uint8 of 0 .. 15, or float8_e4m3fn."""
        shared = self.group < 0
        made, size = [], max(1, AT_ONCE // weight.shape[1])
        for at, rows in enumerate(checked(weight).split(size)):
            here = slice(None) if shared else slice(at * size, at * size + size)
            x = self.grouped(rows)
            x = x if zero is None else x - zero[here].double()[..., None]
            x = x / scale[here].double()[..., None]
            # codes of nf4 are what its levels are found by
            codes = self.codes_of(x if self.format == "nf4" else self.nearest(x))
            made.append(codes.flatten(1)[:, : weight.shape[1]])
        return torch.cat(made)

    def values(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """The values [N, K] of codes, computed in `dtype`."""
        value = self.grouped(self.levels(codes)).to(dtype) * scale.to(dtype)[..., None]
        value = value if zero is None else value + zero.to(dtype)[..., None]
        return value.flatten(1)[:, : codes.shape[1]]

    # parts

    def pack(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Parts:
        """Codes [N, K] and their scales as they are stored."""
        if self.bits == 8:
            return Parts(codes, scale, zero)
        columns = codes.shape[1]
        behind = self.groups(columns) * self.width(columns) - columns
        last = None if zero is None else zero[:, -1:]
        nothing = self.codes(torch.zeros_like(codes[:, :1]), scale[:, -1:], last)
        codes = torch.cat([codes, nothing.expand(-1, behind)], 1)
        return Parts(_quantized.pack_nibbles(codes), scale, zero)

    def unpack(self, parts: Parts, columns: int) -> Tensor:
        """The codes [N, K] of what is stored."""
        return parts.q if self.bits == 8 else _quantized.unpack_nibbles(parts.q)[:, :columns]

    def quantize(self, weight: Tensor, scales: Scales | None = None) -> Parts:
        """The parts of a weight, each element rounded to the nearest value."""
        scale, zero = self.scales(weight) if scales is None else scales
        return self.pack(self.codes(weight, scale, zero), scale, zero)

    def dense(self, parts: Parts, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The weight [N, K] that parts stand for, computed in `dtype`."""
        return self.values(self.unpack(parts, columns), parts.scale, parts.zero, dtype)


def checked(weight: Tensor) -> Tensor:
    """The weight, detached; OptionError where it is no matrix of finite real numbers."""
    if weight.ndim != 2 or not weight.numel() or weight.is_complex():
        raise OptionError(f"the weight is {weight.dtype} {list(weight.shape)}, expected real numbers [N, K]")
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        raise OptionError(
            f"the weight holds {int((~finite).sum())} values that are not finite, the first at [{row}, "
            f"{column}], expected finite ones"
        )
    return weight.detach()
