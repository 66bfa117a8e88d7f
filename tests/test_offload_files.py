"""Schedules that move values to the host: in files, in the listing and in the diff."""

import pytest

import fxaccel
from fxaccel import encode
from fxaccel.diff import Diff
from fxaccel.errors import ArtifactError
from fxaccel.listing import listing
from fxaccel.schedule import Moved, Schedule
from tests.helpers import session
from tests.offloading import mixed, places, watching
from tests.random_graphs import chain, equal, grads, loss


@pytest.fixture
def log(monkeypatch):
    return watching(monkeypatch)


def saved(tmp_path, schedule):
    """A file of `chain` with a schedule, and the captured step."""
    step = chain()
    session(step.fast).all[0].program.schedule = schedule
    step.fast.save(tmp_path / "model.fxa")
    return step


def loaded(tmp_path):
    return session(fxaccel.load(tmp_path / "model.fxa")).all[0].program.schedule


@pytest.mark.parametrize("made", [mixed(), Schedule(moved=(Moved("tanh", "linear_2", "tanh"),))])
def test_files_hold_what_is_moved(made, tmp_path, log):
    step = saved(tmp_path, made)
    assert loaded(tmp_path) == made
    loss(step.emitted()(*step.args)).backward()
    want = grads(step.model)
    fast = fxaccel.load(tmp_path / "model.fxa").train()
    log.clear()
    loss([fast(*step.args)]).backward()
    equal([p.grad for p in fast.parameters()], want)
    assert places(log, "out")


@pytest.mark.parametrize(
    "moved",
    [
        (Moved("nothing", "linear_2", "tanh"),),
        (Moved("tanh", "nothing", "tanh"),),
        (Moved("tanh", "linear_2", "nothing"),),
        (Moved("tanh!", "linear_2", "tanh"),),
        (Moved("sigmoid", "linear_2", "sigmoid"),),
        (Moved("tanh", "linear_2", "tanh"), Moved("tanh", "exp", "tanh")),
    ],
    ids=["value", "fetch", "until", "hidden", "dropped, too", "twice"],
)
def test_a_schedule_of_another_graph_is_refused(moved, tmp_path):
    made = mixed()
    saved(tmp_path, Schedule(made.dropped, made.again, moved))
    with pytest.raises(ArtifactError, match="the schedule is not of this graph"):
        loaded(tmp_path)


def test_files_of_before_hold_nothing_that_is_moved(tmp_path, monkeypatch):
    made = Schedule(mixed().dropped, mixed().again)
    as_dict = encode.asdict

    def without(schedule):
        return {k: v for k, v in as_dict(schedule).items() if k != "moved"}

    monkeypatch.setattr(encode, "asdict", without)
    saved(tmp_path, made)
    assert loaded(tmp_path) == made


def test_the_listing_and_the_diff_say_what_is_moved():
    step = chain()
    before = step.program
    after = type(before)(**{**vars(before), "schedule": mixed()})
    lines = {line.split()[0]: line for line in listing(after).splitlines()}
    assert lines["%tanh"].endswith("moved to the host")
    assert lines["%sigmoid"].endswith("not kept")
    assert "moved" not in listing(before)
    assert [str(c)[:6] for c in Diff(before, after).changes if c.sign != " " and "moved" in str(c)] == [
        "+%tanh"
    ]
