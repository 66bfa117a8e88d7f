"""swap-activation: what it swaps, what it leaves alone and why, what that changes and what is allowed."""

import warnings

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel import discover, manager
from fxaccel.errors import OptionError
from fxaccel.kernels._activations import ACTIVATIONS, SEVERAL
from fxaccel.listing import listing
from fxaccel.passes import SwapActivation, _activations
from tests.helpers import Function, session, targets

F = nn.functional
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers with an activation each."""

    def __init__(self, first=F.gelu, second=F.gelu):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = Layer(8, 16, first), Layer(16, 4, second)

    def forward(self, x):
        return self.two(self.one(x))


class Layer(nn.Linear):
    def __init__(self, inner, outer, activation):
        super().__init__(inner, outer)
        self.activation = activation

    def forward(self, x):
        return self.activation(super().forward(x))


def swapped(model, *asked, x=X, grad=False, **options):
    options = {"allow": "approximate", "example_inputs": (x,)} | options
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(model, [*asked], **options)
    return fast, fast.report()["swap-activation"]


def once_more(fast, **options):
    """The record of the pass over what became of a model."""
    run = manager.run(session(fast).all[0].program, [SwapActivation(**options)], allow="approximate")
    return run.report.passes[0]


def change(model, fast, x=X):
    with torch.no_grad():
        return float((fast(x) - model(x)).norm() / model(x).norm())


# -- it fires --------------------------------------------------------------------------------------


def test_every_gelu_and_the_report_says_what_became_what():
    fast, record = swapped(Net(), "swap-activation{old=gelu,new=gelu_tanh}")
    lines = listing(session(fast).all[0].program).splitlines()
    assert [" ".join(line.split("#")[0].split()) for line in lines] == [
        "%linear = aten.linear(%x, %p_one_weight, %p_one_bias)",
        "%gelu = aten.gelu(%linear, approximate='tanh')",
        "%linear_1 = aten.linear(%gelu, %p_two_weight, %p_two_bias)",
        "%gelu_1 = aten.gelu(%linear_1, approximate='tanh')",
    ]
    assert sorted((s.path, s.why) for s in record.applied) == [
        ("one", "gelu became gelu_tanh"), ("two", "gelu became gelu_tanh"),
    ]  # fmt: skip
    assert 0 < record.change < 0.01
    assert record.change == pytest.approx(change(Net(), fast), rel=1e-3)
    assert f"swap-activation changes the outputs by {record.change:.2g}" in str(fast.report())
    with torch.no_grad():
        torch.testing.assert_close(fast(X), Net(*2 * [ACTIVATIONS["gelu_tanh"]])(X))


@pytest.mark.parametrize("old", _activations.NAMES)
def test_each_becomes_each(old):
    """In inference and in training; the values are those of a model that was written so."""
    new = _activations.NAMES[_activations.NAMES.index(old) - 1]
    model, want = (Net(ACTIVATIONS[a], torch.sin) for a in (old, new))
    for grad in (False, True):
        fast, record = swapped(model, f"swap-activation{{old={old},new={new},budget=change<=100}}", grad=grad)
        (site,) = record.applied
        assert (site.path, site.why) == ("one", f"{old} became {new}")
        with torch.set_grad_enabled(grad):
            got, expected = (torch.autograd.grad(m(X).square().sum(), [*m.parameters()]) if grad else [m(X)]
                             for m in (fast, want))  # fmt: skip
        torch.testing.assert_close(got, expected)


def test_the_names_are_those_of_the_kernels():
    assert sorted(_activations.NAMES) == sorted(ACTIVATIONS)
    assert _activations.SEVERAL == SEVERAL


def test_only_where_it_is_asked_for_and_several_at_once():
    model = Net(torch.relu, F.silu)
    for where, paths in (("*", ["one", "two"]), ("t*", ["two"]), ("none", [])):
        record = swapped(model, f"swap-activation{{old=relu|silu,new=gelu,budget=change<=9,where={where}}}")[
            1
        ]
        assert sorted(s.path for s in record.applied) == paths


def test_other_passes_take_it_from_there():
    model = Function(lambda x: F.gelu(x) * x.sin())
    fast, record = swapped(model, "fuse-glu", "swap-activation{old=gelu,new=silu,budget=change<=9}")
    assert len(record.applied) == len(fast.report()["fuse-glu"].applied) == 1
    assert "fxaccel.glu.default" in targets(session(fast).all[0].program)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), F.silu(X) * X.sin())


# -- it declines -----------------------------------------------------------------------------------

DECLINED = {
    "it is a part of relu_squared": (lambda x: torch.relu(x) ** 2, "relu"),
    "it is a part of quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), "sigmoid"),
    "it is of torch.int64": (lambda x: torch.relu(x.long()) * x, "relu"),
    "it is of torch.complex64": (lambda x: torch.view_as_real(torch.tanh(torch.complex(x, x))), "tanh"),
}


@pytest.mark.parametrize("sentence", DECLINED)
def test_declines_and_says_why(sentence):
    function, old = DECLINED[sentence]
    model = Function(function)
    fast, record = swapped(model, f"swap-activation{{old={old},new=gelu,budget=change<=9}}")
    assert [s.why for s in record.refused] == [sentence]
    assert (record.applied, record.error) == ([], "")
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))


def test_what_contains_the_old_one_can_take_its_place():
    fast, record = swapped(Net(torch.relu), "swap-activation{old=relu,new=relu_squared,budget=change<=9}")
    assert len(record.applied) == 1
    again = once_more(fast, old="relu", new="relu_squared")
    assert (again.applied, [s.why for s in again.refused]) == ([], ["it is a part of relu_squared"])


def test_above_the_budget_nothing_is_changed():
    model = Net()
    fast, record = swapped(model, "swap-activation{old=gelu,new=relu}")
    assert not record.applied
    assert "change is 1.0" in record.error
    assert "expected change<=0.01" in record.error
    assert change(model, fast) < 1e-6
    assert len(swapped(model, "swap-activation{old=gelu,new=relu,budget=change<=9}")[1].applied) == 2
    record = swapped(model, "swap-activation{old=gelu,new=relu}", calibration=[(X,)])[1]
    assert "on the calibration data, expected change<=0.01" in record.error


def test_it_needs_leave_and_does_not_run_by_default():
    assert "swap-activation" not in fxaccel.accelerate(Net(), example_inputs=(X,)).report()
    record = swapped(Net(), "swap-activation{old=gelu,new=relu}", allow="reassociated")[1]
    assert "it is of class 'approximate' and allow='reassociated'" in record.error


@pytest.mark.parametrize(("text", "words"), [
    ("swap-activation", "old of swap-activation is '', expected one of gelu, gelu_tanh, hardswish, mish,"),
    ("swap-activation{old=gleu,new=relu}", "old of swap-activation is 'gleu', expected one of gelu, "),
    ("swap-activation{old=gelu|elu,new=relu}", "old of swap-activation is 'elu', expected"),
    ("swap-activation{old=gelu,new=selu}", "new of swap-activation is 'selu', expected"),
    ("swap-activation{old=gelu|relu,new=relu}", "swaps 'relu' for itself"),
    ("swap-activation{old=gelu,new=relu,budget=little}", "the budget is 'little', expected a metric"),
])  # fmt: skip
def test_options_that_say_nothing_are_refused_at_once(text, words):
    with pytest.raises(OptionError) as told:
        discover.resolve([text])
    assert words in str(told.value)


# -- a second run finds nothing --------------------------------------------------------------------


def test_a_second_run_finds_nothing():
    fast = swapped(Net(), "swap-activation{old=gelu,new=gelu_tanh}")[0]
    record = once_more(fast, old="gelu", new="gelu_tanh")
    assert (record.applied, record.refused, record.error) == ([], [], "")
