"""The Triton kernels of fxaccel::monarch and their launch: both products in one, or one after the other.

Shapes     x: [N, C]; right: [k, q, p]; left: [l, s, r]; h: [N, l, r]; y, dy: [N, (s l)] cut to `out`.
Numerics   sums in fp32; h rounds to x.dtype, y once, after b.
Cost       fused: h stays in registers. A program makes BM rows of one l's features: for each k it multiplies
           with the T rows of right that belong to (k, l), and these with left's, so nothing is done twice as
           long as one program holds all s rows of left. Apart: h is written and read once. y is written with
           stride l either way; neighbouring programs fill the lines between them.
Limits     fused from FUSED_FROM to FUSED_TO in T, and FUSED_ROWS in s.
Source     Dao et al. 2022, arXiv:2204.00595; Fu et al. 2023, "Monarch Mixer", arXiv:2310.12109.
"""

import torch
from torch import Tensor

from fxaccel.kernels import _blocks, _gemm, _rows
from fxaccel.kernels._triton import next_power_of_2, tl, triton

FUSED_FROM = 16  # the least depth of a product on tensor cores: below it, most of the work is on zeros
FUSED_TO = 64  # h beside the accumulator in registers
FUSED_ROWS = 256  # rows of left that one program holds; with more, h would be computed more than once
ROWS = 64  # of x a program


def fused_config(p: int, s: int, t: int, itemsize: int) -> _gemm.Config:
    """rows: of x; columns: of left, all of them; depth: of the product with right."""
    columns = max(16, next_power_of_2(s))
    warps = 8 if columns >= 128 or itemsize == 4 else 4
    depth = max(16, min(128 // itemsize, next_power_of_2(p)))
    rows = ROWS if itemsize == 2 else ROWS // 2
    return _gemm.Config(rows, columns, depth, warps, 2)


def fits(right: Tensor, left: Tensor) -> bool:
    """Whether the fused kernel is for factors of this size."""
    t = right.shape[1] // left.shape[0]
    return FUSED_FROM <= t <= FUSED_TO and left.shape[1] <= FUSED_ROWS


@triton.jit
def fused_kernel(
    x_ptr, right_ptr, left_ptr, b_ptr, y_ptr, N, C, OUT, K, T, P, L, S, x_stride,
    BM: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """BM rows of the features of one l: h for one k at a time, then its share of y."""
    low = tl.program_id(0) % L
    row = (tl.program_id(0) // L).to(tl.int64) * BM + tl.arange(0, BM)
    s, t, column = tl.arange(0, BS), tl.arange(0, BT), tl.arange(0, BP)
    live = (row < N)[:, None]
    x_row = x_ptr + (row * x_stride)[:, None]
    right_row = right_ptr + ((t * L + low).to(tl.int64) * P)[None, :] + column[:, None]
    left_row = left_ptr + ((low * S + s).to(tl.int64) * K * T)[None, :] + t[:, None]
    acc = tl.zeros((BM, BS), tl.float32)
    for k in range(K):
        h = tl.zeros((BM, BT), tl.float32)
        for start in range(0, P, BP):
            p = start + column
            inside = (p < P) & (k * P + p < C)
            x = tl.load(x_row + (k * P + p)[None, :], live & inside[None, :], other=0.0)
            w = tl.load(right_row + start, inside[:, None] & (t < T)[None, :], other=0.0)
            h = tl.dot(x.to(DOT), w.to(DOT), h, input_precision=PRECISION)
        w = tl.load(left_row, (t < T)[:, None] & (s < S)[None, :], other=0.0)
        acc = tl.dot(h.to(w.dtype).to(DOT), w.to(DOT), acc, input_precision=PRECISION)
        right_row += T * L * P
        left_row += T
    feature = s * L + low
    inside = (s < S) & (feature < OUT)
    if b_ptr is not None:
        acc += tl.load(b_ptr + feature, inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + (row * OUT)[:, None] + feature[None, :],
        acc.to(y_ptr.dtype.element_ty),
        live & inside[None, :],
    )


def launch_fused(x: Tensor, right: Tensor, left: Tensor, b: Tensor | None, out: int) -> Tensor:
    """y in one launch."""
    (k, q, p), (l, s, _) = right.shape, left.shape  # noqa: E741  the docstring's letter
    y = x.new_empty((*x.shape[:-1], out))
    if y.numel():
        flat = _rows.flat(x)
        n, c = flat.shape
        cut = fused_config(p, s, q // l, x.itemsize)
        options = {"num_warps": cut.warps, "num_stages": cut.stages, **_gemm.products(x)}
        fused_kernel[(l * -(-n // cut.rows),)](
            flat, right.contiguous(), left.contiguous(), None if b is None else b.contiguous(), y,
            n, c, out, k, q // l, p, l, s, flat.stride(0), BM=cut.rows, BS=cut.columns,
            BT=max(16, next_power_of_2(q // l)), BP=cut.depth, **options,
        )  # fmt: skip
    return y


def _views(right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """right as [k, l, t, p] and left as [l, s, r]; h's features run over (l t) for one k, so right's do."""
    q, l = right.shape[1], left.shape[0]  # noqa: E741
    return right.unflatten(1, (q // l, l)).transpose(1, 2), left


def _features(x: Tensor, k: int) -> Tensor:
    """x [N, (k p)] as [k, N, 1, p, 1]."""
    return x.view(len(x), k, 1, x.shape[1] // k).permute(1, 0, 2, 3).unsqueeze(-1)


def _outputs(y: Tensor, l: int) -> Tensor:  # noqa: E741
    """y [N, (s l)] as [l, N, 1, s, 1]."""
    return y.view(len(y), y.shape[1] // l, l).permute(2, 0, 1)[:, :, None, :, None]


def _hidden(h: Tensor, l: int, k: int) -> tuple[Tensor, Tensor]:  # noqa: E741
    """h [N, (l k t)] as the second product reads it, [l, N, 1, r, 1], and as the first writes it."""
    n, r = len(h), h.shape[1] // l
    return _features(h, l), h.view(n, l, k, r // k).permute(2, 0, 1, 3).unsqueeze(2)  # [k, N, 1, l, t]


def launch_save(x: Tensor, right: Tensor, left: Tensor, b: Tensor | None, out: int) -> tuple[Tensor, Tensor]:
    """y, and h as [..., (l r)]."""
    (k, _, p), (l, s, r) = right.shape, left.shape  # noqa: E741
    flat = _blocks.rows(x, k * p)
    n = len(flat)
    h, y = x.new_empty(n, l * r), x.new_empty(n, s * l)
    first, second = _views(right, left)
    reads, writes = _hidden(h, l, k)
    _gemm.contract(_features(flat, k), first.permute(0, 3, 1, 2).unsqueeze(2), writes)
    if b is not None:
        b = torch.nn.functional.pad(b, (0, s * l - out)).view(s, l).t().unsqueeze(-1)
    _gemm.contract(reads, second.mT[:, :, None, :, None], _outputs(y, l), b)
    return y[:, :out].contiguous().view(*x.shape[:-1], out), h.view(*x.shape[:-1], l * r)


def launch_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    right: Tensor,
    left: Tensor,
    x_grad: bool,
    right_grad: bool,
    left_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, right and left; empty where not asked for."""
    (k, _, p), (l, s, r) = right.shape, left.shape  # noqa: E741
    dx, dright, dleft = (x.new_empty(0) for _ in range(3))
    dy, h = _blocks.rows(dy, s * l), _blocks.rows(h, l * r)
    first, second = _views(right, left)
    reads, _ = _hidden(h, l, k)
    if left_grad:
        dleft = torch.empty_like(left, memory_format=torch.contiguous_format)
        _gemm.contract(_outputs(dy, l).permute(0, 3, 4, 1, 2), reads, dleft[:, :, None, :, None])
    if x_grad or right_grad:
        dh = torch.empty_like(h)
        second_dh, first_dh = _hidden(dh, l, k)
        _gemm.contract(_outputs(dy, l), second[:, :, None, :, None], second_dh)
        flat = _blocks.rows(x, k * p)
        if right_grad:
            dright = torch.empty_like(right, memory_format=torch.contiguous_format)
            into = _views(dright, left)[0].unsqueeze(-1)
            _gemm.contract(first_dh.permute(0, 3, 4, 1, 2), _features(flat, k), into)
        if x_grad:
            flat_dx = torch.empty_like(flat)
            _gemm.contract(first_dh, first.unsqueeze(-1), _features(flat_dx, k))
            dx = flat_dx[:, : x.shape[-1]].contiguous().view(x.shape)
    return dx, dright, dleft
