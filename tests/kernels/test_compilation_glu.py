"""The kernels of gated activations compile ahead of time, within each target's limits, without spills."""

import pytest
import torch
from test_compilation import _cache, pytestmark  # noqa: F401
from test_compilation_structured import TARGETS, check, launches  # noqa: F401

from fxaccel.kernels import glu


def glu_call(columns, activation, dtype):
    """Forward and backward on halves of a tensor of no content."""
    gate, up = torch.empty(1000, 2 * columns, dtype=dtype, device="meta").chunk(2, -1)

    def call():
        glu.launch(gate, up, activation)
        glu.launch_backward(gate, gate, up, activation)

    return call


@pytest.mark.parametrize(("target", "columns", "activation", "dtype"), [
    ("sm_80", 512, "gelu", torch.float16), ("sm_90", 14336, "silu", torch.bfloat16),
    ("sm_90", 4096, "relu", torch.float32), ("gfx942", 28672, "gelu_tanh", torch.bfloat16),
    ("sm_80", 64, "sigmoid", torch.bfloat16), ("sm_90", 1000, "gelu_tanh", torch.float32),
])  # fmt: skip
def test_glu(target, columns, activation, dtype, launches):  # noqa: F811  the fixture
    check(launches, target, glu_call(columns, activation, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1, 64, 1000, 4096, 16384])
@pytest.mark.parametrize("target", TARGETS)
def test_glu_in_full(target, columns, dtype, activation, launches):  # noqa: F811
    check(launches, target, glu_call(columns, activation, dtype))
