"""The Triton kernels that quantize by rows, and by one scale, and their launch.

Shapes     x: [N, K] after flattening; q: [N, K]; scale: [N].
Numerics   fp32; divisions and rounding as IEEE has them, so that q is that of the CPU bit for bit.
Cost       x is read once and q written. Rows above ROW_MAX are read twice, the second time from L2. float8 is
           rounded and encoded with integers: 10 operations an element, and the same on every GPU, of which
           few have an instruction for it.
Limits     2**31 on K; offsets are 64-bit. No float64.
"""

import torch
from torch import Tensor

from fxaccel.kernels import _quantized, _rows
from fxaccel.kernels._triton import next_power_of_2, tl, triton

ROW_MAX = 16_384  # columns that one program keeps in registers
TILE = 4_096  # elements of a tile of short rows, and of the flat kernel's


def config(k: int) -> _rows.Config:
    """Whole rows of a tile's elements, or one row in pieces."""
    block = next_power_of_2(k)
    if block > ROW_MAX:
        return _rows.Config(1, TILE, 8, True)
    return _rows.Config(max(1, min(32, TILE // block)), block, max(4, block // 1024), False)


@triton.jit
def _whole(t):
    """t to the nearest whole number, ties to even, below 2**22: beyond 2**23 fp32 holds no other."""
    return (t + 12582912.0) - 12582912.0


@triton.jit
def _rounded(t, TOP: tl.constexpr, WHOLE: tl.constexpr):
    """t within -TOP to TOP, to nearest, ties to even: as int8, or the byte of float8_e4m3fn."""
    t = tl.minimum(tl.maximum(t, -TOP), TOP)
    if WHOLE:
        q = _whole(t).to(tl.int8)
    else:
        size = tl.abs(t)
        bits = size.to(tl.int32, bitcast=True)
        bits = (bits + 524287 + ((bits >> 20) & 1)) >> 20  # of 23 bits after the point 3 stay
        small = _whole(size * 512.0).to(tl.int32)  # below 2**-6 the step is 2**-9
        bits = tl.where(size < 0.015625, small, bits - 960)  # exponents differ by 127 - 7
        q = (bits | ((t.to(tl.int32, bitcast=True) >> 24) & 128)).to(tl.uint8)
    return q


@triton.jit
def _largest(x, a, bad):
    """The largest absolute value of rows so far, and whether one is NaN, which a maximum may leave out."""
    return tl.maximum(a, tl.max(tl.abs(x), axis=1)), tl.maximum(bad, tl.max((x != x).to(tl.int32), axis=1))


@triton.jit
def _scales(a, bad, LEAST: tl.constexpr, TOP: tl.constexpr):
    """The scale of rows, and what they are multiplied by."""
    a = tl.where(bad > 0, float("nan"), tl.maximum(a, LEAST))
    top = tl.full(a.shape, TOP, tl.float32)
    return tl.div_rn(a, top), tl.div_rn(top, a)


@triton.jit
def rows_kernel(
    x_ptr, q_ptr, scale_ptr, N, K, x_stride, TOP: tl.constexpr, WHOLE: tl.constexpr, LEAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # row * K passes 2**31
    col = tl.arange(0, BLOCK)
    live = row < N
    mask = live[:, None] & (col < K)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask, other=0.0).to(tl.float32)
    a, bad = _largest(x, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.int32))
    scale, factor = _scales(a, bad, LEAST, TOP)
    tl.store(scale_ptr + row, scale, live)
    q = _rounded(x * factor[:, None], TOP, WHOLE)
    tl.store(q_ptr + row[:, None] * K + col[None, :], q, mask)


@triton.jit
def wide_rows_kernel(
    x_ptr, q_ptr, scale_ptr, N, K, x_stride, TOP: tl.constexpr, WHOLE: tl.constexpr, LEAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, in pieces of BLOCK columns: once for the maximum, once (from L2) for q."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < N
    a, bad = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.int32)
    for start in range(0, K, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = live[:, None] & (col < K)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask, other=0.0).to(tl.float32)
        a, bad = _largest(x, a, bad)
    scale, factor = _scales(a, bad, LEAST, TOP)
    tl.store(scale_ptr + row, scale, live)
    for start in range(0, K, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = live[:, None] & (col < K)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask, other=0.0).to(tl.float32)
        q = _rounded(x * factor[:, None], TOP, WHOLE)
        tl.store(q_ptr + row[:, None] * K + col[None, :], q, mask)


@triton.jit
def tensor_kernel(x_ptr, q_ptr, scale_ptr, N, TOP: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < N, other=0.0).to(tl.float32)
    t = tl.div_rn(x, tl.full(x.shape, 0.0, tl.float32) + tl.load(scale_ptr).to(tl.float32))
    t = tl.where(t != t, 0.0, t)
    tl.store(q_ptr + at, _rounded(t, TOP, WHOLE), at < N)


def _bytes(q: Tensor) -> Tensor:
    return q if q.dtype == torch.int8 else q.view(torch.uint8)


def launch_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q and scale."""
    q = x.new_empty(x.shape, dtype=dtype)
    if not x.numel():
        return q, x.new_full((*x.shape[:-1], 1), _quantized.LEAST, dtype=torch.float32) / _quantized.TOP[
            dtype
        ]
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    flat = _rows.flat(x)
    n, k = flat.shape
    cut = config(k)
    kernel = wide_rows_kernel if cut.wide else rows_kernel
    kernel[(-(-n // cut.rows),)](
        flat, _bytes(q), scale, n, k, flat.stride(0), TOP=_quantized.TOP[dtype], WHOLE=dtype == torch.int8,
        LEAST=_quantized.LEAST, ROWS=cut.rows, BLOCK=cut.block, num_warps=cut.warps,
    )  # fmt: skip
    return q, scale


def launch_tensor(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q."""
    q = x.new_empty(x.shape, dtype=dtype)
    n = x.numel()
    if n:
        tensor_kernel[(-(-n // TILE),)](
            x.contiguous(), _bytes(q), scale, n, TOP=_quantized.TOP[dtype], WHOLE=dtype == torch.int8,
            BLOCK=TILE, num_warps=4,
        )  # fmt: skip
    return q
