"""Budgets: how they are written, and what their metrics say of calls."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fxaccel.errors import OptionError
from fxaccel.quality import Budget, Measured, divergence, relative
from fxaccel.structure import flatten


@pytest.mark.parametrize(
    ("given", "metric", "limit", "text"),
    [
        ("change<=0.01", "change", 0.01, "change<=0.01"),
        (" kl <= 2e-2 ", "kl", 0.02, "kl<=0.02"),
        ("loss<=+1%", "loss", 0.01, "loss<=1.000%"),
        ("loss<=+0.05", "loss", 0.05, "loss<=0.05"),
        ("size<=50%", "size", 0.5, "size<=0.5"),
        (0.25, "change", 0.25, "change<=0.25"),
        (Budget("kl", 1.0), "kl", 1.0, "kl<=1"),
    ],
)
def test_a_budget_is_written_as_a_metric_and_its_limit(given, metric, limit, text):
    budget = Budget.of(given)
    assert (budget.metric, budget.limit, str(budget)) == (metric, pytest.approx(limit), text)
    assert budget.relative == (given == "loss<=+1%")
    assert budget.of_size == (metric == "size")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("kl<0.02", "the budget is 'kl<0.02', expected a metric and its limit"),
        ("kl<=much", "expected a metric and its limit"),
        ("kl<=1e-e", "expected a metric and its limit"),
        ("kl<=-1", "limit is -1.0, expected a number of at least 0"),
        ("bleu<=1", "a budget is on 'bleu', expected one of change, kl, loss, size"),
        (-0.5, "limit is -0.5"),
        (math.nan, "limit is nan"),
    ],
)
def test_anything_else_is_an_error_that_says_what_was_expected(given, words):
    with pytest.raises(OptionError) as error:
        Budget.of(given)
    assert words in str(error.value)


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor
    loss: Tensor


torch.utils._pytree.register_dataclass(Output)


def leaves(value):
    flat, spec = flatten((value, []))
    return flat, spec


def measured(budget, old, new):
    (a, spec), (b, _) = leaves(old), leaves(new)
    return Budget.of(budget).measure(spec, a, b)


OLD = Output(torch.ones(2, 3), torch.tensor([[0.0, 0.0]]), torch.tensor(2.0))
NEW = Output(torch.ones(2, 3), torch.tensor([[0.0, math.log(3)]]), torch.tensor(2.5))


def test_kl_and_loss_are_those_of_the_outputs_with_these_names():
    # softmax goes from (1/2, 1/2) to (1/4, 3/4)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert measured("kl<=1", OLD, NEW) == pytest.approx(expected)
    assert measured("loss<=1", OLD, NEW) == (2.0, 2.5)
    as_dict = [{"a": torch.ones(2, 3), "logits": o.logits} for o in (OLD, NEW)]
    assert measured("kl<=1", *as_dict) == pytest.approx(expected)


def test_without_names_the_first_fitting_outputs_count():
    old, new = [(torch.arange(3), o.loss, o.logits) for o in (OLD, NEW)]
    assert measured("kl<=1", old, new) > 0.1
    assert measured("loss<=1", old[1], new[1]) == (2.0, 2.5)
    with pytest.raises(OptionError, match="a budget on loss needs a model that returns one"):
        measured("loss<=1", old, new)
    with pytest.raises(OptionError, match="a budget on kl needs logits"):
        measured("kl<=1", old[:2], new[:2])


def test_change_is_that_of_the_output_that_changes_most():
    assert measured("change<=1", OLD, NEW) == 1.0  # the old logits are zero
    moved = Output(OLD.hidden * 1.1, OLD.logits, torch.tensor(2.5))
    assert measured("change<=1", OLD, moved) == pytest.approx(0.25)


def test_a_function_of_the_users_sees_results_as_the_model_returns_them():
    lost = Budget("rise", 1.0, lambda old, new: float(new.loss - old.loss))
    assert measured(lost, OLD, NEW) == pytest.approx(0.5)
    assert lost.together([0.5, 1.5]) == Measured(1.0, 0.5)


def test_calls_come_together_as_the_metric_asks():
    assert Budget.of("kl<=1").together([1.0, 2.0, 3.0]) == Measured(2.0, pytest.approx(1 / math.sqrt(3)))
    assert Budget.of("change<=1").together([0.1, 0.3]) == Measured(0.3)
    assert Budget.of("loss<=1").together([(2.0, 2.5), (4.0, 4.5)]) == Measured(0.5)
    assert Budget.of("loss<=1%").together([(1.0, 1.5), (3.0, 3.5)]).value == pytest.approx(0.25)
    assert Budget.of("kl<=1").together([1.0, math.nan]).value == math.inf
    assert str(Measured(0.01234, 0.0005)) == "0.0123 +- 0.0005"


def test_divergence_takes_what_is_impossible_in_both_for_equal():
    old = torch.tensor([[0.0, 0.0, -math.inf]])
    assert divergence(old, old) == 0
    assert divergence(old, torch.tensor([[0.0, -math.inf, -math.inf]])) == math.inf
    assert divergence(old, torch.tensor([[0.0, math.nan, 0.0]])) == math.inf


def test_a_value_that_is_lost_is_above_every_budget():
    old = torch.tensor([3.0, 4.0, -torch.inf, torch.nan]).double()
    assert relative(old, old) == 0
    assert relative(old, old + torch.tensor([0.0, 0.5, 0.0, 0.0])) == pytest.approx(0.1)
    assert relative(old, old.nan_to_num(1.0)) == math.inf
    for place in range(3):
        new = old.clone()
        new[place] = torch.nan
        assert relative(old, new) == math.inf
