"""loss = linear_cross_entropy(x, w, b, y, ...) = cross_entropy(logits, y) + z_loss * mean(lse**2).

with a = scale * (x @ w^T + b), logits = softcap * tanh(a / softcap), or a where softcap is 0, and lse =
logsumexp(logits); the logits are made for a chunk of rows at a time, and so are all gradients.

Shapes     x: [N, D]; w: [V, D]; b: [V] or None; y: [N], int64. Returns a scalar in x.dtype, with `wide` in
           float32 (float64 for float64), as where the model casts its logits up.
           reduction: "mean", over the labels that are not `ignore_index`, or "sum"; lse**2 is averaged, or
           summed, over all rows. ignore_index: None where no label is left out. label_smoothing: as torch's.
Numerics   the logits of a chunk are rounded to x.dtype; what follows is fp32 (fp64 for fp64) and its gradient
           by the logits is rounded to x.dtype. w and b take the sum of products that are rounded to x.dtype
           for each chunk; they are summed in fp32 and rounded once more, when the gradient of the loss is
           known. No label that counts: "mean" is nan and its gradients 0, as torch's.
Cost       2 N V D flop forward; where gradients are wanted also 2 N V D for x and for w each, all of them
           forward: backward only scales. On the CPU no row is computed whose label is ignored. Bytes: a chunk
           of logits (once or twice in fp32, where capped or of lower precision), and from forward to backward
           the gradients, those of w and b in fp32. budget: the bytes of a chunk, 0 for 64 MiB on the CPU
           and 256 MiB on a GPU, or what LEAST rows take.
Limits     a label that is out of range raises, as in torch: on a GPU by an assertion on the device. No class
           weights, no probabilities as labels. No second derivative: asking for it raises.
Source     Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009;
           Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989, for the gradients that are made forward.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxaccel.kernels import _loss_rows as rows
from fxaccel.kernels import _operator
from fxaccel.kernels._norm import unless_double

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum")
AUTO = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # bytes of a chunk where none are given
LEAST = {"cpu": 256, "cuda": 1024}  # rows of a chunk then: fewer make thin products


def reference(
    x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, reduction: str = "mean",
    ignore_index: int | None = -100, label_smoothing: float = 0.0, scale: float = 1.0, softcap: float = 0.0,
    z_loss: float = 0.0, wide: bool = False, budget: int = 0,
) -> Tensor:  # fmt: skip
    """The meaning of this op: what every test compares with."""
    logits = F.linear(x, w, b) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if wide:
        logits = logits.to(rows.wide(x.dtype))
    left_out = w.shape[0] if ignore_index is None else ignore_index  # no label is that
    loss = F.cross_entropy(
        logits, y, reduction=reduction, ignore_index=left_out, label_smoothing=label_smoothing
    )
    if z_loss:
        squares = logits.logsumexp(-1).square()
        loss = loss + z_loss * (squares.mean() if reduction == "mean" else squares.sum())
    return loss


def unsupported(
    x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, reduction: str = "mean",
    ignore_index: int | None = -100, label_smoothing: float = 0.0, scale: float = 1.0, softcap: float = 0.0,
    z_loss: float = 0.0, wide: bool = False, budget: int = 0,
) -> Iterator[str]:  # fmt: skip
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    if x.dtype not in DTYPES:
        yield f"dtype {x.dtype} is not one of {', '.join(map(str, DTYPES))}"
    for name, t in (("w", w), ("b", b)):
        if t is not None and t.dtype != x.dtype:
            yield f"dtypes differ: x is {x.dtype}, {name} {t.dtype}"
    if y.dtype != torch.int64:
        yield f"labels are {y.dtype}; the kernel takes torch.int64"
    if (x.ndim, w.ndim, y.ndim) != (2, 2, 1):
        yield f"x, w and the labels have {x.ndim}, {w.ndim} and {y.ndim} dimensions, expected 2, 2 and 1"
        return
    if _operator.differ(x.shape[1], w.shape[1]):
        yield f"x has {x.shape[1]} columns and w {w.shape[1]}"
    if _operator.differ(x.shape[0], y.shape[0]):
        yield f"x has {x.shape[0]} rows and there are {y.shape[0]} labels"
    if reduction not in REDUCTIONS:
        yield f"the reduction is {reduction!r}, not one of {', '.join(REDUCTIONS)}"
    if not 0 <= label_smoothing <= 1:
        yield f"label smoothing is {label_smoothing}, not between 0 and 1"


class Loss(NamedTuple):
    """How the rows of logits are made a loss: the numbers among the arguments."""

    reduction: str
    ignored: int | None
    smoothing: float
    scale: float
    softcap: float
    z_loss: float

    def logits(self, x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> Tensor:
        """Those of a chunk, divided by the softcap."""
        by: Any = self.scale / (self.softcap or 1.0)
        if b is None:
            return torch.addmm(out, x, w.t(), beta=0, alpha=by, out=out)
        return torch.addmm(b, x, w.t(), beta=by, alpha=by, out=out)


class Sums:
    """Gradients of w and b that chunks add to, in fp32 or fp64; None where none is wanted."""

    def __init__(self, w: Tensor, weight: bool, bias: bool) -> None:
        kind = rows.wide(w.dtype)
        self.w = torch.empty_like(w, dtype=kind, memory_format=torch.contiguous_format) if weight else None
        self.b = w.new_zeros(w.shape[0], dtype=kind) if bias else None
        self.beta = 0  # what is there counts from the second chunk on

    def add(self, g: Tensor, x: Tensor, scale: float) -> None:
        """A chunk's: g is the gradient by its logits."""
        if self.w is not None:
            self.product(g.t(), x, self.w, scale)
        if self.b is not None:
            by: Any = scale
            self.b.add_(g.sum(0, dtype=self.b.dtype), alpha=by)
        self.beta = 1

    def product(self, g: Tensor, x: Tensor, out: Tensor, scale: float) -> None:
        """out * beta + g @ x: in fp32 where the device has such a product of halves."""
        by: Any = scale
        widens = x.device.type == "cuda" and not torch.version.hip
        if x.dtype == torch.float16 and not widens:
            g, x = g.to(out.dtype), x.to(out.dtype)  # a sum over rows can be past the range of float16
        if x.dtype == out.dtype:
            torch.addmm(out, g, x, beta=self.beta, alpha=by, out=out)
        elif widens:
            torch.addmm(out, g, x, beta=self.beta, alpha=by, out_dtype=out.dtype, out=out)
        elif self.beta:
            out.add_(torch.mm(g, x), alpha=by)
        else:
            torch.mul(torch.mm(g, x), by, out=out)

    def done(self) -> None:
        """Nothing more comes."""
        if self.w is not None and not self.beta:
            self.w.zero_()


def cut(n: int, row: int, device: str, budget: int) -> int:
    """How many of n rows to take at a time, each of so many bytes: equally many but for the last chunk."""
    most = max(1, budget // row) if budget else max(LEAST[device], AUTO[device] // row)
    parts = max(1, -(-n // most))
    return max(1, -(-n // parts))


def _checked(x: Tensor, y: Tensor, v: int, ignored: int | None) -> Tensor | None:
    """Which labels count, None for all; raises where one that does is out of range."""
    if len(x) != len(y):
        raise ValueError(f"Expected input batch_size ({len(x)}) to match target batch_size ({len(y)}).")
    keep = None if ignored is None else y != ignored
    bad = (y < 0) | (y >= v)
    if keep is not None:
        bad &= keep
    if y.device.type == "cuda":
        torch._assert_async(~bad.any(), "a label is out of bounds")
        return keep
    if bad.any():
        raise IndexError(f"Target {int(y[bad][0])} is out of bounds.")
    return None if keep is None or bool(keep.all()) else keep


def _count(y: Tensor, keep: Tensor | None, loss: Loss, dtype: torch.dtype) -> Tensor:
    """What a mean divides by."""
    if loss.reduction == "sum":
        return torch.ones((), dtype=dtype, device=y.device)
    n = torch.full((), y.numel(), dtype=dtype, device=y.device)
    return n if keep is None else keep.sum(dtype=dtype)


def compose_save(
    x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, reduction: str, ignore_index: int | None,
    label_smoothing: float, scale: float, softcap: float, z_loss: float, wide: bool, budget: int,
    x_grad: bool, w_grad: bool, b_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The CPU kernel, and that of float64 on a GPU: the loss, the gradients times a divisor, and that."""
    loss = Loss(reduction, ignore_index, label_smoothing, scale, softcap, z_loss)
    kind, gradient = rows.wide(x.dtype), x_grad or w_grad or b_grad
    keep = _checked(x, y, w.shape[0], ignore_index)
    count = _count(y, keep, loss, kind)
    taken = None  # the rows to compute
    if keep is not None and not z_loss:
        taken = keep.nonzero().squeeze(1)
        y, keep = y[taken], None
    elif keep is not None:
        y = y.masked_fill(~keep, 0)
    n, v = len(y), w.shape[0]
    c = _square_factor(loss, x, count)
    step = cut(n, v * x.itemsize, x.device.type, budget)
    buffer, losses = x.new_empty(min(step, n), v), x.new_empty(n, dtype=kind)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if x_grad else None
    sums, divisor = Sums(w, w_grad, b_grad), count.clamp(min=1)  # no label, no gradient
    if x.device.type == "cpu" and x.dtype == kind:  # a half's would lose what is small
        scale, divisor = scale / float(divisor), torch.ones_like(divisor)
    for at in range(0, n, step):
        part = slice(at, at + step)
        own = x[part] if taken is None else x[taken[part]]
        u = loss.logits(own, w, b, buffer[: len(own)])
        k = None if keep is None else keep[part]
        losses[part] = rows.compose(u, y[part], k, softcap, label_smoothing, c, gradient)
        sums.add(u, own, scale)
        if dx is not None and taken is None:
            _times(u, w, scale, dx[part])
        elif dx is not None and taken is not None:
            dx.index_copy_(0, taken[part], _times(u, w, scale, torch.empty_like(own)))
    return _results(losses, count, divisor, dx, sums, x, wide)


def launch_save(
    x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, reduction: str, ignore_index: int | None,
    label_smoothing: float, scale: float, softcap: float, z_loss: float, wide: bool, budget: int,
    x_grad: bool, w_grad: bool, b_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same with the Triton kernel. No checks: the caller has asked `unsupported`."""
    loss = Loss(reduction, ignore_index, label_smoothing, scale, softcap, z_loss)
    keep = _checked(x, y, w.shape[0], ignore_index)
    count = _count(y, keep, loss, torch.float32)
    n, v = len(y), w.shape[0]
    c = _square_factor(loss, x, count)
    step = cut(n, v * x.itemsize, "cuda", budget)
    buffer, losses = x.new_empty(min(step, n), v), x.new_empty(n, dtype=torch.float32)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if x_grad else None
    sums, y = Sums(w, w_grad, b_grad), y.contiguous()
    for at in range(0, n, step):
        part = slice(at, at + step)
        u = loss.logits(x[part], w, b, buffer[: len(x[part])])
        losses[part] = rows.launch(
            u, y[part], ignore_index, softcap, label_smoothing, c, x_grad or w_grad or b_grad
        )
        sums.add(u, x[part], scale)
        if dx is not None:
            _times(u, w, scale, dx[part])
    return _results(losses, count, count.clamp(min=1), dx, sums, x, wide)


def _times(g: Tensor, w: Tensor, scale: float, out: Tensor) -> Tensor:
    by: Any = scale
    return torch.addmm(out, g, w, beta=0, alpha=by, out=out)


def _square_factor(loss: Loss, x: Tensor, count: Tensor) -> Tensor | None:
    """What a row's lse**2 is multiplied by, before all is divided by `count`."""
    if not loss.z_loss:
        return None
    rows_of_all = max(1, len(x)) if loss.reduction == "mean" else 1
    return count.clamp(min=1) * (loss.z_loss / rows_of_all)


def _results(
    losses: Tensor, count: Tensor, divisor: Tensor, dx: Tensor | None, sums: Sums, x: Tensor, wide: bool
) -> tuple[Tensor, ...]:
    sums.done()
    total = torch.where(count > 0, losses.sum() / count.clamp(min=1), math.nan)
    grads = (x.new_empty(0) if g is None else g for g in (dx, sums.w, sums.b))
    return total.to(losses.dtype if wide else x.dtype), *grads, divisor


def _save_fake(
    x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, reduction: str, ignore_index: int | None,
    label_smoothing: float, scale: float, softcap: float, z_loss: float, wide: bool, budget: int,
    x_grad: bool, w_grad: bool, b_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    kind = rows.wide(x.dtype)
    return (
        x.new_empty((), dtype=kind if wide else x.dtype),
        x.new_empty(x.shape if x_grad else (0,)),
        w.new_empty(w.shape if w_grad else (0,), dtype=kind if w_grad else x.dtype),
        w.new_empty(w.shape[:1] if b_grad else (0,), dtype=kind if b_grad else x.dtype),
        x.new_empty((), dtype=kind),
    )


def _loss_alone(save: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """A kernel where no gradient is wanted. No checks: the caller has asked `unsupported`."""

    def loss_alone(
        x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, reduction: str = "mean",
        ignore_index: int | None = -100, label_smoothing: float = 0.0, scale: float = 1.0,
        softcap: float = 0.0, z_loss: float = 0.0, wide: bool = False, budget: int = 0,
    ) -> Tensor:  # fmt: skip
        options = reduction, ignore_index, label_smoothing, scale, softcap, z_loss, wide, budget
        return save(x, w, b, y, *options, False, False, False)[0]

    return loss_alone


compose, launch = _loss_alone(compose_save), _loss_alone(launch_save)


def _fake(
    x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, reduction: str = "mean",
    ignore_index: int | None = -100, label_smoothing: float = 0.0, scale: float = 1.0, softcap: float = 0.0,
    z_loss: float = 0.0, wide: bool = False, budget: int = 0,
) -> Tensor:  # fmt: skip
    return x.new_empty((), dtype=rows.wide(x.dtype) if wide else x.dtype)


op = _operator.define(
    "linear_cross_entropy(Tensor x, Tensor w, Tensor? b, Tensor y, str reduction='mean',"
    " int? ignore_index=-100, float label_smoothing=0.0, float scale=1.0, float softcap=0.0,"
    " float z_loss=0.0, bool wide=False, int budget=0) -> Tensor",
    cpu=compose,
    cuda=unless_double(launch, compose),
    fake=_fake,
)
save_op = _operator.define(
    "linear_cross_entropy_save(Tensor x, Tensor w, Tensor? b, Tensor y, str reduction, int? ignore_index,"
    " float label_smoothing, float scale, float softcap, float z_loss, bool wide, int budget, bool x_grad,"
    " bool w_grad, bool b_grad) -> (Tensor loss, Tensor dx, Tensor dw, Tensor db, Tensor divisor)",
    cpu=compose_save,
    cuda=unless_double(launch_save, compose_save),
    fake=_save_fake,
)


class LinearCrossEntropy(torch.autograd.Function):
    """The derivative: all gradients are made forward, and scaled when that of the loss is known."""

    @staticmethod
    def forward(ctx, x, w, b, y, *options):
        """The loss, and the gradients that are wanted."""
        loss, *grads, divisor = save_op(x, w, b, y, *options, *ctx.needs_input_grad[:3])
        ctx.save_for_backward(x, w, b, *grads, divisor)  # x, w, b: what a second derivative would be of
        return loss

    @staticmethod
    @_operator.once_differentiable
    def backward(ctx, g):
        """Gradients of x, w and b."""
        x, w, b, *grads, divisor = ctx.saved_tensors
        by = g.to(divisor.dtype) / divisor
        wanted = zip((x, w, b), grads, ctx.needs_input_grad, strict=False)
        return *(_scaled(made, by, t) if asked else None for t, made, asked in wanted), *[None] * 9


def _scaled(made: Tensor, by: Tensor, like: Tensor) -> Tensor:
    """made * by in the dtype of `like`, rounded once; itself where that is the same."""
    if made.dtype == like.dtype and type(by) is Tensor and by.device.type == "cpu" and float(by) == 1:
        return made
    return torch.mul(made.to(by.dtype), by, out=torch.empty_like(made, dtype=like.dtype))


def _flops(x: Any, w: Any, *args: Any, **kwargs: Any) -> int:
    """A product forward, and one for x and w each where their gradients are made."""
    wanted = [kwargs[n] for n in ("x_grad", "w_grad") if n in kwargs] or args[10:12]
    return 2 * x[0] * x[1] * w[0] * (1 + sum(map(bool, wanted)))


_operator.differentiate(op, LinearCrossEntropy.apply)
for _device in ("cpu", "cuda"):
    _operator.autocast(op, _device, partial(torch.get_autocast_dtype, _device), places=(0, 1, 2))
_operator.count_flops(op, _flops)
_operator.count_flops(save_op, _flops)
