"""What a kernel returns lies in memory as the operator's fake says: random numbers follow it, and views.

dropout draws in the order of memory, so that another layout of what it takes is another mask.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from fxaccel import kernels

EPS = 1e-6
INT8 = torch.int8


def turned(*shape: int) -> torch.Tensor:
    """Values whose last two dimensions change places in memory."""
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).mT


def halves(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(n, 4)
    return angles.cos(), angles.sin()


def quantized(*shape: int) -> torch.Tensor:
    return torch.randint(-9, 9, shape, dtype=INT8)


def cases(n: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of each kernel, of n rows."""
    x, w, b = turned(2, n, 8), torch.rand(8), torch.rand(8)
    scale, codes = torch.rand(2, n, 1), quantized(2, 8, n).mT
    return {
        "rms_norm": (x, w, EPS, 0.0, False, b),
        "layer_norm": (x, w, b, EPS),
        "add_rms_norm": (x, turned(2, n, 8), w, EPS, 0.0, False, b),
        "add_layer_norm": (x, turned(2, n, 8), w, b, EPS),
        "bias_activation": (x, b, "gelu"),
        "linear_activation": (x, torch.rand(8, 8), b, "relu"),
        "glu": (x, turned(2, n, 8), "silu"),
        "glu_quantize": (x, turned(2, n, 8), "silu", INT8),
        "norm_quantize": (x, turned(2, n, 8), w, b, EPS, True, 0.0, False, INT8),
        "quantize_rows": (x, INT8),
        "quantize_tensor": (x, torch.tensor(0.1), INT8),
        "fake_quantize": (turned(n, 8), None, None, "int8", 8),
        "fake_quantize_rows": (x, INT8),
        "quantized_linear": (codes, scale, quantized(6, 8), torch.rand(6, 1), torch.rand(6), torch.float32),
        "weight_only_linear": (x, quantized(6, 8), torch.rand(6, 1), None, None, "int8", 8),
        "packed_linear": (x, torch.rand(6, 8), None),
        "packed_convolution": (turned(2, 8, n, 4), torch.rand(6, 8, 1, 1), None, None,
                               (1, 1), (0, 0), (1, 1), 1),
        "butterfly": (x, torch.rand(1, 3, 4, 2, 2), b, 8),
        "monarch": (x, torch.rand(2, 4, 4), torch.rand(4, 2, 2), b, 8),
        "dropout": (x, 0.5),
        "rope": ([turned(2, 3, n, 8)], *(torch.cat([t, t], -1) for t in halves(n))),
        "attention": (*(turned(2, 3, n, 8) for _ in "qkv"), [], "k <= q", "", 0.3),
    }  # fmt: skip


NOT_TRAINED = {"glu_quantize", "norm_quantize", "quantize_rows", "quantize_tensor", "quantized_linear"}


@pytest.mark.parametrize("n", [5, 5_000])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", cases(1))
def test_results_lie_in_memory_as_the_fake_says(name, grad, n):
    if n > 5 and name == "attention":
        n = 300
    if grad and name in NOT_TRAINED:
        pytest.skip("no derivative")
    module, args = import_module(f"fxaccel.kernels.{name}"), cases(n)[name]

    def wanted(t: torch.Tensor) -> torch.Tensor:
        return t.requires_grad_(grad and t.is_floating_point())

    leaves, spec = pytree.tree_flatten(args)
    leaves = [wanted(t) if isinstance(t, torch.Tensor) else t for t in leaves]
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in leaves]
    with torch.set_grad_enabled(grad):
        with mode:
            want = pytree.tree_leaves(module.op(*pytree.tree_unflatten(fakes, spec)))
        for f in (module.direct, module.op):
            got = pytree.tree_leaves(f(*pytree.tree_unflatten(leaves, spec)))
            assert [(t.shape, t.stride()) for t in got] == [(t.shape, t.stride()) for t in want]


def test_every_kernel_is_looked_at():
    named = {found.name for found in pkgutil.iter_modules(kernels.__path__) if found.name[0] != "_"}
    direct = {n for n in named if hasattr(import_module(f"fxaccel.kernels.{n}"), "direct")}
    assert direct == set(cases(1))
