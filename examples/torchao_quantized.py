"""A model that torchao has quantized: its weights run on fxaccel's kernels, in bfloat16 on the CPU.

Run: python examples/torchao_quantized.py
"""

import copy

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fxaccel

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64)).eval()
quantized, x = copy.deepcopy(model), torch.randn(4, 64)
quantize_(quantized, Int8WeightOnlyConfig())

with torch.no_grad():
    fast = fxaccel.accelerate(quantized, example_inputs=(x,))
    ours, theirs, exact = fast(x), quantized(x), model(x)
assert (ours - theirs).norm() < 0.01 * theirs.norm()  # inputs are rounded to bfloat16
assert (ours - exact).norm() < 0.02 * exact.norm()  # int8 for float32
assert fast.state_dict().keys() == quantized.state_dict().keys()
called = {word.split("(")[0] for word in fast.code.split() if "weight_only" in word}
print("called:", sorted(called))
