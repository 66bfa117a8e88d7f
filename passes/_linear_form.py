"""What a linear's weight can be held as: dense factors, numbers of few bits; and the linear that it makes.

The parts of a form are plain tuples of tensors; a LinearForm holds sizes and options alone. `dense`, `ready`
and `linear` are written through Ops: with EAGER they compute, with a pass's `op` they write a graph.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, fx

from fxaccel.calibration import Moments
from fxaccel.errors import OptionError
from fxaccel.passes._target import Target, checked, relative, wide
from fxaccel.pattern import Ops

EAGER = Ops(lambda target, args, kwargs: target(*args, **kwargs))
"""Ops that compute at once, on tensors."""

Parts: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class LinearForm(ABC):
    """A way to hold a matrix W [rows, columns], for y = x W^T, that is not the dense one.

    Shapes     rows: outputs of the linear; columns: its inputs; parts: `shapes`, named by `parts`.
    Errors     OptionError where sizes are impossible, or a weight or gram has other sizes.
    """

    rows: int
    columns: int

    name: ClassVar[str]
    tables: ClassVar[bool] = False
    """Whether `lookup` is there."""
    frozen: ClassVar[bool] = False
    """Whether the parts are held fixed in training."""

    def __post_init__(self) -> None:
        expect(self, "rows", self.rows)
        expect(self, "columns", self.columns)

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """Names of the parts."""

    @property
    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parts, in the order of `parts`."""

    @abstractmethod
    def work(self) -> tuple[float, str]:
        """What `linear` costs, of the dense one, where time is not measured; and that in words."""

    @abstractmethod
    def fitted(self, weight: Tensor, target: Target, options: Any) -> Parts:
        """The parts nearest to a weight in the norm of the target, as the options of the pass ask.

        weight    [rows, columns], as the model has it; `target` holds it in float64
        """

    @abstractmethod
    def plain(self, weight: Tensor) -> Parts:
        """Parts of any weight, without data and quickly: what a dense checkpoint is turned into."""

    @abstractmethod
    def dense(self, op: Ops, *parts: Any) -> Any:
        """W [rows, columns]."""

    @abstractmethod
    def linear(self, op: Ops, x: Any, parts: Iterable[Any], bias: Any) -> Any:
        """x W^T + bias, of what `ready` returns; x [..., columns], bias [rows] or None."""

    def ready(self, op: Ops, parts: Iterable[Any]) -> tuple[Any, ...]:
        """What `linear` reads, made of the parts alone: in inference it is computed once."""
        return tuple(parts)

    def definition(self, op: Ops, x: Any, parts: Iterable[Any], bias: Any) -> Any:
        """What `linear` is to compute, by PyTorch's linear of the dense matrix."""
        return op.aten.linear.default(x, self.dense(op, *parts), bias)

    def lookup(self, op: Ops, indices: Any, parts: Iterable[Any]) -> Any:
        """Rows of W, of what `ready` returns: the embedding whose table it is."""
        raise NotImplementedError(f"a {type(self).__name__} holds no table")

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Dtypes of the parts of a weight in `dtype`."""
        return (dtype,) * len(self.parts)

    def serving(self, grad: bool) -> LinearForm:
        """The form for captures with or without gradients, of the same parts."""
        return self

    def rounding(self, seen: Moments) -> float:
        """Variance of what is added to each input where `linear` rounds them, summed over the rows seen."""
        return 0.0

    @property
    def parameters(self) -> int:
        """How many numbers the parts hold."""
        return sum(map(math.prod, self.shapes))

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of the parts of a weight in `dtype`."""
        sizes = zip(self.shapes, self.dtypes(dtype), strict=True)
        return sum(math.prod(shape) * kind.itemsize for shape, kind in sizes)

    def error(self, weight: Tensor, parts: Iterable[Tensor], gram: Tensor | None = None) -> float:
        """|W - dense| / |W| in the Frobenius norm, or with a gram of inputs; 0 where both are 0."""
        with torch.no_grad():
            if gram is not None:
                checked(weight, gram)
            w, g = wide(weight), None if gram is None else wide(gram)
            gap = w - wide(self.dense(EAGER, *self._widened(parts)))
            return relative(*(((e if g is None else e @ g.to(e)) * e.conj()).real.sum() for e in (gap, w)))

    def _widened(self, parts: Iterable[Tensor]) -> Sequence[Tensor]:
        return [wide(p) for p in parts]


def expect(form: LinearForm, what: str, value: int, least: int = 1, most: float = math.inf) -> None:
    """Raises OptionError where a size is out of its range."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        upto = "" if most == math.inf else f" to {most}"
        raise OptionError(
            f"{what} of a {type(form).__name__} is {value!r}, expected an integer from {least}{upto}",
            f"the matrix is {form.rows} x {form.columns}",
        )


def sizes(op: Ops, x: Any) -> list[Any]:
    """The sizes of a tensor or of a node's tensor; symbolic ones are read from it."""
    value = x.meta["val"] if isinstance(x, fx.Node) else x
    return [s if isinstance(s, int) else op.aten.sym_size.int(x, i) for i, s in enumerate(value.shape)]
