"""Rules that are wrong on purpose: the proof catches every one, and the model stays what it was."""

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel import driver, ir, manager
from fxaccel.canonical import canonicalize
from fxaccel.capture import capture
from fxaccel.listing import listing
from tests.helpers import rule

pytestmark = pytest.mark.filterwarnings("ignore:fxaccel_wrong")  # it has no gradient, on purpose
F = nn.functional
aten = torch.ops.aten


# -- operators that are right except in one corner -------------------------------------------------

_library = torch.library.Library("fxaccel_wrong", "DEF")


def _operator(name, function):
    _library.define(f"{name}(Tensor x) -> Tensor")
    _library.impl(name, function, "CompositeExplicitAutograd")
    _library.impl(name, torch.empty_like, "Meta")


def _wrong_for_odd_sizes(x):
    y = x * 2
    return y if x.shape[0] % 2 == 0 else y + (torch.arange(x.shape[0]) == x.shape[0] - 1)[:, None]


def _wrong_for_permuted(x):
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride()) * 2


_operator("double_even", _wrong_for_odd_sizes)
_operator("double_dense", _wrong_for_permuted)
_library.define("double_late(Tensor x) -> Tensor")
_library.impl("double_late", lambda x: x.detach() * 2, "CompositeImplicitAutograd")


# -- the model -------------------------------------------------------------------------------------


class Model(nn.Module):
    """One site for each rule below."""

    def __init__(self):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(8), nn.Linear(8, 8)
        self.rms = nn.RMSNorm(8, eps=1e-2)
        self.square = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        h = x + torch.tanh(self.proj(self.norm(x)))
        h = h - F.relu(self.rms(h)) * 0.5
        p = torch.softmax(h @ self.square, -1)
        q = torch.sigmoid(h).cumsum(1) + h * 2
        r = F.silu(h) / (1 + h.square().mean(-1, keepdim=True))
        s = F.gelu(h, approximate="tanh") + h.var(-1, keepdim=True)
        return torch.cat([p, q, r, s, h[:, 1:6].abs().sum(1, keepdim=True)], 1), torch.exp(h.neg())


def call(target, *others):
    """`pattern` of one operator with one input, with literals for the rest."""
    return lambda self, op, x: op(target, x, *others)


def _layer_norm(self, op, x, dims, w, b, eps):
    return op.aten.layer_norm.default(x, dims, w, b, eps, fxaccel.rule.ANY)


def _rms_norm(self, op, x, dims, w, eps):
    return op.aten.rms_norm.default(x, dims, w, eps)


def _written_rms(op, m, inside):
    squares = op.aten.mean.dim(op.aten.mul.Tensor(m.x, m.x), [-1], True)
    if inside:  # sqrt(mean + eps), right
        root = op.aten.sqrt.default(op.aten.add.Tensor(squares, m.eps))
    else:
        root = op.aten.add.Tensor(op.aten.sqrt.default(squares), m.eps)
    return op.aten.mul.Tensor(op.aten.div.Tensor(m.x, root), m.w)


def _linear(self, op, x, w, b):
    return op.aten.linear.default(x, w, b)


def _has_bias(self, m):
    if m.b is None:
        yield "it has no bias"


def _residual(self, op, x, inner):
    return op.aten.add.Tensor(x, op.aten.tanh.default(inner))


RULES = [
    rule("wrong-axis", call(aten.softmax.int, 2), lambda s, op, m: op.aten.softmax.int(m.x, 1)),
    rule(
        "wrong-scale",
        call(aten.silu.default),
        lambda s, op, m: op.aten.mul.Tensor(m.x, op.aten.sigmoid.default(op.aten.mul.Tensor(m.x, 1.001))),
    ),
    rule("dropped-residual", _residual, lambda s, op, m: op.aten.tanh.default(m.inner)),
    rule("wrong-eps-place", _rms_norm, lambda s, op, m: _written_rms(op, m, inside=False)),
    rule(
        "wrong-eps-value",
        _layer_norm,
        lambda s, op, m: op.aten.layer_norm.default(m.x, m.dims, m.w, m.b, 2 * m.eps),
    ),
    rule(
        "swapped-operands",
        lambda self, op, a, b: op.aten.div.Tensor(op.aten.silu.default(a), b),
        lambda s, op, m: op.aten.div.Tensor(m.b, op.aten.silu.default(m.a)),
    ),
    rule(
        "transposed-weight",
        lambda self, op, x, w: op.aten.linear.default(x, op.aten.permute.default(w, [1, 0])),
        lambda s, op, m: op.aten.linear.default(m.x, m.w),
    ),
    rule(
        "wrong-gradient-only",
        call(aten.silu.default),
        lambda s, op, m: op.aten.mul.Tensor(m.x, op.aten.detach.default(op.aten.sigmoid.default(m.x))),
    ),
    rule(
        "detached-branch",
        lambda self, op, x: op.aten.gelu.default(x, approximate="tanh"),
        lambda s, op, m: op.aten.gelu.default(op.aten.detach.default(m.x), approximate="tanh"),
    ),
    rule(
        "missing-gradient",
        lambda self, op, x: op.aten.mul.Tensor(x, 2),
        lambda s, op, m: op.fxaccel_wrong.double_late.default(m.x),
    ),
    rule(
        "wrong-for-odd-sizes",
        lambda self, op, x: op.aten.mul.Tensor(x, 2),
        lambda s, op, m: op.fxaccel_wrong.double_even.default(m.x),
    ),
    rule(
        "wrong-for-non-contiguous",
        lambda self, op, x: op.aten.mul.Tensor(x, 2),
        lambda s, op, m: op.fxaccel_wrong.double_dense.default(m.x),
    ),
    rule(
        "wrong-dtype",
        call(aten.sigmoid.default),
        lambda s, op, m: op.aten.to.dtype(op.aten.sigmoid.default(m.x), torch.float64),
    ),
    rule(
        "lost-precision",
        call(aten.sigmoid.default),
        lambda s, op, m: op.aten.to.dtype(
            op.aten.sigmoid.default(op.aten.to.dtype(m.x, torch.bfloat16)), torch.float32
        ),
    ),
    rule(
        "wrong-shape",
        lambda self, op, x, dims: op.aten.mean.dim(x, dims, True),
        lambda s, op, m: op.aten.mean.dim(m.x, m.dims, False),
    ),
    rule("wrong-where-negative", call(aten.relu.default), lambda s, op, m: op.aten.mul.Tensor(m.x, 1.0)),
    rule("leaky", call(aten.relu.default), lambda s, op, m: op.aten.leaky_relu.default(m.x, 1e-3)),
    rule("dropped-bias", _linear, lambda s, op, m: op.aten.linear.default(m.x, m.w), refuse=_has_bias),
    rule(
        "biased-variance",
        lambda self, op, x, dims: op.aten.var.correction(x, dims, keepdim=True),
        lambda s, op, m: op.aten.var.correction(m.x, m.dims, keepdim=True, correction=0),
    ),
    rule(
        "off-by-one-slice",
        lambda self, op, x: op.aten.slice.Tensor(x, 1, 1, 6),
        lambda s, op, m: op.aten.slice.Tensor(m.x, 1, 2, 7),
    ),
    rule(
        "off-by-one-scan",
        lambda self, op, x: op.aten.cumsum.default(x, 1),
        lambda s, op, m: op.aten.sub.Tensor(op.aten.cumsum.default(m.x, 1), m.x),
    ),
    rule(
        "wrong-sign", call(aten.exp.default), lambda s, op, m: op.aten.exp.default(op.aten.neg.default(m.x))
    ),
    rule(
        "tanh-for-erf",
        lambda self, op, x: op.aten.gelu.default(x, approximate="tanh"),
        lambda s, op, m: op.aten.gelu.default(m.x),
    ),
    rule("in-place-on-its-input", call(aten.abs.default), lambda s, op, m: op.aten.abs_.default(m.x)),
    rule(
        "random",
        call(aten.tanh.default),
        lambda s, op, m: op.aten.dropout.default(op.aten.tanh.default(m.x), 0.1, True),
    ),
    rule(
        "not-finite",
        call(aten.exp.default),
        lambda s, op, m: op.aten.div.Tensor(op.aten.exp.default(m.x), op.aten.ge.Scalar(m.x, -1.0)),
    ),
    rule(
        "constant",
        call(aten.sigmoid.default),
        lambda s, op, m: op.aten.full_like.default(m.x, 0.5),
    ),
    rule(
        "reordered-with-loss",
        lambda self, op, x: op.aten.mul.Tensor(x, 2),
        lambda s, op, m: op.aten.sub.Tensor(op.aten.add.Tensor(op.aten.mul.Tensor(m.x, 2), 1e4), 1e4),
    ),
]
WRONG_GRADIENT = next(r for r in RULES if r.name == "wrong-gradient-only")
# What a wrong rule may be stopped by: everything else would be a crash, not a verdict.
ONLY_GRADIENTS = {"wrong-gradient-only", "detached-branch", "missing-gradient"}
VERDICTS = (
    "failed its proof", "changed the type", "writes to its input", "draws random numbers",
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=[True, False], ids=["training", "inference"])
def program(request, inputs):
    """The canonical program of the model, captured with or without gradients."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(request.param):
        captured = capture(Model(), (inputs,), {})
    canonicalize(captured)
    return captured


def test_there_are_more_than_twenty():
    assert len({r.name for r in RULES}) == len(RULES) > 20


@pytest.mark.parametrize("wrong", RULES, ids=lambda r: r.name)
def test_every_wrong_rule_is_caught_by_the_proof_and_rolled_back(wrong, program):
    if not program.grad and wrong.name in ONLY_GRADIENTS:
        pytest.skip("it is right where no gradient flows")
    before = listing(program, ends=True)
    run = manager.run(program, [wrong()])
    (record,) = run.report.passes
    assert any(v in record.error for v in VERDICTS), record.error or record
    assert record.applied == []
    assert run.manifest.proofs == {}
    assert listing(program, ends=True) == before == listing(run.program, ends=True)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_with_all_of_them_at_once_the_model_computes_what_it_did(grad, inputs):
    """check=False, so that nothing but the proofs stands between the rules and the result."""
    rules = [r for r in RULES if grad or r.name not in ONLY_GRADIENTS]
    model = Model()
    with torch.set_grad_enabled(grad):
        fast = silently(model, rules, inputs)
        assert not fast.diff()
        for batch in (4, 3):
            got, want = fast(inputs[:batch]), model(inputs[:batch])
            torch.testing.assert_close(got, want)


def silently(model, passes, *args):
    with pytest.warns(UserWarning, match="applied nowhere"):
        return fxaccel.accelerate(model, passes=passes, check=False, example_inputs=args)


@pytest.mark.parametrize("wrong", [RULES[0], WRONG_GRADIENT], ids=lambda r: r.name)
def test_under_strict_a_wrong_rule_raises(wrong, inputs):
    with pytest.raises(fxaccel.ProofError, match="failed its proof"):
        fxaccel.accelerate(Model(), passes=[wrong], strict=True, example_inputs=(inputs,))


def test_a_wrong_rule_that_declares_itself_approximate_is_measured_and_needs_leave(inputs):
    approximate = rule("wrong-scale", RULES[1].pattern, RULES[1].rewrite, numerics="approximate")
    fast = silently(Model(), [approximate], inputs)
    assert "class 'approximate'" in fast.report()["wrong-scale"].error
    fast = fxaccel.accelerate(
        Model(), passes=[approximate], allow="approximate", check=False, example_inputs=(inputs,)
    )
    (site,) = fast.report()["wrong-scale"].applied
    assert fast.__dict__["_fxaccel"].all[0].manifest.proofs[site.proof].error > 1


def test_one_wrong_site_takes_the_right_ones_of_its_pass_back_with_it(inputs):
    """A pass is kept whole or not at all: here the rule is right at 8 columns and wrong at 4."""

    class Two(nn.Module):
        def forward(self, x):
            return F.silu(x), F.silu(x[..., :4])

    def rewrite(self, op, m):
        factor = 1.0 if m.val("x").shape[-1] == 8 else 1.01
        return op.aten.mul.Tensor(op.aten.mul.Tensor(m.x, op.aten.sigmoid.default(m.x)), factor)

    sometimes = rule("wrong-at-four", call(aten.silu.default), rewrite)
    fast = silently(Two(), [sometimes], inputs)
    assert "failed its proof" in fast.report()["wrong-at-four"].error
    assert not fast.diff()


def test_a_later_pass_starts_from_the_last_good_graph(inputs):
    right = rule(
        "right",
        call(aten.silu.default),
        lambda s, op, m: op.aten.mul.Tensor(m.x, op.aten.sigmoid.default(m.x)),
    )
    model = Model()
    with pytest.warns(UserWarning, match="wrong-scale"):
        fast = fxaccel.accelerate(model, passes=[RULES[1], right], example_inputs=(inputs,))
    assert len(fast.report()["right"].applied) == 1
    torch.testing.assert_close(fast(inputs), model(inputs))


def test_what_the_proofs_cannot_see_the_check_of_the_whole_module_does(inputs, monkeypatch):
    """With every proof switched off, a wrong rule is still found, and all passes are dropped."""

    monkeypatch.setattr(driver, "prove", lambda program, claim, manifest: type("Believed", (), {"key": ""}))
    model = Model()
    fast = fxaccel.accelerate(model, passes=[WRONG_GRADIENT])
    with pytest.warns(UserWarning, match="applied nowhere"):
        got = fast(inputs)
    torch.testing.assert_close(got, model(inputs))
    assert "dropped with all others: gradient of" in fast.report()["wrong-gradient-only"].error


@pytest.mark.parametrize("where", ["a value", "a gradient"])
def test_a_capture_that_is_not_the_model_is_found_although_it_is_its_own_yardstick(
    where, inputs, monkeypatch
):
    def wrong(original, args, kwargs):
        program = capture(original, args, kwargs)
        silu = next(n for n in program.graph.nodes if n.target is aten.silu.default)
        with program.graph.inserting_before(silu):
            target, others = (aten.mul.Tensor, (1.01,)) if where == "a value" else (aten.detach.default, ())
            silu.args = (ir.call(program.graph, silu, target, (silu.args[0], *others), by="a bug"),)
        return program

    model = Model()
    monkeypatch.setattr("fxaccel.session.capture", wrong)
    fast = fxaccel.accelerate(model, passes=[], strict=True)
    with pytest.raises(fxaccel.ProofError, match="away from the captured graph run in float64"):
        fast(inputs)


def test_a_right_rewrite_of_every_site_is_not_refused(inputs):
    """The proof is no wall: right versions of the wrong rules pass it."""
    right = [
        rule("r-silu", call(aten.silu.default),
             lambda s, op, m: op.aten.mul.Tensor(m.x, op.aten.sigmoid.default(m.x))),
        rule("r-rms", _rms_norm, lambda s, op, m: _written_rms(op, m, inside=True)),
        rule("r-linear", _linear, lambda s, op, m: op.aten.add.Tensor(
            op.aten.matmul.default(m.x, op.aten.permute.default(m.w, [1, 0])), m.b), refuse=_has_bias),
        rule("r-double", lambda self, op, x: op.aten.mul.Tensor(x, 2),
             lambda s, op, m: op.aten.add.Tensor(m.x, m.x)),
    ]  # fmt: skip
    model = Model()
    fast = fxaccel.accelerate(
        model, passes=right, expect={r.name: 1 for r in right}, example_inputs=(inputs,)
    )
    torch.testing.assert_close(fast(inputs), model(inputs))
    assert fast.verify().ok
