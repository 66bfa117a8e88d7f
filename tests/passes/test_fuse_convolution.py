"""fuse-convolution: what becomes one call, what stays and why, that values and layouts survive."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.kernels import packed_convolution as kernel
from tests.helpers import Function, Method, captures, notes, session, targets

F, S = nn.functional, nn.Sequential
PACKED = "fxaccel.packed_convolution.default"
X = torch.randn(2, 6, 9, 8)

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def fused(model, *args, passes=("fuse-convolution",), **options):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(model.eval(), passes=passes, example_inputs=args, **options)
    return fast, fast.report()["fuse-convolution"]


def laid(t):
    """Strides, where they matter."""
    return [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]


@torch.no_grad()
def agree(model, fast, *args):
    """Values, and how the results lie in memory."""
    got, want = fast(*args), model(*args)
    for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
        assert laid(a) == laid(b)


class Residual(nn.Module):
    """Two convolutions, what goes past them, and an activation at the end."""

    def __init__(self, end=F.relu, other=lambda h: h, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(6, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.end, self.other = end, other

    def forward(self, x):
        h = F.silu(self.a(x))
        return self.end(self.b(h) + self.other(h)).mean((2, 3))


# -- it fires --------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [F.relu, F.silu])
def test_a_block_becomes_two_calls(end):
    model = Residual(end)
    fast, record = fused(model, X)
    program = session(fast).all[0].program
    assert targets(program) == [PACKED, PACKED, "aten.mean.dim"]
    assert [n.args[8:] for n in program.graph.nodes if str(n.target) == PACKED] == [
        ("silu",), (end.__name__,)
    ]  # fmt: skip
    assert record.refused == []
    agree(model, fast, X)
    size = sum(p.numel() for p in model.parameters() if p.dim() > 1) * 4 / 2**20
    assert f"2 weights of {size:.3g} MiB are kept a second time" in notes(fast)
    assert fast.verify().ok


def test_a_second_run_finds_nothing():
    fast, _ = fused(Residual(), X)
    again = fxaccel.manager.run(session(fast).all[0].program, [fxaccel.passes.FuseConvolution()])
    assert again.report.passes[0].applied == []


ACTIVATIONS = {
    "none": nn.Identity(), "relu": nn.ReLU(inplace=True), "hardtanh": nn.Hardtanh(-2, 0.5),
    "relu6": nn.ReLU6(), "clamp": Function(lambda x: x.clamp(0, 4)), "leaky_relu": nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(), "silu": Function(lambda x: x * torch.sigmoid(x)),
    "hardswish": nn.Hardswish(inplace=True), "hardsigmoid": nn.Hardsigmoid(), "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    model = S(nn.Conv2d(6, 5, 3), ACTIVATIONS[name], nn.Softmax(1), nn.Flatten())
    fast, record = fused(model, X)
    assert targets(session(fast).all[0].program)[0] == PACKED
    assert len(record.applied) == 1
    assert sum(t in (PACKED, "aten._softmax.default", "aten.softmax.int", "aten.reshape.default") for t in
               targets(session(fast).all[0].program)) == 3  # fmt: skip
    agree(model, fast, X)


CONVOLUTIONS = {
    "line": lambda: (nn.Conv1d(6, 8, 3, stride=2, padding=1, groups=2), X[..., 0]),
    "volume": lambda: (nn.Conv3d(6, 4, 2, dilation=(1, 2, 1)), X[:, :, None].repeat(1, 1, 3, 1, 1)),
    "depthwise": lambda: (nn.Conv2d(6, 12, 3, groups=6, bias=False), X),
    "padded same": lambda: (nn.Conv2d(6, 4, (3, 5), padding="same", dilation=(1, 2)), X),
    "padded valid": lambda: (nn.Conv2d(6, 4, 2, padding="valid"), X),
    "padded by reflection": lambda: (nn.Conv2d(6, 4, 3, padding=2, padding_mode="reflect"), X),
    "padded in a circle": lambda: (nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular"), X[..., 0]),
    "half": lambda: (nn.Conv2d(6, 4, 3).to(torch.bfloat16), X.to(torch.bfloat16)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    torch.manual_seed(0)
    layer, x = CONVOLUTIONS[name]()
    model = S(layer, nn.ReLU())
    if x.dtype not in kernel.served():
        pytest.skip("this processor has no such numbers")
    fast, record = fused(model, x)
    assert len(record.applied) == 1
    assert "aten.relu.default" not in targets(session(fast).all[0].program)
    if x.dtype == torch.float32:
        agree(model, fast, x)


def test_of_two_convolutions_that_are_added_it_takes_the_one_that_is_free():
    """The sum is written either way round in the graph; the first convolution is read by the second."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

        def forward(self, x):
            h = self.a(x)
            return F.relu(h + self.b(h)).sum(1)

    model = Chain()
    fast, record = fused(model, X)
    assert targets(session(fast).all[0].program) == [PACKED, PACKED, "aten.sum.dim_IntList"]
    assert record.refused == []
    agree(model, fast, X)


def test_norms_are_folded_first():
    model = S(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model[1].running_var.uniform_(0.5, 2)
    fast, _ = fused(model, X, passes=["fuse-convolution", "fold-batch-norm"])
    assert targets(session(fast).all[0].program)[-2] == PACKED
    assert "aten.relu.default" not in targets(session(fast).all[0].program)
    agree(model, fast, X)
    with torch.no_grad():
        model[1].running_mean.add_(1)
    agree(model, fast, X)


# -- layouts ---------------------------------------------------------------------------------------


def shown(m, x):
    y = m.a(x)
    return y, y.flatten(1), F.max_pool2d(y, 2)


def viewed(m, x):
    y = m.a(x).contiguous()
    return y.view(2, -1) + torch.as_strided(y, (2, 216), (432, 2)).repeat(1, 2)


def twice(m, x):
    y, z = m.a(x).relu().chunk(2, 1)
    return y, (z + 1).permute(0, 2, 3, 1)


def other_layout(m, x):
    return m.a(x.to(memory_format=torch.channels_last)), m.b(x)


LAYOUTS = {"shown": (shown, 3), "viewed": (viewed, 1), "twice": (twice, 1), "other layout": (other_layout, 1)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_results_are_laid_out_as_they_were(name):
    function, copies = LAYOUTS[name]
    model = Method(function, a=nn.Conv2d(6, 6, 3, padding=1), b=nn.Conv2d(6, 6, 1))
    fast, record = fused(model, X)
    assert record.applied
    assert targets(session(fast).all[0].program).count("aten.clone.default") <= copies
    agree(model, fast, X)
    agree(model, fast, X.to(memory_format=torch.channels_last))


def test_results_that_are_views_of_one_stay_so():
    model = Method(lambda m, x: (lambda y: (y[:, 0], y[:, 1:]))(m.a(x)), a=nn.Conv2d(6, 6, 1))
    fast, _ = fused(model, X)
    agree(model, fast, X)
    with torch.no_grad():
        a, b = fast(X)
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


# -- it declines -----------------------------------------------------------------------------------


def grown(m, x):
    return F.conv2d(x, m.layer.weight * x.sum())


def refusing(layer=None, function=None, x=X):
    torch.manual_seed(0)
    layer = layer or nn.Conv2d(6, 6, 3, padding=1)
    return Method(function or (lambda m, x: m.layer(x)), layer=layer), x


REFUSED = {
    "computed": (lambda: refusing(function=grown), "is no parameter or buffer that stays as it is"),
    "float64": (
        lambda: refusing(nn.Conv2d(6, 6, 3).double(), x=X.double()),
        "dtype torch.float64; oneDNN lays out one of",
    ),
    "one image": (lambda: refusing(x=X[0]), "x has 3 dimensions and w 4; the kernel takes 3 to 5 of each"),
    "uneven": (
        lambda: refusing(nn.Conv2d(6, 6, (2, 3), padding="same")),
        "padding 'same' of [2, 3] is one more behind than before",
    ),
    "transposed": (
        lambda: refusing(nn.ConvTranspose2d(6, 6, 3)),
        "a transposed convolution is laid out for one size of its input, which may vary",
    ),
}  # fmt: skip
PARTLY = {
    "broadcast": (
        lambda: Residual(other=lambda h: h.mean(1, keepdim=True)), ", 1, 9, 8]; the kernel does not broadcast"
    ),
    "another size": (
        lambda: Residual(other=lambda h: h[:1]), "is added to a result of"
    ),
    "a number": (lambda: Residual(other=lambda h: 2.0), "what is added is the number 2.0"),
    "half a clamp": (
        lambda: S(nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3), Function(lambda y: y.clamp(max=1.0))),
        "it is clamped between None and 1.0, which are not two numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_declines_and_says_why(name):
    make, why = REFUSED[name]
    model, x = make()
    fast, record = fused(model, x)
    assert record.applied == []
    assert why in record.refused[0].why
    agree(model, fast, x)


@pytest.mark.parametrize("name", PARTLY)
def test_takes_the_convolution_without_what_it_cannot(name):
    make, why = PARTLY[name]
    model = make()
    fast, record = fused(model, X)
    assert len(record.applied) == 2
    assert any(why in site.why for site in record.refused)
    agree(model, fast, X)


def test_memory_is_bounded():
    """1296 bytes each; the last is the first."""
    for mebibytes, count in ((0.001, 0), (0.002, 1), (0.003, 2)):
        _, record = fused(Residual(), X, passes=[fxaccel.passes.FuseConvolution(mebibytes=mebibytes)])
        assert len(record.applied) == count
    _, record = fused(Residual(), X, passes=["fuse-convolution{mebibytes=0.002}"])
    told = "the weight has 0.00124 MiB and those kept twice 0.00124; mebibytes=0.002 is the most"
    assert any(site.why == told for site in record.refused)


def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        _, record = fused(Residual(), X)
    assert record.applied == []
    assert "the result is torch.bfloat16: autocast rounds what is convolved" in record.refused[0].why


def test_it_serves_inference_only():
    model = Residual()
    with pytest.warns(UserWarning, match="serves inference only"):
        fast = fxaccel.accelerate(model, ["fuse-convolution"], example_inputs=(X,))
    fast(X).sum().backward()
    assert fast.report()["fuse-convolution"].applied == []
    want = torch.autograd.grad(model(X).sum(), model.a.weight)[0]
    torch.testing.assert_close(fast.a.weight.grad, want)


# -- values ----------------------------------------------------------------------------------------


def exchanged(fast):
    fast.a.weight = nn.Parameter(torch.randn_like(fast.a.weight))


def trained(fast):
    step = torch.optim.SGD(fast.parameters(), lr=0.1)
    with torch.enable_grad():
        fast(X).square().mean().backward()
    step.step()
    step.zero_grad()


CHANGES = {
    "written": lambda fast: fast.a.weight.mul_(-2),
    "loaded": lambda fast: fast.load_state_dict({k: v + 1 for k, v in fast.state_dict().items()}),
    "exchanged": exchanged,
    "moved": lambda fast: fast.double().float(),
    "trained": trained,
    "of the bias": lambda fast: fast.a.bias.add_(3),
}


@pytest.mark.filterwarnings("ignore:pass 'fuse-convolution' applied nowhere")
@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_change_are_laid_out_anew(name, monkeypatch):
    packed, kept = [], kernel.Kept.__init__
    monkeypatch.setattr(
        kernel.Kept, "__init__", lambda self, *given: packed.append(self) or kept(self, *given)
    )
    model = Residual()
    fast, _ = fused(model, X)
    agree(model, fast, X)
    first = len(packed)
    agree(model, fast, X)
    assert len(packed) == first
    with torch.no_grad():
        CHANGES[name](fast)
    now = Residual()
    now.load_state_dict(fast.state_dict())
    agree(now, fast, X)
    assert (len(packed) > first) == (name != "of the bias")


def test_other_sizes_and_a_file(tmp_path):
    model = Residual()
    fast, _ = fused(model, X)
    for x in (X, torch.randn(5, 6, 9, 8), torch.randn(3, 6, 9, 8)):
        agree(model, fast, x)
    assert captures(fast) == 1
    fast.save(tmp_path / "model.fxa")
    agree(model, fxaccel.load(tmp_path / "model.fxa"), X)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        other.a.weight.zero_()
    agree(model, fast, X)


def test_in_inference_mode_and_through_torch_compile():
    model = Residual()
    fast, _ = fused(model, X)
    with torch.inference_mode():
        torch.testing.assert_close(fast(X), model(X))
    fast, _ = fused(model, X, backend="inductor")
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))
