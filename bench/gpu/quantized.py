"""Quantized linears on a GPU against bf16 and PyTorch's own: python bench/gpu/quantized.py

weight only   W4A16 in groups of 64 and W8A16, at few rows in GB/s of the bytes that int4 takes, which is what
              a call waits for, and at 256 rows in TFLOP/s. `bf16` is F.linear, `tinygemm` PyTorch's
              _weight_int4pack_mm, `torchao` its int4 linear where that is installed, `ours` the operator. Q1
              of the targets asks for 0.60 of the memory's rate at one row, and 0.95 of bf16's speed at 256.
dynamic       float8 and int8 with a scale a row, what quantizes x included, in TFLOP/s. `scaled_mm` is
              PyTorch's with our quantize_rows, `eager` the same with x quantized by PyTorch's operators, `mm`
              our operator without quantization. Q2 asks for 1.5 times bf16 from 4096 on.
rows          quantize_rows in GB/s beside PyTorch's operators.
fused         norm_quantize and glu_quantize in GB/s of the least traffic, beside our norm or gated activation
              with quantize_rows behind it, and beside torch.compile of PyTorch's operators.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from measure import report

from fxaccel.kernels import (
    _quantized,
    add_rms_norm,
    glu,
    glu_quantize,
    norm_quantize,
    quantize_rows,
    quantized_linear,
    weight_only_linear,
)

GROUP = 64
WEIGHTS = ((4096, 4096), (14336, 4096), (4096, 14336))  # N, K
ROWS = (1, 4, 16, 256)
DYNAMIC = ((4096, 4096, 4096), (8192, 8192, 8192), (8192, 14336, 4096), (256, 8192, 8192))  # M, N, K
FLOAT8 = torch.float8_e4m3fn


def random(*shape: int) -> torch.Tensor:
    """In bf16, of the size that weights have."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)


def int4(n: int, k: int) -> tuple[torch.Tensor, ...]:
    """Codes [N, K], scale and zero [N, G]."""
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    return codes, random(n, k // GROUP), random(n, k // GROUP)


def tinygemm(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> Callable[[Any], Any]:
    """PyTorch's kernel, which has the even column in the high nibble."""
    swapped = codes[:, ::2] << 4 | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
    both = torch.stack([scale, zero], -1).transpose(0, 1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, both)


def torchao(w: torch.Tensor) -> Callable[[Any], Any] | None:
    """Its int4 linear of the same group, if it is installed."""
    if find_spec("torchao") is None:
        return None
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
    layer.weight.data.copy_(w)
    quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP))
    return layer


def run_weights(n: int, k: int) -> None:
    """One weight at every number of rows."""
    w, (codes, scale, zero) = random(n, k), int4(n, k)
    nibbles = _quantized.pack_nibbles(codes)
    w8, s8 = (
        torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8),
        torch.rand(n, 1, device="cuda"),
    )
    layers = {
        "bf16": lambda x: F.linear(x, w),
        "tinygemm": tinygemm(codes, scale, zero),
        "ours": lambda x: weight_only_linear.op(x, nibbles, scale, zero, None, "int4", GROUP),
        "ours nf4": lambda x: weight_only_linear.op(x, nibbles, scale, None, None, "nf4", GROUP),
        "ours int8": lambda x: weight_only_linear.op(x, w8, s8, None, None, "int8", k),
    }
    other = torchao(w)
    layers |= {} if other is None else {"torchao": other}
    stored = nibbles.nbytes + scale.nbytes + zero.nbytes
    for rows in ROWS:
        x = random(rows, k)
        rate, unit = (stored / 1e3, "GB/s int4") if rows < 256 else (2 * rows * n * k / 1e6, "TFLOP/s")
        calls = {name: (lambda f=f, x=x: f(x)) for name, f in layers.items()}
        report("weight_only_linear", f"int4 bf16 [{rows}, {k}] x [{n}, {k}]", calls, rate, unit)
    x = random(1024, n)
    backward = {
        "bf16": lambda: x @ w,
        "ours": lambda: weight_only_linear.backward_op(x, nibbles, scale, zero, "int4", GROUP, k),
    }
    report(
        "weight_only_linear",
        f"int4 bf16 dx [1024, {n}] x [{n}, {k}]",
        backward,
        2048 * n * k / 1e6,
        "TFLOP/s",
    )


def scaled_mm(x: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, quantize: Any) -> torch.Tensor:
    """PyTorch's float8 product with a scale a row."""
    q, scale = quantize(x, FLOAT8)
    return torch._scaled_mm(q, w.t(), scale, w_scale.t(), out_dtype=torch.bfloat16)


def run_dynamic(m: int, n: int, k: int) -> None:
    """One size in both formats."""
    x, dense = random(m, k), random(n, k)
    mega = 2 * m * n * k / 1e6
    for kind in (FLOAT8, torch.int8):
        w, w_scale = quantize_rows.op(dense, kind)
        q, scale = quantize_rows.op(x, kind)

        def ours(w=w, w_scale=w_scale, kind=kind):
            return quantized_linear.op(*quantize_rows.op(x, kind), w, w_scale, None, torch.bfloat16)

        calls = {
            "bf16": lambda: F.linear(x, dense),
            "ours": ours,
            "mm": lambda q=q, s=scale, w=w, t=w_scale: quantized_linear.op(q, s, w, t, None, torch.bfloat16),
        }
        if kind == FLOAT8 and torch.cuda.get_device_capability() >= (8, 9):
            calls["scaled_mm"] = lambda w=w, t=w_scale: scaled_mm(x, w, t, quantize_rows.op)
            calls["eager"] = lambda w=w, t=w_scale: scaled_mm(x, w, t, quantize_rows.reference)
        report("quantized_linear", f"{kind} [{m}, {k}] x [{n}, {k}]", calls, mega, "TFLOP/s")


def run_rows(m: int, k: int) -> None:
    """One size in both formats."""
    x = random(m, k)
    for kind in (FLOAT8, torch.int8):
        calls = {
            "torch": lambda kind=kind: quantize_rows.reference(x, kind),
            "ours": lambda kind=kind: quantize_rows.op(x, kind),
        }
        report("quantize_rows", f"{kind} bf16 [{m}, {k}]", calls, 3 * m * k / 1e3, "GB/s")


def run_fused(m: int, k: int) -> None:
    """One size in both formats: residual, RMSNorm and rounding; SwiGLU and rounding."""
    x, other, w, eps = random(m, k), random(m, k), random(k), 1e-6
    torch._dynamo.reset()
    norm, gated = torch.compile(norm_quantize.reference), torch.compile(glu_quantize.reference)
    for kind in (FLOAT8, torch.int8):
        normed = (x, other, w, None, eps, False, 0.0, False, kind)
        calls = {
            "compile": lambda given=normed: norm(*given),
            "apart": lambda kind=kind: quantize_rows.op(
                add_rms_norm.op(x, other, w, eps, 0.0, False, None)[0], kind
            ),
            "ours": lambda given=normed: norm_quantize.op(*given),
        }
        report("norm_quantize", f"{kind} bf16 [{m}, {k}]", calls, 7 * m * k / 1e3, "GB/s")
        calls = {
            "compile": lambda kind=kind: gated(x, other, "silu", kind),
            "apart": lambda kind=kind: quantize_rows.op(glu.op(x, other, "silu"), kind),
            "ours": lambda kind=kind: glu_quantize.op(x, other, "silu", kind),
        }
        report("glu_quantize", f"{kind} bf16 [{m}, {k}]", calls, 5 * m * k / 1e3, "GB/s")


def main() -> None:
    """Every case."""
    with torch.no_grad():
        for size in WEIGHTS:
            run_weights(*size)
        for size in DYNAMIC:
            run_dynamic(*size)
        for k in (1024, 4096, 16384, 65536):
            run_rows(4096, k)
            run_fused(4096, k)


if __name__ == "__main__":
    main()
