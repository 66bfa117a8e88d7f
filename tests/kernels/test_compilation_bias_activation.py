"""The kernels of bias and activation compile ahead of time, within each target's limits, without spills."""

import pytest
import torch
from test_compilation import _cache, pytestmark  # noqa: F401
from test_compilation_structured import TARGETS, check, launches  # noqa: F401

from fxaccel.kernels import bias_activation as kernel


def call(columns, activation, dtype, biased=True):
    """Forward and backward on tensors of no content."""
    x = torch.empty(1000, columns, dtype=dtype, device="meta")
    b = x[0] if biased else None

    def run():
        kernel.launch(x, b, activation)
        kernel.launch_backward(x, x, b, activation, biased)

    return run


@pytest.mark.parametrize(("target", "columns", "activation", "dtype", "biased"), [
    ("sm_80", 512, "gelu", torch.float16, True), ("sm_90", 14336, "mish", torch.bfloat16, True),
    ("sm_90", 4096, "tanh", torch.float32, True), ("gfx942", 28672, "gelu_tanh", torch.bfloat16, True),
    ("sm_80", 64, "hardswish", torch.bfloat16, True), ("sm_90", 1000, "quick_gelu", torch.float32, False),
    ("gfx942", 1000, "relu_squared", torch.float32, True),
])  # fmt: skip
def test_bias_activation(target, columns, activation, dtype, biased, launches):  # noqa: F811  the fixture
    check(launches, target, call(columns, activation, dtype, biased))


@pytest.mark.slow
@pytest.mark.parametrize("activation", kernel.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1, 64, 1000, 4096, 16384])
@pytest.mark.parametrize("target", TARGETS)
def test_bias_activation_in_full(target, columns, dtype, activation, launches):  # noqa: F811
    check(launches, target, call(columns, activation, dtype))
