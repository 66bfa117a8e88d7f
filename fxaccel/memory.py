"""The memory that tensors take, counted as it is used."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode


def key(tensor: Tensor) -> int:
    """What tells the storage of a tensor from all others that live."""
    return tensor.untyped_storage()._cdata


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among the arguments or results of an operator."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)
        elif isinstance(value, dict):
            yield from tensors(value.values())


class Ledger:
    """Bytes of storages, from when they are counted to when they are freed.

    live, peak   bytes now, and at most since `reset`
    """

    def __init__(self) -> None:
        self.live, self.peak = 0, 0
        self.known: dict[int, int] = {}

    def reset(self) -> None:
        """Start the peak anew."""
        self.peak = self.live

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator, whose storages count if they are none of the arguments'."""
        for tensor in tensors((args, kwargs)):
            self.count(tensor, 0)  # it was there before, or is counted
        made = func(*args, **(kwargs or {}))
        for tensor in tensors((made,)):
            self.count(tensor, tensor.untyped_storage().nbytes())
        return made

    def count(self, tensor: Tensor, size: int) -> None:
        """From now on its storage takes this many bytes, unless it is counted already."""
        storage = tensor.untyped_storage()
        at = storage._cdata
        if at not in self.known:
            self.known[at] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.freed, at).atexit = False

    def freed(self, at: int) -> None:
        """A storage is no more."""
        self.live -= self.known.pop(at)


class Meter(Ledger, TorchDispatchMode):
    """Counts the bytes of the storages that operators make inside, as long as they live.

    What a kernel takes for itself while it runs is not seen, nor is what was there before.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        Ledger.__init__(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs)

    def count(self, tensor: Tensor, size: int) -> None:
        if not isinstance(tensor, FakeTensor):  # they take nothing: a capture runs inside
            super().count(tensor, size)
