"""The profile of a step as polynomials in its sizes: what is profiled at sizes that were not used."""

from dataclasses import replace

import pytest
import sympy
import torch
from torch import nn
from torch.nn import functional as F

import fxaccel
from fxaccel.errors import OptionError, RuleError
from fxaccel.formulas import Formulas, traced
from fxaccel.profile import profile
from fxaccel.replay import Draft, replay
from tests.helpers import Function, Method, session
from tests.zoo.torchvision_shim import importable


def program(model, *args, **kwargs):
    fast = fxaccel.accelerate(model.train(), [], check=False, example_inputs=kwargs or args)
    return session(fast).all[0].program


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 32), nn.Linear(32, 8), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.down(F.gelu(self.up(x)))).square().mean()


class Block(nn.Module):
    """Attention written out: the scores are quadratic in the sequence."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
        p = F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.1)
        return (x + self.out((p @ v).transpose(1, 2).flatten(2))).square().mean()


def agree(found, *many):
    """Equal to the profile at these sizes, which were not used; so are the expressions."""
    for sizes in many:
        point = found.sizes.point(sizes)
        assert point not in found.known
        want = profile(replace(found.program, hints=found.sizes.all(point)))
        assert found.at(sizes) == want
        whole, at = replay(want, Draft()), {found.symbols[k]: v for k, v in sizes.items()}
        assert found.peak.xreplace(at).doit() == whole.peak
        assert found.inner.xreplace(at).doit() == whole.inner
        for ours, theirs in zip(found.expressions.calls.values(), want.calls.values(), strict=True):
            for field in ("takes", "rest", "surge", "grads", "flops", "nbytes"):
                assert getattr(ours, field).xreplace(at).doit() == getattr(theirs, field)


def test_a_batch_is_linear():
    found = Formulas(program(Mlp(), torch.randn(6, 8)))
    assert found.at({}) == profile(found.program)
    agree(found, {"x.0": 2}, {"x.0": 37}, {"x.0": 5000})


def test_the_scores_of_attention_are_quadratic():
    found = Formulas(program(Block(), torch.randn(4, 12, 16)))
    agree(found, {"x.0": 2, "x.1": 2}, {"x.0": 3, "x.1": 77}, {"x.0": 55, "x.1": 300})


@pytest.mark.slow
def test_gpt2_with_any_batch_and_sequence():
    with importable():
        from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=256, use_cache=False)
    tokens = torch.randint(0, 64, (4, 16))
    found = Formulas(program(GPT2LMHeadModel(config), input_ids=tokens, labels=tokens.clone()))
    small, large = {"input_ids.0": 2, "input_ids.1": 2}, {"input_ids.0": 300, "input_ids.1": 256}
    agree(found, small, {"input_ids.0": 7, "input_ids.1": 101}, large)
    terms = found.peak.args if isinstance(found.peak, sympy.Max) else [found.peak]
    assert len(terms) <= 12
    assert len(found.table) < len(found.places) / 3  # equal polynomials stand there once
    highest = []  # moment of a call's backward, which is another one for small sizes than for large ones
    for sizes in (small, large):
        at = {found.symbols[name]: size for name, size in sizes.items()}
        surges = [c.surge for c in found.expressions.calls.values() if isinstance(c.surge, sympy.Max)]
        highest.append([max(s.args, key=lambda e, at=at: e.xreplace(at)) for s in surges])
    assert highest[0] != highest[1]


def test_expressions_say_how_bytes_grow():
    found = Formulas(program(Block(), torch.randn(4, 12, 16)))
    b, s = found.symbols["x.0"], found.symbols["x.1"]
    assert [str(b), str(s)] == ["x.0", "x.1"]
    values = {v.name: v.nbytes for v in found.expressions.values}
    assert values["softmax"] == 2 * 4 * b * s**2  # two heads in float32
    calls = {c.name: c for c in found.expressions.calls.values()}
    assert calls["linear"].flops == 2 * 48 * 16 * b * s
    assert calls["linear"].takes == 48 * 4 * b * s


def test_labels_of_the_inputs_shape_follow_the_inputs():
    table = nn.Embedding(16, 8)
    model = Method(lambda self, x, y: F.cross_entropy(self.table(x).view(-1, 8), y.view(-1)), table=table)
    tokens = torch.randint(0, 8, (4, 6))
    found = Formulas(program(model, x=tokens, y=tokens.clone()))
    assert list(found.symbols) == ["x.0", "x.1"]
    assert len(found.sizes.bound) == 2
    assert found.at({"x.0": 5, "y.0": 5}) == found.at({"x.0": 5})
    with pytest.raises(OptionError, match="are not taken"):
        found.at({"x.0": 5, "y.0": 6})


@pytest.mark.parametrize(("sizes", "says"), [({"y.0": 3}, "not all sizes"), ({"x.0": 0}, "are not taken")])
def test_sizes_that_are_none_are_refused(sizes, says):
    found = Formulas(program(Mlp(), torch.randn(6, 8)))
    with pytest.raises(OptionError, match=says):
        found.at(sizes)


def test_a_guard_on_divisibility_is_kept_to():
    split = Function(lambda x, w: (x.view(x.shape[0] // 4, 4, 8).sum(1) @ w).square().mean())
    step = program(split, torch.randn(16, 8), torch.randn(8, 8).requires_grad_())
    found = Formulas(step)
    assert all(point[0] % 4 == 0 for point in found.known)
    assert found.at({"args.0": 44}) == profile(
        replace(step, hints=found.sizes.all(found.sizes.point({"args.0": 44})))
    )


def test_a_batch_may_be_quadratic():
    against_all = Function(lambda x: (x @ x.t()).logsumexp(-1).mean())
    found = Formulas(program(against_all, torch.randn(6, 4).requires_grad_()))
    b = found.symbols["args.0"]
    assert {v.name: v.nbytes for v in found.expressions.values}["matmul"] == 4 * b**2


@torch.library.custom_op("formulas_test::stepwise", mutates_args=())
def stepwise(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0] + 31) // 32 * 32)


@stepwise.register_fake
def _(x):
    return x.new_empty((x.shape[0] + 31) // 32 * 32)


def _setup(ctx, inputs, output):
    ctx.size = inputs[0].shape


stepwise.register_autograd(lambda ctx, grad: grad.new_zeros(ctx.size), setup_context=_setup)


def test_what_follows_no_polynomial_is_an_error_that_names_the_call():
    rounding = Function(lambda x: stepwise(x * 2).exp().sum())
    with pytest.raises(RuleError, match="stepwise"):
        Formulas(program(rounding, torch.randn(40).requires_grad_()))


def test_a_step_with_fixed_sizes_has_constants():
    found = Formulas(program(Mlp(), torch.randn(1, 8)))
    assert found.symbols == {}
    assert found.peak == replay(profile(found.program), Draft()).peak


def test_the_moments_are_those_of_the_profile():
    step = program(Mlp(), torch.randn(6, 8))
    assert traced(step).profile == profile(step)
