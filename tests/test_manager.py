"""The pass manager: order, conflicts, transactions, limits, options, and what it asks of a pass."""

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel import manager, rule
from fxaccel.errors import OptionError, ProofError, RuleError
from fxaccel.listing import listing

F = nn.functional
aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Clamp(fxaccel.Rule):
    """relu becomes clamp."""

    name = "clamp"

    def pattern(self, op, x):
        return op.aten.relu.default(x)

    def rewrite(self, op, m):
        return op.aten.clamp.default(m.x, 0)


class Sigmoid(Clamp):
    """Never matches in Net."""

    name = "sigmoid"

    def pattern(self, op, x):
        return op.aten.sigmoid.default(x)


def made(name, **attributes):
    """A pass that does nothing."""
    return type(name, (fxaccel.Pass,), {"name": name, "apply": lambda *a: None, **attributes})()


def names(passes):
    return [p.name for p in manager.order(passes)]


def run(one, function=torch.relu, **options):
    """A pass over `Net`, and the program before it."""
    from fxaccel.canonical import canonicalize
    from fxaccel.capture import capture

    program = capture(Net(), (torch.randn(4, 6),), {})
    canonicalize(program)
    return program, manager.run(program, [one], **options)


# -- order -----------------------------------------------------------------------------------------


def test_passes_run_by_step_then_by_need_then_as_given():
    low, plan = made("low", step="lower"), made("plan", step="plan")
    needs, gives = made("needs", requires=("f",)), made("gives", produces=("f",))
    b, a = made("b"), made("a")
    assert names([low, plan, needs, gives, b, a]) == ["gives", "needs", "b", "a", "plan", "low"]


def test_a_pass_that_invalidates_runs_after_those_that_still_need():
    spoils = made("spoils", invalidates=("f",))
    needs, gives = made("needs", requires=("f",)), made("gives", produces=("f",))
    assert names([spoils, needs, gives]) == ["gives", "needs", "spoils"]


def test_a_circle_is_refused():
    a = made("a", requires=("x",), produces=("y",))
    b = made("b", requires=("y",), produces=("x",))
    with pytest.raises(OptionError, match=r"in a circle: (a -> b|b -> a)"):
        manager.order([a, b])


def test_conflicts_unmet_needs_and_doubles_are_refused_before_anything_changes():
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cases = [
        ([made("a", conflicts=("b",)), made("b")], "passes 'a' and 'b' cannot run together"),
        ([made("a", requires=("f",))], "requires 'f', which no other pass given produces"),
        ([made("a"), made("a")], "'a' was given twice"),
    ]
    for passes, words in cases:
        with pytest.raises(OptionError, match=words):
            fxaccel.accelerate(model, passes=passes, example_inputs=(torch.randn(2, 6),))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_a_conflict_holds_in_both_orders():
    with pytest.raises(OptionError, match="cannot run together"):
        manager.order([made("b"), made("a", conflicts=("b",))])


# -- transactions ----------------------------------------------------------------------------------


def breaking(name, apply):
    return type(name, (fxaccel.Pass,), {"name": name, "apply": apply})


def _relu(program):
    return next(n for n in program.graph.nodes if n.target is aten.relu.default)


def raises_half_way(self, program, plan, driver):
    _relu(program).replace_all_uses_with(_relu(program).args[0])
    program.notes.append("a note of the pass")
    raise ZeroDivisionError("half way")


def reads_later_value(self, program, plan, driver):
    node = _relu(program)
    node.args = (next(iter(node.users)),)


def changes_dtype(self, program, plan, driver):
    out = program.graph.output_node()
    last = out.args[0][0]
    with program.graph.inserting_before(out):
        new = driver.call(last, aten.to.dtype, last, torch.float64)
    out.args = ((new,),)


def changes_shape(self, program, plan, driver):
    out = program.graph.output_node()
    last = out.args[0][0]
    with program.graph.inserting_before(out):
        new = driver.call(last, aten.sum.dim_IntList, last, [0])
    out.args = ((new,),)


def drops_output(self, program, plan, driver):
    program.graph.output_node().args = ((),)


def drops_input(self, program, plan, driver):
    x = program.placeholder(next(n for n in program.inputs if n))
    weight = next(n for n in program.graph.nodes if n.name in program.state)
    x.replace_all_uses_with(weight)
    program.graph.erase_node(x)


def without_meta(self, program, plan, driver):
    relu = _relu(program)
    with program.graph.inserting_after(relu):
        new = program.graph.call_function(aten.neg.default, (relu,))
    relu.replace_all_uses_with(new, delete_user_cb=lambda u: u is not new)


@pytest.mark.parametrize(
    ("apply", "words"),
    [
        (raises_half_way, "ZeroDivisionError: half way"),
        (reads_later_value, "used before it has been defined"),
        (changes_dtype, "changed the type of output 0"),
        (changes_shape, "changed the type of output 0"),
        (drops_output, "left 0 outputs of 1"),
        (drops_input, "changed the inputs of the graph"),
        (without_meta, "without meta['val']"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_pass_that_breaks_something_is_rolled_back_and_the_next_runs_on(apply, words):
    bad = breaking("breaks", apply)
    program, done = run(bad())
    before = listing(program, ends=True)
    (record,) = done.report.passes
    assert words in record.error
    assert listing(done.program, ends=True) == before
    assert "a note of the pass" not in done.report.notes
    model, x = Net(), torch.randn(4, 6)
    with pytest.warns(UserWarning, match="breaks"):
        fast = fxaccel.accelerate(model, passes=[bad, Clamp], example_inputs=(x,))
    assert len(fast.report()["clamp"].applied) == 1
    torch.testing.assert_close(fast(x), model(x))


def test_under_strict_a_failing_pass_raises_what_it_raised():
    with pytest.raises(ZeroDivisionError):
        fxaccel.accelerate(
            Net(),
            passes=[breaking("breaks", raises_half_way)],
            strict=True,
            example_inputs=(torch.randn(4, 6),),
        )


def test_a_failing_plan_is_rolled_back_too():
    class Plans(fxaccel.Pass):
        name = "plans"

        def plan(self, program):
            raise ValueError("no plan")

    _, done = run(Plans())
    assert done.report.passes[0].error == "ValueError: no plan"


def test_a_pass_without_apply_says_so():
    with pytest.raises(RuleError, match="'nothing' has no apply method"):
        type("N", (fxaccel.Pass,), {"name": "nothing"})().apply(None, None, None)
    for method in ("pattern", "refuse", "rewrite"):
        bare = type("Bare", (fxaccel.Rule,), {"name": "bare"})()
        if method == "refuse":
            assert list(bare.refuse(None)) == []
        else:
            with pytest.raises(RuleError, match=f"has no {method} method"):
                getattr(bare, method)(None, None)


def test_a_keyboard_interrupt_is_no_failure_of_a_pass():
    def interrupted(self, program, plan, driver):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(breaking("stops", interrupted)())


def test_dead_code_of_a_pass_is_taken_out_and_effects_stay():
    def leaves_dead(self, program, plan, driver):
        relu = _relu(program)
        with program.graph.inserting_after(relu):
            driver.call(relu, aten.neg.default, relu)

    program, done = run(breaking("leaves-dead", leaves_dead)())
    assert listing(done.program) == listing(program)


def test_a_pass_that_asks_a_symbolic_size_for_its_value_restricts_the_capture_and_says_so():
    """`int(size)` in a pass bakes the example's size in; other sizes then need a capture of their own."""

    def bakes(self, program, plan, driver):
        relu = _relu(program)
        if int(relu.meta["val"].shape[0]) == 4:
            driver.applied(relu)

    model = Net()
    fast = fxaccel.accelerate(model, passes=[breaking("bakes", bakes)], example_inputs=(torch.randn(4, 6),))
    (report,) = fast.report().captures
    assert any("bakes decided on sizes: this capture serves" in n for n in report.notes)
    x = torch.randn(5, 6)
    with pytest.warns(UserWarning, match="applied nowhere"):
        torch.testing.assert_close(fast(x), model(x))
    assert len(fast.report().captures) == 2


def test_what_canonicalization_relies_on_is_a_condition_of_the_capture(monkeypatch):
    from fxaccel.canonical import canonicalize

    def relying(program):
        assert program.placeholder(program.inputs[0]).meta["val"].shape[0] > 3
        return canonicalize(program)

    monkeypatch.setattr("fxaccel.session.canonicalize", relying)
    fast = fxaccel.accelerate(Net(), passes=[], example_inputs=(torch.randn(4, 6),))
    accepts = fast.__dict__["_fxaccel"].all[0].accepts
    assert accepts(torch.randn(9, 6))
    assert not accepts(torch.randn(3, 6))


def test_a_pass_that_branches_on_a_symbolic_size_does_too():
    def branches(self, program, plan, driver):
        relu = _relu(program)
        if relu.meta["val"].shape[0] > 3:
            driver.applied(relu)

    fast = fxaccel.accelerate(
        Net(), passes=[breaking("branches", branches)], example_inputs=(torch.randn(4, 6),)
    )
    fast(torch.randn(9, 6))
    assert len(fast.report().captures) == 1
    with pytest.warns(UserWarning, match="applied nowhere"):
        fast(torch.randn(3, 6))
    assert len(fast.report().captures) == 2


# -- strict, expect, allow, unused -----------------------------------------------------------------


def test_a_requested_pass_that_applied_nowhere_warns_with_the_reason_and_raises_under_strict():
    x = torch.randn(4, 6)
    with pytest.warns(UserWarning, match=r"'sigmoid' applied nowhere; no operator of its pattern"):
        fxaccel.accelerate(Net(), passes=[Sigmoid], example_inputs=(x,))
    with pytest.raises(ProofError, match="'sigmoid' applied nowhere"):
        fxaccel.accelerate(Net(), passes=[Sigmoid], strict=True, example_inputs=(x,))


def test_the_default_passes_apply_nowhere_in_silence(recwarn):
    fxaccel.accelerate(Net(), example_inputs=(torch.randn(4, 6),))
    assert [str(w.message) for w in recwarn if "applied nowhere" in str(w.message)] == []


def test_expect_counts_the_sites():
    x = torch.randn(4, 6)
    fxaccel.accelerate(Net(), passes=[Clamp], expect={"clamp": 1}, example_inputs=(x,))
    with pytest.raises(ProofError, match="'clamp' rewrote 1 sites, expected 2"):
        fxaccel.accelerate(Net(), passes=[Clamp], expect={"clamp": 2}, example_inputs=(x,))
    with pytest.raises(OptionError, match="expect names the pass 'other'"):
        fxaccel.accelerate(Net(), passes=[Clamp], expect={"other": 2})


@pytest.mark.parametrize("allow", rule.NUMERICS)
@pytest.mark.parametrize("numerics", rule.NUMERICS)
def test_allow_sets_the_loosest_class(allow, numerics):
    one = type("Classed", (Clamp,), {"name": "classed", "numerics": numerics})()
    _, done = run(one, allow=allow)
    permitted = rule.NUMERICS.index(numerics) <= rule.NUMERICS.index(allow)
    assert bool(done.report.passes[0].applied) is permitted
    assert ("pass allow=" in done.report.passes[0].error) is not permitted


def test_a_pass_for_inference_stays_out_of_training_captures():
    one = type("Infers", (Clamp,), {"name": "infers", "serves": ("inference",)})
    model, x = Net(), torch.randn(4, 6)
    fast = fxaccel.accelerate(model, passes=[one])
    with pytest.warns(UserWarning, match="serves inference only"):
        fast(x)
    with torch.no_grad():
        fast(x)
    assert [len(c.passes[0].applied) for c in fast.report().captures] in ([0, 1], [1, 0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"allow": "loose"}, "allow is 'loose'"),
        ({"backend": "onnx"}, "backend is 'onnx'"),
        ({"max_captures": 0}, "max_captures is 0"),
        ({"passes": "clamp"}, "passes= is the string 'clamp', expected a list"),
        ({"passes": [3]}, "passes= holds 3"),
        ({"passes": ["fuse-norms"]}, "there is no pass 'fuse-norms'"),
        ({"example_inputs": 3}, "example_inputs is a int"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_wrong_options_are_option_errors(arguments, words):
    with pytest.raises(OptionError, match=words):
        fxaccel.accelerate(Net(), **arguments)


def test_what_is_no_model_of_its_own_is_refused():
    with pytest.raises(OptionError, match="model is a int"):
        fxaccel.accelerate(3)
    with pytest.raises(OptionError, match="accelerate the model itself, with backend='inductor'"):
        fxaccel.accelerate(torch.compile(Net()))
    with pytest.raises(OptionError, match="accelerate the module inside it"):
        fxaccel.accelerate(nn.DataParallel(Net()))
    with pytest.raises(OptionError, match="no graph of its own"):
        fxaccel.accelerate(torch.jit.trace(Net(), torch.randn(2, 6)))
