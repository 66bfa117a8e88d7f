"""Patterns: what matches and what does not."""

import operator

import pytest
import torch
from torch import nn

from fxaccel.errors import RuleError
from fxaccel.pattern import ANY, Match, Pattern, same
from tests.test_rules import captured, last, matched, missed

F = nn.functional
aten = torch.ops.aten


def test_a_parameter_matches_any_value_and_binds_it():
    m = matched(
        lambda op, x, y: op.aten.sub.Tensor(x, y), lambda a, b: a - b, torch.ones(3, 4), torch.ones(3, 4)
    )
    assert isinstance(m, Match)
    assert (m.x, m.y) == m.root.args
    assert m.val("x").shape[1] == m.val("x", "y")[1].shape[1]


def test_a_parameter_that_stands_twice_must_be_one_value():
    def square(op, x):
        return op.aten.mul.Tensor(x, x)

    assert matched(square, lambda a: a * a)
    miss = matched(square, lambda a, b: a * b, torch.ones(3, 4), torch.ones(3, 4))
    assert "in one place and" in miss.why


def test_a_literal_matches_itself_only():
    def double(op, x):
        return op.aten.mul.Tensor(x, 2)

    assert matched(double, lambda a: a * 2)
    assert "it is 3, the pattern has 2" in matched(double, lambda a: a * 3).why


def test_true_is_not_one_and_one_is_not_true():
    pattern = Pattern.trace(lambda op, x: op.aten.mean.dim(x, [-1], True))
    program = captured(lambda a: a.mean(-1, keepdim=True))
    assert pattern.find(program, last(program)).root
    assert same(True, True)
    assert not same(1, True)
    assert not same(False, 0)
    assert same([1, 2.0], (1, 2))
    assert not same([1], [1, 2])


def test_an_unwritten_argument_matches_the_default_of_the_schema_only():
    def add(op, x, y):
        return op.aten.add.Tensor(x, y)

    ones = torch.ones(3, 4)
    assert matched(add, lambda a, b: a + b, ones, ones).root
    miss = matched(add, lambda a, b: torch.add(a, b, alpha=2), ones, ones)
    assert "argument 'alpha'" in miss.why
    assert "it is 2, the pattern has 1" in miss.why


def test_an_argument_written_in_full_matches_the_default_too():
    def add(op, x, y):
        return op.aten.add.Tensor(x, y, alpha=1)

    assert matched(add, lambda a, b: a + b, torch.ones(3, 4), torch.ones(3, 4)).root


def test_any_matches_everything_and_binds_nothing():
    m = matched(lambda op, x: op.aten.mul.Tensor(x, ANY), lambda a: a * 7)
    assert set(m.bound) == {"x"}


@pytest.mark.parametrize("written", [lambda a: a.exp() + a, lambda a: a + a.exp()], ids=["first", "second"])
def test_operands_of_commuting_operators_match_in_either_order(written):
    def pattern(op, x):
        return op.aten.add.Tensor(op.aten.exp.default(x), x)

    assert matched(pattern, written).root


def test_operands_of_a_subtraction_do_not_commute():
    def pattern(op, x):
        return op.aten.sub.Tensor(op.aten.exp.default(x), x)

    assert missed(pattern, lambda a: a - a.exp())


def test_commuting_is_tried_again_when_a_later_clause_fails():
    def pattern(op, x, y):
        total = op.aten.add.Tensor(x, y)
        return op.aten.mul.Tensor(total, op.aten.exp.default(y))

    ones = torch.ones(3, 4)
    m = matched(pattern, lambda a, b: (a + b) * a.exp(), ones, ones)
    assert m.y is m.root.args[1].args[0]


def test_alternatives_are_tried_in_order_and_tagged():
    def pattern(op, x):
        return op.either(sine=op.aten.sin.default(x), cosine=op.aten.cos.default(x))

    assert matched(pattern, lambda a: a.cos()).tags == {"cosine"}
    m = matched(pattern, lambda a: a.sin())
    assert m.chose("sine")
    assert not m.chose("cosine")


def test_a_name_of_another_alternative_is_none():
    def pattern(op, x, scale):
        return op.either(
            scaled=op.aten.mul.Tensor(op.aten.exp.default(x), scale), plain=op.aten.exp.default(x)
        )

    assert matched(pattern, lambda a: a.exp()).scale is None
    assert matched(pattern, lambda a: a.exp() * 3).scale == 3
    with pytest.raises(AttributeError, match="the pattern has no parameter 'nothing'"):
        _ = matched(pattern, lambda a: a.exp()).nothing


def test_lists_match_item_by_item():
    def pattern(op, x, y):
        return op.aten.cat.default([x, op.aten.exp.default(y)], 1)

    assert matched(pattern, lambda a: torch.cat([a, a.exp()], 1)).root
    assert missed(pattern, lambda a: torch.cat([a.exp(), a], 1))
    assert "the pattern has 2 items" in matched(pattern, lambda a: torch.cat([a, a, a], 1)).why


def test_results_of_an_operator_with_several_are_told_apart():
    def first(op, x):
        values, _ = op.aten.topk.default(x, 2)
        return values

    assert matched(first, lambda a: a.topk(2)[0]).root.target is operator.getitem
    assert "is not result 0 of aten.topk.default" in matched(first, lambda a: a.topk(2)[1]).why


def test_a_shared_subterm_must_be_one_node():
    def pattern(op, x):
        inner = op.aten.exp.default(x)
        return op.aten.sub.Tensor(op.aten.sin.default(inner), inner)

    assert matched(pattern, lambda a: (e := a.exp()).sin() - e).root
    assert missed(pattern, lambda a: a.exp().sin() - a.exp())


def test_a_wrong_pattern_is_a_rule_error():
    with pytest.raises(RuleError, match="has no argument 'beta'"):
        Pattern.trace(lambda op, x: op.aten.add.Tensor(x, x, beta=2))
    with pytest.raises(RuleError, match="must return operator calls"):
        Pattern.trace(lambda op, x: x)
    with pytest.raises(AttributeError):
        Pattern.trace(lambda op, x: op.aten.no_such_operator.default(x))


def test_sizes_are_named_in_refusals():
    def pattern(op, q, k):
        return op.aten.matmul.default(q, k)

    m = matched(pattern, lambda a, b: a @ b, torch.ones(2, 3, 4), torch.ones(4, 5))
    assert list(m.shapes(q="B S D")) == []
    assert list(m.shapes(q="B S D", k="B D E")) == ["k has 2 dimensions, the rule needs 3 (B D E)"]
    (sentence,) = m.shapes(q="B S D", k="B E")
    assert "B is" in sentence
    assert " in q and " in sentence
