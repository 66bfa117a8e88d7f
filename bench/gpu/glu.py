"""Gated activations on a GPU against eager, torch.compile and Liger: python bench/gpu/glu.py

In TB/s of the least traffic, 3 tensor-sized transfers forward and 5 backward; `copy` is the ceiling, and its
share is what counts. Gate and up apart, and halves of one tensor ("packed"), which are read where they lie.
Liger's kernels, which know SwiGLU and GeGLU with a tanh, run where the package is installed; so do linears of
one input merged and apart, in rows of a decoding step and of a prompt.
"""

import importlib.util

import torch
import torch.nn.functional as F
from measure import backward, report

from fxaccel.kernels import glu

TOKENS = 2**25  # elements: 64 MiB in bf16
COLUMNS = (1024, 4096, 11_008, 14_336, 28_672)
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
MERGED = {  # inputs, and outputs of each linear
    "qkv of 4096": (4096, (4096, 4096, 4096)),
    "grouped qkv of 4096": (4096, (4096, 1024, 1024)),
    "gate and up of 4096": (4096, (14_336, 14_336)),
}


def liger(activation):
    """Liger's function for the activation, None where it is not installed or has none."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.ops import geglu, swiglu

    known = {"silu": swiglu.LigerSiLUMulFunction, "gelu_tanh": geglu.LigerGELUMulFunction}
    return known[activation].apply if activation in known else None


def ways(activation):
    """The candidates as functions of gate and up."""

    def eager(gate, up):
        return glu.reference(gate, up, activation)

    found = {
        "eager": eager,
        "compile": torch.compile(eager),
        "ours": lambda gate, up: glu.op(gate, up, activation),
    }
    theirs = liger(activation)
    return found if theirs is None else found | {"liger": theirs}


def run_glu(activation, columns, packed):
    """One size, forward and backward."""
    rows = TOKENS // columns
    both = torch.randn(rows, 2 * columns, device="cuda", dtype=torch.bfloat16)
    plain = both.chunk(2, -1) if packed else tuple(t.contiguous() for t in both.chunk(2, -1))
    leaves = [t.detach().requires_grad_() for t in plain]
    torch._dynamo.reset()
    functions = ways(activation)
    if packed:
        functions.pop("liger", None)  # which copies what is not contiguous
    bytes_ = rows * columns * 2 / 1e6  # over us: TB/s
    case = f"bf16 [{rows}, {columns}]{' packed' if packed else ''} {activation}"
    target, source = torch.empty_like(both[:, :columns].contiguous()), both[:, :columns].contiguous()
    report("glu", f"{case} ceiling", {"copy": lambda: target.copy_(source)}, 2 * bytes_, "TB/s")
    forward = {k: (lambda f=f: f(*plain)) for k, f in functions.items()}
    report("glu", f"{case} forward", forward, 3 * bytes_, "TB/s")
    steps = {k: backward(f, leaves) for k, f in functions.items()}
    report("glu", f"{case} backward", steps, 5 * bytes_, "TB/s")


def run_merged(name, rows):
    """Linears of one input, apart and as one, whose results are split."""
    inputs, outputs = MERGED[name]
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n, inputs, device="cuda", dtype=torch.bfloat16) / inputs**0.5 for n in outputs]
    whole = torch.cat(weights)
    candidates = {
        "apart": lambda: [F.linear(x, w) for w in weights],
        "merged": lambda: F.linear(x, whole).split(outputs, -1),
    }
    report(
        "merge-linears", f"bf16 {name}, {rows} rows", candidates, 2 * rows * whole.numel() / 1e6, "TFLOP/s"
    )


def main():
    """Every case."""
    for activation in ACTIVATIONS:
        for columns in COLUMNS:
            for packed in (False, True):
                run_glu(activation, columns, packed)
    for name in MERGED:
        for rows in (1, 16, 256, 4096):
            run_merged(name, rows)


if __name__ == "__main__":
    main()
