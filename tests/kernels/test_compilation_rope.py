"""The kernel of rotary embeddings compiles ahead of time, without spills."""

import pytest
import torch
from test_compilation import _cache, pytestmark  # noqa: F401
from test_compilation_structured import TARGETS, check, launches  # noqa: F401

from fxaccel.kernels import rope


def call(columns, turned, pairs, shared, inverse, dtype=torch.bfloat16, single=False):
    q, k = (
        torch.empty(2, 1000, heads, columns, dtype=dtype, device="meta").transpose(1, 2) for heads in (32, 8)
    )
    cos = torch.empty(1, 1, 1000, turned // 2 if shared else turned, device="meta")
    return lambda: rope.launch([q] if single else [q, k], cos, cos, pairs, shared, inverse)


@pytest.mark.parametrize(("target", "columns", "turned", "pairs", "shared", "inverse"), [
    ("sm_90", 128, 128, False, False, False), ("sm_80", 64, 64, False, False, True),
    ("sm_90", 80, 32, True, False, False), ("gfx942", 128, 128, True, True, True),
])  # fmt: skip
def test_rope(target, columns, turned, pairs, shared, inverse, launches):  # noqa: F811  the fixture
    check(launches, target, call(columns, turned, pairs, shared, inverse))


@pytest.mark.slow
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("columns", "turned"), [(2, 2), (64, 64), (96, 24), (256, 256)])
@pytest.mark.parametrize("target", TARGETS)
def test_rope_in_full(target, columns, turned, dtype, pairs, shared, inverse, single, launches):  # noqa: F811
    check(launches, target, call(columns, turned, pairs, shared, inverse, dtype, single))
