"""Capture: caches and other objects that come in, go out and change, and generation with them."""

import types

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.errors import CaptureError
from tests.helpers import Method as Function
from tests.helpers import captures, in_pieces
from tests.test_capture import A
from tests.zoo.torchvision_shim import importable

F = nn.functional


# -- objects ---------------------------------------------------------------------------------------


class Cache:
    """A little like transformers' DynamicCache."""

    def __init__(self):
        self.keys, self.values, self.seen = [], [], 0

    def update(self, key, value):
        if not self.keys:
            self.keys, self.values = [key], [value]
        else:
            self.keys = [torch.cat([self.keys[0], key], 1)]
            self.values = [torch.cat([self.values[0], value], 1)]
        self.seen += key.shape[1]
        return self.keys[0], self.values[0]


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, cache=None):
        cache = Cache() if cache is None else cache
        k, v = cache.update(self.k(x), self.v(x))
        return F.scaled_dot_product_attention(self.q(x), k, v), cache


def test_a_cache_comes_out_goes_in_and_is_changed_in_place():
    model = Step()
    fast = fxaccel.accelerate(model)
    x = torch.randn(2, 3, 8)
    want, theirs = model(x)
    got, ours = fast(x)
    assert type(ours) is Cache
    for _ in range(3):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(vars(ours), vars(theirs))
        step = torch.randn(2, 1, 8)
        before = ours
        want, theirs = model(step, theirs)
        got, ours = fast(step, ours)
        assert ours is before  # the very object
    assert ours.seen == 6
    assert not in_pieces(fast)


def test_a_cache_does_not_hold_the_values_of_the_capturing_call():
    fast = fxaccel.accelerate(Step())
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    first, second = fast(a)[1], fast(b)[1]
    assert first is not second
    assert not torch.equal(first.keys[0], second.keys[0])


class Norms(nn.Module):
    """Its results, those kept in an object too, are rounded otherwise by what a pass makes of them."""

    def __init__(self):
        super().__init__()
        self.up, self.across = nn.Linear(8, 200), nn.Linear(200, 200)

    def forward(self, x, store):
        up = self.up(x)
        store.first = up * torch.rsqrt(up.square().mean(-1, keepdim=True) + 1e-6)
        across = self.across(store.first)
        store.second = across * torch.rsqrt(across.square().mean(-1, keepdim=True) + 1e-6)
        return store


def test_an_object_that_comes_in_and_goes_out_is_checked_in_float64():
    x, store = torch.randn(64, 8), types.SimpleNamespace(first=torch.ones(1), second=torch.ones(1))
    fast = fxaccel.accelerate(Norms(), ["fuse-norm"], example_inputs=(x, store))
    assert not in_pieces(fast)
    assert fast.report()["fuse-norm"].applied
    assert "(float64)" in fast.report().captures[0].check
    first, second = store.first, store.second
    assert fast(x, store) is store
    assert store.first is not first
    assert store.second is not second


def test_an_object_in_a_circle_is_refused_with_a_hint():
    class Loop:
        def __init__(self, x):
            self.x, self.me = x, self

    with pytest.raises(CaptureError, match="register_pytree_node"):
        fxaccel.accelerate(Function(lambda self, x: Loop(x * 2)))(A)


# -- a model of transformers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt():
    with importable():
        transformers = pytest.importorskip("transformers")
        _ = transformers.GPT2LMHeadModel
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def test_a_model_output_keeps_its_class(gpt):
    fast = fxaccel.accelerate(gpt)
    ids = torch.randint(0, 50, (2, 7))
    got, want = fast(input_ids=ids, labels=ids), gpt(input_ids=ids, labels=ids)
    assert type(got) is type(want)
    torch.testing.assert_close((got.loss, got.logits), (want.loss, want.logits))
    assert type(got.past_key_values) is type(want.past_key_values)
    assert fast.config is gpt.config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("batch", "cache"), [(2, None), (1, None), (2, "static")])
def test_generate_writes_the_same_text(gpt, batch, cache):
    fast = fxaccel.accelerate(gpt)
    ids = torch.randint(1, 50, (batch, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    assert torch.equal(fast.generate(ids, **options), gpt.generate(ids, **options))
    assert not in_pieces(fast)
    assert captures(fast) == 2  # the prompt, and one for every step
