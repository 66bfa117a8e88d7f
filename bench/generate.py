"""What a token takes in `generate()`: python bench/generate.py [rounds]

GPT-2 and Llama of 4 layers and width 256, float32, 200 tokens of greedy decoding after one prompt of 16, with
the cache that grows (the default) and the static one, the model as written beside the one accelerated by
default passes. Whole calls of `generate()` by turns, on one thread, minimum of the rounds, so transformers'
own work between the steps counts for both. Of each the number of captures, whether the tokens are equal,
and by how much the best token leads at its closest, beside what rounding does to a logit.
"""

import sys
import warnings
from typing import Any

import torch
from harness import interleaved, save

import fxaccel
from tests.zoo.torchvision_shim import importable

with importable():
    import transformers as hf
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

WORDS = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS = {
    "GPT-2": lambda: GPT2LMHeadModel(hf.GPT2Config(n_layer=4, n_head=4, n_embd=256, **WORDS)),
    "Llama": lambda: LlamaForCausalLM(
        hf.LlamaConfig(
            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=256,
            intermediate_size=512, initializer_range=0.1, **WORDS,
        )
    ),
}  # fmt: skip

TOKENS = 200


def measured(name: str, cache: str | None, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    torch.manual_seed(0)
    model, ids = MODELS[name]().eval(), torch.randint(1, WORDS["vocab_size"], (1, 16))
    fast = fxaccel.accelerate(model)
    options = {
        "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "cache_implementation": cache
    }  # fmt: skip

    def write(of: Any, **more: Any) -> Any:
        return of.generate(ids, **options, **more)

    times = interleaved({"model": lambda: write(model), "fast": lambda: write(fast)}, rounds=rounds)
    want, got = (write(m, output_logits=True, return_dict_in_generate=True) for m in (model, fast))
    wanted, found = torch.stack(want.logits), torch.stack(got.logits)
    wanted[..., WORDS["eos_token_id"]] = -torch.inf  # which min_new_tokens rules out
    best = wanted.topk(2, -1).values
    finite = wanted.isfinite()
    return {
        "model ms": 1e3 * times["model"]["min"] / TOKENS,
        "fast ms": 1e3 * times["fast"]["min"] / TOKENS,
        "times as fast": times["model"]["min"] / times["fast"]["min"],
        "captures": len(fast.report().captures),
        "tokens equal": torch.equal(want.sequences, got.sequences),
        "different tokens": got.sequences.unique().numel(),
        "closest lead": (best[..., 0] - best[..., 1]).min().item(),
        "largest rounding": (wanted - found)[finite].abs().max().item(),
    }


def main() -> None:
    """Measure all and keep the figures."""
    warnings.filterwarnings("ignore")
    hf.logging.set_verbosity_error()
    rounds, found = int((sys.argv[1:] or ["9"])[0]), {}
    for name in MODELS:
        for cache in (None, "static"):
            key = f"{name}, {cache or 'growing'} cache"
            found[key] = measured(name, cache, rounds)
            print(key, found[key], flush=True)
    save("generate_cpu", {"tokens": TOKENS, "transformers": hf.__version__, "results": found})


if __name__ == "__main__":
    main()
