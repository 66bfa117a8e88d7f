"""Weights by safetensors: one file for the original and the accelerated model, tied weights stored once.

Run: python examples/safetensors_weights.py
"""

import copy
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

import fxaccel


class Tied(nn.Module):
    """An embedding, a layer, and a head with the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.mix(self.embed(ids))))


torch.manual_seed(0)
model, other, ids = Tied(), Tied(), torch.randint(0, 20, (2, 5))
fast = fxaccel.accelerate(copy.deepcopy(model))
fast(ids)

with tempfile.TemporaryDirectory() as folder:
    ours, theirs = Path(folder) / "fast.safetensors", Path(folder) / "model.safetensors"
    save_model(fast, str(ours))
    save_model(model, str(theirs))
    assert ours.read_bytes() == theirs.read_bytes()
    load_model(other, str(ours))  # into the original class
    torch.testing.assert_close(other(ids), model(ids))
    with torch.no_grad():
        fast.mix.weight.zero_()
    load_model(fast, str(theirs))  # and back, in place: no new capture
torch.testing.assert_close(fast(ids), model(ids))
assert len(fast.report().captures) == 1
print("both files are equal, byte for byte")
