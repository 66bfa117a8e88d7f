"""The Triton kernels of fxaccel::butterfly and their launch: every factor of a row in one launch.

Shapes     x: [N, C], zeros up to n = 2**L; twiddle: [stacks, L, n/2, 2, 2]; y, dy: [N, out].
Numerics   loads are cast to fp32, everything is fp32, each output rounds once at its store.
Cost       forward reads x once a stack and writes y; a row stays in registers. backward computes the inputs
           of the factors again into a scratch, [L, ROWS, n] fp32 a program, and adds its share of
           twiddle's gradient to a buffer of its own, which a second reduction sums: the result does not
           depend on the order in which programs run.
Limits     MAX features, in registers; MAX_AMD on AMD.
Source     Dao et al. 2019, arXiv:1903.05895.
"""

from functools import lru_cache

import torch
from torch import Tensor

from fxaccel.kernels import _rows
from fxaccel.kernels._triton import tl, triton

MAX = 4096  # features of a row that one program keeps in registers
MAX_AMD = 1024  # there: with more, the backward pass spills
TILE = 2048  # elements of a tile of rows
MAX_ROWS = 16  # of a tile
PROGRAMS = 64  # of a backward pass: each has a gradient of the whole twiddle, 2 n L fp32


def limit() -> int:
    """Features of a row, up to which one launch holds it on this installation's GPUs."""
    return MAX_AMD if torch.version.hip else MAX


@triton.jit
def _place(column, L: tl.constexpr, REVERSED: tl.constexpr):
    """The feature of x that the first factor reads at `column`: with its bits reversed, or not."""
    place = column
    if REVERSED:
        place = column * 0
        for bit in tl.static_range(L):
            place += ((column >> bit) & 1) << (L - 1 - bit)
    return place


@triton.jit
def _factor(ptr, i: tl.constexpr, HALF: tl.constexpr, FROM: tl.constexpr):
    """Entry FROM, of four, of the matrix of each pair of factor i: [1, D, s]."""
    s: tl.constexpr = 2**i
    at = ptr + i * HALF * 4 + tl.arange(0, HALF) * 4 + FROM
    return tl.reshape(tl.load(at).to(tl.float32), (1, HALF // s, s))


@triton.jit
def _apart(x, i: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The halves of each pair of x [ROWS, n], as [ROWS, D, s]."""
    s: tl.constexpr = 2**i
    return tl.split(tl.permute(tl.reshape(x, (ROWS, HALF // s, 2, s)), (0, 1, 3, 2)))


@triton.jit
def _together(x0, x1, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The reverse of _apart."""
    return tl.reshape(tl.permute(tl.join(x0, x1), (0, 1, 3, 2)), (ROWS, 2 * HALF))


@triton.jit
def _pass(x, ptr, i: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Factor i on x [ROWS, n]."""
    x0, x1 = _apart(x, i, ROWS, HALF)
    y0 = _factor(ptr, i, HALF, 0) * x0 + _factor(ptr, i, HALF, 1) * x1
    y1 = _factor(ptr, i, HALF, 2) * x0 + _factor(ptr, i, HALF, 3) * x1
    return _together(y0, y1, ROWS, HALF)


@triton.jit
def forward_kernel(
    x_ptr, t_ptr, b_ptr, y_ptr, N, C, OUT, x_stride,
    L: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one stack a program."""
    stack = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 2 * HALF)
    place = _place(column, L, REVERSED)
    live = (row < N)[:, None]
    x = tl.load(x_ptr + (row * x_stride)[:, None] + place[None, :], live & (place < C)[None, :], other=0.0)
    x = x.to(tl.float32)
    factors = t_ptr + stack * L * HALF * 4
    for i in tl.static_range(L):
        x = _pass(x, factors, i, ROWS, HALF)
    feature = stack * 2 * HALF + column
    inside = feature < OUT
    if b_ptr is not None:
        x += tl.load(b_ptr + feature, inside, other=0.0).to(tl.float32)[None, :]
    at = (row * OUT)[:, None] + feature[None, :]
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), live & inside[None, :])


@triton.jit
def _add(ptr, value, i: tl.constexpr, HALF: tl.constexpr, AT: tl.constexpr):
    """Add a gradient summed over rows, of one entry of every matrix of factor i, to this program's buffer."""
    at = ptr + i * HALF * 4 + tl.arange(0, HALF) * 4 + AT
    tl.store(at, tl.load(at) + tl.reshape(tl.sum(value, axis=0), (HALF,)))


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, t_ptr, dx_ptr, dt_ptr, scratch_ptr, N, C, OUT, x_stride, dy_stride,
    L: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Programs stride over tiles of ROWS rows of one stack; dt starts at 0, each program has its own."""
    stack = tl.program_id(1)
    own = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + stack
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, 2 * HALF)
    place = _place(column, L, REVERSED)
    feature = stack * 2 * HALF + column
    factors = t_ptr + stack * L * HALF * 4
    dt = dt_ptr + own * L * HALF * 4
    tile = lane[:, None] * 2 * HALF + column[None, :]
    scratch = scratch_ptr + own * L * ROWS * 2 * HALF
    for start in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        row = (start + lane).to(tl.int64)
        live = (row < N)[:, None]
        x_at = (row * x_stride)[:, None] + place[None, :]
        x = tl.load(x_ptr + x_at, live & (place < C)[None, :], other=0.0).to(tl.float32)
        for i in tl.static_range(L):
            tl.store(scratch + i * ROWS * 2 * HALF + tile, x)
            if i < L - 1:
                x = _pass(x, factors, i, ROWS, HALF)
        tl.debug_barrier()  # what is read below may have been written by other lanes of this program
        dy_at = (row * dy_stride)[:, None] + feature[None, :]
        g = tl.load(dy_ptr + dy_at, live & (feature < OUT)[None, :], other=0.0).to(tl.float32)
        for j in tl.static_range(L):
            x0, x1 = _apart(tl.load(scratch + (L - 1 - j) * ROWS * 2 * HALF + tile), L - 1 - j, ROWS, HALF)
            g0, g1 = _apart(g, L - 1 - j, ROWS, HALF)
            _add(dt, g0 * x0, L - 1 - j, HALF, 0)  # rows over the end have a g of 0
            _add(dt, g0 * x1, L - 1 - j, HALF, 1)
            _add(dt, g1 * x0, L - 1 - j, HALF, 2)
            _add(dt, g1 * x1, L - 1 - j, HALF, 3)
            g = _together(
                _factor(factors, L - 1 - j, HALF, 0) * g0 + _factor(factors, L - 1 - j, HALF, 2) * g1,
                _factor(factors, L - 1 - j, HALF, 1) * g0 + _factor(factors, L - 1 - j, HALF, 3) * g1,
                ROWS, HALF,
            )  # fmt: skip
        dx_at = ((stack * N + row) * C)[:, None] + place[None, :]
        tl.store(dx_ptr + dx_at, g.to(dx_ptr.dtype.element_ty), live & (place < C)[None, :])
        tl.debug_barrier()  # the next rows write to the scratch and add to what other lanes have stored


@lru_cache
def _cut(n: int) -> tuple[int, int]:
    """Rows of a tile, and warps: 16 elements a lane, for a gradient and a factor's input are kept at once."""
    rows = max(1, min(MAX_ROWS, TILE // n))
    return rows, max(1, rows * n // 512)


def launch_forward(x: Tensor, twiddle: Tensor, b: Tensor | None, out: int, reversed: bool = False) -> Tensor:
    """y in one launch."""
    levels, half = twiddle.shape[1:3]
    y = x.new_empty((*x.shape[:-1], out))
    if y.numel():
        flat = _rows.flat(x)
        rows, warps = _cut(2 * half)
        forward_kernel[(-(-len(flat) // rows), -(-out // (2 * half)))](
            flat, twiddle.contiguous(), None if b is None else b.contiguous(), y,
            *flat.shape, out, flat.stride(0),
            L=levels, ROWS=rows, HALF=half, REVERSED=reversed, num_warps=warps,
        )  # fmt: skip
    return y


def launch_backward(dy: Tensor, x: Tensor, twiddle: Tensor, reversed: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x and twiddle."""
    stacks, levels, half = twiddle.shape[:3]
    grads, flat = _rows.flat(dy), _rows.flat(x)
    rows, warps = _cut(2 * half)
    programs = max(1, min(PROGRAMS // stacks, -(-len(flat) // rows)))
    dt = torch.zeros((programs, *twiddle.shape), dtype=torch.float32, device=x.device)
    kind = x.dtype if stacks == 1 else torch.float32
    dx = torch.empty((stacks, *flat.shape), dtype=kind, device=x.device)
    if len(flat):
        scratch = torch.empty(programs * stacks * levels * rows * 2 * half, device=x.device)
        backward_kernel[(programs, stacks)](
            grads, flat, twiddle.contiguous(), dx, dt, scratch, *flat.shape, dy.shape[-1], flat.stride(0),
            grads.stride(0), L=levels, ROWS=rows, HALF=half, REVERSED=reversed, num_warps=warps,
        )  # fmt: skip
    total = dx[0] if stacks == 1 else dx.sum(0)
    return total.to(x.dtype).view(x.shape), dt.sum(0).to(twiddle.dtype)
