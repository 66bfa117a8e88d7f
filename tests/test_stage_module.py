"""Stages taken out of a model: in turn they are the model, and each holds its own parameters alone."""

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.errors import OptionError
from fxaccel.passes import Partition
from fxaccel.stage_module import stage_modules
from tests.passes.partition_models import MODELS, Chain, agree, cut, made, seen


@pytest.mark.parametrize("name", MODELS)
def test_stages_taken_out_in_turn_are_the_step(name):
    model, args, stages = made(name)
    fast = cut(model, args, stages=stages)
    want = seen(fast, args)
    taken = stage_modules(fast, *args)
    buffers = {n: b for s in taken for n, b in s.named_buffers()}

    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.everything = [fast]

        def named_parameters(self, *a, **k):
            return fast.named_parameters(*a, **k)

        def named_buffers(self, *a, **k):
            return iter([(n, buffers[n]) for n, _ in fast.named_buffers()])

        def forward(self, *values):
            for stage in taken:
                assert [(t.shape, t.dtype) for t in stage.receives] == [(v.shape, v.dtype) for v in values]
                values = stage(*values)
                values = (values,) if isinstance(values, torch.Tensor) else values
                assert [t.requires_grad for t in stage.sends] == [v.requires_grad for v in values]
            return values

    agree(seen(Turns(), args), want)
    assert set().union(*(s.state_dict() for s in taken)) == set(model.state_dict())
    own = dict(fast.named_parameters(remove_duplicate=False))
    assert all(p is own[n] for s in taken for n, p in s.named_parameters())


def test_a_stage_sends_contiguous_tensors_and_the_first_holds_what_none_reads():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.unread = nn.Linear(4, 4), nn.Linear(3, 4), nn.Linear(2, 2)
            self.register_buffer("version", torch.tensor(3))

        def forward(self, x):
            return self.last(self.first(x).t()), self.unread.weight

    model, x = Turned(), torch.randn(3, 4)
    first, last = stage_modules(cut(model, (x,), at=("last",)), x)
    (sent,) = first(x)
    assert sent.shape == (4, 3)
    assert sent.is_contiguous()
    torch.testing.assert_close(last(sent), model(x))
    assert set(first.state_dict()) == {"first.weight", "first.bias", "unread.bias", "version"}
    assert set(last.state_dict()) == {"last.weight", "last.bias", "unread.weight"}


def test_what_is_read_by_its_strides_stays_with_what_made_it():
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x).t()
            return self.last(torch.as_strided(x, (3, 4), (6, 1)))

    model, x = Strided(), torch.randn(3, 4)
    taken = stage_modules(cut(model, (x,), stages=2), x)
    assert taken[0].sends[0].shape == (3, 4)
    torch.testing.assert_close(taken[1](*taken[0](x)), model(x))
    with pytest.raises(OptionError, match="'as_strided', with which the step begins anyway"):
        cut(model, (x,), at=("as_strided",))


def test_what_cannot_be_taken_apart_is_refused():
    model, args, _ = made("chain")
    plain = fxaccel.accelerate(model, [])
    plain(*args)
    with pytest.raises(OptionError, match="nothing of the model is cut"):
        stage_modules(plain, *args)
    fast = cut(model, args, stages=2)
    with pytest.raises(OptionError, match="the call fits no capture that is cut"):
        stage_modules(fast, args[0].float())
    with pytest.raises(OptionError, match="the call fits no capture that is cut"):
        stage_modules(fast, x=args[0])
    passes = [
        "replace-linear{structure=low-rank,init=random,share=0.3,even_if_slower=true}",
        Partition(stages=2),
    ]
    other = fxaccel.accelerate(Chain(), passes, allow="approximate")
    other(args[0].float())
    with pytest.raises(OptionError, match="a pass has replaced parameters"):
        stage_modules(other, args[0].float())
