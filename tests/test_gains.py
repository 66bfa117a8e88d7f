"""What `fxaccel bench` says: a row for each version of the model, of the right time and memory."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxaccel.gains
from fxaccel.capture import Call
from fxaccel.cli import app
from fxaccel.errors import OptionError
from fxaccel.gains import AS_WRITTEN, CAPTURED, gains
from fxaccel.kernels import _clock

X = torch.randn(64, 64)


class Block(nn.Module):
    """A residual add, a norm and a gated product."""

    def __init__(self):
        super().__init__()
        self.norm, self.both = nn.LayerNorm(64), nn.Linear(64, 128)
        self.statistics = nn.BatchNorm1d(64)

    def forward(self, x):
        h = x + self.statistics(x)
        gate, up = self.both(self.norm(h)).chunk(2, -1)
        return nn.functional.silu(gate) * up + h


def shown(monkeypatch, *times):
    """Let the clock show the times of each version; the steps that it was given."""
    steps = []

    def all_of(runs, device, rounds):
        steps.extend(runs)
        return [[t * (1 + i / 10) for i in range(rounds)] for t in times[: len(runs)]]

    monkeypatch.setattr(_clock, "all_of", all_of)
    return steps


def test_a_row_is_the_model_after_a_pass_and_all_before_it(monkeypatch):
    steps, made = shown(monkeypatch, 8.0, 4.0, 2.0, 1.0), []
    build = fxaccel.gains._made

    def told(model, passes, *args):
        made.append([getattr(one, "name", one) for one in passes])
        return build(model, passes, *args)

    monkeypatch.setattr(fxaccel.gains, "_made", told)
    found = gains(Block().eval(), ["fuse-glu", "fuse-norm", "fuse-rope"], Call((X,), {}), rounds=11)
    assert [(r.name, r.sites) for r in found.rows] == [
        (AS_WRITTEN, 0), (CAPTURED, 0), ("fuse-norm", 1), ("fuse-glu", 1),
    ]  # fmt: skip
    assert [(r.ms, r.low, r.high) for r in found.rows][:2] == [(8.0, 8.8, 15.2), (4.0, 4.4, 7.6)]
    assert made[1:] == [[], ["fuse-norm"]]  # after the one with all
    results = [step() for step in steps]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    assert str(found).splitlines()[1:] == [
        "                         sites       ms        10-90 %   speed   gain  peak MiB",
        *(
            f"{r.name:<24}{r.sites or '':>6}{r.ms:>9.3g}{spread:>15}{8 / r.ms:>8.2f}{gain:>7.2f}{mib:>10.4g}"
            for r, spread, gain, mib in zip(
                found.rows, ("8.8-15.2", "4.4-7.6", "2.2-3.8", "1.1-1.9"), (1, 2, 2, 2),
                (r.nbytes / 2**20 for r in found.rows), strict=True,
            )
        ),
        "applied nowhere: fuse-rope",
    ]  # fmt: skip
    told = json.loads(found.to_json())
    assert [r["ms"] for r in told["rows"]] == [8.0, 4.0, 2.0, 1.0]
    assert told["idle"] == ["fuse-rope"]
    assert told["mode"] == "eval, no gradients"


def test_a_step_of_training_makes_the_gradients_of_all_parameters_and_moves_nothing(monkeypatch):
    steps = shown(monkeypatch, 1.0, 1.0, 1.0)
    model = Block().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = gains(model, ["fuse-norm"], Call((X,), {}), rounds=2)
    assert found.mode == "training"
    want = torch.autograd.grad(model(X).sum(), list(model.parameters()))
    model.load_state_dict(before)
    for step in steps:
        for got, expected in zip(step(), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_memory_is_what_a_step_holds_at_the_most(monkeypatch):
    shown(monkeypatch, 1.0, 1.0)

    class Two(nn.Module):
        def forward(self, x):
            return (x + 1).exp().sum()

    found = gains(Two().eval(), [], Call((torch.randn(1 << 16),), {}), rounds=1)
    assert found.rows[0].nbytes == 2 * 4 * (1 << 16)  # the sum and its exponential
    with pytest.raises(OptionError, match="rounds is 0, expected at least 1"):
        gains(Two().eval(), [], Call((X,), {}), rounds=0)


@pytest.mark.clock
def test_default_passes_are_those_that_pay_here(monkeypatch):
    monkeypatch.setattr(_clock, "by_turns", lambda runs, device, rounds: [1.0, 2.0])
    shown(monkeypatch, 1.0, 1.0)
    found = gains(Block().eval(), None, Call((X,), {}), rounds=1)
    assert [r.name for r in found.rows] == [AS_WRITTEN, CAPTURED]
    assert "fuse-norm" in str(found).splitlines()[-1]


def test_the_command_prints_it(tmp_path, monkeypatch):
    (tmp_path / "timed.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n    return nn.Sequential(nn.LayerNorm(8)), (torch.randn(4, 8),)\n"
    )
    monkeypatch.chdir(tmp_path)
    shown(monkeypatch, 1.0, 1.0, 0.5)
    ran = CliRunner().invoke(app, ["bench", "timed:build", "-p", "fuse-norm", "--rounds", "3"])
    assert ran.exit_code == 0, ran.output
    head, _, *rows = ran.output.splitlines()
    assert head == f"eval, no gradients, by turns on {torch.get_num_threads()} threads"
    assert [row.split()[0] for row in rows] == ["as", "no", "fuse-norm"]
    ran = CliRunner().invoke(app, ["bench", "timed:build", "--json", "-p", "fuse-norm", "--train"])
    assert json.loads(ran.output)["mode"] == "training"
