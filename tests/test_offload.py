"""Values that are moved to the host: the same step, bit for bit, however backward is called."""

import random

import pytest
import torch
from torch import nn

from fxaccel.memory import Meter
from fxaccel.recompute import Timetable
from fxaccel.schedule import Again, Moved, Schedule
from tests.helpers import Method, thinned
from tests.offloading import Watched, mixed, moving, place, places, watching
from tests.random_graphs import (
    CASES,
    Attention,
    Captured,
    RandomGraph,
    chain,
    equal,
    gone_back_one_by_one,
    grads,
    identical,
    linears,
    listed,
    loss,
    three,
)


@pytest.fixture
def log(monkeypatch):
    return watching(monkeypatch)


# -- the same bits ---------------------------------------------------------------------------------


@thinned(2, name=CASES, learns=[False, True])
def test_a_step_that_moves_all_it_can_is_the_same_step(name, learns, log):
    model, x = CASES[name]()
    x = torch.randn(6, x) if isinstance(x, int) else x
    step = Captured(model, x.requires_grad_(learns))
    made = moving(step)
    identical(step.run(step.emitted(made)), step.run(step.emitted()))
    assert len(places(log, "out")) == len(places(log, "back")) == len(made.moved) > 0


@thinned(2, name=CASES)
def test_moved_and_dropped_values_side_by_side(name, log):
    model, x = CASES[name]()
    step = Captured(model, torch.randn(6, x) if isinstance(x, int) else x)
    want = step.run(step.emitted())
    for seed in range(4):
        draw = random.Random(seed)
        made = moving(step, dropped=frozenset(i for i in sorted(step.droppable()) if draw.random() < 0.6))
        identical(step.run(step.emitted(made)), want)
    assert log


@thinned(2, seed=range(12))
def test_random_graphs(seed, log):
    step = Captured(RandomGraph(seed), torch.randn(4, 6, 16))
    want, draw = step.run(step.emitted()), random.Random(seed)
    for share in (0.0, 0.5):
        made = moving(step, dropped=frozenset(i for i in sorted(step.droppable()) if draw.random() < share))
        identical(step.run(step.emitted(made)), want)
    assert log


def test_the_host_of_this_device():
    step = three()
    made = moving(step)
    assert len(made.moved) > 4
    identical(step.run(step.emitted(made)), step.run(step.emitted()))


def test_our_kernel_reads_what_was_moved(log):
    step = Captured(Attention(written=True), torch.randn(2, 6, 32), passes=["fuse-attention"])
    assert any("fxaccel" in str(n.target) for n in step.program.graph.nodes)
    identical(step.run(step.emitted(moving(step))), step.run(step.emitted()))
    assert places(log, "back")


def test_a_result_of_several_and_a_base_of_views(log):
    def forward(m, x):
        values, where = m.l0(x).sort(-1)
        h = m.l0(x).tanh()
        return values.exp().gather(-1, where) * (h[:, 2:10].t() @ h[:, ::2]).sum()

    step = Captured(Method(forward, **linears(8, 16)), torch.randn(6, 8))
    made = moving(step, ["getitem_1", "tanh"])
    assert len(made.moved) == 2
    identical(step.run(step.emitted(made)), step.run(step.emitted()))
    assert len(places(log, "out")) == 2


def test_autocast_around_the_call():
    step = Captured(chain().model, torch.randn(6, 8))

    def within(forward):
        def call(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return forward(*args)

        return step.run(call)

    identical(within(step.emitted(moving(step))), within(step.emitted()))


def test_conjugates_of_what_is_not_kept():
    def forward(m, x):
        z = torch.view_as_complex(m.l0(x).unflatten(-1, (-1, 2)))
        return torch.view_as_real((z * 2) * (z * z).conj()).flatten(1)

    step = Captured(Method(forward, **linears(8, 16)), torch.randn(6, 8))
    want = step.run(step.emitted())
    identical(step.run(step.emitted(moving(step))), want)
    identical(step.run(step.scheduled()), want)


# -- what is computed again from what was moved ----------------------------------------------------


def test_a_dropped_value_is_computed_from_a_moved_one(log):
    step = chain()
    identical(step.run(step.emitted(mixed())), step.run(step.emitted()))
    assert places(log, "out") == [place(step, "tanh")]
    assert places(log, "back") == [place(step, "linear_2")]  # where the computation begins


def test_what_autograd_does_not_save_is_moved_for_what_is_computed_from_it(log):
    step = Captured(
        Method(lambda m, x: (m.l0(x) + 1).sin().exp() * m.l1(x), **linears(8, 16), l1=nn.Linear(8, 16)),
        torch.randn(6, 8),
    )
    made = Schedule(
        ("sin", "exp"),
        (Again("mul", ("sin", "exp"), (("exp", "exp"),)),),
        (Moved("linear", "mul", "mul"), Moved("add", "mul", "sin")),
    )
    identical(step.run(step.emitted(made)), step.run(step.emitted()))
    assert places(log, "out") == [place(step, "add")]  # nothing reads the other


# -- how backward may be called --------------------------------------------------------------------


@pytest.mark.parametrize("made", [None, mixed("exp")], ids=["all moved", "mixed"])
def test_backward_again_through_a_graph_that_is_retained(made, log):
    step = chain()
    loss(listed(step.emitted()(*step.args))).backward()
    want = grads(step.model)
    total = loss(step.emitted(made or moving(step))(*step.args))
    for retain in (True, True, False):
        total.backward(retain_graph=retain)
        equal(grads(step.model), want)
    back = places(log, "back")
    first = [place(step, "exp")] if made else back[:3]
    assert back == 3 * first  # the device's memory was free between them
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


@pytest.mark.parametrize("drops", [False, True], ids=["all moved", "mixed"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)], ids=str)
def test_results_are_gone_back_from_one_by_one(order, drops, log):
    step = three()
    dropped = {step.number[n] for n in ("exp", "sigmoid", "cos")} if drops else set()
    made = moving(step, dropped=frozenset(dropped))
    assert made.moved
    gone_back_one_by_one(step, step.emitted(made)(*step.args), step.emitted()(*step.args), order)


def test_what_backward_does_not_come_to_stays_away(log):
    step = three()
    made = moving(step, ["tanh", "exp", "tanh_1", "tanh_2"])
    ours = step.emitted(made)(*step.args)
    torch.autograd.grad(ours[0].sum(), list(step.model.l0.parameters()))
    back = places(log, "back")
    assert len(back) == 2  # the two that the branches share; the others were past when it began
    assert len(places(log, "out")) == 4


def test_gradients_of_gradients(log):
    step = chain(learns=True)
    found = []
    for forward in (step.emitted(moving(step)), step.emitted(mixed()), lambda x: [step.model(x)]):
        (out,) = forward(*step.args)
        (grad,) = torch.autograd.grad(out.sum(), step.args, create_graph=True)
        grad.square().sum().backward()
        found.append([*grads(step.model), step.args[0].grad.clone()])
        step.args[0].grad = None
    equal(found[0], found[2])
    equal(found[1], found[2])


def test_two_runs_at_a_time_keep_apart(log):
    step = chain()
    xs, want = [torch.randn(6, 8), torch.randn(6, 8)], []
    for x in xs:
        loss(step.emitted()(x)).backward()
        want.append(grads(step.model))
    forward = step.emitted(moving(step))
    totals = [loss(forward(x)) for x in xs]
    for i in (1, 0):
        totals[i].backward()
        equal(grads(step.model), want[i])


def test_without_gradients_nothing_is_moved(log):
    step = chain()
    for made in (moving(step), mixed()):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                equal(step.emitted(made)(*step.args), step.emitted()(*step.args))
    assert log == []


def test_what_autograd_does_not_save_is_not_moved(log):
    step = chain()
    forward, plain = step.emitted(moving(step)), step.emitted()
    step.model.requires_grad_(False)
    equal(forward(*step.args), plain(*step.args))
    assert log == []


@pytest.mark.parametrize("made", [None, (), ("exp",)], ids=["autograd", "nothing moved", "moved"])
def test_what_is_written_to_between_forward_and_backward_raises(made):
    step = Captured(Method(lambda m, x: m.l0(x).exp(), **linears(8, 8)), torch.randn(6, 8))
    forward = (lambda x: [step.model(x)]) if made is None else step.emitted(moving(step, made))
    (out,) = forward(*step.args)
    with torch.no_grad():
        out.add_(1)
    words = r"modified by an inplace operation: .*\[6, 8\].* version 1; expected version 0"
    with pytest.raises(RuntimeError, match=words):
        out.sum().backward()


@pytest.mark.parametrize("read_again", [False, True], ids=["", "computed from, too"])
def test_a_value_is_moved_as_it_was_saved(read_again, log):
    """A write that autograd permits: before anything saves the value."""
    x = torch.randn(6, 8, requires_grad=True)
    run = Watched(Timetable({}, {9: [0]} if read_again else {}, [(0, 0)], [(3, 0, 0)]))
    with run:
        run.at(0)
        h = x * 1
        run.move(0, h)
        run.at(1)
        h[:, :2].mul_(2)
        run.at(2)
        y = h.sin()
    y.sum().backward()
    assert torch.equal(x.grad[:, 2:], x[:, 2:].cos())
    assert torch.equal(x.grad[:, :2], 2 * (2 * x[:, :2]).cos())
    assert places(log, "out") == ([0, 2] if read_again else [2])


def test_nothing_is_left_of_a_run(log):
    step = chain()
    with Meter() as meter:
        out = step.emitted(mixed())(*step.args)
        assert meter.live > 0
        del out
        assert meter.live == 0  # no backward, and no cycle
