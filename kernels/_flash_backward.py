"""The backward kernels of attention: delta, the gradients of keys and values, the gradient of queries.

Shapes     as forward; dout: like out; lse, delta: [B, H, S] in fp32; dq, dk, dv: contiguous.
Numerics   P is recomputed from lse, and dropout's choice from its seed; P and dS are rounded to the operands'
           dtype before their products, as in FlashAttention; sums in fp32; each gradient rounds once.
Cost       nothing of size S x T is stored. Each output has one owner: no atomics, the same bits on every run.
Source     Dao 2023, "FlashAttention-2", arXiv:2307.08691; Ainslie et al. 2023, arXiv:2305.13245.
"""

from fxaccel.kernels._flash_lists import listed, parts
from fxaccel.kernels._flash_tiles import band, head_of, kept, scores, tile
from fxaccel.kernels._triton import tl, triton


@triton.jit
def delta_kernel(
    out_ptr, dout_ptr, delta_ptr, out_steps, dout_steps, H, S, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """delta = sum(out * dout) over the columns: what the softmax's gradient subtracts."""
    blocks = tl.cdiv(S, BLOCK_M)
    b, h, _ = head_of(tl.program_id(0) // blocks, H, H)
    top = tl.program_id(0) % blocks * BLOCK_M
    row = top + tl.arange(0, BLOCK_M)
    out_ptr += b * out_steps[0] + h * out_steps[1]
    dout_ptr += b * dout_steps[0] + h * dout_steps[1]
    out = tile(out_ptr, top, out_steps[2], S, E, BLOCK_M, BLOCK_E, tl.float32)
    dout = tile(dout_ptr, top, dout_steps[2], S, E, BLOCK_M, BLOCK_E, tl.float32)
    tl.store(delta_ptr + (b * H + h) * S + row, tl.sum(out * dout, axis=1), row < S)


@triton.jit
def probabilities(
    left, right, dleft, dright, lse, delta, m, n, top, edge, place, row, seed_ptr, dropout, keep_scale,
    MASK: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P after dropout, dS before the softcap, the softcap's tanh: [M, N] of q, k, dout, v, or transposed."""
    s, bent = scores(left, right, m, n, top, edge, place, MASK, BIAS, MASKED, PRECISION)
    p = tl.exp2(s - lse)
    dp = tl.dot(dleft, tl.trans(dright), input_precision=PRECISION)
    if seed_ptr is not None:
        factor = tl.where(kept(row, m, n, top, edge, seed_ptr, dropout), keep_scale, 0.0)
        return p * factor, p * (dp * factor - delta), bent
    else:
        return p, p * (dp - delta), bent


@triton.jit
def row_values(lse_ptr, delta_ptr, row, S):
    """lse and delta; +inf past the end, so that P is 0 there."""
    lse = tl.load(lse_ptr + row, row < S, other=float("inf"))
    return lse, tl.load(delta_ptr + row, row < S, other=0.0)


@triton.jit
def _queries_into_keys(
    dk, dv, k, v, edge, left, right, list_ptr, place, q_ptr, q_s, dout_ptr, dout_s, lse_ptr, delta_ptr,
    row, seed_ptr, dropout, keep_scale, D: tl.constexpr, E: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Add what the queries left .. right, or the blocks listed there, give to dk and dv of some keys."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    S, softcap = place[2], place[5]
    STEP: tl.constexpr = BLOCK_M if list_ptr is None else 1
    for at in range(left, right, STEP):
        top = at
        if list_ptr is not None:
            top = tl.load(list_ptr + at) * BLOCK_M
        q = tile(q_ptr, top, q_s, S, D, BLOCK_M, BLOCK_D, DOT)
        dout = tile(dout_ptr, top, dout_s, S, E, BLOCK_M, BLOCK_E, DOT)
        lse, delta = row_values(lse_ptr, delta_ptr, top + m, S)
        p, ds, bent = probabilities(  # transposed, as both products below take them
            k, q, v, dout, lse[None, :], delta[None, :], m[None, :], n[:, None], top, edge, place,
            row, seed_ptr, dropout, keep_scale, MASK, BIAS, MASKED, PRECISION,
        )  # fmt: skip
        if softcap is not None:
            ds = ds * (1.0 - bent * bent)
        p = p.to(q_ptr.dtype.element_ty).to(DOT)
        ds = ds.to(q_ptr.dtype.element_ty).to(DOT)
        dv = tl.dot(p, dout, dv, input_precision=PRECISION)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["S", "T", "low", "high"])
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, seed_ptr, list_ptr, tables, strides, dk_ptr, dv_ptr,
    q_steps, k_steps, v_steps, dout_steps, list_steps, H, G, S, T,
    scale, softcap, low, high, dropout, keep_scale,
    D: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dk and dv, one block of keys a program, summed over the query heads that read it."""
    blocks = tl.cdiv(T, BLOCK_N)
    b, g, _ = head_of(tl.program_id(0) // blocks, G, G)
    edge = tl.program_id(0) % blocks * BLOCK_N
    col = edge + tl.arange(0, BLOCK_N)
    k = tile(k_ptr + b * k_steps[0] + g * k_steps[1], edge, k_steps[2], T, D, BLOCK_N, BLOCK_D, DOT)
    v = tile(v_ptr + b * v_steps[0] + g * v_steps[1], edge, v_steps[2], T, E, BLOCK_N, BLOCK_E, DOT)
    dk = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    dv = tl.full((BLOCK_N, BLOCK_E), 0.0, tl.float32)
    before, after = None, None  # a key k is seen by k - high .. k - low
    if high is not None:
        before = -high
    if low is not None:
        after = -low
    for member in range(0, H // G):
        h = g * (H // G) + member
        place = (b, h, S, T, scale, softcap, low, high, tables, strides)
        queries, douts = (
            q_ptr + b * q_steps[0] + h * q_steps[1],
            dout_ptr + b * dout_steps[0] + h * dout_steps[1],
        )
        lses, deltas = lse_ptr + (b * H + h) * S, delta_ptr + (b * H + h) * S
        rows_ptr = list_ptr
        if list_ptr is None:  # keys past the end give garbage in their own rows alone, which are not stored
            left, inner, outer, right = band(
                edge, tl.minimum(edge + BLOCK_N, T) - 1, before, after, S, BLOCK_M, False
            )  # fmt: skip
            rest = outer
            if before is not None:
                dk, dv = _queries_into_keys(
                    dk, dv, k, v, edge, left, inner, rows_ptr, place, queries, q_steps[2],
                    douts, dout_steps[2], lses, deltas, b * H + h, seed_ptr, dropout, keep_scale, D, E,
                    MASK, BIAS, True, PRECISION, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
                )  # fmt: skip
        else:
            rows_ptr = list_ptr + listed(b, h, edge // BLOCK_N, list_steps)
            inner, outer, rest, right = parts(rows_ptr, list_steps)
        dk, dv = _queries_into_keys(
            dk, dv, k, v, edge, inner, outer, rows_ptr, place, queries, q_steps[2], douts, dout_steps[2],
            lses, deltas, b * H + h, seed_ptr, dropout, keep_scale, D, E, MASK, BIAS, False,
            PRECISION, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
        if after is not None or list_ptr is not None:
            dk, dv = _queries_into_keys(
                dk, dv, k, v, edge, rest, right, rows_ptr, place, queries, q_steps[2], douts, dout_steps[2],
                lses, deltas, b * H + h, seed_ptr, dropout, keep_scale, D, E, MASK, BIAS, True,
                PRECISION, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
            )  # fmt: skip
    at = ((b * G + g) * T + col)[:, None]
    width = tl.arange(0, BLOCK_D)[None, :]
    inside = (col < T)[:, None]
    tl.store(dk_ptr + at * D + width, (dk * scale).to(dk_ptr.dtype.element_ty), inside & (width < D))
    width = tl.arange(0, BLOCK_E)[None, :]
    tl.store(dv_ptr + at * E + width, dv.to(dv_ptr.dtype.element_ty), inside & (width < E))


@triton.jit
def _keys_into_queries(
    dq, q, dout, lse, delta, top, left, right, list_ptr, place, k_ptr, k_t, v_ptr, v_t,
    row, seed_ptr, dropout, keep_scale, D: tl.constexpr, E: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Add what the keys left .. right, or the blocks listed there, contribute to dq of a block of queries."""
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    T, softcap = place[3], place[5]
    STEP: tl.constexpr = BLOCK_N if list_ptr is None else 1
    for at in range(left, right, STEP):
        edge = at
        if list_ptr is not None:
            edge = tl.load(list_ptr + at) * BLOCK_N
        k = tile(k_ptr, edge, k_t, T, D, BLOCK_N, BLOCK_D, DOT)
        v = tile(v_ptr, edge, v_t, T, E, BLOCK_N, BLOCK_E, DOT)
        _, ds, bent = probabilities(
            q, k, dout, v, lse[:, None], delta[:, None], m, n, top, edge, place,
            row, seed_ptr, dropout, keep_scale, MASK, BIAS, MASKED, PRECISION,
        )  # fmt: skip
        if softcap is not None:
            ds = ds * (1.0 - bent * bent)
        dq = tl.dot(ds.to(k_ptr.dtype.element_ty).to(DOT), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["S", "T", "low", "high"])
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, seed_ptr, list_ptr, tables, strides, dq_ptr,
    q_steps, k_steps, v_steps, dout_steps, list_steps, H, G, S, T,
    scale, softcap, low, high, dropout, keep_scale,
    D: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dq, one block of queries a program, walking the keys as the forward pass does."""
    blocks = tl.cdiv(S, BLOCK_M)
    b, h, g = head_of(tl.program_id(0) // blocks, H, G)
    top = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row = top + tl.arange(0, BLOCK_M)
    place = (b, h, S, T, scale, softcap, low, high, tables, strides)
    dout_ptr += b * dout_steps[0] + h * dout_steps[1]
    q = tile(q_ptr + b * q_steps[0] + h * q_steps[1], top, q_steps[2], S, D, BLOCK_M, BLOCK_D, DOT)
    dout = tile(dout_ptr, top, dout_steps[2], S, E, BLOCK_M, BLOCK_E, DOT)
    lse, delta = row_values(lse_ptr + (b * H + h) * S, delta_ptr + (b * H + h) * S, row, S)
    k_ptr += b * k_steps[0] + g * k_steps[1]
    v_ptr += b * v_steps[0] + g * v_steps[1]
    dq = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    if list_ptr is None:
        left, inner, outer, right = band(top, tl.minimum(top + BLOCK_M, S) - 1, low, high, T, BLOCK_N, True)
        rest = outer
        if low is not None:
            dq = _keys_into_queries(
                dq, q, dout, lse, delta, top, left, inner, list_ptr, place, k_ptr, k_steps[2],
                v_ptr, v_steps[2], b * H + h, seed_ptr, dropout, keep_scale, D, E, MASK, BIAS, True,
                PRECISION, DOT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
            )  # fmt: skip
    else:
        list_ptr += listed(b, h, top // BLOCK_M, list_steps)
        inner, outer, rest, right = parts(list_ptr, list_steps)
    dq = _keys_into_queries(
        dq, q, dout, lse, delta, top, inner, outer, list_ptr, place, k_ptr, k_steps[2], v_ptr, v_steps[2],
        b * H + h, seed_ptr, dropout, keep_scale, D, E, MASK, BIAS, False, PRECISION, DOT,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    dq = _keys_into_queries(
        dq, q, dout, lse, delta, top, rest, right, list_ptr, place, k_ptr, k_steps[2], v_ptr, v_steps[2],
        b * H + h, seed_ptr, dropout, keep_scale, D, E, MASK, BIAS, True, PRECISION, DOT,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    col = tl.arange(0, BLOCK_D)
    at = ((b * H + h) * S + row)[:, None] * D + col[None, :]
    mask = (row < S)[:, None] & (col < D)[None, :]
    tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask)
