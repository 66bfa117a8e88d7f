"""What a convolution's weight W [K, C, *sizes] can be held as: two or three thinner convolutions in a row.

    low-rank               y = point(conv(x, down), up)           down [R, C, *sizes], up [K, R, 1, 1]
    separable              y = conv(conv(x, tall), wide)          tall [R, C, h, 1], wide [K, R, 1, w]
    depthwise-separable    y = point(depthwise(x, depth), up)     depth [M C, 1, *sizes], up [K, M C, 1, 1]
    tucker                 y = point(conv(point(x, first), core), last)
                           first [P, C, 1, 1], core [Q, P, *sizes], last [K, Q, 1, 1]

Fit        the first three are the nearest of their kind: W, its indices put in two groups, is a matrix (for
           each input channel one, of depthwise-separable ones) whose truncated singular value decomposition
           they are. Tucker's is found by alternation from the truncated decompositions along K and C, which
           never ends worse than it began.
Source     low-rank: Denton et al. 2014, arXiv:1404.0736; Zhang et al. 2016, arXiv:1505.06798. separable:
           Jaderberg et al. 2014, arXiv:1405.3866; Tai et al. 2016, arXiv:1511.06067. depthwise-separable: Guo
           et al. 2018, "Network Decoupling", arXiv:1808.05517. tucker: Kim et al. 2016, arXiv:1511.06530;
           De Lathauwer et al. 2000, "On the Best Rank-1 and Rank-(R1, ..., RN) Approximation".
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxaccel.errors import OptionError
from fxaccel.passes._convolutions import Window
from fxaccel.passes._linear_form import LinearForm, Parts, expect
from fxaccel.passes._target import Target, wide
from fxaccel.passes.structured.low_rank import truncated
from fxaccel.pattern import Ops

ROUNDS = 30  # of alternation of a Tucker fit, at most
STILL = 1e-6  # share of the weight's square that a further round must gain


@dataclass(frozen=True)
class ConvolutionForm(LinearForm):
    """A way to hold the weight of a convolution of one group by more and thinner ones.

    Shapes     rows: output channels K; columns: C times the places of the window.
    """

    window: Window

    @classmethod
    @abstractmethod
    def sized(cls, rows: int, columns: int, window: Window, share: float) -> ConvolutionForm | None:
        """The member of most parameters among those of at most share * rows * columns; None of none."""

    @abstractmethod
    def nearest(self, weight: Tensor) -> Parts:
        """The parts nearest to a weight [K, C, *sizes] in float64, in the Frobenius norm."""

    @property
    def channels(self) -> int:
        """Input channels C."""
        return self.columns // self.window.count

    @property
    def dims(self) -> int:
        """Spatial dimensions."""
        return len(self.window.sizes)

    @property
    def flops(self) -> float:
        """Multiplications for each place of the output."""
        return float(self.parameters)

    def work(self) -> tuple[float, str]:
        share = self.flops / (self.rows * self.columns)
        return share, f"{share:.2f} of the FLOPs"

    def fitted(self, weight: Tensor, target: Target, options: Any) -> Parts:
        return self.plain(weight)

    def plain(self, weight: Tensor) -> Parts:
        with torch.inference_mode(False), torch.no_grad():
            return tuple(p.to(weight.dtype).contiguous() for p in self.nearest(wide(weight)))

    def definition(self, op: Ops, x: Any, parts: Iterable[Any], bias: Any) -> Any:
        return self.window.call(op, x, self.dense(op, *parts), bias)

    def point(self, op: Ops, x: Any, weight: Any, bias: Any = None) -> Any:
        """The convolution of one place."""
        return Window.point(self.dims).call(op, x, weight, bias)

    def pointed(self, *shape: int) -> tuple[int, ...]:
        """The shape of the weight of such a one."""
        return (*shape, *[1] * self.dims)

    def weight(self, op: Ops, matrix: Any) -> Any:
        """W of its matrix [K, C * places]."""
        return op.aten.reshape.default(matrix, [self.rows, self.channels, *self.window.sizes])


def _matrix(op: Ops, weight: Any, rows: int) -> Any:
    return op.aten.reshape.default(weight, [rows, -1])


@dataclass(frozen=True)
class LowRankConvolution(ConvolutionForm):
    """The window's convolution with `rank` channels, and one of a single place that mixes them."""

    rank: int

    name: ClassVar[str] = "low-rank"
    parts: ClassVar[tuple[str, ...]] = ("down", "up")

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "rank", self.rank, 1, min(self.rows, self.columns))

    def __str__(self) -> str:
        return f"low-rank({self.rank})"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.rank, self.channels, *self.window.sizes), self.pointed(self.rows, self.rank)

    @classmethod
    def sized(cls, rows: int, columns: int, window: Window, share: float) -> LowRankConvolution | None:
        rank = int(share * rows * columns) // (rows + columns)
        return cls(rows, columns, window, rank) if rank else None

    def nearest(self, weight: Tensor) -> Parts:
        up, down = truncated(weight.flatten(1), self.rank)
        return tuple(p.reshape(s) for p, s in zip((down, up), self.shapes, strict=True))

    def dense(self, op: Ops, *parts: Any) -> Any:
        down, up = parts
        product = op.aten.matmul.default(_matrix(op, up, self.rows), _matrix(op, down, self.rank))
        return self.weight(op, product)

    def linear(self, op: Ops, x: Any, parts: Iterable[Any], bias: Any) -> Any:
        down, up = parts
        return self.point(op, self.window.call(op, x, down, None), up, bias)


@dataclass(frozen=True)
class SeparableConvolution(ConvolutionForm):
    """One convolution along the height, of `rank` channels, and one along the width. Two dimensions alone."""

    rank: int

    name: ClassVar[str] = "separable"
    parts: ClassVar[tuple[str, ...]] = ("tall", "wide")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims != 2:
            raise OptionError(f"a separable convolution has 2 dimensions, this window {self.dims}")
        height, width = self.window.sizes
        expect(self, "rank", self.rank, 1, min(self.channels * height, self.rows * width))

    def __str__(self) -> str:
        return f"separable({self.rank})"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        height, width = self.window.sizes
        return (self.rank, self.channels, height, 1), (self.rows, self.rank, 1, width)

    @classmethod
    def sized(cls, rows: int, columns: int, window: Window, share: float) -> SeparableConvolution | None:
        if len(window.sizes) != 2 or min(window.sizes) == 1:
            return None
        width = window.sizes[1]
        each = columns // width + rows * width  # numbers of a channel
        rank = int(share * rows * columns) // each
        return cls(rows, columns, window, rank) if rank else None

    @property
    def flops(self) -> float:
        """The first runs at every place of the width, whatever the stride along it is."""
        tall, wide = (math.prod(s) for s in self.shapes)
        return float(tall * self.window.stride[1] + wide)

    def nearest(self, weight: Tensor) -> Parts:
        height, width = self.window.sizes
        matrix = weight.permute(1, 2, 0, 3).reshape(self.channels * height, self.rows * width)
        tall, wide = truncated(matrix, self.rank)
        tall = tall.reshape(self.channels, height, self.rank).permute(2, 0, 1)
        wide = wide.reshape(self.rank, self.rows, width).permute(1, 0, 2)
        return tall[..., None], wide[:, :, None]

    def dense(self, op: Ops, *parts: Any) -> Any:
        tall, wide = parts
        height, width = self.window.sizes
        aten, rank = op.aten, self.rank
        tall = aten.reshape.default(aten.permute.default(tall, [1, 2, 0, 3]), [self.channels * height, rank])
        wide = aten.reshape.default(aten.permute.default(wide, [1, 0, 2, 3]), [rank, self.rows * width])
        product = aten.reshape.default(
            aten.matmul.default(tall, wide), [self.channels, height, self.rows, width]
        )
        return aten.contiguous.default(aten.permute.default(product, [2, 0, 1, 3]))

    def linear(self, op: Ops, x: Any, parts: Iterable[Any], bias: Any) -> Any:
        tall, wide = parts
        return self.window.along(1).call(op, self.window.along(0).call(op, x, tall, None), wide, bias)


@dataclass(frozen=True)
class DepthwiseSeparableConvolution(ConvolutionForm):
    """`multiplier` windows for each input channel alone, and a convolution of one place that mixes all."""

    multiplier: int

    name: ClassVar[str] = "depthwise-separable"
    parts: ClassVar[tuple[str, ...]] = ("depth", "up")

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "multiplier", self.multiplier, 1, min(self.rows, self.window.count))

    def __str__(self) -> str:
        return f"depthwise-separable({self.multiplier})"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        inner = self.channels * self.multiplier
        return (inner, 1, *self.window.sizes), self.pointed(self.rows, inner)

    @classmethod
    def sized(
        cls, rows: int, columns: int, window: Window, share: float
    ) -> DepthwiseSeparableConvolution | None:
        channels = columns // window.count
        most = int(share * rows * columns) // (channels * (rows + window.count))
        multiplier = min(most, rows, window.count - 1)
        return cls(rows, columns, window, multiplier) if multiplier > 0 else None

    def nearest(self, weight: Tensor) -> Parts:
        each = weight.flatten(2).transpose(0, 1)  # [C, K, places]
        up, depth = truncated(each, self.multiplier)
        up = up.permute(1, 0, 2).reshape(self.shapes[1])
        return depth.reshape(self.shapes[0]), up

    def dense(self, op: Ops, *parts: Any) -> Any:
        depth, up = parts
        aten, count, each = op.aten, self.window.count, self.multiplier
        depth = aten.reshape.default(depth, [self.channels, each, count])
        up = aten.reshape.default(up, [self.rows, self.channels, each])
        product = aten.matmul.default(aten.permute.default(up, [1, 0, 2]), depth)
        return self.weight(op, aten.permute.default(product, [1, 0, 2]))

    def linear(self, op: Ops, x: Any, parts: Iterable[Any], bias: Any) -> Any:
        depth, up = parts
        return self.point(op, self.window.call(op, x, depth, None, self.channels), up, bias)


@dataclass(frozen=True)
class TuckerConvolution(ConvolutionForm):
    """Fewer channels before the window, fewer behind it, and those of the model outside."""

    before: int
    behind: int

    name: ClassVar[str] = "tucker"
    parts: ClassVar[tuple[str, ...]] = ("first", "core", "last")

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "before", self.before, 1, self.channels)
        expect(self, "behind", self.behind, 1, self.rows)

    def __str__(self) -> str:
        return f"tucker({self.before}, {self.behind})"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        core = (self.behind, self.before, *self.window.sizes)
        return self.pointed(self.before, self.channels), core, self.pointed(self.rows, self.behind)

    @classmethod
    def sized(cls, rows: int, columns: int, window: Window, share: float) -> TuckerConvolution | None:
        """One share of the channels on both sides: a (C K places) t^2 + (C^2 + K^2) t <= share C K places."""
        if window.count == 1:
            return None
        channels, whole = columns // window.count, rows * columns
        outer = channels**2 + rows**2
        t = (math.sqrt(outer**2 + 4 * share * whole**2) - outer) / (2 * whole)
        before, behind = int(t * channels), int(t * rows)
        return cls(rows, columns, window, before, behind) if min(before, behind) else None

    @property
    def flops(self) -> float:
        """The first runs at every place of the input."""
        first, core, last = (math.prod(s) for s in self.shapes)
        return float(first * math.prod(self.window.stride) + core + last)

    def nearest(self, weight: Tensor) -> Parts:
        w = weight.flatten(2)  # [K, C, places]
        last, kept, whole = _leading(w.flatten(1), self.behind), 0.0, float(w.square().sum())
        for _ in range(ROUNDS):
            inside = torch.einsum("kcp,kq->cqp", w, last)
            first = _leading(inside.flatten(1), self.before)
            outside = torch.einsum("kcp,cb->kbp", w, first)
            last = _leading(outside.flatten(1), self.behind)
            core = torch.einsum("kbp,kq->qbp", outside, last)
            before, kept = kept, float(core.square().sum())  # the square of what is kept
            if kept - before <= STILL * whole:
                break
        parts = first.mT, core, last
        return tuple(p.reshape(s) for p, s in zip(parts, self.shapes, strict=True))

    def dense(self, op: Ops, *parts: Any) -> Any:
        first, core, last = parts
        aten, count = op.aten, self.window.count
        core = aten.reshape.default(core, [self.behind, self.before, count])
        rows = aten.matmul.default(
            _matrix(op, last, self.rows), aten.reshape.default(core, [self.behind, -1])
        )
        rows = aten.reshape.default(rows, [self.rows, self.before, count])
        columns = aten.permute.default(_matrix(op, first, self.before), [1, 0])
        return self.weight(op, aten.matmul.default(columns, rows))

    def linear(self, op: Ops, x: Any, parts: Iterable[Any], bias: Any) -> Any:
        first, core, last = parts
        inside = self.window.call(op, self.point(op, x, first), core, None)
        return self.point(op, inside, last, bias)


def _leading(matrix: Tensor, count: int) -> Tensor:
    """The first left singular vectors, [rows, count], of the matrix by its transpose: 10 times as fast."""
    return torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, -count:]


KINDS: dict[str, type[ConvolutionForm]] = {
    kind.name: kind
    for kind in (LowRankConvolution, SeparableConvolution, DepthwiseSeparableConvolution, TuckerConvolution)
}
