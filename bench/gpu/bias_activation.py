"""Bias and activation on a GPU against eager and torch.compile: python bench/gpu/bias_activation.py

In TB/s of the least traffic, 2 tensor-sized transfers forward and 3 backward, the gradient of the bias
included; `copy` is the ceiling, and its share is what counts. Then a whole linear with its activation,
forward and backward, in TFLOP/s: "eager" adds the bias in the product, "ours" with the activation, "alone"
has the activation as our kernel behind eager's linear, and "epilogue" is cuBLAS's product with bias and
activation, which torch has for relu and gelu_tanh, and for inference alone.
"""

import torch
import torch.nn.functional as F
from measure import backward, report

from fxaccel.kernels import bias_activation as kernel

ELEMENTS = 2**25  # 64 MiB in bf16
COLUMNS = (1024, 3072, 4096, 11_008, 16_384)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "quick_gelu", "relu_squared", "mish")
LINEARS = ((768, 3072), (4096, 16_384))
ROWS = (16, 512, 8192)


def ways(activation):
    """The candidates as functions of x and b."""

    def eager(x, b):
        return kernel.reference(x, b, activation)

    torch._dynamo.reset()
    return {
        "eager": eager,
        "compile": torch.compile(eager),
        "ours": lambda x, b: kernel.op(x, b, activation),
    }


def run_sum(activation, columns):
    """A sum of one size, forward and backward."""
    rows = ELEMENTS // columns
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(columns, device="cuda", dtype=torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in (x, b)]
    functions, target = ways(activation), torch.empty_like(x)
    bytes_ = x.nbytes / 1e6  # over us: TB/s
    case = f"bf16 [{rows}, {columns}] {activation}"
    report("bias-activation", f"{case} ceiling", {"copy": lambda: target.copy_(x)}, 2 * bytes_, "TB/s")
    forward = {k: (lambda f=f: f(x, b)) for k, f in functions.items()}
    report("bias-activation", f"{case} forward", forward, 2 * bytes_, "TB/s")
    steps = {k: backward(f, leaves) for k, f in functions.items()}
    report("bias-activation", f"{case} backward", steps, 3 * bytes_, "TB/s")


def run_linear(activation, inner, outer, rows):
    """A linear and its activation, which is where the pass fires."""
    x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16) / inner**0.5
    b = torch.randn(outer, device="cuda", dtype=torch.bfloat16)

    def eager(x, w, b):
        return kernel.reference(F.linear(x, w, b), None, activation)

    torch._dynamo.reset()
    functions = {
        "eager": eager,
        "compile": torch.compile(eager),
        "ours": lambda x, w, b: kernel.op(F.linear(x, w), b, activation),
        "alone": lambda x, w, b: kernel.op(F.linear(x, w, b), None, activation),
    }
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    flops = 2 * x.numel() * outer / 1e6  # over us: TFLOP/s
    case = f"bf16 {inner} to {outer}, {rows} rows, {activation}"
    forward = {k: (lambda f=f: f(x, w, b)) for k, f in functions.items()}
    if activation in ("relu", "gelu_tanh"):
        product, gelu = torch.ops.aten._addmm_activation.default, activation == "gelu_tanh"
        forward["epilogue"] = lambda: product(b, x, w.T, use_gelu=gelu)
    report("linear-activation", f"{case} forward", forward, flops, "TFLOP/s")
    steps = {k: backward(f, leaves) for k, f in functions.items()}
    report("linear-activation", f"{case} backward", steps, 2 * flops, "TFLOP/s")


def main():
    """Every case."""
    for activation in ACTIVATIONS:
        for columns in COLUMNS:
            run_sum(activation, columns)
        for inner, outer in LINEARS:
            for rows in ROWS:
                run_linear(activation, inner, outer, rows)


if __name__ == "__main__":
    main()
