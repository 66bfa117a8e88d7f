"""Passes by name, their typed options, and how they are declared."""

from dataclasses import dataclass

import pytest
import torch

import fxaccel
from fxaccel import discover, rule
from fxaccel.errors import CaptureError, OptionError, RuleError
from tests.test_manager import Clamp, Sigmoid, _relu, run

aten = torch.ops.aten


@pytest.fixture
def registry(monkeypatch):
    discover.available()  # a pass is registered once, when its module is imported
    monkeypatch.setattr(rule, "_registry", dict(rule._registry))

    @fxaccel.register
    class Tunes(Clamp):
        """A pass with an option of every kind."""

        name = "tunes"

        bits: int = 8
        ratio: float = 0.5
        mode: str = "fast"
        loud: bool = False
        limit: int | None = None

    return Tunes


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("tunes", {}),
        ("tunes{}", {}),
        (" tunes { bits = 4 } ", {"bits": 4}),
        (
            "tunes{bits=4,ratio=0.25,mode=slow,loud=true}",
            {"bits": 4, "ratio": 0.25, "mode": "slow", "loud": True},
        ),
        ("tunes{loud=False,limit=None}", {"loud": False, "limit": None}),
        ("tunes{limit=3}", {"limit": 3}),
        ("tunes{where=layers.*.attn|head}", {"where": "layers.*.attn|head"}),
        ("tunes{mode='quoted'}", {"mode": "quoted"}),
        ("tunes{where=layers.[0,1].*,bits=2}", {"where": "layers.[0,1].*", "bits": 2}),
    ],
)
def test_typed_options_become_fields(registry, text, values):
    assert discover.parse(text) == registry(**values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tune", "there is no pass 'tune'\nhint: did you mean 'tunes'"),
        ("tunes{bit=4}", "pass 'tunes' has no option 'bit'\nhint: it has"),
        ("tunes{bits}", "has no option 'bits'"),
        ("tunes{bits=four}", "option 'bits' of pass 'tunes' is 'four', expected int"),
        ("tunes{ratio=x}", "option 'ratio' of pass 'tunes' is 'x', expected float"),
        ("tunes{loud=maybe}", "option 'loud' of pass 'tunes' is 'maybe', expected bool"),
        ("tunes{bits=4", "is not a pass"),
        ("", "is not a pass"),
        ("tunes{bits=4}}", "option 'bits' of pass 'tunes' is '4}'"),
    ],
)
def test_wrong_typed_options_are_option_errors_with_a_hint(registry, text, words):
    with pytest.raises(OptionError) as caught:
        discover.parse(text)
    assert words in str(caught.value)


def test_a_pass_prints_as_it_is_typed(registry):
    one = registry(bits=4, where="layers.*")
    assert discover.parse(str(one)) == one
    assert str(registry()) == "tunes"


def test_names_classes_and_instances_may_be_mixed(registry):
    assert [type(p).name for p in discover.resolve(["tunes{bits=2}", Clamp, Sigmoid()])] == [
        "tunes", "clamp", "sigmoid"
    ]  # fmt: skip


def test_two_passes_of_one_name_are_refused(registry):
    with pytest.raises(OptionError, match="two passes are named 'tunes'"):

        @fxaccel.register
        class Other(Clamp):
            name = "tunes"


@pytest.mark.parametrize(
    "attributes",
    [{"name": "Not Hyphens"}, {"name": ""}, {"name": "ok", "numerics": "loose"}, {"name": "ok", "step": "?"}],
)
def test_a_badly_declared_pass_is_a_rule_error(registry, attributes):
    with pytest.raises(RuleError):
        fxaccel.register(type("Bad", (Clamp,), attributes))


def test_our_own_passes_are_there_and_their_summaries_are_sentences():
    found = discover.available()
    assert {"fuse-norm", "fuse-attention"} <= set(found)
    assert list(found) == sorted(found)
    assert all(c.summary().endswith(".") for n, c in found.items() if c.__module__.startswith("fxaccel."))
    assert [p.name for p in discover.resolve(None)] == [n for n, c in found.items() if c.default]


def test_the_classes_are_found_in_fxaccel_passes():
    import fxaccel.passes

    assert fxaccel.passes.FuseNorm.name == "fuse-norm"
    with pytest.raises(AttributeError):
        _ = fxaccel.passes.NoSuchPass


def test_plans_are_frozen_printable_and_in_the_report():
    @dataclass(frozen=True)
    class Plan:
        nodes: int

    class Plans(fxaccel.Pass):
        name = "plans"

        def plan(self, program):
            return Plan(len(program.graph.nodes))

        def apply(self, program, plan, driver):
            driver.applied(_relu(program), f"{plan.nodes} nodes")

    _, done = run(Plans())
    assert done.report.passes[0].plan.endswith("Plan(nodes=9)")


def test_errors_carry_their_hint_and_survive_pickle():
    import pickle

    error = OptionError("it is wrong", "do it right")
    assert str(error) == "it is wrong\nhint: do it right"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.message, again.hint) == (OptionError, "it is wrong", "do it right")
    assert issubclass(CaptureError, fxaccel.FxaccelError)
