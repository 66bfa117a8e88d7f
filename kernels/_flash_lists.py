"""Lists of the blocks that a mask keeps, where it is more than a band, made for the kernels to walk.

    row of a list   [whole, partly, blocks kept whole ..., free places ..., blocks kept in part]

Shapes     list: [B or 1, H or 1, outer blocks, 2 + inner blocks] in int32; a row for each block of
           queries, of blocks of keys; or (TRANSPOSED) for each block of keys, of blocks of queries.
Cost       S * T / (BLOCK_M * BLOCK_N) * 4 bytes for each batch and head that the mask tells apart. A table
           that is read at both a query and a key is read once whole.
"""

from fxaccel.kernels._triton import tl, triton


@triton.jit
def listed(b, h, outer, steps):
    """Where the row of a block begins; `steps` are 0 where batches or heads share it."""
    return b * steps[0] + h * steps[1] + tl.cast(outer, tl.int64) * steps[2]


@triton.jit
def parts(row_ptr, steps):
    """Where blocks kept whole begin and end in a row, and where blocks kept in part do."""
    return 2, 2 + tl.load(row_ptr), steps[2] - tl.load(row_ptr + 1), steps[2]


@triton.jit(do_not_specialize=["S", "T", "low", "high"])
def list_kernel(
    list_ptr, tables, strides, HEADS, S, T, low, high,
    TEST: tl.constexpr, TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    rows, cols = tl.cdiv(S, BLOCK_M), tl.cdiv(T, BLOCK_N)
    outer = cols if TRANSPOSED else rows
    inner = rows if TRANSPOSED else cols
    pid = tl.program_id(0)
    b = (pid // outer // HEADS).to(tl.int64)
    h = (pid // outer % HEADS).to(tl.int64)
    mine = pid % outer + tl.arange(0, 1)
    list_ptr += pid.to(tl.int64) * (inner + 2)
    whole, partly = 0, 0
    for start in range(0, inner, CHUNK):
        other = start + tl.arange(0, CHUNK)
        q0 = (other if TRANSPOSED else mine) * BLOCK_M
        k0 = (mine if TRANSPOSED else other) * BLOCK_N
        some, every = TEST(b, h, q0, k0, S, T, tables, strides, BLOCK_M, BLOCK_N)
        q1, k1 = tl.minimum(q0 + BLOCK_M, S) - 1, tl.minimum(k0 + BLOCK_N, T) - 1
        some = some & (other < inner)
        every = every & (k0 + BLOCK_N <= T)  # a block past the end is masked there
        if low is not None:
            some, every = some & (k1 >= q0 + low), every & (k0 >= q1 + low)
        if high is not None:
            some, every = some & (k0 <= q1 + high), every & (k1 <= q0 + high)
        full = (some & every).to(tl.int32)
        cut = some.to(tl.int32) - full
        tl.store(list_ptr + 1 + whole + tl.cumsum(full, 0), other, full > 0)
        tl.store(list_ptr + 2 + inner - partly - tl.cumsum(cut, 0), other, cut > 0)
        whole += tl.sum(full, 0)
        partly += tl.sum(cut, 0)
    tl.store(list_ptr, whole)
    tl.store(list_ptr + 1, partly)
