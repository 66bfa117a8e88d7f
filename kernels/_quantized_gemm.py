"""The Triton kernel of fxaccel::quantized_linear and its launch.

Shapes     q: [M, K]; w: [N, K]; scale: [M] or one; w_scale: [N] or one; b: [N]; y: [M, N].
Numerics   int8: int32. float8: fp32 sums; where tensor cores multiply float8 they add up to DEPTH products
           with about 14 bits before these go to fp32 sums. Scales and b in fp32, one rounding at the store.
Cost       a program makes one tile of y. Tiles of GROUP rows of tiles are neighbours, so that both operands
           are found in L2.
Limits     2**31 on each of M, N, K; offsets are 64-bit. float8 as such on NVIDIA from compute capability 8.9
           on; elsewhere it is unpacked to float16, exactly, at the tile's load.
"""

from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels import _gemm, _rows
from fxaccel.kernels._triton import next_power_of_2, tl, triton

GROUP = 8  # rows of tiles that are walked together
DEPTH = 128  # columns of a tile


def config(m: int, n: int, k: int) -> _gemm.Config:
    """128 x 128 of a large y, fewer rows of a small one.

    Rows of K bytes that are not aligned are loaded byte by byte, and every byte's address takes registers.
    """
    if k % 16:
        return _gemm.Config(max(16, min(64, next_power_of_2(m))), 32, 32, 4, 2)
    rows = max(16, min(128, next_power_of_2(m)))
    columns = 128 if rows >= 64 and -(-m // rows) * -(-n // 128) >= _gemm.FULL // 2 else 64
    depth = max(32, min(DEPTH if rows < 128 or columns < 128 else 64, next_power_of_2(k)))
    warps = 8 if rows * columns >= 128 * 128 else 4
    return _gemm.Config(rows, columns, depth, warps, 2 if torch.version.hip else 3)


def multiplies_float8(x: Tensor) -> bool:
    """Whether the GPU of x has float8 products that Triton knows."""
    return torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 9)


@triton.jit
def unpacked(byte):
    """float8_e4m3fn, given as bytes, in float16: exact, of normal and subnormal numbers and NaN."""
    bits = byte.to(tl.uint16)
    sign, rest = (bits & 128) << 8, bits & 127
    number = (sign | (rest << 7)).to(tl.float16, bitcast=True) * 256.0  # exponents differ by 15 - 7
    return tl.where(rest == 127, float("nan"), number).to(tl.float16)


@triton.jit
def linear_kernel(
    q_ptr, scale_ptr, w_ptr, w_scale_ptr, b_ptr, y_ptr, M, N, K, q_stride, w_stride, scale_step, w_scale_step,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    UNPACK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of y a program."""
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    high = tl.minimum(down - first, GROUP)
    inside_group = tl.program_id(0) % (GROUP * across)
    row = ((first + inside_group % high) * BM + tl.arange(0, BM)).to(tl.int64)
    column = ((inside_group // high) * BN + tl.arange(0, BN)).to(tl.int64)
    live, within = row < M, column < N
    acc = tl.zeros((BM, BN), tl.int32 if WHOLE else tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = k < K
        a = tl.load(q_ptr + row[:, None] * q_stride + k[None, :], live[:, None] & inside[None, :], other=0.0)
        w = tl.load(
            w_ptr + column[None, :] * w_stride + k[:, None], within[None, :] & inside[:, None], other=0.0
        )
        if WHOLE:
            acc = tl.dot(a, w, acc, out_dtype=tl.int32)
        elif UNPACK:
            acc = tl.dot(unpacked(a).to(DOT), unpacked(w).to(DOT), acc)
        else:
            acc = tl.dot(a, w, acc, max_num_imprecise_acc=BK)
    y = acc.to(tl.float32) * tl.load(scale_ptr + row * scale_step, live, other=0.0).to(tl.float32)[:, None]
    y *= tl.load(w_scale_ptr + column * w_scale_step, within, other=0.0).to(tl.float32)[None, :]
    if b_ptr is not None:
        y += tl.load(b_ptr + column, within, other=0.0).to(tl.float32)[None, :]
    at = row[:, None] * N + column[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), live[:, None] & within[None, :])


def launch(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, b: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y [..., N] in `dtype`."""
    y = q.new_empty((*q.shape[:-1], len(w)), dtype=dtype)
    if not y.numel():
        return y
    flat = _rows.flat(q)
    (m, k), n = flat.shape, len(w)
    w = w if k < 2 or w.stride(1) == 1 else w.contiguous()
    scale, w_scale, b = scale.contiguous(), w_scale.contiguous(), None if b is None else b.contiguous()
    whole = q.dtype == torch.int8
    unpack = not whole and not (_gemm.on_gpu(q) and multiplies_float8(q))
    if unpack:
        flat, w = flat.view(torch.uint8), w.view(torch.uint8)
    cut = config(m, n, k)
    options: dict[str, Any] = {"num_warps": cut.warps, "num_stages": cut.stages}
    linear_kernel[(-(-m // cut.rows) * -(-n // cut.columns),)](
        flat, scale, w, w_scale, b, y, m, n, k, flat.stride(0), w.stride(0), int(scale.numel() > 1),
        int(w_scale.numel() > 1), BM=cut.rows, BN=cut.columns, BK=cut.depth,
        GROUP=GROUP, WHOLE=whole, UNPACK=unpack, DOT=tl.float16 if _gemm.on_gpu(q) else tl.float32, **options,
    )  # fmt: skip
    return y
