"""The command line: what it prints, its exit codes, and its one-line errors."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fxaccel.cli import app

MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.proj = nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 16)

    def forward(self, x, r):
        h = x + r
        return h + self.proj(self.norm(h))


def bare():
    return Block()


def build():
    return Block(), (torch.randn(2, 3, 16), torch.randn(2, 3, 16))


def plain():
    return nn.Linear(4, 4), (torch.randn(2, 4),)


def number():
    return 3
"""
PASS = '''
import fxaccel


@fxaccel.register
class SwapOperands(fxaccel.Rule):
    """x * x becomes pow(x, 2)."""

    name = "swap-operands"

    def pattern(self, op, x):
        return op.aten.mul.Tensor(x, x)

    def rewrite(self, op, m):
        return op.aten.pow.Tensor_Scalar(m.x, 2)
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `fxaccel ...` in a folder that holds cli_models.py; returns the result."""
    (tmp_path / "cli_models.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    return lambda *words: CliRunner().invoke(app, list(words))


def test_passes_lists_name_class_and_summary(run):
    done = run("passes")
    assert done.exit_code == 0
    assert any(x.split()[1:3] == ["fuse-norm", "reassociated"] for x in done.output.splitlines())
    assert json.loads(run("passes", "--json").output)["fuse-norm"]["default"] is True


def test_passes_brings_in_the_users_own(run, tmp_path):
    (tmp_path / "mine.py").write_text(PASS)
    assert "swap-operands" in run("passes", "--load", "mine.py").output
    assert run("passes", "--load", "absent.py").exit_code == 2


def test_diff_says_what_changed_and_exits_with_one(run):
    done = run("diff", "cli_models:build")
    assert done.exit_code == 1, done.output
    lines = done.output.splitlines()
    assert sum(x.startswith("-%") for x in lines) == 2
    assert sum(x.startswith("+%") for x in lines) == 1
    assert "cli_models.py:12" in done.output


def test_diff_exits_with_zero_where_nothing_changed(run):
    assert run("diff", "cli_models:plain").exit_code == 0


def test_diff_as_json_follows_its_schema(run):
    found = json.loads(run("diff", "cli_models:build", "--json").output)
    assert found["schema"] == "fxaccel-diff/1"
    assert set(found) == {"schema", "before", "after", "operators", "hunks"}
    assert found["operators"]["fxaccel.add_rms_norm"] == [0, 1]
    assert {line["sign"] for hunk in found["hunks"] for line in hunk} == {"+", "-", " "}


def test_diff_writes_a_page(run, tmp_path):
    done = run("diff", "cli_models:build", "--html", "out.html")
    assert done.exit_code == 1, done.output
    assert done.output.startswith("out.html: ")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "fxaccel.add_rms_norm" in page
    assert run("diff", "cli_models:plain", "--html", "out.html").exit_code == 0
    assert "before the canonical form" not in page
    run("diff", "cli_models:build", "--raw", "--html", "out.html")
    assert "before the canonical form" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_a_page_is_refused_where_it_cannot_be_had(run):
    done = run("diff", "cli_models:build", "--html", "out.html", "--json")
    assert done.exit_code == 2
    assert "--html and --json are two forms of one answer" in done.output
    done = run("diff", "cli_models:build", "--html", "absent/out.html")
    assert done.exit_code == 2
    assert "--html absent/out.html cannot be written: No such file or directory" in done.output


def test_inputs_can_be_described(run):
    words = ("diff", "cli_models:bare", "-i", "x=float32[2,3,16]", "-i", "r=float32[2,3,16]")
    assert run(*words).exit_code == 1


def test_a_pass_can_be_limited_to_modules(run):
    assert run("diff", "cli_models:build", "-p", "fuse-norm{where=proj}").exit_code == 0
    assert run("diff", "cli_models:build", "-p", "fuse-norm{where=nor*|proj}").exit_code == 1


def test_explain_names_site_and_line(run):
    done = run("explain", "cli_models:build", "-p", "fuse-norm")
    assert done.exit_code == 0
    assert "applied" in done.output
    assert "cli_models.py:13" in done.output


def test_explain_says_what_would_be_taken(run, tmp_path):
    (tmp_path / "near_models.py").write_text(
        "import torch\n"
        "class Near(torch.nn.Module):\n"
        "    def forward(self, q, k, v):\n"
        "        return (q @ k.mT).softmax(-2) @ v\n"
        "def build():\n"
        "    return Near(), tuple(torch.randn(2, 3, 5, 8) for _ in range(3))\n"
    )
    lines = run("explain", "near_models:build", "-p", "fuse-attention").output.splitlines()
    assert lines[1].startswith("  near miss ")
    assert lines[2] == "            it would be taken with: softmax(scores, -1)"


def test_explain_says_why_not_of_one_pass_in_one_module(run):
    done = run("explain", "cli_models:build", "--why-not", "fuse-norm", "norm")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0] == "fuse-norm: 1 applied, 0 refused"
    assert "fuse-rope" not in done.output
    done = run("explain", "cli_models:build", "--why-not", "fuse-norm", "proj")
    assert done.output.splitlines() == [
        "fuse-norm: 0 applied, 0 refused",
        "note: fuse-norm found nothing in proj that its pattern begins with",
    ]
    done = run("explain", "cli_models:build", "--why-not", "layer-norm-to-rms-norm", "norm")
    assert done.output.startswith("layer-norm-to-rms-norm: 0 applied")  # which is no default pass
    done = run("explain", "cli_models:build", "--why-not", "fuse-norm", "nrom")
    assert done.exit_code == 2
    assert "the model has no module 'nrom'" in done.output
    assert "did you mean 'norm'?" in done.output


def test_verify_runs_the_proofs_again(run, tmp_path):
    done = run("verify", "cli_models:build")
    assert done.exit_code == 0, done.output
    assert "proved" in done.output
    from cli_models import build

    import fxaccel

    model, example = build()
    fxaccel.accelerate(model, example_inputs=example, measure=False).save(tmp_path / "block.fxa")
    done = run("verify", "block.fxa")
    assert done.exit_code == 0, done.output
    assert "AddRMSNorm" in done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("diff", "cli_models"), "does not name a callable"),
        (("diff", "absent.module:build"), "cannot be imported"),
        (("diff", "cli_models:absent"), "cannot be imported"),
        (("diff", "cli_models:number"), "expected an nn.Module"),
        (("diff", "cli_models:bare"), "without example inputs"),
        (("diff", "cli_models:bare", "-i", "x=float32(2,3)"), "is not an input"),
        (("diff", "cli_models:bare", "-i", "x=quux[2,3]"), "is not an input"),
        (("diff", "cli_models:build", "-p", "fuse-nrom"), "did you mean 'fuse-norm'"),
        (("diff", "cli_models:build", "-p", "fuse-norm{bits=4}"), "has no option 'bits'"),
        (("diff", "cli_models:build", "--allow", "wild"), "expected one of"),
        (("verify", "cli_models.py"), "is not a saved model"),
    ],
)
def test_mistakes_are_one_line_and_a_hint(run, words, says):
    done = run(*words)
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output
    assert len(done.output.strip().splitlines()) <= 2


def test_debug_shows_the_traceback(run):
    assert "Traceback" in run("diff", "cli_models", "--debug").output


def test_the_command_is_installed_and_plain_in_a_pipe(tmp_path):
    (tmp_path / "cli_models.py").write_text(MODEL)
    command = [sys.executable, "-c", "from fxaccel.cli import main; main()", "diff", "cli_models:build"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "COLUMNS": "40"}
    )
    assert done.returncode == 1, done.stderr
    assert "\x1b[" not in done.stdout  # no colour in a pipe
    assert done.stderr == ""  # no progress either
