"""torch.compile on top of an accelerated model, in inference and training.

Run: python examples/compiled.py
"""

import copy

import torch
from torch import nn

import fxaccel

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8))
fast = fxaccel.accelerate(copy.deepcopy(model))
x = torch.randn(4, 8)
fast(x)  # captured here; the compiler then sees the rewritten graph
compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)  # or Inductor, the default

torch.testing.assert_close(compiled(x), model(x))
compiled(x).square().sum().backward()
model(x).square().sum().backward()
for (name, p), q in zip(model.named_parameters(), fast.parameters(), strict=True):
    torch.testing.assert_close(q.grad, p.grad, msg=name)
torch.testing.assert_close(compiled(torch.randn(6, 8)).shape, torch.Size([6, 8]))
print(f"{len(fast.report().captures)} capture under torch.compile")
