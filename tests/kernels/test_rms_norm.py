"""rms_norm: its CPU kernel, its registration and what it refuses. The Triton kernel is in test_rows.py."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import rms_norm as kernel

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (7,), (3, 123), (2, 5, 64), (0, 8), (4, 0)]


def tensors(*shape, dtype=torch.float32):
    torch.manual_seed(sum(shape))
    return [(torch.randn(s) + 1).to(dtype).requires_grad_() for s in (shape, shape[-1:])]


def results(f, args, dy, *rest):
    """y and the gradients of x, w and, if it is among `args`, b."""
    x, w, *b = leaves = [t.detach().clone().requires_grad_() for t in args]
    y = f(x, w, EPS, *rest, *b)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "rest", [(0.0, False), (1.0, False), (0.0, True)], ids=["plain", "offset", "rounded"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_kernel(shape, dtype, rest, biased, near, gradient_terms):
    args = tensors(*shape, dtype=dtype)
    args += [torch.randn(shape[-1:]).to(dtype)] * biased
    dy = torch.randn(shape)
    terms = [None, *gradient_terms(args[0], args[1] + rest[0], dy, False), *[None] * biased]
    for got, eager, exact, term in zip(
        results(kernel.op, args, dy, *rest),
        results(kernel.reference, args, dy, *rest),
        results(kernel.reference, [t.double() for t in args], dy.double(), *rest),
        terms,
        strict=True,
    ):
        near(got, eager, exact, term)
        assert got.is_contiguous()


def test_no_grad_and_grad_give_the_same_bits():
    x, w = tensors(5, 123)
    with torch.no_grad():
        y = kernel.op(x, w, EPS)
    assert torch.equal(y, kernel.op(x, w, EPS))
    with torch.inference_mode():
        assert torch.equal(y, kernel.op(x, w, EPS))
    assert kernel.op(x, w, EPS).requires_grad
    assert not y.requires_grad


def test_input_is_not_written():
    for dtype in DTYPES:
        x, w = (t.detach() for t in tensors(5, 123, dtype=dtype))
        copies = x.clone(), w.clone()
        kernel.op(x, w, EPS, 1.0, True)
        assert torch.equal(x, copies[0])
        assert torch.equal(w, copies[1])


def test_strides():
    x, w = tensors(6, 20)
    dy = torch.randn(6, 20)
    for x_ in (x.mT.contiguous().mT, torch.cat([x, x], -1)[:, :20], x[:1].expand(6, 20)):
        for a, b in zip(
            results(kernel.op, [x_, w], dy.T.contiguous().T),
            results(kernel.reference, [x_, w], dy),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rest", [(0.0,), (1.0,), (0.0, True)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_gradcheck(weighted, biased, rest):
    x, w = tensors(3, 5, dtype=torch.float64)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True) if biased else None

    def f(x, w, b):
        return kernel.op(x, w, EPS, *rest, b=b)

    assert torch.autograd.gradcheck(f, (x, w if weighted else None, b))


def test_the_bias_is_added_before_the_one_rounding():
    """Rounded before the bias, 1 + 2**-9 would become 1 in bfloat16 and the sum 0."""
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    w = torch.full((4,), 1 + 2**-7, dtype=torch.bfloat16)
    for offset in (0.0, 2.0**-8):  # a weight of 1 + 3 * 2**-8 is none of bfloat16
        b = -w
        for f in (kernel.op, kernel.reference, kernel.direct):
            y = f(x, w, 0.0, offset, False, b)
            assert torch.equal(y, torch.full_like(x, offset)), f


@pytest.mark.parametrize(
    "rest", [(0.0, False), (1.0, False), (0.0, True)], ids=["plain", "offset", "rounded"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("small", [True, False])
def test_direct(small, dtype, rest, near, gradient_terms, monkeypatch):
    monkeypatch.setattr(kernel, "SMALL", 3 * 123 if small else 3 * 123 - 1)
    args = tensors(3, 123, dtype=dtype)
    args += [torch.randn(123).to(dtype)]
    dy = torch.randn(3, 123)
    terms = [None, *gradient_terms(args[0], args[1] + rest[0], dy, False), None]
    got = results(kernel.direct, args, dy, *rest)
    assert small == (kernel.direct(*args[:2], EPS).grad_fn.name() != "NormBackward")
    eager = results(kernel.reference, args, dy, *rest)
    exact = results(kernel.reference, [t.double() for t in args], dy.double(), *rest)
    for g, e, x, term in zip(got, eager, exact, terms, strict=True):
        near(g, e, x, term)


def test_a_bias_alone_has_a_gradient():
    x, w = (t.detach() for t in tensors(5, 123))
    b = torch.randn(123, requires_grad=True)
    y = kernel.direct(x, w, EPS, b=b)
    torch.testing.assert_close(y, kernel.op(x, w, EPS, b=b))
    dy = torch.randn(5, 123)
    torch.testing.assert_close(torch.autograd.grad(y, b, dy)[0], dy.sum(0))


def test_rows_of_zeros_and_of_tiny_values():
    x = torch.zeros(3, 8)
    x[1], x[2] = 1e-20, 1e-4
    x.requires_grad_()
    y = kernel.op(x, None, EPS)
    torch.testing.assert_close(y, F.rms_norm(x, (8,), None, EPS))
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_second_derivative_raises():
    x, w = tensors(3, 5)
    grad = torch.autograd.grad(kernel.op(x, w, EPS).sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, weighted):
    x, w = tensors(2, 3, 8, dtype=dtype)
    torch.library.opcheck(kernel.op, (x, w if weighted else None, EPS))
    b = torch.randn(8).to(dtype)
    torch.library.opcheck(kernel.op, (x.detach(), w.detach() if weighted else None, EPS, 1.0, True, b))
    torch.library.opcheck(kernel.op, (x, w if weighted else None, EPS, 1.0, True, b.requires_grad_()))


def test_autocast_on_the_cpu_changes_nothing_as_in_torch():
    x, w = tensors(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel.op(x, w, EPS).dtype == torch.float32
        y = kernel.op(x.bfloat16(), w, EPS)  # what follows a linear: its weight is not cast
        assert y.dtype == F.rms_norm(x.bfloat16(), (8,), w, EPS).dtype == torch.bfloat16
        y.float().sum().backward()
        assert kernel.op(x.bfloat16(), w, EPS, 0.0, False, w).dtype == torch.bfloat16
    assert w.grad.dtype == torch.float32


@pytest.mark.gpu
def test_autocast_on_a_gpu_computes_in_fp32():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    x, w = (t.detach().cuda() for t in tensors(3, 8, dtype=torch.bfloat16))
    with torch.autocast("cuda", torch.bfloat16):
        assert kernel.op(x, w, EPS).dtype == F.rms_norm(x, (8,), w, EPS).dtype == torch.float32


@pytest.mark.parametrize("biased", [False, True])
def test_flops(biased):
    x, w = tensors(3, 8)
    args = (x, w, EPS, 0.0, False, *[w] * biased)
    with FlopCounterMode(display=False) as forward:
        y = kernel.op(*args)
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        kernel.op(*args)
    assert forward.get_total_flops() == inference.get_total_flops() == (4 + biased) * 24
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == (9 + biased) * 24


def test_compiled():
    x, w = tensors(3, 8)

    def f(x, w):
        return kernel.op(x * 2, w, EPS, 1.0, False, w).sin()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, w), f(x, w))
    for a, b in zip(*(torch.autograd.grad(g(x, w).sum(), (x, w)) for g in (compiled, f)), strict=True):
        torch.testing.assert_close(a, b)


def test_exported_whole_with_symbolic_sizes():
    class Model(torch.nn.Module):
        def forward(self, x, w):
            return kernel.op(x, w, EPS)

    x, w = tensors(4, 8)
    dims = {"x": {0: torch.export.Dim.AUTO}, "w": None}
    program = torch.export.export(Model(), (x, w), dynamic_shapes=dims)
    assert kernel.op in [n.target for n in program.graph.nodes]
    val = next(n.meta["val"] for n in program.graph.nodes if n.name == "x")
    guards = len(val.shape[0].node.shape_env.guards)
    assert list(kernel.unsupported(val, w)) == []
    assert list(kernel.unsupported(val, val[0])) == []
    assert len(val.shape[0].node.shape_env.guards) == guards
    x = torch.randn(9, 8)
    torch.testing.assert_close(program.module()(x, w), kernel.reference(x, w, EPS))


X, W = torch.empty(3, 8, device="meta"), torch.empty(8, device="meta")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((X.int(), None), "dtype torch.int32 is not one of"),
        ((X[0, 0], None), "no dimension to normalise over"),
        ((X, W.half()), "dtypes differ: x is torch.float32, w torch.float16"),
        ((X, X), "w has 2 dimensions"),
        ((X, W[:4]), "w has 4 elements, and x 8"),
        ((X, W, EPS, 0.0, False, W.half()), "dtypes differ: x is torch.float32, b torch.float16"),
        ((X, W, EPS, 0.0, False, W[:4]), "b has 4 elements, and x 8"),
        (
            (X.bfloat16(), W.bfloat16(), EPS, 0.0, False, W),
            "dtypes differ: w is torch.bfloat16, b is torch.float32",
        ),
    ],
)
def test_unsupported(args, why):
    assert any(why in sentence for sentence in kernel.unsupported(*args))


def test_supported():
    assert list(kernel.unsupported(X, W)) == []
    assert list(kernel.unsupported(X, None, EPS, 1.0, True, W)) == []
    assert list(kernel.unsupported(X.bfloat16(), W, EPS, 1.0, True, W)) == []  # weights in fp32
