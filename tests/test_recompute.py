"""The part of a schedule that runs: gradients are the same bits, however backward is called."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from fxaccel import recompute
from fxaccel.memory import Meter
from fxaccel.recompute import Run
from fxaccel.replay import write
from fxaccel.schedule import Again, Schedule
from tests.helpers import Method, thinned
from tests.random_graphs import (
    CASES,
    Attention,
    Captured,
    ConvNet,
    alive_after,
    chain,
    equal,
    gone_back_one_by_one,
    grads,
    identical,
    linears,
    listed,
    loss,
    native,
    three,
)


@thinned(2, name=CASES, learns=[False, True])
def test_a_step_that_keeps_little_is_the_same_step(name, learns):
    model, x = CASES[name]()
    x = torch.randn(6, x) if isinstance(x, int) else x
    step = Captured(model, x.requires_grad_(learns))
    draft = step.draft()
    assert draft.again  # something is computed again
    identical(step.run(step.scheduled()), step.run(step.emitted()))


def test_two_inputs_and_another_size():
    model = Method(lambda m, x, y: m.l1(F.dropout(m.l0(x).exp() * y.tanh(), 0.3)).tanh(), **linears(8, 16, 4))
    small, larger = ([torch.randn(n, 8, requires_grad=True), torch.randn(n, 16)] for n in (6, 11))
    step = Captured(model, *small)
    for args in (None, tuple(larger)):
        identical(step.run(step.scheduled(), args), step.run(step.emitted(), args))


def test_autocast_around_the_call_is_around_what_is_computed_again():
    model, x = Method(native, **linears(8, 16)), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        step = Captured(model, x)

    def within(forward):
        def call(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return forward(*args)

        return step.run(call)  # its backward is outside

    want = within(step.emitted())
    identical(within(step.scheduled()), want)
    assert not torch.equal(want.outputs[0], step.run(model).outputs[0])  # autocast does something


def test_autocast_around_backward_alone_is_not_around_what_is_computed_again():
    step = Captured(Method(native, **linears(8, 16)), torch.randn(6, 8))

    def without(forward):
        def call(*args):
            with torch.autocast("cpu", enabled=False):
                return forward(*args)

        with torch.autocast("cpu", torch.bfloat16):
            return step.run(call)

    identical(without(step.scheduled()), without(step.emitted()))


def test_attention_of_our_kernel_is_computed_again():
    step = Captured(Attention(written=True), torch.randn(2, 6, 32), passes=["fuse-attention"])
    (ours,) = (n.name for n in step.program.graph.nodes if "fxaccel" in str(n.target))
    made = write(step.profile, step.draft())
    assert any(ours in again.nodes for again in made.again)
    identical(step.run(step.emitted(made)), step.run(step.emitted()))


def test_statistics_of_a_batch_norm_move_once():
    model = ConvNet()
    step = Captured(model, torch.randn(2, 3, 6, 6))
    made = write(step.profile, step.draft())
    assert any("batch_norm" in n for again in made.again for n in again.nodes)
    before = {n: b.clone() for n, b in model.named_buffers()}
    wanted = step.run(copy.deepcopy(model)), step.run(step.emitted(made))
    assert [int(b) for n, b in model.named_buffers() if "tracked" in n] == [0, 0]  # `run` puts them back
    loss(listed(step.emitted(made)(*step.args))).backward()
    assert [int(b) for n, b in model.named_buffers() if "tracked" in n] == [1, 1]
    moved = dict(model.named_buffers())
    assert not torch.equal(moved["norm.running_mean"], before["norm.running_mean"])
    for a, b in zip(wanted[1].buffers, moved.values(), strict=True):
        assert torch.equal(a, b)


def test_a_schedule_made_by_hand():
    step = chain()
    made = Schedule(
        ("tanh", "linear_1", "sigmoid"),
        (
            Again("linear_2", ("linear", "tanh", "linear_1", "sigmoid"), (("sigmoid", "sigmoid"),)),
            Again("linear_1", ("linear", "tanh"), (("tanh", "tanh"),)),
        ),
    )
    identical(step.run(step.emitted(made)), step.run(step.emitted()))


# -- how backward may be called --------------------------------------------------------------------


def test_backward_again_through_a_graph_that_is_retained():
    step = Captured(Attention(p=0.2), torch.randn(2, 6, 32))
    torch.manual_seed(3)
    loss(listed(step.emitted()(*step.args))).backward()
    want = grads(step.model)
    torch.manual_seed(3)
    total = loss(listed(step.scheduled()(*step.args)))
    for retain in (True, True, False):
        total.backward(retain_graph=retain)
        equal(grads(step.model), want)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


def test_two_runs_at_a_time_keep_apart():
    step = chain()
    xs = [torch.randn(6, 8), torch.randn(6, 8)]
    want = []
    for x in xs:
        loss(step.emitted()(x)).backward()
        want.append(grads(step.model))
    forward = step.scheduled()
    totals = [loss(forward(x)) for x in xs]
    for i in (0, 1):
        totals[i].backward()
        equal(grads(step.model), want[i])
    totals = [loss(forward(x)) for x in xs]
    for i in (1, 0):
        totals[i].backward(retain_graph=True)
        equal(grads(step.model), want[i])
    torch.stack(totals).sum().backward()
    for got, a, b in zip(grads(step.model), *want, strict=True):
        torch.testing.assert_close(got, a + b)


ORDERS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_results_are_gone_back_from_one_by_one(order):
    step = three()
    gone_back_one_by_one(step, step.scheduled()(*step.args), step.emitted()(*step.args), order)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_branches_are_gone_back_through_each_once(order):
    step = three()
    wanted, ours = step.emitted()(*step.args), step.scheduled()(*step.args)
    for i in order:  # nothing is retained, and nothing gone through twice
        own = list(getattr(step.model, f"l{i + 1}").parameters())
        equal(torch.autograd.grad(ours[i].sum(), own), torch.autograd.grad(wanted[i].sum(), own))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_last_reader_is_not_the_last_to_be_gone_back_through(order):
    weights = {name: torch.nn.Parameter(torch.randn(4, 4)) for name in "abc"}

    def forward(m, x):
        mask = x.exp()  # which has no gradient: the results have no call in common that saves anything
        return [(w * mask).sum() for w in (m.a, m.b, m.c)]

    model = Method(forward, **weights)
    step = Captured(model, torch.randn(4, 4))
    outputs = [listed(made(*step.args)) for made in (step.scheduled("exp"), step.emitted())]
    found = []
    for results in outputs:
        model.zero_grad()
        for i in order:
            results[i].backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_results_that_the_caller_lets_go_are_not_missed(kept):
    step = three()
    ours, wanted = step.scheduled()(*step.args)[kept], step.emitted()(*step.args)[kept]
    weights = [*step.model.l0.parameters(), *getattr(step.model, f"l{kept + 1}").parameters()]
    equal(torch.autograd.grad(ours.sum(), weights), torch.autograd.grad(wanted.sum(), weights))


def test_gradients_of_gradients():
    step = chain(learns=True)
    found = []
    for forward in (step.scheduled(), lambda x: [step.model(x)]):
        (out,) = forward(*step.args)
        (grad,) = torch.autograd.grad(out.sum(), step.args, create_graph=True)
        grad.square().sum().backward()
        found.append([*grads(step.model), step.args[0].grad.clone()])
        step.args[0].grad = None
    equal(*found)
    assert all(g.abs().max() > 0 for g in found[0][:-2])


@pytest.mark.parametrize("what", ["a value", "a parameter", "an input"])
def test_what_is_written_to_between_forward_and_backward_raises(what):
    layers = linears(8, 8, 4)
    step = Captured(Method(lambda m, x: m.l1((x + m.l0.bias).exp()).sin(), **layers), torch.randn(6, 8))
    x = step.args[0].clone()
    kept = {"a value": ("exp",), "a parameter": ("exp", "linear"), "an input": ("exp",)}[what]
    (out,) = step.scheduled(*kept)(x)
    total = out.exp().sum()  # which saves its result
    with torch.no_grad():
        if what == "a value":
            out.grad_fn._saved_self.add_(1)  # what the sine reads
        elif what == "a parameter":
            step.model.l1.weight.mul_(2)
        else:
            x.add_(1)  # eager's backward does not read it; what is computed again is computed from it
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# -- what is held ----------------------------------------------------------------------------------


def test_what_is_dropped_takes_no_memory():
    step = chain()
    sizes = {v.name: v.nbytes for v in step.profile.values}
    alive = {}
    for names in ((), ("tanh",), ("tanh", "sigmoid"), ("sigmoid",)):
        forward = step.scheduled(*names) if names else step.emitted()
        alive[names] = alive_after(step, forward)
    assert sizes["tanh"] == sizes["sigmoid"] == 6 * 16 * 4
    assert alive[()] == 2 * 6 * 16 * 4 + 6 * 4 * 4  # tanh, sigmoid and the result
    for names, live in alive.items():
        assert live == alive[()] - sum(sizes[n] for n in names)


def test_the_mask_of_a_dropout_takes_no_memory():
    model = Method(lambda m, x: F.dropout(m.l0(x), 0.5).sin(), **linears(8, 16))
    step = Captured(model, torch.randn(6, 8))
    alive = []
    for forward in (step.emitted(), step.scheduled("dropout!"), step.scheduled("dropout", "dropout!")):
        with Meter() as meter:
            out = forward(*step.args)
            alive.append(meter.live)
        del out
    value, mask = (step.profile.values[step.number[n]].nbytes for n in ("dropout", "dropout!"))
    assert value == 6 * 16 * 4
    assert mask > 0
    assert alive == [alive[0], alive[0] - mask, alive[0] - mask - value]


@thinned(2, ends=["backward", "retained", "none", "error"], keeps=[True, False])
def test_nothing_is_left_of_a_run(ends, keeps, monkeypatch):
    runs = []

    class Watched(Run):
        def __init__(self, table):
            super().__init__(table)
            runs.append(weakref.ref(self))

    step = Captured(Attention(p=0.1), torch.randn(2, 6, 32))
    monkeypatch.setattr("fxaccel.scheduled.Run", Watched)
    forward = step.emitted(Schedule()) if keeps else step.scheduled()
    gc.collect()
    gc.disable()
    try:
        if ends == "error":
            with pytest.raises(RuntimeError):
                forward(torch.randn(2, 6, 33))
        else:
            total = loss(listed(forward(*step.args)))
            if ends != "none":
                total.backward(retain_graph=ends == "retained")
            del total
        assert [r() for r in runs] == [None]  # there is no cycle to be collected
    finally:
        gc.enable()


def test_what_values_are_computed_from_does_not_hold_who_reads_them():
    """A kept value that lies, in the graph, between what is dropped and where it is computed again."""

    def forward(m, x):
        h = m.l0(x).tanh()
        kept = m.l1(h).sigmoid()
        return kept.exp() * h

    step = Captured(Method(forward, **linears(8, 16, 16)), torch.randn(6, 8))
    draft = step.draft("tanh", "exp")
    (program,) = write(step.profile, draft).again
    assert program.before == "mul"
    assert {"tanh", "exp"} <= set(program.nodes)
    assert "sigmoid" not in program.nodes
    gc.collect()
    gc.disable()
    try:
        with Meter() as meter:
            out = step.scheduled("tanh", "exp")(*step.args)
            assert meter.live > 0
            del out
            assert meter.live == 0  # no backward, and no cycle
    finally:
        gc.enable()


def test_without_gradients_nothing_is_saved_and_nothing_computed_again(monkeypatch):
    step = Captured(ConvNet(), torch.randn(2, 3, 6, 6))
    forward, plain = step.scheduled(), step.emitted()
    monkeypatch.setattr(Run, "need", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(Run, "pack", lambda *_: pytest.fail("saved"))
    with torch.no_grad():
        equal(forward(*step.args), plain(*step.args))
    with torch.inference_mode():
        equal(forward(*step.args), plain(*step.args))


def test_in_eval_mode():
    step = Captured(Attention(p=0.5).eval(), torch.randn(2, 6, 32))
    identical(step.run(step.scheduled()), step.run(step.emitted()))
    model = ConvNet().eval()
    step = Captured(model, torch.randn(2, 3, 6, 6))
    identical(step.run(step.scheduled()), step.run(step.emitted()))


def test_random_numbers_go_on_where_they_were():
    before = torch.get_rng_state()
    with recompute.redrawn(torch.device("cpu"), torch.Generator().manual_seed(5).get_state()):
        drawn = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(5)))
