"""The Triton kernels of gated activations, forward and backward, and their launch.

Shapes     gate, up, y, dy, dgate, dup: [N, K] after flattening; what is read may have rows of any stride, so
           that halves of one tensor are read where they lie.
Numerics   fp32; the activation is rounded to gate.dtype before the product, as one that is stored is, and
           each output once at its store. Backward computes the activation again; the product of dy and up is
           not rounded on its way to dgate.
Cost       forward reads gate and up and writes y: 3 tensor-sized transfers; backward reads dy, gate and up
           and writes two: 5.
Limits     none on N and K; offsets are 64-bit. No float64.
Source     Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989, section 3.2, for computing the activation again.
"""

from torch import Tensor

from fxaccel.kernels import _activations, _rows
from fxaccel.kernels._activations import activated
from fxaccel.kernels._triton import next_power_of_2, tl, triton

TILE = 2_048  # elements of a program's tile
WIDEST = 1_024  # columns of it

GATES = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")
ACTIVATIONS = {name: _activations.ACTIVATIONS[name] for name in GATES}


@triton.jit
def _gated(gate_ptr, up_ptr, gate_at, up_at, mask, ACTIVATION: tl.constexpr):
    """A tile of activation(gate) * up as the unfused operators would round it, in fp32; 0 outside."""
    gate = tl.load(gate_ptr + gate_at, mask, other=0.0)
    a, _ = activated(gate.to(tl.float32), ACTIVATION)
    y = a.to(gate.dtype).to(tl.float32) * tl.load(up_ptr + up_at, mask, other=0.0).to(tl.float32)
    return y.to(gate.dtype).to(tl.float32)


@triton.jit
def _place(N, K, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows and columns of this program's tile, and which of them there are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # row * K passes 2**31
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return row[:, None], col[None, :], (row < N)[:, None] & (col < K)[None, :]


@triton.jit
def forward_kernel(
    gate_ptr, up_ptr, y_ptr, N, K, gate_stride, up_stride, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS x BLOCK a program."""
    row, col, mask = _place(N, K, ROWS, BLOCK)
    y = _gated(gate_ptr, up_ptr, row * gate_stride + col, row * up_stride + col, mask, ACTIVATION)
    tl.store(y_ptr + row * K + col, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, N, K, dy_stride, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS x BLOCK a program."""
    row, col, mask = _place(N, K, ROWS, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask, other=0.0)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask, other=0.0).to(tl.float32)
    a, slope = activated(gate.to(tl.float32), ACTIVATION)
    at = row * K + col
    tl.store(dup_ptr + at, (dy * a.to(gate.dtype).to(tl.float32)).to(dup_ptr.dtype.element_ty), mask)
    tl.store(dgate_ptr + at, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask)


def config(k: int) -> _rows.Config:
    """Whole short rows, or pieces of long ones."""
    block = min(WIDEST, next_power_of_2(k))
    return _rows.Config(TILE // block, block, 4, block == WIDEST)


def _grid(n: int, k: int, cut: _rows.Config) -> tuple[int, int]:
    return -(-n // cut.rows), -(-k // cut.block)


def launch(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """y. No checks: the caller has asked `unsupported`."""
    y = gate.new_empty(gate.shape)
    if y.numel():
        gate, up = _rows.flat(gate), _rows.flat(up)
        (n, k), cut = gate.shape, config(gate.shape[1])
        forward_kernel[_grid(n, k, cut)](
            gate, up, y, n, k, gate.stride(0), up.stride(0), ACTIVATION=activation, ROWS=cut.rows,
            BLOCK=cut.block, num_warps=cut.warps,
        )  # fmt: skip
    return y


def launch_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate and dup."""
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if dgate.numel():
        dy, gate, up = _rows.flat(dy), _rows.flat(gate), _rows.flat(up)
        (n, k), cut = gate.shape, config(gate.shape[1])
        backward_kernel[_grid(n, k, cut)](
            dy, gate, up, dgate, dup, n, k, dy.stride(0), gate.stride(0), up.stride(0),
            ACTIVATION=activation, ROWS=cut.rows, BLOCK=cut.block, num_warps=cut.warps,
        )  # fmt: skip
    return dgate, dup
