"""The kernels of fake_quantize compile ahead of time, within each target's limits, without spills."""

import pytest
import torch
from test_compilation import _cache, pytestmark  # noqa: F401
from test_compilation_structured import TARGETS, check, launches  # noqa: F401

from fxaccel.kernels import fake_quantize

FORMATS = [
    ("int8", 0, False),
    ("int8", -1, False),
    ("int4", 64, True),
    ("nf4", 32, False),
    ("float8", 0, False),
]
SHAPES = [(4096, 4096), (33, 100)]


def call(shape, format, group, zeros, dtype):
    """Forward, and backward with and without the gradients of scales, on tensors of no content."""
    width = group or shape[1]
    each = (1, 1) if group < 0 else (shape[0], -(-shape[1] // width))
    w, scale = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(each, device="meta")
    zero = scale if zeros else None

    def run():
        fake_quantize.launch(w, scale, zero, format, width, zeros)
        for scales in (True, False):
            fake_quantize.launch_backward(w, w, scale, zero, format, width, scales)

    return run


@pytest.mark.parametrize(
    ("target", "made"), list(zip(["sm_80", "sm_90", "gfx942"] * 2, FORMATS, strict=False))
)
def test_tiles(target, made, launches):  # noqa: F811  the fixture
    check(launches, target, call(SHAPES[0], *made, torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("made", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_in_full(target, shape, made, dtype, launches):  # noqa: F811
    check(launches, target, call(shape, *made, dtype))
