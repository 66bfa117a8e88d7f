"""The Triton kernels of attention, forward and backward, and their launch.

Shapes     q: [B, H, S, D]; k: [B, G, T, D]; v: [B, G, T, E]; bias: broadcasts to [B, H, S, T]; out, dout:
           [B, H, S, E]; lse, delta: [B, H, S] in fp32. Query head h reads head h // (H // G) of k and v.
Numerics   products take the operands' dtype and add in fp32; softmax in fp32, base 2; P and dS are rounded to
           the operands' dtype before their products, as in FlashAttention. Each output rounds once.
Cost       one pass over k and v for each BLOCK_M queries; backward recomputes P from lse and never stores
           S x T values. Causal work is skipped by blocks; only blocks on the diagonal or an edge are masked.
Limits     D, E <= 256. Each output has one owner: no atomics, the same bits on every run. fp32 with D above
           64 is right but not fast: its tiles do not fit the registers.
Source     Dao 2023, "FlashAttention-2", arXiv:2307.08691; Milakov & Gimelshein 2018, arXiv:1805.02867 (the
           running softmax); Ainslie et al. 2023, arXiv:2305.13245 (grouped heads).
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxaccel.kernels._triton import next_power_of_2, tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # finite: a row of such scores is a uniform one, a row of -inf an empty one


class Config(NamedTuple):
    """Queries and keys a block, and how a program runs."""

    m: int
    n: int
    warps: int
    stages: int


# Blocks without register spills, by head size up to 64, 128 and 256; a bias needs registers of its own.
# tests/kernels/test_compilation.py holds each to it.
HOPPER = {
    "forward": (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 32, 8, 2)),
    "forward, bias": (Config(64, 64, 8, 3), Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    "keys": (Config(32, 64, 8, 2), Config(32, 64, 8, 2), Config(32, 32, 8, 1)),
    "keys, bias": (Config(32, 32, 8, 1), Config(32, 32, 4, 1), Config(32, 32, 8, 1)),
    "queries": (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 4, 1)),
    "queries, bias": (Config(64, 32, 4, 1), Config(64, 64, 8, 2), Config(32, 32, 8, 1)),
    "bias": (Config(64, 32, 8, 1), Config(32, 16, 4, 1), Config(16, 32, 4, 1)),
}
AMPERE = HOPPER | {"forward": (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 2))}
AMD = {
    "forward": (Config(128, 64, 4, 1), Config(128, 32, 4, 1), Config(64, 32, 4, 1)),
    "keys": (Config(32, 64, 4, 1), Config(32, 64, 4, 1), Config(16, 32, 4, 1)),
    "queries": (Config(64, 64, 4, 1), Config(64, 32, 4, 1), Config(32, 32, 4, 1)),
    "bias": (Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
}
TABLES = {"hopper": HOPPER, "ampere": AMPERE, "amd": AMD}
# fp32 products are three TF32 ones on NVIDIA: the tiles, split in two, spill registers above D = 64
FLOAT32 = {
    "forward": (Config(32, 32, 4, 1), Config(16, 16, 4, 1), Config(16, 16, 8, 1)),
    "keys": (Config(32, 16, 4, 1), Config(16, 16, 4, 1), Config(16, 16, 8, 1)),
    "queries": (Config(32, 32, 8, 1), Config(16, 16, 4, 1), Config(16, 16, 8, 1)),
    "bias": (Config(32, 16, 4, 1), Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
}


@lru_cache
def chip(device: torch.device) -> str:
    """The table of this device; the interpreter, on the CPU, takes the first."""
    if torch.version.hip:
        return "amd"
    newer = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    return "hopper" if newer else "ampere"


def choose(kernel: str, width: int, itemsize: int, biased: bool, chip: str) -> Config:
    """The blocks of "forward", "keys", "queries" or "bias" for heads of `width`, the wider of D and E."""
    table = FLOAT32 if itemsize == 4 else TABLES[chip]
    kernel = f"{kernel}, bias" if biased and f"{kernel}, bias" in table else kernel
    return table[kernel][(width > 64) + (width > 128)]


@triton.jit
def _head(pid, H, G):
    """Batch, query head and key head of flat head `pid`, in int64: they multiply strides."""
    b = (pid // H).to(tl.int64)
    h = (pid % H).to(tl.int64)
    return b, h, h // (H // G)


@triton.jit
def _tile(ptr, top, stride, N, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr):
    """Rows top, top + 1, ... of a matrix with D columns: [ROWS, BLOCK_D] in DOT, 0 outside.

    The tile's place is an int64 scalar; offsets within it fit 32 bits and half the registers.
    """
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = top + row < N
    if D < BLOCK_D:
        mask = mask & (col < D)
    return tl.load(ptr + tl.cast(top, tl.int64) * stride + (row * stride + col), mask, other=0.0).to(DOT)


@triton.jit
def _scores(
    left, right, m, n, top, edge, S, T, scale, bias_ptr, bias_m, bias_n,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of queries top + m and keys edge + n; -inf where a query may not look.

    [M, N] of q: [M, D] and k: [N, D] with m: [M, 1] and n: [1, N]; or all of it transposed, [N, M] of k and
    q with m: [1, M] and n: [N, 1].
    """
    s = tl.dot(left, tl.trans(right), input_precision=PRECISION) * (scale * LOG2E)
    if bias_ptr is not None:
        inside = (top + m < S) & (edge + n < T)
        bias_ptr += tl.cast(top, tl.int64) * bias_m + tl.cast(edge, tl.int64) * bias_n
        at = m * bias_m + n * bias_n
        if bias_ptr.dtype.element_ty == tl.uint8:
            s = tl.where(tl.load(bias_ptr + at, inside, other=0) != 0, s, float("-inf"))
        else:
            bias = tl.load(bias_ptr + at, inside, other=0.0).to(tl.float32)
            shut = bias == float("-inf")
            # finfo.min times log2(e) is out of range, yet a key to be seen if there is no other
            s = tl.where(shut, float("-inf"), tl.maximum(s + bias * LOG2E, LOWEST))
    if MASKED:
        seen = edge + n < T
        if CAUSAL:
            seen = seen & (top + m >= edge + n)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _attend(
    acc, total, peak, q, top, left, right, S, T, D: tl.constexpr, E: tl.constexpr, scale,
    k_ptr, k_t, v_ptr, v_t, bias_ptr, bias_m, bias_n,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Fold the keys left .. right into the running softmax of a block of queries."""
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    for edge in range(left, right, BLOCK_N):
        k = _tile(k_ptr, edge, k_t, T, D, BLOCK_N, BLOCK_D, DOT)
        s = _scores(
            q, k, m, n, top, edge, S, T, scale, bias_ptr, bias_m, bias_n,
            CAUSAL, MASKED, PRECISION,
        )  # fmt: skip
        above = tl.maximum(peak, tl.max(s, axis=1))
        base = tl.where(above == float("-inf"), 0.0, above)  # no key yet: exp2(-inf - 0) = 0, not NaN
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(p, axis=1)
        v = _tile(v_ptr, edge, v_t, T, E, BLOCK_N, BLOCK_E, DOT)
        p = p.to(v_ptr.dtype.element_ty).to(DOT)
        acc = tl.dot(p, v, acc * fade[:, None], input_precision=PRECISION)
        peak = above
    return acc, total, peak


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_s, k_b, k_g, k_t, v_b, v_g, v_t, bias_b, bias_h, bias_m, bias_n, out_b, out_h, out_s,
    H, G, S, T, D: tl.constexpr, E: tl.constexpr, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One block of queries a program; neighbours share k and v, and the longest start first."""
    blocks = tl.cdiv(S, BLOCK_M)
    b, h, g = _head(tl.program_id(0) // blocks, H, G)
    top = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row = top + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr + b * q_b + h * q_h, top, q_s, S, D, BLOCK_M, BLOCK_D, DOT)
    k_ptr += b * k_b + g * k_g
    v_ptr += b * v_b + g * v_g
    if bias_ptr is not None:
        bias_ptr += b * bias_b + h * bias_h
    acc = tl.full((BLOCK_M, BLOCK_E), 0.0, tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    right = T
    full = T // BLOCK_N * BLOCK_N
    if CAUSAL:
        right = tl.minimum(T, top + BLOCK_M)
        full = tl.minimum(full, (top + 1) // BLOCK_N * BLOCK_N)
    acc, total, peak = _attend(
        acc, total, peak, q, top, 0, full, S, T, D, E, scale, k_ptr, k_t, v_ptr, v_t,
        bias_ptr, bias_m, bias_n, CAUSAL, False, PRECISION, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, top, full, right, S, T, D, E, scale, k_ptr, k_t, v_ptr, v_t,
        bias_ptr, bias_m, bias_n, CAUSAL, True, PRECISION, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    if lse_ptr is not None:  # +inf for a row that sees no key: its P is then exp2(s - inf) = 0
        lse = tl.where(empty, float("inf"), peak + tl.log2(total))
        tl.store(lse_ptr + (b * H + h) * S + row, lse, row < S)
    col = tl.arange(0, BLOCK_E)
    at = b * out_b + h * out_h + row.to(tl.int64)[:, None] * out_s + col[None, :]
    mask = (row < S)[:, None] & (col < E)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def delta_kernel(
    out_ptr, dout_ptr, delta_ptr, out_b, out_h, out_s, dout_b, dout_h, dout_s, H, S, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """delta = sum(out * dout) over the columns: what the softmax's gradient subtracts."""
    blocks = tl.cdiv(S, BLOCK_M)
    b, h, _ = _head(tl.program_id(0) // blocks, H, H)
    top = tl.program_id(0) % blocks * BLOCK_M
    row = top + tl.arange(0, BLOCK_M)
    out = _tile(out_ptr + b * out_b + h * out_h, top, out_s, S, E, BLOCK_M, BLOCK_E, tl.float32)
    dout = _tile(dout_ptr + b * dout_b + h * dout_h, top, dout_s, S, E, BLOCK_M, BLOCK_E, tl.float32)
    tl.store(delta_ptr + (b * H + h) * S + row, tl.sum(out * dout, axis=1), row < S)


@triton.jit
def _probabilities(
    left, right, dleft, dright, lse, delta, m, n, top, edge, S, T, scale, bias_ptr, bias_m, bias_n,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dS in fp32, recomputed from lse: [M, N] of q, k, dout, v, or transposed of k, q, v, dout."""
    s = _scores(
        left, right, m, n, top, edge, S, T, scale, bias_ptr, bias_m, bias_n, CAUSAL, MASKED, PRECISION
    )  # fmt: skip
    p = tl.exp2(s - lse)
    dp = tl.dot(dleft, tl.trans(dright), input_precision=PRECISION)
    return p, p * (dp - delta)


@triton.jit
def _row_values(lse_ptr, delta_ptr, row, S):
    """lse and delta; +inf past the end, so that P is 0 there."""
    lse = tl.load(lse_ptr + row, row < S, other=float("inf"))
    return lse, tl.load(delta_ptr + row, row < S, other=0.0)


@triton.jit
def _queries_into_keys(
    dk, dv, k, v, edge, left, right, S, T, D: tl.constexpr, E: tl.constexpr, scale,
    q_ptr, q_s, dout_ptr, dout_s, lse_ptr, delta_ptr,
    bias_ptr, bias_m, bias_n,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Add what the queries left .. right contribute to dk and dv of a block of keys."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    for top in range(left, right, BLOCK_M):
        q = _tile(q_ptr, top, q_s, S, D, BLOCK_M, BLOCK_D, DOT)
        dout = _tile(dout_ptr, top, dout_s, S, E, BLOCK_M, BLOCK_E, DOT)
        lse, delta = _row_values(lse_ptr, delta_ptr, top + m, S)
        p, ds = _probabilities(  # transposed, as both products below take them
            k, q, v, dout, lse[None, :], delta[None, :], m[None, :], n[:, None], top, edge, S, T, scale,
            bias_ptr, bias_m, bias_n, CAUSAL, MASKED, PRECISION,
        )  # fmt: skip
        p = p.to(q_ptr.dtype.element_ty).to(DOT)
        ds = ds.to(q_ptr.dtype.element_ty).to(DOT)
        dv = tl.dot(p, dout, dv, input_precision=PRECISION)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_s, k_b, k_g, k_t, v_b, v_g, v_t, bias_b, bias_h, bias_m, bias_n, dout_b, dout_h, dout_s,
    H, G, S, T, D: tl.constexpr, E: tl.constexpr, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dk and dv, contiguous, one block of keys a program, summed over the query heads that read it."""
    blocks = tl.cdiv(T, BLOCK_N)
    b, g, _ = _head(tl.program_id(0) // blocks, G, G)
    edge = tl.program_id(0) % blocks * BLOCK_N
    col = edge + tl.arange(0, BLOCK_N)
    k = _tile(k_ptr + b * k_b + g * k_g, edge, k_t, T, D, BLOCK_N, BLOCK_D, DOT)
    v = _tile(v_ptr + b * v_b + g * v_g, edge, v_t, T, E, BLOCK_N, BLOCK_E, DOT)
    dk = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    dv = tl.full((BLOCK_N, BLOCK_E), 0.0, tl.float32)
    first, full = 0, 0
    if CAUSAL:  # queries before `first` see none of these keys, from `full` on all of them
        first = edge // BLOCK_M * BLOCK_M
        full = tl.minimum(tl.cdiv(edge + BLOCK_N - 1, BLOCK_M) * BLOCK_M, S)
    for member in range(0, H // G):
        h = g * (H // G) + member
        queries, douts = q_ptr + b * q_b + h * q_h, dout_ptr + b * dout_b + h * dout_h
        lses, deltas = lse_ptr + (b * H + h) * S, delta_ptr + (b * H + h) * S
        biases = bias_ptr
        if bias_ptr is not None:
            biases = bias_ptr + b * bias_b + h * bias_h
        if CAUSAL:
            dk, dv = _queries_into_keys(
                dk, dv, k, v, edge, first, full, S, T, D, E, scale, queries, q_s, douts, dout_s, lses, deltas,
                biases, bias_m, bias_n, True, True, PRECISION, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
            )  # fmt: skip
        # keys past the end give garbage in their own rows of dk and dv alone, which are not stored
        dk, dv = _queries_into_keys(
            dk, dv, k, v, edge, full, S, S, T, D, E, scale, queries, q_s, douts, dout_s, lses, deltas,
            biases, bias_m, bias_n, CAUSAL, False, PRECISION, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    at = ((b * G + g) * T + col)[:, None]
    width = tl.arange(0, BLOCK_D)[None, :]
    inside = (col < T)[:, None]
    tl.store(dk_ptr + at * D + width, (dk * scale).to(dk_ptr.dtype.element_ty), inside & (width < D))
    width = tl.arange(0, BLOCK_E)[None, :]
    tl.store(dv_ptr + at * E + width, dv.to(dv_ptr.dtype.element_ty), inside & (width < E))


@triton.jit
def _keys_into_queries(
    dq, q, dout, lse, delta, top, left, right, S, T, D: tl.constexpr, E: tl.constexpr, scale,
    k_ptr, k_t, v_ptr, v_t,
    bias_ptr, bias_m, bias_n,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Add what the keys left .. right contribute to dq of a block of queries."""
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    for edge in range(left, right, BLOCK_N):
        k = _tile(k_ptr, edge, k_t, T, D, BLOCK_N, BLOCK_D, DOT)
        v = _tile(v_ptr, edge, v_t, T, E, BLOCK_N, BLOCK_E, DOT)
        _, ds = _probabilities(
            q, k, dout, v, lse[:, None], delta[:, None], m, n, top, edge, S, T, scale,
            bias_ptr, bias_m, bias_n, CAUSAL, MASKED, PRECISION,
        )  # fmt: skip
        dq = tl.dot(ds.to(k_ptr.dtype.element_ty).to(DOT), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_b, q_h, q_s, k_b, k_g, k_t, v_b, v_g, v_t, bias_b, bias_h, bias_m, bias_n, dout_b, dout_h, dout_s,
    H, G, S, T, D: tl.constexpr, E: tl.constexpr, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dq, contiguous, one block of queries a program, walking the keys as the forward pass does."""
    blocks = tl.cdiv(S, BLOCK_M)
    b, h, g = _head(tl.program_id(0) // blocks, H, G)
    top = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row = top + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr + b * q_b + h * q_h, top, q_s, S, D, BLOCK_M, BLOCK_D, DOT)
    dout = _tile(dout_ptr + b * dout_b + h * dout_h, top, dout_s, S, E, BLOCK_M, BLOCK_E, DOT)
    lse, delta = _row_values(lse_ptr + (b * H + h) * S, delta_ptr + (b * H + h) * S, row, S)
    k_ptr += b * k_b + g * k_g
    v_ptr += b * v_b + g * v_g
    if bias_ptr is not None:
        bias_ptr += b * bias_b + h * bias_h
    right = T
    full = T // BLOCK_N * BLOCK_N
    if CAUSAL:
        right = tl.minimum(T, top + BLOCK_M)
        full = tl.minimum(full, (top + 1) // BLOCK_N * BLOCK_N)
    dq = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    dq = _keys_into_queries(
        dq, q, dout, lse, delta, top, 0, full, S, T, D, E, scale, k_ptr, k_t, v_ptr, v_t,
        bias_ptr, bias_m, bias_n, CAUSAL, False, PRECISION, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    dq = _keys_into_queries(
        dq, q, dout, lse, delta, top, full, right, S, T, D, E, scale, k_ptr, k_t, v_ptr, v_t,
        bias_ptr, bias_m, bias_n, CAUSAL, True, PRECISION, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    col = tl.arange(0, BLOCK_D)
    at = ((b * H + h) * S + row)[:, None] * D + col[None, :]
    mask = (row < S)[:, None] & (col < D)[None, :]
    tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask)


@triton.jit
def bias_gradient_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, dout_ptr, lse_ptr, delta_ptr, dbias_ptr,
    q_b, q_h, q_s, k_b, k_g, k_t, v_b, v_g, v_t, bias_b, bias_h, bias_m, bias_n, dout_b, dout_h, dout_s,
    H, G, S, T, D: tl.constexpr, E: tl.constexpr, scale, BATCHES, HEADS, ALL_B, ALL_H,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dbias in fp32, one S x T tile a program, summed over the batches and heads that share the bias.

    The bias is [BATCHES, HEADS, ...], and each of its matrices serves ALL_B batches and ALL_H heads. A bias
    of one row (not ROWS) or one column (not COLS) gets one partial sum a tile: [tiles, T] or [S, tiles].
    """
    rows, cols = tl.cdiv(S, BLOCK_M), tl.cdiv(T, BLOCK_N)
    pid = tl.program_id(0)
    matrix = pid // (rows * cols)
    top, edge = pid // cols % rows * BLOCK_M, pid % cols * BLOCK_N
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    row = top + tl.arange(0, BLOCK_M)
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for share in range(0, ALL_B * ALL_H):
        b = (matrix // HEADS + share // ALL_H).to(tl.int64)
        h = (matrix % HEADS + share % ALL_H).to(tl.int64)
        g = h // (H // G)
        q = _tile(q_ptr + b * q_b + h * q_h, top, q_s, S, D, BLOCK_M, BLOCK_D, DOT)
        dout = _tile(dout_ptr + b * dout_b + h * dout_h, top, dout_s, S, E, BLOCK_M, BLOCK_E, DOT)
        k = _tile(k_ptr + b * k_b + g * k_g, edge, k_t, T, D, BLOCK_N, BLOCK_D, DOT)
        v = _tile(v_ptr + b * v_b + g * v_g, edge, v_t, T, E, BLOCK_N, BLOCK_E, DOT)
        lse, delta = _row_values(lse_ptr + (b * H + h) * S, delta_ptr + (b * H + h) * S, row, S)
        _, ds = _probabilities(
            q, k, dout, v, lse[:, None], delta[:, None], m, n, top, edge, S, T, scale,
            bias_ptr + b * bias_b + h * bias_h, bias_m, bias_n, CAUSAL, True, PRECISION,
        )  # fmt: skip
        acc += ds
    row, col, tall, wide = top + m, edge + n, S, T
    if not ROWS:
        acc = tl.sum(acc, axis=0)[None, :]
        row, tall = top // BLOCK_M + tl.full((1, 1), 0, tl.int32), rows
    if not COLS:
        acc = tl.sum(acc, axis=1)[:, None]
        col, wide = edge // BLOCK_N + tl.full((1, 1), 0, tl.int32), cols
    at = (matrix.to(tl.int64) * tall + row) * wide + col
    tl.store(dbias_ptr + at, acc, (row < tall) & (col < wide))


def _unit(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose last dimension has stride 1: as they are where they allow it."""
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]


class _Problem:
    """What every launch of one attention passes alike."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> None:
        (self.b, self.h, self.s, self.d), (self.g, self.t, self.e) = q.shape, v.shape[1:]
        self.q, self.k, self.v = _unit(q, k, v)
        self.bias: Tensor | None = None
        self.bias_strides: tuple[int, ...] = (0, 0, 0, 0)
        if bias is not None:
            bias = bias.view(torch.uint8) if bias.dtype == torch.bool else bias
            self.bias_strides = bias.expand(self.b, self.h, self.s, self.t).stride()
            self.bias = bias
        self.sizes = (self.h, self.g, self.s, self.t, self.d, self.e, scale)
        self.causal = causal

    def strides(self, rows: Tensor) -> tuple[int, ...]:
        """Of q, k, v, bias and then of out or its gradient."""
        qkv = (s for t in (self.q, self.k, self.v) for s in t.stride()[:3])
        return *qkv, *self.bias_strides, *rows.stride()[:3]

    def options(self, config: Config) -> dict[str, object]:
        """Compile-time arguments."""
        kind = getattr(tl, str(self.q.dtype).removeprefix("torch."))
        exact = "ieee" if torch.version.hip else "tf32x3"  # on NVIDIA ieee is scalar code
        tf32 = torch.backends.cuda.matmul.allow_tf32 and not torch.version.hip
        return {
            "CAUSAL": self.causal,
            "PRECISION": "tf32" if tf32 else exact,
            "DOT": kind if self.q.is_cuda else tl.float32,  # the interpreter multiplies bfloat16's bits
            "BLOCK_M": config.m,
            "BLOCK_N": config.n,
            "BLOCK_D": max(16, next_power_of_2(self.d)),  # the least that tl.dot takes
            "BLOCK_E": max(16, next_power_of_2(self.e)),
            "num_warps": config.warps,
            "num_stages": config.stages,
        }

    def config(self, kernel: str) -> Config:
        """The blocks of this kernel here."""
        width, biased = max(self.d, self.e), self.bias is not None
        return choose(kernel, width, self.q.itemsize, biased, chip(self.q.device))


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    save: bool = False,
) -> tuple[Any, ...]:
    """out, laid out as [B, S, H, E], and lse (base 2) if it is to be saved."""
    p = _Problem(q, k, v, bias, causal, scale)
    out = q.new_empty(p.b, p.s, p.h, p.e).transpose(1, 2)
    lse = q.new_empty(p.b, p.h, p.s, dtype=torch.float32) if save else None
    if out.numel():
        config = p.config("forward")
        forward_kernel[(-(-p.s // config.m) * p.b * p.h,)](
            p.q, p.k, p.v, p.bias, out, lse, *p.strides(out), *p.sizes, **p.options(config)
        )
    return out, lse


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    bias_grad: bool = False,
) -> tuple[Any, ...]:
    """dq, dk, dv, and dbias in fp32 if asked for."""
    p = _Problem(q, k, v, bias, causal, scale)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    if not (out.numel() and k.numel()):
        dbias = lse.new_zeros(bias.shape, dtype=torch.float32) if bias_grad and bias is not None else None
        return *(g.zero_() for g in grads), dbias
    dout, out = _unit(dout, out)
    delta = torch.empty_like(lse)
    given = (p.q, p.k, p.v, p.bias, dout, lse, delta)
    strides = p.strides(dout)
    delta_kernel[(-(-p.s // 32) * p.b * p.h,)](
        out, dout, delta, *out.stride()[:3], *dout.stride()[:3], p.h, p.s, p.e,
        BLOCK_M=32, BLOCK_E=next_power_of_2(p.e),
    )  # fmt: skip
    config = p.config("keys")
    key_gradient_kernel[(-(-p.t // config.n) * p.b * p.g,)](
        *given, *grads[1:], *strides, *p.sizes, **p.options(config)
    )
    config = p.config("queries")
    query_gradient_kernel[(-(-p.s // config.m) * p.b * p.h,)](
        *given, grads[0], *strides, *p.sizes, **p.options(config)
    )
    return *grads, _bias_gradient(p, given, strides, bias) if bias_grad else None


def _bias_gradient(p: _Problem, given: tuple[Any, ...], strides: tuple[Any, ...], bias: Any) -> Tensor:
    config = p.config("bias")
    rows, cols = -(-p.s // config.m), -(-p.t // config.n)
    shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    batches, heads = shape[:2]
    tall, wide = shape[2] == p.s, shape[3] == p.t
    dbias = p.q.new_empty(batches, heads, p.s if tall else rows, p.t if wide else cols, dtype=torch.float32)
    bias_gradient_kernel[(rows * cols * batches * heads,)](
        *given, dbias, *strides, *p.sizes, batches, heads, p.b // batches, p.h // heads,
        ROWS=tall, COLS=wide, **p.options(config),
    )  # fmt: skip
    return dbias.sum_to_size(shape).reshape(bias.shape)
