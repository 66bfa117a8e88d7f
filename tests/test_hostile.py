"""Passes that mean no good: each ends in a line of the report or an error of ours; all else is as it was."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxaccel
from fxaccel import discover
from fxaccel.errors import FxaccelError, OptionError
from tests.helpers import rule

aten = torch.ops.aten
OTHER = fx.Graph()  # the graph of no program
STRANGER = OTHER.placeholder("stranger")
STRANGER.meta["val"] = torch.empty(4, 6, device="meta")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.table = torch.arange(6.0)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))) * self.table)


def raises(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("on purpose")


def relu(self, op, x):
    return op.aten.relu.default(x)


def clamp(self, op, m):
    return op.aten.clamp.default(m.x, 0)


def made(**hooks: Any) -> Any:
    return rule("hostile", hooks.pop("pattern", relu), hooks.pop("rewrite", clamp), **hooks)


RULES = {
    "pattern raises": made(pattern=raises),
    "pattern gives nothing": made(pattern=lambda self, op, x: None),
    "pattern gives a number": made(pattern=lambda self, op, x: 3),
    "refuse raises": made(refuse=raises),
    "refuse yields no sentence": made(refuse=lambda self, m: iter([None])),
    "refuse comes to no end": made(refuse=lambda self, m: itertools.repeat("no")),
    "refuse is no generator": made(refuse=lambda self, m: None),
    "rewrite raises": made(rewrite=raises),
    "rewrite gives nothing": made(rewrite=lambda self, op, m: None),
    "rewrite gives a number": made(rewrite=lambda self, op, m: 3),
    "rewrite gives two values": made(rewrite=lambda self, op, m: (m.x, m.x)),
    "rewrite gives a node of another graph": made(rewrite=lambda self, op, m: STRANGER),
    "rewrite reads a node of another graph": made(
        rewrite=lambda self, op, m: op.aten.mul.Tensor(m.x, STRANGER)
    ),
    "rewrite gives another shape": made(rewrite=lambda self, op, m: op.aten.sum.dim_IntList(m.x, [0])),
    "rewrite gives another dtype": made(rewrite=lambda self, op, m: op.aten.to.dtype(m.x, torch.float64)),
    "rewrite calls what is not there": made(rewrite=lambda self, op, m: op.aten.no_such_thing.default(m.x)),
    "rewrite calls with too many arguments": made(
        rewrite=lambda self, op, m: op.aten.clamp.default(m.x, 0, 1, 2, 3)
    ),
    "rewrite erases what others read": made(
        rewrite=lambda self, op, m: (m.x.graph.erase_node(m.x), clamp(self, op, m))[1]
    ),
    "rewrite comes to no end": made(rewrite=lambda self, op, m: op.aten.relu.default(clamp(self, op, m))),
    "remark raises": made(remark=raises),
    "remark gives a number": made(remark=lambda self, m: 3),
    "any_size raises": made(any_size=raises),
    "traced gives nothing": made(traced=lambda self: None),
    "traced raises": made(traced=raises),
}


def breaking(apply: Any = None, **hooks: Any) -> Any:
    return type("Hostile", (fxaccel.Pass,), {"name": "hostile", "apply": apply or raises, **hooks})


def setting(name: str, value: Any) -> Any:
    def apply(self, program, plan, driver):
        setattr(program, name, value)

    return breaking(apply)


def doing(statement: Any) -> Any:
    return breaking(lambda self, program, plan, driver: statement(program, driver))


def first(program: Any) -> Any:
    return next(n for n in program.graph.nodes if n.target is aten.relu.default)


class Unprintable:
    def __str__(self) -> str:
        raise ZeroDivisionError("on purpose")


PASSES = {
    "plan raises": breaking(plan=raises),
    "plan cannot be printed": breaking(lambda *a: None, plan=lambda self, program: Unprintable()),
    "apply raises": breaking(),
    "covers raises": made(covers=raises),
    "limit raises": made(limit=raises, numerics="approximate"),
    "a node that is used is erased": doing(lambda p, d: p.graph.erase_node(first(p))),
    "all is erased": doing(lambda p, d: [p.graph.erase_node(n) for n in reversed(list(p.graph.nodes))]),
    "an argument of another graph": doing(lambda p, d: setattr(first(p), "args", (STRANGER,))),
    "a call of what is no operator": doing(lambda p, d: setattr(first(p), "target", "nothing")),
    "a value that is no tensor": doing(lambda p, d: first(p).meta.update(val="text")),
    "an unknown state": doing(lambda p, d: p.state.clear()),
    "no constants": doing(lambda p, d: p.constants.clear()),
    "no outputs": doing(lambda p, d: setattr(p.graph.output_node(), "args", ((),))),
    "an output that is a number": doing(lambda p, d: setattr(p.graph.output_node(), "args", ((3,),))),
    "applied of nothing": doing(lambda p, d: d.applied(None)),
    "refused of nothing": doing(lambda p, d: d.refused("text", 3)),
    "no graph": setting("graph", None),
    "another graph": setting("graph", OTHER),
    "no inputs": setting("inputs", []),
    "no input structure": setting("in_spec", None),
    "no output structure": setting("out_spec", None),
    "no sizes": setting("sizes", {}),
    "guards that are no conditions": setting("guards", ("import os",)),
    "guards that are none": setting("guards", None),
    "no guards": setting("guards", ()),
    "notes that are no list": setting("notes", 3),
    "ties that are none": setting("ties", 3),
    "training that is none": setting("training", None),
    "replacements that are none": setting("replacements", [3]),
    "a schedule that is none": setting("schedule", 3),
    "stages that are none": setting("stages", 3),
}


def everything(model: nn.Module) -> dict[str, Any]:
    state = {n: (id(t), t.detach().numpy().tobytes()) for n, t in model.state_dict(keep_vars=True).items()}
    return state | {"table": (id(model.table), model.table.numpy().tobytes()), "mode": model.training}


def ambience() -> Any:
    return (
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist(),
        random.getstate(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(),
    )  # fmt: skip


def survives(hostile: Any, model: nn.Module, x: torch.Tensor, words: str = "") -> None:
    """The model accelerated with the pass, and with one that is right behind it."""
    with torch.no_grad():
        want = model.eval()(x)
        before, around, given = everything(model), ambience(), x.clone()
        right = type("Right", (fxaccel.Rule,), {"name": "right", "pattern": relu, "rewrite": clamp})
        try:
            fast = fxaccel.accelerate(model, [hostile, right], example_inputs=(x,), allow="approximate")
        except FxaccelError as error:
            said = str(error)
        else:
            said = "Hostile"
            report = fast.report()
            record = report["hostile"]
            assert record.error or record.applied or record.refused, str(report)
            assert record.applied or len(report["right"].applied) == 1, str(report)
            torch.testing.assert_close(fast(x), want)
            torch.testing.assert_close(fast(x[:2]), want[:2])
            assert words in record.error
        assert "hostile" in said.lower()
        assert everything(model) == before
        assert ambience() == around
        assert torch.equal(x, given)


@pytest.mark.filterwarnings("ignore:pass")
@pytest.mark.parametrize("name", [*RULES, *PASSES])
def test_a_hostile_pass_is_a_line_of_the_report_or_an_error_of_ours(name):
    survives((RULES | PASSES)[name], Net(), torch.randn(4, 6))


AROUND = {
    "default dtype": (lambda p, d: torch.set_default_dtype(torch.float64), "default dtype"),
    "gradients": (lambda p, d: torch.set_grad_enabled(True), "gradients"),
    "random numbers": (lambda p, d: torch.manual_seed(3), ""),
    "Python's random numbers": (lambda p, d: random.seed(3), ""),
    "deterministic": (lambda p, d: torch.use_deterministic_algorithms(True), "deterministic"),
    "threads": (lambda p, d: torch.set_num_threads(3), "threads"),
}


@pytest.mark.filterwarnings("ignore:pass")
@pytest.mark.parametrize("raising", [False, True], ids=["and goes on", "and raises"])
@pytest.mark.parametrize("name", AROUND)
def test_what_is_around_the_pass_is_put_back(name, raising):
    change, words = AROUND[name]

    def apply(self, program, plan, driver):
        change(program, driver)
        return raises() if raising or not words else None

    survives(breaking(apply), Net(), torch.randn(4, 6), "" if raising else words)


@pytest.mark.filterwarnings("ignore:pass")
def test_the_example_and_the_model_are_out_of_reach():
    """A program holds shapes of inputs and parameters, and no memory of theirs."""
    seen = []

    def apply(self, program, plan, driver):
        seen.extend(n.meta["val"] for n in program.graph.find_nodes(op="placeholder"))
        for val in seen:
            val.zero_()
        driver.applied(first(program))

    survives(breaking(apply), Net(), torch.randn(4, 6))
    assert seen
    assert all(type(val).__name__ == "FakeTensor" for val in seen)


@pytest.mark.parametrize("given", ["by class", "by name", "by default"])
def test_a_pass_that_cannot_be_made_says_so(given, monkeypatch):
    def refuse(self):
        raise KeyError("what it looks for")

    wrong = dataclasses.dataclass(frozen=True, kw_only=True)(
        type("Hostile", (fxaccel.Pass,), {"name": "hostile", "default": True, "__post_init__": refuse})
    )
    monkeypatch.setattr(discover, "available", lambda: {"hostile": wrong})
    passes = {"by class": [wrong], "by name": ["hostile"], "by default": None}[given]
    with pytest.raises(OptionError, match=r"cannot be made with .*: KeyError: 'what it"):
        fxaccel.accelerate(Net(), passes)


CLASSES = {
    "a step that is none": {"step": "never"},
    "a class that is none": {"numerics": "wild"},
    "use that is none": {"serves": ("nobody",)},
    "requires a number": {"requires": (3,)},
    "conflicts with itself": {"conflicts": ("hostile",)},
    "no name": {"name": ""},
}


@pytest.mark.filterwarnings("ignore:pass")
@pytest.mark.parametrize("name", CLASSES)
def test_what_a_pass_declares_is_checked(name):
    model, x = Net().eval(), torch.randn(4, 6)
    try:
        wrong = type("Hostile", (fxaccel.Rule,), {
            "name": "hostile", "pattern": relu, "rewrite": clamp, **CLASSES[name],
        })  # fmt: skip
        fast = fxaccel.accelerate(model, [wrong], example_inputs=(x,))
    except FxaccelError as error:
        said = str(error)
    else:
        said = "hostile"
        torch.testing.assert_close(fast(x), model(x))
    assert "hostile" in said.lower()
