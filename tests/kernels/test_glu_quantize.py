"""glu_quantize: CPU and Triton kernels, against the operators that it is made of and against float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from fxaccel.kernels import _quantized_rows, quantize_rows
from fxaccel.kernels import glu_quantize as kernel
from tests.helpers import thinned

FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAUNCHED = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]
KINDS = [torch.int8, FLOAT8]
SHAPES = [(1, 1), (7,), (3, 123), (2, 5, 64), (0, 8), (4, 0), (33, 256), (400, 1)]
EAGER = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def given(*shape, dtype=torch.float32, device="cpu"):
    """A gate of several sizes, with an outlier, and rows of zeros in up."""
    torch.manual_seed(sum(shape))
    gate = torch.randn(shape) * torch.logspace(-2, 1, math.prod(shape[:-1])).view(*shape[:-1], 1)
    up = torch.randn(shape)
    if gate.numel() > 3 and len(shape) > 1 < shape[-1]:
        gate[0, ..., 1] = 60.0
        up[-1] = 0.0
    return gate.to(dtype).to(device), up.to(dtype).to(device)


def sequence(gate, up, activation, kind):
    """The operators one after the other."""
    return quantize_rows.op(EAGER[activation](gate) * up, kind)


def same(got, want):
    """Bit for bit, NaN in the same places."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.is_contiguous()
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


def near(got, gate, up, activation, kind):
    """codes * scale are the product in float64, to half a step of the grid and to what y is rounded by.

    y rounds twice, and in the interpreter's bfloat16 truncates: 4 eps of gate.dtype. Before, in float32,
    1 + erf and 1 + tanh cancel to a few eps of 1, so of gate, and an exponential of t is off by t eps, which
    the slope of a sigmoid, at most 0.28 / t, takes back: 8 eps of gate.
    """
    q, scale = (t.cpu() for t in got)
    gate, up = gate.cpu(), up.cpu()
    eps, single = torch.finfo(gate.dtype).eps, torch.finfo(torch.float32).eps
    top = 127.0 if kind == torch.int8 else 448.0
    y = EAGER[activation](gate.double()) * up.double()
    error = 4 * eps * y.abs() + 8 * single * (gate.double() * up.double()).abs()
    error += torch.finfo(gate.dtype).smallest_normal * (1 + up.double().abs())  # below, steps are fixed
    if not y.numel():
        return
    size, slack = y.abs().amax(-1, True).clamp(min=1e-30), error.amax(-1, True)
    assert ((scale.double() * top - size).abs() <= slack + 2 * single * size).all()
    step = 1.0 if kind == torch.int8 else 2 ** q.double().abs().log2().floor().clamp(min=-6) / 8
    by = scale.double()
    assert ((q.double() * by - y).abs() <= error + by * (step / 2 + 4 * single * top)).all()


@thinned(3, shape=SHAPES, dtype=DTYPES, activation=EAGER, kind=KINDS)
def test_on_the_cpu_it_is_the_operators_in_sequence(shape, dtype, activation, kind):
    gate, up = given(*shape, dtype=dtype)
    want = sequence(gate, up, activation, kind)
    same(kernel.op(gate, up, activation, kind), want)
    same(kernel.direct(gate, up, activation, kind), want)
    same(kernel.reference(gate, up, activation, kind), want)
    near(want, gate, up, activation, kind)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's exp, in Triton's interpreter
@thinned(2, shape=SHAPES, dtype=LAUNCHED, activation=EAGER, kind=KINDS)
def test_launch(shape, dtype, activation, kind, device):
    gate, up = given(*shape, dtype=dtype, device=device)
    got = kernel.launch(gate, up, activation, kind)
    near(got, gate, up, activation, kind)
    want = kernel.reference(gate, up, activation, kind)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]
    if not gate.numel():
        same(got, want)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("activation", EAGER)
def test_the_activation_is_rounded_before_the_product(activation, device):
    """Rows of one element have it as their scale. It differs where float32 straddles a tie of float16.

    That is, by a few eps of the one among steps of the other, for one in 2**9 or so of these.
    """
    gate, up = given(4096, 1, dtype=torch.float16, device=device)
    _, scale = kernel.launch(gate, up, activation, torch.int8)
    _, want = kernel.reference(gate, up, activation, torch.int8)
    assert (scale == want).double().mean() > 0.98


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("activation", EAGER)
def test_launch_in_pieces(activation, kind, device, monkeypatch):
    monkeypatch.setattr(_quantized_rows, "ROW_MAX", 64)
    monkeypatch.setattr(_quantized_rows, "TILE", 32)
    for shape in ((3, 65), (5, 200)):
        gate, up = given(*shape, device=device)
        gate[1, -1], up[1, -1] = 9.0, -1e4  # the largest is in the last piece
        assert _quantized_rows.config(shape[1]).wide
        near(kernel.launch(gate, up, activation, kind), gate, up, activation, kind)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("activation", EAGER)
def test_what_is_far_out_is_what_it_tends_to(activation, device):
    gate = torch.tensor([[-1e30, -200.0, -30.0, 0.0, 30.0, 200.0, 1e30]], device=device)
    up = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1e30, 1e28, 1.0]], device=device)
    q, scale = kernel.launch(gate, up, activation, torch.int8)
    codes, largest = (
        ([0, 0, 0, 0, 127, 8, 4], 3e31) if activation != "sigmoid" else ([0] * 4 + [127, 1, 0], 1e30)
    )
    assert q.tolist() == [codes]
    assert scale.item() == pytest.approx(largest / 127, rel=2**-22)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("how", ["op", "direct", "launch"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_bad_row_has_a_scale_that_says_so(bad, kind, how, activation, device):
    for place in (0, 1) if activation != "sigmoid" or bad != float("inf") else (1,):  # which takes it to 1
        given_ = given(3, 40, device=device)
        given_[1][-1] = 1.0
        want = getattr(kernel, how)(*given_, activation, kind)
        given_[place][1, 17] = bad
        given_[1 - place][1, 17] = 0.5
        q, scale = getattr(kernel, how)(*given_, activation, kind)
        assert not scale[1].isfinite()
        for row in (0, 2):
            same([q[row], scale[row]], [t[row] for t in want])


@pytest.mark.parametrize("how", ["op", "direct", "launch"])
def test_strides(how, device):
    base = torch.randn(6, 4, 20, device=device)
    halves = base.chunk(2, -1)
    pairs = (
        halves,
        (base[..., ::2], base[..., 1::2]),
        [t.transpose(0, 1) for t in halves],
        (halves[0][:, :1].expand(6, 4, 10), halves[1]),
    )
    for gate, up in pairs:
        if how == "launch":
            want = kernel.launch(gate.contiguous(), up.contiguous(), "silu", torch.int8)
        else:  # torch's silu rounds strided values in another way
            want = sequence(gate, up, "silu", torch.int8)
        same(getattr(kernel, how)(gate, up, "silu", torch.int8), want)


def test_inputs_are_not_written():
    for dtype in DTYPES:
        for activation in EAGER:
            args = given(3, 123, dtype=dtype)
            copies = [a.clone() for a in args]
            for f in (kernel.op, kernel.direct):
                f(*args, activation, torch.int8)
                assert all(map(torch.equal, args, copies))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, kind):
    gate, up = given(2, 5, 64, dtype=dtype)
    for activation in EAGER if dtype == torch.float16 else ["silu"]:
        torch.library.opcheck(kernel.op, (gate, up, activation, kind))
        torch.library.opcheck(kernel.op, (gate.mT, up.mT, activation, kind))


def test_a_gradient_is_refused_where_it_is_asked_for():
    gate, up = given(3, 8)
    up.requires_grad_()
    for f in (kernel.op, kernel.direct):
        q, scale = f(gate, up, "silu", torch.int8)
        assert not q.requires_grad
        with pytest.raises(NotImplementedError, match="glu_quantize has no derivative"):
            scale.sum().backward()


def test_exported_with_symbolic_rows():
    class Model(torch.nn.Module):
        def forward(self, gate, up):
            return kernel.op(gate, up, "gelu", torch.int8)

    rows = {0: torch.export.Dim.DYNAMIC}
    args = torch.randn(4, 16), torch.randn(4, 16)
    program = torch.export.export(Model(), args, dynamic_shapes={"gate": rows, "up": rows})
    assert kernel.op in [n.target for n in program.graph.nodes]
    gate, up = given(9, 16)
    same(program.module()(gate, up), sequence(gate, up, "gelu", torch.int8))


X = torch.empty(3, 4, device="meta")


def test_unsupported():
    assert list(kernel.unsupported(X, X, "silu", torch.int8)) == []
    assert "gate is torch.int32" in next(kernel.unsupported(X.int(), X.int(), "silu", torch.int8))
    assert "no last dimension" in next(kernel.unsupported(X[0, 0], X[0, 0], "silu", torch.int8))
    assert "does not broadcast" in next(kernel.unsupported(X, X[0], "silu", torch.int8))
    assert "dtypes differ" in next(kernel.unsupported(X, X.half(), "silu", torch.int8))
    assert "activation 'tanh' is not one of" in next(kernel.unsupported(X, X, "tanh", torch.int8))
    assert "torch.uint8 are not one of" in next(kernel.unsupported(X, X, "silu", torch.uint8))
