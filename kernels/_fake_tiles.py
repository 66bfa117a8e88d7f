"""The Triton kernels of fake_quantize and its derivative, and their launch.

Shapes     w, v, dy, dw: [N, K]; scale, zero: [N, G]; sums, beyond: [N, G]. By one scale everything is one
           row, in groups of TILE elements that share it.
Numerics   fp32. Products and sums are not fused, so that v is that of the CPU bit for bit.
Cost       w is read once and v written; in the derivative dy and w are read once and dw written. A program
           takes a tile of whole groups, or one group in pieces.
Limits     2**31 on K; offsets are 64-bit. No float64.
"""

from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels import _fake, _quantized
from fxaccel.kernels._triton import next_power_of_2, tl, triton

TILE = 2_048  # elements that a program has in registers at a time: of twice as many some spill


@triton.jit
def _whole(t):
    """t to the nearest whole number, ties to even, below 2**22."""
    return (t + 12582912.0) - 12582912.0


@triton.jit
def _level(x, table_ptr, LOW: tl.constexpr, TOP: tl.constexpr, FORMAT: tl.constexpr):
    """The level nearest to x, ties to the even code; a NaN stays one."""
    if FORMAT == "nf4":
        level = tl.zeros(x.shape, tl.float32) + tl.load(table_ptr)
        for i in tl.static_range(1, 16):  # levels, then the bounds below each but the first
            level = tl.where(x > tl.load(table_ptr + 15 + i), tl.load(table_ptr + i), level)
    elif FORMAT == "float8":
        t = tl.minimum(tl.maximum(x, LOW), TOP)
        power = (t.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(power, 0.015625) * 0.125  # 8 steps from a power of two to the next
        level = _whole(tl.div_rn(t, step)) * step
    else:
        level = _whole(tl.minimum(tl.maximum(x, LOW), TOP))
    return tl.where(x != x, x, level)


@triton.jit
def _scales(scale_ptr, zero_ptr, i, live, ZEROS: tl.constexpr, ONE: tl.constexpr):
    """The scales and zeros of groups, as columns."""
    at = i * 0 if ONE else i
    scale = tl.load(scale_ptr + at, live, other=1.0).to(tl.float32)
    zero = scale * 0.0
    if ZEROS:
        zero = tl.load(zero_ptr + at, live, other=0.0).to(tl.float32)
    return scale[:, None], zero[:, None]


@triton.jit
def _units(w_ptr, at, mask, scale, zero, ZEROS: tl.constexpr):
    """w in units of its scales."""
    x = tl.load(w_ptr + at, mask, other=0.0).to(tl.float32)
    if ZEROS:
        x = x - zero
    return tl.div_rn(x, tl.broadcast_to(scale, x.shape))


@triton.jit
def forward_kernel(
    w_ptr, scale_ptr, zero_ptr, table_ptr, v_ptr, COUNT, G, K, GROUP, LOW: tl.constexpr, TOP: tl.constexpr,
    FORMAT: tl.constexpr, ZEROS: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS of COUNT groups a program."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = i < COUNT
    scale, zero = _scales(scale_ptr, zero_ptr, i, live, ZEROS, ONE)
    first = ((i % G) * GROUP)[:, None]  # column of a group
    for start in range(0, GROUP, BLOCK):
        within = start + tl.arange(0, BLOCK)[None, :]
        mask = live[:, None] & (within < GROUP) & (first + within < K)
        at = (i // G)[:, None] * K + first + within
        level = _level(_units(w_ptr, at, mask, scale, zero, ZEROS), table_ptr, LOW, TOP, FORMAT)
        v = level * scale
        if ZEROS:
            v = v + zero
        tl.store(v_ptr + at, v, mask)


@triton.jit
def backward_kernel(
    dy_ptr, w_ptr, scale_ptr, zero_ptr, table_ptr, dw_ptr, sums_ptr, beyond_ptr, COUNT, G, K, GROUP,
    LOW: tl.constexpr, TOP: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr, FORMAT: tl.constexpr,
    ZEROS: tl.constexpr, SCALES: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS of COUNT groups a program, with the sums of each."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = i < COUNT
    scale, zero = _scales(scale_ptr, zero_ptr, i, live, ZEROS, ONE)
    first = ((i % G) * GROUP)[:, None]
    sums, beyond = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, GROUP, BLOCK):
        within = start + tl.arange(0, BLOCK)[None, :]
        mask = live[:, None] & (within < GROUP) & (first + within < K)
        at = (i // G)[:, None] * K + first + within
        x = _units(w_ptr, at, mask, scale, zero, ZEROS)
        dy = tl.load(dy_ptr + at, mask, other=0.0).to(tl.float32)
        moves = (x > BELOW) & (x < ABOVE)
        tl.store(dw_ptr + at, tl.where(moves, dy, 0.0), mask)
        if SCALES:  # beyond the last column dy is 0
            level = _level(x, table_ptr, LOW, TOP, FORMAT)
            sums += tl.sum(dy * tl.where(moves, level - x, level), axis=1)
            if ZEROS:
                beyond += tl.sum(tl.where(moves, 0.0, dy), axis=1)
    if SCALES:
        tl.store(sums_ptr + i, sums, live)
        if ZEROS:
            tl.store(beyond_ptr + i, beyond, live)


def _laid(w: Tensor, format: str, group: int, zeros: bool) -> tuple[int, dict[str, Any]]:
    """The number of programs, and the sizes and constants that both kernels take."""
    one = group < 0
    n, k, width = (1, w.numel(), TILE) if one else (*w.shape, group)
    each = -(-k // width)
    block = min(TILE, next_power_of_2(width))
    rows = max(1, min(64, TILE // block))
    sizes = {"COUNT": n * each, "G": each, "K": k, "GROUP": width}
    low = _fake.LOW if zeros else -_fake.TOP[format]
    options = {
        "LOW": low, "TOP": _fake.TOP[format], "FORMAT": format, "ZEROS": zeros, "ONE": one, "ROWS": rows,
        "BLOCK": block, "num_warps": 8, "enable_fp_fusion": False,
    }  # fmt: skip
    return -(-n * each // rows), sizes | options


def _table(like: Tensor, format: str) -> Tensor:
    """Levels and bounds of nf4; of no other format is it read."""
    if format != "nf4":
        return like
    bounds = _fake.normal_float(torch.float32)
    return _quantized.constant((*_quantized.NF4, *bounds), torch.float32, like.device)


def launch(w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int) -> Tensor:
    """v, by scales that are given."""
    v = w.new_empty(w.shape)
    if w.numel():
        scale, zero = _fake.in_force(scale, zero, format)
        programs, options = _laid(w, format, group, zero is not None)
        forward_kernel[(programs,)](
            w.contiguous(), scale.contiguous(), scale if zero is None else zero.contiguous(),
            _table(w, format), v, **options,
        )  # fmt: skip
    return v


def launch_backward(
    dy: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, scales: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dw, and where `scales` the gradients of scale and zero."""
    dw, zeros = w.new_empty(w.shape), zero is not None
    programs, options = _laid(w, format, group, zeros)
    count = options["COUNT"] if scales else 0
    sums, beyond = (w.new_empty(n, dtype=torch.float32) for n in (count, count if zeros else 0))
    held, middle = _fake.in_force(scale, zero, format)
    below, above = _fake.reach(format, zeros)
    backward_kernel[(programs,)](
        dy.contiguous(), w.contiguous(), held.contiguous(), held if middle is None else middle.contiguous(),
        _table(w, format), dw, sums, beyond, **options, BELOW=below, ABOVE=above, SCALES=scales,
    )  # fmt: skip
    if not scales:
        return dw, w.new_empty(0), w.new_empty(0)
    if group < 0:
        sums, beyond = (t.sum().view(1, 1) for t in (sums, beyond))
    else:
        sums, beyond = sums.view(len(w), -1), beyond.view(len(w), -1) if zeros else beyond
    return dw, *_fake.shared(sums, beyond, w, scale, zero, format, group)
