"""The curve of budgets, its baselines and the largest batch: every point is a plan that replays."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxaccel
from fxaccel.errors import OptionError
from fxaccel.formulas import Formulas
from fxaccel.passes._checkpoint_curve import baselines, batch, curve, largest_batch, runs, written
from fxaccel.passes._checkpoint_plan import Planner
from fxaccel.passes.checkpoint import TrainingStep
from fxaccel.replay import Draft, replay
from tests.helpers import Function, session


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1)


class Model(nn.Module):
    def __init__(self, depth=5):
        super().__init__()
        self.layers = nn.Sequential(*(Layer() for _ in range(depth)))

    def forward(self, x):
        return self.layers(x).square().mean()


def program(model, *args):
    fast = fxaccel.accelerate(model.train(), [], check=False, example_inputs=args)
    return session(fast).all[0].program


@pytest.fixture(scope="module")
def model():
    return program(Model(), torch.randn(8, 32, 16))


@pytest.fixture(scope="module")
def step(model):
    return TrainingStep.of(model, "adamw")


@pytest.fixture(scope="module")
def planner(step):
    return step.planner(share=False)


@pytest.mark.parametrize("share", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_curve_goes_from_the_smallest_to_all_and_never_rises(step, planner, share):
    planner = step.planner(share) if share else planner
    found = curve(step, planner, 8)
    sizes = [p.activations if share else p.peak for p in found]
    assert len(found) >= 5
    assert sizes == sorted(set(sizes))
    overheads = [p.overhead for p in found]
    assert overheads == sorted(set(overheads), reverse=True)
    assert found[-1].overhead == found[-1].flops == 0
    assert found[-1].peak == step.fixed + step.whole.peak
    assert all(size <= p.budget for size, p in zip(sizes, found, strict=True))
    smallest = planner.smallest + (0 if share else step.fixed)
    assert sizes[0] <= smallest


def test_points_that_another_one_dominates_are_left_out(step, planner):
    low = planner.smallest
    least = planner.plan(low)

    class Wasteful(Planner):
        def plan(self, budget):
            return Draft() if budget >= self.need else least if budget >= low else None

    assert len(curve(step, Wasteful(step.profile, step.seconds), 8)) == 2


def test_a_point_is_what_its_plan_costs(step, planner):
    one = curve(step, planner, 4)[1]
    plan = step.planned(planner.plan(one.budget - step.fixed))
    assert (plan.peak, plan.activations[1], plan.overhead, plan.flops) == one[1:]


def test_baselines_are_the_ones_that_others_use(step, planner):
    found = baselines(step, planner)
    keep = found["keep all"]
    assert (keep.peak, keep.overhead) == (step.fixed + step.whole.peak, 0.0)
    assert found["every part"].peak < keep.peak
    assert found["sqrt(n)"].peak < keep.peak
    assert 0 < found["every part"].overhead <= 1 / 3
    assert 0 < found["sqrt(n)"].overhead <= 1 / 3
    kept = [
        sum(v.nbytes for n, v in enumerate(step.profile.values) if v.needed and n not in dropped)
        for dropped in (runs(step.profile, length).dropped for length in (1, 2, 100))
    ]
    assert kept == sorted(set(kept), reverse=True)  # longer runs keep fewer boundaries


def test_runs_make_each_call_again_once(step):
    for length in (1, 3):
        made = [c for one in runs(step.profile, length).again.values() for c in one]
        assert len(made) == len(set(made))


def test_our_plans_are_no_worse_than_the_baselines(step, planner):
    for name, one in baselines(step, planner).items():
        ours = planner.plan(one.peak - step.fixed)
        assert ours is not None, name
        assert replay(step.profile, ours, step.seconds).seconds <= one.overhead * 3 * sum(
            step.seconds.values()
        )


def fits(model, size, budget, name="x.0", optimizer="none"):
    """Whether a plan for a batch of this size is found on its own profile."""
    formulas = Formulas(model)
    hints = formulas.sizes.all(formulas.sizes.point({name: size}))
    step = TrainingStep.of(replace(model, hints=hints), optimizer)
    draft = step.planner(share=False).plan(budget - step.fixed)
    return draft is not None and step.fixed + replay(step.profile, draft).peak <= budget


def test_the_largest_batch_fits_and_the_next_does_not_and_the_program_stays():
    model, room = program(Model(3), torch.randn(8, 32, 16)), 2**20
    before = str(model.graph), model.schedule, dict(model.hints)
    size, plan = largest_batch(model, room, "adamw")
    assert size > 8
    assert plan.schedule.dropped
    assert plan.peak <= room
    assert fits(model, size, room, optimizer="adamw")
    assert not fits(model, size + 1, room, optimizer="adamw")
    assert (str(model.graph), model.schedule, dict(model.hints)) == before
    assert replay(TrainingStep.of(model, "none").profile, Draft()).peak < math.inf


@pytest.mark.slow
def test_more_room_takes_a_larger_batch_and_too_little_none(model):
    formulas = Formulas(model)
    small, large = (largest_batch(model, room * 2**20, "none", formulas)[0] for room in (1, 4))
    assert large > 2 * small
    assert largest_batch(model, 100_000, "none", formulas) is None


def test_a_fixed_batch_cannot_be_chosen():
    with pytest.raises(OptionError, match="first dimension of x is fixed"):
        largest_batch(program(Model(1), torch.randn(1, 4, 16)), 2**20)


def test_guards_bound_the_batch():
    fours = Function(lambda x: x.view(x.shape[0] // 4, 4, 8).exp().sum(1).square().mean())
    one = program(fours, torch.randn(16, 8).requires_grad_())
    assert batch(one) == "args.0"
    size, _ = largest_batch(one, 2**16)
    assert size % 4 == 0
    assert not fits(one, size + 4, 2**16, "args.0")


def test_the_formula_is_whole_where_it_is_short_and_leading_terms_else(model):
    formulas = Formulas(model)
    text = written(formulas)
    assert text == str(formulas.inner) or text.endswith("*x.0*x.1 + ...")
    small = Formulas(program(Model(1), torch.randn(8, 32, 16)))
    assert "..." not in written(small) or len(str(small.inner)) > 160
