"""How a convolution walks over its input: what its spellings have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxaccel.rule import Refusal

aten = torch.ops.aten
PLAIN = {d: getattr(aten, f"conv{d}d").default for d in (1, 2, 3)}
CONVOLUTIONS = (*PLAIN.values(), *(getattr(aten, f"conv{d}d").padding for d in (1, 2, 3)))
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


def uneven(sizes: Sequence[Any]) -> Refusal:
    """Why a convolution stays that has no `Window`."""
    return Refusal(
        f"padding 'same' of {list(sizes)} is one more behind than before", "F.pad before it, and padding=0"
    )


@dataclass(frozen=True)
class Window:
    """Sizes of a kernel in each spatial dimension, and how it is moved; padding on both sides, with zeros."""

    sizes: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sequence[int], stride: Any, padding: Any, dilation: Any) -> Window | None:
        """From the arguments of a call; None where the padding of 'same' is one more behind than before."""

        def each(value: Any) -> tuple[int, ...]:
            return tuple(value) * (len(sizes) if len(value) == 1 else 1)

        if padding == "same":
            around = [d * (k - 1) for d, k in zip(each(dilation), sizes, strict=True)]
            if any(a % 2 for a in around):
                return None
            padding = [a // 2 for a in around]
        elif padding == "valid":
            padding = [0]
        return cls(tuple(sizes), each(stride), each(padding), each(dilation))

    @classmethod
    def point(cls, dims: int) -> Window:
        """Of a convolution that reads one place."""
        one = (1,) * dims
        return cls(one, one, (0,) * dims, one)

    @property
    def count(self) -> int:
        """Places that it covers."""
        return math.prod(self.sizes)

    def along(self, dim: int) -> Window:
        """The part of it in one dimension, one place wide in the others."""

        def part(value: Sequence[int], other: int) -> tuple[int, ...]:
            return tuple(v if d == dim else other for d, v in enumerate(value))

        return Window(
            part(self.sizes, 1), part(self.stride, 1), part(self.padding, 0), part(self.dilation, 1)
        )

    def call(self, op: Any, x: Any, weight: Any, bias: Any, groups: int = 1) -> Any:
        """The convolution of x [N, C, *spatial] with weight [K, C / groups, *sizes], written through Ops."""
        convolution = getattr(op.aten, f"conv{len(self.sizes)}d").default
        how = (list(v) for v in (self.stride, self.padding, self.dilation))
        return convolution(x, weight, bias, *how, groups)
