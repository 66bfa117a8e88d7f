"""generate(): 200 tokens are the original's, one for one, from one capture of the prompt and one of a step.

Greedy decoding breaks ties by the last bit. Weights are drawn wide enough that the best token leads by far
more than rounding moves a logit, which is asserted.
"""

import pytest
import torch

import fxaccel
from tests.helpers import captures, in_pieces
from tests.zoo.torchvision_shim import importable

TOKENS = 200
WORDS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2():
    with importable():
        from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=4, n_embd=64, initializer_range=0.1, tie_word_embeddings=False, **WORDS)
    )


def llama():
    with importable():
        from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64,
        intermediate_size=128, initializer_range=0.1, **WORDS,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("cache", [None, pytest.param("static", marks=pytest.mark.slow)])
def test_two_hundred_tokens_are_the_original_s(build, cache):
    model = build().eval()
    fast, ids = fxaccel.accelerate(model), torch.randint(1, 300, (1, 9))
    options = {
        "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "cache_implementation": cache,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    want, got = model.generate(ids, **options), fast.generate(ids, **options)
    assert want.sequences.shape == (1, 9 + TOKENS)
    assert torch.equal(got.sequences, want.sequences)
    assert captures(fast) == 2
    assert not in_pieces(fast)
    logits = torch.stack(want.logits)[..., 1:]  # without the one that ends the text, which is ruled out
    moved = (logits - torch.stack(got.logits)[..., 1:]).abs().max()
    best = logits.topk(2, -1).values
    assert (best[..., 0] - best[..., 1]).min() > 4 * moved
    assert got.sequences.unique().numel() > 15


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=str)
@pytest.mark.slow
def test_beams_and_samples_are_the_original_s(more):
    model = llama().eval()
    fast, ids = fxaccel.accelerate(model), torch.randint(1, 300, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = []
    for one in (model, fast):
        torch.manual_seed(1)
        found.append(one.generate(ids, attention_mask=mask, max_new_tokens=30, **more))
    assert torch.equal(*found)
    assert captures(fast) <= 4
