"""bias_activation: its CPU kernel, its derivative, its Triton kernels, its registration, what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import _activations
from fxaccel.kernels import bias_activation as kernel
from tests.helpers import thinned

EAGER = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "hardswish": F.hardswish,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(1, 1), (7,), (3, 123), (2, 5, 64), (0, 8), (4, 0)]
BOUNDED = ("tanh", "sigmoid")


def tensors(*shape, dtype=torch.float32, device="cpu"):
    """x, b and dy."""
    torch.manual_seed(sum(shape))
    x, dy = (2 * torch.randn(2, *shape)).to(dtype).to(device)
    return x, torch.randn(shape[-1:]).to(dtype).to(device), dy


def eager(x, b, activation):
    return EAGER[activation](x if b is None else x + b)


def results(f, x, b, dy, activation):
    """y and the gradients of x and, where there is one, b."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, b)]
    y = f(*leaves, activation)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


class Launched(torch.autograd.Function):
    """The Triton kernels as a function with its derivative."""

    @staticmethod
    def forward(ctx, x, b, activation):
        ctx.save_for_backward(x, b)
        ctx.activation = activation
        return kernel.launch(x, b, activation)

    @staticmethod
    def backward(ctx, dy):
        x, b = ctx.saved_tensors
        dx, db = kernel.launch_backward(dy, x, b, ctx.activation, b is not None)
        return dx, None if b is None else db, None


launched = Launched.apply


def terms(x, b, dy, activation):
    """What rounding errors go with, of y, dx and db, in float64: see `near`.

    The sum errs by eps of its terms, which a slope of at most 1.13 (of relu squared: of 2 |s|) passes on; a
    factor in (0, 1) errs by eps of 1, so an activation by eps of |s|, a slope by eps of 1 and of |s|, whose
    derivative is at most 2.
    """
    s = x.double().abs() + b.double().abs()
    if activation == "relu_squared":
        y, slope = s * s, 2 * s
    else:
        y, slope = 1 + s, 1 + s
    dx = dy.double().abs() * slope
    return y, dx, dx.sum(tuple(range(dx.ndim - 1)))


# -- on the CPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [True, False], ids=["biased", "alone"])
@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_cpu_it_is_the_operators(dtype, activation, biased):
    for shape in SHAPES:
        x, b, dy = tensors(*shape, dtype=dtype)
        b = b if biased else None
        want = results(eager, x, b, dy, activation)
        for f in (kernel.op, kernel.direct, kernel.reference):
            y = f(x, b, activation)
            assert torch.equal(y, want[0])
            assert y.is_contiguous()
        for got, grad in zip(results(kernel.direct, x, b, dy, activation), want, strict=True):
            assert torch.equal(got, grad)


@pytest.mark.parametrize("activation", EAGER)
def test_gradcheck(activation):
    x, b, _ = (t.requires_grad_() for t in tensors(3, 5, dtype=torch.float64))
    for f in (kernel.op, kernel.direct):
        assert torch.autograd.gradcheck(lambda x, b, f=f: f(x, b, activation), (x, b))
    assert torch.autograd.gradcheck(lambda x: kernel.op(x, None, activation), (x,))
    assert torch.autograd.gradcheck(lambda b: kernel.op(x.detach(), b, activation), (b,))


def test_what_is_kept_for_backward_is_x_and_the_bias_alone():
    x, b, dy = tensors(3, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernel.op(x.requires_grad_(), b.requires_grad_(), "quick_gelu").backward(dy)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), b.data_ptr()]


@pytest.mark.parametrize("activation", EAGER)
def test_inputs_are_not_written(activation):
    for b in (0, None):
        given = tensors(3, 123)
        copies = [t.clone() for t in given]
        x, dy, b = given[0], given[2], given[1] if b == 0 else None
        for f in (kernel.op, kernel.direct):
            f(x, b, activation)
            results(f, x, b, dy, activation)
        kernel.compose_backward(dy, x, b, activation, b is not None)
        assert all(map(torch.equal, given, copies))


def layouts(device):
    base = torch.randn(6, 4, 20, device=device)
    yield base[..., :10]
    yield base[..., ::2]
    yield base[..., :10].transpose(0, 1)
    yield base[:, :1, :10].expand(6, 4, 10)
    yield base.mT


@pytest.mark.parametrize("how", ["op", "direct", "launch"])
def test_strides(how, device):
    run = launched if how == "launch" else getattr(kernel, how)
    for x in layouts(device):
        b = torch.randn(2 * x.shape[-1], device=device)[::2]
        dy = torch.randn(x.shape[:-1], device=device)[..., None].expand(x.shape)
        assert run(x, b, "mish").is_contiguous()
        leaves = [t.detach().requires_grad_() for t in (x, b)]
        y = run(*leaves, "mish")
        want = results(eager, x, b, dy, "mish")
        for got, expected in zip([y, *torch.autograd.grad(y, leaves, dy)], want, strict=True):
            torch.testing.assert_close(got, expected)


# -- the Triton kernels ----------------------------------------------------------------------------

LAUNCHED = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]


@thinned(
    2,
    shape=[(7,), (3, 123), (0, 8), (4, 0), (3, 1025), (130, 33)],
    dtype=LAUNCHED,
    activation=EAGER,
)
def test_launch(shape, dtype, activation, device, near):
    x, b, dy = tensors(*shape, dtype=dtype, device=device)
    got = results(launched, x, b, dy, activation)
    want = results(eager, x, b, dy, activation)
    exact = results(eager, x.double(), b.double(), dy.double(), activation)
    for g, w, e, t in zip(got, want, exact, terms(x, b, dy, activation), strict=True):
        near(g, w, e, t)
        assert g.is_contiguous()


@pytest.mark.parametrize("activation", EAGER)
def test_launched_without_a_bias_or_without_its_gradient(activation, device):
    x, b, dy = tensors(5, 40, device=device)
    zero = torch.zeros_like(b)
    assert torch.equal(kernel.launch(x, None, activation), kernel.launch(x, zero, activation))
    dx, db = kernel.launch_backward(dy, x, None, activation, False)
    assert db.shape == (0,)
    assert torch.equal(dx, kernel.launch_backward(dy, x, zero, activation, True)[0])


def test_the_gradient_of_the_bias_does_not_depend_on_how_many_programs_sum_it(monkeypatch, device):
    x, b, dy = tensors(300, 40, device=device)
    found = []
    for waves in (1, 3):
        monkeypatch.setattr(kernel, "WAVES", waves)
        found.append(kernel.launch_backward(dy, x, b, "gelu", True))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])  # what errs by the order of a sum of 300


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # numpy's exp, in the interpreter
@pytest.mark.parametrize("activation", EAGER)
def test_what_is_far_out_is_what_it_tends_to(activation, device):
    x = torch.tensor([-1e18, -200.0, -30.0, 30.0, 200.0, 1e18], device=device)
    one, none = torch.ones_like(x), torch.zeros_like(x)
    y, dx = kernel.launch(x, none, activation), kernel.launch_backward(one, x, none, activation, False)[0]
    right = x[3:].square() if activation == "relu_squared" else one[3:] if activation in BOUNDED else x[3:]
    left = -one[:3] if activation == "tanh" else none[:3]
    rise = {"relu_squared": 2 * x[3:]}.get(activation, none[3:] if activation in BOUNDED else one[3:])
    torch.testing.assert_close(y, torch.cat([left, right]), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(dx, torch.cat([none[:3], rise]), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("activation", EAGER)
def test_small_values_and_the_ends_of_pieces(activation, device):
    """Of a tanh the quotient cancels near 0; of hardswish the slope jumps where the pieces meet."""
    x = torch.tensor([-3.0, -0.26, -0.24, -1e-4, 0.0, 1e-6, 0.24, 0.26, 3.0], device=device)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    y, (dx, _) = kernel.launch(x, zero, activation), kernel.launch_backward(one, x, zero, activation, False)
    want, slope, _ = results(eager, x.double(), zero.double(), one.double(), activation)
    # a factor in (0, 1) is off by a few eps of itself, and more where it is a small 1 + erf
    torch.testing.assert_close(y.double(), want, rtol=8 * 2**-23, atol=1e-7 if "gelu" in activation else 0)
    torch.testing.assert_close(dx.double(), slope, rtol=0, atol=8 * 2**-23)


@pytest.mark.parametrize("activation", EAGER)
def test_a_nan_stays_where_it_is(activation, device):
    x, b, dy = tensors(3, 40, device=device)
    x[1, 17] = float("nan")
    assert kernel.launch(x, b, activation).isnan().nonzero().tolist() == [[1, 17]]
    if activation not in ("relu", "hardswish"):  # of which torch's slope of a NaN is 1, too
        dx, db = kernel.launch_backward(dy, x, b, activation, True)
        assert dx.isnan().nonzero().tolist() == [[1, 17]]
        assert db.isnan().nonzero().tolist() == [[17]]


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_rows_that_are_not_there_add_nothing_whatever_the_bias(device):
    """Whose slope alone may be infinite, and 0 times that no number."""
    x, b, dy = tensors(3, 8, device=device)
    x[:, 5], b[5] = -3e38, 3e38
    assert torch.isfinite(kernel.launch_backward(dy, x, b, "relu_squared", True)[1]).all()


# -- registration ----------------------------------------------------------------------------------


def test_second_derivative_raises():
    x, b, _ = (t.requires_grad_() for t in tensors(3, 5))
    grad = torch.autograd.grad(kernel.op(x, b, "silu").sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="BiasActivation has no second derivative"):
        grad.square().sum().backward()


def test_opcheck():
    for activation in EAGER:
        x, b, dy = tensors(2, 3, 8)
        torch.library.opcheck(kernel.op, (x, b, activation))
        torch.library.opcheck(kernel.backward_op, (dy, x.mT.contiguous().mT, b, activation, True))
    torch.library.opcheck(kernel.op, (x.mT, None, "gelu"))
    torch.library.opcheck(kernel.backward_op, (dy, x, None, "gelu", False))
    torch.library.opcheck(kernel.op, (x.requires_grad_(), b.requires_grad_(), "silu"))


@pytest.mark.parametrize("activation", EAGER)
def test_flops(activation):
    x, b, dy = tensors(3, 8)
    with FlopCounterMode(display=False) as forward:
        y = kernel.op(x.requires_grad_(), b.requires_grad_(), activation)
    with FlopCounterMode(display=False) as backward:
        y.backward(dy)
    assert forward.get_total_flops() == 24 * (_activations.FORWARD[activation] + 1)
    assert backward.get_total_flops() == 24 * (_activations.BACKWARD[activation] + 2)


def test_compiled_and_exported_with_symbolic_rows():
    x, b, _ = (t.requires_grad_() for t in tensors(3, 8))

    def f(x, b):
        return kernel.op(x * 2, b, "mish").sin()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    grads = (torch.autograd.grad(g(x, b).sum(), (x, b)) for g in (compiled, f))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)

    class Model(torch.nn.Module):
        def forward(self, x, b):
            return kernel.op(x, b, "gelu")

    rows = {"x": {0: torch.export.Dim.DYNAMIC}, "b": None}
    program = torch.export.export(Model(), (torch.randn(4, 16), torch.randn(16)), dynamic_shapes=rows)
    x, b, _ = tensors(9, 16)
    assert torch.equal(program.module()(x, b), eager(x, b, "gelu"))


X = torch.empty(3, 4, device="meta")


def test_unsupported():
    assert list(kernel.unsupported(X, X[0], "silu")) == list(kernel.unsupported(X, None, "tanh")) == []
    assert "dtype torch.int32 is not one of" in next(kernel.unsupported(X.int(), None, "silu"))
    assert "x has no dimension" in next(kernel.unsupported(X[0, 0], X[0], "silu"))
    assert "the kernel adds one row to x" in next(kernel.unsupported(X, X, "silu"))
    assert "the kernel adds one row to x" in next(kernel.unsupported(X, X[:, 0], "silu"))
    assert "dtypes differ" in next(kernel.unsupported(X, X[0].half(), "silu"))
    assert "activation 'elu' is not one of" in next(kernel.unsupported(X, None, "elu"))
