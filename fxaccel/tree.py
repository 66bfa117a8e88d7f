"""Copies of a module tree that share its tensors: what a traced or tried-out forward may write to."""

from __future__ import annotations

import contextlib
import copy
import linecache
import random
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy
import torch
import torch.fx.graph_module
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from fxaccel.errors import CaptureError

ROOT_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)


def clone_tree(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of the module tree with the same classes that shares every parameter and buffer.

    Lists, dicts and sets among its attributes are its own: a forward may keep results in them.
    """
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    new = memo[id(module)] = module.__class__.__new__(module.__class__)
    modules = {
        name: None if child is None else clone_tree(child, memo) for name, child in module._modules.items()
    }
    attributes = {k: _own(v, memo) for k, v in module.__dict__.items() if k != "_modules"}
    new.__dict__.update(attributes, _modules=modules)
    return new


def _own(value: Any, memo: dict[int, Any]) -> Any:
    """`value` with its containers copied; what they hold is shared, but for modules."""
    if isinstance(value, nn.Module):
        return clone_tree(value, memo)
    kind = type(value)
    if kind not in (list, tuple, set, dict, OrderedDict, defaultdict):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is tuple:
        return tuple(_own(v, memo) for v in value)
    new = memo[id(value)] = copy.copy(value)
    if kind is list:
        new[:] = [_own(v, memo) for v in value]
    elif kind is not set:
        for key, item in value.items():
            new[key] = _own(item, memo)
    return new


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a path; those on the way that are not there are made."""
    for name in filter(None, path.split(".")):
        inner = root._modules.get(name)
        if inner is None:
            inner = root._modules[name] = nn.Module()
        root = inner
    return root


def without_root_hooks(tree: nn.Module) -> nn.Module:
    """`tree` without the root's own hooks: they run around the emitted forward as around the model's."""
    for table in ROOT_HOOKS:
        tree.__dict__[table] = OrderedDict()
    return tree


def belongings(model: nn.Module) -> frozenset[int]:
    """Ids of the plain attributes of the model's modules: its config, say."""
    return frozenset(
        id(v) for m in model.modules() for k, v in m.__dict__.items() if k not in _MODULE_ATTRIBUTES
    )


@contextlib.contextmanager
def random_kept() -> Iterator[None]:
    """Afterwards torch, numpy and Python draw the numbers that they would have drawn."""
    python, array = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(array)


@contextlib.contextmanager
def leavings_dropped() -> Iterator[None]:
    """Afterwards torch no longer holds for good what it kept of the graphs that were traced within.

    It keeps their sources, several for each graph and for tracebacks alone, and the environments of their
    sizes, as keys of caches of which some have no bound.
    """
    kept = getattr(getattr(torch.fx.graph_module, "_loader", None), "eval_cache", {})
    before = set(kept)
    try:
        yield
    finally:
        for name in set(kept) - before:
            kept.pop(name, None)
            linecache.cache.pop(name, None)
        for method in vars(ShapeEnv).values():
            if callable(clear := getattr(method, "cache_clear", None)):
                clear()


@contextlib.contextmanager
def assignments(model: nn.Module, assigned: list[str]) -> Iterator[None]:
    """Turn `self.buffer = value` in any submodule into a copy into the buffer, which a graph can hold.

    (Export does so for the root's own buffers and loses the others.) Other attributes that the forward
    sets are put back and their names appended to `assigned`.
    """
    modules = dict(model.named_modules())
    buffers = {name: dict(m._buffers) for name, m in modules.items()}
    others = {name: _other_attributes(m) for name, m in modules.items()}
    yield
    for name, module in modules.items():
        for key, before in buffers[name].items():
            after = module._buffers.get(key)
            if after is not before and before is not None:
                module._buffers[key] = before
                if after is not None:
                    _copy(before, after, f"{name}.{key}".lstrip("."))
        now = _other_attributes(module)
        for key in now:
            if now[key] is not others[name].get(key, _MODULE_ATTRIBUTES):
                module.__dict__.pop(key)
                if pytree.tree_any(lambda v: isinstance(v, Tensor), now[key]):
                    assigned.append(f"{name}.{key}".lstrip("."))
        module.__dict__.update(others[name])


def _copy(before: Tensor, after: Tensor, name: str) -> None:
    if before.shape != after.shape:
        raise CaptureError(
            f"the forward puts a tensor of shape {list(after.shape)} in the place of the buffer {name!r}, "
            f"which has {list(before.shape)}; a graph cannot change the shape of its state",
            "call the model once before it is accelerated, if the shape then stays",
        )
    before.copy_(after)


def _other_attributes(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in module.__dict__.items() if k not in _MODULE_ATTRIBUTES}


def ties(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of names under which one parameter or buffer stands more than once."""
    groups: dict[int, list[str]] = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        groups.setdefault(id(tensor), []).append(name)
    return tuple(tuple(g) for g in groups.values() if len(g) > 1)
