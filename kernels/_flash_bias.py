"""The gradients of the tables that a bias adds: dS, summed over what each table does not tell apart.

Shapes     a table read at some of b, h, q and k, or at b, h and the relative place k - q + S - 1.
Numerics   sums in fp32, in one order: one owner an output, then a sum over the owners' parts.
Cost       dS is computed anew for each read; along diagonals, twice over.
"""

from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels._flash_backward import probabilities, row_values
from fxaccel.kernels._flash_tiles import tile
from fxaccel.kernels._score import gradient_forms
from fxaccel.kernels._triton import tl, triton


@triton.jit
def _score_gradient(
    b, h, top, edge, q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, seed_ptr, tables, strides,
    q_steps, k_steps, v_steps, dout_steps, H, G, S, T, scale, softcap, low, high, dropout, keep_scale,
    D: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dS of queries top + m and keys edge + n of one head; `edge` may be below 0."""
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    g = h // (H // G)
    row = b * H + h
    q = tile(q_ptr + b * q_steps[0] + h * q_steps[1], top, q_steps[2], S, D, BLOCK_M, BLOCK_D, DOT)
    dout_ptr += b * dout_steps[0] + h * dout_steps[1]
    dout = tile(dout_ptr, top, dout_steps[2], S, E, BLOCK_M, BLOCK_E, DOT)
    k = tile(k_ptr + b * k_steps[0] + g * k_steps[1], edge, k_steps[2], T, D, BLOCK_N, BLOCK_D, DOT, True)
    v = tile(v_ptr + b * v_steps[0] + g * v_steps[1], edge, v_steps[2], T, E, BLOCK_N, BLOCK_E, DOT, True)
    lse, delta = row_values(lse_ptr + row * S, delta_ptr + row * S, top + tl.arange(0, BLOCK_M), S)
    place = (b, h, S, T, scale, softcap, low, high, tables, strides)
    _, ds, _ = probabilities(
        q, k, dout, v, lse[:, None], delta[:, None], m, n, top, edge, place,
        row, seed_ptr, dropout, keep_scale, MASK, BIAS, True, PRECISION,
    )  # fmt: skip
    return tl.where(edge + n >= 0, ds, 0.0)


@triton.jit
def live(lse_ptr, b, h, top, H, S, FLAT: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether a block of queries takes part. With FLAT few do: those with a finite lse."""
    if FLAT:
        row = top + tl.arange(0, BLOCK_M)
        lse = tl.load(lse_ptr + (b * H + h) * S + row, row < S, other=float("inf"))
        return tl.min(lse, axis=0) < float("inf")
    else:
        return True


@triton.jit(do_not_specialize=["S", "T", "low", "high"])
def bias_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, seed_ptr, tables, strides, dbias_ptr,
    q_steps, k_steps, v_steps, dout_steps, H, G, S, T, scale, softcap, low, high, dropout, keep_scale,
    HEADS, ALL_B, ALL_H, FLAT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dS in fp32, one S x T tile a program, summed over the batches and heads that share the table's matrix.

    There are HEADS matrices a batch, and each serves ALL_B batches and ALL_H heads. A table that is not read
    at q (not ROWS) or at k (not COLS) gets one partial sum a tile: [tiles, T] or [S, tiles].
    """
    rows, cols = tl.cdiv(S, BLOCK_M), tl.cdiv(T, BLOCK_N)
    pid = tl.program_id(0)
    matrix = pid // (rows * cols)
    top, edge = pid // cols % rows * BLOCK_M, pid % cols * BLOCK_N
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    shares = ALL_B * ALL_H
    if low is not None:  # a tile that no query sees
        shares = tl.where(edge + BLOCK_N - 1 < top + low, 0, shares)
    if high is not None:
        shares = tl.where(edge > top + BLOCK_M - 1 + high, 0, shares)
    for share in range(0, shares):
        b = (matrix // HEADS + share // ALL_H).to(tl.int64)
        h = (matrix % HEADS + share % ALL_H).to(tl.int64)
        if live(lse_ptr, b, h, top, H, S, FLAT, BLOCK_M):
            acc += _score_gradient(
                b, h, top, edge, q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, seed_ptr, tables, strides,
                q_steps, k_steps, v_steps, dout_steps, H, G, S, T,
                scale, softcap, low, high, dropout, keep_scale,
                D, E, MASK, BIAS, PRECISION, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
            )  # fmt: skip
    row, col = top + tl.arange(0, BLOCK_M)[:, None], edge + tl.arange(0, BLOCK_N)[None, :]
    tall, wide = S, T
    if not ROWS:
        acc = tl.sum(acc, axis=0)[None, :]
        row, tall = top // BLOCK_M + tl.full((1, 1), 0, tl.int32), rows
    if not COLS:
        acc = tl.sum(acc, axis=1)[:, None]
        col, wide = edge // BLOCK_N + tl.full((1, 1), 0, tl.int32), cols
    at = (matrix.to(tl.int64) * tall + row) * wide + col
    tl.store(dbias_ptr + at, acc, (row < tall) & (col < wide))


@triton.jit(do_not_specialize=["S", "T", "low", "high"])
def relative_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, seed_ptr, tables, strides, dbias_ptr,
    q_steps, k_steps, v_steps, dout_steps, H, G, S, T, scale, softcap, low, high, dropout, keep_scale,
    HEADS, ALL_B, ALL_H, FLAT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dS of BLOCK_N relative places first .. a program, as a square whose diagonals, wrapped, hold one each.

    Going down BLOCK_M = BLOCK_N queries, these places move right by as many keys: they are the part of one
    tile on and above its diagonal and the part below it of the next, and entry m, n of the two laid over each
    other is always at the place first + (n - m) % BLOCK_N.
    """
    blocks = tl.cdiv(S + T - 1, BLOCK_N)
    matrix = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_N
    least = first - (S - 1)  # of k - q
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    start = tl.maximum(1 - least - BLOCK_N, 0) // BLOCK_M * BLOCK_M
    stop = tl.minimum(S, T - least)
    if low is not None:
        stop = tl.where(least + BLOCK_N - 1 < low, 0, stop)
    if high is not None:
        stop = tl.where(least > high, 0, stop)
    for share in range(0, ALL_B * ALL_H):
        b = (matrix // HEADS + share // ALL_H).to(tl.int64)
        h = (matrix % HEADS + share % ALL_H).to(tl.int64)
        for at in range(start // BLOCK_M * 2, tl.cdiv(stop, BLOCK_M) * 2):
            top, next_tile = at // 2 * BLOCK_M, at % 2
            edge = top + least + next_tile * BLOCK_N
            if live(lse_ptr, b, h, top, H, S, FLAT, BLOCK_M):
                ds = _score_gradient(
                    b, h, top, edge, q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, seed_ptr,
                    tables, strides, q_steps, k_steps, v_steps, dout_steps, H, G, S, T,
                    scale, softcap, low, high, dropout, keep_scale,
                    D, E, MASK, BIAS, PRECISION, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
                )  # fmt: skip
                acc += tl.where((n < m) == (next_tile > 0), ds, 0.0)
    at = tl.program_id(0).to(tl.int64) * BLOCK_M * BLOCK_N + m * BLOCK_N + n
    tl.store(dbias_ptr + at, acc)


def unsupported(bias: str, index: int) -> str | None:
    """Why table `index` has no gradient, if it has none."""
    try:
        gradient_forms(bias, index)
    except NotImplementedError as reason:
        return str(reason)
    return None


def gradient(p: Any, given: dict[str, Any], table: Tensor, form: tuple[str, ...]) -> Tensor:
    """The gradient of one read of a table, in fp32, of the table's shape."""
    batches, heads = p.b if "b" in form else 1, p.h if "h" in form else 1
    shares = {"HEADS": heads, "ALL_B": p.b // batches, "ALL_H": p.h // heads, "FLAT": p.flat}
    if "relative" in form:
        made = _relative(p, given, batches, heads, shares)
        order = ["b", "h", "relative"]
    else:
        made = _tiles(p, given, batches, heads, shares, "q" in form, "k" in form)
        order = ["b", "h", "q", "k"]
    used = [order.index(x) for x in form if x != "0"]
    made = made.permute(*used, *(i for i in range(made.ndim) if i not in used))
    sizes = iter(made.shape)
    made = made.reshape([1 if x == "0" else next(sizes) for x in form])
    if made.shape == table.shape:
        return made
    whole = made.new_zeros(table.shape)  # entries that no query or key reads
    whole[tuple(slice(n) for n in made.shape)] = made
    return whole


def _tiles(
    p: Any, given: dict[str, Any], batches: int, heads: int, shares: dict[str, int], rows: bool, cols: bool
) -> Tensor:
    config = p.config("bias")
    tall, wide = -(-p.s // config.m), -(-p.t // config.n)
    shape = (batches, heads, p.s if rows else tall, p.t if cols else wide)
    dbias = p.q.new_empty(shape, dtype=torch.float32)
    bias_gradient_kernel[(tall * wide * batches * heads,)](
        dbias_ptr=dbias, **given, **shares, ROWS=rows, COLS=cols, **p.options(config)
    )
    dbias = dbias if rows else dbias.sum(2, keepdim=True)
    return dbias if cols else dbias.sum(3, keepdim=True)


def _relative(p: Any, given: dict[str, Any], batches: int, heads: int, shares: dict[str, int]) -> Tensor:
    config = p.config("relative")
    n = config.n
    blocks = -(-(p.s + p.t - 1) // n)
    squares = p.q.new_empty(batches, heads, blocks, n, n, dtype=torch.float32)
    relative_gradient_kernel[(blocks * batches * heads,)](
        dbias_ptr=squares, **given, **shares, **p.options(config, below=True)
    )
    at = torch.arange(n, device=squares.device)
    at = ((at[:, None] + at) % n).expand_as(squares)
    return squares.gather(-1, at).sum(-2).flatten(2)[..., : p.s + p.t - 1]
