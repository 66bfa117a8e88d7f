"""Arguments and results as flat lists: pytrees, and objects such as key-value caches opened up.

A registered pytree is flattened by torch. Any other object with attributes (transformers' DynamicCache)
is opened: its attributes are flattened in its place, and it is rebuilt without running its constructor.
Classes, functions and objects that belong to the model (its config) are kept by reference.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxaccel.errors import CaptureError

Arguments: TypeAlias = Sequence[Any] | Mapping[int, Any]
"""The opened arguments of a call, by their number."""

PLAIN = (type(None), bool, int, float, str, torch.SymInt, torch.SymFloat, torch.SymBool)
_LEAVES = (Tensor, *PLAIN)
_COMMON = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str})  # told apart at a glance
_FLAT = _COMMON | {torch.dtype, torch.device}


def children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """The parts of a tree's structure, in any version of torch."""
    return spec.children() if hasattr(spec, "children") else spec.children_specs


@dataclass(frozen=True)
class Kept:
    """An object that is handed over as it is."""

    value: Any


@dataclass(frozen=True)
class Given:
    """The very object that was passed in as the opened argument `index`."""

    index: int


@dataclass(frozen=True)
class Opened:
    """An object whose attributes are flattened in its place."""

    cls: Any
    attributes: Structure


@dataclass(frozen=True)
class Structure:
    """How a flat list of `size` tensors and numbers becomes the value again.

    spec      pytree of the value
    special   index of a pytree leaf -> what stands there, where it is not one plain leaf
    """

    spec: pytree.TreeSpec
    special: dict[int, Kept | Given | Opened] = field(default_factory=dict)
    size: int = 0

    def __hash__(self) -> int:
        return hash((self.spec, tuple(self.special)))

    @functools.cached_property
    def keys(self) -> tuple[Any, ...] | None:
        """Those of a dict whose values are leaves: a layer of a cache, say."""
        if self.spec.type is not dict or not all(c.is_leaf() for c in children(self.spec)):
            return None
        return tuple(self.spec.unflatten(range(self.spec.num_leaves)))

    def unflatten(self, leaves: Sequence[Any], given: Arguments = ()) -> Any:
        """The value, of plain leaves and of the opened arguments of the call."""
        if self.special:
            rest = iter(leaves)
            leaves = [self._leaf(i, rest, given) for i in range(self.spec.num_leaves)]
        if self.keys is not None:
            return dict(zip(self.keys, leaves, strict=True))
        return pytree.tree_unflatten(leaves, self.spec)

    def _leaf(self, index: int, rest: Iterator[Any], given: Arguments) -> Any:
        special = self.special.get(index)
        if special is None:
            return next(rest)
        if isinstance(special, Kept):
            return special.value
        if isinstance(special, Given):
            return given[special.index]
        made = special.cls.__new__(special.cls)
        made.__dict__.update(special.attributes.take(rest, given))
        return made

    def take(self, rest: Iterator[Any], given: Arguments) -> Any:
        """`unflatten` from an iterator, of which `size` items are taken."""
        return self.unflatten([next(rest) for _ in range(self.size)], given)

    @property
    def opened(self) -> list[Opened]:
        """Objects that are rebuilt, outermost ones."""
        return [s for s in self.special.values() if isinstance(s, Opened)]


def flatten(
    value: Any, given: Sequence[Any] = (), keep: frozenset[int] = frozenset()
) -> tuple[list[Any], Structure]:
    """Plain leaves of `value` and its structure; raises CaptureError for what has neither.

    given   objects that may come back as they are
    keep    ids of objects that are never opened
    """
    return _flatten(value, given, keep, ())


def _flatten(
    value: Any, given: Sequence[Any], keep: frozenset[int], within: tuple[int, ...]
) -> tuple[list[Any], Structure]:
    # attributes of a layer of a cache, say
    if type(value) is dict and _FLAT.issuperset(map(type, value.values())):
        raw, spec = list(value.values()), _spec_of(tuple(value))
    else:
        raw, spec = pytree.tree_flatten(value)
    leaves: list[Any] = []
    special: dict[int, Kept | Given | Opened] = {}
    for i, leaf in enumerate(raw):
        if type(leaf) in _COMMON or isinstance(leaf, _LEAVES):
            leaves.append(leaf)
            continue
        known = next((k for k, g in enumerate(given) if g is leaf), None) if given else None
        if known is not None:
            special[i] = Given(known)
        elif id(leaf) in keep or not _opens(leaf):
            special[i] = Kept(leaf)
        else:
            if isinstance(leaf, nn.Module) or id(leaf) in within:
                raise CaptureError(
                    f"an argument or result holds a {type(leaf).__name__}, expected tensors, numbers, "
                    "strings, or objects made of them without circles",
                    "register the class with torch.utils._pytree.register_pytree_node",
                )
            inner, attributes = _flatten(dict(vars(leaf)), given, keep, (*within, id(leaf)))
            special[i] = Opened(type(leaf), attributes)
            leaves += inner
    return leaves, Structure(spec, special, len(leaves))


@functools.lru_cache(maxsize=1024)
def _spec_of(keys: tuple[Any, ...]) -> pytree.TreeSpec:
    """The structure of a dict with these keys, all of whose values are leaves."""
    return pytree.tree_flatten(dict.fromkeys(keys))[1]


def _opens(leaf: Any) -> bool:
    closed = (type, types.FunctionType, types.MethodType, types.ModuleType, enum.Enum)
    return hasattr(leaf, "__dict__") and not isinstance(leaf, closed)


def objects(value: Any) -> list[Any]:
    """The opened objects of a call, outermost ones, in the order of flattening."""
    leaves = pytree.tree_leaves(value)
    return [x for x in leaves if type(x) not in _COMMON and not isinstance(x, _LEAVES) and _opens(x)]


def deliver(leaves: Sequence[Any], spec: Structure, given: Sequence[Any]) -> Any:
    """The result of a call whose structure is (result, attributes of each object passed in).

    What the model did to the objects passed in is done to those of this call.
    """
    value, attributes = spec.unflatten(leaves, given)
    for one, now in zip(given, attributes, strict=True):
        one.__dict__.clear()
        one.__dict__.update(now)
    return value
