"""Fake tensors for running a step without data, where equal calls are many: each is worked out once.

A call is known by its operator, the sizes, strides and types of its tensors, which of them share a storage,
and its other arguments. What it gave the first time is written down as a form: which results are arguments,
which lie in an argument's storage and how, which in a new one. torch's mode has such a table itself, for all
threads and all symbolic sizes; looking a call up in that takes several times as long.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxaccel.memory import Ledger

META = torch.device("meta")
OWN = -1
PLAIN = (int, float, complex, str, NoneType, torch.dtype, torch.device, torch.layout, torch.memory_format)


class Result(NamedTuple):
    """One tensor that a call gives.

    same, over    the tensor among the arguments that it is, and the one whose storage it lies in, or OWN
    """

    same: int
    over: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class Form(NamedTuple):
    """What a call gives: one result, or some in a list or tuple."""

    many: type | None
    results: tuple[Result | None, ...]


class Fakes(FakeTensorMode):
    """Fake tensors whose bytes go into a ledger, those of the operators that the step calls."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.ledger, self.inner = ledger, False
        self.forms: dict[tuple[Any, ...], Form | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].device  # most of all dispatches are this question
        if self.inner or func.namespace == "prim":  # a part of an operator, or a question to a tensor
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # without data: a kernel that looks for a rare case does not find it
        self.inner = True
        try:
            return self.ledger.call(lambda *a, **k: self.run(func, types, a, k), args, kwargs)
        finally:
            self.inner = False

    def run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """The operator on fake tensors, or what it gave the last time."""
        found = signature(func, args, kwargs)
        if found is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        key, tensors = found
        form = self.forms.get(key)
        if form is not None:
            return self.made(form, tensors)
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if key not in self.forms:
            self.forms[key] = None
            after = signature(func, args, kwargs)
            if after is not None and after[0] == key:  # it has not changed the form of an argument
                self.forms[key] = self.form(made, tensors)
        return made

    def made(self, form: Form, tensors: list[FakeTensor]) -> Any:
        """Results of this form for these arguments."""
        made = [None if one is None else self.result(one, tensors) for one in form.results]
        return made[0] if form.many is None else form.many(made)

    def result(self, one: Result, tensors: list[FakeTensor]) -> FakeTensor:
        if one.same != OWN:
            return tensors[one.same]
        bare = torch.empty_strided(one.size, one.stride, dtype=one.dtype, device=META)
        if one.over != OWN:
            bare.set_(tensors[one.over].untyped_storage(), one.offset, one.size, one.stride)
        return FakeTensor(self, bare, one.device)

    def form(self, made: Any, tensors: list[FakeTensor]) -> Form | None:
        """The form of these results, None where they have another."""
        many = type(made) if type(made) in (list, tuple) else None
        leaves = made if many is not None else [made]
        if not all(leaf is None or type(leaf) is FakeTensor for leaf in leaves):
            return None
        storages = [t.untyped_storage()._cdata for t in tensors]
        found = Form(
            many, tuple(None if leaf is None else _result(leaf, tensors, storages) for leaf in leaves)
        )
        again = self.made(found, tensors)
        pairs = zip(leaves, again if many is not None else [again], strict=True)
        own = [leaf.untyped_storage()._cdata for leaf in leaves if leaf is not None]
        own = [at for at in own if at not in storages]
        equal = len(set(own)) == len(own) and all(a is b or _facts(a) == _facts(b) for a, b in pairs)
        return found if equal else None


def signature(func: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], list[FakeTensor]] | None:
    """What a call is known by, and its tensors; None where its results could depend on more than that."""
    if func.namespace not in ("aten", "prims"):
        return None
    words, tensors = [func, torch.is_grad_enabled(), len(args), *kwargs], list[FakeTensor]()
    if not _described(args, words, tensors) or not _described(kwargs.values(), words, tensors):
        return None
    if len(tensors) > 1:
        for names in ([id(t) for t in tensors], [t.untyped_storage()._cdata for t in tensors]):
            words += map(names.index, names)
    return tuple(words), tensors


def _described(values: Iterable[Any], words: list[Any], tensors: list[FakeTensor]) -> bool:
    """Add what tells these arguments from others; False where nothing does."""
    for value in values:
        if isinstance(value, Tensor):
            if type(value) is not FakeTensor or value.constant is not None:
                return False
            tensors.append(value)
            words += _form(value)
        elif isinstance(value, (list, tuple)):
            words += (type(value), len(value))
            if not _described(value, words, tensors):
                return False
        elif isinstance(value, PLAIN):
            words += (type(value), value)  # 1 == 1.0 == True
        else:
            return False  # a storage, say
    return True


def _form(tensor: FakeTensor) -> tuple[Any, ...]:
    """How a tensor lies in its storage, and what else it says of itself."""
    strided = tensor.layout is torch.strided
    place = (tensor.stride(), tensor.storage_offset()) if strided else (tensor.layout,)
    own = tensor.dtype, tensor.fake_device, tensor.requires_grad, tensor.is_conj(), tensor.is_neg()
    return tensor.shape, *place, *own


def _facts(tensor: FakeTensor) -> tuple[Any, ...]:
    """All that a result has to have in common with the one that it stands for."""
    keys = torch._C._dispatch_key_set(tensor)
    return (*_form(tensor), keys, tensor.untyped_storage().nbytes(), tensor.constant)


def _result(tensor: FakeTensor, tensors: list[FakeTensor], storages: list[int]) -> Result:
    same = next((i for i, t in enumerate(tensors) if t is tensor), OWN)
    at = tensor.untyped_storage()._cdata
    over = storages.index(at) if at in storages else OWN
    offset = int(tensor.storage_offset())
    return Result(same, over, tuple(tensor.shape), tensor.stride(), offset, tensor.dtype, tensor.fake_device)
