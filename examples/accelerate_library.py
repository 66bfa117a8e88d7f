"""Hugging Face Accelerate prepares, trains, clips and saves an accelerated model as any other.

Run: python examples/accelerate_library.py
"""

import copy
import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxaccel

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 1))
fast = fxaccel.accelerate(copy.deepcopy(model))
data = TensorDataset(torch.randn(64, 8), torch.randn(64, 1))


def trained(this, folder):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(this.parameters(), lr=1e-2)
    this, optimizer, loader = accelerator.prepare(this, optimizer, DataLoader(data, batch_size=8))
    losses = []
    for x, y in loader:
        with accelerator.accumulate(this):
            loss = nn.functional.mse_loss(this(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(this.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    accelerator.save_state(folder)
    return accelerator, accelerator.unwrap_model(this), torch.tensor(losses)


with tempfile.TemporaryDirectory() as folder:
    _, model, want = trained(model, f"{folder}/model")
    accelerator, ours, got = trained(fast, f"{folder}/fast")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert ours is fast
    last = copy.deepcopy(fast.state_dict())
    accelerator.load_state(f"{folder}/fast")
    assert all(torch.equal(v, last[k]) for k, v in fast.state_dict().items())
assert fast.state_dict().keys() == model.state_dict().keys()
print("losses", [round(x, 4) for x in got.tolist()])
