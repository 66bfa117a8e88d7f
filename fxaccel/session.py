"""The captures of one accelerated module: finding the one that fits a call, making it, checking it."""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._compile import _disable_dynamo

from fxaccel import derived, manager, weights
from fxaccel.about import About, Graphs
from fxaccel.calibration import Calibration
from fxaccel.canonical import canonicalize
from fxaccel.capture import Call, ambient_autocast, capture
from fxaccel.check import Verdict, compare
from fxaccel.curve import Curve, curve
from fxaccel.discover import resolve
from fxaccel.emit import Code, emit
from fxaccel.errors import CaptureError, OptionError, ProofError
from fxaccel.evaluate import calm
from fxaccel.ir import Program, Replacement
from fxaccel.pieces import Pieces
from fxaccel.proof import Manifest, Proof, materialise
from fxaccel.provenance import locate
from fxaccel.report import CaptureReport, PassReport, Report
from fxaccel.rule import Pass
from fxaccel.stopwatch import Stopwatch
from fxaccel.structure import Structure, children, deliver
from fxaccel.tree import leavings_dropped, random_kept

_capturing = threading.RLock()  # torch traces one model at a time; what is captured is called without it


def _free() -> None:
    """In a forked child: no thread that could give the lock back lives there."""
    global _capturing
    _capturing = threading.RLock()


os.register_at_fork(after_in_child=_free)


@dataclass(frozen=True)
class Settings:
    """The options of `accelerate`, with the passes in the order they run."""

    passes: tuple[Pass, ...]
    requested: tuple[str, ...]
    allow: str
    strict: bool
    expect: tuple[tuple[str, int], ...]
    check: bool
    backend: str
    max_captures: int
    calibration: tuple[Call, ...] = ()
    measure: bool = False
    only: frozenset[str] | None = None

    @classmethod
    def make(
        cls, passes: Iterable[Any] | None, *, expect: Mapping[str, int] | None, measure: bool | None = None,
        **options: Any,
    ) -> Settings:  # fmt: skip
        found = manager.order(resolve(passes))
        last = next((p for p in found if p.step == "schedule"), None)
        if last is not None and options.get("backend") == "inductor":
            raise OptionError(
                f"pass {last.name!r} says when values are computed again, and so does backend='inductor'",
                "leave one of them out",
            )
        names = [p.name for p in found]
        for name in expect or {}:
            if name not in names:
                raise OptionError(f"expect names the pass {name!r}, which is not among {names}")
        requested = () if passes is None else tuple(names)
        if measure is None:  # which runs what the model as written does, as the check does
            measure = passes is None and bool(options["check"])
        return cls(tuple(found), requested, expect=tuple((expect or {}).items()), measure=measure, **options)


@dataclass
class Capture:
    """One captured, rewritten and emitted graph.

    raw, canonical, program   the graph as exported, before the passes, and after them
    loose                     passes at work in it that are not exact
    """

    raw: Program
    canonical: Program
    program: Program
    manifest: Manifest
    report: CaptureReport
    code: Code
    accepts: Any = None
    fits: Any = None
    forward: Any = None
    result: Any = None
    backend: str = "python"
    loose: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The generated code."""
        return self.code.source

    def reported(self) -> CaptureReport:
        """The report, with what was chosen for each size that has been called since."""
        chosen = self.code.notes()
        return replace(self.report, notes=[*self.report.notes, *chosen]) if chosen else self.report

    def reads(self, names: set[str]) -> bool:
        """Whether the graph reads parameters of these names."""
        return any(slot.name in names for slot in self.program.state.values())

    def serves(self, module: nn.Module) -> bool:
        """Whether the constants of the graph are those that this tree holds."""
        return all(table[key] is value for table, key, value in self.held(module))

    def bind(self, module: nn.Module, index: int, backend: str) -> None:
        """Make the functions over the tables of `module`."""
        self.backend = backend
        names = self.functions(module, f"<fxaccel {type(module).__name__} {index}>")
        self.accepts, self.fits, self.forward = names["accepts"], names["fits"], names["forward"]
        held, fits = list(self.held(module)), names["fits"]
        if held:
            self.fits = lambda: fits() and all(table.get(key) is value for table, key, value in held)
        self.result = _unflattener(self.program.out_spec)

    def held(self, module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """The constants of the graph that are attributes of the module's tree: where each is, and what."""
        for slot in self.program.state.values():
            path, _, key = slot.name.rpartition(".")
            owner = dict(module.named_modules()).get(path) if slot.kind == "constant" else None
            if owner is not None and isinstance(owner.__dict__.get(key), Tensor):
                yield owner.__dict__, key, self.program.constants[slot.name]

    def functions(self, module: nn.Module, filename: str, still: bool = False) -> dict[str, Any]:
        """`accepts`, `fits` and `forward` over the tables of any tree like the model's; they drop nothing
        if `still`."""
        code = emit(calm(self.program)) if still else self.code
        names = code.bind(module, filename)
        if self.backend == "inductor":
            heavy = "compute" if "compute" in names else "forward"
            names[heavy] = torch.compile(names[heavy], dynamic=True)
        return names


@dataclass(frozen=True)
class Verification:
    """What `fast.verify()` found: proofs run again, models compared, losses over some steps."""

    proofs: list[Proof]
    checks: list[Verdict]
    curves: list[Curve] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        found: list[Proof | Verdict | Curve] = [*self.proofs, *self.checks, *self.curves]
        return all(one.ok for one in found)

    def __str__(self) -> str:
        rows = [
            f"{p.rule:<24}{p.key}  {'proved' if p.ok else 'FAILED'}  {p.why or ''}"
            f"{'' if p.why else f'at {p.error:.2f} of the tolerance, gradients {p.grad_error:.2f}'}"
            for p in self.proofs
        ]
        rows += map(str, (*self.checks, *self.curves))
        return "\n".join(rows) or "no rewrite rests on a proof"


@dataclass
class Session:
    """What an accelerated module keeps besides its parameters: settings and captures."""

    settings: Settings
    captures: dict[Any, list[Capture | Pieces]] = field(default_factory=dict)
    replacements: list[Replacement] = field(default_factory=list)
    dropped: int = 0
    loaded: bool = False
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    taken: Any = None  # fxaccel.stage_module.Taken: the stages of a model that is cut
    _modules: list[nn.Module] = field(default_factory=list)
    _edges: list[tuple[dict[str, Any], str, nn.Module]] = field(default_factory=list)

    # -- calls ------------------------------------------------------------------------------------

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's result, from the capture that fits; captures where none does."""
        example = Call(args, kwargs) if kwargs else None
        for a in args:
            if type(a) is not Tensor and not isinstance(a, Tensor):
                example = Call(args, kwargs)
                break
        tensors = args if example is None else example.tensors
        key = self.key(module, args, example)
        for one in self.captures.get(key, ()):
            if one.accepts(*tensors) and one.fits():
                break
        else:
            if torch.compiler.is_dynamo_compiling():
                _refuse_export()
            one = self.captured(module, args, kwargs, key, tensors)
        if isinstance(one, Pieces):
            return one.run(*args, **kwargs)
        try:
            leaves = one.forward(*tensors)
        except Exception as error:
            locate(error)
            raise
        if example is None or not example.objects:
            return one.result(leaves)
        return deliver(leaves, one.program.out_spec, example.objects)

    def key(self, module: nn.Module, args: Any, example: Call | None) -> Any:
        """What selects the captures of a call."""
        if example is None:
            structure: Any = len(args)
        else:
            structure = (example.spec, tuple((type(v), v) for v in example.baked.values()))
        for table, name, child in self._edges:
            if table[name] is not child:
                self.forget()
                break
        if not self._modules:
            self.index(module)
        cast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        return (
            structure,
            tuple([m.training for m in self._modules]),
            torch.is_grad_enabled(),
            tuple(ambient_autocast()) if cast else None,
        )

    def index(self, module: nn.Module) -> None:
        """List the tree's modules, and its edges to notice when one is exchanged."""
        self._modules = list(module.modules())
        self._edges = [
            (m._modules, name, child)
            for m in self._modules
            for name, child in m._modules.items()
            if child is not None
        ]

    def forget(self) -> None:
        """Drop all captures: the tree, or the dtype or device of its tensors, has changed."""
        self.captures.clear()
        self.taken = None
        self._modules, self._edges = [], []

    # -- capture ----------------------------------------------------------------------------------

    @_disable_dynamo
    def captured(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any,
        tensors: Sequence[Tensor],
    ) -> Capture | Pieces:  # fmt: skip
        """The capture that another thread has made of such a call meanwhile, or a new one."""
        with _capturing:
            for one in self.captures.get(key, ()):
                if one.accepts(*tensors) and one.fits():
                    return one
            _refuse_export()  # here no other thread's capture is what exports
            return self.capture(module, args, kwargs)

    @_disable_dynamo
    def capture(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture | Pieces:
        """Capture this call, run the passes, check the result, and keep it."""
        with _capturing, leavings_dropped():
            return self._capture(module, args, kwargs)

    def _capture(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture | Pieces:
        original = self.restored(module)
        with random_kept():
            try:
                raw = capture(original, args, kwargs)
                one: Capture | Pieces = self.whole(raw, original, module, Call(args, kwargs))
            except CaptureError as error:
                one = self.piecewise(error, original, module, Call(args, kwargs))
        self.enforce(one.report)
        self.outdate()
        plain = not kwargs and all(isinstance(a, Tensor) for a in args)
        self.keep(self.key(module, args, None if plain else Call(args, kwargs)), one)
        return one

    def whole(self, raw: Program, original: nn.Module, module: Any, example: Call) -> Capture:
        passes = self.settings.passes
        exact = [p for p in passes if manager.is_exact(p)]
        if len(exact) == len(passes):
            return self.checked(raw, exact, original, module, example)
        # What passes that are not exact change is measured; the check is of what the others do.
        first = self.checked(raw, exact, original, module, example, self.restored(module))
        if first.program is raw:
            return first
        calls, current = self.settings.calibration, dict(module.named_parameters(remove_duplicate=False))
        calibration = Calibration(original, calls or (example,), bool(calls), current)
        one = self.rewrite(raw, passes, calibration)
        weights.adopt(module, one.program, self.replacements)
        self.bind(one, module)
        one.loose = tuple(p.name for p in one.report.passes if p.change is not None)
        check = first.report.check
        one.report.check = ", ".join([check, *(f"before {name}" for name in one.loose)]) if check else ""
        return one

    def checked(
        self, raw: Program, passes: Sequence[Pass], original: nn.Module, module: Any, example: Call,
        scratch: nn.Module | None = None,
    ) -> Capture:  # fmt: skip
        """The capture after exact passes, compared with the model: over `module`, or a tree made for that."""
        one = self.rewrite(raw, passes)
        tree, kept = (module, self.replacements) if scratch is None else (scratch, [])
        before = weights.adopt(tree, one.program, kept)
        self.bind(one, tree)
        if self.settings.check:
            try:
                verdict = compare(one, original, module._bare() if scratch is None else scratch, example)
            except BaseException:  # Ctrl-C
                weights.give_back(tree, before, kept)
                raise
            if not verdict.ok:
                weights.give_back(tree, before, kept)
                return self.unrewritten(one, verdict, original, module, example)
            one.report.check = str(verdict)
        return one

    def bind(self, one: Capture, tree: nn.Module) -> None:
        one.bind(tree, self.dropped + len(self.all), self.settings.backend)

    def piecewise(self, why: CaptureError, original: nn.Module, module: Any, example: Call) -> Pieces:
        """The model in several graphs, where it cannot be one."""
        if isinstance(original, fx.GraphModule) or self.settings.strict:
            raise why
        one = Pieces(self.settings, why, manager.mode(module.training, torch.is_grad_enabled()))
        one.bind(module)
        one.checked(original, module, example)
        return one

    def rewrite(
        self, raw: Program, passes: Sequence[Pass], calibration: Calibration | None = None
    ) -> Capture:
        canonical = raw.copy()
        canonicalize(canonical)
        canonical.calibration, canonical.adopted = calibration, tuple(self.replacements)
        measure = self.settings.measure and not torch.are_deterministic_algorithms_enabled()
        run = manager.run(
            canonical, passes, allow=self.settings.allow, strict=self.settings.strict,
            stopwatch=self.stopwatch if measure else None, only=self.settings.only,
        )  # fmt: skip
        canonical.calibration = run.program.calibration = None  # it holds the user's calls
        run.program.drop_unused_state()
        run.report.notes += filter(None, [derived.note(run.program)])
        return Capture(raw, canonical, run.program, run.manifest, run.report, emit(run.program))

    def unrewritten(
        self, one: Capture, verdict: Verdict, original: nn.Module, module: Any, example: Call
    ) -> Capture:
        """The capture without its passes, if they are to blame that it does not agree with the model."""
        if self.settings.strict:
            raise ProofError(f"the rewritten model is not the original: {verdict}")
        plain = replace(one, program=one.raw, manifest=Manifest(), code=emit(one.raw))
        weights.adopt(module, one.raw, self.replacements)
        plain.bind(module, 0, "python")
        again = compare(plain, original, module._bare(), example)
        if not again.ok:
            raise CaptureError(
                f"the captured graph does not compute what the model computes: {again}",
                "this is a defect of the capture; please report it with the model",
            )
        passes = [PassReport(p.name, error=f"dropped with all others: {verdict}") for p in one.report.passes]
        plain.report = CaptureReport(one.report.mode, passes, one.report.notes, str(again))
        return plain

    def keep(self, key: Any, one: Capture | Pieces) -> None:
        self.captures.setdefault(key, []).insert(0, one)
        while sum(map(len, self.captures.values())) > self.settings.max_captures:
            oldest = next(iter(self.captures))
            self.captures[oldest].pop()
            if not self.captures[oldest]:
                del self.captures[oldest]
            self.dropped += 1

    def outdate(self) -> None:
        """Drop captures that read what a later one has replaced; their calls are captured anew."""
        gone = {name for one in self.replacements for name in (*one.old, *one.aliases)}
        for key, group in list(self.captures.items()):
            group[:] = [c for c in group if isinstance(c, Pieces) or not c.reads(gone)]
            if not group:
                del self.captures[key]

    def enforce(self, report: CaptureReport) -> None:
        """`expect`, and `strict` for passes that applied nowhere."""
        counts = {p.name: len(p.applied) for p in report.passes}
        for name, wanted in self.settings.expect:
            if counts[name] != wanted:
                raise ProofError(
                    f"pass {name!r} rewrote {counts[name]} sites, expected {wanted}", _reasons(report, name)
                )
        for p in report.passes:
            if p.name in self.settings.requested and not p.applied:
                why = f"pass {p.name!r} applied nowhere"
                if self.settings.strict:
                    raise ProofError(why, _reasons(report, p.name))
                warnings.warn(f"{why}; {_reasons(report, p.name)}", UserWarning, stacklevel=6)

    # -- parameters that passes replaced ----------------------------------------------------------

    def restored(self, module: Any) -> nn.Module:
        """A tree of the original class with the original parameters, to capture and compare with."""
        return weights.restored(module._bare(), self.replacements)

    def convert(self, module: Any) -> None:
        """What passes train for something cheaper becomes that; calls are captured anew."""
        weights.convert(module, self.replacements)
        self.forget()

    # -- questions --------------------------------------------------------------------------------

    @property
    def all(self) -> list[Capture | Pieces]:
        return [c for group in self.captures.values() for c in group]

    def report(self, module: nn.Module) -> Report:
        captures = [c.report if isinstance(c, Pieces) else c.reported() for c in self.all]
        if self.dropped and captures:
            note = (
                f"{self.dropped} captures were dropped for others (max_captures={self.settings.max_captures})"
            )
            captures[-1] = replace(captures[-1], notes=[*captures[-1].notes, note])
        return Report(captures, About.of(module, self.graphs()))

    def graphs(self) -> list[list[Graphs]]:
        """Of each capture its graph, or those of its pieces."""
        return [one.graphs() if isinstance(one, Pieces) else [self.graph(one)] for one in self.all]

    def graph(self, one: Capture) -> Graphs:
        """What there is to compare of a capture; one without its passes is compared with itself."""
        canonical = one.raw if one.program is one.raw else one.canonical
        return Graphs(one.raw, canonical, one.program, one.manifest, self.settings.passes)

    def code(self) -> str:
        return "\n\n".join(f"# captured for {c.report.mode}\n{c.source}" for c in self.all)

    def diff(self, index: int, raw: bool) -> Any:
        from fxaccel.diff import Diff

        if not self.captures:
            raise OptionError(
                "nothing is captured yet, so there is nothing to compare", "call the model once"
            )
        one = self.all[index]
        if isinstance(one, Pieces):
            raise OptionError("the model was captured in pieces, which have no one diff", "see fast.report()")
        return Diff(one.raw if raw else one.canonical, one.program)

    def verify(self, module: Any, steps: int = 0, model: nn.Module | None = None) -> Verification:
        """Every proof of every capture again; and, where the model's code is here, the model beside it."""
        proofs, checks, source = [], [], self.source(module, model)
        curves = self.curves(module, source, steps) if steps else []
        for one in self.all:
            if isinstance(one, Pieces):
                checks.append(Verdict(False, why="a model captured in pieces is checked at capture only"))
                continue
            with random_kept():
                proofs += one.manifest.again(one.program)
                if source is not None and not one.loose and one.program.grad == torch.is_grad_enabled():
                    source.train(one.program.training)
                    checks.append(compare(one, source, module._bare(), _like(one), self.loaded))
        return Verification(proofs, checks, curves)

    def source(self, module: Any, model: nn.Module | None) -> nn.Module | None:
        """The model as written with the weights that it has now; None where only its graphs are here."""
        if model is None:
            return None if self.loaded else self.restored(module)
        source = copy.deepcopy(model)
        try:
            source.load_state_dict(module.state_dict())
        except RuntimeError as error:
            raise OptionError(f"model is another one than was accelerated: {error}") from error
        return source

    def curves(self, module: Any, source: nn.Module | None, steps: int) -> list[Curve]:
        """The loss over some steps of every capture of training, beside the model's."""
        if steps < 0:
            raise OptionError(f"steps is {steps}, expected 0 or more")
        if source is None:
            raise OptionError(
                "steps trains the model as written, and a file holds its graphs alone",
                "hand the model to verify",
            )
        found = [c for c in self.all if isinstance(c, Capture) and c.program.grad and not c.loose]
        if not found:
            raise OptionError(
                "steps is for what is captured with gradients, by exact passes, in one graph; nothing is",
                "call the model in training first",
            )
        curves = []
        for one in found:
            source.train(one.program.training)
            curves.append(curve(one, source, module._bare(), _like(one), steps))
        return curves

    def rebound(self, module: nn.Module) -> Session:
        """The same captures over the tables of another module of equal structure."""
        other = Session(self.settings, replacements=list(self.replacements), dropped=self.dropped)
        for key, group in self.captures.items():
            other.captures[key] = [copy.copy(c) for c in group if isinstance(c, Pieces) or c.serves(module)]
            for i, one in enumerate(other.captures[key]):
                one.bind(module, i, self.settings.backend)
        return other


def _refuse_export() -> None:
    """Raise CaptureError while torch.export traces: it cannot trace how a call is captured."""
    if torch.compiler.is_exporting():
        raise CaptureError(
            "torch.export met a call that is not captured yet",
            "call the model once as torch.export is to call it, then export it",
        )


def _like(one: Capture) -> Call:
    """A call of the captured kind on random inputs."""
    generator, program = torch.Generator().manual_seed(0), one.program
    leaves = [
        program.baked[i]
        if name is None
        else materialise(program.placeholder(name).meta["val"], program.hints, generator)
        for i, name in enumerate(program.inputs)
    ]
    return Call(*program.in_spec.unflatten(leaves))


def _unflattener(spec: Structure) -> Any:
    """The result of a call from its flat leaves, the short way where it is one tensor."""
    if not spec.special and children(spec.spec)[0].is_leaf():
        return lambda leaves: leaves[0]  # which Dynamo follows
    return lambda leaves: spec.unflatten(leaves)[0]


def _reasons(report: CaptureReport, name: str) -> str:
    one = next(p for p in report.passes if p.name == name)
    said = [one.error] if one.error else [str(s) for s in (*one.refused, *one.near_misses)]
    return "; ".join(dict.fromkeys(said[:3])) or "no operator of its pattern is in the graph"
