"""The forward kernel of attention: one pass over the keys, with a running softmax.

Shapes     q: [B, H, S, D]; k: [B, G, T, D]; v: [B, G, T, E]; out: [B, H, S, E]; lse: [B, H, S], base 2.
Numerics   products take the operands' dtype and add in fp32; softmax in fp32; P is rounded to the operands'
           dtype before its product, as in FlashAttention; out rounds once.
Cost       one pass over k and v for each BLOCK_M queries. Blocks outside of the mask are skipped; only blocks
           on an edge of it run its code.
Source     Dao 2023, "FlashAttention-2", arXiv:2307.08691; Milakov & Gimelshein 2018, arXiv:1805.02867 (the
           running softmax); Ainslie et al. 2023, arXiv:2305.13245 (grouped heads).
"""

from fxaccel.kernels._flash_lists import listed, parts
from fxaccel.kernels._flash_source import LOG2E
from fxaccel.kernels._flash_tiles import band, head_of, kept, scores, tile
from fxaccel.kernels._triton import tl, triton


@triton.jit
def _attend(
    acc, total, peak, q, top, left, right, list_ptr, place, k_ptr, k_t, v_ptr, v_t,
    seed_ptr, dropout, row, D: tl.constexpr, E: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Fold the keys left .. right, or the blocks listed there, into the softmax of a block of queries."""
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    T = place[3]
    STEP: tl.constexpr = BLOCK_N if list_ptr is None else 1
    for at in range(left, right, STEP):
        edge = at
        if list_ptr is not None:
            edge = tl.load(list_ptr + at) * BLOCK_N
        k = tile(k_ptr, edge, k_t, T, D, BLOCK_N, BLOCK_D, DOT)
        s, _ = scores(q, k, m, n, top, edge, place, MASK, BIAS, MASKED, PRECISION)
        above = tl.maximum(peak, tl.max(s, axis=1))
        base = tl.where(above == float("-inf"), 0.0, above)  # no key yet: exp2(-inf - 0) = 0, not NaN
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(p, axis=1)
        if seed_ptr is not None:
            p = tl.where(kept(row, m, n, top, edge, seed_ptr, dropout), p, 0.0)
        v = tile(v_ptr, edge, v_t, T, E, BLOCK_N, BLOCK_E, DOT)
        p = p.to(v_ptr.dtype.element_ty).to(DOT)
        acc = tl.dot(p, v, acc * fade[:, None], input_precision=PRECISION)
        peak = above
    return acc, total, peak


@triton.jit(do_not_specialize=["S", "T", "low", "high"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sinks_ptr, seed_ptr, list_ptr, tables, strides,
    q_steps, k_steps, v_steps, out_steps, list_steps, H, G, S, T,
    scale, softcap, low, high, dropout, keep_scale,
    D: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One block of queries a program; neighbours share k and v, and the longest start first."""
    blocks = tl.cdiv(S, BLOCK_M)
    b, h, g = head_of(tl.program_id(0) // blocks, H, G)
    top = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row = top + tl.arange(0, BLOCK_M)
    place = (b, h, S, T, scale, softcap, low, high, tables, strides)
    q = tile(q_ptr + b * q_steps[0] + h * q_steps[1], top, q_steps[2], S, D, BLOCK_M, BLOCK_D, DOT)
    k_ptr += b * k_steps[0] + g * k_steps[1]
    v_ptr += b * v_steps[0] + g * v_steps[1]
    acc = tl.full((BLOCK_M, BLOCK_E), 0.0, tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if sinks_ptr is not None:  # one more logit, and no value with it
        peak = tl.full((BLOCK_M,), 0.0, tl.float32) + tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
    if list_ptr is None:
        left, inner, outer, right = band(top, tl.minimum(top + BLOCK_M, S) - 1, low, high, T, BLOCK_N, True)
        rest = outer
        if low is not None:
            acc, total, peak = _attend(
                acc, total, peak, q, top, left, inner, list_ptr, place, k_ptr, k_steps[2], v_ptr, v_steps[2],
                seed_ptr, dropout, b * H + h, D, E, MASK, BIAS, True, PRECISION, DOT,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
            )  # fmt: skip
    else:
        list_ptr += listed(b, h, top // BLOCK_M, list_steps)
        inner, outer, rest, right = parts(list_ptr, list_steps)
    acc, total, peak = _attend(
        acc, total, peak, q, top, inner, outer, list_ptr, place, k_ptr, k_steps[2], v_ptr, v_steps[2],
        seed_ptr, dropout, b * H + h, D, E, MASK, BIAS, False, PRECISION, DOT,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, top, rest, right, list_ptr, place, k_ptr, k_steps[2], v_ptr, v_steps[2],
        seed_ptr, dropout, b * H + h, D, E, MASK, BIAS, True, PRECISION, DOT,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    if seed_ptr is not None:
        acc = acc * keep_scale
    if lse_ptr is not None:  # +inf for a row that sees no key: its P is then exp2(s - inf) = 0
        lse = tl.where(empty, float("inf"), peak + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(lse_ptr + (b * H + h) * S + row, lse, row < S)
    col = tl.arange(0, BLOCK_E)
    at = b * out_steps[0] + h * out_steps[1] + row.to(tl.int64)[:, None] * out_steps[2] + col[None, :]
    mask = (row < S)[:, None] & (col < E)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask)
