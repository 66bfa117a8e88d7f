"""The kernel of linear_cross_entropy compiles ahead of time, within each target's limits, without spills."""

import pytest
import torch
from test_compilation import _cache, pytestmark  # noqa: F401
from test_compilation_structured import TARGETS, check, launches  # noqa: F401

from fxaccel.kernels import _loss_rows

PLAIN, ALL = (-100, 0.0, 0.0, False), (-100, 30.0, 0.1, True)


def call(columns, dtype, rest, gradient=True):
    """A chunk of rows of no content."""
    ignored, softcap, smoothing, squares = rest
    u = torch.empty(1000, columns, dtype=dtype, device="meta")
    y = torch.empty(1000, dtype=torch.int64, device="meta")
    c = torch.empty((), device="meta") if squares else None
    return lambda: _loss_rows.launch(u, y, ignored, softcap, smoothing, c, gradient)


@pytest.mark.parametrize("rest", [PLAIN, ALL], ids=["plain", "all"])
@pytest.mark.parametrize(("target", "columns", "dtype"), [
    ("sm_80", 32000, torch.bfloat16), ("sm_90", 128256, torch.bfloat16), ("sm_90", 50257, torch.float32),
    ("gfx942", 128256, torch.bfloat16),
])  # fmt: skip
def test_rows(target, columns, dtype, rest, launches):  # noqa: F811  the fixture
    check(launches, target, call(columns, dtype, rest))


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("rest", [PLAIN, ALL, (None, 0.0, 0.0, True), (-100, 30.0, 0.0, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1, 100, 1000, 32000, 50257, 128256, 262144])
@pytest.mark.parametrize("target", TARGETS)
def test_rows_in_full(target, columns, dtype, rest, gradient, launches):  # noqa: F811
    check(launches, target, call(columns, dtype, rest, gradient))
