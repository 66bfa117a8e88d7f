"""The kernels that quantize what they compute compile ahead of time, within limits, without spills."""

import pytest
import torch
from test_compilation import _cache, pytestmark  # noqa: F401
from test_compilation_structured import TARGETS, check, launches  # noqa: F401

from fxaccel.kernels import glu_quantize, norm_quantize

FLOAT8 = torch.float8_e4m3fn


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def norm_call(columns, kind, dtype, centred, added, weights=torch.float32):
    x, w = meta(1000, columns, dtype=dtype), meta(columns, dtype=weights)
    r, b = x if added else None, w if centred else None
    return lambda: norm_quantize.launch(x, r, w, b, 1e-5, centred, 0.0, not centred, kind)


@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("target", "columns"), [("sm_80", 512), ("sm_90", 4096), ("gfx942", 65536)])
def test_norm(target, columns, centred, kind, launches):  # noqa: F811  the fixture
    check(launches, target, norm_call(columns, kind, torch.bfloat16, centred, centred))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1, 64, 1000, 4096, 8192, 16384, 65536])
@pytest.mark.parametrize("target", TARGETS)
def test_norm_in_full(target, columns, dtype, centred, added, kind, launches):  # noqa: F811
    check(launches, target, norm_call(columns, kind, dtype, centred, added, dtype))


def glu_call(columns, activation, kind, dtype):
    gate = meta(1000, columns, dtype=dtype)
    return lambda: glu_quantize.launch(gate, gate, activation, kind)


@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize(("target", "columns", "activation"), [
    ("sm_80", 512, "gelu"), ("sm_90", 14336, "silu"), ("sm_90", 4096, "relu"), ("gfx942", 28672, "gelu_tanh"),
])  # fmt: skip
def test_glu(target, columns, activation, kind, launches):  # noqa: F811
    check(launches, target, glu_call(columns, activation, kind, torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("activation", glu_quantize.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1, 64, 1000, 4096, 16384, 65536])
@pytest.mark.parametrize("target", TARGETS)
def test_glu_in_full(target, columns, dtype, activation, kind, launches):  # noqa: F811
    check(launches, target, glu_call(columns, activation, kind, dtype))
