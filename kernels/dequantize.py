"""w = dequantize(w, scale, zero, format, group, columns, dtype): the weight that is stored in 8 or 4 bits.

    int8, float8: w * scale;  int4: (code - 8) * scale + zero;  nf4: NF4[code] * scale

Shapes     w: [N, columns] of int8 or float8_e4m3fn; of int4 and nf4 uint8 [N, G * group / 2], the even column
           in the low nibble; scale, zero: [N, G] or [1, 1], G = ceil(columns / group), of any float dtype; no
           zero is 0, and only int4 has one. Returns [N, columns] in `dtype`.
Numerics   fp32 (fp64 for fp64), one rounding at the end.
Cost       a read of w and a write of the result; on the CPU three to six passes.
Limits     PyTorch's operators on every device: weight_only_linear is what multiplies without the result. No
           derivative: one that is asked for raises.
Source     int4: the convention of PyTorch's _weight_int4pack_mm; nf4: Dettmers et al. 2023, arXiv:2305.14314.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxaccel.kernels import _operator, _quantized
from fxaccel.kernels._norm import DTYPES


def reference(
    w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The meaning of this op: what every test compares with."""
    kind = _quantized.wide(dtype)
    column = torch.arange(columns, device=w.device)
    each = (column // group) % scale.shape[1]  # the group of a column; all are of one where scale is [1, 1]
    if format in _quantized.GROUPED:
        code = w[:, column // 2] >> (column % 2 * 4).to(torch.uint8) & 15
        table = range(-8, 8) if format == "int4" else _quantized.NF4
        value = torch.tensor(table, dtype=kind, device=w.device)[code.long()]
    else:
        value = w.to(kind)
    value = value * scale.to(kind)[:, each]
    return (value if zero is None else value + zero.to(kind)[:, each]).to(dtype)


def unsupported(
    w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, columns: int, dtype: torch.dtype
) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    yield from _quantized.odd(w, scale, zero, format, group, columns)
    if dtype not in DTYPES:
        yield f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"


def compose(
    w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The kernel on every device."""
    return _quantized.dequantized(w, scale, zero, format, group, columns, dtype)


def _fake(
    w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, columns: int, dtype: torch.dtype
) -> Tensor:
    return w.new_empty((w.shape[0], columns), dtype=dtype)


op = _operator.define(
    "dequantize(Tensor w, Tensor scale, Tensor? zero, str format, int group, int columns, ScalarType dtype)"
    " -> Tensor",
    cpu=compose,
    cuda=compose,
    fake=_fake,
)
_quantized.no_derivative(op)
