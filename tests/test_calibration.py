"""Running programs on the user's calls: which calls serve for what, and the moments of inner values."""

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel import calibration
from fxaccel.calibration import Calibration
from fxaccel.capture import Call
from fxaccel.ir import is_call
from fxaccel.quality import Budget
from tests.helpers import session

LINEAR = torch.ops.aten.linear.default


@pytest.mark.parametrize(
    ("count", "fitted", "deciding", "held_out"),
    [
        (1, [0], [0], []),
        (3, [0, 1, 2], [0, 1, 2], []),
        (4, [0, 2], [1], [3]),
        (9, [0, 2, 4, 6, 8], [1, 5], [3, 7]),
    ],
)
def test_calls_are_parted_so_that_none_judges_itself(count, fitted, deciding, held_out):
    one = Calibration(nn.Identity(), [None] * count, True)
    assert (one.fitted, one.deciding, one.held_out) == (fitted, deciding, held_out)


def made(model, calls):
    """A calibration, and the canonical program of the model."""
    fast = fxaccel.accelerate(model, passes=[], example_inputs=calls[0])
    return Calibration(model, [Call(c, {}) for c in calls], True), session(fast).all[0].program


@pytest.mark.parametrize("at_once", [2**30, 1])
def test_moments_are_the_sums_of_outer_products_over_the_fitted_calls(at_once, monkeypatch):
    monkeypatch.setattr(calibration, "AT_ONCE", at_once)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3)).train()
    calls = [(torch.randn(n, 4, 5),) for n in (2, 3, 4, 5, 6)]
    one, program = made(model, calls)
    inputs = [n.args[0] for n in program.graph.nodes if is_call(n, LINEAR)]
    found = dict(one.moments(program, inputs))
    assert list(found) == inputs
    fitted = torch.cat([calls[i][0].reshape(-1, 5) for i in (0, 2, 4)]).double()
    inner = torch.tanh(model[0].double()(fitted)).detach()  # nothing is dropped
    for node, rows in zip(inputs, (fitted, inner), strict=True):
        seen = found[node]
        torch.testing.assert_close(seen.gram, rows.T @ rows, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(seen.largest.double(), rows.abs().amax(0), rtol=1e-6, atol=0)
        assert seen.peaks == pytest.approx(float(rows.abs().amax(1).square().sum()), rel=1e-6)
        assert seen.rows == len(rows)
        assert seen.gram.dtype == torch.float64
    both, (a, b) = found[inputs[0]] + found[inputs[0]], (found[inputs[0]],) * 2
    assert both.rows == a.rows + b.rows
    assert both.peaks == a.peaks + b.peaks
    torch.testing.assert_close(both.gram, a.gram + b.gram)


def test_quality_is_of_the_calls_that_are_named():
    model = nn.Linear(5, 3)
    calls = [(torch.randn(4, 5),) for _ in range(4)]
    one, program = made(model, calls)
    budget = Budget("change", 1.0)
    assert one.quality(budget, program, program).value == 0
    after = program.copy()
    (linear,) = [n for n in after.graph.nodes if is_call(n, LINEAR)]
    linear.args = linear.args[:2]
    expected = [float(model.bias.norm() * 2 / model(x).norm()) for (x,) in calls]
    assert one.quality(budget, program, after).value == pytest.approx(max(expected))
    assert one.quality(budget, program, after, [2]).value == pytest.approx(expected[2])


def test_outputs_that_are_compared_with_again_are_kept_up_to_a_limit(monkeypatch):
    model = nn.Linear(5, 3)
    one, program = made(model, [(torch.randn(4, 5),) for _ in range(4)])
    assert one.outputs(program, 0) is one.outputs(program, 0)
    monkeypatch.setattr(calibration, "KEPT", 4 * 4 * 3 * 4 - 1)
    assert one.outputs(program, 1) is not one.outputs(program, 1)
    assert one.outputs(program.copy(), 0) is not one.outputs(program, 0)
