"""An error in generated code says which module, which line of the user's and which pass it comes from."""

import sys
import traceback

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.passes.checkpoint import Checkpoint
from fxaccel.stage_module import stage_modules

X, IDS = torch.randn(2, 8), torch.zeros(2, dtype=torch.long)
pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="errors take no notes")


class Layer(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.norm, self.proj, self.table = nn.LayerNorm(8), nn.Linear(8, 8), nn.Embedding(rows, 8)

    def forward(self, x, i):
        y = self.norm(x + torch.tanh(self.proj(x)))
        return y * self.table(i)  # looked up here


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(rows) for rows in (9, 4, 9))

    def forward(self, x, i):
        for layer in self.layers:
            x = layer(x, i)
        return x


def line(text):
    """Where this file says so, as listings write it."""
    with open(__file__) as file:
        number = next(n for n, row in enumerate(file, 1) if text in row)
    return f"test_provenance.py:{number}"


LOOKED_UP = f"of the accelerated model: layers.1.table  {line('# looked up here')}"


def notes(run, *args):
    """The notes of the error that a call raises."""
    with pytest.raises((RuntimeError, IndexError)) as caught:
        run(*args)
    return getattr(caught.value, "__notes__", [])


def test_an_operator_of_the_model_names_module_and_line():
    fast = fxaccel.accelerate(Net().eval(), [], example_inputs=(X, IDS))
    found = notes(fast, X, IDS + 5)
    assert found == [LOOKED_UP]


def test_what_a_pass_put_there_names_the_pass():
    fast = fxaccel.accelerate(Net().eval(), ["fuse-norm"], example_inputs=(X, IDS))
    fast.layers[1].norm.weight.data = torch.ones(3)
    (found,) = notes(fast, X, IDS)
    assert found == f"of the accelerated model: layers.1.norm  {line('self.norm(x +')}  fuse-norm"


def test_an_error_of_backward_that_computes_again_says_so_too():
    fast = fxaccel.accelerate(Net().train(), [Checkpoint(budget="0.6")], example_inputs=(X, IDS))
    ids = IDS.clone()
    loss = fast(X, ids).sum()
    ids.data.add_(5)  # as no version counter sees it
    assert notes(loss.backward) == [LOOKED_UP]


def test_a_stage_says_so_too():
    fast = fxaccel.accelerate(Net().train(), ["partition{stages=2}"], example_inputs=(X, IDS))
    stage = stage_modules(fast, X, IDS)[0]
    assert notes(stage, X, IDS + 5) == [LOOKED_UP]


def test_errors_from_elsewhere_have_no_note_and_none_has_two():
    fast = fxaccel.accelerate(Net().eval(), [], example_inputs=(X, IDS))
    error = RuntimeError("mine")
    fxaccel.provenance.locate(error)
    assert not hasattr(error, "__notes__")

    class Outer(nn.Module):
        def forward(self, x, i):
            return fast(x, i)

    with pytest.raises(IndexError) as caught:
        Outer()(X, IDS + 5)
    fxaccel.provenance.locate(caught.value)
    assert "".join(traceback.format_exception(caught.value)).count("of the accelerated model:") == 1
