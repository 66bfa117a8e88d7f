"""butterfly: its CPU kernel, its Triton kernels, its registration and what it refuses."""

import cmath

import pytest
import torch
import torch.nn.functional as F
from structured import DTYPES, absolute, results, within
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import _butterfly
from fxaccel.kernels import butterfly as kernel
from tests.helpers import thinned

SIZES = {  # L, stacks, C, out
    "2": (1, 1, 2, 2),
    "4, cut and padded": (2, 1, 3, 3),
    "8, wider": (3, 2, 8, 13),
    "16, narrower": (4, 1, 16, 9),
    "32, three stacks": (5, 3, 30, 96),
    "128": (7, 1, 128, 128),
}
ROWS = [0, 1, 7, 123]


def tensors(size, rows, dtype=torch.float32, device="cpu", biased=True):
    """x, twiddle, b; dy; out."""
    levels, stacks, c, out = SIZES[size]
    torch.manual_seed(rows)
    shapes = [(rows, c), (stacks, levels, 2 ** (levels - 1), 2, 2), (out,)]
    made = [torch.randn(shape).to(dtype).to(device) for shape in shapes]
    if not biased:
        made[2] = None
    return made, torch.randn(rows, out).to(dtype).to(device), out


def compare(got, size, args, dy, out, reversed, roundings):
    """Against fp64: fp32 loses an eps a summand, half precision one at each of `roundings`.

    Every factor has two summands, forth and back; a gradient also those of the rows, or of the stacks.
    """
    levels, stacks, *_ = SIZES[size]
    wide = [t if t is None else t.double() for t in args]
    exact = results(kernel.reference, wide, dy.double(), out, reversed)
    terms = absolute(kernel.reference, args, dy, out, reversed)
    dtype = args[0].dtype
    own = torch.finfo(dtype).eps * roundings if dtype.itemsize == 2 else 0
    summands = 4 * (levels + 1) + 2 * len(dy) + stacks
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * summands + own
    for g, want, sums in zip(got, exact[: len(got)], terms[: len(got)], strict=True):
        assert g.dtype == dtype
        assert g.is_contiguous()
        within(g, want, sums, eps, 1)


@pytest.mark.parametrize(("reversed", "biased"), [(False, True), (True, False)])
@thinned(2, size=SIZES, rows=ROWS, dtype=[*DTYPES, torch.float64])
def test_cpu_kernel(size, rows, dtype, biased, reversed):
    """Half an eps each: both matrices, h, y, y + b; or matrices, dh, their gradients, a sum over stacks."""
    args, dy, out = tensors(size, rows, dtype, biased=biased)
    compare(results(kernel.op, args, dy, out, reversed), size, args, dy, out, reversed, 3)
    for f in (kernel.op, kernel.direct):
        compare([f(*args, out, reversed)], size, args, dy, out, reversed, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["factor by factor", "multiplied out"])
def test_both_ways_of_the_cpu_kernel(way, dtype, monkeypatch):
    ran = []
    whole, expanded = kernel.passes, kernel.expanded
    monkeypatch.setattr(kernel, "passes", lambda *a: ran.append("factor by factor") or whole(*a))
    monkeypatch.setattr(kernel, "expanded", lambda *a: ran.append("multiplied out") or expanded(*a))
    args, dy, out = tensors("128", kernel.FEW + (way == "multiplied out"), dtype)
    y = kernel.compose(*args, out)
    assert ran == [way]
    compare([y], "128", args, dy, out, False, 3)


@pytest.mark.parametrize(("reversed", "biased"), [(False, True), (True, False)])
@thinned(2, size=SIZES, rows=[0, 1, 7, 40], dtype=DTYPES)  # a tile has 16 rows at most
def test_launch(size, rows, dtype, biased, reversed, device):
    """One rounding, or in the interpreter's bfloat16 one truncation."""
    args, dy, out = tensors(size, rows, dtype, device, biased)
    x, twiddle, b = args
    y = _butterfly.launch_forward(x, twiddle, b, out, reversed)
    got = [y, *_butterfly.launch_backward(dy, x, twiddle, reversed)]
    compare(got, size, args, dy, out, reversed, 1)


@pytest.mark.parametrize(("hip", "most"), [(None, _butterfly.MAX), ("6", _butterfly.MAX_AMD)])
def test_which_kernel_runs(hip, most, monkeypatch):
    ran = []
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(_butterfly, "launch_forward", lambda *a: ran.append("one launch"))
    monkeypatch.setattr(kernel, "expanded", lambda *a: ran.append("multiplied out"))
    for n, dtype in ((most, torch.float32), (2 * most, torch.float32), (most, torch.float64)):
        twiddle = torch.empty(1, n.bit_length() - 1, n // 2, 2, 2, device="meta")
        kernel.launch(torch.empty(1, n, dtype=dtype, device="meta"), twiddle, None, n)
    assert ran == ["one launch", "multiplied out", "multiplied out"]


def test_programs_that_take_several_tiles(device, monkeypatch):
    monkeypatch.setattr(_butterfly, "PROGRAMS", 6)
    args, dy, out = tensors("32, three stacks", 123, device=device)
    x, twiddle, _ = args
    runs = [_butterfly.launch_backward(dy, x, twiddle, True) for _ in range(2)]
    compare(
        [_butterfly.launch_forward(*args, out, True), *runs[0]], "32, three stacks", args, dy, out, True, 0
    )
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@thinned(2, size=SIZES, dtype=[*DTYPES, torch.float64], reversed=[False, True])
def test_the_gradient_by_its_definition(size, dtype, reversed):
    """What stands in for the launch where there is no GPU, through the Function that uses it."""
    args, dy, out = tensors(size, 7, dtype)
    got = results(kernel.Butterfly.apply, args, dy, out, reversed)
    compare(got, size, args, dy, out, reversed, 3)


def ways(device):
    """Every way to compute y."""
    yield kernel.reference
    yield kernel.op
    yield kernel.expanded
    yield _butterfly.launch_forward


@pytest.mark.parametrize("levels", range(1, 8))
def test_hadamard_exactly(levels, device):
    """Twiddles of 1 and -1: sums of small whole numbers, without rounding."""
    n, h = 2**levels, torch.ones(1, 1)
    for _ in range(levels):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    twiddle = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).expand(1, levels, n // 2, 2, 2).to(device)
    x = torch.arange(3 * n).view(3, n).remainder(7).float().to(device)
    for f in ways(device):
        assert torch.equal(f(x, twiddle, None, n), x @ h.to(device))


def fourier(n):
    """A complex butterfly that is the Fourier transform after a bit reversal."""
    levels = n.bit_length() - 1
    twiddle = torch.empty(1, levels, n // 2, 2, 2, dtype=torch.complex128)
    for i in range(levels):
        w = torch.tensor([cmath.exp(-1j * cmath.pi * t / 2**i) for t in range(2**i)] * (n >> (i + 1)))
        one = torch.ones_like(w)
        twiddle[0, i] = torch.stack([torch.stack([one, w], 1), torch.stack([one, -w], 1)], 1)
    return twiddle


@pytest.mark.parametrize("n", [2, 4, 8, 32])
def test_reversed_is_the_order_of_a_fourier_transform(n):
    x = torch.randn(3, n, dtype=torch.complex128)
    y = kernel.passes(x[:, kernel.bit_reversed(n, x.device)], fourier(n)[0])
    torch.testing.assert_close(y, torch.fft.fft(x))


@pytest.mark.parametrize("reversed", [False, True])
def test_it_is_the_linear_of_its_matrix(reversed):
    (x, twiddle, b), _, out = tensors("8, wider", 7, torch.float64)
    w = kernel.reference(torch.eye(8, dtype=torch.float64), twiddle, None, out, reversed).T
    torch.testing.assert_close(kernel.op(x, twiddle, b, out, reversed), F.linear(x, w, b))


def test_two_factors_written_out():
    """n = 4 by hand: pairs (0, 1), (2, 3), then (0, 2), (1, 3)."""
    (x, twiddle, _), *_ = tensors("4, cut and padded", 1, torch.float64)
    x = torch.randn(4, dtype=torch.float64)
    h = torch.cat([twiddle[0, 0, 0] @ x[:2], twiddle[0, 0, 1] @ x[2:]])
    y0, y1 = twiddle[0, 1, 0] @ h[[0, 2]], twiddle[0, 1, 1] @ h[[1, 3]]
    want = torch.stack([y0[0], y1[0], y0[1], y1[1]])
    for f in (kernel.reference, kernel.op, kernel.expanded):
        torch.testing.assert_close(f(x, twiddle, None, 4), want)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strides(layout, which, device):
    (x, twiddle, b), _, out = tensors("8, wider", 7, device=device)
    change = {
        "transposed": lambda t: t.mT.contiguous().mT,
        "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    }[layout]
    f = list(ways(device))[which]
    args = (change(x), change(twiddle), torch.stack([b, b], 1)[:, 0])
    assert not args[0].is_contiguous()
    torch.testing.assert_close(f(*args, out, True), f(x, twiddle, b, out, True))


@pytest.mark.parametrize("shape", [(), (2, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions(shape, device):
    (_, twiddle, b), _, out = tensors("8, wider", 1, device=device)
    x = torch.randn(*shape, 8, device=device)
    want = kernel.reference(x, twiddle, b, out)
    for f in (*ways(device), kernel.direct):
        got = f(x, twiddle, b, out)
        assert got.shape == (*shape, out)
        torch.testing.assert_close(got, want)
    for f in (kernel.backward_op, _butterfly.launch_backward):
        assert f(want, x, twiddle, False)[0].shape == x.shape


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("reversed", [False, True])
def test_gradcheck(reversed, biased):
    args, _, out = tensors("8, wider", 3, torch.float64, biased=biased)
    args = [t if t is None else t.requires_grad_() for t in args]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda *a: kernel.op(*a, out, reversed), args, fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda *a: kernel.Butterfly.apply(*a, out, reversed), args, fast_mode=True
    )


def test_second_derivative_of_a_launch_raises():
    args, _, out = tensors("8, wider", 3)
    args = [t.requires_grad_() for t in args]
    y = kernel.Butterfly.apply(*args, out, False)
    grad = torch.autograd.grad(y.sum(), args[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.square().sum().backward()


def test_inputs_are_not_written():
    for size in SIZES:
        args, dy, out = tensors(size, 7)
        copies = [t.clone() for t in (*args, dy)]
        results(kernel.op, args, dy, out)
        results(kernel.Butterfly.apply, args, dy, out, False)
        kernel.direct(*args, out)
        assert all(torch.equal(a, b) for a, b in zip((*args, dy), copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    args, dy, out = tensors("4, cut and padded", 4, dtype)
    torch.library.opcheck(kernel.op, (*args, out))
    torch.library.opcheck(kernel.backward_op, (dy, *args[:2], True))
    torch.library.opcheck(kernel.op, (*(t.requires_grad_() for t in args), out, True))


def test_flops():
    (x, twiddle, b), dy, out = tensors("32, three stacks", 7)
    with FlopCounterMode(display=False) as forward:
        kernel.op(x, twiddle, b, out)
    assert forward.get_total_flops() == 7 * 4 * 3 * 32 * 5
    with FlopCounterMode(display=False) as backward:
        kernel.backward_op(dy, x, twiddle, False)
    assert backward.get_total_flops() == 3 * forward.get_total_flops()


def test_autocast_is_that_of_linear():
    (x, twiddle, b), _, out = tensors("8, wider", 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = kernel.op(x, twiddle, b, out)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, kernel.direct(x, twiddle, b, out))
        assert kernel.op(x.double(), twiddle.double(), None, out).dtype == torch.float64
    assert torch.equal(y, kernel.op(x.bfloat16(), twiddle.bfloat16(), b.bfloat16(), out))


def test_compiled_and_exported():
    args, _, out = tensors("8, wider", 7)
    args = [t.requires_grad_() for t in args]

    class Model(torch.nn.Module):
        def forward(self, x, twiddle, b):
            return kernel.op(x * 2, twiddle, b, out, True).sin()

    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), Model()(*args))
    for a, b in zip(*(torch.autograd.grad(g(*args).sum(), args) for g in (compiled, Model())), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        given = tuple(t.detach() for t in args)
        dims = {"x": {0: torch.export.Dim.AUTO}, "twiddle": None, "b": None}
        program = torch.export.export(Model(), given, dynamic_shapes=dims)
        assert kernel.op in [n.target for n in program.graph.nodes]
        val = next(n.meta["val"] for n in program.graph.nodes if n.name == "x")
        assert list(kernel.unsupported(val, *given[1:], out)) == []
        assert not val.shape[0].node.shape_env.guards
        x = torch.randn(9, 8)
        torch.testing.assert_close(program.module()(x, *given[1:]), Model()(x, *given[1:]))


X, T = torch.empty(5, 8, device="meta"), torch.empty(2, 3, 4, 2, 2, device="meta")
B = torch.empty(13, device="meta")
WRONG = "the kernel takes [stacks, L, 2**L / 2, 2, 2]"


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((X.int(), T, B, 13), "dtype torch.int32 is not one of"),
        ((X.to(torch.complex64), T.to(torch.complex64), None, 13), "dtype torch.complex64 is not one of"),
        ((X, T.half(), B, 13), "dtypes differ: x is torch.float32, twiddle torch.float16"),
        ((X, T, B.half(), 13), "dtypes differ: x is torch.float32, b torch.float16"),
        ((X[0, 0], T, B, 13), "no dimension to multiply over"),
        ((X, T[0], B, 13), "twiddle has 4 dimensions; the kernel takes 5"),
        ((X, T[:0], B, 13), WRONG),
        ((X, T[:, :2], B, 13), WRONG),
        ((X, T[:, :, :3], B, 13), WRONG),
        ((X, T[..., :1], B, 13), WRONG),
        ((torch.empty(5, 9, device="meta"), T, B, 13), "x has 9 features and twiddle 8"),
        ((X, T, torch.empty(17, device="meta"), 17), "17 features are asked for, and twiddle has 2 x 8"),
        ((X, T, B, 12), "b has 13 elements, and y 12 features"),
    ],
)
def test_unsupported(args, why):
    assert any(why in sentence for sentence in kernel.unsupported(*args))


def test_supported():
    assert list(kernel.unsupported(X, T, B, 13)) == []
    assert list(kernel.unsupported(X[:, :5].double(), T.double(), None, 16, True)) == []
