"""Calls on fake tensors that are worked out once where equal ones are many: a step without data, an export.

A call is known by its operator, the sizes, strides and types of its tensors, which of them share a storage,
and its other arguments. What it gave the first time is written down as a form: which results are arguments,
which lie in an argument's storage and how, which in a new one. torch's mode has such a table itself, for all
threads; looking a call up in that takes several times as long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from types import NoneType
from typing import Any, NamedTuple

import sympy
import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from fxaccel.memory import Ledger

META = torch.device("meta")
OWN = -1
PLAIN = (int, float, complex, str, NoneType, torch.dtype, torch.device, torch.layout, torch.memory_format)
Key = tuple[Any, ...]


class Result(NamedTuple):
    """One tensor that a call gives.

    same, over    the tensor among the arguments that it is, and the one whose storage it lies in, or OWN
    """

    same: int
    over: int
    size: tuple[int | SymInt, ...]
    stride: tuple[int | SymInt, ...]
    offset: int | SymInt
    dtype: torch.dtype
    device: torch.device


class Form(NamedTuple):
    """What a call gives: one result, or some in a list or tuple."""

    many: type | None
    results: tuple[Result | None, ...]


class Forms:
    """The forms of what calls in a mode gave, by what the calls are known by."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.known: dict[Key, Form | None] = {}

    def call(self, work: Callable[..., Any], func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """What `work`, a dispatch of torch's mode, gives for the call, or what it gave for an equal one."""
        found = signature(func, args, kwargs)
        if found is None:
            return work(func, types, args, kwargs)
        key, tensors = found
        form = self.known.get(key)
        if form is not None:
            return self.made(form, tensors)
        made = work(func, types, args, kwargs)
        if key not in self.known:
            self.known[key] = None
            after = signature(func, args, kwargs)
            if after is not None and after[0] == key:  # it has not changed the form of an argument
                self.known[key] = self.form(made, key, tensors)
        return made

    def made(self, form: Form, tensors: list[FakeTensor]) -> Any:
        """Results of this form for these arguments."""
        made = [None if one is None else self.result(one, tensors) for one in form.results]
        return made[0] if form.many is None else form.many(made)

    def result(self, one: Result, tensors: list[FakeTensor]) -> FakeTensor:
        if one.same != OWN:
            return tensors[one.same]
        if one.over == OWN:
            bare = torch.empty_strided(one.size, one.stride, dtype=one.dtype, device=META)
        else:  # `set_` would add a guard: the place of one of symbolic sizes has to lie within the storage
            with in_kernel_invocation_manager(self.mode):
                bare = torch.as_strided(tensors[one.over], one.size, one.stride, one.offset)
        return FakeTensor(self.mode, bare, one.device)

    def form(self, made: Any, key: Key, tensors: list[FakeTensor]) -> Form | None:
        """The form of these results, None where they have another."""
        many = next((kind for kind in (list, tuple) if isinstance(made, kind)), None)
        leaves = made if many is not None else [made]
        if not all(leaf is None or type(leaf) is FakeTensor for leaf in leaves):
            return None
        storages = [t.untyped_storage()._cdata for t in tensors]
        found = Form(
            many, tuple(None if leaf is None else _result(leaf, tensors, storages) for leaf in leaves)
        )
        again = self.made(found, tensors)
        pairs = list(zip(leaves, again if many is not None else [again], strict=True))
        own = [leaf.untyped_storage()._cdata for leaf in leaves if leaf is not None]
        own = [at for at in own if at not in storages]
        equal = len(set(own)) == len(own) and all(a is b or _facts(a) == _facts(b) for a, b in pairs)
        given = _symbols(key)  # a size that depends on values has a name of its own each time
        return found if equal and all(a is b or _symbols(_form(a)) <= given for a, b in pairs) else None


class Fakes(FakeTensorMode):
    """Fake tensors whose bytes go into a ledger, those of the operators that the step calls."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.ledger, self.inner, self.forms = ledger, False, Forms(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing in here is compiled, and to say so at each call takes a tenth of the whole

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].device  # most of all dispatches are this question
        if self.inner or func.namespace == "prim":  # a part of an operator, or a question to a tensor
            return self.dispatch(func, types, args, kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # without data: a kernel that looks for a rare case does not find it
        work = self.dispatch
        self.inner = True
        try:
            return self.ledger.call(lambda *a, **k: self.forms.call(work, func, types, a, k), args, kwargs)
        finally:
            self.inner = False


@contextlib.contextmanager
def worked_out_once(mode: FakeTensorMode) -> Iterator[None]:
    """Inside, `mode` works out equal calls once, of symbolic sizes too, and does not use torch's table."""
    forms, work, inner, enabled = Forms(mode), mode.dispatch, False, mode.cache_enabled

    def dispatch(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        nonlocal inner
        if inner or func.namespace == "prim":
            return work(func, types, args, kwargs or {})
        inner = True
        try:
            return forms.call(work, func, types, args, kwargs or {})
        finally:
            inner = False

    mode.cache_enabled = False
    mode.dispatch = dispatch  # type: ignore[method-assign]
    try:
        yield
    finally:
        mode.cache_enabled = enabled
        del mode.dispatch


def signature(func: Any, args: Any, kwargs: Any) -> tuple[Key, list[FakeTensor]] | None:
    """What a call is known by, and its tensors; None where its results could depend on more than that."""
    if func.namespace not in ("aten", "prims"):
        return None
    states = torch.is_grad_enabled(), torch.get_default_dtype()
    words, tensors = [func, *states, len(args), *kwargs], list[FakeTensor]()
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
        elif isinstance(value, SymInt):
            words += (SymInt, value.node.expr)
        elif isinstance(value, PLAIN):
            words += (type(value), value)  # 1 == 1.0 == True
        else:
            return False  # a storage, say
    return True


def _form(tensor: FakeTensor) -> tuple[Any, ...]:
    """How a tensor lies in its storage, and what else it says of itself."""
    strided = tensor.layout is torch.strided
    place: Key = (tensor.stride(), tensor.storage_offset()) if strided else (tensor.layout,)
    if tensor._has_symbolic_sizes_strides:
        sizes: Key = tensor.dim(), *map(_plain, (*tensor.shape, *tensor.stride(), place[-1]))
    else:
        sizes = tensor.shape, *place
    own = tensor.dtype, tensor.fake_device, tensor.requires_grad, tensor.is_conj(), tensor.is_neg()
    return *sizes, *own


def _plain(size: Any) -> Any:
    """What a size is told by: a symbolic one cannot be hashed, and comparing it adds a guard."""
    return size.node.expr if isinstance(size, SymInt) else size


def _symbols(words: Key) -> set[sympy.Symbol]:
    return {s for word in words if isinstance(word, sympy.Expr) for s in word.free_symbols}


def _facts(tensor: FakeTensor) -> tuple[Any, ...]:
    """All that a result has to have in common with the one that it stands for."""
    symbolic = tensor._has_symbolic_sizes_strides  # the bytes are then dear to know, and nobody asks
    held = None if symbolic else tensor.untyped_storage().nbytes()
    return (*_form(tensor), torch._C._dispatch_key_set(tensor), held, tensor.constant)


def _result(tensor: FakeTensor, tensors: list[FakeTensor], storages: list[int]) -> Result:
    same = next((i for i, t in enumerate(tensors) if t is tensor), OWN)
    at = tensor.untyped_storage()._cdata
    over = storages.index(at) if at in storages else OWN
    place = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    return Result(same, over, *place, tensor.dtype, tensor.fake_device)
