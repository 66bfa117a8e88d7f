"""y = monarch(x, right, left, b, out): a linear layer whose matrix is a product of two block-diagonal ones.

    h[n, k, (t l)] = sum_p right[k, (t l), p] x[n, (k p)]
    y[n, (s l)] = sum_(k t) left[l, s, (k t)] h[n, k, (t l)] + b[(s l)]

Every (l, k) slice of that matrix is a product of an [S, T] and a [T, P] matrix: of rank T.

Shapes     x: [..., C] with C <= k p, zeros being added; right: [k, q, p] with q = t l; left: [l, s, r] with
           r = k t; b: [out] or None, out <= s l. Of a pair in parentheses the second index runs faster.
           Returns y: [..., out], contiguous: the first `out` features.
Numerics   both sums in fp32 (fp64 for fp64); h is rounded to x.dtype between them, as between two linears.
Cost       2 (k q p + l s r) flop a row: with k = l = B blocks and t = C / B**2 the factors have C**2 / B
           elements each, and the dense layer B / 2 times the flop. Training keeps h, l r elements a row:
           to recompute it would add a seventh to the flop of a step.
Limits     float64 on a GPU runs the composition. A second derivative costs another forward.
Source     Dao et al. 2022, "Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
           arXiv:2204.00595.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels import _blocks, _monarch, _operator
from fxaccel.kernels._norm import unless_double


def reference(x: Tensor, right: Tensor, left: Tensor, b: Tensor | None, out: int) -> Tensor:
    """The meaning of this op: what every test compares with."""
    (k, _, p), (l, _, r) = right.shape, left.shape  # noqa: E741  the docstring's letter
    x = torch.nn.functional.pad(x, (0, k * p - x.shape[-1])).unflatten(-1, (k, p))
    h = torch.einsum("kqp,...kp->...kq", right, x).flatten(-2).unflatten(-1, (r, l))
    y = torch.einsum("lsr,...rl->...sl", left, h).flatten(-2)[..., :out]
    return y.contiguous() if b is None else y + b


def unsupported(x: Tensor, right: Tensor, left: Tensor, b: Tensor | None, out: int) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    odd = list(_blocks.odd(x, right=(right, 3), left=(left, 3), b=(b, 1)))
    yield from odd
    if odd:
        return
    (k, q, p), (l, s, r) = right.shape, left.shape  # noqa: E741
    if any(_operator.known(size) == 0 for size in (k, q, l, s, r)):
        yield f"right is {list(right.shape)} and left {list(left.shape)}; the kernel takes no empty factors"
    elif _operator.differ(k * q, l * r):
        yield f"right has {k} x {q} rows and left {l} x {r} columns; these are to be as many"
    elif _operator.known(q % l):
        yield f"right has {q} rows a block, no multiple of the {l} blocks of left"
    if (_operator.known(x.shape[-1] - k * p) or 0) > 0:
        yield f"x has {x.shape[-1]} features and right {k} x {p} columns"
    if out > s * l:
        yield f"{out} features are asked for, and left has {l} x {s} rows"
    if b is not None and _operator.differ(b.shape[0], out):
        yield f"b has {b.shape[0]} elements, and y {out} features"


def _finish(y: Tensor, x: Tensor, b: Tensor | None, out: int) -> Tensor:
    """The first `out` of y's features, plus b, in the shape of x's rows."""
    if y.shape[1] != out:
        y = y[:, :out].contiguous() if b is None else y[:, :out] + b
    elif b is not None:
        y.add_(b)
    return y.view(*x.shape[:-1], out)


def save(x: Tensor, right: Tensor, left: Tensor, b: Tensor | None, out: int) -> tuple[Tensor, Tensor]:
    """y, and h as [..., (l r)], as the second product reads it."""
    (k, _, p), (l, _, r) = right.shape, left.shape  # noqa: E741
    y, h = _blocks.pair(_blocks.rows(x, k * p), right, r, left, l)
    return _finish(y, x, b, out), h.view(*x.shape[:-1], l * r)


def compose(x: Tensor, right: Tensor, left: Tensor, b: Tensor | None, out: int) -> Tensor:
    """The CPU kernel."""
    y = _blocks.chain(_blocks.rows(x, right.shape[0] * right.shape[2]), right, left)
    return _finish(y, x, b, out)


def compose_backward(
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
    dy, h = _blocks.shuffle(_blocks.rows(dy, s * l), s), _blocks.rows(h, l * r)
    if left_grad:
        dleft = _blocks.weight_gradient(dy, h, left)
    if x_grad:
        flat, dh = _blocks.pair(dy, left.mT, l, right.mT, 1)
        dx = flat[:, : x.shape[-1]].contiguous().view(x.shape)
    elif right_grad:
        dh = _blocks.shuffle(_blocks.product(dy, left.mT), l)
    if right_grad:
        dright = _blocks.weight_gradient(dh, _blocks.rows(x, k * p), right)
    return dx, dright, dleft


def launch(x: Tensor, right: Tensor, left: Tensor, b: Tensor | None, out: int) -> Tensor:
    """Run the Triton kernels. No checks: the caller has asked `unsupported`."""
    if _monarch.fits(right, left):
        return _monarch.launch_fused(x, right, left, b, out)
    return _monarch.launch_save(x, right, left, b, out)[0]


def _fake(x: Tensor, right: Tensor, left: Tensor, b: Tensor | None, out: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


def _save_fake(x: Tensor, right: Tensor, left: Tensor, b: Tensor | None, out: int) -> tuple[Tensor, Tensor]:
    h = x.new_empty((*x.shape[:-1], left.shape[0] * left.shape[2]))
    return x.new_empty((*x.shape[:-1], out)), h


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    right: Tensor,
    left: Tensor,
    x_grad: bool,
    right_grad: bool,
    left_grad: bool,
) -> tuple[Tensor, ...]:
    asked = ((x, x_grad), (right, right_grad), (left, left_grad))
    return tuple(t.new_empty(t.shape if wanted else (0,)) for t, wanted in asked)


op = _operator.define(
    "monarch(Tensor x, Tensor right, Tensor left, Tensor? b, int out) -> Tensor",
    cpu=compose,
    cuda=unless_double(launch, compose),
    fake=_fake,
)
save_op = _operator.define(
    "monarch_save(Tensor x, Tensor right, Tensor left, Tensor? b, int out) -> (Tensor y, Tensor h)",
    cpu=save,
    cuda=unless_double(_monarch.launch_save, save),
    fake=_save_fake,
)
backward_op = _operator.define(
    "monarch_backward(Tensor dy, Tensor x, Tensor h, Tensor right, Tensor left, bool x_grad, bool right_grad,"
    " bool left_grad) -> (Tensor dx, Tensor dright, Tensor dleft)",
    cpu=compose_backward,
    cuda=unless_double(_monarch.launch_backward, compose_backward),
    fake=_backward_fake,
)


def differentiable(
    dy: Tensor, inputs: tuple[Tensor, ...], needed: list[bool], again: Any
) -> list[Tensor | None]:
    """Gradients that have gradients: of `again(*inputs)`, by PyTorch's own operators."""
    asked = [t for t, wanted in zip(inputs, needed, strict=True) if wanted]
    grads = iter(torch.autograd.grad(again(*inputs), asked, dy, create_graph=True) if asked else ())
    return [next(grads) if wanted else None for wanted in needed]


def bias_gradient(dy: Tensor, needed: bool) -> Tensor | None:
    """The sum of dy over its rows."""
    return dy.sum(list(range(dy.ndim - 1))) if needed and dy.ndim > 1 else dy if needed else None


class Monarch(torch.autograd.Function):
    """The derivative, from x and h."""

    @staticmethod
    def forward(ctx, x, right, left, b, out):
        """Run both products and keep what the gradient reads."""
        y, h = save_op(x, right, left, b, out)
        ctx.save_for_backward(x, right, left, h)
        ctx.out = out
        return y

    @staticmethod
    def backward(ctx, dy):
        """Gradients of x, right, left and b."""
        x, right, left, h = ctx.saved_tensors
        *needed, needs_b = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            grads = differentiable(
                dy, (x, right, left), needed, lambda x, r, s: reference(x, r, s, None, ctx.out)
            )
        else:
            made = backward_op(dy, x, h, right, left, *needed)
            grads = [t if wanted else None for t, wanted in zip(made, needed, strict=True)]
        return (*grads, bias_gradient(dy, needs_b), None)


def _flops(x, right, left, *args, **kwargs) -> int:
    return 2 * prod(x[:-1]) * (prod(right) + prod(left))


def _backward_flops(dy, x, h, right, left, x_grad, right_grad, left_grad, **kwargs) -> int:
    inner = x_grad or right_grad
    times = prod(right) * (x_grad + right_grad) + prod(left) * (inner + left_grad)
    return 2 * prod(x[:-1]) * times


_operator.differentiate(op, Monarch.apply)
_operator.autocast(op, "cpu", lambda: torch.get_autocast_dtype("cpu"))  # as PyTorch's linear
_operator.autocast(op, "cuda", lambda: torch.get_autocast_dtype("cuda"))
_operator.count_flops(op, _flops)
_operator.count_flops(save_op, _flops)
_operator.count_flops(backward_op, _backward_flops)


def direct(x: Tensor, right: Tensor, left: Tensor, b: Tensor | None, out: int) -> Tensor:
    """The op on a CPU tensor, past the dispatcher where neither a gradient is wanted nor a cast."""
    trained = torch.is_grad_enabled() and torch._C._any_requires_grad(x, right, left, b)
    if trained or torch.is_autocast_enabled("cpu"):
        return op(x, right, left, b, out)
    return compose(x, right, left, b, out)
