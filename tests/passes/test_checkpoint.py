"""checkpoint: a training step fits its budget, with the very gradients that it had."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxaccel
from fxaccel.errors import OptionError
from fxaccel.memory import Meter
from fxaccel.passes import Checkpoint
from tests.helpers import session
from tests.passes.checkpoint_models import MODELS, loss_of, made

QUICK = ("unet",)  # the others take long, or timm
B, S, W = 4, 24, 32


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.again = nn.LayerNorm(W), nn.LayerNorm(W)
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.up, self.down, self.drop = nn.Linear(W, 4 * W), nn.Linear(4 * W, W), nn.Dropout(0.1)

    def forward(self, x):
        b, s, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, s, 3, 4, w // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, w)
        x = x + self.drop(self.out(y))
        return x + self.drop(self.down(F.gelu(self.up(self.again(x)))))


class Stack(nn.Module):
    def __init__(self, layers=3, theirs=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head, self.theirs = (
            nn.ModuleList(Block() for _ in range(layers)),
            nn.Linear(W, 8),
            theirs,
        )

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.theirs else layer(x)
        return self.head(x).square().mean()


X = torch.randn(B, S, W, generator=torch.Generator().manual_seed(1))


def trained(model, passes, **options):
    fast = fxaccel.accelerate(model, passes, **{"check": False, **options})
    return fast.train()


@functools.cache
def plain_stack():
    return trained(Stack(), [])


@functools.cache
def planned_stack():
    return trained(Stack(), ["checkpoint{budget=0.4}"], check=True)


def step(fast, batch):
    """Peak bytes of a step, its gradients and buffers, and the random number that comes next."""
    for parameter in fast.parameters():
        parameter.grad = None
    kept = {n: b.clone() for n, b in fast.named_buffers()}
    torch.manual_seed(2)
    with Meter() as meter:
        loss_of(fast(**batch)).backward()
    found = {n: p.grad.clone() for n, p in fast.named_parameters() if p.grad is not None}
    found |= {f"buffer {n}": b.clone() for n, b in fast.named_buffers()}
    for name, buffer in fast.named_buffers():
        buffer.copy_(kept[name])
    return meter.peak, {**found, "random": torch.rand(1)}


def equal(got, want):
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], want[n]) for n in want), [
        n for n in want if not torch.equal(got[n], want[n])
    ]


def plan_of(fast):
    return fast.report()["checkpoint"].plan


# -- it fires --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_steps_of_real_models_fit_their_budgets_and_learn_as_before(name):
    model, batch = made(name)
    plain = trained(model, [])
    step(plain, batch)
    need, want = step(plain, batch)
    state = sum(p.numel() * p.element_size() for p in model.parameters())
    least = 1.01 * smallest(model, batch)  # which is said in three digits
    peaks = []
    for share in (0.9, 0.6, 0.3, 0.0):
        budget = int(least + share * (need + state - least))
        fast = trained(model, [Checkpoint(budget=f"{budget / 2**10:.2f}KiB")])
        step(fast, batch)
        peak, got = step(fast, batch)
        equal(got, want)
        assert peak + state <= 1.05 * budget
        predicted = size(re.match(r"(.*?) at the peak", plan_of(fast))[1])
        assert peak + state == pytest.approx(predicted, rel=0.05)
        peaks.append(peak)
    assert peaks == sorted(peaks, reverse=True)


def smallest(model, batch):
    with pytest.raises(OptionError) as caught:
        trained(model, ["checkpoint{budget=1KiB}"], strict=True)(**batch)
    return size(re.search(r"the smallest that can is (.*)", str(caught.value))[1])


def size(text):
    number, unit = text.split()
    return float(number) * {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def test_a_share_is_one_of_the_activations_alone():
    plain, fast = plain_stack(), planned_stack()
    for one in (plain, fast):
        step(one, {"x": X})
    equal(step(fast, {"x": X})[1], step(plain, {"x": X})[1])
    now, before = map(size, re.search(r"activations (.*?) instead of (.*?):", plan_of(fast)).groups())
    assert now <= 0.4 * before
    sites = fast.report()["checkpoint"].applied
    assert {s.path for s in sites} >= {"layers.0", "layers.1"} or any(
        s.path.startswith("layers.0") for s in sites
    )
    assert all(re.search(r"[KM]iB are computed again in backward", s.why) for s in sites)
    assert "not kept" in str(fast.diff())
    assert "run.drop(" in fast.code
    assert "def again_" in fast.code


def test_products_are_computed_again_last():
    shares = {}
    for budget in (0.75, 0.35):
        fast = trained(Stack(), [Checkpoint(budget=budget)])
        fast(X).backward()
        names = {s.node.split("_")[0] for s in fast.report()["checkpoint"].applied}
        shares[budget] = "linear" in names
    assert shares == {0.75: False, 0.35: True}


def test_an_overhead_buys_the_smallest_peak():
    peaks = []
    for most in (0.0, 0.03, 0.2):
        fast = trained(Stack(layers=2), [Checkpoint(max_overhead=most)])
        step(fast, {"x": X})
        peaks.append(step(fast, {"x": X})[0])
        spent = re.search(r"again takes (\S+) %", plan_of(fast))
        assert float(spent[1]) <= 100 * most if spent else most == 0
    assert peaks[0] > peaks[1] > peaks[2]


def test_the_optimizers_state_counts():
    model = Stack()
    state = sum(p.numel() * 4 for p in model.parameters())
    needs = []
    for optimizer in ("none", "momentum", "adamw"):
        fast = trained(model, [Checkpoint(budget="1GiB", optimizer=optimizer)])
        with pytest.warns(UserWarning, match="everything is kept"):
            fast(X)
        needs.append(size(re.search(r"takes (.*?) at its peak", plan_of(fast))[1]))
    assert needs[1] - needs[0] == pytest.approx(state, rel=0.05)
    assert needs[2] - needs[0] == pytest.approx(2 * state, rel=0.05)


def test_checkpoints_of_the_model_are_planned_with_the_rest():
    plain, fast = plain_stack(), trained(Stack(theirs=True), ["checkpoint{budget=0.4}"])
    for one in (plain, fast):
        step(one, {"x": X})
    (peak, got), (need, want) = step(fast, {"x": X}), step(plain, {"x": X})
    equal(got, want)
    assert peak < 0.7 * need
    assert "checkpoint(" not in fast.code


@pytest.mark.parametrize(
    "passes",
    [
        ["fuse-attention", "fuse-norm"],
        pytest.param(["layer-norm-to-rms-norm", "fuse-attention", "fuse-norm"], marks=pytest.mark.slow),
        pytest.param(
            ["replace-linear{structure=low-rank,init=random,share=0.3,even_if_slower=true}"],
            marks=pytest.mark.slow,
        ),
        ["quantize{train=learned,weights=int8,even_if_slower=true}"],
    ],
)
def test_other_passes_come_before_it(passes):
    model = Stack()
    plain = trained(model, passes, allow="approximate")
    fast = trained(model, [*passes, "checkpoint{budget=0.5}"], allow="approximate")
    for one in (plain, fast):
        step(one, {"x": X})
    (peak, got), (need, want) = step(fast, {"x": X}), step(plain, {"x": X})
    equal(got, want)
    assert fast.report()["checkpoint"].applied
    assert peak < need


class Biased(nn.Module):
    """Attention layers with one bias by distance, learned or not, which they share as a mask."""

    def __init__(self, learned):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        bias = torch.randn(4, 2 * S - 1)
        self.bias = nn.Parameter(bias) if learned else nn.Buffer(bias)

    def forward(self, x):
        at = torch.arange(S)
        bias = self.bias[:, at[None, :] - at[:, None] + S - 1]
        for layer in self.layers:
            q, k, v = layer.qkv(layer.norm(x)).view(B, S, 3, 4, W // 4).permute(2, 0, 3, 1, 4)
            y = (q @ k.transpose(-1, -2) / (W // 4) ** 0.5 + bias).softmax(-1) @ v
            x = x + layer.out(y.transpose(1, 2).reshape(B, S, W))
            x = x + layer.down(F.gelu(layer.up(layer.again(x))))
        return x.square().mean()


@pytest.mark.parametrize("learned", [False, True])
def test_what_calls_have_in_common_is_made_again_as_it_was(learned):
    plain = trained(Biased(learned), ["fuse-attention"])
    fast = trained(Biased(learned), ["fuse-attention", "checkpoint{budget=0.3}"])
    for one in (plain, fast):
        step(one, {"x": X})
    (peak, got), (need, want) = step(fast, {"x": X}), step(plain, {"x": X})
    equal(got, want)
    assert peak < 0.8 * need
    again = fast.code[: fast.code.index("def forward(")]
    assert "rerun(" in again
    assert "shared=shared_attention" in again


def test_files_hold_the_schedule(tmp_path):
    fast = planned_stack()
    step(fast, {"x": X})
    want = step(fast, {"x": X})
    fast.save(tmp_path / "model.fxa")
    again = fxaccel.load(tmp_path / "model.fxa").train()
    got = step(again, {"x": X})
    assert got[0] == want[0]
    equal(got[1], want[1])


def test_one_plan_serves_other_sizes():
    plain, fast = plain_stack(), planned_stack()
    for one in (plain, fast):
        one(x=X)
    larger = torch.randn(2 * B, S + 7, W)
    (peak, got), (need, want) = step(fast, {"x": larger}), step(plain, {"x": larger})
    equal(got, want)
    assert len(session(fast).all) == 1
    assert peak < 0.7 * need


# -- it declines -----------------------------------------------------------------------------------


def test_a_budget_above_need_changes_nothing():
    fast = trained(Stack(), ["checkpoint{budget=1GiB}"])
    with pytest.warns(UserWarning, match="applied nowhere; .*everything is kept: the step takes"):
        fast(X)
    plain = plain_stack()
    plain(X)
    assert session(fast).all[0].source.splitlines()[1:] == session(plain).all[0].source.splitlines()[1:]
    assert [s.why for s in fast.report()["checkpoint"].refused] == [plan_of(fast)]


def test_an_impossible_budget_is_refused_with_the_smallest_that_is_not():
    with pytest.raises(OptionError, match="the smallest that can is") as caught:
        trained(Stack(), ["checkpoint{budget=0.01}"], strict=True)(X)
    least = float(re.search(r"smallest that can is (\S+)", str(caught.value))[1])
    assert 0.01 < least < 0.5
    fast = trained(Stack(), [Checkpoint(budget=least + 0.0005)], strict=True)
    fast(X)
    assert fast.report()["checkpoint"].applied


def test_an_exact_plan_takes_the_least_time():
    near, least = (trained(Stack(1), [Checkpoint(budget=0.7, exact=exact)]) for exact in (False, True))
    plain = trained(Stack(1), [])
    for fast in (near, least, plain):
        step(fast, {"x": X})
    times = [float(re.search(r"again takes (\S+) %", plan_of(fast))[1]) for fast in (least, near)]
    assert 0 < times[0] < times[1]
    assert step(least, {"x": X})[0] <= 0.71 * step(plain, {"x": X})[0]
    equal(step(least, {"x": X})[1], step(plain, {"x": X})[1])


def test_steps_too_long_for_an_exact_plan_are_refused():
    fast = trained(Stack(5), [Checkpoint(budget=0.6, exact=True)], strict=True)
    with pytest.raises(OptionError, match="exact plans are for steps of up to 60 calls, this one has"):
        fast(X)


def test_a_part_of_a_larger_tensor_is_an_input_like_others():
    wide = torch.randn(B, S + 3, 2 * W)[:, :S, :W]
    plain, fast = plain_stack(), trained(Stack(), [Checkpoint(budget=0.6)], strict=True)
    for one in (plain, fast):
        step(one, {"x": wide})
    (peak, want), (less, got) = step(plain, {"x": wide}), step(fast, {"x": wide})
    equal(got, want)
    assert less < peak


def test_inference_keeps_nothing_anyway():
    fast = fxaccel.accelerate(Stack(), ["checkpoint{budget=0.4}"]).eval()
    with pytest.warns(UserWarning, match="serves training only"), torch.no_grad():
        fast(X)


def test_what_cannot_be_computed_again_is_kept():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(W, 4 * W), nn.Linear(4 * W, W)
            self.register_buffer("seen", torch.zeros(4 * W))

        def forward(self, x):
            y = self.up(x)
            self.seen += y.detach().mean((0, 1))
            y = y * 2.0
            y[:, :4] *= 0.5  # its value before is gone
            return self.down(torch.tanh(y)).square().mean()

    torch.manual_seed(0)
    model = Written()
    plain, fast = trained(model, []), trained(model, [Checkpoint(budget=0.75)])
    for one in (plain, fast):
        step(one, {"x": X})
    equal(step(fast, {"x": X})[1], step(plain, {"x": X})[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "takes a budget or max_overhead, one of the two"),
        ({"budget": 0.4, "max_overhead": 0.1}, "takes a budget or max_overhead, one of the two"),
        ({"budget": "3 parsecs"}, "expected bytes or a share of the activation memory"),
        ({"budget": 1.5}, "expected bytes or a share of the activation memory"),
        ({"budget": "-1GiB"}, "expected bytes or a share of the activation memory"),
        ({"max_overhead": -0.1}, "max_overhead is -0.1, expected a share from 0"),
        ({"max_overhead": 0.1, "exact": True}, "an exact plan is one for a budget"),
        ({"budget": 0.4, "optimizer": "lion"}, "optimizer is 'lion', expected one of none, sgd"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        Checkpoint(**options)


def test_inductor_decides_itself():
    with pytest.raises(
        OptionError, match="says when values are computed again, and so does backend='inductor'"
    ):
        fxaccel.accelerate(Stack(), ["checkpoint{budget=0.4}"], backend="inductor")


def test_a_budget_of_a_few_bytes_is_refused_at_once():
    model = Stack(layers=1)
    state = sum(p.numel() * p.element_size() for p in model.parameters())
    fast = trained(model, [Checkpoint(budget=f"{(state + 40) / 1000}kB")], strict=True)
    with pytest.raises(OptionError, match="the smallest that can is"):
        fast(X)
