"""Which sites make a check fail: the smallest set, in few runs, and a script for one of them."""

import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxaccel
from fxaccel.bisect import Suspect, _smallest
from fxaccel.cli import app
from fxaccel.errors import OptionError
from fxaccel.report import Site
from tests.helpers import session, targets

X = torch.randn(4, 8)


class Layers(nn.Module):
    """Norms, of which each is a site."""

    def __init__(self, count=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def fused(fast):
    """The paths of the norms that are our kernel."""
    fast(X)
    program = session(fast).all[0].program
    return {n.meta["path"] for n in program.graph.nodes if "fxaccel" in str(n.target)}


def paths(found):
    return {s.site.path for s in found.suspects}


@pytest.mark.parametrize("wrong", [{2}, {0, 3}], ids=str)
def test_the_smallest_set_that_fails_together(wrong):
    names = {f"layers.{i}.1" for i in wrong}
    model = Layers().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = fxaccel.bisect(model, lambda fast: not names <= fused(fast), ["fuse-norm"])
    assert paths(found) == names
    assert found.sites == 4
    lines = str(found).splitlines()
    assert lines[0] == f"the check fails by {len(wrong)} of 4 sites, found in {found.runs} runs:"
    assert all("fuse-norm: LayerNorm at layers." in line and "test_bisect.py:" in line for line in lines[1:])
    told = json.loads(found.to_json())
    assert {s["site"]["path"] for s in told["suspects"]} == names
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_one_of_many_takes_few_runs_and_none_twice():
    seen = []

    def check(fast):
        seen.append(frozenset(fused(fast)))
        return "layers.5.1" not in seen[-1]

    found = fxaccel.bisect(Layers(8).eval(), check, ["fuse-norm"])
    assert paths(found) == {"layers.5.1"}
    assert found.runs == len(seen) == len(set(seen))
    assert found.runs <= 2 + 2 * 3  # all, none, and at most two for each halving


def test_a_check_that_holds_has_no_suspects():
    found = fxaccel.bisect(Layers(2).eval(), lambda fast: True, ["fuse-norm"], example_inputs=(X,))
    assert (found.suspects, found.runs, found.sites) == ([], 1, 2)
    assert str(found) == "the check holds with all 2 sites rewritten"
    with pytest.raises(OptionError, match="there is no site to reproduce"):
        found.repro()


def test_a_check_that_fails_in_any_case_is_refused():
    with pytest.raises(OptionError, match="fails without any rewrite, too: it raises ZeroDivisionError"):
        fxaccel.bisect(Layers(1).eval(), lambda fast: 1 / 0, ["fuse-norm"], example_inputs=(X,))


def test_what_raises_is_a_failure():
    def check(fast):
        if "layers.1.1" in fused(fast):
            raise RuntimeError("a kernel that does not run")
        return True

    assert paths(fxaccel.bisect(Layers(3).eval(), check, ["fuse-norm"])) == {"layers.1.1"}


@fxaccel.register
class TwoWrites(fxaccel.Pass):
    """Needs the whole graph: every tanh becomes two."""

    name = "two-writes"

    def apply(self, program, plan, driver):
        for node in list(program.graph.nodes):
            if node.target is torch.ops.aten.tanh.default:
                with program.graph.inserting_after(node):
                    new = driver.call(node, torch.ops.aten.clone.default, node)
                node.replace_all_uses_with(new, lambda user, new=new: user is not new, propagate_meta=False)
                driver.applied(new)


def test_a_pass_of_the_whole_graph_is_one_site():
    def check(fast):
        fast(X)
        return "aten.clone.default" not in targets(session(fast).all[0].program)

    found = fxaccel.bisect(Layers(3).eval(), check, ["fuse-norm", "two-writes"])
    assert [str(s) for s in found.suspects] == ["two-writes: all that it does"]
    assert found.sites == 4
    with pytest.raises(OptionError, match="no site of its own to reproduce"):
        found.repro()


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_any_set_is_found(count):
    """By itself, over all sets of so few sites that matter together."""
    sites = [Suspect("p", Site("", "", "", "R", str(i))) for i in range(count)]
    for first in range(count):
        for second in range(first, count):
            wanted = {sites[first], sites[second]}
            assert set(_smallest(sites, lambda some, w=wanted: w <= set(some))) == wanted


def test_a_script_runs_a_site_alone(tmp_path):
    class Wrong(fxaccel.Rule):
        """A norm of another eps."""

        name = "wrong-norm"
        numerics = "approximate"

        def pattern(self, op, x, dims, w, b):
            return op.aten.layer_norm.default(x, dims, w, b)

        def rewrite(self, op, m):
            return op.fxaccel.layer_norm.default(m.x, m.w, m.b, 0.3)

    wrong = fxaccel.register(Wrong)
    model = Layers(4).eval()
    want = model(X)
    found = fxaccel.bisect(
        model, lambda f: torch.allclose(f(X), want, atol=1e-3), [wrong], allow="approximate"
    )
    assert len(found.suspects) == 1
    file = tmp_path / "site.py"
    file.write_text(found.repro())
    ran = subprocess.run([sys.executable, file], capture_output=True, text=True, check=True)
    first = ran.stdout.splitlines()[0]
    assert first.startswith("0: (4, 8) before ")
    before, after = map(float, re.search(r"before (\S+), after (\S+) from", first).groups())
    assert before < 1e-6 < 1e-2 < after


def test_the_command_names_them_and_writes_the_script(tmp_path, monkeypatch):
    (tmp_path / "bisected.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), (torch.randn(4, 8),)\n"
        "def ok(fast):\n    return 'fxaccel_layer_norm' not in fast.code\n"
        "def fine(fast):\n    return True\n"
    )
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    words = ["bisect", "bisected:build", "-p", "fuse-norm", "--check"]
    ran = run(app, [*words, "bisected:ok", "--repro", "site.py"])
    assert ran.exit_code == 1, ran.output
    assert "fuse-norm: LayerNorm at 0" in ran.output
    assert "def before(" in (tmp_path / "site.py").read_text()
    assert run(app, [*words, "bisected:fine"]).exit_code == 0
    assert json.loads(run(app, [*words, "bisected:ok", "--json"]).output)["sites"] == 1
    assert "does not name a callable" in run(app, [*words, "bisected"]).output
