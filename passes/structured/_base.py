"""What a structured matrix is: sizes, a projection onto it, and the linear that it makes.

Factors are plain tuples of tensors; a StructuredMatrix holds sizes alone. `dense` and `linear` are written
through Ops: with EAGER they compute, with a rule's `op` they write a graph.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, fx

from fxaccel.errors import OptionError
from fxaccel.passes.structured._descent import descend
from fxaccel.passes.structured._target import Target, checked, wide
from fxaccel.pattern import Ops

EAGER = Ops(lambda target, args, kwargs: target(*args, **kwargs))
"""Ops that compute at once, on tensors."""

LARGE = 256  # a side from which sizes are multiples of TILE
TILE = 16  # what tensor cores take, in every dimension of a product

Factors: TypeAlias = tuple[Tensor, ...]
Member = TypeVar("Member", bound="StructuredMatrix")


@dataclass(frozen=True)
class StructuredMatrix(ABC):
    """A kind of matrix W [rows, columns], for y = x W^T, made of factors with fewer parameters.

    Shapes     rows: outputs of the linear; columns: its inputs; factors: `shapes`, named by `parts`.
    Errors     OptionError where sizes are impossible, or a weight or gram has other sizes.
    """

    rows: int
    columns: int

    name: ClassVar[str]

    def __post_init__(self) -> None:
        expect(self, "rows", self.rows)
        expect(self, "columns", self.columns)

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """Names of the factors."""

    @property
    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the factors, in the order of `parts`."""

    @abstractmethod
    def project(self, target: Target, seed: int) -> Factors:
        """The best factors that are found for the target without `descend`, in its dtype."""

    @abstractmethod
    def random(
        self, variance: float, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Factors:
        """Factors to train from: entries of `dense` have mean 0 and this variance, and no two are correlated.

        So `linear` of independent inputs has the variance that a dense weight of this variance gives.
        """

    @abstractmethod
    def dense(self, op: Ops, *factors: Any) -> Any:
        """W [rows, columns]."""

    @abstractmethod
    def linear(self, op: Ops, x: Any, factors: Iterable[Any], bias: Any) -> Any:
        """x W^T + bias; x [..., columns], bias [rows] or None."""

    @classmethod
    @abstractmethod
    def sized(cls, rows: int, columns: int, share: float) -> StructuredMatrix | None:
        """The member of most parameters among those of at most share * rows * columns, 0 < share < 1.

        Sizes of a large matrix are multiples of 16, at the cost of some of those parameters.
        """

    @property
    def parameters(self) -> int:
        """How many numbers the factors hold."""
        return sum(map(math.prod, self.shapes))

    @property
    def flops(self) -> int:
        """Of `linear` without its bias, for one row of x: each number multiplies and adds once."""
        return 2 * self.parameters

    def nbytes(self, itemsize: int) -> int:
        """Bytes of the factors, at so many bytes a number."""
        return self.parameters * itemsize

    def fit(
        self,
        weight: Tensor,
        gram: Tensor | None = None,
        *,
        steps: int = 0,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Factors:
        """The factors nearest to a dense weight [rows, columns], in its dtype, on its device.

        Norm       |W - dense| in the Frobenius norm; with gram [columns, columns] = sum x x^T over inputs x
                   (any multiple, also singular: damped by 1e-10 of its mean diagonal) sum |(W - dense) x|^2.
        Numerics   float64, complex128 of a complex weight, rounded once; the same for the same seed.
        steps      more of L-BFGS on all factors together; they never end at a larger error.
        progress   called with (done, of): the projection counts as one step.
        """
        if tuple(weight.shape) != (self.rows, self.columns):
            raise OptionError(
                f"the weight is {list(weight.shape)}, expected [{self.rows}, {self.columns}]",
                f"make a {type(self).__name__} of the weight's sizes",
            )
        with torch.inference_mode(False), torch.no_grad():
            factors = self.nearest(Target.of(weight, gram), steps, seed, progress)
            return tuple(f.to(weight.dtype).contiguous() for f in factors)

    def nearest(
        self,
        target: Target,
        steps: int = 0,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Factors:
        """As `fit`, to a target that several structures can share, in its dtype."""
        report = (lambda done: progress(done + 1, steps + 1)) if progress is not None else (lambda done: None)
        with torch.inference_mode(False), torch.no_grad():
            factors = self.project(target, seed)
            report(0)
            if steps:
                factors = self._descended(target, factors, steps, report)
                report(steps)
            return factors

    def _descended(
        self, target: Target, factors: Factors, steps: int, report: Callable[[int], None] | None = None
    ) -> Factors:
        def square(state: list[Tensor]) -> Tensor:
            return target.square(target.weight - self.dense(EAGER, *(f[0, 0] for f in state))).reshape(1, 1)

        return tuple(f[0, 0] for f in descend(square, [f[None, None] for f in factors], steps, report))

    def error(self, weight: Tensor, factors: Iterable[Tensor], gram: Tensor | None = None) -> float:
        """|W - dense| / |W| in the norm of `fit`, without its damping; 0 where both are 0."""
        with torch.no_grad():
            if gram is not None:
                checked(weight, gram)
            w, g = wide(weight), None if gram is None else wide(gram)
            gap = w - self.dense(EAGER, *(wide(f) for f in factors))
            over, under = (float(((e if g is None else e @ g.to(e)) * e.conj()).real.sum()) for e in (gap, w))
        if under <= 0:
            return 0.0 if over <= 0 else math.inf
        return math.sqrt(max(0.0, over) / under)


def expect(matrix: StructuredMatrix, what: str, value: int, least: int = 1, most: float = math.inf) -> None:
    """Raises OptionError where a size is out of its range."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        upto = "" if most == math.inf else f" to {most}"
        raise OptionError(
            f"{what} of a {type(matrix).__name__} is {value!r}, expected an integer from {least}{upto}",
            f"the matrix is {matrix.rows} x {matrix.columns}",
        )


def shared(share: float) -> float:
    """A share of the dense parameters, checked."""
    if not 0 < share < 1:
        raise OptionError(f"the share is {share!r}, expected a number between 0 and 1")
    return share


def fullest(fits: Iterable[Member], nearly: float, away: Callable[[Member], float]) -> Member | None:
    """Of the members with `nearly` the most parameters the one that is least `away`; None of none."""
    fits = list(fits)
    most = max((m.parameters for m in fits), default=0)
    return min((m for m in fits if m.parameters >= nearly * most), key=away, default=None)


def normal(
    shape: tuple[int, ...], variance: float | Tensor, generator: torch.Generator | None, dtype: torch.dtype
) -> Tensor:
    """Independent normal numbers of this variance, drawn in float32 at least and rounded once."""
    drawn = dtype if dtype.itemsize >= 4 else torch.float32
    size = torch.as_tensor(variance, dtype=torch.float64).sqrt()
    return (torch.randn(shape, generator=generator, dtype=drawn) * size.to(drawn)).to(dtype)


def sizes(op: Ops, x: Any) -> list[Any]:
    """The sizes of a tensor or of a node's tensor; symbolic ones are read from it."""
    value = x.meta["val"] if isinstance(x, fx.Node) else x
    return [s if isinstance(s, int) else op.aten.sym_size.int(x, i) for i, s in enumerate(value.shape)]


def cut(op: Ops, w: Any, rows: tuple[int, int], columns: tuple[int, int]) -> Any:
    """The first of these many rows and columns of a matrix: (kept, present)."""
    for dim, (kept, present) in enumerate((rows, columns)):
        if kept != present:
            w = op.aten.slice.Tensor(w, dim, 0, kept)
    return w


def blocks_of(size: int, count: int) -> int:
    """The size of each of `count` blocks that cover `size`."""
    return -(-size // count)
