"""Structured matrices in the place of a graph's weights: the way there and back, times, errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxaccel.calibration import Calibration
from fxaccel.errors import OptionError
from fxaccel.ir import Program, arguments, is_call
from fxaccel.kernels._clock import least
from fxaccel.passes._linear_sites import EMBEDDING, TABLE, LinearSite
from fxaccel.passes.structured import EAGER, KINDS, LowRank, Monarch, StructuredMatrix
from fxaccel.passes.structured._target import Target, wide
from fxaccel.planner import Alternative, Choice, Place
from fxaccel.progress import tracked
from fxaccel.quality import Budget, Measured
from fxaccel.rule import Ops

DAMPING = 0.1  # of the mean square of an input, that is taken to be in every direction: calls are a sample

STRUCTURES: dict[str, type[StructuredMatrix]] = {
    **KINDS, "butterfly": Monarch, "radix-2-butterfly": KINDS["butterfly"],
}  # fmt: skip
"""By the names that users give; a butterfly without more is the one in two factors."""


@dataclass(frozen=True)
class Structured:
    """The map from a parameter to the factors of `matrix`, and what its readers become.

    flipped    whether the parameter is the transpose of the matrix
    """

    matrix: StructuredMatrix
    flipped: bool

    def __call__(self, weight: Tensor) -> tuple[Tensor, ...]:
        target = Target(wide(weight.mT if self.flipped else weight))  # unchecked: a file may hold this way
        return tuple(f.to(weight.dtype).contiguous() for f in self.matrix.project(target, seed=0))

    def inverse(self, *factors: Tensor) -> tuple[Tensor]:
        """The parameter that the factors stand for."""
        dense = self.matrix.dense(EAGER, *factors)
        return (dense.mT.contiguous() if self.flipped else dense,)

    def reads(self, reader: fx.Node) -> list[fx.Node]:
        """What a reader reads besides the weight."""
        bound = arguments(reader)
        names = ("indices",) if is_call(reader, EMBEDDING) else ("input", "bias")
        return [bound[n] for n in names if isinstance(bound[n], fx.Node)]

    def written(
        self, op: Ops, reader: fx.Node, factors: Sequence[fx.Node], of: Callable[[Any], Any] = lambda x: x
    ) -> Any:
        """The reader with the factors in place of the weight."""
        bound = arguments(reader)
        if not is_call(reader, EMBEDDING):
            return self.matrix.linear(op, of(bound["input"]), of(tuple(factors)), of(bound["bias"]))
        down, up = of(tuple(factors))
        rows = op.aten.permute.default(down, [1, 0])
        return op.aten.linear.default(op.aten.embedding.default(rows, of(bound["indices"])), up)

    def by_definition(
        self, op: Ops, reader: fx.Node, factors: Sequence[fx.Node], of: Callable[[Any], Any]
    ) -> Any:
        """The reader with the dense weight that the factors stand for."""
        bound, weight = arguments(reader), self.matrix.dense(op, *of(tuple(factors)))
        if not is_call(reader, EMBEDDING):
            return op.aten.linear.default(of(bound["input"]), weight, of(bound["bias"]))
        return op.aten.embedding.default(op.aten.permute.default(weight, [1, 0]), of(bound["indices"]))


@dataclass(frozen=True)
class Candidate:
    """A matrix that could take a site's place, what that costs a call, and the figures for people."""

    matrix: StructuredMatrix
    cost: float
    figures: str


@dataclass(frozen=True)
class Fitted:
    """A matrix with its factors, and the report's words for it."""

    way: Structured
    factors: tuple[Tensor, ...]
    told: str


class Fits:
    """Measures and fits the structured matrices that could take the places of a program's weights.

    options    the pass: its options aware, steps, seed, even_if_slower are read
    """

    def __init__(self, options: Any, program: Program, calibration: Calibration) -> None:
        self.options, self.program, self.calibration = options, program, calibration
        self.tensors = calibration.state(program)
        self.times: dict[Any, list[float]] = {}

    def weight(self, site: LinearSite) -> Tensor:
        """The weight of a site, [outputs, inputs]."""
        weight = self.tensors[site.node.name].detach()
        return weight.mT if site.flipped else weight

    # -- time -------------------------------------------------------------------------------------

    def paying(
        self, site: LinearSite, kinds: Sequence[str], shares: Iterable[float], pays: float
    ) -> tuple[list[Candidate], str]:
        """The matrices that are at least `pays` times as fast as the dense one; where there are none, why."""
        if site.role == TABLE:
            kinds = [k for k in kinds if STRUCTURES[k] is LowRank]
            if not kinds:
                return (
                    [],
                    "rows of a table can be looked up in low-rank factors only, which were not asked for",
                )
        found = [STRUCTURES[k].sized(*site.shape, share) for share in shares for k in kinds]
        matrices = list(dict.fromkeys(m for m in found if m is not None))
        size, rows = f"{site.shape[0]} x {site.shape[1]}", site.rows(self.program)
        if not matrices:
            return [], f"a weight of {size} has no such structure of fewer parameters"
        if self.options.even_if_slower:
            full = 2 * math.prod(site.shape)
            return [Candidate(m, float(m.flops), f"{m.flops / full:.2f} of the FLOPs") for m in matrices], ""
        dense, *times = self.timed(site, matrices)
        told = [
            Candidate(m, ms, f"{dense / ms:.2f} times as fast ({ms:.3g} ms for {dense:.3g})")
            for m, ms in zip(matrices, times, strict=True)
        ]
        best = sorted(told, key=lambda c: c.cost)[:3]
        why = f"no structure pays at {size} and {rows} rows, expected {pays} times as fast: " + ", ".join(
            f"{c.matrix} is {c.figures}" for c in best
        )
        good = [c for c in told if dense >= pays * c.cost]
        return good, "" if good else why

    def timed(self, site: LinearSite, matrices: Sequence[StructuredMatrix]) -> list[float]:
        """Milliseconds that a site takes for all of its rows, as it is and with each matrix."""
        rows, weight = site.rows(self.program), self.tensors[site.node.name]
        bias = any(arguments(r).get("bias") is not None for r in site.readers)
        table = site.role == TABLE
        key = (tuple(matrices), site.shape, rows, weight.dtype, weight.device, bias, table)
        if key not in self.times:
            generator = torch.Generator().manual_seed(0)
            runs = [
                _run(m, site, rows, weight, bias, self.program.grad, generator) for m in (None, *matrices)
            ]
            self.times[key] = least(runs, weight.device)
        return self.times[key]

    def dense_cost(self, site: LinearSite, matrices: Sequence[StructuredMatrix]) -> float:
        """What the site costs as it is, in what `paying` counts."""
        if self.options.even_if_slower:
            return 2.0 * math.prod(site.shape)
        return self.timed(site, matrices)[0]

    # -- fits -------------------------------------------------------------------------------------

    def places(self, open_to: Mapping[LinearSite, Sequence[Candidate]]) -> list[Place]:
        """Every site with its candidates fitted."""
        linears = [s for s in open_to if s.role != TABLE and self.options.aware]
        waiting = {s: list(s.inputs) for s in linears}
        sums, made = dict[LinearSite, Tensor](), dict[LinearSite, Place]()
        values = list(dict.fromkeys(x for s in linears for x in s.inputs))
        moments = self.calibration.moments(self.program, values)
        for value, gram in tracked(moments, "projecting weights", len(values)):
            for site in [s for s in linears if value in waiting[s]]:
                sums[site] = sums[site] + gram if site in sums else gram
                waiting[site] = [x for x in waiting[site] if x is not value]
                if not waiting[site]:
                    made[site] = self.place(site, open_to[site], sums.pop(site))
        for site in tracked([s for s in open_to if s not in made], "projecting weights"):
            made[site] = self.place(site, open_to[site], None)
        return [made[s] for s in open_to]

    def place(self, site: LinearSite, candidates: Sequence[Candidate], gram: Tensor | None) -> Place:
        """One site with its candidates fitted."""
        weight = self.weight(site)
        if not bool(weight.isfinite().all()):
            raise OptionError(f"{site.name} holds values that are not finite, expected finite ones")
        if gram is not None:
            gram = gram.to(weight.device, copy=True)
            gram.diagonal().add_(DAMPING * gram.diagonal().mean())
        target, beside = Target.of(weight, gram), any(not isinstance(c.matrix, LowRank) for c in candidates)
        spectrum = _spectrum(weight, gram) if beside else None
        alternatives = []
        for one in candidates:
            matrix = one.matrix
            nearest = matrix.nearest(target, self.options.steps, self.options.seed)
            factors = tuple(f.to(weight.dtype).contiguous() for f in nearest)
            error = matrix.error(weight, factors, gram)
            told = f"{matrix}: {one.figures}, off by {error:.2g}" + _beside(matrix, spectrum)
            fitted = Fitted(Structured(matrix, site.flipped), factors, told)
            nbytes = matrix.nbytes(weight.element_size())
            alternatives.append(Alternative(str(matrix), one.cost, nbytes, error, fitted))
        cost = self.dense_cost(site, [c.matrix for c in candidates])
        return Place(site.name, cost, weight.numel() * weight.element_size(), tuple(alternatives))

    def tried(self, budget: Budget, choice: Choice, numbers: Sequence[int]) -> Measured:
        """The budget's metric with the chosen matrices in place of the weights."""
        nodes = {slot.name: node for node, slot in self.program.state.items()}
        swapped = {nodes[n]: a.made.way.inverse(*a.made.factors)[0] for n, a in choice.items()}
        return self.calibration.quality(budget, self.program, self.program, numbers, swapped)


def _run(
    matrix: StructuredMatrix | None, site: LinearSite, rows: int, weight: Tensor, bias: bool, grad: bool,
    generator: torch.Generator,
) -> Callable[[], Any]:  # fmt: skip
    """A call of a linear or table with the factors of a matrix, or the dense weight; with its gradients."""
    outputs, inputs = site.shape

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight).requires_grad_(grad)

    b = drawn(outputs) if bias else None
    parts = [drawn(*s) for s in ([(outputs, inputs)] if matrix is None else matrix.shapes)]
    if site.role == TABLE:
        at = torch.randint(inputs, (rows,), generator=generator).to(weight.device)
        x, leaves = None, parts
        rest = [] if matrix is None else parts[1:]
        table = parts[0].detach().mT.contiguous().requires_grad_(grad)
        leaves = [table, *rest]
    else:
        x = drawn(rows, inputs)
        leaves = [x, *parts, *([] if b is None else [b])]

    def forward() -> Tensor:
        if x is None:
            y = F.embedding(at, table)
            return F.linear(y, rest[0]) if rest else y
        return F.linear(x, parts[0], b) if matrix is None else matrix.linear(EAGER, x, parts, b)

    def run() -> Any:
        with torch.set_grad_enabled(grad):
            y = forward()
            return torch.autograd.grad(y, leaves, torch.ones_like(y)) if grad else y

    return run


def _spectrum(weight: Tensor, gram: Tensor | None) -> Tensor:
    """Squared singular values of the weight, or of its outputs on what the gram sums up; largest first."""
    w = weight.double()
    product = w @ w.mT if gram is None else w @ gram @ w.mT
    return torch.linalg.eigvalsh((product + product.mT) / 2).clamp_min(0).flip(0)


def _beside(matrix: StructuredMatrix, spectrum: Tensor | None) -> str:
    """What the best low-rank matrix of as many parameters is off by, beside another structure."""
    if spectrum is None or isinstance(matrix, LowRank):
        return ""
    rank = matrix.parameters // (matrix.rows + matrix.columns)
    total = float(spectrum.sum())
    error = math.sqrt(float(spectrum[rank:].sum()) / total) if total else 0.0
    return f", low-rank({rank}) of as many parameters by {error:.2g}"
