"""`fxaccel plan`: what a step keeps and computes again, or its pipeline, printed before anything runs."""

import json
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from typer.testing import CliRunner

from fxaccel.cli import app
from fxaccel.discover import resolve

MODEL = """
import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(16, eps=1e-6)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        assert torch.compiler.is_exporting(), "the model is run"
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def build():
    return Model(), (torch.randn(8, 32, 16),)


def bare():
    return Model()


def one():
    return Model(), (torch.randn(1, 32, 16),)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return ((q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v).square().mean()


def attention():
    return Attention(), (torch.randn(2, 64, 16),)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        y = self.proj(x)
        return y.sum() if float(y.sum()) > 0 else y.square().sum()


def broken():
    return Broken(), (torch.randn(3, 4),)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `fxaccel plan ...` in a folder that holds plan_models.py; returns the result."""
    (tmp_path / "plan_models.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "plan_models", raising=False)
    return lambda *words: CliRunner().invoke(app, ["plan", *words])


def found(run, *words):
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_it_says_what_is_kept_and_what_is_computed_again(run):
    done = run("plan_models:build", "--budget", "0.5", "--points", "5")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("needs ")
    assert "at the peak of the step instead of" in lines[1]
    assert any(line.startswith("kept: ") for line in lines)
    assert any(line.startswith("computed again: ") for line in lines)
    assert any("layers.*" in line and " x " in line for line in lines)
    for name in ("keep all", "every part", "sqrt(n)"):
        assert sum(line.startswith(name) for line in lines) == 1
    assert "x.0*x.1" in lines[-1]
    assert "largest batch" not in done.output  # a share of what a batch takes is kept by any batch


def test_json_holds_all_of_it(run):
    got = found(run, "plan_models:build", "--budget", "0.5", "--points", "5")
    assert got["schema"] == "fxaccel-plan/1"
    before, after = got["activations"]
    assert after <= before / 2
    assert got["peak"] < got["need"]
    assert 0 < got["overhead"] < 1 / 3
    assert set(got["curve"][0]) == {"budget", "peak", "activations", "overhead", "flops"}
    assert got["baselines"]["keep all"]["activations"] == before
    assert got["baselines"]["keep all"]["peak"] == got["need"]
    assert got["again"]
    assert all(path.startswith("layers.") for path in got["again"])
    assert got["notes"] == []


def test_a_budget_in_bytes_has_a_largest_batch(run):
    got = found(run, "plan_models:build", "--budget", "1MiB", "--optimizer", "adamw", "--points", "2")
    best = got["largest_batch"]
    assert best["size"] == "x.0"
    assert best["value"] > 8
    assert best["peak"] <= 2**20
    less = found(run, "plan_models:build", "--budget", "1MiB", "--points", "2")
    assert less["largest_batch"]["value"] > best["value"]  # its state takes room


def test_the_time_can_be_bounded_instead(run):
    got = found(run, "plan_models:build", "--max-overhead", "0.05", "--points", "2")
    assert got["overhead"] <= 0.05
    assert got["peak"] < got["need"]


def test_passes_run_before_it(run):
    words = ("plan_models:attention", "--budget", "1.0", "--points", "2", "-p")
    plain, fused = (found(run, *words, name) for name in ("fuse-norm", "fuse-attention"))
    assert fused["activations"][0] < plain["activations"][0] / 2  # without the scores


def test_inputs_can_be_described(run):
    words = ("plan_models:bare", "-i", "float32[8,32,16]", "--budget", "0.5", "--points", "2")
    assert found(run, *words)["need"] == found(run, "plan_models:build", *words[3:])["need"]


def test_a_fixed_batch_is_a_note(run):
    got = found(run, "plan_models:one", "--budget", "10MiB", "--points", "2")
    assert got["largest_batch"] is None
    assert "first dimension of x is fixed" in got["notes"][0]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_curve_is_drawn(run, tmp_path, suffix):
    file = tmp_path / f"curve.{suffix}"
    done = run("plan_models:build", "--budget", "0.5", "--points", "3", "--out", str(file))
    assert done.exit_code == 0, done.output
    assert "matplotlib.pyplot" not in sys.modules
    if suffix == "svg":
        assert ElementTree.parse(file).getroot().tag.endswith("svg")
    else:
        assert file.read_bytes().startswith(b"\x89PNG")


def test_a_picture_takes_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("plan_models:build", "--budget", "0.5", "--out", "curve.svg")
    assert done.exit_code == 2
    assert "fxaccel[plot]" in done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("plan_models:build", "--budget", "64KiB"), "the smallest that can is"),
        (("plan_models:build", "--budget", "0.01"), "the smallest that can is"),
        (("plan_models:build", "--budget", "six"), "budget is 'six'"),
        (("plan_models:build",), "a budget or max_overhead"),
        (("plan_models:build", "--budget", "0.5", "--optimizer", "lion"), "expected one of"),
        (("plan_models:build", "--budget", "0.5", "--out", "curve.pdf"), "expected one of .svg, .png"),
        (("plan_models:build", "--budget", "0.5", "--points", "1"), "expected at least 2"),
        (
            ("plan_models:build", "--budget", "0.5", "-p", "checkpoint{budget=0.5}"),
            "which this command plans",
        ),
        (("plan_models:bare", "--budget", "0.5"), "without example inputs"),
        (("plan_models:broken", "--budget", "0.5"), "in pieces"),
        (("plan_models:build", "--budget", "0.5", "--stages", "2"), "--budget is of a plan without --stages"),
        (("plan_models:build", "--budget", "0.5", "--memory", "1MiB"), "--memory is of a pipeline"),
        (("plan_models:build", "--stages", "0"), "stages is 0, expected 1 or more"),
        (("plan_models:build", "--stages", "2", "--schedule", "2f2b"), "expected a schedule of GPipe, 1F1B"),
        (("plan_models:build", "--stages", "2", "--timeline", "a.pdf"), "one of .svg, .png, .txt"),
        (("plan_models:build", "--stages", "2", "-p", "partition{stages=2}"), "which this command plans"),
    ],
)
def test_mistakes_are_one_line_and_a_hint(run, words, says):
    done = run(*words)
    assert done.exit_code == 2
    assert says in done.output
    assert len(done.output.strip().splitlines()) <= 2


def test_a_pipeline_is_printed_before_anything_runs(run, tmp_path):
    done = run("plan_models:build", "--stages", "2", "--bandwidth", "10e9", "--timeline", "step.txt")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "2 devices, 10 GB/s between them, a batch of 8"
    assert " ms a step, bubble " in lines[1]
    assert sum(line.startswith("stage  begins in") for line in lines) == 1
    assert "rank  stages            busy        peak       sends" in lines
    assert any(line.endswith("are sent in a step") for line in lines)
    assert any(line.startswith("tried") for line in lines)
    # a batch of eight in eight is one of 1, which was not captured
    assert any("left out: GPipe, 2 ranks, 8 microbatches" in line for line in lines)
    assert lines[-1].startswith("the pass that cuts it so: partition{stages=")
    assert (tmp_path / "step.txt").read_text().startswith("rank 0 |F0")


def test_a_pipeline_of_devices_with_memories_of_their_own(run):
    got = found(run, "plan_models:build", "--stages", "2", "--memory", "2MiB,1MiB", "--schedule", "1f1b")
    assert got["memory"] == [2 * 2**20, 2**20]
    assert "memory=2MiB|1MiB" in got["pass"]
    assert all(p <= c for p, c in zip(got["peaks"], got["memory"], strict=True))


def test_a_pipeline_as_json_and_as_a_picture(run, tmp_path):
    words = (
        "--stages",
        "2",
        "--batch",
        "64",
        "--memory",
        "2MiB",
        "--optimizer",
        "adamw",
        "--timeline",
        "a.svg",
    )
    got = found(run, "plan_models:build", *words, "--schedule", "1f1b", "--microbatches", "8")
    assert got["schema"] == "fxaccel-pipeline/1"
    assert (got["schedule"], got["microbatches"], got["batch"]) == ("1F1B", 8, 64)
    assert (len(got["tried"]), got["left_out"]) == (1, [])
    assert len(got["plan"]["stages"]) == len(got["peaks"]) == 2
    assert max(got["peaks"]) <= got["memory"] == 2 * 2**20
    sends = got["plan"]["stages"][0]
    assert got["sent"] == 8 * (sends["sends"] + sends["returns"]) == 8 * 2 * sends["sends"]
    assert got["bubble"] > 0
    assert resolve([got["pass"]])[0].microbatches == 8
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
