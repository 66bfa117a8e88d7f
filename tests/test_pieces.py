"""Models that are no single graph, and models that cannot be captured."""

import inspect
import random
import re

import numpy
import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.errors import CaptureError
from tests.helpers import Method as Function
from tests.helpers import agree, captures, in_pieces, notes
from tests.test_capture import A

F = nn.functional


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
    assert "test_pieces.py:" in notes(fast)
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


@pytest.mark.slow
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
    with pytest.raises(CaptureError, match=r"test_pieces\.py:\d+"):
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
    assert re.search(r"test_pieces\.py:\d+: .*if x.sum\(\) > 0", str(caught.value))
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


def test_numbers_that_numpy_and_python_draw_are_the_models():
    def draws(self, x):
        if x.sum() > 100:
            return x
        return x * torch.from_numpy(numpy.random.rand(4)).float() * random.random()

    model = Function(draws)
    fast = fxaccel.accelerate(model, check=False)
    states = numpy.random.get_state(), random.getstate()
    results = []
    for m in (model, fast, fast):
        numpy.random.set_state(states[0]), random.setstate(states[1])
        results.append(m(A))
    assert in_pieces(fast)
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])
