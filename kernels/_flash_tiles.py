"""What every attention kernel is made of: tiles, scores, the mask's band, the dropped weights.

Shapes     left, right: [M, D] and [N, D] with m: [M, 1] and n: [1, N]; or all of it transposed, [N, M] of k
           and q with m: [1, M] and n: [N, 1].
           place: (b, h, S, T, scale, softcap, low, high, tables, strides).
Numerics   scores in fp32, base 2. tanh is exact to 2 ulps where the operands are fp32, else to 1e-7.
Source     Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox; 7 rounds pass BigCrush);
           Moshier, Cephes 2.8 (tanhf's polynomial).
"""

from fxaccel.kernels._flash_source import LOG2E
from fxaccel.kernels._triton import tl, triton


@triton.jit
def head_of(pid, H, G):
    """Batch, query head and key head of flat head `pid`, in int64: they multiply strides."""
    b = (pid // H).to(tl.int64)
    h = (pid % H).to(tl.int64)
    return b, h, h // (H // G)


@triton.jit
def tile(
    ptr, top, stride, N, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
    BELOW: tl.constexpr = False,
):  # fmt: skip
    """Rows top, top + 1, ... of a matrix with D columns: [ROWS, BLOCK_D] in DOT, 0 outside.

    The tile's place is an int64 scalar; offsets within it fit 32 bits and half the registers. `top` may be
    below 0 if BELOW.
    """
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = top + row < N
    if BELOW:
        mask = mask & (top + row >= 0)
    if D < BLOCK_D:
        mask = mask & (col < D)
    return tl.load(ptr + tl.cast(top, tl.int64) * stride + (row * stride + col), mask, other=0.0).to(DOT)


@triton.jit
def band(first, last, low, high, N, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Where the others of rows first .. last lie: left .. right in all, inner .. outer seen by every row.

    A row r sees r + low .. r + high within 0 .. N - 1. All but `right`, and `inner` where it is `right`, are
    multiples of BLOCK. Without EDGE the last block may reach past N and count as seen whole.
    """
    left, inner, right = 0, 0, N
    outer = N // BLOCK * BLOCK if EDGE else tl.cdiv(N, BLOCK) * BLOCK
    if low is not None:
        left = tl.minimum(tl.maximum(first + low, 0), N) // BLOCK * BLOCK
        inner = tl.cdiv(tl.minimum(tl.maximum(last + low, 0), N), BLOCK) * BLOCK
    if high is not None:
        right = tl.minimum(tl.maximum(last + high + 1, 0), N)
        most = tl.maximum(first + high + 1, 0)
        outer = tl.where(most < N, most // BLOCK * BLOCK, outer)
    inner = tl.minimum(tl.maximum(inner, left), right)
    return left, inner, tl.maximum(outer, inner), right


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh; PRECISE where small values must keep their relative precision."""
    y = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    if PRECISE:
        z = x * x
        r = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
        y = tl.where(tl.abs(x) < 0.625, (r * z - 3.33332819422e-1) * z * x + x, y)
    return y


@triton.jit
def scores(
    left, right, m, n, top, edge, place,
    MASK: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of queries top + m and keys edge + n, -inf where masked; and the softcap's tanh."""
    b, h, S, T, scale, softcap, low, high, tables, strides = place
    s = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    bent = s
    if softcap is not None:
        bent = tanh(s * (scale / softcap), left.dtype == tl.float32)
        s = bent * (softcap * LOG2E)
    else:
        s = s * (scale * LOG2E)
    if BIAS is not None:
        s = BIAS(s, b, h, top, edge, m, n, S, T, tables, strides)
    if MASKED:
        seen = edge + n < T
        if low is not None:
            seen = seen & (edge + n >= top + low + m)
        if high is not None:
            seen = seen & (edge + n <= top + high + m)
        if MASK is not None:
            seen = seen & MASK(b, h, top, edge, m, n, S, T, tables, strides)
        s = tl.where(seen, s, float("-inf"))
    return s, bent


@triton.jit
def kept(row, m, n, top, edge, seed_ptr, dropout):
    """Which weights dropout keeps: a function of seed, flat head `row`, query and key alone."""
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), edge + n, top + m, tl.cast(row, tl.int32), 0, 7)
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8 >= dropout
