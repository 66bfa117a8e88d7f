"""torch.export of an accelerated model, saved by `torch.export.save` and read without the model's code.

On the CPU the program holds torch's own operators alone; on a GPU also those of fxaccel, so import it where
the program is read. Run: python examples/exported.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

import fxaccel

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8)).eval()
x = torch.randn(4, 8)
with torch.no_grad():
    fast = fxaccel.accelerate(model, ["fuse-norm"], example_inputs=(x,))
    exported = torch.export.export(fast, (x,), dynamic_shapes=({0: Dim.AUTO},))
    assert exported.state_dict.keys() >= model.state_dict().keys()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt2"
        torch.export.save(exported, file)
        loaded = torch.export.load(file).module()
    for rows in (4, 9):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(loaded(x), model(x))
print("operators:", sorted({str(n.target) for n in exported.graph.nodes if n.op == "call_function"}))
