"""The proof itself: how strict it is, on what inputs it tries, what it records, and that it repeats."""

import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxaccel
from fxaccel import evaluate, manager
from fxaccel.capture import capture
from fxaccel.errors import ProofError
from fxaccel.evaluate import _BY_DEFINITION, UNSTEADY, Calm, Unsteady
from fxaccel.proof import holds, materialise
from fxaccel.tolerance import share_of_tolerance
from tests.helpers import Function, agree, session

F = nn.functional
aten = torch.ops.aten


def proved(
    pattern, rewrite, function, *args, numerics="reassociated", allow="approximate", **methods
):  # fmt: skip
    """The run of one rule over a function."""
    cls = type("TheRule", (fxaccel.Rule,), {
        "name": "the-rule", "numerics": numerics, "pattern": pattern, "rewrite": rewrite, "refuse": done,
        **methods,
    })  # fmt: skip
    model = function if isinstance(function, nn.Module) else Function(function)
    program = capture(model, args or (torch.randn(4, 6),), {})
    return manager.run(program, [cls()], allow=allow)


def done(self, m):
    if m.root.meta.get("by"):
        yield "it is done"


def error(run):
    return run.report.passes[0].error


def scaled(self, op, x):
    return op.aten.mul.Tensor(op.aten.exp.default(x), 2)


@pytest.mark.parametrize(("factor", "right"), [(2.0, True), (2.0 + 1e-15, True), (2.0 + 1e-11, False)])
def test_the_algebra_is_tried_in_float64_where_small_mistakes_show(factor, right):
    """1e-11 is far below the rounding of float32, and yet no rounding of float64."""
    run = proved(
        scaled, lambda s, op, m: op.aten.mul.Tensor(op.aten.exp.default(m.x), factor), lambda a: a.exp() * 2
    )
    assert (error(run) == "") is right
    if not right:
        assert "in float64" in error(run)


def test_another_order_of_summation_passes():
    def pattern(self, op, x):
        return op.aten.sum.dim_IntList(x, [1])

    def rewrite(self, op, m):
        halves = op.aten.flip.default(m.x, [1])
        return op.aten.select.int(op.aten.cumsum.default(halves, 1), 1, -1)

    run = proved(pattern, rewrite, lambda a: a.sum(1), torch.randn(5, 300))
    assert error(run) == ""


def test_the_same_formula_in_lower_precision_does_not_pass_as_reassociation():
    def rewrite(self, op, m):
        low = op.aten.exp.default(op.aten.to.dtype(m.x, torch.float16))
        return op.aten.mul.Tensor(op.aten.to.dtype(low, torch.float32), 2)

    run = proved(scaled, rewrite, lambda a: a.exp() * 2)
    assert "times the tolerance in torch.float32 away from float64" in error(run)
    run = proved(scaled, rewrite, lambda a: a.exp() * 2, numerics="lower_precision")
    assert error(run) == ""
    (proof,) = run.manifest.proofs.values()
    assert proof.ok
    assert proof.error > 10  # measured and recorded all the same


def test_bitwise_means_every_bit():
    def sums(self, op, x):
        return op.aten.sum.dim_IntList(x, [1])

    def turned(self, op, m):
        return op.aten.sum.dim_IntList(op.aten.flip.default(m.x, [1]), [1])

    x = torch.randn(5, 333)
    assert error(proved(sums, turned, lambda a: a.sum(1), x)) == ""
    assert "inf times the tolerance" in error(proved(sums, turned, lambda a: a.sum(1), x, numerics="bitwise"))


def test_gradients_are_compared_where_they_flow_and_not_in_no_grad_regions():
    def pattern(self, op, x):
        return op.aten.exp.default(x)

    def rewrite(self, op, m):
        return op.aten.exp.default(op.aten.detach.default(m.x))

    def in_region(a):
        with torch.no_grad():
            e = a.exp()
        return e * a

    x = torch.randn(4, 6, requires_grad=True)
    assert "gradient" in error(proved(pattern, rewrite, lambda a: a.exp(), x))
    assert error(proved(pattern, rewrite, in_region, x)) == ""
    with torch.no_grad():
        assert error(proved(pattern, rewrite, lambda a: a.exp(), x)) == ""


def test_functions_of_positive_values_are_tried_on_positive_values():
    """Half of the logarithms of random numbers are NaN, which would compare nothing."""

    def pattern(self, op, x, y, z):
        first = op.aten.mul.Tensor(op.aten.rsqrt.default(x), op.aten.rsqrt.default(y))
        return op.aten.mul.Tensor(first, op.aten.rsqrt.default(z))

    def times(factor):
        def rewrite(self, op, m):
            x, y, z = (op.aten.reciprocal.default(op.aten.sqrt.default(v)) for v in (m.x, m.y, m.z))
            return op.aten.mul.Tensor(op.aten.mul.Tensor(op.aten.mul.Tensor(x, y), z), factor)

        return rewrite

    def function(x, y, z):
        return x.rsqrt() * y.rsqrt() * z.rsqrt()

    ones = [torch.rand(4, 6) + 1 for _ in range(3)]
    assert error(proved(pattern, times(1.0), function, *ones)) == ""
    assert "differs" in error(proved(pattern, times(1.001), function, *ones))


def test_a_site_that_cannot_be_tried_is_not_believed():
    def pattern(self, op, x):
        return op.aten.log.default(op.aten.sub.Tensor(op.aten.neg.default(op.aten.abs.default(x)), 1))

    run = proved(pattern, lambda s, op, m: op.aten.log.default(m.x), lambda a: (-a.abs() - 1).log())
    assert "no random input gave finite values to compare" in error(run)


@torch.library.custom_op("fxaccel_tests::of_equal_length", mutates_args=())
def of_equal_length(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.shape[0] != b.shape[0]:
        raise RuntimeError(f"{a.shape[0]} and {b.shape[0]} rows")
    return a * b.sum()


@of_equal_length.register_fake
def _(a, b):
    return torch.empty_like(a)  # as that of torch's attention, it does not say what must be equal


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_what_takes_no_other_sizes_is_tried_at_those_of_the_example(factor):
    def pattern(self, op, a, b):
        return op.fxaccel_tests.of_equal_length.default(a, b)

    def rewrite(self, op, m):
        return op.aten.mul.Tensor(op.aten.mul.Tensor(m.a, op.aten.sum.default(m.b)), factor)

    with torch.no_grad():
        run = proved(pattern, rewrite, of_equal_length, torch.randn(7, 2), torch.randn(7, 3))
    if factor == 1.0:
        (proof,) = run.manifest.proofs.values()
        assert [t.count("7") for t in proof.trials] == [2, 2]
        assert len(run.report.passes[0].applied) == 1
    else:
        assert "differs" in error(run)


def test_masks_and_indices_are_tried_with_both_values():
    def pattern(self, op, mask, x):
        return op.aten.where.ScalarOther(mask, x, 0.0)

    def wrong(self, op, m):
        return op.aten.clone.default(m.x)

    mask = torch.ones(4, 6, dtype=torch.bool)
    run = proved(pattern, wrong, lambda x, m: torch.where(m, x, 0.0), torch.randn(4, 6), mask)
    assert "differs" in error(run)


def test_equal_sites_are_proved_once_and_others_each():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.last = nn.Linear(6, 2)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.last(x)

    def pattern(self, op, x, w, b):
        return op.aten.linear.default(x, w, b)

    def rewrite(self, op, m):
        return op.aten.add.Tensor(op.aten.linear.default(m.x, m.w), m.b)

    run = proved(pattern, rewrite, Three(), torch.randn(4, 6))
    assert len(run.report.passes[0].applied) == 4
    assert sorted(run.manifest.sites.values()) == [1, 3]
    keys = {s.proof for s in run.report.passes[0].applied}
    assert keys == set(run.manifest.proofs)


def test_trials_are_at_small_unequal_sizes_odd_then_even_in_both_layouts():
    run = proved(
        scaled, lambda s, op, m: op.aten.mul.Tensor(op.aten.exp.default(m.x), 2.0), lambda a: a.exp() * 2
    )
    (proof,) = run.manifest.proofs.values()
    assert len(proof.trials) == 4
    assert sum("permuted" in t for t in proof.trials) == 2
    assert proof.trials[0] == "sizes 3, 5"
    assert proof.trials[2] == "sizes 4, 8"


def test_trial_sizes_obey_the_guards_of_the_capture():
    def halves(a):
        return a.view(a.shape[0] // 2, 2, -1).exp() * 2  # an even batch only

    run = proved(scaled, lambda s, op, m: op.aten.mul.Tensor(op.aten.exp.default(m.x), 2.0), halves)
    assert error(run) == ""
    assert run.report.passes[0].applied


def test_large_sizes_are_proved_at_small_ones():
    def pattern(self, op, x):
        return op.aten.exp.default(x)

    big = torch.zeros(1, 1).expand(3000, 3000)
    run = proved(
        pattern, lambda s, op, m: op.aten.exp.default(op.aten.mul.Tensor(m.x, 1.0)), lambda a: a.exp(), big
    )
    (proof,) = run.manifest.proofs.values()
    assert all("3000" not in t for t in proof.trials)


def test_a_large_size_that_could_be_any_is_proved_at_a_smaller_one():
    def head(factor):
        def rewrite(self, op, m):
            y = op.aten.matmul.default(m.x, op.aten.permute.default(m.w, [1, 0]))
            return op.aten.mul.Tensor(op.aten.reshape.default(y, [-1, 3000]), factor)

        return rewrite

    def pattern(self, op, x, w):
        return op.aten.reshape.default(op.aten.linear.default(x, w), [-1, 3000])

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3000, 4))

        def forward(self, x):
            return F.linear(x, self.w).reshape(-1, 3000)

    def run(factor, size):
        return proved(pattern, head(factor), Flat(), torch.randn(2, 5, 4), any_size=lambda s, m: size)

    (proof,) = run(1.0, 3000).manifest.proofs.values()
    assert proof.trials[0] == "sizes 3, 5, 509 for 3000"
    (whole,) = run(1.0, None).manifest.proofs.values()
    assert whole.trials[0] == "sizes 3, 5"
    assert "failed its proof: with sizes 3, 5, 509 for 3000 output 0 differs" in error(run(1.1, 3000))


def test_sizes_of_two_inputs_that_must_have_one_product_are_chosen_together():
    def pattern(self, op, x, y):
        return op.aten.cross_entropy_loss.default(x, y)

    def rewrite(self, op, m):
        return op.aten.nll_loss_nd.default(op.aten.log_softmax.int(m.x, 1), m.y)

    run = proved(
        pattern, rewrite, lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten()),
        torch.randn(2, 6, 7), torch.zeros(2, 6, dtype=torch.long),
    )  # fmt: skip
    (proof,) = run.manifest.proofs.values()
    assert proof.ok
    assert len(proof.trials) == 4


@pytest.mark.parametrize("factor", [0.4, 1.5, 1.6, 2.8])  # at which the original is lucky
def test_errors_on_the_way_to_a_result_of_higher_precision_count_as_what_they_are(factor):
    """The mean of many bfloat16 errors can come out at the float32 next to the exact one."""

    def pattern(self, op, x):
        capped = op.aten.tanh.default(op.aten.mul.Tensor(x, factor))
        return op.aten.mean.dim(capped, [0, 1], dtype=torch.float32)

    def once(self, op, m):  # rounds once where the original rounds twice
        wide = op.aten.tanh.default(op.aten.mul.Tensor(op.aten.to.dtype(m.x, torch.float32), factor))
        return op.aten.mean.dim(op.aten.to.dtype(wide, torch.bfloat16), [0, 1], dtype=torch.float32)

    def worse(self, op, m):  # loses six bits
        return pattern(self, op, op.aten.add.Tensor(op.aten.add.Tensor(m.x, 64.0), -64.0))

    def mean(x):
        return torch.tanh(x * factor).mean((0, 1), dtype=torch.float32)

    x = torch.rand(3, 5).bfloat16()
    assert len(proved(pattern, once, mean, x).report.passes[0].applied) == 1
    assert "away from float64" in error(proved(pattern, worse, mean, x))


def test_the_proof_draws_no_random_number_of_the_user():
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    proved(
        scaled,
        lambda s, op, m: op.aten.mul.Tensor(op.aten.exp.default(m.x), 2.0),
        lambda a: a.exp() * 2,
        torch.zeros(4, 6),
    )
    assert torch.equal(torch.rand(3), want)


def test_the_same_proof_comes_out_every_time():
    def run():
        return proved(
            scaled, lambda s, op, m: op.aten.mul.Tensor(op.aten.exp.default(m.x), 2.0), lambda a: a.exp() * 2
        )

    assert run().manifest.proofs == run().manifest.proofs


def test_proofs_run_again_and_a_false_one_is_found():
    class Exp(fxaccel.Rule):
        name = "exp"

        def pattern(self, op, x):
            return op.aten.exp.default(x)

        def rewrite(self, op, m):
            return op.aten.reciprocal.default(op.aten.exp.default(op.aten.neg.default(m.x)))

        def refuse(self, m):
            yield from done(self, m)

    fast = fxaccel.accelerate(Function(torch.exp), passes=[Exp], example_inputs=(torch.randn(4, 6),))
    again = fast.verify()
    assert again.ok
    assert "proved" in str(again)
    manifest = fast.__dict__["_fxaccel"].all[0].manifest
    (claim,) = manifest.claims.values()
    node = next(n for n in claim.after.graph.nodes if n.target is aten.neg.default)
    node.target = aten.abs.default
    assert not fast.verify().ok
    assert "FAILED" in str(fast.verify())


def test_strict_raises_with_the_rule_and_the_trial():
    class Wrong(fxaccel.Rule):
        name = "wrong"

        def pattern(self, op, x):
            return op.aten.exp.default(x)

        def rewrite(self, op, m):
            return op.aten.sin.default(m.x)

    with pytest.raises(ProofError, match=r"Wrong failed its proof: with sizes 3, 5 output 0 differs by"):
        fxaccel.accelerate(
            Function(torch.exp), passes=[Wrong], strict=True, example_inputs=(torch.randn(4, 6),)
        )


def test_proofs_work_in_inference_mode():
    class Exp2(fxaccel.Rule):
        name = "exp2"

        def pattern(self, op, x):
            return op.aten.exp.default(x)

        def rewrite(self, op, m):
            return op.aten.exp2.default(op.aten.mul.Tensor(m.x, 1 / math.log(2)))

    fast = fxaccel.accelerate(Function(torch.exp), passes=[Exp2])
    with torch.inference_mode():
        x = torch.randn(4, 6)
        torch.testing.assert_close(fast(x), x.exp())
    assert len(fast.report()["exp2"].applied) == 1


# -- the yardstick ---------------------------------------------------------------------------------


def test_the_share_is_one_where_the_tolerance_ends():
    ref = torch.tensor([1.0, 2.0], dtype=torch.float64)
    old = ref.float()
    eps = torch.finfo(torch.float32).eps
    assert share_of_tolerance(ref, old, old) == 0
    assert share_of_tolerance(ref, old, old + torch.tensor([0, 2 * eps])) < 1
    assert share_of_tolerance(ref, old, old + torch.tensor([0, 8 * eps])) > 1
    assert share_of_tolerance(ref, old, torch.tensor([1.0, torch.nan])) == math.inf
    assert share_of_tolerance(ref.long(), ref.long(), ref.long() + 1) == math.inf


def test_in_float64_the_originals_own_error_is_taken_for_that_of_its_operators():
    ref, eps = torch.ones(3, dtype=torch.float64), torch.finfo(torch.float64).eps
    moved = [ref + 10 * UNSTEADY]  # as ten operators would
    assert share_of_tolerance(ref, ref, ref + 80 * eps, moved) < 1  # 4 * (10 + 10) + 2
    assert share_of_tolerance(ref, ref, ref + 86 * eps, moved) > 1
    assert share_of_tolerance(ref, ref + 2 * eps, ref + 52 * eps, moved) > 1  # 4 * (2 + 10) + 2


def test_an_infinity_that_the_original_has_too_is_no_difference():
    ref = torch.tensor([1.0, torch.inf], dtype=torch.float64)
    assert share_of_tolerance(ref, ref.float(), ref.float()) == 0


@pytest.mark.parametrize("function", [torch.amax, torch.amin, lambda x, dim: x.median(dim).values])
def test_an_unsteady_run_finds_the_largest_value_where_it_is(function):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    with Unsteady():
        (x - function(x, 1)[:, None]).exp().sum().backward()
    assert x.grad.isfinite().all()


def test_an_unsteady_run_stays_finite_where_the_exact_one_is():
    lowest = torch.finfo(torch.float64).min
    with Unsteady():
        moved = torch.full((64,), lowest, dtype=torch.float64)
    assert moved.isfinite().all()
    assert (moved != lowest).any()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_steps_is_batch_norm(training, shape, affine):
    x, dy = torch.randn(2, *shape, dtype=torch.float64)
    found = []
    for run in (aten.batch_norm.default, _BY_DEFINITION[aten.batch_norm.default]):
        leaf, mean, var = x.clone().requires_grad_(), torch.zeros(3).double(), torch.ones(3).double()
        w, b = (
            (torch.linspace(1, 2, 3).double().requires_grad_(), torch.ones(3).double())
            if affine
            else (None, None)
        )
        y = run(leaf, w, b, mean, var, training, 0.1, 1e-5, False)
        leaves = [leaf, w] if affine else [leaf]
        found.append([y, mean, var, *torch.autograd.grad(y, leaves, dy)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def many_heads(module):
    return lambda x: module(x[0], x[0], x[0])[0]


DROPPING = {
    "dropout": lambda: lambda x: F.dropout(x, 0.5),
    "dropout2d": lambda: lambda x: F.dropout2d(x, 0.5),
    "in place": lambda: lambda x: F.dropout(x.clone(), p=0.5, inplace=True),
    "attention": lambda: lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.5),
    "attention by keyword": lambda: lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "a module of many heads": lambda: many_heads(nn.MultiheadAttention(8, 2, dropout=0.5)),
}


@pytest.mark.parametrize("name", DROPPING)
def test_nothing_is_dropped_where_it_is_calm(name):
    """By what a second call gives, whose random numbers are others; modules draw their parameters alike."""
    x = torch.rand(2, 4, 8, 8)

    def twice():
        found = []
        for _ in range(2):
            with torch.random.fork_rng():
                torch.manual_seed(7)
                run = DROPPING[name]()
            found.append(run(x))
        return found

    with Calm():
        calm = twice()
    assert torch.equal(*calm)
    assert not torch.equal(*twice())


class Alive(TorchDispatchMode):
    """Counts the results that are alive at once."""

    def __init__(self):
        super().__init__()
        self.made, self.most = weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.made.add(result)
        self.most = max(self.most, len(self.made))
        return result


def test_a_run_of_a_graph_keeps_no_value_longer_than_its_last_reader():
    program = capture(nn.Sequential(*(nn.Sigmoid() for _ in range(30))), (torch.randn(3),), {})
    with torch.no_grad(), Alive() as alive:
        evaluate.run(program, {}, [torch.randn(3)], double=True)
    assert alive.most <= 4


def test_materialise_keeps_dtype_shape_and_strides():
    generator = torch.Generator().manual_seed(0)
    for val in (torch.empty(3, 5).t(), torch.empty(2, 1).expand(2, 7), torch.empty(4, dtype=torch.int32)):
        made = materialise(val, {}, generator)
        assert (made.dtype, made.shape, made.stride()) == (val.dtype, val.shape, val.stride())
    assert materialise(torch.empty(3, 5), {}, generator, permuted=True).stride() == (1, 3)
    assert materialise((1, None, torch.empty(2)), {}, generator)[:2] == (1, None)


def test_sizes_are_found_where_a_product_of_free_ones_is_bound_to_a_fixed_one():
    """8 * batch rows of one input beside batch * length labels: the first sizes that fit alone fit nobody."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 11)

        def forward(self, x, labels):
            x = x - torch.arange(8.0)[:, None]  # which fixes the length of x alone
            return F.cross_entropy(self.head(x).reshape(-1, 11), labels.reshape(-1))

    model, given = Loss(), (torch.randn(3, 8, 8), torch.randint(0, 11, (3, 8)))
    fast = fxaccel.accelerate(model, ["fuse-linear-loss{least=0.001KiB}"], example_inputs=given, strict=True)
    assert any("==" in guard and "*" in guard for guard in session(fast).all[0].program.guards)
    agree(model, fast, *given)


def test_a_guard_on_a_remainder_of_nothing_does_not_hold():
    assert not holds(["5 % (a - 3) == 0"], {"a": 3})


def test_guards_with_unknown_symbols_are_left_out():
    assert holds(["a > 2", "b > 5"], {"a": 3})
    assert not holds(["a > 2"], {"a": 2})
    assert not holds(["math.floor(a / 2) == max(1, a)"], {"a": 2})
