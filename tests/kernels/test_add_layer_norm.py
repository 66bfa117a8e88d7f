"""add_layer_norm: its CPU kernel, its registration, its refusals. The Triton kernel is in test_rows.py."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import add_layer_norm as kernel

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (7,), (3, 123), (2, 5, 64), (0, 8), (4, 0)]


def tensors(*shape, dtype=torch.float32):
    """x, r, w, b."""
    torch.manual_seed(sum(shape))
    sizes = (shape, shape, shape[-1:], shape[-1:])
    return [(torch.randn(s) + 1).to(dtype).requires_grad_() for s in sizes]


def results(f, args, dy, dh):
    args = [t.detach().clone().requires_grad_() for t in args]
    y, h = f(*args, EPS)
    return [y, h, *torch.autograd.grad((y, h), args, (dy.to(y.dtype), dh.to(h.dtype)))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_kernel(shape, dtype, near, gradient_terms):
    args = tensors(*shape, dtype=dtype)
    dy, dh = torch.randn(shape), torch.randn(shape)
    rounded = [(args[0] + args[1]).double(), torch.zeros(shape).double()]  # h is x + r, rounded
    rounded += [t.double() for t in args[2:]]
    dx, dw = gradient_terms(rounded[0], args[2], dy, True)
    terms = [None, None, dx + dh.abs(), dx + dh.abs(), dw, None]
    for got, eager, exact, term in zip(
        results(kernel.op, args, dy, dh),
        results(kernel.reference, args, dy, dh),
        results(kernel.reference, rounded, dy.double(), dh.double()),
        terms,
        strict=True,
    ):
        near(got, eager, exact, term)
        assert got.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_h_is_the_sum(dtype):
    x, r, *rest = tensors(5, 123, dtype=dtype)
    assert torch.equal(kernel.op(x, r, *rest, EPS)[1], x + r)


def test_same_as_the_two_steps():
    x, r, w, b = tensors(5, 123)
    y, h = kernel.op(x, r, w, b, EPS)
    torch.testing.assert_close(y, F.layer_norm(h, (123,), w, b, EPS))


@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck(weighted):
    args = tensors(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(kernel.op, (*args[:2], *(w if weighted else None for w in args[2:]), EPS))


@pytest.mark.parametrize("read", [0, 1])
def test_one_output_unread(read):
    """A gradient that never comes is None, not a tensor of zeros."""
    args = tensors(3, 5, dtype=torch.float64)
    got = torch.autograd.grad(kernel.op(*args, EPS)[read].sin().sum(), args, allow_unused=True)
    want = torch.autograd.grad(kernel.reference(*args, EPS)[read].sin().sum(), args, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b)


def test_gradients_of_x_and_r_are_not_one_tensor_to_write_to():
    args = tensors(3, 5)
    for _ in range(2):  # the second time adds in place to the first
        y, h = kernel.op(*args, EPS)
        (y.sin().sum() + h.sin().sum()).backward()
    twice = [t.grad.clone() for t in args]
    for t in args:
        t.grad = None
    y, h = kernel.reference(*args, EPS)
    (y.sin().sum() + h.sin().sum()).backward()
    for t, g in zip(args, twice, strict=True):
        torch.testing.assert_close(g, 2 * t.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    args = tensors(2, 3, 8, dtype=dtype)
    torch.library.opcheck(kernel.op, (*args, EPS))
    torch.library.opcheck(kernel.op, (*(t.detach() for t in args), EPS))


def test_strides():
    x, r, *rest = tensors(6, 20)
    x, r = x.mT.contiguous().mT, r[:1].expand(6, 20)
    for a, b in zip(kernel.op(x, r, *rest, EPS), kernel.reference(x, r, *rest, EPS), strict=True):
        torch.testing.assert_close(a, b)
        assert a.is_contiguous()


def test_second_derivative_raises():
    args = tensors(3, 5)
    y, h = kernel.op(*args, EPS)
    grad = torch.autograd.grad(y.sum() + h.sum(), args[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_flops():
    args = tensors(3, 8)
    with FlopCounterMode(display=False) as forward:
        y, h = kernel.op(*args, EPS)
    assert forward.get_total_flops() == 8 * 24
    with FlopCounterMode(display=False) as backward:
        (y + h).sum().backward()
    assert backward.get_total_flops() == 14 * 24


def test_autocast_on_the_cpu_changes_nothing_as_in_torch():
    x, r, *rest = tensors(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = kernel.op(x.bfloat16(), r.bfloat16(), *rest, EPS)
    assert y.dtype == h.dtype == torch.bfloat16


def test_compiled():
    args = tensors(3, 8)

    def f(*args):
        y, h = kernel.op(*args, EPS)
        return y.sin() + h

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(g(*args).sum(), args) for g in (compiled, f)), strict=True):
        torch.testing.assert_close(a, b)


X, W = torch.empty(3, 8, device="meta"), torch.empty(8, device="meta")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((X.int(), X.int(), None), "dtype torch.int32 is not one of"),
        ((X[0, 0], X[0, 0], None), "no dimension to normalise over"),
        ((X, X.half(), None), "dtypes differ: x is torch.float32, r torch.float16"),
        ((X, X[:1], None), "does not broadcast"),
        ((X, X[0], None), "does not broadcast"),
        ((X, X, W[:4]), "w has 4 elements, and x 8"),
        (
            (X.bfloat16(), X.bfloat16(), W.bfloat16(), W),
            "dtypes differ: w is torch.bfloat16, b is torch.float32",
        ),
    ],
)
def test_unsupported(args, why):
    assert any(why in sentence for sentence in kernel.unsupported(*args))


def test_supported():
    assert list(kernel.unsupported(X, X, W, W)) == []
    assert list(kernel.unsupported(X.bfloat16(), X.bfloat16(), W, W)) == []  # weights in fp32
