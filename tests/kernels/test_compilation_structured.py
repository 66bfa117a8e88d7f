"""The kernels of monarch and butterfly compile ahead of time, within each target's limits, without spills."""

import pytest
import torch
from test_compilation import TARGETS, JITFunction, _cache, compile_launch, pytestmark, spills  # noqa: F401

from fxaccel.kernels import _butterfly, _gemm, _monarch, monarch

ROWS = 1000
SIZES = {  # blocks k = l, rank t, block s = p: fused or apart
    "fused": (16, 16, 256),
    "fused, small": (8, 32, 100),
    "fused, rank 64": (4, 64, 128),
    "apart": (4, 256, 1024),
    "apart, rank 1": (64, 1, 64),
    "apart, odd": (3, 5, 77),
}


@pytest.fixture
def launches(monkeypatch):
    """The launches of a call on a target: [(kernel, arguments, options)], none of them run."""
    made = []

    def record(target, call):
        monkeypatch.setattr(JITFunction, "run", lambda fn, *a, grid, warmup, **kw: made.append((fn, a, kw)))
        monkeypatch.setattr(_gemm, "on_gpu", lambda x: True)
        monkeypatch.setattr(torch.version, "hip", "6" if target.startswith("gfx") else None)
        call()
        return made

    return record


def check(launches, target, call):
    made = launches(target, call)
    assert made
    for fn, args, options in made:
        kernel = compile_launch(target, fn, args, options)
        assert kernel.metadata.shared <= TARGETS[target][1], fn.__name__
        assert spills(kernel) == 0, fn.__name__


def monarch_call(size, dtype):
    """Forward, and backward of everything, on tensors of no content."""
    k, t, s = SIZES[size]
    shapes = ((ROWS, k * s), (k, t * k, s), (k, s, k * t), (k * s,))
    x, right, left, b = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)

    def call():
        monarch.launch(x, right, left, b, k * s)
        _, h = _monarch.launch_save(x, right, left, b, k * s)
        _monarch.launch_backward(x, x, h, right, left, True, True, True)

    return call


@pytest.mark.parametrize(("target", "size", "dtype"), [
    ("sm_90", "fused", torch.bfloat16), ("sm_80", "apart", torch.float32),
    ("gfx942", "apart, rank 1", torch.float16),
])  # fmt: skip
def test_monarch(target, size, dtype, launches):
    check(launches, target, monarch_call(size, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", TARGETS)
def test_monarch_in_full(target, size, dtype, launches):
    check(launches, target, monarch_call(size, dtype))


LIMITS = {t: _butterfly.MAX_AMD if t.startswith("gfx") else _butterfly.MAX for t in TARGETS}
GRID = [(t, n) for t, limit in LIMITS.items() for n in (2, 16, 1024, 2048, 4096) if n <= limit]


def butterfly_call(n, dtype):
    """Forward and backward on tensors of no content."""
    x, b = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((ROWS, n), (n,)))
    twiddle = torch.empty(1, n.bit_length() - 1, n // 2, 2, 2, dtype=dtype, device="meta")

    def call():
        _butterfly.launch_forward(x, twiddle, b, n, True)
        _butterfly.launch_backward(x, x, twiddle, True)

    return call


@pytest.mark.parametrize(("target", "n", "dtype"), [
    ("sm_90", 16, torch.bfloat16), ("gfx942", 64, torch.float32),
])  # fmt: skip
def test_butterfly(target, n, dtype, launches):
    check(launches, target, butterfly_call(n, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("target", "n"), GRID)
def test_butterfly_in_full(target, n, dtype, launches):
    check(launches, target, butterfly_call(n, dtype))
