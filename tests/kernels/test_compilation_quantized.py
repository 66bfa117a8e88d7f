"""The kernels of quantized linears compile ahead of time, within each target's limits, without spills."""

import pytest
import torch
from test_compilation import _cache, pytestmark  # noqa: F401
from test_compilation_structured import TARGETS, check, launches  # noqa: F401

from fxaccel.kernels import (
    _quantized_gemm,
    quantize_rows,
    quantize_tensor,
    quantized_linear,
    weight_only_linear,
)
from fxaccel.kernels import _quantized_weights as weights

FLOAT8 = torch.float8_e4m3fn
SHAPES = {"few": (1, 4096, 4096), "some": (48, 1024, 512), "many": (8192, 4096, 4096), "odd": (77, 33, 100)}


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def rows_call(k, kind, dtype):
    def call():
        quantize_rows.launch(meta(1000, k, dtype=dtype), kind)
        quantize_tensor.launch(meta(1000, k, dtype=dtype), meta(1, dtype=torch.float32), kind)

    return call


@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize(("target", "k"), [("sm_80", 512), ("sm_90", 4096), ("gfx942", 65536)])
def test_rows(target, k, kind, launches):  # noqa: F811  the fixture
    check(launches, target, rows_call(k, kind, torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 64, 1000, 4096, 16384, 65536])
@pytest.mark.parametrize("target", TARGETS)
def test_rows_in_full(target, k, dtype, kind, launches):  # noqa: F811
    check(launches, target, rows_call(k, kind, dtype))


def linear_call(target, size, kind, dtype, monkeypatch):
    """Of float8 as the target multiplies it: as such on sm_90, unpacked elsewhere."""
    monkeypatch.setattr(_quantized_gemm, "multiplies_float8", lambda q: target == "sm_90")
    m, n, k = SHAPES[size]
    q, w = meta(m, k, dtype=kind), meta(n, k, dtype=kind)
    scale, w_scale = meta(m, 1, dtype=torch.float32), meta(n, 1, dtype=torch.float32)
    return lambda: quantized_linear.launch(q, scale, w, w_scale, meta(n), dtype)


@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize(("target", "size"), [("sm_80", "few"), ("sm_90", "many"), ("gfx942", "many")])
def test_linear(target, size, kind, launches, monkeypatch):  # noqa: F811
    check(launches, target, linear_call(target, size, kind, torch.bfloat16, monkeypatch))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
def test_linear_in_full(target, size, kind, launches, monkeypatch):  # noqa: F811
    check(launches, target, linear_call(target, size, kind, torch.float32, monkeypatch))


def weights_call(size, format, group, dtype):
    """Forward and the gradient of x."""
    m, n, k = SHAPES[size]
    each = -(-k // group)
    four = format in ("int4", "nf4")
    stored = {"int8": torch.int8, "float8": FLOAT8}.get(format, torch.uint8)
    w = meta(n, each * group // 2 if four else k, dtype=stored)
    scale = meta(n, each) if four else meta(n, 1, dtype=torch.float32)
    zero = meta(n, each) if format == "int4" else None

    def call():
        weight_only_linear.launch(
            meta(m, k, dtype=dtype), w, scale, zero, meta(n, dtype=dtype), format, group
        )
        weights.launch_backward(meta(m, n, dtype=dtype), w, scale, zero, format, group, k)

    return call


@pytest.mark.parametrize(("target", "size", "format", "group", "dtype"), [
    ("sm_80", "few", "int4", 64, torch.bfloat16), ("sm_90", "many", "int4", 128, torch.bfloat16),
    ("sm_90", "some", "nf4", 32, torch.float16), ("gfx942", "many", "int8", 64, torch.bfloat16),
    ("gfx942", "few", "float8", 64, torch.float32), ("sm_80", "odd", "int4", 10, torch.float32),
])  # fmt: skip
def test_weights(target, size, format, group, dtype, launches):  # noqa: F811
    check(launches, target, weights_call(size, format, group, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("format", "group"), [
    ("int8", 4096), ("float8", 4096), ("int4", 32), ("int4", 128), ("nf4", 64), ("int4", 10),
])  # fmt: skip
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
def test_weights_in_full(target, size, format, group, dtype, launches):  # noqa: F811
    check(launches, target, weights_call(size, format, group, dtype))
