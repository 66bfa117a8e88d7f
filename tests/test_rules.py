"""Patterns and rules: what matches, what nearly does and why not, and what no rule may touch."""

import operator

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel import manager
from fxaccel.capture import capture
from fxaccel.pattern import ANY, Miss, Pattern
from tests.helpers import Function

F = nn.functional
aten = torch.ops.aten


def captured(function, *args):
    model = function if isinstance(function, nn.Module) else Function(function)
    return capture(model, args or (torch.randn(3, 4),), {})


def last(program):
    """The node that computes the (first) output."""
    return program.graph.output_node().args[0][0]


def calls(program):
    return [n.target for n in program.graph.nodes if n.op == "call_function"]


def matched(pattern, function, *args):
    """The match, or miss, of `pattern(op, x, ...)` at the output of a function."""
    program = captured(function, *args)
    return Pattern.trace(pattern).find(program, last(program))


def missed(pattern, function, *args):
    return isinstance(matched(pattern, function, *args), Miss)


def applied(pattern, function, *args, rewrite=None, refuse=None, **attributes):
    """The report of one rule over a function, without canonicalization."""
    cls = type("TheRule", (fxaccel.Rule,), {
        "name": "the-rule",
        "pattern": lambda self, op, *v: None,
        "rewrite": rewrite or (lambda self, op, m: op.aten.clone.default(m.root)),
        **({"refuse": refuse} if refuse else {}), **attributes,
    })  # fmt: skip
    cls.pattern = pattern
    program = captured(function, *args)
    run = manager.run(program, [cls()])
    return run.report.passes[0], run.program


# -- near misses and refusals ----------------------------------------------------------------------


def norm_like(self, op, x, eps):
    total = op.aten.add.Tensor(op.aten.mean.dim(x, [-1], True), eps)
    return op.aten.mul.Tensor(x, op.aten.rsqrt.default(total))


def test_a_near_miss_names_the_first_clause_that_failed_with_the_users_line():
    report, _ = applied(norm_like, lambda a: a * (a.mean(0, keepdim=True) + 1e-6).rsqrt())
    (miss,) = report.near_misses
    assert miss.why == "argument 'dim' of aten.mean.dim: it is 0, the pattern has -1"
    assert miss.source.startswith("helpers.py:")
    report, _ = applied(norm_like, lambda a: a * (a.sum(-1, keepdim=True) + 1e-6).rsqrt())
    assert report.near_misses[0].why == "aten.sum.dim_IntList stands where the pattern has aten.mean.dim"


@pytest.mark.parametrize(
    ("function", "change"),
    [
        (
            lambda a: a * (a.mean(0, keepdim=True) + 1e-6).rsqrt(),
            "-1 there, as argument 'dim' of aten.mean.dim",
        ),
        (lambda a: a * (a.mean(-1) + 1e-6).rsqrt(), "True there, as argument 'keepdim' of aten.mean.dim"),
        (
            lambda a: a * (a.sum(-1, keepdim=True) + 1e-6).rsqrt(),
            "aten.mean.dim in the place of aten.sum.dim_IntList",
        ),
        (
            lambda a: a * ((a + 1).mean(-1, keepdim=True) + 1e-6).rsqrt(),
            "the same x in both places, as argument 'self' of aten.mean.dim",
        ),
        (lambda a: a * (a.mean((-1, 0), keepdim=True) + 1e-6).rsqrt(), "1 items there, as argument 'dim' of"),
    ],
)
def test_a_near_miss_says_what_would_match(function, change):
    rewrite = lambda self, op, m: op.aten.rms_norm.default(m.x, [4])  # noqa: E731
    x = torch.randn(4, 4)
    report, _ = applied(norm_like, function, x, rewrite=rewrite)
    assert report.near_misses[0].change.startswith(change)
    right = lambda a: a * (a.mean(-1, keepdim=True) + 1e-6).rsqrt()  # noqa: E731
    assert not missed(lambda op, x, eps: norm_like(None, op, x, eps), right, x)


def test_a_refusal_says_what_would_change_it_where_each_of_its_sentences_knows():
    sentences = [fxaccel.rule.Refusal("it is odd", "an even one")]
    refuse = lambda self, m: iter(sentences)  # noqa: E731
    report, _ = applied(exp_of_sin, lambda a: a.sin().exp(), refuse=refuse)
    assert [(s.why, s.change) for s in report.refused] == [("it is odd", "an even one")]
    sentences.append(fxaccel.rule.Refusal("it is large", "a small one"))
    report, _ = applied(exp_of_sin, lambda a: a.sin().exp(), refuse=refuse)
    assert [(s.why, s.change) for s in report.refused] == [
        ("it is odd; it is large", "an even one; a small one")
    ]
    sentences.append("it is what it is")
    report, _ = applied(exp_of_sin, lambda a: a.sin().exp(), refuse=refuse)
    assert [s.change for s in report.refused] == [""]


def test_a_node_that_only_shares_the_root_is_no_near_miss():
    report, _ = applied(norm_like, lambda a: a * 2)
    assert report.near_misses == []


def exp_of_sin(self, op, x):
    return op.aten.exp.default(op.aten.sin.default(x))


def exp_of_sin_again(self, op, m):
    return op.aten.exp.default(op.aten.mul.Tensor(op.aten.sin.default(m.x), 1.0))


def test_an_intermediate_that_is_read_elsewhere_is_refused():
    report, _ = applied(exp_of_sin, lambda a: ((s := a.sin()).exp(), s * 2), rewrite=exp_of_sin_again)
    assert report.applied == []
    assert "the intermediate aten.sin is also read by aten.mul.Tensor at helpers.py:" in report.refused[0].why
    assert report.refused[0].change == "compute aten.sin for aten.mul.Tensor once more"
    report, _ = applied(exp_of_sin, lambda a: ((s := a.sin()).exp(), s), rewrite=exp_of_sin_again)
    assert "also read by the output" in report.refused[0].why


def test_an_intermediate_that_the_pattern_returns_may_be_read_elsewhere():
    def pattern(self, op, x):
        inner = op.aten.sin.default(x)
        return op.aten.exp.default(inner), inner

    def rewrite(self, op, m):
        inner = op.aten.mul.Tensor(op.aten.sin.default(m.x), 1.0)
        return op.aten.exp.default(inner), inner

    def once(self, m):
        if m.root.meta.get("by"):
            yield "it is done"

    report, program = applied(pattern, lambda a: ((s := a.sin()).exp(), s * 2), rewrite=rewrite, refuse=once)
    assert len(report.applied) == 1
    names = [n.name for n in program.graph.nodes if n.op == "call_function"]
    assert "exp" in names  # new nodes stand under the old names
    assert program.graph.find_nodes(op="call_function", target=aten.exp.default)[0].meta["by"] == "the-rule"


def test_a_site_across_the_border_of_a_region_is_refused():
    def across(a):
        with torch.no_grad():
            s = a.sin()
        return s.exp()

    x = torch.randn(3, 4, requires_grad=True)
    report, _ = applied(exp_of_sin, across, x, rewrite=exp_of_sin_again)
    assert "partly inside a no_grad" in report.refused[0].why


def test_a_site_inside_one_region_is_rewritten_inside_it():
    def inside(a):
        with torch.no_grad():
            e = a.sin().exp()
        return e * a

    def once(self, m):
        if m.root.meta.get("by"):
            yield "it is done"

    def rewrite(self, op, m):
        return op.aten.exp.default(op.aten.neg.default(op.aten.neg.default(op.aten.sin.default(m.x))))

    x = torch.randn(3, 4, requires_grad=True)
    report, program = applied(exp_of_sin, inside, x, rewrite=rewrite, refuse=once)
    assert len(report.applied) == 1, report
    assert {r.kind for n in program.graph.nodes if n.meta.get("by") for r in n.meta["regions"]} == {"grad"}


def test_values_that_are_written_in_place_are_refused():
    def written(a):
        s = a.sin()
        e = s.exp()
        a.mul_(2)
        return e

    report, _ = applied(exp_of_sin, written, rewrite=exp_of_sin_again)
    assert "is written in place by aten.mul_" in report.refused[0].why


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_what_was_written_before_all_of_the_site_is_as_any_other_value(when):
    """A cache that a step writes to, and reads from then on."""

    def cached(a):
        rows = a[:2]
        if when == "before":
            rows.mul_(2)
        s = rows.sin()
        if when == "between":
            rows.mul_(2)
        e = s.exp()
        if when == "after":
            rows.mul_(2)
        return e

    report, _ = applied(exp_of_sin, cached, rewrite=exp_of_sin_again)
    assert len(report.applied) == (when == "before")


def test_random_operators_are_refused():
    def pattern(self, op, x):
        return op.aten.exp.default(op.aten.dropout.default(x, 0.5, True))

    report, _ = applied(pattern, lambda a: F.dropout(a, 0.5, True).exp())
    assert "aten.dropout draws random numbers" in report.refused[0].why


def test_dropout_that_drops_nothing_is_not_random():
    def pattern(self, op, x):
        return op.aten.exp.default(op.aten.dropout.default(x, 0.5, False))

    report, _ = applied(
        pattern, lambda a: F.dropout(a, 0.5, False).exp(), rewrite=lambda s, op, m: op.aten.exp.default(m.x)
    )
    assert len(report.applied) == 1


def test_operators_with_an_effect_are_refused():
    def pattern(self, op, x, w, b, mean, var):
        return op.aten.relu.default(op.aten.batch_norm.default(x, w, b, mean, var, True, 0.1, 1e-5, ANY))

    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    report, _ = applied(pattern, model)
    assert report.applied == []
    assert (
        "is written in place by aten.batch_norm" in report.refused[0].why or "effect" in report.refused[0].why
    )


@pytest.mark.parametrize("bad", [True, None, 3, ["words"]], ids=str)
def test_refuse_must_yield_sentences(bad):
    def refuse(self, m):
        yield bad

    report, _ = applied(exp_of_sin, lambda a: a.sin().exp(), refuse=refuse)
    assert f"TheRule.refuse must yield str, got {bad!r}" in report.error


def test_every_sentence_of_refuse_is_kept():
    def refuse(self, m):
        yield "one"
        yield "two"

    report, _ = applied(exp_of_sin, lambda a: a.sin().exp(), refuse=refuse)
    assert report.refused[0].why == "one; two"
    assert report.error == ""


# -- rewriting -------------------------------------------------------------------------------------


def test_a_rule_that_feeds_on_its_own_output_is_stopped_and_rolled_back():
    def pattern(self, op, x):
        return op.aten.neg.default(x)

    def rewrite(self, op, m):
        return op.aten.neg.default(op.aten.neg.default(op.aten.neg.default(m.x)))

    report, program = applied(pattern, lambda a: -a, rewrite=rewrite)
    assert "feeds on its own output" in report.error
    assert report.applied == []
    assert calls(program) == [aten.neg.default]


def test_the_largest_match_wins_and_rules_are_tried_in_order():
    class Large(fxaccel.Rule):
        def pattern(self, op, x):
            return op.aten.tanh.default(op.aten.relu.default(x))

        def rewrite(self, op, m):
            return op.aten.tanh.default(op.aten.clamp.default(m.x, 0))

    class Small(fxaccel.Rule):
        def pattern(self, op, x):
            return op.aten.relu.default(x)

        def rewrite(self, op, m):
            return op.aten.clamp.default(m.x, 0)

    class Both(fxaccel.Rules):
        name = "both"
        rules = (Large, Small)

    run = manager.run(captured(lambda a: a.relu().tanh() + (a - 1).relu()), [Both()])
    assert sorted(s.rule for s in run.report.passes[0].applied) == ["Large", "Small"]


def test_a_rewrite_with_another_number_of_values_is_a_rule_error():
    report, _ = applied(exp_of_sin, lambda a: a.sin().exp(), rewrite=lambda s, op, m: (m.root, m.x))
    assert "returned 2 values, its pattern 1" in report.error
    report, _ = applied(exp_of_sin, lambda a: a.sin().exp(), rewrite=lambda s, op, m: 1.0)
    assert "TheRule.rewrite returned" in report.error


def test_a_rewrite_may_return_a_value_that_was_there():
    def pattern(self, op, x):
        return op.aten.neg.default(op.aten.neg.default(x))

    report, program = applied(pattern, lambda a: (a + 1).neg().neg(), rewrite=lambda s, op, m: m.x)
    assert len(report.applied) == 1, report
    assert calls(program) == [aten.add.Tensor]


def test_rewriting_to_an_operator_with_several_results_takes_them_apart():
    def pattern(self, op, x):
        return op.aten.amax.default(x, [-1])

    def rewrite(self, op, m):
        values, _ = op.aten.max.dim(m.x, -1)
        return values

    report, program = applied(pattern, lambda a: a.amax(-1), rewrite=rewrite, numerics="approximate")
    assert report.error.startswith("it is of class")
    with torch.no_grad():  # the gradient of amax is shared among equal values, max has one
        report, program = applied(pattern, lambda a: a.amax(-1), rewrite=rewrite)
    assert len(report.applied) == 1, report
    assert program.graph.find_nodes(op="call_function", target=operator.getitem)


def test_where_limits_a_rule_to_modules():
    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.one(x) + self.two(x - 1) + torch.relu(x + 3)

    class Clamp(fxaccel.Rule):
        name = "clamp"

        def pattern(self, op, x):
            return op.aten.relu.default(x)

        def rewrite(self, op, m):
            return op.aten.clamp.default(m.x, 0)

    counts = {
        where: [s.path for s in manager.run(captured(Tree()), [Clamp(where=where)]).report.passes[0].applied]
        for where in ("*", "two", "one|two", "t*", "nothing", "")
    }
    assert sorted(counts["*"]) == ["", "one", "two"]
    assert counts["two"] == counts["t*"] == ["two"]
    assert sorted(counts["one|two"]) == ["one", "two"]
    assert counts["nothing"] == []
    assert counts[""] == [""]


def test_a_second_run_finds_nothing():
    class Clamp(fxaccel.Rule):
        name = "clamp"

        def pattern(self, op, x):
            return op.aten.relu.default(x)

        def rewrite(self, op, m):
            return op.aten.clamp.default(m.x, 0)

    first = manager.run(captured(lambda a: a.relu()), [Clamp()])
    assert len(first.report.passes[0].applied) == 1
    assert manager.run(first.program, [Clamp()]).report.passes[0].applied == []


def test_the_replacement_is_computed_before_its_first_reader_and_after_its_inputs():
    def pattern(self, op, x):
        inner = op.aten.sin.default(x)
        return op.aten.exp.default(inner), inner

    def rewrite(self, op, m):
        inner = op.aten.cos.default(op.aten.sub.Tensor(m.x, torch.pi / 2))
        return op.aten.exp.default(inner), inner

    def function(a):
        s = a.sin()
        early = s * 3  # reads one of the two values before the other is there
        return early, s.exp()

    report, program = applied(pattern, function, rewrite=rewrite)
    assert len(report.applied) == 1, report
    program.graph.lint()
