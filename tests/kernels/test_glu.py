"""glu: its CPU kernel, its derivative, its Triton kernels, its registration and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import _glu
from fxaccel.kernels import glu as kernel

EAGER = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(1, 1), (7,), (3, 123), (2, 5, 64), (0, 8), (4, 0)]


def tensors(*shape, dtype=torch.float32, device="cpu"):
    """gate, up and dy."""
    torch.manual_seed(sum(shape))
    return [(2 * torch.randn(shape)).to(dtype).to(device) for _ in range(3)]


def eager(gate, up, activation):
    return EAGER[activation](gate) * up


def results(f, gate, up, dy, activation):
    """y and both gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (gate, up)]
    y = f(*leaves, activation)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def launched(gate, up, activation):
    return Launched.apply(gate, up, activation)


class Launched(torch.autograd.Function):
    """The Triton kernels as a function with its derivative."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return kernel.launch(gate, up, activation)

    @staticmethod
    def backward(ctx, dy):
        return *kernel.launch_backward(dy, *ctx.saved_tensors, ctx.activation), None


def terms(gate, up, dy, activation):
    """What rounding errors go with, of y, dgate and dup, in float64: see `near`.

    1 + erf and 1 + tanh cancel to a few eps of 1: an activation is off by eps of gate, a slope by eps of 1
    and of gate.
    """
    gate, up, dy = (t.double().abs() for t in (gate, up, dy))
    return gate * up, dy * up * (1 + gate), dy * (1 + gate)


# -- on the CPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_the_cpu_it_is_the_two_operators(shape, dtype, activation):
    gate, up, dy = tensors(*shape, dtype=dtype)
    want = eager(gate, up, activation)
    for f in (kernel.op, kernel.direct, kernel.reference):
        y = f(gate, up, activation)
        assert torch.equal(y, want)
        assert y.is_contiguous()
    wanted = results(eager, gate, up, dy, activation)
    for f in (kernel.op, kernel.direct):
        for got, grad in zip(results(f, gate, up, dy, activation), wanted, strict=True):
            assert torch.equal(got, grad)


@pytest.mark.parametrize("activation", EAGER)
def test_gradcheck(activation):
    gate, up, _ = (t.requires_grad_() for t in tensors(3, 5, dtype=torch.float64))
    for f in (kernel.op, kernel.direct):
        assert torch.autograd.gradcheck(lambda g, u, f=f: f(g, u, activation), (gate, up))


def test_what_is_kept_for_backward_is_gate_and_up_alone():
    gate, up, dy = tensors(3, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernel.op(gate.requires_grad_(), up.requires_grad_(), "silu").backward(dy)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]


def test_inputs_are_not_written():
    for dtype in DTYPES:
        for activation in EAGER:
            given = tensors(3, 123, dtype=dtype)
            copies = [t.clone() for t in given]
            for f in (kernel.op, kernel.direct):
                f(*given[:2], activation)
                results(f, *given, activation)
            kernel.compose_backward(given[2], *given[:2], activation)
            assert all(map(torch.equal, given, copies))


def pairs(device="cpu"):
    """gate and up in every layout: halves either way, every other column, transposed, expanded."""
    base = torch.randn(6, 4, 20, device=device)
    first, second = base.chunk(2, -1)
    yield first, second
    yield second, first
    yield base[..., ::2], base[..., 1::2]
    yield first.transpose(0, 1), second.transpose(0, 1)
    yield first[:, :1].expand(6, 4, 10), second
    yield first.mT, second.mT.contiguous()


@pytest.mark.parametrize("how", ["op", "direct", "launch"])
def test_strides(how, device):
    run = launched if how == "launch" else getattr(kernel, how)
    for gate, up in pairs(device):
        dy = torch.randn(gate.shape[:-1], device=device)[..., None].expand(gate.shape)
        y = run(gate, up, "silu")
        assert y.is_contiguous()
        leaves = [t.detach().requires_grad_() for t in (gate, up)]
        got = [y, *torch.autograd.grad(run(*leaves, "silu"), leaves, dy)]
        for a, b in zip(got, results(eager, gate, up, dy, "silu"), strict=True):
            torch.testing.assert_close(a, b)


def test_rows_of_a_packed_tensor_are_read_where_they_lie(monkeypatch, device):
    packed = torch.randn(6, 20, device=device)
    gate, up = packed.chunk(2, -1)
    seen, flat = [], _glu._rows.flat
    monkeypatch.setattr(_glu._rows, "flat", lambda t: seen.append(flat(t)) or seen[-1])
    got = kernel.launch(gate, up, "silu"), *kernel.launch_backward(up, gate, up, "silu")
    assert {t.untyped_storage().data_ptr() for t in seen} == {packed.untyped_storage().data_ptr()}
    gate, up = gate.contiguous(), up.contiguous()
    want = kernel.launch(gate, up, "silu"), *kernel.launch_backward(up, gate, up, "silu")
    assert all(map(torch.equal, got, want))


# -- the Triton kernels ----------------------------------------------------------------------------

LAUNCHED = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]


@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("dtype", LAUNCHED, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (33, 256), (3, 1025), (70, 33)], ids=str)
def test_launch(shape, dtype, activation, device, near):
    gate, up, dy = tensors(*shape, dtype=dtype, device=device)
    got = results(launched, gate, up, dy, activation)
    want = results(eager, gate, up, dy, activation)
    exact = results(eager, gate.double(), up.double(), dy.double(), activation)
    for g, w, e, t in zip(got, want, exact, terms(gate, up, dy, activation), strict=True):
        near(g, w, e, t)
        assert g.is_contiguous()


@pytest.mark.parametrize("activation", EAGER)
def test_the_activation_is_rounded_before_the_product(activation, device):
    """Three times the rounded activation is not three times the unrounded one, rounded."""
    gate = tensors(4096, dtype=torch.float16, device=device)[0].abs()  # below, 1 + erf cancels
    up = torch.full_like(gate, 3.0)
    got = kernel.launch(gate, up, activation)
    assert (got == eager(gate, up, activation)).double().mean() > 0.98  # where fp32 straddles a tie
    once = (EAGER[activation](gate.float()) * 3).half()
    if activation != "relu":
        assert (got == once).double().mean() < 0.9
    dup = kernel.launch_backward(up, gate, up, activation)[1]
    assert torch.equal(dup, got)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # numpy's exp, in the interpreter
@pytest.mark.parametrize("activation", EAGER)
def test_what_is_far_out_is_what_it_tends_to(activation, device):
    gate = torch.tensor([-1e30, -200.0, -30.0, 0.0, 30.0, 200.0, 1e30], device=device)
    one = torch.ones_like(gate)
    y, (dgate, dup) = kernel.launch(gate, one, activation), kernel.launch_backward(one, gate, one, activation)
    bounded, kink = activation == "sigmoid", activation == "relu"
    at_0 = 0.5 if bounded else 0.0
    want = [0.0, 0.0, 0.0, at_0, *([1.0] * 3 if bounded else [30.0, 200.0, 1e30])]
    slope = [0.0, 0.0, 0.0, 0.25 if bounded else 0.0 if kink else 0.5, *([0.0] * 3 if bounded else [1.0] * 3)]
    for got, expected in ((y, want), (dup, want), (dgate, slope)):
        torch.testing.assert_close(got.cpu(), torch.tensor(expected), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("activation", EAGER)
def test_a_nan_stays_where_it_is(activation, device):
    gate, up, dy = tensors(3, 40, device=device)
    gate[1, 17] = float("nan")
    for bad in (kernel.launch(gate, up, activation), *kernel.launch_backward(dy, gate, up, activation)[1:]):
        assert bad.isnan().nonzero().tolist() == [[1, 17]]


# -- registration ----------------------------------------------------------------------------------


def test_second_derivative_raises():
    gate, up, _ = (t.requires_grad_() for t in tensors(3, 5))
    grad = torch.autograd.grad(kernel.op(gate, up, "silu").sum(), gate, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="GLU has no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    gate, up, _ = tensors(2, 3, 8, dtype=dtype)
    for activation in EAGER if dtype == torch.float32 else ["gelu"]:
        torch.library.opcheck(kernel.op, (gate, up, activation))
        torch.library.opcheck(kernel.op, (gate.mT, up.mT, activation))
    torch.library.opcheck(kernel.op, (gate.requires_grad_(), up.requires_grad_(), "silu"))
    torch.library.opcheck(
        kernel.backward_op, (up.detach(), gate.detach().mT.contiguous().mT, up.detach(), "silu")
    )


@pytest.mark.parametrize("activation", EAGER)
def test_flops(activation):
    gate, up, dy = tensors(3, 8)
    with FlopCounterMode(display=False) as forward:
        y = kernel.op(gate.requires_grad_(), up, activation)
    with FlopCounterMode(display=False) as backward:
        y.backward(dy)
    assert forward.get_total_flops() == 24 * kernel._FORWARD[activation]
    assert backward.get_total_flops() == 24 * kernel._BACKWARD[activation]


def test_compiled():
    gate, up, _ = (t.requires_grad_() for t in tensors(3, 8))

    def f(gate, up):
        return kernel.op(gate * 2, up, "gelu").sin()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(gate, up), f(gate, up))
    grads = (torch.autograd.grad(g(gate, up).sum(), (gate, up)) for g in (compiled, f))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_exported_with_symbolic_rows():
    class Model(torch.nn.Module):
        def forward(self, gate, up):
            return kernel.op(gate, up, "gelu")

    rows = {0: torch.export.Dim.DYNAMIC}
    args = torch.randn(4, 16), torch.randn(4, 16)
    program = torch.export.export(Model(), args, dynamic_shapes={"gate": rows, "up": rows})
    assert kernel.op in [n.target for n in program.graph.nodes]
    gate, up, _ = tensors(9, 16)
    assert torch.equal(program.module()(gate, up), eager(gate, up, "gelu"))


X = torch.empty(3, 4, device="meta")


def test_unsupported():
    assert list(kernel.unsupported(X, X, "silu")) == []
    assert "dtype torch.int32 is not one of" in next(kernel.unsupported(X.int(), X.int(), "silu"))
    assert "gate has no dimension" in next(kernel.unsupported(X[0, 0], X[0, 0], "silu"))
    assert "does not broadcast" in next(kernel.unsupported(X, X[0], "silu"))
    assert "dtypes differ" in next(kernel.unsupported(X, X.half(), "silu"))
    assert "activation 'tanh' is not one of" in next(kernel.unsupported(X, X, "tanh"))
