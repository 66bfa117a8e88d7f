"""The Triton kernels of a norm whose rows are quantized at once, and their launch.

Shapes     x, r, h, q: [N, C] after flattening; w, b: [C]; scale: [N] in fp32.
Numerics   statistics by the sums that `_rows` makes; the normalised value is rounded to x.dtype, as a norm of
           its own would store it, and from there on all is as `_quantized_rows` has it.
Cost       x (and r) read once, q (and h) written. Rows above MAX_FORWARD are read three times, the second and
           third time from L2: what is the largest is known after the statistics are, and q after that.
Limits     2**31 on C; offsets are 64-bit. No float64.
"""

import torch
from torch import Tensor

from fxaccel.kernels import _quantized, _rows
from fxaccel.kernels._quantized_rows import _bytes, _largest, _rounded, _scales
from fxaccel.kernels._rows import _affine, _load
from fxaccel.kernels._triton import tl, triton


@triton.jit
def _normed(z, rstd, w_ptr, b_ptr, x_ptr, col, inside, offset, ROUND_FIRST: tl.constexpr):
    """The norm of centred z: [ROWS, BLOCK] as it would be stored, in fp32."""
    y = _affine(z * rstd[:, None], w_ptr, b_ptr, x_ptr, col, inside, offset, ROUND_FIRST)
    return y.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def rows_kernel(
    x_ptr, r_ptr, w_ptr, b_ptr, h_ptr, q_ptr, scale_ptr, N, C, x_stride, r_stride, eps, offset,
    CENTRED: tl.constexpr, ROUND_FIRST: tl.constexpr, TOP: tl.constexpr, WHOLE: tl.constexpr,
    LEAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # row * C passes 2**31
    col = tl.arange(0, BLOCK)
    live, inside = row < N, col < C
    mask = live[:, None] & inside[None, :]
    at = row[:, None] * C + col[None, :]
    x_at = row[:, None] * x_stride + col[None, :]
    r_at = row[:, None] * r_stride + col[None, :]
    z = _load(x_ptr, r_ptr, x_at, r_at, mask)
    if h_ptr is not None:
        tl.store(h_ptr + at, z.to(h_ptr.dtype.element_ty), mask)
    if CENTRED:
        mean = tl.sum(z, axis=1) / C
        z = tl.where(mask, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(z * z, axis=1) / C + eps)  # masked lanes hold 0 and add nothing
    # masked lanes hold 0 here too, or NaN where rstd is not finite and the whole row is NaN
    y = _normed(z, rstd, w_ptr, b_ptr, x_ptr, col, inside, offset, ROUND_FIRST)
    a, bad = _largest(y, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.int32))
    scale, factor = _scales(a, bad, LEAST, TOP)
    if ROWS > 1:  # of one row after q: each of the two orders makes the other case spill on sm_90
        tl.store(scale_ptr + row, scale, live)
    tl.store(q_ptr + at, _rounded(y * factor[:, None], TOP, WHOLE), mask)
    if ROWS == 1:
        tl.store(scale_ptr + row, scale, live)


@triton.jit
def _piece(x_ptr, r_ptr, row, start, N, C, x_stride, r_stride, BLOCK: tl.constexpr):
    """Columns from `start` on of rows: x + r in fp32, where they are in q and h, and masks."""
    col = start + tl.arange(0, BLOCK)
    inside = col < C
    mask = (row < N)[:, None] & inside[None, :]
    x_at = row[:, None] * x_stride + col[None, :]
    r_at = row[:, None] * r_stride + col[None, :]
    return _load(x_ptr, r_ptr, x_at, r_at, mask), col, inside, mask, row[:, None] * C + col[None, :]


@triton.jit
def wide_rows_kernel(
    x_ptr, r_ptr, w_ptr, b_ptr, h_ptr, q_ptr, scale_ptr, N, C, x_stride, r_stride, eps, offset,
    CENTRED: tl.constexpr, ROUND_FIRST: tl.constexpr, TOP: tl.constexpr, WHOLE: tl.constexpr,
    LEAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, in pieces of BLOCK columns: for the statistics, for the maximum, for q."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < N
    mean = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)  # sum of (x - mean)**2 so far; of x**2 if not CENTRED
    for start in range(0, C, BLOCK):
        z, _, _, mask, at = _piece(x_ptr, r_ptr, row, start, N, C, x_stride, r_stride, BLOCK)
        if h_ptr is not None:
            tl.store(h_ptr + at, z.to(h_ptr.dtype.element_ty), mask)
        if CENTRED:
            count = tl.minimum(C - start, BLOCK)
            piece = tl.sum(z, axis=1) / count
            z = tl.where(mask, z - piece[:, None], 0.0)
            shift = piece - mean
            mean += shift * count / (start + count)
            square += shift * shift * start * (count / (start + count))
        square += tl.sum(z * z, axis=1)
    rstd = tl.rsqrt(square / C + eps)
    a, bad = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.int32)
    for start in range(0, C, BLOCK):
        z, col, inside, mask, _ = _piece(x_ptr, r_ptr, row, start, N, C, x_stride, r_stride, BLOCK)
        z -= mean[:, None]
        y = _normed(z, rstd, w_ptr, b_ptr, x_ptr, col, inside, offset, ROUND_FIRST)
        a, bad = _largest(tl.where(mask, y, 0.0), a, bad)
    scale, factor = _scales(a, bad, LEAST, TOP)
    tl.store(scale_ptr + row, scale, live)
    for start in range(0, C, BLOCK):
        z, col, inside, mask, at = _piece(x_ptr, r_ptr, row, start, N, C, x_stride, r_stride, BLOCK)
        z -= mean[:, None]
        y = _normed(z, rstd, w_ptr, b_ptr, x_ptr, col, inside, offset, ROUND_FIRST)
        tl.store(q_ptr + at, _rounded(y * factor[:, None], TOP, WHOLE), mask)


def launch_rows(
    x: Tensor,
    r: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    offset: float,
    dtype: torch.dtype,
    *,
    centred: bool,
    round_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, scale, and h, which is empty where there is no r."""
    c, top = x.shape[-1], _quantized.TOP[dtype]
    q = x.new_empty(x.shape, dtype=dtype)
    h = None if r is None else x.new_empty(x.shape)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if x.numel():
        rows, residual = _rows.flat(x), None if r is None else _rows.flat(r)
        w, b = _rows._contiguous(w, b)
        n, config = len(rows), _rows.forward_config(c)
        kernel = wide_rows_kernel if config.wide else rows_kernel
        kernel[(-(-n // config.rows),)](
            rows, residual, w, b, h, _bytes(q), scale, n, c, rows.stride(0),
            0 if residual is None else residual.stride(0), eps, offset,
            CENTRED=centred, ROUND_FIRST=round_first, TOP=top, WHOLE=dtype == torch.int8,
            LEAST=_quantized.LEAST, ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    else:
        scale.fill_(_quantized.LEAST / top)
    return q, scale, x.new_empty(0) if h is None else h
