"""partition and checkpoint together: each stage fits a budget of its own, and learns what it did without."""

import re

import pytest
import torch

import fxaccel
from fxaccel.errors import OptionError
from fxaccel.listing import listing
from fxaccel.memory import Meter
from fxaccel.passes import Checkpoint, Partition
from fxaccel.passes.checkpoint import TrainingStep
from fxaccel.stage_module import stage_modules
from tests.helpers import session, thinned
from tests.passes.partition_models import agree, cut, made, seen
from tests.passes.test_checkpoint import Stack, X

SMALL = ("residual", "unet", "tied", "two", "stepped")  # of the others nothing can be let go


def both(model, args, less, **options):
    """The model with both passes, given in the other order."""
    fast = fxaccel.accelerate(model, [Checkpoint(**less), Partition(**options)], strict=True)
    fast(*args)
    return fast


def program_of(fast):
    return session(fast).all[0].program


@thinned(2, name=SMALL)
def test_a_step_in_stages_that_keep_less_is_the_step(name, tmp_path):
    model, args, stages = made(name)
    want = seen(cut(model, args, stages=stages), args)
    fast = both(made(name)[0], args, {"max_overhead": 1.0}, stages=stages)
    assert any(program_of(fast).stages.schedules)
    assert "def again_" in fast.code
    assert "not kept" in listing(program_of(fast))
    agree(seen(fast, args), want)
    if name not in ("residual", "stepped"):  # whose buffers have moved on
        fast.save(tmp_path / "model.fxa")
        loaded = fxaccel.load(tmp_path / "model.fxa").train()
        assert loaded.code == fast.code
        agree(seen(loaded, args), want)


def test_names_of_one_stage_do_not_hide_what_another_has_made_global():
    fast = both(Stack().train(), (X,), {"max_overhead": 0.5}, stages=4)
    titles = set(re.findall(r"^def (\w+)", fast.code, re.M)) | set(session(fast).all[0].code.constants)
    for function in re.split(r"^def ", fast.code, flags=re.M)[1:]:
        made_here = set(re.findall(r"^ +(\w+) = ", function, re.M))
        called = set(re.findall(r"(\w+)\(", function))
        assert not made_here & called & titles


# -- budgets ---------------------------------------------------------------------------------------


def steps_of(program):
    count = len(program.stages.begins) + 1
    return [TrainingStep.of_stage(program, i, "none") for i in range(count)]


def test_a_share_is_one_of_the_stage_that_needs_most():
    program = program_of(cut(Stack().train(), (X,), stages=2, microbatches=2))
    assert program.stages.microbatches == 2
    assert program.stages.in_flight == (2, 1)
    first, last = steps_of(program)
    assert first.whole.inner > last.whole.inner
    plan = Checkpoint(budget=0.6).plan(program)
    assert [one.activations[0] for one in plan.stages] == [first.whole.inner, last.whole.inner]
    assert all(one.activations[1] <= 0.6 * first.whole.inner for one in plan.stages)
    assert plan.stages[0].let_go
    assert str(plan).startswith("stage 0: ")
    assert Checkpoint(budget=0.99).plan(program).stages[1].let_go == {}


def test_each_microbatch_in_flight_holds_what_waits():
    half = steps_of(program_of(cut(Stack().train(), (X,), stages=2, microbatches=2)))[0]
    one = steps_of(program_of(cut(Stack().train(), (X[:2],), stages=2)))[0]
    assert half.carried == one.carried == X.nbytes // 2
    waits = sum(v.nbytes for v in one.profile.values if v.needed or v.shown)
    assert half.whole.inner == one.whole.inner + waits + one.carried
    assert half.fixed == one.fixed + one.profile.grads


@pytest.mark.parametrize("budget", [1.0, 0.7])
def test_what_a_stage_holds_is_what_the_plan_says(budget):
    fast = cut(Stack().train(), (X,), check=False, stages=2, microbatches=2)
    plan = Checkpoint(budget=budget).plan(program_of(fast)).stages[0]
    if budget < 1:
        fast = both(Stack().train(), (X,), {"budget": budget}, stages=2, microbatches=2)
    stage = stage_modules(fast, X[:2])[0]
    micro = [x.clone() for x in X.chunk(2)]
    for _ in range(2):  # gradients are there from the first on
        with Meter() as meter:
            results = [stage(x) for x in micro]
            while results:
                result = results.pop(0)
                torch.autograd.backward(result, [torch.ones_like(r) for r in result])
                del result
    received = sum(x.nbytes for x in micro)
    assert meter.peak + received == pytest.approx(plan.activations[1], rel=0.05)


def test_what_cannot_be_kept_names_the_stage_and_the_smallest_budget():
    message = r"of stage 0, the budget of 0.05 cannot be kept, the smallest that can is (0\.\d+)"
    with pytest.raises(Exception, match=message) as caught:
        both(Stack().train(), (X,), {"budget": 0.05}, stages=2)
    smallest = float(re.search(message, str(caught.value))[1])
    fast = both(Stack().train(), (X,), {"budget": round(smallest + 0.001, 3)}, stages=2)
    assert program_of(fast).stages.schedules[0] is not None


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(Exception, match="batch of 4 cannot be cut into 3 equal microbatches"):
        cut(Stack().train(), (X,), stages=2, microbatches=3)
    with pytest.raises(OptionError, match="so there is no batch to choose"):
        cut(Stack().train(), (torch.randn(1, 24, 32),), stages=2, microbatches=2)
