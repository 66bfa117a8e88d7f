"""packed_convolution: values of every form, who gets torch's operators instead, what oneDNN gets wrong."""

import pytest
import torch
from structured import within
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import packed_convolution as kernel

EPS = torch.finfo(torch.float32).eps
STEEPEST = 1.5  # slope of an activation: of hardswish at 3
NUMBERS = {"hardtanh": [-0.5, 1.5], "leaky_relu": [0.2]}

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def choice(monkeypatch):
    """Whether a linear is faster is set by a test, not by the clock: oneDNN is."""
    monkeypatch.setattr(kernel, "_gains", {})
    monkeypatch.setattr(kernel, "by_turns", lambda *_: [1.0, 1.0])


@pytest.fixture
def linear(monkeypatch):
    """The linear is."""
    monkeypatch.setattr(kernel, "by_turns", lambda *_: [2.0, 1.0])


# C, K, groups, sizes of x, sizes of w, stride, padding, dilation
SHAPES = {
    "line": (6, 8, 2, [11], [3], [2], [1], [1]),
    "plane": (6, 8, 1, [9, 7], [3, 2], [1, 2], [1, 0], [2, 1]),
    "volume": (4, 6, 2, [5, 4, 6], [2, 3, 1], [1, 1, 2], [0, 1, 0], [1, 1, 1]),
    "depthwise": (20, 20, 20, [8, 8], [3, 3], [1, 1], [1, 1], [1, 1]),
    "pointwise": (33, 17, 1, [5, 6], [1, 1], [1, 1], [0, 0], [1, 1]),
    "one channel": (1, 1, 1, [5, 5], [3, 3], [1, 1], [1, 1], [1, 1]),
    "one place": (7, 5, 1, [1, 1], [1, 1], [1, 1], [0, 0], [1, 1]),
}


def tensors(name, n=2, biased=True):
    torch.manual_seed(len(name))
    c, k, groups, sizes, window, *how = SHAPES[name]
    x, w = torch.randn(n, c, *sizes), torch.randn(k, c // groups, *window)
    return x, w, torch.randn(k) if biased else None, (*how, groups)


@torch.no_grad()
def close(got, x, w, b, other, how, act="none"):
    """fp32 loses an eps of its absolute value a summand, and four in an activation of the sum or of 1."""
    n = w[0].numel() + (b is not None) + (other is not None)
    given = [t if t is None else t.double() for t in (x, w, b, other)]
    want = kernel.reference(*given, *how, act, NUMBERS.get(act, []))
    terms = kernel.reference(*(t if t is None else t.abs() for t in given), *how)
    within(got, want, STEEPEST * (n + 1) * terms + 4 * (terms + 1), EPS, 1)
    assert got.movedim(1, -1).is_contiguous()


def packed(w, how):
    stride, padding, dilation, groups = how
    return kernel.shared.made(w, stride, padding, dilation, groups)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_shapes(name, biased):
    x, w, b, how = tensors(name, biased=biased)
    kept = packed(w, how)
    y = kernel.direct(x, w, b, None, *how, shared=kept)
    assert kept.packed.is_mkldnn
    close(y, x, w, b, None, how)
    close(kernel.op(x, w, b, None, *how), x, w, b, None, how)
    for other in (torch.randn_like(y), torch.randn(y.shape), torch.randn(1, *y.shape[1:]).expand_as(y)):
        for act in kernel.ACTS:
            given = act, NUMBERS.get(act, [])
            close(kernel.direct(x, w, b, other, *how, *given, kept), x, w, b, other, how, act)


@pytest.mark.parametrize("act", kernel.ACTS)
@torch.no_grad()
def test_activations(act):
    x, w, b, how = tensors("plane")
    for scale in (0.3, 10.0):
        kept = packed(w * scale, how)
        y = kernel.direct(x, w * scale, b, None, *how, act, NUMBERS.get(act, []), kept)
        close(y, x, w * scale, b, None, how, act)


@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize("act", kernel.ACTS)
@torch.no_grad()
def test_one_place_as_a_linear(act):
    x, w, b, how = tensors("pointwise")
    for x in (x, kernel.channels_last(x), x[:0], x[:1].expand(3, -1, -1, -1)):  # noqa: B020
        for b in (b, None):  # noqa: B020
            kept = packed(w, how)
            for _ in range(2):
                y = kernel.direct(x, w, b, None, *how, act, NUMBERS.get(act, []), kept)
                close(y, x, w, b, None, how, act)
            assert (kept.packed, kept.rows.shape) == (None, (17, 33))
            other, given = torch.randn(y.shape), (act, NUMBERS.get(act, []))
            close(kernel.direct(x, w, b, other, *how, *given, kept), x, w, b, other, how, act)


@pytest.mark.usefixtures("linear")
@torch.no_grad()
def test_only_where_a_window_is_one_place():
    for name in SHAPES:
        x, w, b, how = tensors(name)
        kept = packed(w, how)
        close(kernel.direct(x, w, b, None, *how, shared=kept), x, w, b, None, how)
        assert (kept.rows is not None) == (name in ("pointwise", "one place"))
    for how in (([2, 1], [0, 0], [1, 1], 1), ([1, 1], [0, 1], [1, 1], 1)):
        assert not packed(w, how).pointwise


@torch.no_grad()
def test_it_is_timed_once(monkeypatch):
    tried = []
    monkeypatch.setattr(kernel, "by_turns", lambda runs, *_: tried.append(runs) or [1.05, 1.0])
    x, w, b, how = tensors("pointwise")
    for _ in range(2):
        kept = packed(w, how)
        kernel.direct(x, w, b, None, *how, shared=kept)
        assert kept.rows is None
    assert len(tried) == 1


LAYOUTS = {
    "channels last": lambda x: kernel.channels_last(x),
    "permuted": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: x.repeat(1, 1, 2, 1)[:, :, ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "offset": lambda x: torch.cat([x, x])[1:],
    "no images": lambda x: x[:0],
}


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_layouts(name):
    """oneDNN reads a bias without looking at its strides, which `convolved` must not let it."""
    x, w, _, how = tensors("plane")
    x = LAYOUTS[name](x)
    for weight in (w, w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2), torch.cat([w, w], 1)[:, ::2]):
        for b in (torch.randn(16)[::2], torch.randn(1).expand(8)):
            close(
                kernel.direct(x, weight, b, None, *how, shared=packed(weight, how)), x, weight, b, None, how
            )


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_other_sizes_than_it_was_laid_out_for(name):
    x, w, b, how = tensors(name)
    kept = packed(w, how)
    for n, repeat in ((2, 1), (1, 1), (5, 3)):
        more = x[:1].repeat(n, 1, *[repeat] * (x.dim() - 2))
        close(kernel.direct(more, w, b, None, *how, shared=kept), more, w, b, None, how)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_halves(dtype):
    """Sums in fp32 and one rounding, of the result, where a convolution and its activation round twice."""
    x, w, b, how = tensors("plane")
    x, w, b = (t.to(dtype) for t in (x, w, b))
    if dtype not in kernel.served():
        assert "oneDNN lays out one of" in next(kernel.unsupported(x, w, b, None))
        return
    y = kernel.direct(x, w, b, None, *how, "silu", [], packed(w, how))
    want = kernel.reference(x.double(), w.double(), b.double(), None, *how, "silu")
    terms = kernel.reference(x.double().abs(), w.double().abs(), b.double().abs(), None, *how)
    assert y.dtype == dtype
    within(y, want, 2 * torch.finfo(dtype).eps * terms + 50 * EPS * terms, 1, 1)


@torch.no_grad()
@pytest.mark.parametrize("act", kernel.ACTS)
def test_what_is_not_a_number_stays_so(act):
    """oneDNN's relu, hardtanh and hardsigmoid make numbers of it."""
    x, w, how = torch.full((1, 1, 1, 1), torch.nan), torch.ones(1, 1, 1, 1), ([1, 1], [0, 0], [1, 1], 1)
    for other in (None, torch.ones(1, 1, 1, 1)):
        y = kernel.direct(x, w, None, other, *how, act, NUMBERS.get(act, []), packed(w, how))
        assert y.isnan().all()


def test_what_watches_sees_torchs_operators():
    x, w, b, how = tensors("plane")
    kept, tangent = packed(w, how), torch.randn_like(x)

    def call(x):
        return kernel.direct(x, w, b, None, *how, "tanh", [], kept)

    with torch.no_grad():
        want = kernel.reference(x, w, b, None, *how, "tanh")
        call(x)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent))).tangent
        slope = torch.func.jvp(lambda x: kernel.reference(x, w, b, None, *how, "tanh"), (x,), (tangent,))[1]
        torch.testing.assert_close(dual, slope)
        images = x.view(2, 1, *x.shape[1:])
        torch.testing.assert_close(torch.vmap(call)(images).view_as(want), want)
        with FlopCounterMode(display=False) as counted:
            call(x)
        assert counted.get_total_flops() == 2 * want.shape[0] * want[0, 0].numel() * w.numel()
        with torch.autocast("cpu", torch.bfloat16):
            assert call(x).dtype == torch.bfloat16
        assert torch.equal(torch.compile(call, backend="eager")(x), want)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.grad(call(leaf).sum(), leaf)[0].any()


@pytest.mark.parametrize("name", ["line", "plane"])
def test_opcheck_and_derivative(name):
    x, w, b, how = tensors(name)
    other = torch.randn_like(kernel.reference(x, w, b, None, *how))
    given = [t.requires_grad_() for t in (x, w, b, other)]
    torch.library.opcheck(kernel.op, (*given, *how, "relu"))
    torch.library.opcheck(kernel.op, (x, w, None, None, *how))
    double = [t.detach()[..., :3].double().requires_grad_() for t in (x, w)]
    assert torch.autograd.gradcheck(lambda x, w: kernel.op(x, w, None, None, *how, "gelu"), double)


def test_flops():
    x, w, b, how = tensors("plane")
    with FlopCounterMode(display=False) as counted:
        y = kernel.op(x, w, b, None, *how)
    assert counted.get_total_flops() == 2 * y[0, 0].numel() * y.shape[0] * w.numel()


def test_autocast():
    x, w, b, how = tensors("plane")
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel.op(x, w, b, None, *how).dtype == torch.bfloat16


def test_unsupported(monkeypatch):
    def why(*shapes, dtype=torch.float32, device="cpu", other=None):
        x, w = (torch.empty(s, dtype=dtype, device=device) for s in shapes)
        return list(kernel.unsupported(x, w, None, other))

    plane = (2, 3, 5, 5), (4, 3, 1, 1)
    like = torch.empty(2, 4, 5, 5)
    assert why(*plane) == why(*plane, other=like) == why((2, 3, 5), (4, 3, 1)) == []
    assert why(*plane, dtype=torch.float64)[0].startswith("dtype torch.float64; oneDNN lays out one of ")
    assert why(*plane, device="meta") == ["x is on meta; weights are laid out for the CPU"]
    few = "the kernel takes 3 to 5 of each, the first a batch"
    assert why((3, 5, 5), (4, 3, 1, 1)) == [f"x has 3 dimensions and w 4; {few}"]
    assert why((3, 5), (4, 3)) == [f"x has 2 dimensions and w 2; {few}"]
    broadcast = "what is added is [2, 1, 5, 5]; the kernel does not broadcast"
    assert why(*plane, other=like[:, :1]) == [broadcast]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert why(*plane) == ["this torch was built without oneDNN, which lays weights out"]
