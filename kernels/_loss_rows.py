"""Rows of logits become their losses, and in place the gradient of these.

u is a chunk of logits [R, V], divided by the softcap where there is one. With z = u, or cap * tanh(u) where
it is capped, p = softmax(z) and y a row's label:

    loss = keep * (-(1 - a) * log p[y] - a * mean(log p)) + c * logsumexp(z)**2         a: label smoothing
    dz   = keep * (p - (1 - a) * onehot(y) - a / V) + 2 * c * logsumexp(z) * p
    u   <- dz * (1 - tanh(u)**2)                                     (or dz, where nothing is capped)

Numerics   fp32 (fp64 for fp64) from the rounded u on; the gradient is rounded once. On the CPU exactly what
           torch's log_softmax gives; on a GPU tanh(u) is 1 - 2 / (exp(2 u) + 1), good to 1 eps of 1.
Cost       a GPU reads u twice, the second time from L2 where rows are short, and writes it once. The CPU
           takes a few rows at a time through all steps, in its cache: PIECE bytes, twice that with a softcap.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fxaccel.kernels._triton import next_power_of_2, tl, triton

BLOCK = 4096  # columns that a program holds at once: 16 a lane
PIECE = 2 * 2**20  # bytes of logits that the CPU takes through all steps at once
Rows = Callable[..., Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses and gradients of logits are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compose(
    u: Tensor, y: Tensor, keep: Tensor | None, softcap: float, smoothing: float, c: Tensor | None,
    gradient: bool,
) -> Tensor:  # fmt: skip
    """The CPU's kernel; y are labels, those of rows that are not kept any column; keep None keeps all."""
    loss = u.new_empty(len(u), dtype=wide(u.dtype))
    step = max(1, PIECE // (u.shape[1] * loss.itemsize))  # rows that stay in cache from pass to pass
    for at in range(0, len(u), step):
        part = slice(at, at + step)
        k = None if keep is None else keep[part]
        loss[part] = _piece(u[part], y[part].unsqueeze(1), k, softcap, smoothing, c, gradient)
    return loss


def _piece(
    u: Tensor, y: Tensor, keep: Tensor | None, softcap: float, smoothing: float, c: Tensor | None,
    gradient: bool,
) -> Tensor:  # fmt: skip
    f = u if u.dtype == wide(u.dtype) else u.to(wide(u.dtype))
    z = f
    if softcap:
        f = f.tanh_()
        z = f * softcap if gradient else f.mul_(softcap)
    top = None if c is None else z.amax(1)
    torch.log_softmax(z, 1, out=z)  # in place: the last thing it does with an element is to write it
    loss = z.gather(1, y).squeeze(1).neg_()
    if smoothing:
        loss.mul_(1 - smoothing).sub_(z.mean(1), alpha=smoothing)
    if keep is not None:
        loss.masked_fill_(~keep, 0.0)
    lse = None if top is None else top.sub_(z.amax(1))  # exact where z[y] is far below
    if c is not None and lse is not None:
        loss.addcmul_(c * lse, lse)
    if gradient:
        _differentiate(z, y, keep, smoothing, None if c is None or lse is None else 2 * c * lse)
        if softcap:
            z.addcmul_(z, f.square_(), value=-1)
        if z is not u:
            u.copy_(z)
    return loss


def _differentiate(z: Tensor, y: Tensor, keep: Tensor | None, smoothing: float, more: Tensor | None) -> None:
    """log p becomes dz; `more` is what p is multiplied by besides 1 for a row that is kept."""
    z.exp_()
    ones = z.new_ones(1, 1) if keep is None else keep.to(z.dtype).unsqueeze(1)
    if more is not None:
        z.mul_(ones + more.unsqueeze(1))
    elif keep is not None:
        z.mul_(ones)
    if smoothing:
        z.sub_(ones * (smoothing / z.shape[1]))
    z.scatter_add_(1, y, (ones * (smoothing - 1)).expand(len(z), 1))


@triton.jit
def _logits(row_ptr, start, V, softcap, BLOCK: tl.constexpr, CAPPED: tl.constexpr):
    """z of a block, -inf past the end, and tanh(u) where it is capped."""
    col = start + tl.arange(0, BLOCK)
    u = tl.load(row_ptr + col, col < V, other=float("-inf")).to(tl.float32)
    t = u
    if CAPPED:
        t = 1.0 - 2.0 / (tl.exp(2.0 * u) + 1.0)
        u = tl.where(col < V, softcap * t, float("-inf"))
    return u, t, col


@triton.jit
def _sums(row_ptr, y, V, softcap, CAPPED: tl.constexpr, SMOOTHS: tl.constexpr, BLOCK: tl.constexpr):
    """The maximum of z, the logarithm of the sum of exp(z - maximum), z[y], and where asked the sum of z."""
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    sum_z = tl.full((), 0.0, tl.float32)
    picked = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        z, _, col = _logits(row_ptr, start, V, softcap, BLOCK, CAPPED)
        new = tl.maximum(top, tl.max(z, 0))
        at = tl.where(new == float("-inf"), 0.0, new)  # of columns that are all masked, no NaN
        total = total * tl.exp(top - at) + tl.sum(tl.exp(z - at), 0)
        top = new
        picked += tl.sum(tl.where(col == y, z, 0.0), 0)
        if SMOOTHS:
            sum_z += tl.sum(tl.where(col < V, z, 0.0), 0)
    return top, tl.log(total), picked, sum_z


@triton.jit
def rows_kernel(
    u_ptr, y_ptr, c_ptr, loss_ptr, V, stride, ignored, softcap, smoothing,
    IGNORES: tl.constexpr, CAPPED: tl.constexpr, SMOOTHS: tl.constexpr, SQUARES: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a row: once for the maximum and the sum of exponentials, once for the gradient."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31
    row_ptr = u_ptr + row * stride
    y = tl.load(y_ptr + row)
    keep = 1.0
    if IGNORES:
        keep = tl.where(y == ignored, 0.0, 1.0)
        y = tl.where(y == ignored, -1, y)
    top, rest, picked, sum_z = _sums(row_ptr, y, V, softcap, CAPPED, SMOOTHS, BLOCK)
    loss = (top - picked) + rest
    if SMOOTHS:
        loss = loss * (1.0 - smoothing) + smoothing * ((top - sum_z / V) + rest)
    if IGNORES:
        loss = tl.where(keep > 0.0, loss, 0.0)
    factor = keep
    if SQUARES:
        c = tl.load(c_ptr)
        lse = top + rest
        loss += c * lse * lse
        factor = keep + 2.0 * c * lse
    tl.store(loss_ptr + row, loss)
    if GRADIENT:
        for start in range(0, V, BLOCK):
            z, t, col = _logits(row_ptr, start, V, softcap, BLOCK, CAPPED)
            g = tl.exp(z - top - rest) * factor
            if SMOOTHS:
                g -= keep * smoothing / V
            g = tl.where(col == y, g - keep * (1.0 - smoothing), g)
            if CAPPED:
                g *= 1.0 - t * t
            tl.store(row_ptr + col, g.to(u_ptr.dtype.element_ty), col < V)


def launch(
    u: Tensor, y: Tensor, ignored: int | None, softcap: float, smoothing: float, c: Tensor | None,
    gradient: bool,
) -> Tensor:  # fmt: skip
    """Run the Triton kernel. No checks; `ignored` is the label of rows that do not count, None for none."""
    loss = u.new_empty(len(u), dtype=torch.float32)
    v = u.shape[1]
    if len(u):
        block = min(BLOCK, next_power_of_2(v))
        rows_kernel[(len(u),)](
            u, y, c, loss, v, u.stride(0), 0 if ignored is None else ignored, softcap, smoothing,
            IGNORES=ignored is not None, CAPPED=softcap != 0, SMOOTHS=smoothing != 0, SQUARES=c is not None,
            GRADIENT=gradient, BLOCK=block, num_warps=max(1, block // 512),
        )  # fmt: skip
    return loss
