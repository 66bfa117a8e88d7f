"""An accelerated language model writes with transformers' own `generate()`, token for token as before.

One capture serves the prompt and one every step, whatever the lengths. Run: python examples/generate.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxaccel

torch.manual_seed(0)
config = LlamaConfig(
    num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
fast = fxaccel.accelerate(model)

prompt = torch.randint(1, 256, (2, 7))
options = {"max_new_tokens": 30, "do_sample": False}
assert torch.equal(fast.generate(prompt, **options), model.generate(prompt, **options))
assert len(fast.report().captures) == 2

longer = torch.randint(1, 256, (2, 12))
assert torch.equal(fast.generate(longer, **options), model.generate(longer, **options))
assert len(fast.report().captures) == 2  # other lengths, the same captures

sampled = {"max_new_tokens": 30, "do_sample": True, "top_k": 20}
torch.manual_seed(1)
first = fast.generate(prompt, **sampled)
torch.manual_seed(1)
assert torch.equal(first, model.generate(prompt, **sampled))
print(f"{len(fast.report().captures)} captures; the tokens are equal")
