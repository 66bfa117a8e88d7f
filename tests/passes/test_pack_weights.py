"""pack-weights: what it packs, what it leaves and why, and that values follow the weights."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.kernels import packed_linear as kernel
from tests.helpers import Method, captures, notes, session, targets

F = nn.functional
PACKED = "fxaccel.packed_linear.default"
X = torch.randn(2, 8, 256)

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")


@pytest.fixture(autouse=True)
def gains(monkeypatch):
    """Packing gains, whatever the clock says; `gains` lists the rows that weights were packed for."""
    packed, laid = [], kernel.fastest

    def fastest(x, w, b, rows):
        packed.append(rows)
        return laid(x, w, b, rows)

    monkeypatch.setattr(kernel, "_gains", {})
    monkeypatch.setattr(kernel, "BETWEEN", 0)
    monkeypatch.setattr(kernel, "by_turns", lambda *_: [2.0, 1.0])
    monkeypatch.setattr(kernel, "fastest", fastest)
    return packed


def packed(model, *args, passes=("pack-weights",), **options):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(model.eval(), passes=passes, example_inputs=args, **options)
    return fast, fast.report()["pack-weights"]


@torch.no_grad()
def agree(model, fast, *args):
    """Often enough for a weight to be packed, and once with it."""
    for _ in range(kernel.CALLS + 1):
        torch.testing.assert_close(fast(*args), model(*args))


def mlp(width=256, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, 2 * width, bias), nn.GELU(), nn.Linear(2 * width, width, bias), nn.Tanh(),
        nn.Linear(width, 130, bias),
    ).eval()  # fmt: skip


# -- it fires --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_linears_are_packed(bias, gains):
    model = mlp(bias=bias)
    fast, record = packed(model, X)
    assert [s.path for s in record.applied] == ["0", "2", "4"]
    program = session(fast).all[0].program
    assert targets(program) == [PACKED, "aten.gelu.default", PACKED, "aten.tanh.default", PACKED]
    agree(model, fast, X)
    assert gains == [16, 16, 16]
    assert fast.verify().ok
    size = sum(p.numel() for p in model.parameters() if p.dim() > 1) * 4 / 2**20
    assert f"3 weights of {size:.3g} MiB are kept a second time" in notes(fast)


def test_a_second_run_finds_nothing():
    fast, _ = packed(mlp(), X)
    again = fxaccel.manager.run(session(fast).all[0].program, [fxaccel.passes.PackWeights()])
    assert again.report.passes[0].applied == []


def test_other_sizes_are_served_by_the_same_capture(gains):
    model = mlp()
    fast, _ = packed(model, X)
    for x in (X, torch.randn(3, 7, 256), torch.randn(5, 2, 256)):
        agree(model, fast, x)
    assert captures(fast) == 1
    assert gains == [rows for rows in (16, 21, 10) for _ in range(3)]


def test_a_weight_that_several_read_is_packed_once(gains):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.mix = nn.Embedding(300, 256), nn.Linear(256, 256)
            self.head = nn.Linear(256, 300, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.mix(self.mix(self.words(ids)).tanh()))

    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 300, (2, 9))
    fast, record = packed(model, ids)
    assert len(record.applied) == 3
    agree(model, fast, ids)
    assert gains == [18, 18]  # of mix half as many calls
    assert "2 weights" in notes(fast)


def conv1d(m, x):
    """As GPT-2 has its linears."""
    return torch.addmm(m.b, x.view(-1, x.shape[-1]), m.w)


def stepped(m, x):
    return F.linear(x, m.w.t().detach(), m.b) + F.linear(x, m.w.t().detach())


COMPUTED = {"transposed": conv1d, "twice": stepped}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_made_of_parameters(name, gains):
    torch.manual_seed(0)
    model = Method(COMPUTED[name])
    model.w, model.b = nn.Parameter(torch.randn(256, 200) / 16), nn.Parameter(torch.randn(200))
    fast, record = packed(model, X)
    assert record.refused == []
    agree(model, fast, X)
    assert set(gains) == {16}
    with torch.no_grad():
        model.w.mul_(-1)
    agree(model, fast, X)


def test_after_the_passes_that_change_weights():
    model = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.Linear(256, 256))
    x = torch.randn(9, 256)
    fast, record = packed(model, x, passes=["pack-weights", "fold-batch-norm"])
    assert len(record.applied) == 2
    assert targets(session(fast).all[0].program).count("aten.batch_norm.default") == 0
    agree(model, fast, x)
    passes = [fxaccel.passes.PackWeights, fxaccel.passes.Quantize(where="0", even_if_slower=True)]
    fast, record = packed(mlp(), X, passes=passes, allow="lower_precision")
    assert [s.path for s in record.applied] == ["2", "4"]


# -- it declines -----------------------------------------------------------------------------------


def grown(m, x):
    return F.linear(x, m.w * x.sum())


def written(m, x):
    m.buffer.add_(1)
    return F.linear(x, m.buffer)


def scaled(m, x):
    return F.linear(x, m.w * 2)


def refusing(function=None, width=256, out=256, dtype=torch.float32, rows=8):
    model = nn.Linear(width, out) if function is None else Method(function)
    model.w = nn.Parameter(torch.randn(out, width))
    model.register_buffer("buffer", torch.randn(out, width))
    return model.to(dtype), torch.randn(1, rows, width).to(dtype)


STAYS = "is no parameter or buffer that stays as it is, and none that a pass made"
REFUSED = {
    "computed": (lambda: refusing(grown), f"%mul {STAYS}"),
    "written": (lambda: refusing(written), STAYS),
    "scaled": (lambda: refusing(scaled), f"%mul {STAYS}"),
    "float64": (lambda: refusing(dtype=torch.float64), "dtype torch.float64; MKL lays out torch.float32"),
    "bfloat16": (lambda: refusing(dtype=torch.bfloat16), "dtype torch.bfloat16; MKL lays out torch.float32"),
    "few rows": (lambda: refusing(lambda m, x: F.linear(x[0, :3], m.w)), "fewer than 4 rows of x"),
    "narrow": (lambda: refusing(out=127), "w [127, 256]; with fewer than"),
    "small": (lambda: refusing(width=128, out=128), "or 32,768 weights nothing is gained"),
    "a vector": (lambda: refusing(lambda m, x: F.linear(x, m.w[0])), "w has 1 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_declines_and_says_why(name):
    make, why = REFUSED[name]
    torch.manual_seed(0)
    _, record = packed(*make())
    assert record.applied == []
    assert why in record.refused[0].why


def test_memory_is_bounded():
    """0.5, 0.5 and 0.127 MiB, the last first."""
    for mebibytes, paths in ((0.1, []), (0.2, ["4"]), (0.63, ["2", "4"]), (1.2, ["0", "2", "4"])):
        _, record = packed(mlp(), X, passes=[fxaccel.passes.PackWeights(mebibytes=mebibytes)])
        assert sorted(s.path for s in record.applied) == paths
    _, record = packed(mlp(), X, passes=["pack-weights{mebibytes=0.63}"])
    assert (
        record.refused[0].why
        == "the weight has 0.5 MiB and those kept twice 0.627; mebibytes=0.63 is the most"
    )


def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        _, record = packed(mlp(), X)
    assert record.applied == []
    assert record.refused[0].why == "the result is torch.bfloat16: autocast rounds what is multiplied"


def test_a_torch_without_mkl(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    _, record = packed(mlp(), X)
    assert record.refused[0].why == "this torch was built without MKL, which lays weights out"


def test_it_serves_inference_only():
    model = mlp()
    with pytest.warns(UserWarning, match="serves inference only"):
        fast = fxaccel.accelerate(model, ["pack-weights"], example_inputs=(X,))
    fast(X).sum().backward()
    record = fast.report()["pack-weights"]
    assert (record.applied, record.error) == (
        [], "it serves inference only, and this capture is for training"
    )  # fmt: skip
    assert "second time" not in notes(fast)
    want = torch.autograd.grad(model(X).sum(), model[0].weight)[0]
    torch.testing.assert_close(fast[0].weight.grad, want)


# -- values ----------------------------------------------------------------------------------------


def exchanged(fast):
    fast[0].weight = nn.Parameter(torch.randn_like(fast[0].weight))


def moved(fast):
    fast.double().float()


def trained(fast):
    step = torch.optim.SGD(fast.parameters(), lr=0.1)
    with torch.enable_grad():
        fast(X).square().mean().backward()
    step.step()
    step.zero_grad()


CHANGES = {
    "written": lambda fast: fast[0].weight.mul_(-2),
    "loaded": lambda fast: fast.load_state_dict({k: v + 1 for k, v in fast.state_dict().items()}),
    "exchanged": exchanged,
    "moved": moved,
    "trained": trained,
    "of the bias": lambda fast: fast[0].bias.add_(3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_change_are_packed_anew(name, gains):
    model = mlp()
    fast, _ = packed(model, X)
    agree(model, fast, X)
    first = len(gains)
    with torch.no_grad():
        CHANGES[name](fast)
    now = mlp()
    now.load_state_dict(fast.state_dict())
    agree(now, fast, X)
    assert (len(gains) > first) == (name != "of the bias")


def test_nothing_of_it_is_in_the_module_or_the_file(tmp_path, gains):
    model = mlp()
    fast, _ = packed(model, X)
    agree(model, fast, X)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert fast.state_dict().keys() == before.keys()
    fast.save(tmp_path / "model.fxa")
    assert (tmp_path / "model.fxa").stat().st_size < 1.1 * sum(4 * v.numel() for v in before.values()) + 2**18
    again = fxaccel.load(tmp_path / "model.fxa")
    gains.clear()
    agree(model, again, X)
    assert gains == [16, 16, 16]
    other = copy.deepcopy(fast)
    with torch.no_grad():
        other[0].weight.zero_()
    agree(model, fast, X)


def test_in_inference_mode_and_through_torch_compile(gains):
    model = mlp()
    fast, _ = packed(model, X)
    with torch.inference_mode():
        torch.testing.assert_close(fast(X), model(X))
    fast, _ = packed(model, X, backend="inductor")
    agree(model, fast, X)
