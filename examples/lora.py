"""LoRA adapters of PEFT, put in before acceleration or after it: trained, saved, merged as always.

Run: python examples/lora.py
"""

import copy
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import fxaccel

torch.manual_seed(0)
config = GPT2Config(
    n_layer=1, n_head=2, n_embd=32, vocab_size=100, n_positions=32, bos_token_id=0, eos_token_id=0,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
base, ids = GPT2LMHeadModel(config), torch.randint(0, 100, (4, 10))
lora = LoraConfig(
    r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", init_lora_weights=False
)


def adapted(model):
    torch.manual_seed(1)  # adapters of equal random values
    return get_peft_model(copy.deepcopy(model), lora)


def trained(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


plain = adapted(base)
before = fxaccel.accelerate(adapted(base))  # adapters are in the model that is accelerated
captured = fxaccel.accelerate(base)
captured(input_ids=ids, labels=ids)
after = adapted(captured)  # adapters are put into a model that was captured without them
want = trained(plain)
for model in (before, after):
    torch.testing.assert_close(trained(model), want, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)

with tempfile.TemporaryDirectory() as folder:
    before.save_pretrained(folder)  # the adapters alone, which fit the original
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
with torch.no_grad():
    logits = before(input_ids=ids).logits
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, logits)
    torch.testing.assert_close(after.merge_and_unload()(input_ids=ids).logits, logits, rtol=1e-3, atol=1e-3)
print("losses", [round(x, 4) for x in want.tolist()])
