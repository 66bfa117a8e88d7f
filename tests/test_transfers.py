"""When values go to the host and come back: a timeline by hand, and what is said beside what is measured."""

import random

import pytest
import torch
from torch import nn

from fxaccel import transfers
from fxaccel.passes._checkpoint_plan import Planner
from fxaccel.replay import Draft, Journey, lives, replay, write
from fxaccel.transfers import movable, moving
from tests.helpers import Method, thinned
from tests.offloading import watching
from tests.passes.test_checkpoint_optimum import STEPS, Steps
from tests.random_graphs import BATCH, LENGTH, WIDTH, Captured, RandomGraph, identical, random_drafts

WIDE = 64 * 16 * 4  # bytes of a hidden value


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(transfers, "LEAST", 1)


@pytest.fixture(scope="module")
def chain():
    layers = {"l0": nn.Linear(8, 16), "l1": nn.Linear(16, 16), "l2": nn.Linear(16, 4)}
    model = Method(lambda m, x: m.l2(m.l1(m.l0(x).tanh()).tanh()).square().mean(), **layers)
    return Captured(model, torch.randn(64, 8))


def moved(step, *names, seconds=2.5, draft=None):
    """The draft that moves these, each in so many seconds; each call of forward takes one."""
    values = [step.number[n] for n in names]
    times = dict.fromkeys(step.profile.calls, 1.0)
    return moving(step.profile, draft or Draft(), values, times, WIDE / seconds)


def call(step, name):
    return next(i for i, c in step.profile.calls.items() if c.name == name)


def test_what_can_be_moved(chain):
    names = {chain.profile.values[v].name for v in movable(chain.profile)}
    assert names == {"tanh", "tanh_1", "linear_2"}  # neither what no backward reads nor the loss


def test_small_values_stay(chain, monkeypatch):
    monkeypatch.setattr(transfers, "LEAST", WIDE)
    assert {chain.profile.values[v].name for v in movable(chain.profile)} == {"tanh", "tanh_1"}


def test_copies_back_are_as_late_as_they_can_be(chain):
    # backward comes to mean at 0, pow at 2, linear_2 at 4, tanh_1 at 6, linear_1 at 8
    last, tanh, tanh_1 = call(chain, "mean"), chain.number["tanh"], chain.number["tanh_1"]
    found = moved(chain, "tanh", "tanh_1")
    assert found.moved == {
        tanh: Journey(last, call(chain, "linear_2")),  # from 5.5 to 8
        tanh_1: Journey(last, call(chain, "mean")),  # from 1.5 to 4
    }
    assert found.waits == 0.0
    assert moved(chain, "tanh", seconds=1.5).moved[tanh].fetch == call(chain, "tanh_1")  # from 6.5
    assert moved(chain, "tanh", seconds=2.0).moved[tanh].fetch == call(chain, "tanh_1")  # from 6


def test_a_copy_has_time_until_its_memory_is_used_again(chain, monkeypatch):
    monkeypatch.setattr(transfers, "STEPS", 2)
    tanh, due = chain.number["tanh"], call(chain, "tanh_1")
    found = moved(chain, "tanh", seconds=1.0)  # from 2 to 3, and tanh_1 ends at 4
    assert (found.moved[tanh].gone, found.waits) == (due, 0.0)
    assert moved(chain, "tanh", seconds=2.25).waits == 0.25


def test_what_takes_too_long_is_waited_for(chain):
    # out: from 2 to 7 and from 7 to 12, where forward ends at 7; back: from 3 to 8, and from -2 to 3
    assert moved(chain, "tanh", "tanh_1", seconds=5.0).waits == 5.0 + 2.0
    assert moved(chain, "tanh", "tanh_1", seconds=3.0).waits == 1.0


def test_what_is_computed_again_gives_copies_time_and_reads_them_first(chain):
    times, again = dict.fromkeys(chain.profile.calls, 1.0), chain.draft("tanh_1")
    assert again.again == {call(chain, "linear_2"): [call(chain, "linear_1"), call(chain, "tanh_1")]}
    one = moving(chain.profile, again, [chain.number["tanh"]], times, WIDE / 2.5)
    # linear_1 reads it before the backward of linear_2, at 4: from 1.5 on
    assert one.moved[chain.number["tanh"]].fetch == call(chain, "mean")
    assert replay(chain.profile, one, times).seconds == 2.0
    assert one.dropped == again.dropped
    assert one.again == again.again


def test_a_peak_without_what_is_away(chain):
    one, other = call(chain, "linear_1"), call(chain, "linear_2")
    journeys = {chain.number["tanh"]: Journey(one, one), chain.number["tanh_1"]: Journey(other, other)}
    away = Draft(moved=journeys)
    # in the backward of the second linear: the first tanh and two gradients of that size, the loss and its
    # gradient, those of two layers
    assert replay(chain.profile, away).peak == 3 * WIDE + 2 * 4 + ((16 * 16 + 16) + (16 * 4 + 4)) * 4
    made = write(chain.profile, away)
    assert [(m.value, m.fetch, m.until) for m in made.moved] == [
        ("tanh", "linear_1", "tanh"), ("tanh_1", "linear_2", "tanh_1"),
    ]  # fmt: skip


def test_a_view_of_what_is_away_is_made_again_from_it(monkeypatch):
    watching(monkeypatch)

    def forward(m, x):
        h = m.l0(x).tanh()
        return (m.l1(h).sum() + (h[:, :4] * 2).exp().mean()).square()

    layers = {"l0": nn.Linear(8, 16), "l1": nn.Linear(16, 4)}
    step = Captured(Method(forward, **layers), torch.randn(64, 8))
    draft = moved(step, "tanh", seconds=0.1, draft=step.draft("exp"))
    made = write(step.profile, draft)
    assert made.again[0].nodes == ("slice", "mul", "exp")
    assert step.peak(made) <= replay(step.profile, draft).peak
    identical(step.run(step.emitted(made)), step.run(step.emitted()))


@thinned(2, seed=range(12))
def test_random_steps_take_no_more_than_is_said(seed, monkeypatch):
    watching(monkeypatch)
    draw = random.Random(seed)
    step = Captured(RandomGraph(seed), torch.randn(BATCH, LENGTH, WIDTH))
    times = dict.fromkeys(step.profile.calls, 1.0)
    for draft in random_drafts(step, seed, 3):
        low = lives(step.profile, draft).lowest
        can = [v for v in sorted(movable(step.profile)) if v not in draft.dropped and v in low]
        values = [v for v in can if draw.random() < 0.6]
        found = moving(step.profile, draft, values, times, draw.choice([100.0, 1e4, 1e6]))
        made = write(step.profile, found)
        assert len(made.moved) == len(values)
        assert step.peak(made) <= replay(step.profile, found).peak
        identical(step.run(step.emitted(made)), step.run(step.emitted()))


@pytest.mark.parametrize("name", ["transformer of 33", "U-Net of 29"])
def test_a_link_makes_plans_cheaper_and_never_dearer(name):
    steps: Steps = STEPS[name]()
    profile, seconds = steps.profile(), steps.seconds
    need, total = replay(profile, Draft()).peak, sum(seconds.values())
    budget = int(0.6 * need)
    costs = []
    for link in (0.0, 1e-3 * need / total, 0.3 * need / total, 3 * need / total):
        draft = Planner(profile, seconds, link).plan(budget)
        cost = replay(profile, draft, seconds)
        assert cost.peak <= budget
        assert bool(draft.moved) == (link > 0.01 * need / total)
        costs.append(cost.seconds)
    assert costs[0] == costs[1] > costs[2] >= costs[3]
