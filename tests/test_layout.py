"""What a pass lays out otherwise in memory nobody sees: not the caller, no draw, no reader of strides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxaccel
from tests.helpers import agree, session, targets


@torch.library.custom_op("layout_tests::steps", mutates_args=())
def steps(x: torch.Tensor) -> torch.Tensor:
    """The strides of a value, as a stranger's kernel may read them."""
    return torch.tensor(x.stride())


@steps.register_fake
def _(x):
    return torch.empty(x.dim(), dtype=torch.int64)


def gelu(x, w):
    return F.gelu(x.mT + w)


def glu(x, w):
    return F.silu(x.mT * w) * x.mT


def norm(x, w):
    return F.rms_norm(x.mT.square() - w, (8,), w, 1e-6)


FUSED = {
    "fuse-activation{even_if_slower=true}": gelu,
    "fuse-glu": glu,
    "fuse-norm": norm,
}
READERS = {
    "the caller": lambda y: y,
    "the caller, of a view": lambda y: (y * 1).mT[1:],
    "a draw": lambda y: (y, F.dropout(y, 0.5), torch.rand_like(y)),
    "a draw further on": lambda y: F.dropout(y.tanh(), 0.5),
    "complex numbers": lambda y: torch.view_as_complex(y.mT.unflatten(-1, (2, 2)).contiguous()),
    "a stranger": lambda y: (steps(y.detach()), steps(y.detach().exp().mT)),
}


class Fused(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.w, self.function = nn.Parameter(torch.rand(8)), function

    def forward(self, x):
        return self.function(x, self.w)


def strides(results):
    return [t.stride() for t in results] if isinstance(results, tuple) else [results.stride()]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("grad", [False, True])
def test_of_fused_values(name, reader, grad):
    model, x = Fused(lambda x, w: READERS[reader](FUSED[name](x, w))), torch.randn(3, 8, 4)
    with torch.set_grad_enabled(grad):
        fast = fxaccel.accelerate(model, [name], expect={name.split("{")[0]: 1})
        got, _ = agree(model, fast, x)
        assert strides(got) == strides(model(x))


class Merged(nn.Module):
    """Three linears of one input, whose parts lie 27 apart."""

    def __init__(self, read):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.read = read

    def forward(self, x):
        return self.read(self.a(x)), self.b(x).square(), self.c(x).square()


@pytest.mark.parametrize("read", [
    lambda y: torch.view_as_real(torch.view_as_complex(y.reshape(-1, 4, 4, 2)) * 1j),
    lambda y: y.view(torch.int32).to(torch.float32),
    lambda y: y.view(-1, 4).exp(),
    lambda y: steps(y.detach()),
    lambda y: F.dropout(y, 0.5),
    lambda y: y,
])  # fmt: skip
def test_of_merged_linears(read):
    model = Merged(read).eval()
    with torch.no_grad():
        fast = fxaccel.accelerate(model, ["merge-linears{even_if_slower=true}"], expect={"merge-linears": 3})
        got, _ = agree(model, fast, torch.randn(3, 4, 8))
        assert strides(got) == strides(model(torch.randn(3, 4, 8)))


def test_parts_of_one_row_that_the_caller_gets_share_nothing():
    """Their strides are those of before, their storage is not."""
    model, x = Merged(lambda y: y).eval(), torch.randn(1, 8)
    model.forward = lambda x: (model.a(x), model.b(x), model.c(x))
    with torch.no_grad():
        fast = fxaccel.accelerate(model, ["merge-linears{even_if_slower=true}"], expect={"merge-linears": 3})
        got, _ = agree(model, fast, x)
    assert len({t.untyped_storage().data_ptr() for t in got}) == 3


def test_what_nobody_sees_is_not_copied():
    """Only the order of dimensions counts for a draw, and gaps for nobody who reads values."""
    model = Merged(lambda y: F.dropout(y, 0.5).exp()).eval()
    with torch.no_grad():
        fast = fxaccel.accelerate(
            model, ["merge-linears{even_if_slower=true}"], example_inputs=(torch.randn(3, 4, 8),)
        )
    assert "aten.clone.default" not in targets(session(fast).all[0].program)
