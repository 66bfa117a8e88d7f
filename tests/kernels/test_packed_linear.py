"""packed_linear: values of every form, when a form is made and given up, who gets torch's linear instead."""

import pytest
import torch
import torch.nn.functional as F
from structured import within
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import packed_linear as kernel

EPS = torch.finfo(torch.float32).eps
SIZES = [(1, 1), (7, 5), (123, 77), (256, 128), (300, 130)]  # K, N
ROWS = [1, 7, 123, 256]

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")


@pytest.fixture(autouse=True)
def choice(monkeypatch):
    """Whether packing gains is set by a test, not by the clock: it does."""
    monkeypatch.setattr(kernel, "_gains", {})
    monkeypatch.setattr(kernel, "BETWEEN", 0)
    monkeypatch.setattr(kernel, "by_turns", lambda *_: [2.0, 1.0])


def tensors(k, n, *rows, biased=True):
    torch.manual_seed(k + n)
    return torch.randn(*rows, k), torch.randn(n, k), torch.randn(n) if biased else None


def close(got, x, w, b):
    """fp32 loses an eps of its absolute value a summand, in whichever order."""
    want, terms = F.linear(x.double(), w.double()), F.linear(x.double().abs(), w.double().abs())
    if b is not None:
        want, terms = want + b.double(), terms + b.double().abs()
    assert (got.dtype, got.shape) == (torch.float32, want.shape)
    assert got.is_contiguous()
    within(got, want, terms, (x.shape[-1] + 1) * EPS, 1)


@torch.no_grad()
def warm(w, b, x):
    """The weight as it is kept after enough calls with x."""
    kept = kernel.shared.made(w)
    for _ in range(kernel.CALLS):
        kernel.direct(x, w, b, kept)
    return kept


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("k", "n"), SIZES)
@torch.no_grad()
def test_values(k, n, biased):
    for rows in ROWS:
        x, w, b = tensors(k, n, rows, biased=biased)
        close(kernel.op(x, w, b), x, w, b)
        kept = warm(w, b, x)
        assert kept.form.rows == (rows if rows >= kernel.FEW else 0)
        close(kernel.direct(x, w, b, kept), x, w, b)


LAYOUTS = {
    "one dimension": lambda: torch.randn(64),
    "three": lambda: torch.randn(2, 6, 64),
    "four": lambda: torch.randn(2, 3, 2, 64),
    "transposed": lambda: torch.randn(64, 12).t(),
    "permuted": lambda: torch.randn(6, 64, 2).permute(2, 0, 1),
    "sliced": lambda: torch.randn(12, 128)[:, 1::2],
    "expanded": lambda: torch.randn(1, 64).expand(12, 64),
    "offset": lambda: torch.randn(13, 64)[1:],
    "no rows": lambda: torch.randn(0, 64),
}


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_layouts(name):
    torch.manual_seed(0)
    x = LAYOUTS[name]()
    for w in (torch.randn(48, 64), torch.randn(64, 48).t(), torch.randn(48, 128)[:, ::2]):
        for b in (torch.randn(48), torch.randn(96)[::2], torch.randn(1).expand(48), None):
            kept = warm(w, b, torch.randn(12, 64))
            assert kept.form.packed is not None
            close(kernel.direct(x, w, b, kept), x, w, b)


@torch.no_grad()
def test_threads_may_differ_from_when_it_was_laid_out():
    threads = torch.get_num_threads()
    x, w, b = tensors(128, 256, 64)
    try:
        for then, now in ((1, 2), (2, 1)):
            torch.set_num_threads(then)
            kept = warm(w, b, x)
            torch.set_num_threads(now)
            close(kernel.direct(x, w, b, kept), x, w, b)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_a_form_is_made_for_the_number_of_rows_that_most_calls_come_with():
    x, w, b = tensors(64, 48, 40)
    kept = kernel.shared.made(w)

    def after(*rows):
        for n in rows:
            close(kernel.direct(x[:n], w, b, kept), x[:n], w, b)
        return kept.form.rows

    assert after(7, 7, 7, 8, 8, 8) == 0
    assert after(7) == 7  # the fourth
    form = kept.form
    assert after(7, 8, 7, 8, 7, 8, 7, 8) == 7  # no more often
    assert kept.form is form
    assert after(8) == 8
    assert after(*range(4, 41)) == 8  # a length that grows by one
    assert after(*[3] * 9, *[0] * 9) == 8
    assert kept.calls.keys() <= set(range(4, 41))


@torch.no_grad()
def test_what_is_counted_is_bounded():
    x, w, b = tensors(64, 48, 500)
    kept = kernel.shared.made(w)
    for n in range(500):
        kernel.direct(x[:n], w, b, kept)
        assert len(kept.calls) <= kernel.MOST + 1


@torch.no_grad()
def test_a_form_that_does_not_gain_is_not_kept_and_not_tried_again(monkeypatch):
    tried = []
    monkeypatch.setattr(kernel, "by_turns", lambda runs, *_: tried.append(runs) or [1.0, 1.0])
    x, w, b = tensors(64, 48, 12)
    for _ in range(2):
        kept = warm(w, b, x)
        assert kept.form == (12, None)
        close(kernel.direct(x, w, b, kept), x, w, b)
    assert len(tried) == 1


def test_it_is_timed(monkeypatch):
    monkeypatch.undo()
    x, w, b = tensors(64, 256, 16)
    kept = warm(w, b, x)
    assert kernel._gains[16, 256, 64, 64, 1, False, torch.get_num_threads()] == (kept.form.packed is not None)
    del kernel._gains[16, 256, 64, 64, 1, False, torch.get_num_threads()]


class Other(torch.Tensor):
    """A tensor that says what is called with it."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def test_what_watches_sees_torchs_linear():
    x, w, b = tensors(64, 48, 12)
    kept = warm(w, b, x)
    tangent = torch.randn_like(x)

    def call(x):
        return kernel.direct(x, w, b, kept)

    with torch.no_grad():
        _, got = torch.func.jvp(call, (x,), (tangent,))
        torch.testing.assert_close(got, tangent @ w.t())
        with forward_ad.dual_level():
            dual = call(forward_ad.make_dual(x, tangent))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent @ w.t())
        torch.vmap(lambda row: row * (0 if kernel.watched(row) else pytest.fail("unseen")))(x)
        torch.testing.assert_close(torch.vmap(call)(x.view(3, 4, 64)).view(12, 48), F.linear(x, w, b))
        with FlopCounterMode(display=False) as counted:
            call(x)
        assert counted.get_total_flops() == 2 * 12 * 48 * 64
        with torch.autocast("cpu", torch.bfloat16):
            assert call(x).dtype == torch.bfloat16
        call(x.as_subclass(Other))
        assert F.linear in Other.seen or torch._C._nn.linear in Other.seen
        assert torch.equal(torch.compile(call, backend="eager")(x), F.linear(x, w, b))
        torch.use_deterministic_algorithms(True)
        try:
            assert kernel.watched(x)
        finally:
            torch.use_deterministic_algorithms(False)
        assert not kernel.watched(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(call(leaf).sum(), leaf)[0], w.sum(0).expand(12, 64))


@pytest.mark.parametrize("biased", [True, False])
def test_opcheck_and_derivative(biased):
    x, w, b = (t if t is None else t.requires_grad_() for t in tensors(12, 7, 3, 5, biased=biased))
    torch.library.opcheck(kernel.op, (x, w, b))
    double = [t if t is None else t.detach().double().requires_grad_() for t in (x, w, b)]
    assert torch.autograd.gradcheck(kernel.op, double)
    assert torch.autograd.gradgradcheck(kernel.op, double)


def test_autocast():
    x, w, b = tensors(12, 7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel.op(x, w, b).dtype == torch.bfloat16


def test_flops():
    with FlopCounterMode(display=False) as counted:
        kernel.op(*tensors(40, 24, 3, 5))
    assert counted.get_total_flops() == 2 * 15 * 24 * 40


def unsupported(k, n, *rows, dtype=torch.float32, b=True, w=None):
    x = torch.empty(*rows, k, dtype=dtype)
    w = torch.empty(n, k, dtype=dtype) if w is None else w
    return list(kernel.unsupported(x, w, torch.empty(n) if b is True else b))


def test_unsupported(monkeypatch):
    assert unsupported(256, 128, 4) == unsupported(256, 128, 2, 2, b=None) == []
    small = "with fewer than 4 rows of x, 128 rows of w or 32,768 weights nothing is gained"
    assert unsupported(256, 128, 3) == [f"x is [3, 256] and w [128, 256]; {small}"]
    assert unsupported(999, 127, 9) == [f"x is [9, 999] and w [127, 999]; {small}"]
    assert unsupported(255, 128, 9) == [f"x is [9, 255] and w [128, 255]; {small}"]
    double = "dtype torch.float32, torch.float64; MKL lays out torch.float32"
    assert unsupported(256, 128, 9, dtype=torch.float64) == [double]
    ranks = "w has 1 dimensions; the kernel takes 2 and 1"
    assert unsupported(256, 128, 9, w=torch.empty(256), b=None) == [ranks]
    assert "b 2; the kernel takes 2 and 1" in unsupported(256, 128, 9, b=torch.empty(1, 128))[0]
    meta = [torch.empty(*s, device="meta") for s in ((9, 256), (128, 256))]
    assert list(kernel.unsupported(*meta, None)) == ["x is on meta; weights are laid out for the CPU"]
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert unsupported(256, 128, 9) == ["this torch was built without MKL, which lays weights out"]
