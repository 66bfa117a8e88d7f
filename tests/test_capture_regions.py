"""Capture: writes in place, views, autocast and gradient modes."""

import contextlib

import pytest
import torch
from torch import nn

import fxaccel
from tests.helpers import Method as Function
from tests.helpers import agree, captures, twins
from tests.test_capture import A, Moody

F = nn.functional


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
