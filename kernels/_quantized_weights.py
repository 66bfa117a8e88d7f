"""The Triton kernels of fxaccel::weight_only_linear and its gradient, and their launch.

Shapes     x: [M, K]; w: [N, K], of 4 bits [N, G * group / 2]; scale, zero: [N, G] or [1, 1]; y, dy: [M, N].
Numerics   a tile of W is dequantized in fp32 and rounded to x.dtype; sums in fp32, one rounding at the store.
           fp32 is multiplied as exactly as eager mode does.
Cost       plain tiles of many rows. Of FEW rows, y has too few tiles to fill a GPU: columns are split into
           parts, each program writes its sums in fp32, and a second kernel adds the parts up in their order:
           the result does not depend on the order in which programs run. Where a tile is in one group
           (`one`), its scale is loaded once a row, else once for each byte.
Limits     offsets into x, w and y are 64-bit. No float64.
"""

from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels import _gemm, _quantized, _rows
from fxaccel.kernels._quantized_gemm import unpacked
from fxaccel.kernels._triton import next_power_of_2, tl, triton

FEW = 32  # rows up to which columns are split
PARTS = 16  # the most of them
CODES = {"int8": 0, "float8": 1, "int4": 2, "nf4": 3}


def config(m: int, n: int, k: int, itemsize: int, plain: bool = True) -> _gemm.Config:
    """Tiles of y: rows of x, rows of w, and columns of both at once.

    plain    a tile has one scale a row, and rows are aligned: else scales, or addresses, take the registers
    """
    if not plain:
        return _gemm.Config(max(16, min(32, next_power_of_2(m))), 32, 32, 2 * itemsize, 2)
    rows = max(16, min(64 if itemsize == 4 else 128, next_power_of_2(m)))
    columns = 32 if itemsize == 4 else 64
    if rows >= 64 and itemsize == 2 and -(-m // rows) * -(-n // 128) >= _gemm.FULL // 2:
        columns = 128
    depth = max(32, min(128 // itemsize, next_power_of_2(k)))
    return _gemm.Config(
        rows, columns, depth, 8 if rows * columns >= 8192 else 4, 2 if torch.version.hip else 3
    )


def split(m: int, n: int, k: int, cut: _gemm.Config) -> int:
    """Into how many parts the columns are cut: enough programs for a GPU, and 4 tiles a part at least."""
    if m > FEW:
        return 1
    wanted = -(-_gemm.FULL // -(-n // cut.columns))
    return max(1, min(PARTS, wanted, k // (4 * cut.depth)))


@triton.jit
def _codes(w_ptr, table_ptr, row, start, stored, live, BK: tl.constexpr, FORMAT: tl.constexpr):
    """Numbers [BN, BK] of a stored tile in fp32, before their scale; row: offsets of w's rows."""
    if FORMAT < 2:
        k = start + tl.arange(0, BK)
        byte = tl.load(w_ptr + row[:, None] + k[None, :], live[:, None] & (k < stored)[None, :], other=0)
        value = (unpacked(byte) if FORMAT == 1 else byte).to(tl.float32)
    else:
        at = start // 2 + tl.arange(0, BK // 2)
        byte = tl.load(w_ptr + row[:, None] + at[None, :], live[:, None] & (at < stored)[None, :], other=0)
        code = tl.interleave(byte & 15, byte >> 4)
        value = tl.load(table_ptr + code.to(tl.int32)) if FORMAT == 3 else code.to(tl.float32) - 8.0
    return value


@triton.jit
def _tile(
    w_ptr, scale_ptr, zero_ptr, table_ptr, n, start, N, K, stored, group, w_stride, scale_n, scale_g, zero_n,
    zero_g, BK: tl.constexpr, FORMAT: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """The weights [BN, BK] of rows n and columns from `start` on, in fp32."""
    live = n < N
    wide = n.to(tl.int64)
    value = _codes(w_ptr, table_ptr, wide * w_stride, start, stored, live, BK, FORMAT)
    if ONE:
        g = start // group
        scale = tl.load(scale_ptr + wide * scale_n + g * scale_g, live, other=0.0).to(tl.float32)
        value *= scale[:, None]
        if zero_ptr is not None:
            value += tl.load(zero_ptr + wide * zero_n + g * zero_g, live, other=0.0).to(tl.float32)[:, None]
    else:
        k = start + tl.arange(0, BK)
        inside = live[:, None] & (k < K)[None, :]
        g = (k // group)[None, :]
        scale = tl.load(scale_ptr + wide[:, None] * scale_n + g * scale_g, inside, other=0.0)
        value *= scale.to(tl.float32)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + wide[:, None] * zero_n + g * zero_g, inside, other=0.0)
            value += zero.to(tl.float32)
    return value


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, table_ptr, b_ptr, y_ptr, M, N, K, stored, group, part, x_stride,
    w_stride, scale_n, scale_g, zero_n, zero_g, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FORMAT: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of y a program, of the columns of one part: y is [parts, M, N]."""
    down = tl.cdiv(M, BM)  # tiles of the same rows of w are neighbours: these are what L2 is to keep
    m = (tl.program_id(0) % down) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) // down) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * part
    live, inside_y = m < M, n < N
    row = m.to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(first, tl.minimum(first + part, K), BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], live[:, None] & (k < K)[None, :], other=0.0)
        w = _tile(
            w_ptr, scale_ptr, zero_ptr, table_ptr, n, start, N, K, stored, group, w_stride, scale_n, scale_g,
            zero_n, zero_g, BK, FORMAT, ONE,
        )  # fmt: skip
        w = tl.trans(w.to(x.dtype))
        acc = tl.dot(x.to(DOT), w.to(DOT), acc, input_precision=PRECISION)
    if b_ptr is not None:
        acc += tl.load(b_ptr + n, inside_y, other=0.0).to(tl.float32)[None, :]
    at = (tl.program_id(1).to(tl.int64) * M + row)[:, None] * N + n[None, :]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), live[:, None] & inside_y[None, :])


@triton.jit
def sum_kernel(parts_ptr, b_ptr, y_ptr, parts, elements, N, BLOCK: tl.constexpr):
    """BLOCK elements of y a program: the parts in their order, then b."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + part * elements + at, inside, other=0.0)
    if b_ptr is not None:
        total += tl.load(b_ptr + at % N, inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    dy_ptr, w_ptr, scale_ptr, zero_ptr, table_ptr, dx_ptr, M, N, K, stored, group, dy_stride, w_stride,
    scale_n, scale_g, zero_n, zero_g, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FORMAT: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BK] of dx a program: the rows of w in turn."""
    down = tl.cdiv(M, BM)
    m = (tl.program_id(0) % down) * BM + tl.arange(0, BM)
    start = (tl.program_id(0) // down) * BK
    live = m < M
    row = m.to(tl.int64)
    acc = tl.zeros((BM, BK), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        dy = tl.load(
            dy_ptr + row[:, None] * dy_stride + n[None, :], live[:, None] & (n < N)[None, :], other=0.0
        )
        w = _tile(
            w_ptr, scale_ptr, zero_ptr, table_ptr, n, start, N, K, stored, group, w_stride, scale_n, scale_g,
            zero_n, zero_g, BK, FORMAT, ONE,
        )  # fmt: skip
        acc = tl.dot(dy.to(DOT), w.to(dy.dtype).to(DOT), acc, input_precision=PRECISION)
    k = start + tl.arange(0, BK)
    tl.store(
        dx_ptr + row[:, None] * K + k[None, :],
        acc.to(dx_ptr.dtype.element_ty),
        live[:, None] & (k < K)[None, :],
    )


def _one(scale: Tensor, zero: Tensor | None, group: int, depth: int) -> bool:
    """Whether `depth` columns from a multiple of it on are in one group."""
    single = scale.shape[1] == 1 and (zero is None or zero.shape[1] == 1)
    return single or group % depth == 0


def _stored(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    format: str,
    group: int,
    columns: int,
    depth: int,
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Pointers, numbers and constants that describe the weight to a kernel."""
    w = w if w.stride(1) == 1 else w.contiguous()
    w = w.view(torch.uint8) if format == "float8" else w
    table = _quantized.constant(_quantized.NF4, torch.float32, x.device) if format == "nf4" else None
    steps: list[int] = []
    for t in (scale, zero):
        steps += (
            (0, 0) if t is None else (s * (size > 1) for s, size in zip(t.stride(), t.shape, strict=True))
        )
    constants = {"FORMAT": CODES[format], "ONE": _one(scale, zero, group, depth), **_gemm.products(x)}
    return [w, scale, zero, table], [w.shape[1], group, w.stride(0), *steps], constants


def launch(
    x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, b: Tensor | None, format: str, group: int
) -> Tensor:
    """y [..., N]."""
    n = len(w)
    y = x.new_empty((*x.shape[:-1], n))
    if not y.numel():
        return y
    flat = _rows.flat(x)
    m, k = flat.shape
    cut = config(m, n, k, x.itemsize)
    if k % 16 or not _one(scale, zero, group, cut.depth):
        cut = config(m, n, k, x.itemsize, plain=False)
    pointers, (stored, group, *strides), constants = _stored(x, w, scale, zero, format, group, k, cut.depth)
    parts = split(m, n, k, cut)
    part = (-(-k // parts) + cut.depth - 1) // cut.depth * cut.depth
    b = None if b is None else b.contiguous()
    into = y if parts == 1 else x.new_empty(parts, m, n, dtype=torch.float32)
    linear_kernel[(-(-m // cut.rows) * -(-n // cut.columns), parts)](
        flat, *pointers, b if parts == 1 else None, into, m, n, k, stored, group, part, flat.stride(0),
        *strides, BM=cut.rows, BN=cut.columns, BK=cut.depth, num_warps=cut.warps,
        num_stages=cut.stages, **constants,
    )  # fmt: skip
    if parts > 1:
        sum_kernel[(-(-(m * n) // 512),)](into, b, y, parts, m * n, n, BLOCK=512, num_warps=4)
    return y


def launch_backward(
    dy: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, columns: int
) -> Tensor:
    """dx [..., columns]."""
    dx = dy.new_empty((*dy.shape[:-1], columns))
    if not dx.numel():
        return dx
    flat = _rows.flat(dy)
    m, n = flat.shape
    cut = config(m, columns, n, dy.itemsize)
    if n % 16 or columns % 16 or not _one(scale, zero, group, min(64, cut.columns)):
        cut = config(m, columns, n, dy.itemsize, plain=False)
    depth = min(64, cut.columns)
    pointers, (stored, group, *strides), constants = _stored(
        dy, w, scale, zero, format, group, columns, depth
    )
    backward_kernel[(-(-m // cut.rows) * -(-columns // depth),)](
        flat, *pointers, dx, m, n, columns, stored, group, flat.stride(0), *strides,
        BM=cut.rows, BN=cut.depth, BK=depth, num_warps=cut.warps, num_stages=cut.stages, **constants,
    )  # fmt: skip
    return dx
