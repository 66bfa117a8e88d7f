"""Parallel linears as one on the CPU, whole models: python bench/merge_linears.py

BERT and Llama of 4 layers (GPT-2 has one linear for queries, keys and values already), with the default
passes and with `merge-linears` beside them, in inference and for a training step (forward and backward of
every parameter, without an optimizer). Above 1, merging is the faster. `fold` has one parameter in the place
of the merged ones; without it a training step lays the weights below each other at each call.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from harness import interleaved, save
from norm import keep_memory
from torch import nn

import fxaccel
from tests.zoo.torchvision_shim import importable

SIZES = ((2, 128), (1, 16))
COMMON = {"vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def models(width: int) -> dict[str, nn.Module]:
    """Four layers of each, of heads of 64."""
    with importable():  # transformers looks for torchvision
        from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    common = {"num_hidden_layers": 4, "hidden_size": width, "num_attention_heads": width // 64, **COMMON}
    llama = LlamaConfig(
        intermediate_size=8 * width // 3, num_key_value_heads=width // 128, use_cache=False, **common
    )
    bert = BertConfig(intermediate_size=4 * width, **common)
    return {"bert": BertModel(bert).eval(), "llama": LlamaForCausalLM(llama).eval()}


def forms(model: nn.Module, grad: bool) -> dict[str, Any]:
    """The model with the default passes, and merged in each way; parameters of its own for each."""
    passes = {
        "apart": [], "merged": ["merge-linears{even_if_slower=true}"],
        "fold": ["merge-linears{even_if_slower=true,fold=true}"],
    }  # fmt: skip
    defaults = ["fuse-attention", "fuse-norm"]
    with torch.set_grad_enabled(grad):
        return {k: fxaccel.accelerate(copy.deepcopy(model), defaults + v) for k, v in passes.items()}


def step(fast: Any, ids: torch.Tensor, grad: bool) -> Callable[[], Any]:
    """One call, or one training step."""

    def infer() -> None:
        with torch.no_grad():
            fast(input_ids=ids)

    def train() -> None:
        fast(input_ids=ids)[0].square().mean().backward()

    return train if grad else infer


def main() -> None:
    """Every model, width and size."""
    keep_memory()
    figures: dict[str, Any] = {}
    for width in (256, 512):
        for name, model in models(width).items():
            for grad in (False, True):
                made = forms(model, grad)
                for size in SIZES:
                    ids = torch.randint(1, 1000, size)
                    calls = {k: step(f, ids, grad) for k, f in made.items()}
                    times = interleaved(calls, rounds=15, repeat=3 if size[1] > 16 else 10)
                    seconds = {k: t["min"] for k, t in times.items()}
                    ratios = {k: seconds["apart"] / seconds[k] for k in seconds if k != "apart"}
                    case = f"{name} {width} {list(size)} {'training' if grad else 'inference'}"
                    figures[case] = {"seconds": seconds, "ratios": ratios}
                    print(f"{case:34}", {k: round(r, 3) for k, r in ratios.items()}, flush=True)
                sites = len(made["merged"].report()["merge-linears"].applied)
                figures.setdefault("linears merged", {})[name] = sites
    save("merge_linears_cpu", figures)


if __name__ == "__main__":
    main()
