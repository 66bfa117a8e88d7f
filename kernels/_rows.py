"""The Triton kernels of the norms over the last dimension, forward and backward, and their launch.

Shapes     x, r, h, y, dy, dh, dx: [N, C] after flattening; w, b: [C]; mean, rstd: [N] in fp32.
Numerics   loads are cast to fp32, all sums are fp32, each output rounds once at its store.
Cost       forward reads x (and r) once and writes y (and h); backward reads dy, h (and dh) and writes dx.
           The weight's gradient adds one [programs, C] fp32 buffer, summed by a second reduction: the
           result does not depend on the order in which programs run.
Limits     none on C: above MAX_FORWARD and MAX_BACKWARD a row is read twice in pieces of WIDE columns.
Source     Zhang & Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450; variance by pieces:
           Chan et al. 1983, "Algorithms for computing the sample variance".
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxaccel.kernels._triton import next_power_of_2, tl, triton

MAX_FORWARD = 16_384  # columns that one program keeps in registers
MAX_BACKWARD = 16_384  # bytes of a row, here: the next row and two gradients are kept too
TILE = 2_048  # elements of a tile of short rows
WIDE = 2_048  # columns of a piece of a long row


class Config(NamedTuple):
    """How one launch cuts its rows: a tile is ROWS x BLOCK, and `wide` rows take several tiles."""

    rows: int
    block: int
    warps: int
    wide: bool


def forward_config(c: int) -> Config:
    """16 elements a lane of short rows: with weight and bias they fit into 64 registers."""
    block = next_power_of_2(c)
    if block > MAX_FORWARD:
        return Config(1, 2 * WIDE, 8, True)
    return Config(max(1, min(32, TILE // block)), block, max(4, block // 1024), False)


def backward_config(c: int, itemsize: int) -> Config:
    """As many in half precision, 8 in fp32: two gradients are kept, and the next tile is on its way."""
    block = next_power_of_2(c)
    if block * itemsize > MAX_BACKWARD:
        return Config(4, WIDE // 2, 8, True)
    return Config(max(1, min(32, 2 * TILE // itemsize // block)), block, max(4, block // 512), False)


@triton.jit
def _load(x_ptr, r_ptr, x_at, r_at, mask):
    """A tile of x, or of x + r as the unfused add would round it, in fp32."""
    x = tl.load(x_ptr + x_at, mask, other=0.0)
    f = x.to(tl.float32)
    if r_ptr is not None:
        f += tl.load(r_ptr + r_at, mask, other=0.0).to(tl.float32)
        f = f.to(x.dtype).to(tl.float32)
    return f


@triton.jit
def _affine(z, w_ptr, b_ptr, y_ptr, col, inside, offset, ROUND_FIRST: tl.constexpr):
    """z * (w + offset) + b, where z: [ROWS, BLOCK]; ROUND_FIRST rounds z to y's dtype before."""
    if ROUND_FIRST:
        z = z.to(y_ptr.dtype.element_ty).to(tl.float32)
    if w_ptr is not None:
        w = tl.load(w_ptr + col, inside, other=0.0).to(tl.float32) + offset
        z = z * w[None, :]
    if b_ptr is not None:
        z += tl.load(b_ptr + col, inside, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def forward_kernel(
    x_ptr, r_ptr, w_ptr, b_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, N, C, x_stride, r_stride, eps, offset,
    CENTRED: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean, live)
    rstd = tl.rsqrt(tl.sum(z * z, axis=1) / C + eps)  # masked lanes hold 0 and add nothing
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, live)
    y = _affine(z * rstd[:, None], w_ptr, b_ptr, y_ptr, col, inside, offset, ROUND_FIRST)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def wide_forward_kernel(
    x_ptr, r_ptr, w_ptr, b_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, N, C, x_stride, r_stride, eps, offset,
    CENTRED: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, in pieces of BLOCK columns: once for the statistics, once (from L2) for y."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < N
    mean = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)  # sum of (x - mean)**2 so far; of x**2 if not CENTRED
    for start in range(0, C, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = live[:, None] & (col < C)[None, :]
        x_at = row[:, None] * x_stride + col[None, :]
        r_at = row[:, None] * r_stride + col[None, :]
        z = _load(x_ptr, r_ptr, x_at, r_at, mask)
        if CENTRED:
            count = tl.minimum(C - start, BLOCK)
            piece = tl.sum(z, axis=1) / count
            z = tl.where(mask, z - piece[:, None], 0.0)
            shift = piece - mean
            mean += shift * count / (start + count)
            square += shift * shift * start * (count / (start + count))
        square += tl.sum(z * z, axis=1)
    rstd = tl.rsqrt(square / C + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, live)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, live)
    for start in range(0, C, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < C
        mask = live[:, None] & inside[None, :]
        at = row[:, None] * C + col[None, :]
        x_at = row[:, None] * x_stride + col[None, :]
        r_at = row[:, None] * r_stride + col[None, :]
        z = _load(x_ptr, r_ptr, x_at, r_at, mask)
        if h_ptr is not None:
            tl.store(h_ptr + at, z.to(h_ptr.dtype.element_ty), mask)
        z = (z - mean[:, None]) * rstd[:, None]  # mean stays 0 if not CENTRED
        y = _affine(z, w_ptr, b_ptr, y_ptr, col, inside, offset, ROUND_FIRST)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _load_gradient(dy_ptr, h_ptr, row, col, N, C):
    """The tiles of dy and h at the given rows, as stored; 0 outside."""
    mask = (row < N)[:, None] & (col < C)[None, :]
    at = row[:, None] * C + col[None, :]
    return tl.load(dy_ptr + at, mask, other=0.0), tl.load(h_ptr + at, mask, other=0.0)


@triton.jit
def backward_kernel(  # noqa: C901  absent pointers are compile-time branches
    dy_ptr, dh_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, db_ptr, N, C, offset,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs stride over tiles of ROWS whole rows and keep their share of dw and db in registers."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    step = tl.num_programs(0) * ROWS
    lane = tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = col < C
    if w_ptr is not None:
        w = tl.load(w_ptr + col, inside, other=0.0).to(tl.float32) + offset
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    dy_next, h_next = _load_gradient(dy_ptr, h_ptr, first + lane, col, N, C)
    for start in range(first, N, step):
        row = start + lane
        live = row < N
        dy, z = dy_next.to(tl.float32), h_next.to(tl.float32)
        dy_next, h_next = _load_gradient(dy_ptr, h_ptr, row + step, col, N, C)  # hides its latency
        rstd = tl.load(rstd_ptr + row, live, other=0.0)[:, None]
        if mean_ptr is not None:
            z -= tl.load(mean_ptr + row, live, other=0.0)[:, None]
        z = tl.where(inside[None, :], z * rstd, 0.0)
        if dw_ptr is not None:
            dw += dy * z
        if db_ptr is not None:
            db += dy
        u = dy
        if w_ptr is not None:
            u = dy * w[None, :]
        dx = u - z * (tl.sum(u * z, axis=1) / C)[:, None]
        if mean_ptr is not None:
            dx -= (tl.sum(u, axis=1) / C)[:, None]
        dx *= rstd
        mask = live[:, None] & inside[None, :]
        at = row[:, None] * C + col[None, :]
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + at, mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)
    slot = tl.program_id(0) * C + col
    if dw_ptr is not None:
        tl.store(dw_ptr + slot, tl.sum(dw, axis=0), inside)
    if db_ptr is not None:
        tl.store(db_ptr + slot, tl.sum(db, axis=0), inside)


@triton.jit
def wide_backward_kernel(  # noqa: C901, PLR0915  absent pointers are compile-time branches
    dy_ptr, dh_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, db_ptr, N, C, offset,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As backward_kernel for long rows: pieces of BLOCK columns, and dw and db kept in their buffers.

    A buffer starts at 0 and belongs to one program; ROWS rows share each read and write of it.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    step = tl.num_programs(0) * ROWS
    for start in range(first, N, step):
        row = start + tl.arange(0, ROWS)
        live = row < N
        rstd = tl.load(rstd_ptr + row, live, other=0.0)[:, None]
        mean = tl.zeros((ROWS, 1), tl.float32)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row, live, other=0.0)[:, None]
        sum_u = tl.zeros((ROWS,), tl.float32)
        sum_uz = tl.zeros((ROWS,), tl.float32)
        for left in range(0, C, BLOCK):
            col = left + tl.arange(0, BLOCK)
            dy, h = _load_gradient(dy_ptr, h_ptr, row, col, N, C)
            u = dy.to(tl.float32)
            if w_ptr is not None:
                u *= (tl.load(w_ptr + col, col < C, other=0.0).to(tl.float32) + offset)[None, :]
            z = (h.to(tl.float32) - mean) * rstd
            sum_u += tl.sum(u, axis=1)  # u is 0 outside, so z there does not matter
            sum_uz += tl.sum(u * z, axis=1)
        for left in range(0, C, BLOCK):
            col = left + tl.arange(0, BLOCK)
            inside = col < C
            mask = live[:, None] & inside[None, :]
            at = row[:, None] * C + col[None, :]
            dy, h = _load_gradient(dy_ptr, h_ptr, row, col, N, C)
            dy = dy.to(tl.float32)
            z = (h.to(tl.float32) - mean) * rstd
            slot = tl.program_id(0).to(tl.int64) * C + col
            if dw_ptr is not None:
                dw = tl.load(dw_ptr + slot, inside, other=0.0)
                tl.store(dw_ptr + slot, dw + tl.sum(dy * z, axis=0), inside)
            if db_ptr is not None:
                db = tl.load(db_ptr + slot, inside, other=0.0)
                tl.store(db_ptr + slot, db + tl.sum(dy, axis=0), inside)
            u = dy
            if w_ptr is not None:
                u *= (tl.load(w_ptr + col, inside, other=0.0).to(tl.float32) + offset)[None, :]
            dx = u - z * (sum_uz / C)[:, None]
            if mean_ptr is not None:
                dx -= (sum_u / C)[:, None]
            dx *= rstd
            if dh_ptr is not None:
                dx += tl.load(dh_ptr + at, mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)
        tl.debug_barrier()  # the next rows add to what other lanes of this program have stored


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: few enough that every program takes several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


def flat(x: Tensor) -> Tensor:
    """x [..., C] as [N, C] with unit stride along C: a view where x allows one."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def launch_forward(
    x: Tensor,
    r: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    offset: float = 0.0,
    *,
    centred: bool,
    round_first: bool = False,
    save: bool = False,
) -> tuple[Any, ...]:
    """y, then h if there is an r, then mean and rstd if they are to be saved (mean only if centred)."""
    c = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = None if r is None else torch.empty_like(y)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) if save else None
    mean = torch.empty_like(rstd) if rstd is not None and centred else None
    if x.numel():
        rows, residual = flat(x), None if r is None else flat(r)
        w, b = _contiguous(w, b)
        n, config = len(rows), forward_config(c)
        kernel = wide_forward_kernel if config.wide else forward_kernel
        kernel[(-(-n // config.rows),)](
            rows, residual, w, b, y, h, mean, rstd, n, c, rows.stride(0),
            0 if residual is None else residual.stride(0), eps, offset,
            CENTRED=centred, ROUND_FIRST=round_first,
            ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    return y, h, mean, rstd


def launch_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    w: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float = 0.0,
    *,
    weight_grad: bool,
    bias_grad: bool = False,
) -> tuple[Any, ...]:
    """dx (dh included), then the gradients of w and b in fp32 where asked for."""
    c = h.shape[-1]
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    n, config = h.numel() // max(c, 1), backward_config(c, h.itemsize)
    tiles = -(-n // config.rows)
    programs = min(tiles, _multiprocessors(h.device) * max(1, 16 // config.warps))
    allocate = torch.zeros if config.wide or not n else torch.empty
    shape: tuple[int, int] = (programs, c)
    kind: dict[str, Any] = {"dtype": torch.float32, "device": h.device}
    dw = allocate(shape, **kind) if weight_grad else None
    db = allocate(shape, **kind) if bias_grad else None
    if h.numel():
        dy, dh, h, w = _contiguous(dy, dh, h, w)
        kernel = wide_backward_kernel if config.wide else backward_kernel
        kernel[(programs,)](
            dy, dh, h, w, mean, rstd, dx, dw, db, n, c, offset,
            ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    return dx, None if dw is None else dw.sum(0), None if db is None else db.sum(0)
