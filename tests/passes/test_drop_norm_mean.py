"""drop-norm-mean: what it changes is measured on calibration data, and held to the budget."""

import warnings

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.errors import OptionError
from fxaccel.passes import DropNormMean
from tests.helpers import session, targets

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Its first linear gives the norm an input with the mean `shift`."""

    def __init__(self, shift):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        nn.init.normal_(self.norm.bias)
        with torch.no_grad():
            self.first.weight -= self.first.weight.mean(0)
            self.first.bias -= self.first.bias.mean() - shift

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def dropped(model, *, passes=("fuse-attention",), allow="approximate", calibration=(), **options):
    asked = DropNormMean(even_if_slower=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(
            model, passes=[*passes, asked], example_inputs=(X,), allow=allow, calibration=calibration
        )
    return fast, fast.report()["drop-norm-mean"]


def change(model, fast, x):
    with torch.no_grad():
        return float((fast(x) - model(x)).norm() / model(x).norm())


def test_what_it_changes_is_measured_on_the_captured_call():
    model = Net(0.003).eval()
    fast, record = dropped(model)
    assert len(record.applied) == 1
    assert record.change == pytest.approx(change(model, fast, X), rel=1e-3)
    assert 1e-4 < record.change < 0.01
    assert f"drop-norm-mean changes the outputs by {record.change:.2g} of their size" in str(fast.report())
    check = fast.report().captures[0].check
    assert check.startswith("checked against the model")
    assert check.endswith(", before drop-norm-mean")
    assert fast.verify().ok
    again = type(fast.report()).from_json(fast.report().to_json())
    assert again["drop-norm-mean"].change == record.change


def test_the_worst_of_the_users_calls_counts():
    model = Net(0.003).eval()
    calls = [(0.1 * X,), {"x": X[:3]}, X * 3]
    with pytest.raises(OptionError, match="calibration call 1 has another structure than the captured one"):
        fxaccel.accelerate(
            model, passes=[DropNormMean(even_if_slower=True)], example_inputs=(X,), allow="approximate",
            calibration=calls, strict=True,
        )  # fmt: skip
    fast, record = dropped(model, calibration=[calls[0], calls[2]], budget=1.0)
    assert record.change == pytest.approx(max(change(model, fast, x) for x in (0.1 * X, 3 * X)), rel=1e-3)


def test_above_the_budget_nothing_is_changed():
    model = Net(0.5).eval()
    fast, record = dropped(model)
    assert not record.applied
    assert record.change is None
    assert "change is 0." in record.error
    assert "on the call that was captured, expected change<=0.01" in record.error
    assert change(model, fast, X) < 1e-6
    record = dropped(model, calibration=[(X,)])[1]
    assert "on the calibration data, expected change<=0.01" in record.error
    assert len(dropped(model, budget=9.0)[1].applied) == 1


def test_a_call_that_cannot_run_is_told_of():
    with pytest.raises(OptionError, match="calibration call 0 does not run through the captured graph"):
        fxaccel.accelerate(
            Net(0.0), passes=[DropNormMean(even_if_slower=True)], example_inputs=(X,), allow="approximate",
            calibration=[(torch.randn(2, 7),)], strict=True,
        )  # fmt: skip
    with pytest.raises(OptionError, match="a call in calibration is a int"):
        fxaccel.accelerate(Net(0.0), calibration=[3])


def test_it_needs_leave_and_does_not_run_by_default():
    assert "drop-norm-mean" not in fxaccel.accelerate(Net(0.0), example_inputs=(X,)).report()
    record = dropped(Net(0.0), allow="reassociated")[1]
    assert "it is of class 'approximate' and allow='reassociated'" in record.error


def test_the_other_passes_are_checked_without_it_and_run_with_it():
    model = Net(0.003).eval()
    fast, record = dropped(model, passes=["fuse-norm"])
    assert len(record.applied) == 1
    assert "fxaccel.rms_norm.default" in targets(session(fast).all[0].program)
    assert fast.report().captures[0].check.startswith("checked against the model")

    assert change(model, fast, X) == pytest.approx(record.change, rel=1e-3)


def test_training_goes_on_from_there():
    model = Net(0.003)
    fast, record = dropped(model)
    assert len(record.applied) == 1
    fast(X).square().sum().backward()
    assert all(p.grad is not None for p in fast.parameters())


class Declined(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x)


@pytest.mark.parametrize(
    ("norm", "slower", "sentence", "change"),
    [
        (
            nn.LayerNorm([6, 8]),
            True,
            "it normalises over 2 dimensions; an RMSNorm is over one",
            "a norm over the last dimension alone",
        ),
        (
            nn.LayerNorm(8),
            False,
            "on the CPU a LayerNorm is one fused kernel and the faster of the two",
            "even_if_slower=true",
        ),
    ],
)
def test_it_declines_with_the_reason(norm, slower, sentence, change):
    asked = DropNormMean(even_if_slower=slower, budget=2.0)
    with pytest.warns(UserWarning, match="applied nowhere"):
        fast = fxaccel.accelerate(
            Declined(norm), passes=[asked], example_inputs=(X[None],), allow="approximate"
        )
    (site,) = fast.report()["drop-norm-mean"].refused
    assert sentence in site.why
    assert site.change == change
