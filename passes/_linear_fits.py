"""Forms of weights in the place of a graph's dense ones: the way there and back, times, errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxaccel.calibration import Calibration, Moments
from fxaccel.errors import OptionError
from fxaccel.ir import Program, Replacement, arguments, call, is_call
from fxaccel.kernels import kernel
from fxaccel.kernels._clock import least
from fxaccel.passes._advice import EVEN_IF_SLOWER
from fxaccel.passes._linear_form import EAGER, LinearForm, Parts
from fxaccel.passes._linear_sites import EMBEDDING, LinearSite
from fxaccel.passes._target import Target
from fxaccel.passes.structured import LowRank, StructuredMatrix
from fxaccel.planner import Alternative, Choice, Place
from fxaccel.progress import tracked
from fxaccel.quality import Budget, Measured
from fxaccel.rule import Ops, Refusal

DAMPING = 0.1  # of the mean square of an input, that is taken to be in every direction: calls are a sample


@dataclass(frozen=True)
class Way:
    """The map from a parameter to the parts of `form`, and what its readers become.

    flipped    whether the parameter is the transpose of the form's matrix
    """

    form: LinearForm
    flipped: bool

    def __call__(self, weight: Tensor) -> Parts:
        return self.form.plain(weight.mT if self.flipped else weight)

    def inverse(self, *parts: Tensor) -> tuple[Tensor]:
        """The parameter that the parts stand for."""
        dense = self.form.dense(EAGER, *parts)
        return (dense.mT.contiguous() if self.flipped else dense,)

    def reads(self, reader: fx.Node) -> list[fx.Node]:
        """What a reader reads besides the weight."""
        bound = arguments(reader)
        names = ("indices",) if is_call(reader, EMBEDDING) else ("input", "bias")
        return [bound[n] for n in names if isinstance(bound[n], fx.Node)]

    def written(
        self, op: Ops, reader: fx.Node, ready: Sequence[fx.Node], of: Callable[[Any], Any] = lambda x: x
    ) -> Any:
        """The reader with the parts, made ready, in place of the weight."""
        bound = arguments(reader)
        if is_call(reader, EMBEDDING):
            return self.form.lookup(op, of(bound["indices"]), tuple(ready))
        return self.form.linear(op, of(bound["input"]), tuple(ready), of(bound["bias"]))

    def by_definition(
        self, op: Ops, reader: fx.Node, parts: Sequence[fx.Node], of: Callable[[Any], Any]
    ) -> Any:
        """The reader with the dense weight that the parts stand for."""
        bound, held = arguments(reader), of(tuple(parts))
        if is_call(reader, EMBEDDING):
            return op.aten.embedding.default(self.form.dense(op, *held), of(bound["indices"]))
        return self.form.definition(op, of(bound["input"]), held, of(bound["bias"]))


@dataclass(frozen=True)
class Candidate:
    """A form that could take a site's place, what that costs a call, and the figures for people."""

    form: LinearForm
    cost: float
    figures: str


@dataclass(frozen=True)
class Fitted:
    """A form with its parts, and the report's words for it."""

    way: Way
    parts: Parts
    told: str


class Fits:
    """Measures and fits the forms that could take the places of a program's weights.

    options    the pass: `by_outputs`, `even_if_slower` and what its forms ask for in `fitted` are read
    ranges     scales of the inputs of sites, where the pass has calibrated them
    """

    def __init__(self, options: Any, program: Program, calibration: Calibration) -> None:
        self.options, self.program, self.calibration = options, program, calibration
        self.tensors = calibration.state(program)
        self.times: dict[Any, list[float]] = {}
        self.sites: dict[str, LinearSite] = {}
        self.ranges: dict[str, float] = {}

    def weight(self, site: LinearSite) -> Tensor:
        """The weight of a site, [outputs, inputs]; of convolutions as the model has it."""
        weight = self.tensors[site.node.name].detach()
        return weight.mT if site.flipped else weight

    # -- time -------------------------------------------------------------------------------------

    def paying(
        self, site: LinearSite, forms: Sequence[LinearForm], pays: float
    ) -> tuple[list[Candidate], str]:
        """The forms that are at least `pays` times as fast as the dense weight; where there are none, why."""
        if len(site.linears) < len(site.readers):
            forms = [f for f in forms if f.tables]
            if not forms:
                return [], "none of the forms that were asked for can be looked up"
        size, rows = f"{site.shape[0]} x {site.shape[1]}", site.rows(self.program)
        if not forms:
            return [], f"a weight of {size} has no such form of fewer parameters"
        if self.options.even_if_slower:
            worked = [(f, *f.work()) for f in forms]
            return [Candidate(f, share * math.prod(site.shape), words) for f, share, words in worked], ""
        dense, *times = self.timed(site, forms)
        told = [
            Candidate(f, ms, f"{dense / ms:.2f} times as fast ({ms:.3g} ms for {dense:.3g})")
            for f, ms in zip(forms, times, strict=True)
        ]
        best = sorted(told, key=lambda c: c.cost)[:3]
        why = f"nothing pays at {size} and {rows} rows, expected {pays} times as fast: " + ", ".join(
            f"{c.form} is {c.figures}" for c in best
        )
        good = [c for c in told if dense >= pays * c.cost]
        return good, "" if good else Refusal(why, EVEN_IF_SLOWER)

    def timed(self, site: LinearSite, forms: Sequence[LinearForm]) -> list[float]:
        """Milliseconds that a site takes for all of its rows, as it is and in each form."""
        given, weight = site.given(self.program), self.weight(site)
        bias = any(arguments(r).get("bias") is not None for r in site.readers)
        table = not site.linears
        key = (tuple(forms), site.shape, given, weight.dtype, weight.device, bias, table)
        if key not in self.times:
            generator = torch.Generator().manual_seed(0)
            runs = [_run(f, site, given, weight, bias, self.program.grad, generator) for f in (None, *forms)]
            self.times[key] = least(runs, weight.device)
        return self.times[key]

    def dense_cost(self, site: LinearSite, forms: Sequence[LinearForm]) -> float:
        """What the site costs as it is, in what `paying` counts."""
        if self.options.even_if_slower:
            return float(math.prod(site.shape))
        return self.timed(site, forms)[0]

    # -- fits -------------------------------------------------------------------------------------

    def places(self, open_to: Mapping[LinearSite, Sequence[Candidate]]) -> list[Place]:
        """Every site with its candidates fitted."""
        self.sites = {site.name: site for site in open_to}
        linears = [s for s in open_to if s.linears and self.options.by_outputs]
        waiting = {s: list(s.inputs) for s in linears}
        sums, made = dict[LinearSite, Moments](), dict[LinearSite, Place]()
        values = list(dict.fromkeys(x for s in linears for x in s.inputs))
        moments = self.calibration.moments(self.program, values)
        for value, seen in tracked(moments, "fitting weights", len(values)):
            for site in [s for s in linears if value in waiting[s]]:
                sums[site] = sums[site] + seen if site in sums else seen
                waiting[site] = [x for x in waiting[site] if x is not value]
                if not waiting[site]:
                    made[site] = self.place(site, open_to[site], sums.pop(site))
        for site in tracked([s for s in open_to if s not in made], "fitting weights"):
            made[site] = self.place(site, open_to[site], None)
        return [made[s] for s in open_to]

    def place(self, site: LinearSite, candidates: Sequence[Candidate], seen: Moments | None) -> Place:
        """One site with its candidates fitted."""
        weight = self.weight(site)
        if not bool(weight.isfinite().all()):
            raise OptionError(f"{site.name} holds values that are not finite, expected finite ones")
        gram = None
        if seen is not None:
            gram = seen.gram.to(weight.device, copy=True)
            gram.diagonal().add_(DAMPING * gram.diagonal().mean())
        target, beside = Target.of(weight, gram), any(map(_has_rivals, (c.form for c in candidates)))
        spectrum = _spectrum(weight, gram) if beside else None
        alternatives = []
        for one in candidates:
            form = one.form
            parts = form.fitted(weight, target, self.options)
            error = math.hypot(form.error(weight, parts, gram), _noise(form, weight, seen))
            told = f"{form}: {one.figures}, off by {error:.2g}" + _beside(form, spectrum)
            fitted = Fitted(Way(form, site.flipped), parts, told)
            alternatives.append(Alternative(str(form), one.cost, form.nbytes(weight.dtype), error, fitted))
        cost = self.dense_cost(site, [c.form for c in candidates])
        return Place(site.name, cost, weight.numel() * weight.element_size(), tuple(alternatives))

    def tried(self, budget: Budget, choice: Choice, numbers: Sequence[int]) -> Measured:
        """The budget's metric with the chosen forms in place of the weights."""
        after = self.program.copy()
        nodes = {n.name: n for n in after.graph.nodes}
        for name, one in choice.items():
            site, fitted = self.sites[name].among(nodes), one.made
            for reader, new in put(after, site, fitted.way, fitted.parts, "trial", _writer(after))[1]:
                reader.replace_all_uses_with(new)
        return self.calibration.quality(budget, self.program, after, numbers)


def put(
    program: Program, site: LinearSite, way: Way, parts: Parts | None, by: str,
    ops: Callable[[fx.Node], Ops],
) -> tuple[list[fx.Node], list[tuple[fx.Node, fx.Node]]]:  # fmt: skip
    """Write a form beside a site's weight: placeholders of its parts, and of each reader what it becomes.

    ops    what writes calls with the provenance of a node
    """
    form, val = way.form, site.node.meta["val"]
    names = tuple(f"{site.name}_{part}" for part in form.parts)
    one = Replacement(by, (site.name,), names, way, way.inverse, parts, form.frozen, site.aliases)
    with val.fake_mode:
        sizes = zip(form.shapes, form.dtypes(val.dtype), strict=True)
        fakes = [torch.empty(shape, dtype=dtype, device=val.device) for shape, dtype in sizes]
    held = program.replace_parameters(one, fakes)
    first = min(site.readers)
    with program.graph.inserting_before(first):
        ready = form.ready(ops(first), held)
    made = []
    for reader in site.readers:
        with program.graph.inserting_before(reader):
            made.append((reader, way.written(ops(reader), reader, ready)))
    return held, made


def _writer(program: Program) -> Callable[[fx.Node], Ops]:
    return lambda like: Ops(
        lambda target, args, kwargs: call(program.graph, like, target, args, kwargs, by="trial")
    )


def _run(
    form: LinearForm | None, site: LinearSite, given: tuple[int, ...], weight: Tensor, bias: bool, grad: bool,
    generator: torch.Generator,
) -> Callable[[], Any]:  # fmt: skip
    """A call of a site's reader with a weight in a form, or the dense one; with its gradients."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight)

    dense = drawn(*weight.shape)
    parts = (dense,) if form is None else form.plain(dense)
    floating = [p for p in parts if p.dtype == weight.dtype and not (form and form.frozen)]
    for part in floating:
        part.requires_grad_(grad)
    b = drawn(site.shape[0]).requires_grad_(grad) if bias else None
    op = Ops(_Emitted()) if form is not None and not grad and weight.device.type == "cpu" else EAGER
    held = parts if form is None else form.ready(EAGER, parts)
    if not site.linears:
        x = torch.randint(site.shape[0], given, generator=generator).to(weight.device)
        leaves = floating
    else:
        x = drawn(*given).requires_grad_(grad)
        leaves = [x, *floating, *([] if b is None else [b])]

    def forward() -> Tensor:
        if form is None:
            return site.called(x, dense, b)
        return form.linear(op, x, held, b) if site.linears else form.lookup(op, x, held)

    def run() -> Any:
        with torch.set_grad_enabled(grad):
            y = forward()
            return torch.autograd.grad(y, leaves, torch.ones_like(y)) if grad and leaves else y

    return run


class _Emitted:
    """Calls kernels as emitted code does on the CPU: `direct`, with what is laid out ahead made once."""

    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}

    def __call__(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(target, "namespace", "") != "fxaccel":
            return target(*args, **kwargs)
        module = kernel(target._opname)
        call, shared = getattr(module, "direct", target), getattr(module, "shared", None)
        names = [a.name for a in target._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        if shared is None or not shared.ahead or not shared.worth(given):
            return call(*args, **kwargs)
        read = [given[n] for n in shared.read]
        key = (target, *map(id, read))
        if key not in self.kept:
            self.kept[key] = shared.made(*read)
        return call(*args, **kwargs, shared=self.kept[key])


def _has_rivals(form: LinearForm) -> bool:
    """Whether a low-rank matrix of as many parameters is to be told of beside it."""
    return isinstance(form, StructuredMatrix) and not isinstance(form, LowRank)


def _noise(form: LinearForm, weight: Tensor, seen: Moments | None) -> float:
    """What becomes of the outputs, of their size, where the form rounds its inputs."""
    noise = 0.0 if seen is None else form.rounding(seen)
    if seen is None or not noise:
        return 0.0
    w = weight.double()
    size = float(((w @ seen.gram.to(w)) * w).sum())
    return math.sqrt(noise * float(w.square().sum()) / size) if size > 0 else 0.0


def _spectrum(weight: Tensor, gram: Tensor | None) -> Tensor:
    """Squared singular values of the weight, or of its outputs on what the gram sums up; largest first."""
    w = weight.double()
    product = w @ w.mT if gram is None else w @ gram @ w.mT
    return torch.linalg.eigvalsh((product + product.mT) / 2).clamp_min(0).flip(0)


def _beside(form: LinearForm, spectrum: Tensor | None) -> str:
    """What the best low-rank matrix of as many parameters is off by, beside another structure."""
    if spectrum is None or not _has_rivals(form):
        return ""
    rank = form.parameters // (form.rows + form.columns)
    total = float(spectrum.sum())
    error = math.sqrt(float(spectrum[rank:].sum()) / total) if total else 0.0
    return f", low-rank({rank}) of as many parameters by {error:.2g}"
