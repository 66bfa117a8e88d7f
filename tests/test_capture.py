"""Capture: every way a model is called, both modes, changing sizes and state."""

import collections

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.errors import CaptureError
from tests.helpers import Method as Function
from tests.helpers import agree, captures, notes, same, twins

F = nn.functional


# -- arguments and results -------------------------------------------------------------------------


def structured(self, x, scale=2.0, *rest, mask=None, options=None, **more):
    y = x * scale
    for r in rest:
        y = y + r
    if mask is not None:
        y = y.masked_fill(mask, 0.0)
    if options:
        y = y + options["shift"][0] * options["times"]
    return {"y": y, "parts": [y.sum(), (y.mean(), None)], "n": 3, "more": sorted(more), "same": more.get("z")}


A, B = torch.randn(3, 4), torch.randn(3, 4)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((A,), {}),
        ((A, 3.0), {}),
        ((A, 3, B, B), {}),
        ((), {"x": A}),
        ((A,), {"mask": A > 0}),
        ((A,), {"mask": None, "scale": 0.5}),
        ((A,), {"options": {"shift": (B,), "times": 4}}),
        ((A,), {"options": None, "z": B, "name": "text", "flag": True}),
        ((A, torch.tensor(1.5)), {}),
    ],
)
def test_every_way_of_calling(args, kwargs):
    model = Function(structured)
    agree(model, fxaccel.accelerate(model), *args, **kwargs)


def test_numbers_none_and_strings_choose_the_capture():
    model = Function(structured)
    fast = fxaccel.accelerate(model)
    for _ in range(2):
        for kwargs in ({}, {"scale": 3.0}, {"scale": 3}, {"flag": True}, {"flag": 1}, {"mask": None}):
            got = fast(A, **kwargs)
            same(got, model(A, **kwargs))
    assert captures(fast) == 6


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "result",
    [
        lambda a: a, lambda a: (a,), lambda a: [a, a * 2], lambda a: None, lambda a: (None, a),
        lambda a: {"k": a},
        lambda a: Point(a, a + 1), lambda a: collections.OrderedDict(b=a, a=a * 2), lambda a: ((), [], {}, a),
        lambda a: (a, True, 2, 2.5, "word", a.dtype), lambda a: (a.shape[0], a.sum()), lambda a: (a, a),
    ],
)  # fmt: skip
def test_results_keep_their_structure(result):
    model = Function(lambda self, a: result(a))
    fast = fxaccel.accelerate(model)
    got, _ = agree(model, fast, A)
    assert type(got) is type(model(A))


def test_an_output_that_is_an_input_stays_that_very_tensor():
    fast = fxaccel.accelerate(Function(lambda self, a, b: (a, b + 1)))
    assert fast(A, B)[0] is A


def test_no_tensor_among_the_arguments():
    model = Function(lambda self, n: torch.arange(n) * 2)
    agree(model, fxaccel.accelerate(model), 5)


def test_an_empty_batch_and_a_batch_of_one_have_captures_of_their_own():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    fast = fxaccel.accelerate(model)
    for batch in (3, 1, 0, 5, 1, 0):
        agree(model, fast, torch.randn(batch, 4))
    assert captures(fast) == 3


# -- train and eval --------------------------------------------------------------------------------


class Moody(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.body(x))


def test_train_and_eval_have_their_own_graphs_over_the_same_parameters():
    model, fast = twins(Moody())
    x = torch.randn(8, 6)
    for training in (True, False, True, False):
        model.train(training), fast.train(training)
        torch.manual_seed(1)
        want = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(fast(x), want)
        for a, b in zip(model.buffers(), fast.buffers(), strict=True):
            torch.testing.assert_close(a, b)  # running statistics moved once a call, capture or not
    assert captures(fast) == 2
    assert {c.mode for c in fast.report().captures} == {"training", "eval"}
    fast.train()
    assert not torch.equal(fast(x), fast(x))
    fast.eval()
    assert torch.equal(fast(x), fast(x))


def test_a_child_may_be_in_another_mode():
    model, fast = twins(Moody())
    x = torch.randn(8, 6)
    for change in (
        lambda m: m.body[1].eval(),
        lambda m: m.body[3].eval(),
        lambda m: m.train(),
        lambda m: m.body.eval(),
    ):
        change(model), change(fast)
        torch.manual_seed(2)
        want = model(x)
        torch.manual_seed(2)
        torch.testing.assert_close(fast(x), want)
    torch.testing.assert_close(list(model.buffers()), list(fast.buffers()))
    assert captures(fast) == 4


def test_training_takes_the_same_path_as_the_original():
    model, fast = twins(Moody())
    ours, theirs = torch.optim.SGD(fast.parameters(), 0.1), torch.optim.SGD(model.parameters(), 0.1)
    for step in range(4):
        x = torch.randn(6 + step, 6)
        for m, optimizer in ((model, theirs), (fast, ours)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), fast.state_dict())
    assert captures(fast) == 1


def test_batch_norm_whose_output_nobody_reads_still_moves_its_statistics():
    model = Function(lambda self, x: (self.norm(x), x * 2)[1], norm=nn.BatchNorm1d(6))
    model, fast = twins(model)
    for _ in range(3):
        x = torch.randn(8, 6)
        torch.testing.assert_close(fast(x), model(x))
    torch.testing.assert_close(list(model.buffers()), list(fast.buffers()))


def test_two_dropouts_of_one_value_stay_two():
    model = Function(lambda self, x: (F.dropout(x, 0.5), F.dropout(x, 0.5)))
    a, b = agree(model, fxaccel.accelerate(model), torch.ones(100))[0]
    assert not torch.equal(a, b)


# -- sizes -----------------------------------------------------------------------------------------


def test_one_capture_serves_other_batches_and_lengths():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    fast = fxaccel.accelerate(model)
    for batch, length in ((2, 5), (3, 7), (4, 2), (2, 64)):
        agree(model, fast, torch.randn(batch, length, 8))
    assert captures(fast) == 1
    agree(model, fast, torch.randn(1, 5, 8))
    assert captures(fast) == 2


def test_a_size_that_the_model_specialises_gets_a_second_capture_that_is_reported():
    def by_length(self, x):
        return x * 2 if x.shape[1] == 4 else x * 3

    model = Function(by_length)
    fast = fxaccel.accelerate(model)
    for length in (4, 5, 6, 4):
        agree(model, fast, torch.randn(2, length))
    assert captures(fast) == 2
    assert len(str(fast.report()).split("captured for")) == 3


def test_a_branch_on_a_size_that_turns_out_to_be_fixed_still_holds():
    """The condition is `s0 <= s1`; the parameter makes s1 the number 5, of which it says nothing any more."""

    def function(m, x):
        y = x.tanh() if x.shape[0] > x.shape[1] else x * 2
        return y + m.p

    model = Function(function, p=nn.Parameter(torch.zeros(5, 4)))
    fast = fxaccel.accelerate(model, example_inputs=(torch.randn(3, 5, 4),))
    for batch in (5, 8):
        x = torch.randn(batch, 5, 4)
        assert torch.equal(fast(x), model(x))
    assert captures(fast) == 2


def test_a_branch_on_a_size_is_never_taken_for_the_other_one():
    model = Function(lambda self, x: x.sum(0) if x.shape[0] > 4 else x.mean(0))
    fast = fxaccel.accelerate(model)
    for batch in (3, 7, 4, 5):
        agree(model, fast, torch.randn(batch, 3))
    assert captures(fast) == 2


def test_constants_up_to_the_length_of_the_example_do_not_serve_longer_ones():
    model = Function(lambda self, x: x + torch.arange(x.shape[1]) + self.table[: x.shape[1]])
    model.register_buffer("table", torch.arange(10.0))
    fast = fxaccel.accelerate(model)
    for length in (4, 8, 2):
        agree(model, fast, torch.randn(2, length))
    with pytest.raises((RuntimeError, CaptureError)):
        fast(torch.randn(2, 11))


def test_the_number_of_captures_is_bounded_and_reported():
    model = Function(lambda self, x, n: x * n)
    fast = fxaccel.accelerate(model, max_captures=3)
    for n in range(6):
        torch.testing.assert_close(fast(A, n), A * n)
        assert captures(fast) <= 3
    assert "3 captures were dropped for others (max_captures=3)" in notes(fast)
    torch.testing.assert_close(fast(A, 0), A * 0)


def test_images_are_captured_with_a_symbolic_batch():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    fast = fxaccel.accelerate(model)
    agree(model, fast, torch.randn(2, 3, 8, 8))
    agree(model, fast, torch.randn(5, 3, 8, 8))
    assert captures(fast) == 1
    agree(model, fast, torch.randn(2, 3, 9, 8))
    assert captures(fast) == 2


# -- state -----------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def test_tied_weights_stay_tied_and_their_gradients_add():
    model, ids = Tied(), torch.randint(0, 10, (2, 5))
    fast = fxaccel.accelerate(model)
    agree(model, fast, ids)
    assert fast.head.weight is fast.embed.weight
    model(ids).square().sum().backward()
    want = model.embed.weight.grad.clone()
    model.zero_grad()
    fast(ids).square().sum().backward()
    torch.testing.assert_close(fast.embed.weight.grad, want)
    fast.head.weight = nn.Parameter(torch.randn(10, 6))  # untied by the user: another graph
    torch.testing.assert_close(fast(ids), fast.original()(ids))


class Counting(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))
        self.how = how

    def forward(self, x):
        if self.how == "in place":
            self.count.add_(1)
            self.last.copy_(x[0].detach())
        else:
            self.count = self.count + 1
            self.last = x[0].detach() * 1.0
        return x * self.count + self.last


@pytest.mark.parametrize("nested", [False, True], ids=["root", "nested"])
@pytest.mark.parametrize("how", ["in place", "by assignment"])
def test_buffers_that_change_change_once_a_call(how, nested):
    model = Counting(how)
    model = nn.Sequential(nn.Identity(), model) if nested else model
    model, fast = twins(model)
    for _ in range(4):
        x = torch.randn(3, 4)
        torch.testing.assert_close(fast(x), model(x))
        torch.testing.assert_close(dict(fast.named_buffers()), dict(model.named_buffers()))
    assert captures(fast) == 1


def test_attributes_that_are_assigned_in_forward_are_noted_and_do_not_leak():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            self.inner.seen = x * 2
            self.calls = getattr(self, "calls", 0) + 1
            return self.inner(x)

    model = Remembers()
    fast = fxaccel.accelerate(model, example_inputs=(A,))
    assert "assigns a tensor to the attribute 'inner.seen'" in notes(fast)
    assert not hasattr(model, "calls")
    assert not hasattr(fast.inner, "seen")
    torch.testing.assert_close(fast(A), model(A))


def test_constant_tensors_in_the_model_are_kept():
    model = Function(lambda self, x: x * self.table + torch.tensor([1.0, 2.0, 3.0, 4.0]))
    model.table = torch.arange(4.0)  # neither parameter nor buffer
    agree(model, fxaccel.accelerate(model), A)
