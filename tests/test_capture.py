"""Capture: every way a model is called, both modes, changing sizes and state, and what cannot be captured."""

import collections
import contextlib
import copy
import inspect
import re

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxaccel
from fxaccel.errors import CaptureError
from fxaccel.pieces import Pieces
from tests.zoo.torchvision_shim import importable

F = nn.functional


class Function(nn.Module):
    """A function of (self, ...) as a module."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def captures(fast):
    return len(fast.report().captures)


def notes(fast):
    return "\n".join(n for c in fast.report().captures for n in c.notes)


def same(got, want):
    """Equal structure, types and values."""
    ours, mine = pytree.tree_flatten(got)
    theirs, its = pytree.tree_flatten(want)
    assert mine == its
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert a == b or hasattr(a, "__dict__")


def in_pieces(fast):
    return any(isinstance(c, Pieces) for c in fast.__dict__["_fxaccel"].all)


def agree(model, fast, *args, pieces=False, **kwargs):
    """Call both with equal arguments and random state; compare results and what became of the arguments."""
    theirs, ours = copy.deepcopy((args, kwargs)), copy.deepcopy((args, kwargs))
    torch.manual_seed(11)
    want = model(*theirs[0], **theirs[1])
    buffers = [b.clone() for b in model.buffers()]
    torch.manual_seed(11)
    fast(*ours[0], **ours[1])  # the first call may capture
    ours = copy.deepcopy((args, kwargs))
    torch.manual_seed(11)
    got = fast(*ours[0], **ours[1])
    same(got, want)
    same(ours, theirs)
    assert in_pieces(fast) is pieces
    return got, buffers


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


def twins(model, **options):
    """The model and the accelerated one over tensors of their own."""
    return copy.deepcopy(model), fxaccel.accelerate(model, **options)


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


# -- in place and views ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x.mul_(2) + 1,
        lambda self, x: (x[:, :2].add_(1), x * 2)[1],
        lambda self, x: (y := x * 1, y[:, 0].zero_(), y + 1)[2],
        lambda self, x: (y := x * 1, v := y.view(-1), y.relu_(), v * 2)[3],
        lambda self, x: (y := x.clone(), y.__setitem__((slice(None), 1), 7.0), y)[2],
        lambda self, x: (y := x + 0, z := y.t(), z.mul_(3), y)[3],
        lambda self, x: (y := torch.zeros_like(x), y.index_add_(0, torch.tensor([0, 0, 2]), x), y)[2],
        lambda self, x: F.relu(x + 1, inplace=True),
        lambda self, x: (x.t(), x[1:], x.expand(2, 3, 4)),
        lambda self, x: (y := x * 1, a := y.sum(), y.add_(1), b := y.sum(), torch.stack([a, b]))[4],
    ],
)
def test_in_place_operators_and_views(function):
    model = Function(function)
    agree(model, fxaccel.accelerate(model), torch.randn(3, 4))


def test_an_input_with_a_history_may_be_written_to_and_passes_its_gradient_on():
    model = Function(lambda self, x: (x.mul_(3), x.exp())[1])
    grads = []
    for m in (model, fxaccel.accelerate(model)):
        x = torch.ones(3, 4, requires_grad=True)
        m(x * 1.0).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_an_input_that_the_model_writes_to_is_written_to_and_its_copies_are_not():
    model = Function(lambda self, x, y: (x.add_(y), (x * 2).sum())[1])
    fast = fxaccel.accelerate(model)
    x = torch.zeros(3, 4)
    for n in range(1, 4):
        fast(x, torch.ones(3, 4))
        assert x.eq(n).all()  # once a call, the capturing one included


# -- modes of torch --------------------------------------------------------------------------------


class Casts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
        with torch.autocast("cpu", enabled=False):
            return self.b(y.float() + 1)


@pytest.mark.parametrize("ambient", [None, torch.bfloat16, torch.float16], ids=str)
def test_autocast_around_the_call_and_inside(ambient):
    model, x = Casts(), torch.randn(4, 8)
    fast = fxaccel.accelerate(model)
    around = contextlib.nullcontext() if ambient is None else torch.autocast("cpu", dtype=ambient)
    with around:
        agree(model, fast, x)
    agree(model, fast, x)
    plain = nn.Linear(8, 8)
    quick = fxaccel.accelerate(plain)
    with around:
        got, _ = agree(plain, quick, x)
    assert got.dtype is (ambient or torch.float32)
    assert quick(x).dtype is torch.float32


def test_no_grad_regions_stop_gradients_where_the_model_stops_them():
    def partly(self, x):
        with torch.no_grad():
            y = self.a(x)
        return self.b(x) + y

    model = Function(partly, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    fast = fxaccel.accelerate(model)
    x = torch.randn(3, 4, requires_grad=True)
    fast(x).sum().backward()
    got = {n: None if p.grad is None else p.grad.clone() for n, p in fast.named_parameters()}
    grad, x.grad = x.grad, None
    model.zero_grad()
    model(x).sum().backward()
    want = {n: p.grad for n, p in model.named_parameters()}
    assert (
        {n for n, g in got.items() if g is None}
        == {n for n, g in want.items() if g is None}
        == {"a.weight", "a.bias"}
    )
    torch.testing.assert_close(grad, x.grad)
    assert "set_grad_enabled(False)" in fast.code


def test_detached_values_keep_no_gradient():
    model = Function(lambda self, x: (self.a(x).detach(), self.a(x), self.a(x) * 2), a=nn.Linear(4, 4))
    fast = fxaccel.accelerate(model)
    got, _ = agree(model, fast, A)
    assert [g.requires_grad for g in got] == [False, True, True]


def test_ambient_no_grad_and_inference_mode():
    model, fast = twins(Moody().eval())
    x = torch.randn(5, 6)
    for context in (torch.no_grad(), torch.inference_mode(), contextlib.nullcontext()):
        with context:
            got = fast(x)
            torch.testing.assert_close(got, model(x))
        assert got.requires_grad is (not isinstance(context, (torch.no_grad, torch.inference_mode)))
    assert captures(fast) == 2


def test_capture_in_inference_mode_serves_later_training():
    model, fast = twins(Moody())
    x = torch.randn(8, 6)
    with torch.inference_mode():
        fast.eval()(x)
    fast.train(), model.train()
    for m in (model, fast):
        torch.manual_seed(0)
        m(x).sum().backward()
    torch.testing.assert_close([p.grad for p in fast.parameters()], [p.grad for p in model.parameters()])


# -- where one graph is not to be had --------------------------------------------------------------


def test_a_branch_on_a_value_is_captured_in_pieces_and_the_report_says_so():
    def branch(self, x):
        y = self.a(x)
        if y.sum() > 0:
            return self.b(y).relu()
        return self.b(-y) * 2

    model = Function(branch, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    fast = fxaccel.accelerate(model)
    for sign in (1, -1, 1):
        agree(model, fast, sign * A, pieces=True)
    assert captures(fast) == 1
    assert "captured in" in notes(fast)
    assert "pieces" in notes(fast)
    assert "test_capture.py:" in notes(fast)
    model(A).sum().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    fast(A).sum().backward()
    torch.testing.assert_close([p.grad for p in fast.parameters()], want)


def test_passes_work_on_each_piece():
    def branch(self, x):
        y = self.norm(x)
        return self.norm(y) if y.max() > 100 else self.norm(y) * 2

    model = Function(branch, norm=nn.LayerNorm(4))
    fast = fxaccel.accelerate(model, passes=["fuse-norm"])
    agree(model, fast, A, pieces=True)
    assert len(fast.report()["fuse-norm"].applied) >= 2


def test_the_twentieth_model_of_a_class_is_captured_in_pieces_like_the_first():
    """Dynamo counts compilations by code object and then runs eagerly; each model must have its own count."""
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        pytest.skip("this torch has one count for all")
    model = Function(lambda self, x: x * 2 if x.sum() > 0 else x)
    for _ in range(20):
        fast = fxaccel.accelerate(model, example_inputs=(A,))
        fast(A)
        assert "captured in 0 pieces" not in notes(fast)


def test_a_value_that_becomes_a_number_is_still_one_graph():
    model = Function(lambda self, x: x * x.abs().max().item())
    fast = fxaccel.accelerate(model)
    for _ in range(3):
        agree(model, fast, torch.randn(3, 4))


def test_under_strict_pieces_are_not_taken():
    model = Function(lambda self, x: x * 2 if x.sum() > 0 else x)
    fast = fxaccel.accelerate(model, passes=[], strict=True)
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+"):
        fast(A)


def test_an_error_of_the_model_itself_is_raised_as_it_is():
    def fails(self, x):
        raise ValueError("the model's own error")

    with pytest.raises(ValueError, match="the model's own error"):
        fxaccel.accelerate(Function(fails))(A)


def test_where_nothing_works_the_error_names_the_users_line_and_a_hint(monkeypatch):
    monkeypatch.setattr(
        "fxaccel.session.Session.piecewise", lambda self, why, *rest: (_ for _ in ()).throw(why)
    )
    with pytest.raises(CaptureError) as caught:
        fxaccel.accelerate(Function(lambda self, x: x * 2 if x.sum() > 0 else x))(A)
    assert re.search(r"test_capture\.py:\d+: .*if x.sum\(\) > 0", str(caught.value))
    assert "hint: branch on shapes rather than on values" in str(caught.value)


def test_after_a_failed_capture_the_next_call_may_succeed():
    def picky(self, x):
        if x.shape[0] == 3:
            raise ValueError("three")
        return x * 2

    fast = fxaccel.accelerate(Function(picky))
    with pytest.raises((CaptureError, ValueError)):
        fast(A)
    torch.testing.assert_close(fast(torch.ones(2, 2)), torch.full((2, 2), 2.0))


# -- objects ---------------------------------------------------------------------------------------


class Cache:
    """A little like transformers' DynamicCache."""

    def __init__(self):
        self.keys, self.values, self.seen = [], [], 0

    def update(self, key, value):
        if not self.keys:
            self.keys, self.values = [key], [value]
        else:
            self.keys = [torch.cat([self.keys[0], key], 1)]
            self.values = [torch.cat([self.values[0], value], 1)]
        self.seen += key.shape[1]
        return self.keys[0], self.values[0]


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, cache=None):
        cache = Cache() if cache is None else cache
        k, v = cache.update(self.k(x), self.v(x))
        return F.scaled_dot_product_attention(self.q(x), k, v), cache


def test_a_cache_comes_out_goes_in_and_is_changed_in_place():
    model = Step()
    fast = fxaccel.accelerate(model)
    x = torch.randn(2, 3, 8)
    want, theirs = model(x)
    got, ours = fast(x)
    assert type(ours) is Cache
    for _ in range(3):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(vars(ours), vars(theirs))
        step = torch.randn(2, 1, 8)
        before = ours
        want, theirs = model(step, theirs)
        got, ours = fast(step, ours)
        assert ours is before  # the very object
    assert ours.seen == 6
    assert not in_pieces(fast)


def test_a_cache_does_not_hold_the_values_of_the_capturing_call():
    fast = fxaccel.accelerate(Step())
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    first, second = fast(a)[1], fast(b)[1]
    assert first is not second
    assert not torch.equal(first.keys[0], second.keys[0])


def test_an_object_in_a_circle_is_refused_with_a_hint():
    class Loop:
        def __init__(self, x):
            self.x, self.me = x, self

    with pytest.raises(CaptureError, match="register_pytree_node"):
        fxaccel.accelerate(Function(lambda self, x: Loop(x * 2)))(A)


# -- a model of transformers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt():
    with importable():
        transformers = pytest.importorskip("transformers")
        _ = transformers.GPT2LMHeadModel
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def test_a_model_output_keeps_its_class(gpt):
    fast = fxaccel.accelerate(gpt)
    ids = torch.randint(0, 50, (2, 7))
    got, want = fast(input_ids=ids, labels=ids), gpt(input_ids=ids, labels=ids)
    assert type(got) is type(want)
    torch.testing.assert_close((got.loss, got.logits), (want.loss, want.logits))
    assert type(got.past_key_values) is type(want.past_key_values)
    assert fast.config is gpt.config


@pytest.mark.filterwarnings("ignore")
def test_generate_writes_the_same_text(gpt):
    fast = fxaccel.accelerate(gpt)
    ids = torch.randint(1, 50, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(ids, **options), gpt.generate(ids, **options))
    assert not in_pieces(fast)
    assert captures(fast) == 2  # the prompt, and one for every step
