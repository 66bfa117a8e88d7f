"""The losses of a few steps of training: as the model's but for rounding; what steps leave wrong shows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import fxaccel
from fxaccel.cli import app
from fxaccel.curve import Curve
from fxaccel.errors import OptionError

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """A residual add and a norm, statistics that move, dropout, and a loss among the results."""

    def __init__(self, p=0.0):
        super().__init__()
        self.up, self.statistics, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8)
        self.p = p

    def forward(self, x):
        h = F.dropout(self.statistics(self.up(x)), self.p, self.training)
        y = self.norm(x + h)
        return {"logits": y, "loss": F.mse_loss(y, x)}


def test_a_rewritten_model_trains_as_the_model_does():
    model = Net(0.2).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    fast = fxaccel.accelerate(model, ["fuse-norm"], example_inputs=(X,))
    state = torch.get_rng_state()
    found = fast.verify(steps=12)
    assert found.ok
    (curve,) = found.curves
    assert len(curve.model) == len(curve.rewritten) == 12
    assert curve.model[-1] < curve.model[0]  # the number among the results is what is made small
    assert "loss over 12 steps of AdamW on one batch" in str(found)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not fast.verify().curves


def test_the_tolerance_grows_as_steps_go_and_is_of_the_size_of_rounding():
    fast = fxaccel.accelerate(Net().train(), ["fuse-norm"], example_inputs=(X,))
    (curve,) = fast.verify(steps=8).curves
    assert list(curve.allowed) == sorted(curve.allowed)
    eps = torch.finfo(torch.float32).eps
    assert all(0 < a < 1e4 * eps * m for a, m in zip(curve.allowed, curve.model, strict=True))


def test_the_tolerance_of_doubles_is_theirs():
    model = Net().double().train()
    fast = fxaccel.accelerate(model, ["fuse-norm"], example_inputs=(X.double(),))
    (curve,) = fast.verify(steps=4).curves
    assert curve.ok
    assert 0 < max(curve.allowed) < 1e-11


class Decaying(nn.Module):
    """What it multiplies by moves at each call, and is no gradient's business."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        self.scale.mul_(0.5)
        return x * self.weight * self.scale


@pytest.mark.parametrize("wrong", [False, True])
def test_what_one_step_does_not_show(wrong, monkeypatch):
    """A buffer that stands still in the capture alone: the first losses agree, later ones do not."""
    fast = fxaccel.accelerate(Decaying().train(), [], example_inputs=(X,), check=False)
    (one,) = fast.__dict__["_fxaccel"].all
    functions, calls = type(one).functions, []

    def stale(self, tree, filename, still=False):
        names = functions(self, tree, filename, still)
        forward = names["forward"]

        def again(*leaves):
            calls.append(1)
            result = forward(*leaves)
            if wrong:
                tree.scale.data.fill_(1.0)
            return result

        return {**names, "forward": again}

    monkeypatch.setattr(type(one), "functions", stale)
    (curve,) = fast.verify(steps=3).curves
    assert len(calls) >= 3
    assert curve.ok is not wrong
    assert curve.shares[0] == 0.0
    if wrong:
        assert "FAILED at step 1" in str(curve)
        assert not fast.verify(steps=3).ok


@pytest.mark.parametrize(
    ("curve", "ok"),
    [
        (Curve((1.0, float("nan")), (1.0, float("nan")), (0.1, 0.1)), True),
        (Curve((1.0, 0.5), (1.0, float("nan")), (0.1, 0.1)), False),
        (Curve((1.0, 0.5), (1.0, float("inf")), (0.1, 0.1)), False),
        (Curve((float("inf"),), (float("inf"),), (float("nan"),)), True),
        (Curve((1.0,), (1.5,), (0.0,)), False),
        (Curve((1.0,), (1.0,), (0.0,)), True),
        (Curve((1.0,), (1.5,), (float("nan"),)), False),
    ],
)
def test_losses_that_are_no_numbers(curve, ok):
    assert curve.ok is ok
    assert ("FAILED" in str(curve)) is not ok


def test_a_file_needs_the_model_as_written(tmp_path):
    model = Net().train()
    fast = fxaccel.accelerate(model, ["fuse-norm"], example_inputs=(X,))
    fast.save(tmp_path / "net.fxa")
    again = fxaccel.load(tmp_path / "net.fxa")
    assert not again.verify().checks
    other = Net().train()
    weight = other.up.weight.clone()
    found = again.verify(steps=3, model=other)
    assert found.ok
    assert len(found.checks) == len(found.curves) == 1
    assert torch.equal(other.up.weight, weight)
    with pytest.raises(OptionError, match="a file holds its graphs alone"):
        again.verify(steps=3)
    with pytest.raises(OptionError, match="model is another one than was accelerated"):
        again.verify(steps=3, model=nn.Linear(2, 2))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_that_draws_other_numbers_is_compared_with_nothing_dropped(p, tmp_path):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.proj(x).view(2, 3, 3, 8).unbind(2)
            weights = F.dropout(torch.softmax(q @ k.mT / 8**0.5, -1), p, self.training)
            return weights @ v

    model = Heads().train()
    fast = fxaccel.accelerate(model, ["fuse-attention"], example_inputs=(X,))
    assert len(fast.report()["fuse-attention"].applied) == 1
    assert fast.verify(steps=3).ok
    fast.save(tmp_path / "heads.fxa")
    assert fxaccel.load(tmp_path / "heads.fxa").verify(steps=3, model=model).ok


def test_steps_are_for_what_trains():
    with torch.no_grad():
        still = fxaccel.accelerate(Net().eval(), ["fuse-norm"], example_inputs=(X,))
    with pytest.raises(OptionError, match="captured with gradients, by exact passes, in one graph; nothing"):
        still.verify(steps=2)
    frozen = Net().train().requires_grad_(False)
    fast = fxaccel.accelerate(frozen, ["fuse-norm"], example_inputs=(X,))
    with pytest.raises(OptionError, match="every parameter of this one is frozen"):
        fast.verify(steps=2)
    with pytest.raises(OptionError, match="steps is -1, expected 0 or more"):
        fast.verify(steps=-1)


class Constant(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


def test_an_output_without_a_gradient_is_refused():
    fast = fxaccel.accelerate(Constant(8, 8).train(), [], example_inputs=(X,))
    with pytest.raises(OptionError, match="no output of this one has a gradient"):
        fast.verify(steps=2)


def test_the_command(tmp_path, monkeypatch):
    (tmp_path / "curved.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), (torch.randn(4, 8),)\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["verify", "curved:build", "-p", "fuse-norm", "--steps", "4"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "loss over 4 steps" in done.output
    import curved

    model, example = curved.build()
    fxaccel.accelerate(model.train(), ["fuse-norm"], example_inputs=example).save("it.fxa")
    done = CliRunner().invoke(app, ["verify", "it.fxa", "--steps", "4", "--against", "curved:build"])
    assert done.exit_code == 0, done.output
    assert "loss over 4 steps" in done.output
    assert CliRunner().invoke(app, ["verify", "it.fxa", "--steps", "4"]).exit_code == 2
    assert CliRunner().invoke(app, [*words, "--against", "curved:build"]).exit_code == 2
