"""O1, O2, O3 of the targets: time to accelerate, overhead of a call, time of passes on large graphs.

O1  accelerate() cold, capture included, 4-layer BERT / GPT-2 / Llama, and a second process that loads
    the saved file: each in a fresh process, CPU seconds after the imports, all files compiled to
    bytecode by an earlier process, as an installer leaves them.
O2  24 x Linear(4) in a row under no_grad: eager, exported, torch.compile, ours.
O3  passes on a graph of 10,000 nodes; 48 layers against 24.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import interleaved, save
from torch import nn

import fxaccel
from fxaccel import manager
from fxaccel.canonical import canonicalize
from fxaccel.capture import capture
from fxaccel.discover import resolve

COLD = """
import sys, time, torch
from transformers import (BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM)
import fxaccel
from fxaccel.discover import available
torch.set_num_threads(1)
torch.manual_seed(0)
common = dict(vocab_size=1000, bos_token_id=0, eos_token_id=0, pad_token_id=0)
models = {
    "bert": lambda: BertModel(BertConfig(num_hidden_layers=4, hidden_size=256, num_attention_heads=4,
                                         intermediate_size=1024, **common)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=256, n_head=4, **common)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, hidden_size=256, num_attention_heads=4,
                                                  intermediate_size=512, **common)),
}
name, file, warm = sys.argv[1:]
model = models[name]().eval()
ids = torch.randint(0, 1000, (2, 128))
with torch.no_grad():
    model(input_ids=ids)
    start = time.thread_time()
    if warm == "load":
        fast = fxaccel.load(file)
    else:
        fast = fxaccel.accelerate(model, example_inputs={"input_ids": ids})
    fast(input_ids=ids)
    print(time.thread_time() - start)
    if warm != "load":
        fast.save(file)
"""


def cold() -> dict[str, dict[str, float]]:
    """O1: CPU seconds of accelerate with its first call, and of load with its first call."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "cold.py"
        script.write_text(COLD)
        compiled = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": folder}
        for name in ("bert", "gpt2", "llama"):
            file = str(Path(folder) / f"{name}.fxa")
            times: dict[str, list[float]] = {"accelerate": [], "load": []}
            for _ in range(3):
                for kind, taken in times.items():
                    out = subprocess.run(
                        [sys.executable, str(script), name, file, kind],
                        capture_output=True, text=True, check=True, env=compiled,
                    )  # fmt: skip
                    taken.append(float(out.stdout.split()[-1]))
            found[name] = {kind: min(taken) for kind, taken in times.items()}
    return found


def overhead() -> dict[str, dict[str, float]]:
    """O2: seconds a call."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(24))).eval()
    x = torch.randn(2, 4)
    fast = fxaccel.accelerate(model)
    exported = torch.export.export(model, (x,), strict=True).module()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        calls = {
            "eager": lambda: model(x), "exported": lambda: exported(x),
            "compile_eager_backend": lambda: compiled(x), "fxaccel": lambda: fast(x),
        }  # fmt: skip
        return interleaved(calls, rounds=25, repeat=50)


class Block(nn.Module):
    """A pre-norm block of a Llama, written out: about 60 ATen nodes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def norm(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x, self.first)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        p = torch.softmax(q @ k.transpose(-1, -2) / (q.shape[-1] ** 0.5), -1)
        x = x + self.o((p @ v).transpose(1, 2).flatten(-2))
        h = self.norm(x, self.second)
        gate = self.gate(h)
        return x + self.down(gate * torch.sigmoid(gate) * self.up(h))


def passes(layers: int) -> dict[str, float]:
    """O3: seconds of canonicalization and of the default passes on that many blocks."""
    model = nn.Sequential(*(Block(32, 2) for _ in range(layers)))
    program = capture(model, (torch.randn(2, 6, 32),), {})
    nodes = len(program.graph.nodes)
    ordered = manager.order(resolve(None))
    start = time.thread_time()
    canonicalize(program)
    middle = time.thread_time()
    run = manager.run(program, ordered)
    end = time.thread_time()
    applied = sum(len(p.applied) for p in run.report.passes)
    return {"nodes": nodes, "canonicalize": middle - start, "passes": end - middle,
            "total": end - start, "applied": applied}  # fmt: skip


def main() -> None:
    """Measure, print and save."""
    torch.set_num_threads(1)
    o2 = overhead()
    ratio = o2["fxaccel"]["min"] / o2["eager"]["min"]
    print(f"O2 call overhead, 24 x Linear(4): {ratio:.2f} of eager (target 0.60)", o2)
    small, double = passes(24), passes(48)
    count = 24
    while (large := passes(count))["nodes"] < 10_000:
        count = int(count * 10_500 / large["nodes"]) + 1
    growth = double["total"] / small["total"]
    print(f"O3 passes on {large['nodes']} nodes: {large['total']:.2f} s (target 5); 48 layers against 24: "
          f"{growth:.2f} (target 2.2)", small, double, large)  # fmt: skip
    o1 = cold()
    print("O1 accelerate and first call, CPU s (target 2); load and first call (target 0.5)", o1)
    save("overhead", {
        "O1": o1, "O2": {"shape": "24 x Linear(4), x float32[2,4], no_grad", "seconds": o2, "ratio": ratio},
        "O3": {"layers_24": small, "layers_48": double, "large": large, "growth": growth},
    })  # fmt: skip
    print(json.dumps({"O2": ratio, "O3": large["total"], "growth": growth}))


if __name__ == "__main__":
    main()
