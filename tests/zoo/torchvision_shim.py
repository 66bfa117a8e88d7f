"""Import torchvision's CUDA wheel beside CPU torch.

The wheel's compiled library does not load there, so its `torchvision::` operators do not exist,
and registering fake kernels for them at import raises. Inside `importable()` those registrations,
and only those, do nothing. What a model computes is not touched: nothing in the zoo calls them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PREFIX = "torchvision::"


@contextmanager
def importable() -> Iterator[None]:
    """Skip fake kernels of missing torchvision operators; on exit torch is as it was before."""
    original = torch.library.register_fake

    @functools.wraps(original)
    def register_fake(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith(PREFIX) and not exists(op):
            return _same
        return original(op, *args, **kwargs)

    torch.library.register_fake = register_fake
    try:
        yield
    finally:
        torch.library.register_fake = original


def exists(op: str) -> bool:
    """Whether the dispatcher knows an operator of this name, such as "torchvision::nms"."""
    namespace, name = op.split("::")
    return hasattr(getattr(torch.ops, namespace), name)


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
