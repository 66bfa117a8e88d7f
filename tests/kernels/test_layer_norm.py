"""layer_norm: its CPU kernel, its registration and what it refuses. The Triton kernel is in test_rows.py."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import layer_norm as kernel

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (7,), (3, 123), (2, 5, 64), (0, 8), (4, 0)]


def tensors(*shape, dtype=torch.float32):
    torch.manual_seed(sum(shape))
    sizes = (shape, shape[-1:], shape[-1:])
    return [(torch.randn(s) + 1).to(dtype).requires_grad_() for s in sizes]


def results(f, args, dy):
    args = [t.detach().clone().requires_grad_() for t in args]
    y = f(*args, EPS)
    return [y, *torch.autograd.grad(y, args, dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_kernel(shape, dtype, near, gradient_terms):
    args, dy = tensors(*shape, dtype=dtype), torch.randn(shape)
    terms = [None, *gradient_terms(*args[:2], dy, True), None]
    for got, eager, exact, term in zip(
        results(kernel.op, args, dy),
        results(kernel.reference, args, dy),
        results(kernel.reference, [t.double() for t in args], dy.double()),
        terms,
        strict=True,
    ):
        near(got, eager, exact, term)
        assert got.is_contiguous()


def test_same_as_torch():
    x, w, b = tensors(5, 123)
    assert torch.equal(kernel.op(x, w, b, EPS), F.layer_norm(x, (123,), w, b, EPS))


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_gradcheck_and_opcheck_without_weights(weight, bias):
    x, w, b = tensors(3, 5, dtype=torch.float64)
    args = (x, w if weight else None, b if bias else None, EPS)
    assert torch.autograd.gradcheck(kernel.op, args)
    torch.library.opcheck(kernel.op, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    args = tensors(2, 3, 8, dtype=dtype)
    torch.library.opcheck(kernel.op, (*args, EPS))
    torch.library.opcheck(kernel.op, (*(t.detach() for t in args), EPS))


def test_second_derivative_raises():
    x, w, b = tensors(3, 5)
    grad = torch.autograd.grad(kernel.op(x, w, b, EPS).sum(), w, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_autocast_on_the_cpu_changes_nothing_as_in_torch():
    x, w, b = tensors(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel.op(x, w, b, EPS).dtype == torch.float32
        assert kernel.op(x.bfloat16(), w, b, EPS).dtype == torch.bfloat16


@pytest.mark.gpu
def test_autocast_on_a_gpu_computes_in_fp32():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    x, w, b = (t.detach().cuda() for t in tensors(3, 8, dtype=torch.bfloat16))
    with torch.autocast("cuda", torch.bfloat16):
        assert kernel.op(x, w, b, EPS).dtype == torch.float32


def test_flops():
    x, w, b = tensors(3, 8)
    with FlopCounterMode(display=False) as forward:
        y = kernel.op(x, w, b, EPS)
    assert forward.get_total_flops() == 7 * 24
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 13 * 24


def test_compiled():
    args = tensors(3, 8)

    def f(*args):
        return kernel.op(*args, EPS).sin()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(g(*args).sum(), args) for g in (compiled, f)), strict=True):
        torch.testing.assert_close(a, b)


X, W = torch.empty(3, 8, device="meta"), torch.empty(8, device="meta")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((X.int(), None), "dtype torch.int32 is not one of"),
        ((X[0, 0], None), "no dimension to normalise over"),
        ((X, W, W.half()), "dtypes differ: x is torch.float32, b torch.float16"),
        ((X, X), "w has 2 dimensions"),
        ((X, W, W[:4]), "b has 4 elements, and x 8"),
        ((X.bfloat16(), W.bfloat16(), W), "dtypes differ: w is torch.bfloat16, b is torch.float32"),
    ],
)
def test_unsupported(args, why):
    assert any(why in sentence for sentence in kernel.unsupported(*args))


def test_supported():
    assert list(kernel.unsupported(X, W, W)) == []
    assert list(kernel.unsupported(X, None)) == []
    assert list(kernel.unsupported(X.bfloat16(), W, W)) == []  # weights in fp32
