"""transformers' Trainer trains an accelerated model: equal losses, a checkpoint that the original loads.

Run: python examples/trainer.py
"""

import copy
import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fxaccel

torch.manual_seed(0)
config = BertConfig(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=100,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
model = BertForSequenceClassification(config)
fast = fxaccel.accelerate(copy.deepcopy(model))
tokens = torch.randint(0, 100, (32, 12))
rows = [{"input_ids": t, "labels": t.sum() % 2, "not of the model": "x"} for t in tokens]  # dropped


def trained(this, folder):
    arguments = TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=8, logging_steps=1, save_steps=8, seed=0,
        learning_rate=1e-3, report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(this, arguments, train_dataset=rows[:24], eval_dataset=rows[24:])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor([*losses, trainer.evaluate()["eval_loss"]])


with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
    want, got = trained(model, a), trained(fast, b)
    loaded = BertForSequenceClassification.from_pretrained(f"{b}/checkpoint-8")
torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
assert type(loaded) is BertForSequenceClassification
for name, value in fast.state_dict().items():
    assert torch.equal(loaded.state_dict()[name], value), name
print("losses", [round(x, 4) for x in got.tolist()])
