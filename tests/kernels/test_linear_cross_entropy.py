"""linear_cross_entropy: the CPU kernel and the Triton one against the reference, in chunks and whole."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import _loss_rows
from fxaccel.kernels import linear_cross_entropy as kernel
from fxaccel.memory import Meter

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
N, D, V = 13, 6, 37
TINY = 3 * V * 8  # bytes of a chunk of one to three rows
PLAIN = dict(zip(
    ("reduction", "ignore_index", "label_smoothing", "scale", "softcap", "z_loss", "wide"),
    ("mean", -100, 0.0, 1.0, 0.0, 0.0, False), strict=True,
))  # fmt: skip
OPTIONS = [
    {}, {"reduction": "sum"}, {"ignore_index": None}, {"ignore_index": 3}, {"label_smoothing": 0.1},
    {"scale": 0.25}, {"softcap": 2.0}, {"softcap": 3.0, "scale": 2.0, "wide": True}, {"z_loss": 0.01},
    {"z_loss": 0.01, "reduction": "sum", "ignore_index": 3}, {"wide": True},
    {"label_smoothing": 0.2, "softcap": 2.0, "z_loss": 0.02, "ignore_index": 0, "wide": True},
]  # fmt: skip


def tensors(n=N, d=D, v=V, dtype=torch.float32, biased=True, ignored=None):
    """x, w, b and labels, a third of them the one that is ignored."""
    torch.manual_seed(n + v)
    x, w, b = (torch.randn(shape).to(dtype) for shape in ((n, d), (v, d), (v,)))
    y = torch.randint(0, v, (n,))
    if ignored is not None:
        y[::3] = ignored
    return x, w, b if biased else None, y


def options(changed):
    return tuple((PLAIN | changed).values())


def results(f, args, rest, seed=1.7):
    """The loss and the gradients of x, w and b."""
    *leaves, y = (
        t if t is None or not t.is_floating_point() else t.detach().clone().requires_grad_() for t in args
    )
    loss = f(*leaves, y, *rest)
    return [loss, *torch.autograd.grad(loss * seed, [t for t in leaves if t is not None])]


def terms(args, rest, seed=1.7):
    """Sums of the absolute values of what the loss and the gradients of x, w and b are sums of.

    The exponential of log p has its error times log p; the gradient of a logit is p less what it should be.
    """
    x, w, b, y = (t.double() if t is not None and t.is_floating_point() else t for t in args)
    reduction, ignored, smoothing, scale, softcap, z_loss, _ = rest
    logits = F.linear(x, w, b) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    keep = (y != (-1 if ignored is None else ignored)).double()[:, None]
    log_p, lse = logits.log_softmax(-1), logits.logsumexp(-1, keepdim=True)
    target = F.one_hot(y.clamp(min=0), logits.shape[1]) * (1 - smoothing) + smoothing / logits.shape[1]
    count, all_of = (float(keep.sum()), len(x)) if reduction == "mean" else (1.0, 1.0)
    squares = 2 * z_loss * lse.abs() / all_of
    g = (log_p.exp() * (1 + log_p.abs()) * (keep / count + squares) + keep * target / count) * seed * scale
    rows = (logits.abs().amax(-1, True) + log_p.abs().amax(-1, True)) * keep / count + squares * lse.abs()
    found = [rows.sum(), g @ w.abs(), g.T @ x.abs(), g.sum(0)]
    return found if b is not None else found[:3]


def agree(got, args, rest, near):
    """`got` is within what rounding allows of the reference in float64."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in args]
    eager, exact = results(kernel.reference, args, rest), results(kernel.reference, wide, rest)
    for g, e, x, t in zip(got, eager, exact, terms(args, rest), strict=True):
        near(g, e, x, t, args[0].dtype)


@pytest.mark.parametrize("budget", [0, TINY])
@pytest.mark.parametrize("changed", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_kernel(dtype, changed, budget, near):
    rest = options(changed)
    for biased in (True, False):
        args = tensors(dtype=dtype, biased=biased, ignored=rest[1])
        agree(results(kernel.op, args, (*rest, budget)), args, rest, near)


@pytest.mark.parametrize(("n", "v"), [(1, 7), (2, 1), (7, 123), (5, 300)])
def test_cpu_kernel_of_other_sizes(n, v, near):
    args = tensors(n, 5, v)
    agree(results(kernel.op, args, options({})), args, options({}), near)


def launched(args, rest, budget, seed=1.7):
    """What the Triton kernel gives, scaled as backward does."""
    biased = args[2] is not None
    loss, dx, dw, db, divisor = kernel.launch_save(*args, *rest, budget, True, True, biased)
    by = torch.tensor(seed, device=divisor.device) / divisor
    made = [kernel._scaled(g, by, args[0]) for g in (dx, dw, db)]
    return [loss, *made[: 2 + biased]]


@pytest.mark.parametrize(("changed", "dtype", "v", "block", "budget"), [
    ({}, torch.float32, 37, 64, 0), ({"ignore_index": 3}, torch.bfloat16, 37, 16, 0),
    ({"wide": True, "ignore_index": None}, torch.float16, 64, 64, TINY),
    ({"label_smoothing": 0.1, "reduction": "sum"}, torch.float32, 37, 16, TINY),
    ({"z_loss": 0.01, "scale": 0.5}, torch.float32, 1, 16, 0),
    (OPTIONS[-1], torch.float32, 37, 16, 0), (OPTIONS[-1], torch.bfloat16, 37, 64, 0),
])  # fmt: skip
def test_triton_kernel(changed, dtype, v, block, budget, device, near, monkeypatch):
    monkeypatch.setattr(_loss_rows, "BLOCK", block)
    rest = options(changed)
    args = tensors(5, v=v, dtype=dtype, biased=dtype != torch.float32, ignored=rest[1])
    if rest[1] == 0 and v == 1:
        args[3].zero_()
    given = [t if t is None else t.to(device) for t in args]
    agree([t.cpu() for t in launched(given, rest, budget)], args, rest, near)


def test_triton_kernel_with_logits_of_minus_infinity(device):
    """A block of nothing but masked columns comes before those that count."""
    u = torch.full((2, 12), -torch.inf)
    u[:, 9:] = torch.randn(2, 3)
    y = torch.tensor([10, 11])
    want = F.cross_entropy(u.requires_grad_(), y, reduction="none")
    (grad,) = torch.autograd.grad(want.sum(), u)
    own = u.detach().clone().to(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_loss_rows, "BLOCK", 4)
        got = _loss_rows.launch(own, y.to(device), None, 0.0, 0.0, None, True)
    torch.testing.assert_close(got.cpu(), want.detach())
    torch.testing.assert_close(own.cpu(), grad)


# -- no label, one label, wrong labels -------------------------------------------------------------


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("reduction", kernel.REDUCTIONS)
def test_where_no_label_counts(reduction, z_loss):
    x, w, b, _ = tensors()
    args, rest = (x, w, b, torch.full((N,), -100)), options({"reduction": reduction, "z_loss": z_loss})
    for got, want in zip(*(results(f, args, rest) for f in (kernel.op, kernel.reference)), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    assert kernel.op(*args, *rest).isnan() == (reduction == "mean")


def test_where_no_label_counts_in_triton(device):
    x, w, b, _ = (t.to(device) for t in tensors(2))
    y = torch.full((2,), -100, device=device)
    loss, *grads = launched((x, w, b, y), options({}), 0)
    assert loss.isnan()
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("reduction", kernel.REDUCTIONS)
def test_of_no_row(reduction):
    args, rest = tensors(0), options({"reduction": reduction})
    for got, want in zip(*(results(f, args, rest) for f in (kernel.op, kernel.reference)), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("wrong", [V, V + 5, -1])
def test_a_label_out_of_range_raises_as_in_torch(wrong):
    *args, y = tensors()
    y[4] = wrong
    for f in (kernel.reference, kernel.op):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds."):
            f(*args, y)
    y[4] = -100
    with pytest.raises(IndexError, match="Target -100 is out of bounds"):
        kernel.op(*args, y, "mean", None)


def test_another_number_of_labels_raises_as_in_torch():
    *args, y = tensors()
    for f in (kernel.reference, kernel.op):
        with pytest.raises(ValueError, match=r"input batch_size \(13\) to match target batch_size \(12\)"):
            f(*args, y[1:])


def test_rows_that_are_left_out_are_not_computed(monkeypatch):
    x, w, b, y = tensors(ignored=-100)
    seen = []
    compose = _loss_rows.compose
    monkeypatch.setattr(_loss_rows, "compose", lambda u, *rest: seen.append(len(u)) or compose(u, *rest))
    results(kernel.op, (x, w, b, y), options({}))
    assert sum(seen) == int((y != -100).sum()) < N


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_gradcheck(changed):
    *leaves, y = tensors(5, 3, 7, torch.float64, ignored=(PLAIN | changed)["ignore_index"])
    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda *t: kernel.op(*t, y, *options(changed)), leaves)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
def test_only_gradients_that_are_wanted_are_made(wanted):
    *leaves, y = tensors()
    full = results(kernel.op, (*leaves, y), options({}), 1.0)[1:]
    leaves = [t.requires_grad_(grad) for t, grad in zip(leaves, wanted, strict=True)]
    with FlopCounterMode(display=False) as counter:
        loss = kernel.op(*leaves, y)
    assert counter.get_total_flops() == 2 * N * D * V * (1 + wanted[0] + wanted[1])
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for t, asked, want in zip(leaves, wanted, full, strict=True):
        assert (t.grad is not None) == asked
        if asked:
            torch.testing.assert_close(t.grad, want)


def test_backward_can_run_twice():
    args = [t.requires_grad_() if t.is_floating_point() else t for t in tensors()]
    loss = kernel.op(*args)
    first = torch.autograd.grad(loss, args[:3], torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, args[:3], torch.tensor(6.0))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=0, atol=0)


def test_gradients_of_one_backward_are_not_those_that_the_next_reads():
    """The gradient of a loss is mostly 1, and what was made forward is then handed on as it is."""
    x, w, b, y = tensors()
    w.requires_grad_()
    loss = kernel.op(x, w, b, y)
    (want,) = torch.autograd.grad(loss, w, torch.tensor(2.0), retain_graph=True)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(w.grad, want * (times / 2))


def test_second_derivative_raises():
    x, *rest = tensors()
    grad = torch.autograd.grad(kernel.op(x.requires_grad_(), *rest), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.square().sum().backward()


def test_inputs_are_not_written():
    args = tensors(ignored=-100)
    copies = [t.clone() for t in args]
    results(kernel.op, args, options({"softcap": 2.0, "z_loss": 0.1}))
    assert all(map(torch.equal, args, copies))


def test_strides():
    x, w, b, y = tensors()
    want = results(kernel.op, (x, w, b, y), options({}))
    others = (x.mT.contiguous().mT, w.mT.contiguous().mT, torch.stack([b, b], 1)[:, 0], y.repeat(2)[:N])
    for got, expected in zip(results(kernel.op, others, options({})), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_the_gradient_of_a_label_that_is_all_but_certain_is_not_rounded_away():
    """In bfloat16 p = 0.999 is 1: p - 1 is made before it is rounded."""
    x, w = torch.eye(2, dtype=torch.bfloat16), torch.eye(2, dtype=torch.bfloat16) * 7
    x.requires_grad_()
    kernel.op(x, w, None, torch.tensor([0, 1]), "sum", wide=True).backward()
    p = 1 / (1 + torch.tensor(7.0).exp())
    torch.testing.assert_close(x.grad[0, 0].float(), -7 * p, rtol=2**-7, atol=0)


# -- memory ----------------------------------------------------------------------------------------


def test_cut():
    mib = 2**20
    assert kernel.cut(4096, 32000 * 4, "cpu", 0) == 512  # 524 rows in 64 MiB: 8 chunks
    assert kernel.cut(4096, 128256 * 4, "cpu", 0) == 256  # at least so many, though they take 125 MiB
    assert kernel.cut(4096, 32000 * 4, "cpu", 8 * mib) == 64
    assert kernel.cut(100, 4 * mib, "cpu", mib) == 1
    assert kernel.cut(0, 4, "cuda", 0) == 1
    assert kernel.cut(5, 4, "cuda", 0) == 5


def peak(f, *args):
    """Bytes at the most in forward and backward, gradients included, and the leaves after it."""
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in args]
    with Meter() as meter:
        f(*leaves).backward()
    return meter.peak


def test_the_peak_is_a_chunk_and_the_gradients(monkeypatch):
    n, d, v, rows = 512, 16, 4000, 16
    x, w, b, y = tensors(n, d, v)
    monkeypatch.setattr(kernel, "save_op", kernel.compose_save)  # for the meter to see inside
    ours = peak(lambda *t: kernel.op(*t, budget=rows * v * 4), x, w, b, y)
    theirs = peak(kernel.reference, x, w, b, y)
    chunk, grads = rows * v * 4, 4 * (n * d + v * d + v)
    assert ours <= max(2 * chunk + grads, 2 * grads) + 2**16
    assert ours <= 0.15 * theirs


# -- registration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [{}, OPTIONS[-1]], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, changed):
    x, w, b, y = tensors(dtype=dtype)
    torch.library.opcheck(kernel.op, (x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), y))
    torch.library.opcheck(kernel.op, (x.detach(), w, None, y, *options(changed)))


def test_without_gradients_the_loss_is_the_same():
    args = tensors(ignored=-100)
    want = results(kernel.op, args, options({}))[0].detach()
    with torch.inference_mode():
        assert torch.equal(kernel.op(*args), want)


def test_autocast_is_as_torchs():
    x, w, b, y = tensors()
    leaves = [t.requires_grad_() for t in (x, w, b)]
    with torch.autocast("cpu", torch.bfloat16):
        want = F.cross_entropy(F.linear(x, w, b), y)
        got = kernel.op(x, w, b, y, wide=True)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want)
    exact = results(kernel.reference, [t if t is y else t.detach().double() for t in (x, w, b, y)], (), 1.0)[
        1:
    ]
    grads = (torch.autograd.grad(t, leaves) for t in (got, want))
    for ours, theirs, e in zip(*grads, exact, strict=True):
        assert ours.dtype == torch.float32
        allowed = (theirs - e).abs().max() + 2 * torch.finfo(torch.bfloat16).eps * e.abs().max()
        assert (ours - e).abs().max() <= allowed


def test_compiled():
    x, w, b, y = tensors()
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def f(x, w, b, y):
        return kernel.op(x * 2, w, b, y).sin()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, w, b, y), f(x, w, b, y))
    for a, e in zip(*(torch.autograd.grad(g(x, w, b, y), leaves) for g in (compiled, f)), strict=True):
        torch.testing.assert_close(a, e)


def test_exported_whole_with_symbolic_sizes():
    class Model(torch.nn.Module):
        def forward(self, x, w, y):
            return kernel.op(x, w, None, y)

    x, w, _, y = tensors()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        Model(), (x, w, y), dynamic_shapes={"x": {0: auto}, "w": None, "y": {0: auto}}
    )
    assert kernel.op in [n.target for n in program.graph.nodes]
    vals = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    guards = len(vals[0].shape[0].node.shape_env.guards)
    assert list(kernel.unsupported(vals[0], vals[1], None, vals[2])) == []
    assert len(vals[0].shape[0].node.shape_env.guards) == guards
    x, w, _, y = tensors(9)
    torch.testing.assert_close(program.module()(x, w, y), kernel.reference(x, w, None, y))


X, W, B, Y = (torch.empty(s, device="meta") for s in ((N, D), (V, D), (V,), (N,)))
Y = Y.long()


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((X.int(), W.int(), None, Y), "dtype torch.int32 is not one of"),
        ((X, W.half(), None, Y), "dtypes differ: x is torch.float32, w torch.float16"),
        ((X, W, B.half(), Y), "dtypes differ: x is torch.float32, b torch.float16"),
        ((X, W, B, Y.to(torch.uint8)), "labels are torch.uint8; the kernel takes torch.int64"),
        ((X[None], W, B, Y), "have 3, 2 and 1 dimensions, expected 2, 2 and 1"),
        ((X, W[:, 1:], B, Y), f"x has {D} columns and w {D - 1}"),
        ((X, W, B, Y[1:]), f"x has {N} rows and there are {N - 1} labels"),
        ((X, W, B, Y, "none"), "the reduction is 'none', not one of mean, sum"),
        ((X, W, B, Y, "mean", -100, 1.5), "label smoothing is 1.5, not between 0 and 1"),
    ],
)
def test_unsupported(args, why):
    assert any(why in sentence for sentence in kernel.unsupported(*args))


def test_supported():
    assert list(kernel.unsupported(X, W, B, Y, *options(OPTIONS[-1]))) == []
    assert list(kernel.unsupported(X.bfloat16(), W.bfloat16(), None, Y)) == []
