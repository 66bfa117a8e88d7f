"""split-attention: the calls that attention with dropout is made of, number by number."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxaccel
from fxaccel.passes import SplitAttention
from fxaccel.passes._checkpoint_plan import Planner
from fxaccel.passes.checkpoint import TrainingStep
from tests.helpers import session, targets

B, H, S, T, D = 2, 4, 6, 6, 8
attention = F.scaled_dot_product_attention


class Attends(nn.Module):
    """Attention of what three linears make of x."""

    def __init__(self, function, heads=H, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.heads = function, heads
        self.layers = nn.ModuleList(nn.Linear(H * D, n * D) for n in (H, heads, heads)).to(dtype)

    def forward(self, x, *mask):
        q, k, v = (layer(x).unflatten(-1, (-1, D)).transpose(1, 2) for layer in self.layers)
        return self.function(q, k, v, *mask)


X = torch.randn(B, S, H * D, generator=torch.Generator().manual_seed(1))
BOOL = torch.rand(B, 1, S, T, generator=torch.Generator().manual_seed(2)) > 0.4
FLOAT = torch.randn(H, S, T, generator=torch.Generator().manual_seed(3))
SPLIT = {
    "plain": (lambda q, k, v: attention(q, k, v, dropout_p=0.2), ()),
    "causal": (lambda q, k, v: attention(q, k, v, dropout_p=0.2, is_causal=True), ()),
    "more keys": (lambda q, k, v: attention(q[:, :, :4], k, v, dropout_p=0.2, is_causal=True), ()),
    "scale": (lambda q, k, v: attention(q, k, v, dropout_p=0.2, scale=0.3), ()),
    "mask": (lambda q, k, v, mask: attention(q, k, v, mask, 0.2), (BOOL,)),
    "nothing seen": (lambda q, k, v, mask: attention(q, k, v, mask & (q[:, :, :, :1] > 9), 0.2), (BOOL,)),
    "bias": (lambda q, k, v, mask: attention(q, k, v, mask, 0.2), (FLOAT,)),
}
DECLINED = {
    "without dropout it is one kernel, which saves no probabilities":
        Attends(lambda q, k, v: attention(q, k, v)),
    "grouped heads are repeated inside of it":
        Attends(lambda q, k, v: attention(q, k, v, dropout_p=0.2, enable_gqa=True), 2),
    "inside of it torch.bfloat16 is computed in float32":
        Attends(lambda q, k, v: attention(q, k, v, dropout_p=0.2), dtype=torch.bfloat16),
    "the scale is -0.5, whose root it takes":
        Attends(lambda q, k, v: attention(q, k, v, dropout_p=0.2, scale=-0.5)),
}  # fmt: skip


def split(model, *args, passes=("split-attention",), **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(model.train(), list(passes), example_inputs=args, **options)
    return fast, fast.report()["split-attention"]


def step(model, *args):
    """The result, and gradients of what has been summed with weights."""
    model.zero_grad()
    torch.manual_seed(5)
    out = model(*args)
    (out * torch.arange(out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


# -- it fires --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLIT)
def test_calls_become_what_they_are_made_of(name):
    function, mask = SPLIT[name]
    model = Attends(function)
    fast, record = split(model, X, *mask)
    assert len(record.applied) == 1
    made = targets(session(fast).all[-1].program)
    assert "aten.scaled_dot_product_attention.default" not in made
    assert [made.count(f"aten.{n}") for n in ("_safe_softmax.default", "dropout.default")] == [1, 1]
    assert made.count("aten.matmul.default") == 2
    assert record.error == ""


def test_a_checkpoint_behind_it_makes_no_product_again():
    def function(q, k, v):
        return attention(q, k, v, dropout_p=0.2, is_causal=True).transpose(1, 2).flatten(2)

    model, x, flops = nn.Sequential(Attends(function), Attends(function)), torch.randn(B, 64, H * D), []
    for passes in ((), ("split-attention",)):
        fast = fxaccel.accelerate(model.train(), list(passes), example_inputs=(x,), check=False)
        found = TrainingStep.of(session(fast).all[-1].program, "none")
        weights = {i: c.flops + 1e-3 * c.nbytes * (not c.view) for i, c in found.profile.calls.items()}
        draft = Planner(found.profile, weights).plan(int(0.8 * found.whole.peak))
        flops.append(found.planned(draft).flops)
    assert flops[0] > 0 == flops[1]


# -- it declines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sentence", DECLINED)
def test_it_declines_with_the_reason(sentence):
    model = DECLINED[sentence]
    x = X.to(model.layers[0].weight.dtype)
    _, record = split(model, x)
    assert not record.applied
    assert any(sentence in s.why for s in record.refused), record.refused


def test_what_only_other_devices_and_sizes_have():
    class Val:
        def __init__(self, device, dtype, shape):
            self.device, self.dtype, self.shape = torch.device(device), dtype, shape

    class Site:
        p, grouped, scale = 0.1, False, None

        def __init__(self, *val):
            self.q = Val(*val)

        def val(self, name):
            return self.q

    found = list(SplitAttention().refuse(Site("cuda", torch.float32, (2, 3, 4, 8))))
    assert found == ["on cuda its kernels save no probabilities"]
    symbol = torch.fx.experimental.symbolic_shapes.ShapeEnv().create_unbacked_symint()
    found = list(SplitAttention().refuse(Site("cpu", torch.float32, (2, 3, 4, symbol))))
    assert found == ["the scale is left to a head size that is not a number"]


# -- values agree ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLIT)
def test_the_very_numbers_forward_and_backward(name):
    function, mask = SPLIT[name]
    model = Attends(function)
    fast, _ = split(model, X, *mask)
    for got, want in zip(step(fast, X, *mask), step(model, X, *mask), strict=True):
        assert torch.equal(got, want)
    longer = torch.randn(3, S + 3, H * D)  # captured once, for other sizes
    if not mask:
        for got, want in zip(step(fast, longer), step(model, longer), strict=True):
            assert torch.equal(got, want)


def test_double_precision_is_agreed_with():
    model = Attends(SPLIT["causal"][0], dtype=torch.float64)
    fast, record = split(model, X.double())
    assert record.applied
    for got, want in zip(step(fast, X.double()), step(model, X.double()), strict=True):
        assert torch.equal(got, want)
