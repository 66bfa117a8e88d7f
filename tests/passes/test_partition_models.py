"""partition on architectures of transformers: the step that it was, in stages near the best there are."""

import itertools

import pytest
import torch

import fxaccel
from fxaccel.passes import Partition
from fxaccel.profile import profile
from fxaccel.roofline import FORWARDS, roofline
from fxaccel.stage_module import stage_modules
from tests.helpers import session
from tests.zoo.torchvision_shim import importable

with importable():  # transformers looks for torchvision
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

WORDS = 1000


def made(name, layers, width):
    torch.manual_seed(0)
    ids = torch.randint(0, WORDS, (4, 16))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if name == "gpt2":
        config = GPT2Config(n_layer=layers, n_embd=width, n_head=4, vocab_size=WORDS, use_cache=False)
        return GPT2LMHeadModel(config).train(), batch
    if name == "t5":
        config = T5Config(
            num_layers=layers, d_model=width, d_kv=width // 4, num_heads=4, d_ff=4 * width, vocab_size=WORDS,
            decoder_start_token_id=0, use_cache=False,
        )  # fmt: skip
        return T5ForConditionalGeneration(config).train(), batch
    sizes = {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": 4,
        "intermediate_size": 4 * width, "vocab_size": WORDS,
    }  # fmt: skip
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False)).train(), batch
    model = BertForSequenceClassification(BertConfig(**sizes)).train()
    return model, {**batch, "labels": torch.randint(0, 2, (4,))}


def step(model, batch):
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(1)
    result = model(**batch)
    result.loss.backward()
    return result, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "llama", "bert"))]
)
def test_a_step_of_a_transformer_in_stages_is_the_step(name):
    model, batch = made(name, 2, 32)
    plain = fxaccel.accelerate(model, [], check=False)
    fast = fxaccel.accelerate(model, [Partition(stages=3)], strict=True)
    step(plain, batch), step(fast, batch)
    (want, gradients), (got, ours) = step(plain, batch), step(fast, batch)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.logits, want.logits)
    for key, gradient in gradients.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-5, atol=1e-7)
    taken = stage_modules(fast, **batch)
    assert set().union(*(s.state_dict() for s in taken)) == set(model.state_dict())
    tied = [n for n in ("lm_head.weight",) if name in ("gpt2", "t5")]
    for key in tied:
        assert 0 in (holders := [i for i, s in enumerate(taken) if key in s.state_dict()])
        assert len(holders) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5", "llama", "bert"])
@pytest.mark.parametrize("stages", [2, 4])
def test_stages_are_near_the_bound_and_better_than_equal_layers(name, stages):
    model, batch = made(name, 6, 128)
    fast = fxaccel.accelerate(model, [], check=False)
    fast(**batch)
    program = session(fast).all[0].canonical
    plan = Partition(stages=stages).plan(program)
    found = roofline(torch.device("cpu"), torch.float32).seconds(profile(program))
    largest = FORWARDS * max(found.values())  # which no cut divides
    equal_share = sum(s.seconds for s in plan.stages) / stages
    assert max(s.seconds for s in plan.stages) <= equal_share + largest
    assert 0 <= plan.gap <= largest / equal_share
    prefix = {"gpt2": "transformer.h.", "bert": "bert.encoder.layer.", "llama": "model.layers."}
    if name in prefix:
        ends = [round(6 * s / stages) for s in range(1, stages)]
        equal = Partition(at=tuple(f"{prefix[name]}{e}" for e in ends)).plan(program)
    else:
        names = [f"{side}.block.{i}" for side, i in itertools.product(("encoder", "decoder"), range(6))]
        equal = Partition(at=tuple(names[round(12 * s / stages)] for s in range(1, stages))).plan(program)
    ours, theirs = (max(s.seconds for s in p.stages) for p in (plan, equal))
    assert ours <= theirs
