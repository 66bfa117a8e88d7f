"""What several files of tests share."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

import fxaccel
from fxaccel.pieces import Pieces


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Method(nn.Module):
    """A function of (self, ...) as a module, with children to use."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def captures(fast):
    return len(fast.report().captures)


def notes(fast):
    return "\n".join(n for c in fast.report().captures for n in c.notes)


def same(got, want):
    """Equal structure, types and values."""
    ours, mine = pytree.tree_flatten(got)
    theirs, its = pytree.tree_flatten(want)
    assert mine == its
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert a == b or hasattr(a, "__dict__")


def in_pieces(fast):
    return any(isinstance(c, Pieces) for c in fast.__dict__["_fxaccel"].all)


def agree(model, fast, *args, pieces=False, **kwargs):
    """Call both with equal arguments and random state; compare results and what became of the arguments."""
    theirs, ours = copy.deepcopy((args, kwargs)), copy.deepcopy((args, kwargs))
    torch.manual_seed(11)
    want = model(*theirs[0], **theirs[1])
    buffers = [b.clone() for b in model.buffers()]
    torch.manual_seed(11)
    fast(*ours[0], **ours[1])  # the first call may capture
    ours = copy.deepcopy((args, kwargs))
    torch.manual_seed(11)
    got = fast(*ours[0], **ours[1])
    same(got, want)
    same(ours, theirs)
    assert in_pieces(fast) is pieces
    return got, buffers


def twins(model, **options):
    """The model and the accelerated one over tensors of their own."""
    return copy.deepcopy(model), fxaccel.accelerate(model, **options)


def saved_bytes(model, x):
    """Bytes that autograd keeps for backward, each storage once, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        loss = model(x)
    total = sum(size for size, _ in seen.values())
    del loss
    return total


def session(fast):
    return fast.__dict__["_fxaccel"]


def targets(program):
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def train_step(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def thinned(keep, **values):
    """Parametrize over a product of which one in `keep` is quick and the others are slow.

    Quick are those whose places in their lists add up to a multiple of `keep`: of two values of two lists
    every pair is among them where a third list has as many values.
    """
    lists, cases = [list(v) for v in values.values()], []
    for places in itertools.product(*(range(len(one)) for one in lists)):
        chosen = [one[i] for one, i in zip(lists, places, strict=True)]
        marks = [m for c in chosen for m in getattr(c, "marks", ())]
        plain = [c.values[0] if hasattr(c, "marks") else c for c in chosen]
        cases.append(pytest.param(*plain, marks=[*marks, *[pytest.mark.slow] * (sum(places) % keep > 0)]))
    return pytest.mark.parametrize(list(values), cases, ids=_id)


def _id(value):
    return getattr(value, "__name__", None) or getattr(value, "name", None) or str(value)


def rule(name, pattern, rewrite, **attributes):
    """A rule class from two functions."""
    return type(name, (fxaccel.Rule,), {
        "name": name, "pattern": pattern, "rewrite": rewrite, **attributes
    })  # fmt: skip
