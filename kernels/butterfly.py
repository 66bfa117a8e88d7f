"""y = butterfly(x, twiddle, b, out, reversed=False): a linear layer by a product of L sparse matrices.

Factor i, from 0 to L - 1, mixes pairs of features that are 2**i apart, each by a 2 x 2 matrix of its own:

    y[d, a, t] = sum_b twiddle[stack, i][d, t, a, b] x[d, b, t]      # feature d 2**(i+1) + a 2**i + t

Shapes     x: [..., C] with C <= n = 2**L, zeros being added; twiddle: [stacks, L, n/2, 2, 2], the third index
           being (d t), with t the faster; b: [out] or None, out <= stacks n. The stacks' features are
           concatenated and the first `out` returned: y: [..., out], contiguous. With `reversed` the factors
           read x's features in bit-reversed order, as a Fourier transform needs it.
Numerics   one launch on a GPU rounds once, after b. Multiplied out (below), the two matrices and what is
           between them round to x.dtype. All sums in fp32 (fp64 for fp64).
Cost       4 stacks n L flop a row; twiddle is 2 stacks n L elements. On the CPU, and above MAX on a GPU, the
           first half of the factors is multiplied out to dense blocks, and so is the other: 4 n**1.5 flop a
           row in matrix products, which from FEW rows on are faster than L passes over the data.
Limits     on a GPU MAX features in one launch; float64 runs the composition. The derivative of that launch
           has no second derivative; that of the composition has.
Source     Dao et al. 2019, "Learning Fast Algorithms for Linear Transforms Using Butterfly Factorizations",
           arXiv:1903.05895.
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from fxaccel.kernels import _blocks, _butterfly, _operator, monarch
from fxaccel.kernels._norm import unless_double

FEW = 8  # rows up to which the factors one after the other are faster than to multiply them out


def bit_reversed(n: int, device: torch.device) -> Tensor:
    """The numbers below n = 2**L in the order of their reversed bits."""
    bits = n.bit_length() - 1
    return torch.arange(n, device=device).view([2] * bits).permute(*range(bits)[::-1]).reshape(-1)


def _pass(x: Tensor, factor: Tensor, s: int) -> Tensor:
    """One factor [n/2, 2, 2] on x [N, n], on pairs that are s apart."""
    t = factor.reshape(-1, s, 2, 2).permute(0, 2, 1, 3)  # [D, a, t, b]
    x = x.reshape(len(x), len(t), 2, s)
    return (x[:, :, :1] * t[..., 0] + x[:, :, 1:] * t[..., 1]).flatten(1)


def passes(x: Tensor, twiddle: Tensor) -> Tensor:
    """Every factor of one stack, twiddle [L, n/2, 2, 2], on x [N, n]."""
    for i, factor in enumerate(twiddle):
        x = _pass(x, factor, 2**i)
    return x


def reference(x: Tensor, twiddle: Tensor, b: Tensor | None, out: int, reversed: bool = False) -> Tensor:
    """The meaning of this op: what every test compares with."""
    n = 2 * twiddle.shape[2]
    kind = x.dtype if x.dtype == torch.float64 else torch.float32
    flat = torch.nn.functional.pad(x.to(kind), (0, n - x.shape[-1])).reshape(x.shape[:-1].numel(), n)
    flat = flat[:, bit_reversed(n, x.device)] if reversed else flat
    y = torch.cat([passes(flat, stack) for stack in twiddle.to(kind)], 1)[:, :out]
    y = y if b is None else y + b.to(kind)
    return y.to(x.dtype).contiguous().view(*x.shape[:-1], out)


def unsupported(
    x: Tensor, twiddle: Tensor, b: Tensor | None = None, out: int = 0, reversed: bool = False
) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    odd = list(_blocks.odd(x, twiddle=(twiddle, 5), b=(b, 1)))
    yield from odd
    if odd:
        return
    stacks, levels, pairs = twiddle.shape[:3]
    n = 2 * pairs
    if stacks < 1 or levels < 1 or n != 2**levels or twiddle.shape[3:] != (2, 2):
        yield f"twiddle is {list(twiddle.shape)}; the kernel takes [stacks, L, 2**L / 2, 2, 2]"
    elif (_operator.known(x.shape[-1] - n) or 0) > 0:
        yield f"x has {x.shape[-1]} features and twiddle {n}"
    elif out > stacks * n:
        yield f"{out} features are asked for, and twiddle has {stacks} x {n}"
    if b is not None and _operator.differ(b.shape[0], out):
        yield f"b has {b.shape[0]} elements, and y {out} features"


def _multiplied(factors: Tensor) -> Tensor:
    """[G, M, m/2, 2, 2], butterflies on m features, as G dense matrices [G, m, m]."""
    g, _, pairs = factors.shape[:3]
    made = factors.new_ones(g, 2 * pairs, 1, 1)  # blocks of the product so far
    for i, factor in enumerate(factors.unbind(1)):
        s = 2**i
        t = factor.view(g, -1, s, 2, 2).permute(0, 1, 3, 2, 4)  # [G, D, a, t, b]
        blocks = made.view(g, -1, 2, s, s).transpose(2, 3).unsqueeze(2)  # [G, D, 1, t, b, column]
        made = (t.unsqueeze(-1) * blocks).reshape(g, -1, 2 * s, 2 * s)
    return made.squeeze(1)


def multiplied_out(twiddle: Tensor) -> tuple[Tensor, Tensor]:
    """Each stack as a monarch with t = 1: right [stacks, k, p, p] and left [stacks, p, k, k]."""
    stacks, levels, pairs = twiddle.shape[:3]
    half = -(-levels // 2)
    p, k = 2**half, 2 * pairs >> half
    wide = twiddle if twiddle.dtype == torch.float64 else twiddle.float()
    first = wide[:, :half].reshape(stacks, half, k, p // 2, 2, 2).transpose(1, 2)
    right = _multiplied(first.reshape(stacks * k, half, p // 2, 2, 2))
    left = wide.new_ones(stacks * p, 1, 1)
    if k > 1:  # the low bits of t are those of the place within a block, and a matrix of their own each
        then = wide[:, half:].reshape(stacks, levels - half, k // 2, p, 2, 2).permute(0, 3, 1, 2, 4, 5)
        left = _multiplied(then.reshape(stacks * p, levels - half, k // 2, 2, 2))
    return right.view(stacks, k, p, p).to(twiddle.dtype), left.view(stacks, p, k, k).to(twiddle.dtype)


def expanded(x: Tensor, twiddle: Tensor, b: Tensor | None, out: int, reversed: bool = False) -> Tensor:
    """The factors multiplied out, then two products a stack; with all derivatives."""
    n = 2 * twiddle.shape[2]
    if reversed:
        x = torch.nn.functional.pad(x, (0, n - x.shape[-1]))[..., bit_reversed(n, x.device)]
    right, left = multiplied_out(twiddle)
    times = monarch.compose if x.is_cpu and not torch.is_grad_enabled() else monarch.op
    if len(right) == 1:
        return times(x, right[0], left[0], b, out)
    y = torch.cat([times(x, *pair, None, n) for pair in zip(right, left, strict=True)], -1)[..., :out]
    return y.contiguous() if b is None else y + b


def compose(x: Tensor, twiddle: Tensor, b: Tensor | None, out: int, reversed: bool = False) -> Tensor:
    """The CPU kernel."""
    if x.is_cpu and x.shape[:-1].numel() <= FEW:
        return reference(x, twiddle, b, out, reversed)
    return expanded(x, twiddle, b, out, reversed)


def fits(x: Tensor, twiddle: Tensor) -> bool:
    """Whether one launch on a GPU holds the rows."""
    return x.dtype != torch.float64 and 2 * twiddle.shape[2] <= _butterfly.limit()


def launch(x: Tensor, twiddle: Tensor, b: Tensor | None, out: int, reversed: bool = False) -> Tensor:
    """Run the Triton kernels. No checks: the caller has asked `unsupported`."""
    run = _butterfly.launch_forward if fits(x, twiddle) else expanded
    return run(x, twiddle, b, out, reversed)


def _fake(x: Tensor, twiddle: Tensor, b: Tensor | None, out: int, reversed: bool = False) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


def _backward_fake(dy: Tensor, x: Tensor, twiddle: Tensor, reversed: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), twiddle.new_empty(twiddle.shape)


def compose_backward(dy: Tensor, x: Tensor, twiddle: Tensor, reversed: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x and twiddle, factor by factor, in fp32."""
    stacks, levels, pairs = twiddle.shape[:3]
    n = 2 * pairs
    kind = x.dtype if x.dtype == torch.float64 else torch.float32
    order = bit_reversed(n, x.device) if reversed else torch.arange(n, device=x.device)
    start = _blocks.rows(x.to(kind), n)[:, order]
    grads = _blocks.rows(dy.to(kind), stacks * n).view(len(start), stacks, n)
    dx, dtwiddle = torch.zeros_like(start), torch.empty_like(twiddle, dtype=kind)
    for stack in range(stacks):
        factors, inputs = twiddle[stack].to(kind), [start]
        for i in range(levels - 1):
            inputs.append(_pass(inputs[-1], factors[i], 2**i))
        grad = grads[:, stack]
        for i in range(levels)[::-1]:
            g, z = (t.reshape(len(start), pairs >> i, 2, 2**i) for t in (grad, inputs[i]))
            dtwiddle[stack, i] = torch.einsum("ndat,ndbt->dtab", g, z).reshape(pairs, 2, 2)
            grad = _pass(grad, factors[i].mT, 2**i)
        dx += grad
    dx = torch.empty_like(dx).index_copy_(1, order, dx)[:, : x.shape[-1]]
    return dx.to(x.dtype).contiguous().view(x.shape), dtwiddle.to(twiddle.dtype)


op = _operator.define(
    "butterfly(Tensor x, Tensor twiddle, Tensor? b, int out, bool reversed=False) -> Tensor",
    cpu=compose,
    cuda=launch,
    fake=_fake,
)
backward_op = _operator.define(
    "butterfly_backward(Tensor dy, Tensor x, Tensor twiddle, bool reversed) -> (Tensor dx, Tensor dtwiddle)",
    cpu=compose_backward,
    cuda=unless_double(_butterfly.launch_backward, compose_backward),
    fake=_backward_fake,
)


class Butterfly(torch.autograd.Function):
    """The derivative of the one launch, from x: a backward pass computes the factors' inputs again."""

    @staticmethod
    def forward(ctx, x, twiddle, b, out, reversed):
        """Run the op and keep its inputs."""
        ctx.save_for_backward(x, twiddle)
        ctx.reversed = reversed
        return op(x, twiddle, b, out, reversed)

    @staticmethod
    @_operator.once_differentiable
    def backward(ctx, dy):
        """Gradients of x, twiddle and b."""
        x, twiddle = ctx.saved_tensors
        needs_x, needs_twiddle, needs_b = ctx.needs_input_grad[:3]
        dx, dtwiddle = backward_op(dy, x, twiddle, ctx.reversed) if needs_x or needs_twiddle else (None, None)
        db = monarch.bias_gradient(dy, needs_b)
        return dx if needs_x else None, dtwiddle if needs_twiddle else None, db, None, None


def _derivative(x: Tensor, twiddle: Tensor, b: Tensor | None, out: int, reversed: bool) -> Tensor:
    if x.device.type == "cuda" and fits(x, twiddle):
        return Butterfly.apply(x, twiddle, b, out, reversed)
    return expanded(x, twiddle, b, out, reversed)


_operator.differentiate(op, _derivative)
_operator.autocast(op, "cpu", lambda: torch.get_autocast_dtype("cpu"))  # as PyTorch's linear
_operator.autocast(op, "cuda", lambda: torch.get_autocast_dtype("cuda"))
_operator.count_flops(op, lambda x, twiddle, *args, **kwargs: 2 * prod(x[:-1]) * prod(twiddle))
_operator.count_flops(backward_op, lambda dy, x, twiddle, *args, **kwargs: 6 * prod(x[:-1]) * prod(twiddle))


def direct(x: Tensor, twiddle: Tensor, b: Tensor | None, out: int, reversed: bool = False) -> Tensor:
    """The op on a CPU tensor, past the dispatcher where neither a gradient is wanted nor a cast."""
    trained = torch.is_grad_enabled() and torch._C._any_requires_grad(x, twiddle, b)
    if trained or torch.is_autocast_enabled("cpu"):
        return op(x, twiddle, b, out, reversed)
    return compose(x, twiddle, b, out, reversed)
