"""Stored weights as PyTorch's CPU kernels read them, each form made when a call first asks for it.

Shapes     x: [M, K]; w, scale, zero as weight_only_linear has them.
Cost       codes are read at each call, and win at FEW rows where memory is what a call waits for, and where
           oneDNN's call costs more than its work; else the dense weight does, dequantized once. On one thread
           of an AMD EPYC with AVX-512 BF16 and VNNI, torch 2.13, 2026-11-22, us at 1 and 4 rows, bf16 as
           oneDNN lays it out beside int4 in groups of 64: 512 x 512 40, 49 beside 19, 31; 1024 x 1024 52, 69
           beside 58, 103; 4096 x 4096 2380, 1680 beside 930, 1580. int8 is as int4, and where large loses
           from 3 rows on. Without instructions for bf16 the dense weight is kept, and multiplied, in fp32,
           and codes win up to MORE rows: of int4 1024 x 1024 at 8 rows 400 beside 197, at 32 937 beside 792.
Limits     PyTorch's kernel of int8 reads out of bounds where K is no multiple of what it handles at once;
           int4 asks for groups of PACKED and N a multiple of 16. Of fp32 rows both are 10 to 100 times
           slower: they are for bf16 alone.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fxaccel.kernels import _quantized

FEW = 4  # rows up to which a small weight, and a large one of int4, is read as it is stored
FEW_BYTES = 2  # the same of a large one of int8
MORE = 16  # rows, where nothing multiplies bf16
SMALL = 2**18  # elements up to which oneDNN's call costs more than its work
LARGE = 2**23  # elements from which the dense weight comes from memory at each call
PACKED = (32, 64, 128, 256)


@lru_cache
def multiplies_bfloat16() -> bool:
    """Whether the processor does, and oneDNN with it."""
    has = torch.cpu.get_capabilities()
    able = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return bool(able and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def computed(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a product of `dtype` is fastest in: fp32 also holds sums of half precision."""
    low = dtype.itemsize == 2 and not (dtype == torch.bfloat16 and multiplies_bfloat16())
    return torch.float32 if low else dtype


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """F.linear, sums in fp32, of a dense weight: in x's dtype, or in fp32 after rounding to it."""
    if w.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise.default(x, w, b, "none", [], "")
    if w.dtype == x.dtype:
        return F.linear(x, w, b)
    return F.linear(x.to(w.dtype), w, None if b is None else b.to(w.dtype)).to(x.dtype)


class Kept:
    """A stored weight, and each form of it once a call has asked for that."""

    def __init__(self, w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int):
        """Nothing is made yet: the rows of a call and their dtype say what is wanted."""
        self.stored = w, scale, zero, format, group
        self.forms: dict[tuple[torch.dtype, int], Tensor] = {}
        self.small: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, b: Tensor | None) -> Tensor:
        """The linear of x."""
        rows, columns = x.shape[:-1].numel(), x.shape[-1]
        if x.dtype == torch.bfloat16 and self.few(rows, columns):
            y = self.read(x.reshape(rows, columns)).view(*x.shape[:-1], len(self.stored[0]))
            return y if b is None else y.add_(b)
        return linear(x, self.dense(x.dtype, columns), b)

    def few(self, rows: int, columns: int) -> bool:
        """Whether PyTorch's kernels read this weight as it is stored, and win at so many rows."""
        w, scale, _, format, group = self.stored
        if format == "int4":
            fits = group in PACKED and columns % group == 0 and len(w) % 16 == 0 and scale.shape[0] == len(w)
        else:
            fits = format == "int8" and columns % 32 == 0 and len(w) % 16 == 0 and scale.shape[1] == 1
        if not (fits and rows and len(w) and columns):
            return False
        if not multiplies_bfloat16():
            return rows <= MORE
        elements = len(w) * columns
        large = FEW if format == "int4" else FEW_BYTES
        return rows <= (FEW if elements <= SMALL else large if elements >= LARGE else 0)

    def read(self, x: Tensor) -> Tensor:
        """x [M, K] by the weight as it is stored."""
        w, scale, zero, format, group = self.stored
        if format == "int8":
            if self.small is None:
                self.small = w.contiguous(), scale.to(torch.bfloat16).reshape(-1).expand(len(w)).contiguous()
            return torch._weight_int8pack_mm(x.contiguous(), *self.small)
        if self.small is None:
            codes = _quantized.unpack_nibbles(w).to(torch.int32)
            zero = torch.zeros_like(scale) if zero is None else zero.expand_as(scale)
            pairs = (
                torch.stack([scale, zero], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
            )  # [G, N, 2]
            self.small = torch._convert_weight_to_int4pack_for_cpu(codes, 1), pairs
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), self.small[0], group, self.small[1])

    def dense(self, dtype: torch.dtype, columns: int) -> Tensor:
        """The dequantized weight for rows of `dtype`, in oneDNN's layout where that is bf16."""
        if (dtype, columns) not in self.forms:
            w, scale, zero, format, group = self.stored
            made = _quantized.dequantized(w, scale, zero, format, group, columns, dtype).to(computed(dtype))
            if made.dtype == torch.bfloat16 and made.numel():
                made = torch.ops.mkldnn._reorder_linear_weight(made, None)
            self.forms[dtype, columns] = made
        return self.forms[dtype, columns]
