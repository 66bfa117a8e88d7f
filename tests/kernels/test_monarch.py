"""monarch: its CPU kernel, its Triton kernels, its registration and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from structured import DTYPES, absolute, results, within
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import _blocks, _monarch
from fxaccel.kernels import monarch as kernel
from tests.helpers import thinned

SIZES = {  # k, l, t, s, p, C, out
    "square": (4, 4, 4, 16, 16, 64, 64),
    "every size another": (2, 3, 5, 7, 11, 22, 21),
    "t 1": (3, 2, 1, 5, 4, 12, 10),
    "t 3, cut and padded": (3, 4, 3, 5, 6, 16, 18),
    "t 16": (2, 3, 16, 20, 18, 36, 60),
    "t 32, cut and padded": (3, 2, 32, 33, 40, 100, 63),
    "one block": (1, 1, 3, 4, 5, 5, 4),
    "one block on the right": (1, 3, 2, 4, 5, 5, 12),
    "s 1": (2, 3, 1, 1, 2, 4, 3),
    "one feature": (1, 1, 1, 1, 1, 1, 1),
}
ROWS = [0, 1, 7, 123]


def tensors(size, rows, dtype=torch.float32, device="cpu", biased=True):
    """x, right, left, b; and dy."""
    k, l, t, s, p, c, out = SIZES[size]  # noqa: E741
    torch.manual_seed(rows)
    shapes = [(rows, c), (k, t * l, p), (l, s, k * t), (out,)]
    made = [torch.randn(shape).to(dtype).to(device) for shape in shapes]
    if not biased:
        made[3] = None
    return made, torch.randn(rows, out).to(dtype).to(device), out


def summands(size, rows):
    """The most terms of a chain of sums, of y and of the gradients."""
    k, l, t, s, p, *_ = SIZES[size]  # noqa: E741
    return p + k * t + s + l * t + 2 * rows


def compare(f, size, args, dy, out, rows):
    """Against fp64: fp32 loses an eps a summand, and half precision an eps at each of at most four roundings.

    These are of h, of y and of y + b, or of dh, h and the gradient. Half an eps is what rounding to nearest
    loses; the interpreter truncates bfloat16 and loses a whole one.
    """
    exact = results(kernel.reference, [t if t is None else t.double() for t in args], dy.double(), out)
    terms = absolute(kernel.reference, args, dy, out)
    dtype = args[0].dtype
    wide = torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps * (summands(size, rows) + 4)
    own = 0 if dtype.itemsize > 2 else 4 * torch.finfo(dtype).eps
    for got, want, sums in zip(f(args, dy, out), exact, terms, strict=True):
        assert got.dtype == dtype
        assert got.is_contiguous()
        within(got, want, sums, wide + own, 1)


@thinned(2, size=SIZES, rows=ROWS, dtype=[*DTYPES, torch.float64], biased=[True, False])
def test_cpu_kernel(size, rows, dtype, biased):
    args, dy, out = tensors(size, rows, dtype, biased=biased)
    compare(lambda *a: results(kernel.op, a[0], a[1], a[2]), size, args, dy, out, rows)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("size", SIZES)
def test_blocks_without_copies(size, rows, monkeypatch):
    """As of large blocks: each is written where it belongs."""
    monkeypatch.setattr(_blocks, "SMALL", 0)
    args, dy, out = tensors(size, rows)
    compare(lambda *a: results(kernel.op, a[0], a[1], a[2]), size, args, dy, out, rows)


def test_it_is_the_linear_of_its_matrix():
    (x, right, left, b), _, out = tensors("t 3, cut and padded", 7, torch.float64)
    k, l, t, s, p, c, _ = SIZES["t 3, cut and padded"]  # noqa: E741
    slices = torch.einsum("lskt,ktlp->slkp", left.view(l, s, k, t), right.view(k, t, l, p))
    w = slices.reshape(s * l, k * p)[:out, :c]
    torch.testing.assert_close(kernel.op(x, right, left, b, out), F.linear(x, w, b))
    ranks = torch.linalg.matrix_rank(slices.permute(1, 2, 0, 3))
    assert (ranks == min(t, s, p)).all()


def forward_and_backward(launch):
    """The list of `results` from the Triton kernels."""

    def run(args, dy, out):
        x, right, left, b = args
        y, h = launch(x, right, left, b, out)
        grads = _monarch.launch_backward(dy, x, h, right, left, True, True, True)
        return [y, *grads, *([] if b is None else [dy.sum(0)])]

    return run


@thinned(3, size=SIZES, rows=ROWS, dtype=DTYPES, biased=[True, False])
def test_launch(size, rows, dtype, biased, device):
    args, dy, out = tensors(size, rows, dtype, device, biased)
    compare(forward_and_backward(_monarch.launch_save), size, args, dy, out, rows)


@thinned(2, size=SIZES, rows=ROWS, dtype=DTYPES)
def test_launch_fused(size, rows, dtype, device):
    args, _, out = tensors(size, rows, dtype, device)
    x, right, left, b = args
    exact = kernel.reference(*(t.double() for t in args), out)
    terms = kernel.reference(*(t.double().abs() for t in args), out)
    wide = torch.finfo(torch.float32).eps * (summands(size, 0) + 4)
    own = 0 if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps  # of h and of y, which may be truncated
    for bias, sums, want in ((b, terms, exact), (None, terms, exact - b.double())):
        y = _monarch.launch_fused(x, right, left, bias, out)
        assert y.dtype == dtype
        within(y, want, sums, wide + own, 1)


def test_which_kernel_runs(monkeypatch):
    ran = []
    monkeypatch.setattr(_monarch, "launch_fused", lambda *a: ran.append("fused"))
    monkeypatch.setattr(_monarch, "launch_save", lambda *a: ran.append("apart") or [None])
    wide = (torch.empty(1, 16, 16), torch.empty(1, 257, 16))
    for right, left in ([tensors(size, 1)[0][i] for i in (1, 2)] for size in ("t 3, cut and padded", "t 16")):
        kernel.launch(None, right, left, None, 0)
    kernel.launch(None, *wide, None, 0)
    assert ran == ["apart", "fused", "apart"]


def relayouts(t):
    """The values of t in other strides: transposed, a slice of longer rows."""
    yield t.mT.contiguous().mT
    yield torch.cat([t, t], -1)[..., : t.shape[-1]]


@pytest.mark.parametrize("how", ["op", "apart", "fused"])
@pytest.mark.parametrize("layout", range(2), ids=["transposed", "sliced"])
def test_strides(layout, how, device):
    size = "t 3, cut and padded"
    args, dy, out = tensors(size, 7, device=device)
    args = [list(relayouts(t))[layout] if t.ndim > 1 else torch.stack([t, t], 1)[:, 0] for t in args]
    dy = list(relayouts(dy))[layout]
    if how == "fused":
        got = _monarch.launch_fused(*args, out)
        torch.testing.assert_close(got, kernel.reference(*args, out))
        return
    f = (
        forward_and_backward(_monarch.launch_save)
        if how == "apart"
        else lambda a, dy, out: results(kernel.op, a, dy, out)
    )
    compare(f, size, args, dy, out, 7)


@pytest.mark.parametrize("how", ["op", "direct", "apart", "fused"])
@pytest.mark.parametrize("shape", [(), (2, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions(shape, how, device):
    (_, right, left, b), _, out = tensors("t 16", 1, device=device)
    x = torch.randn(*shape, 36, device=device)
    ways = {
        "op": kernel.op,
        "direct": kernel.direct,
        "apart": lambda *a: _monarch.launch_save(*a)[0],
        "fused": _monarch.launch_fused,
    }
    got, want = ways[how](x, right, left, b, out), kernel.reference(x, right, left, b, out)
    assert got.shape == (*shape, out)
    torch.testing.assert_close(got, want)
    if how == "op":
        grads = results(kernel.op, [x, right, left, b], torch.ones_like(got), out)
        for g, w in zip(
            grads, results(kernel.reference, [x, right, left, b], torch.ones_like(got), out), strict=True
        ):
            torch.testing.assert_close(g, w)


def test_h_is_rounded_between_the_factors(device):
    """h is 1 + 2**-12 before it rounds to 1, and y, which takes 1 from it, would be 2**-12."""
    x = torch.tensor([[1.0, 2.0**-12]], dtype=torch.float16, device=device)
    right = torch.ones(1, 1, 2, dtype=torch.float16, device=device)
    left = torch.ones(1, 1, 1, dtype=torch.float16, device=device)
    b = -torch.ones(1, dtype=torch.float16, device=device)
    for f in (kernel.reference, kernel.op, _monarch.launch_fused, lambda *a: _monarch.launch_save(*a)[0]):
        assert f(x, right, left, b, 1).item() == 0


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("size", ["every size another", "t 3, cut and padded"])
def test_gradcheck(size, biased):
    args, _, out = tensors(size, 3, torch.float64, biased=biased)
    args = [t if t is None else t.requires_grad_() for t in args]
    assert torch.autograd.gradcheck(lambda *a: kernel.op(*a, out), args, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *a: kernel.op(*a, out), args, fast_mode=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
def test_only_what_is_asked_for(wanted):
    args, dy, out = tensors("every size another", 7)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(args)]
    asked = [leaves[i] for i in wanted]
    got = torch.autograd.grad(kernel.op(*leaves, out), asked, dy)
    want = torch.autograd.grad(kernel.reference(*leaves, out), asked, dy)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_inputs_are_not_written():
    for size in SIZES:
        args, dy, out = tensors(size, 7)
        copies = [t.clone() for t in (*args, dy)]
        results(kernel.op, args, dy, out)
        kernel.direct(*args, out)
        assert all(torch.equal(a, b) for a, b in zip((*args, dy), copies, strict=True))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, biased):
    args, _, out = tensors("t 3, cut and padded", 4, dtype, biased=biased)
    torch.library.opcheck(kernel.op, (*args, out))
    args = [t if t is None else t.requires_grad_() for t in args]
    torch.library.opcheck(kernel.op, (*args, out))


def test_opcheck_of_the_operators_of_training():
    (x, right, left, b), dy, out = tensors("t 3, cut and padded", 4)
    torch.library.opcheck(kernel.save_op, (x, right, left, b, out))
    h = kernel.save_op(x, right, left, b, out)[1]
    for asked in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(kernel.backward_op, (dy, x, h, right, left, *asked))


def test_flops():
    (x, right, left, b), _, out = tensors("square", 7)
    args = [t.requires_grad_() for t in (x, right, left, b)]
    each = 2 * 7 * (right.numel() + left.numel())
    with FlopCounterMode(display=False) as forward:
        y = kernel.op(*args, out)
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        kernel.op(*args, out)
    assert forward.get_total_flops() == inference.get_total_flops() == each
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * each
    with FlopCounterMode(display=False) as some:
        kernel.op(x.detach(), right.detach(), left, None, out).sum().backward()
    assert some.get_total_flops() == each + 2 * 7 * left.numel()


def test_autocast_is_that_of_linear():
    (x, right, left, b), _, out = tensors("square", 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = kernel.op(x, right, left, b, out)
        assert y.dtype == F.linear(x, torch.ones(3, 64)).dtype == torch.bfloat16
        assert torch.equal(y, kernel.direct(x, right, left, b, out))
        assert kernel.op(*(t.double() for t in (x, right, left, b)), out).dtype == torch.float64
    assert torch.equal(y, kernel.op(*(t.bfloat16() for t in (x, right, left, b)), out))


def test_compiled():
    args, _, out = tensors("every size another", 7)
    args = [t.requires_grad_() for t in args]

    def f(x, *rest):
        return kernel.op(x * 2, *rest, out).sin()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), f(*args))
    for a, b in zip(*(torch.autograd.grad(g(*args).sum(), args) for g in (compiled, f)), strict=True):
        torch.testing.assert_close(a, b)


def test_exported_whole_with_symbolic_sizes():
    args, _, out = tensors("t 3, cut and padded", 4)

    class Model(torch.nn.Module):
        def forward(self, x, right, left, b):
            return kernel.op(x, right, left, b, out)

    dims = {"x": {0: torch.export.Dim.AUTO}, "right": None, "left": None, "b": None}
    program = torch.export.export(Model(), tuple(args), dynamic_shapes=dims)
    assert kernel.op in [n.target for n in program.graph.nodes]
    val = next(n.meta["val"] for n in program.graph.nodes if n.name == "x")
    guards = len(val.shape[0].node.shape_env.guards)
    assert list(kernel.unsupported(val, *args[1:], out)) == []
    assert len(val.shape[0].node.shape_env.guards) == guards
    x = torch.randn(9, 16)
    torch.testing.assert_close(program.module()(x, *args[1:]), kernel.reference(x, *args[1:], out))


X, R, L = (torch.empty(s, device="meta") for s in ((5, 12), (3, 4, 4), (2, 5, 6)))
B = torch.empty(10, device="meta")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((X.int(), R, L, B, 10), "dtype torch.int32 is not one of"),
        ((X, R.half(), L, B, 10), "dtypes differ: x is torch.float32, right torch.float16"),
        ((X, R, L.half(), B, 10), "dtypes differ: x is torch.float32, left torch.float16"),
        ((X, R, L, B.half(), 10), "dtypes differ: x is torch.float32, b torch.float16"),
        ((X, R[0], L, B, 10), "right has 2 dimensions; the kernel takes 3"),
        ((X, R, L, L, 10), "b has 3 dimensions; the kernel takes 1"),
        ((X[0, 0], R, L, B, 10), "no dimension to multiply over"),
        ((X, R[:, :0], L[:, :, :0], B, 10), "takes no empty factors"),
        ((X, R, L[..., :5], B, 10), "right has 3 x 4 rows and left 2 x 5 columns"),
        (
            (X, R[:, :3], torch.empty(2, 5, 9, device="meta")[..., :0], B, 10),
            "takes no empty factors",
        ),
        ((X, R[:2, :3], L[..., :3], B, 10), "right has 3 rows a block, no multiple of the 2 blocks of left"),
        ((X, R[..., :3], L, B, 10), "x has 12 features and right 3 x 3 columns"),
        ((X, R, L, B, 11), "11 features are asked for, and left has 2 x 5 rows"),
        ((X, R, L, B[:9], 10), "b has 9 elements, and y 10 features"),
    ],
)
def test_unsupported(args, why):
    assert any(why in sentence for sentence in kernel.unsupported(*args))


def test_supported():
    assert list(kernel.unsupported(X, R, L, B, 10)) == []
    assert list(kernel.unsupported(X[:, :9], R, L, B[:9], 9)) == []
    assert list(kernel.unsupported(X.double(), R.double(), L.double(), None, 10)) == []
