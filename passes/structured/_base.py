"""What a structured matrix is: sizes, a projection onto it, and the linear that it makes.

Factors are plain tuples of tensors, the parts of a LinearForm.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxaccel.errors import OptionError
from fxaccel.passes._linear_form import EAGER, LinearForm, Parts
from fxaccel.passes._target import Target, wide
from fxaccel.passes.structured._descent import descend
from fxaccel.pattern import Ops

LARGE = 256  # a side from which sizes are multiples of TILE
TILE = 16  # what tensor cores take, in every dimension of a product

Factors = Parts
Member = TypeVar("Member", bound="StructuredMatrix")


@dataclass(frozen=True)
class StructuredMatrix(LinearForm):
    """A kind of matrix W [rows, columns], for y = x W^T, made of factors with fewer parameters.

    Shapes     rows: outputs of the linear; columns: its inputs; factors: `shapes`, named by `parts`.
    Errors     OptionError where sizes are impossible, or a weight or gram has other sizes.
    """

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

    @classmethod
    @abstractmethod
    def sized(cls, rows: int, columns: int, share: float) -> StructuredMatrix | None:
        """The member of most parameters among those of at most share * rows * columns, 0 < share < 1.

        Sizes of a large matrix are multiples of 16, at the cost of some of those parameters.
        """

    @property
    def flops(self) -> int:
        """Of `linear` without its bias, for one row of x: each number multiplies and adds once."""
        return 2 * self.parameters

    def work(self) -> tuple[float, str]:
        share = self.flops / (2 * self.rows * self.columns)
        return share, f"{share:.2f} of the FLOPs"

    def fitted(self, weight: Tensor, target: Target, options: Any) -> Factors:
        return self.rounded(self.nearest(target, options.steps, options.seed), weight.dtype)

    def plain(self, weight: Tensor) -> Factors:
        target = Target(wide(weight))  # unchecked: a file may hold this way
        return self.rounded(self.project(target, seed=0), weight.dtype)

    @staticmethod
    def rounded(factors: Factors, dtype: torch.dtype) -> Factors:
        """The factors in another dtype."""
        return tuple(f.to(dtype).contiguous() for f in factors)

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
            return self.rounded(factors, weight.dtype)

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


def cut(op: Ops, w: Any, rows: tuple[int, int], columns: tuple[int, int]) -> Any:
    """The first of these many rows and columns of a matrix: (kept, present)."""
    for dim, (kept, present) in enumerate((rows, columns)):
        if kept != present:
            w = op.aten.slice.Tensor(w, dim, 0, kept)
    return w


def blocks_of(size: int, count: int) -> int:
    """The size of each of `count` blocks that cover `size`."""
    return -(-size // count)
