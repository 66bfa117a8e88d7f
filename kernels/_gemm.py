"""A batched product of matrices whose every axis may be a pair of strides: no permutation is ever copied.

Shapes     c[g, m, n] = sum_k a[g, m, k] b[g, k, n] + bias[g, n]. An axis of M, N or K is a pair of axes of
           the tensor, outer and inner: a is given as the view [G, Mo, Mi, Ko, Ki], b as [G, Ko, Ki, No, Ni],
           c as [G, Mo, Mi, No, Ni] and the bias as [G, No, Ni]; where one axis is enough, the inner is 1.
Numerics   sums in fp32, one rounding at the store. fp32 is multiplied as exactly as eager mode does.
Cost       a program makes one BM x BN tile of c. Programs of one tile in different batches g are neighbours:
           they often read and write parts of the same cache lines.
Limits     2**31 on each of M, N and K; offsets are 64-bit. No float64.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxaccel.kernels._triton import next_power_of_2, tl, triton

LARGE = 128  # M and N from which a tile of 128 x 128 is worth its registers
FULL = 256  # programs that fill a GPU; fewer are cut smaller


class Config(NamedTuple):
    """How one launch cuts c, and how far it loads ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def on_gpu(x: Tensor) -> bool:
    """Whether a launch compiles its kernel."""
    return x.is_cuda


def products(x: Tensor) -> dict[str, Any]:
    """How tl.dot multiplies tensors like x: fp32 as eager mode is told to."""
    exact = "ieee" if torch.version.hip else "tf32x3"  # on NVIDIA ieee is scalar code
    tf32 = torch.backends.cuda.matmul.allow_tf32 and not torch.version.hip
    kind = getattr(tl, str(x.dtype).removeprefix("torch."))
    return {
        "PRECISION": "tf32" if tf32 else exact,
        "DOT": kind if on_gpu(x) else tl.float32,  # the interpreter multiplies bfloat16's bits
    }


def config(batch: int, m: int, n: int, k: int, itemsize: int) -> Config:
    """128 x 128 in half precision where that makes programs enough, else 64 x 64; less for a short axis.

    The tiles of a and b are as deep as the addresses of strided elements leave room for in registers.
    """
    large = itemsize == 2 and min(m, n) >= LARGE
    large = large and batch * -(-m // LARGE) * -(-n // LARGE) >= FULL
    side = LARGE if large else 64
    limits = ((side, m), (side, n), ((64 if large else 128) // itemsize, k))
    rows, columns, depth = (max(16, min(limit, next_power_of_2(size))) for limit, size in limits)
    # what AMD loads ahead takes a whole stage more of its 64 KiB
    return Config(rows, columns, depth, 8 if large else 4, 2 if torch.version.hip else 3)


@triton.jit
def _offset(index, INNER, outer_stride, inner_stride):
    """Where `index` of a pair of axes lies. An INNER of 1 is a constant of the kernel: nothing is divided."""
    return (index // INNER).to(tl.int64) * outer_stride + (index % INNER).to(tl.int64) * inner_stride


@triton.jit
def contract_kernel(
    a_ptr, b_ptr, c_ptr, bias_ptr, G, M, N, K, M_INNER, N_INNER, K_INNER,
    a_g, a_mo, a_mi, a_ko, a_ki, b_g, b_ko, b_ki, b_no, b_ni, c_g, c_mo, c_mi, c_no, c_ni, bias_g, bias_no,
    bias_ni, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One tile of one batch a program."""
    tile = tl.program_id(0) // G
    g = (tl.program_id(0) % G).to(tl.int64)
    across = tl.cdiv(N, BN)
    m = (tile // across) * BM + tl.arange(0, BM)
    n = (tile % across) * BN + tl.arange(0, BN)
    a_row = a_ptr + g * a_g + _offset(m, M_INNER, a_mo, a_mi)[:, None]
    b_column = b_ptr + g * b_g + _offset(n, N_INNER, b_no, b_ni)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = k < K
        a = tl.load(
            a_row + _offset(k, K_INNER, a_ko, a_ki)[None, :], (m < M)[:, None] & inside[None, :], other=0.0
        )
        b = tl.load(
            b_column + _offset(k, K_INNER, b_ko, b_ki)[:, None], inside[:, None] & (n < N)[None, :], other=0.0
        )
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
    if bias_ptr is not None:
        at = g * bias_g + _offset(n, N_INNER, bias_no, bias_ni)
        acc += tl.load(bias_ptr + at, n < N, other=0.0).to(tl.float32)[None, :]
    at = g * c_g + _offset(m, M_INNER, c_mo, c_mi)[:, None] + _offset(n, N_INNER, c_no, c_ni)[None, :]
    tl.store(c_ptr + at, acc.to(c_ptr.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


def contract(a: Tensor, b: Tensor, c: Tensor, bias: Tensor | None = None) -> Tensor:
    """Fill c with the product of the views a and b, plus the bias; c is returned."""
    g, mo, mi, ko, ki = a.shape
    no, ni = b.shape[3:]
    m, n, k = mo * mi, no * ni, ko * ki
    if c.numel():
        cut = config(g, m, n, k, a.itemsize)
        grid = (g * -(-m // cut.rows) * -(-n // cut.columns),)
        options = {"num_warps": cut.warps, "num_stages": cut.stages, **products(a)}
        contract_kernel[grid](
            a, b, c, bias, g, m, n, k, mi, ni, ki, *a.stride(), *b.stride(), *c.stride(),
            *((0, 0, 0) if bias is None else bias.stride()),
            BM=cut.rows, BN=cut.columns, BK=cut.depth, **options,
        )  # fmt: skip
    return c
