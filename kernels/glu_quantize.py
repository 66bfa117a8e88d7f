"""q, scale = glu_quantize(gate, up, activation, dtype) = quantize_rows(activation(gate) * up, dtype).

Shapes     gate, up: [..., K], of one shape and dtype; activation: as glu has them; dtype:
           torch.int8 or torch.float8_e4m3fn. Returns q: [..., K] in `dtype`, contiguous; scale: [..., 1] in
           float32, float64 where gate is.
Numerics   the activation is computed in fp32 (fp64 for fp64) and rounded to gate.dtype, the product with up
           is rounded once more, and from there on all is as quantize_rows has it. On the CPU q and scale are
           those of the three operators bit for bit; on a GPU exp and erf are good to a few eps of fp32, and
           a code that lies at a tie may be the next one.
Cost       on the CPU the work of the three, with one fresh tensor less. On a GPU gate and up are read once,
           rows above ROW_MAX twice, the second time from L2: 5 bytes an element of bf16 instead of 13, and
           about 15 flop, of which `FlopCounterMode` counts as many as of the three: none.
Limits     gate and up do not broadcast. float64 on a GPU runs the composition. No derivative: one that is
           asked for raises.
Source     Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202; gelu and its form with a tanh:
           Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxaccel.kernels import _operator, _quantized, _quantized_rows, _rows, quantize_rows
from fxaccel.kernels._glu import ACTIVATIONS, _gated
from fxaccel.kernels._norm import unless_double
from fxaccel.kernels._quantized_rows import _bytes, _largest, _rounded, _scales
from fxaccel.kernels._triton import tl, triton


def reference(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The meaning of this op: what every test compares with."""
    return quantize_rows.reference(ACTIVATIONS[activation](gate) * up, dtype)


def unsupported(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    yield from _quantized.unfit(gate, name="gate")
    yield from _operator.unlike("gate", gate, "up", up)
    if activation not in ACTIVATIONS:
        yield f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    if dtype not in _quantized.TOP:
        yield f"codes of {dtype} are not one of {', '.join(map(str, _quantized.TOP))}"


@triton.jit
def rows_kernel(
    gate_ptr, up_ptr, q_ptr, scale_ptr, N, K, gate_stride, up_stride, ACTIVATION: tl.constexpr,
    TOP: tl.constexpr, WHOLE: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # row * K passes 2**31
    col = tl.arange(0, BLOCK)
    live = row < N
    mask = live[:, None] & (col < K)[None, :]
    gate_at = row[:, None] * gate_stride + col[None, :]
    up_at = row[:, None] * up_stride + col[None, :]
    y = _gated(gate_ptr, up_ptr, gate_at, up_at, mask, ACTIVATION)
    a, bad = _largest(y, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.int32))
    scale, factor = _scales(a, bad, LEAST, TOP)
    tl.store(scale_ptr + row, scale, live)
    tl.store(q_ptr + row[:, None] * K + col[None, :], _rounded(y * factor[:, None], TOP, WHOLE), mask)


@triton.jit
def wide_rows_kernel(
    gate_ptr, up_ptr, q_ptr, scale_ptr, N, K, gate_stride, up_stride, ACTIVATION: tl.constexpr,
    TOP: tl.constexpr, WHOLE: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, in pieces of BLOCK columns: once for the maximum, once (from L2) for q."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < N
    a, bad = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.int32)
    for start in range(0, K, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = live[:, None] & (col < K)[None, :]
        gate_at = row[:, None] * gate_stride + col[None, :]
        up_at = row[:, None] * up_stride + col[None, :]
        a, bad = _largest(_gated(gate_ptr, up_ptr, gate_at, up_at, mask, ACTIVATION), a, bad)
    scale, factor = _scales(a, bad, LEAST, TOP)
    tl.store(scale_ptr + row, scale, live)
    for start in range(0, K, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = live[:, None] & (col < K)[None, :]
        gate_at = row[:, None] * gate_stride + col[None, :]
        up_at = row[:, None] * up_stride + col[None, :]
        y = _gated(gate_ptr, up_ptr, gate_at, up_at, mask, ACTIVATION)
        tl.store(q_ptr + row[:, None] * K + col[None, :], _rounded(y * factor[:, None], TOP, WHOLE), mask)


def launch(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel. No checks: the caller has asked `unsupported`."""
    if not gate.numel():
        return _quantized_rows.launch_rows(gate, dtype)
    q = gate.new_empty(gate.shape, dtype=dtype)
    scale = gate.new_empty((*gate.shape[:-1], 1), dtype=torch.float32)
    gate, up = _rows.flat(gate), _rows.flat(up)
    n, k = gate.shape
    cut = _quantized_rows.config(k)
    kernel = wide_rows_kernel if cut.wide else rows_kernel
    kernel[(-(-n // cut.rows),)](
        gate, up, _bytes(q), scale, n, k, gate.stride(0), up.stride(0), ACTIVATION=activation,
        TOP=_quantized.TOP[dtype], WHOLE=dtype == torch.int8, LEAST=_quantized.LEAST,
        ROWS=cut.rows, BLOCK=cut.block, num_warps=cut.warps,
    )  # fmt: skip
    return q, scale


def compose(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The CPU kernel."""
    return quantize_rows.compose(ACTIVATIONS[activation](gate).mul_(up), dtype)


def _fake(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = gate.new_empty((*gate.shape[:-1], 1), dtype=_quantized.wide(gate.dtype))
    return gate.new_empty(gate.shape, dtype=dtype), scale


op = _operator.define(
    "glu_quantize(Tensor gate, Tensor up, str activation, ScalarType dtype) -> (Tensor q, Tensor scale)",
    cpu=compose,
    cuda=unless_double(launch, compose),
    fake=_fake,
)
_quantized.no_derivative(op)


def direct(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The op on CPU tensors, past the dispatcher where no gradient is wanted."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(gate, up):
        return op(gate, up, activation, dtype)
    return compose(gate, up, activation, dtype)
