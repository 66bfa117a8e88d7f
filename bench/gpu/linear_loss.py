"""The last linear and its cross entropy at large vocabularies on a GPU: python bench/gpu/linear_loss.py

A training step in bf16, forward and backward to hidden states and weight, in Tflop/s of the three products
that eager does; beside eager, torch.compile and, where it is installed, Liger. The peak of memory is that of
a step, hidden states and weight left out, gradients counted in; ours at several budgets, one of which comes
nearest to Liger's peak.
"""

import torch
import torch.nn.functional as F
from measure import peak, report

from fxaccel.kernels import linear_cross_entropy

MIB = 2**20
SHAPES = ((8192, 2048, 32_000), (8192, 4096, 128_256), (16_384, 4096, 128_256))  # rows, width, classes
BUDGETS = (64, 256, 1024, 4096)


def eager(x, w, y):
    """As transformers writes it: the logits cast up."""
    return F.cross_entropy(F.linear(x, w).float(), y)


def liger():
    """Liger's function, or None where it is not installed."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as f
    except ImportError:
        return None
    return lambda x, w, y: f(x, w, y)


def ours(budget):
    """Ours with a chunk of so many bytes, 0 for its own choice."""
    return lambda x, w, y: linear_cross_entropy.op(x, w, None, y, wide=True, budget=budget)


def candidates():
    """Every way to take the step."""
    found = {"eager": eager, "compile": torch.compile(eager), "ours": ours(0)}
    found |= {f"ours {b}MiB": ours(b * MIB) for b in BUDGETS}
    return found | ({} if liger() is None else {"liger": liger()})


def stepped(f, given):
    """Forward, and backward to hidden states and weight."""
    x, w, y = given
    return lambda: torch.autograd.grad(f(x, w, y), (x, w))


def main():
    """Every shape: peaks, then times of what fits."""
    for n, d, v in SHAPES:
        torch.manual_seed(0)
        x = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w = (torch.randn(v, d, device="cuda") * d**-0.5).bfloat16().requires_grad_()
        y = torch.randint(0, v, (n,), device="cuda")
        torch._dynamo.reset()
        steps = {name: stepped(f, (x, w, y)) for name, f in candidates().items()}
        peaks = {name: peak(step) for name, step in steps.items()}
        for name, nbytes in peaks.items():
            print(f"linear_loss bf16 [{n}, {d}, {v}] {name:14} {nbytes / MIB:10.0f} MiB", flush=True)
        for name in [name for name, nbytes in peaks.items() if nbytes >= 0]:
            case = f"bf16 [{n}, {d}, {v}] {peaks[name] / MIB:.0f} MiB"
            report("linear_loss", case, {name: steps[name]}, 6e-6 * n * d * v, "Tflop/s")


if __name__ == "__main__":
    main()
