"""Models that are no single graph: Dynamo cuts them at the breaks, and each piece is a capture of its own.

Used where export fails, for a branch on a value, say. The Python between the pieces runs as it was written.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxaccel.check import compare_runs
from fxaccel.errors import CaptureError
from fxaccel.evaluate import Calm
from fxaccel.report import CaptureReport, PassReport, Report
from fxaccel.structure import objects
from fxaccel.tree import clone_tree, without_root_hooks

if TYPE_CHECKING:
    from fxaccel.about import Graphs
    from fxaccel.capture import Call
    from fxaccel.session import Settings


# Dynamo counts compilations by code object, over all models of a process, and runs eagerly beyond a limit.
_ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Dynamo says of graph breaks, which are in the report; the model's own words are heard."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\._dynamo")
        if level in (logging.NOTSET, logging.WARNING):  # else someone has asked for more, or for less
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@dataclass
class _Piece:
    """One graph of several: captured at its first call, or run as Dynamo made it where that fails."""

    graph: fx.GraphModule
    fast: Any
    left: str = ""

    @property
    def redrawn(self) -> bool:
        """Whether a pass made it draw other random numbers."""
        return any(c.program.redrawn for c in self.fast.__dict__["_fxaccel"].all)

    def __call__(self, *args: Any) -> Any:
        if not self.left:
            try:
                return self.fast(*args)
            except CaptureError as error:  # raised before anything is run
                self.left = error.message
        return self.graph(*args)


@dataclass
class Pieces:
    """A capture in several graphs; it stands where a Capture does, and is called with the arguments."""

    settings: Settings
    why: CaptureError
    mode: str
    pieces: list[_Piece] = field(default_factory=list)
    check: str = ""

    def bind(self, module: Any, index: int = 0, backend: str = "python") -> None:
        """Compile the tree of `module` piece by piece; a piece is captured when it is first run."""
        self.pieces = []
        compiled = self.compiled(without_root_hooks(module._bare()), self.pieces)

        def first(*args: Any, **kwargs: Any) -> Any:
            self.run = compiled
            with _quiet():
                return compiled(*args, **kwargs)

        self.run = first

    def compiled(self, tree: nn.Module, pieces: list[_Piece]) -> Callable[..., Any]:
        from fxaccel.module import wrap

        settings = replace(self.settings, requested=(), expect=(), strict=False)

        def backend(graph: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
            pieces.append(_Piece(graph, wrap(clone_tree(graph), settings)))
            return pieces[-1]

        compiled = torch.compile(tree, backend=backend, dynamic=False, **_ISOLATED)

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._dynamo.config.patch(use_numpy_random_stream=True):  # else torch draws for numpy
                return compiled(*args, **kwargs)

        return run

    def accepts(self, *tensors: Tensor) -> bool:
        """Dynamo has its own guards."""
        return True

    def fits(self) -> bool:
        """See `accepts`."""
        return True

    def checked(self, original: nn.Module, module: Any, example: Call) -> None:
        """Compare with the model; raises the CaptureError of the single graph where it fails.

        Where a pass made a piece draw other random numbers, both are compared with nothing dropped.
        """
        made: list[_Piece] = []
        still = False

        def emitted(tree: nn.Module, leaves: tuple[Tensor, ...]) -> Any:
            args, kwargs = example.unflatten(leaves)
            given = objects((args, kwargs))
            with Calm() if still else contextlib.nullcontext():
                return self.compiled(tree, made)(*args, **kwargs), given

        with _quiet():
            verdict = compare_runs(emitted, original, module._bare(), example, None)
            if not verdict.ok and any(p.redrawn for p in made):
                still = True
                verdict = replace(
                    compare_runs(emitted, original, module._bare(), example, None, True), still=True
                )
        if not verdict.ok:
            raise CaptureError(f"{self.why.message}; in pieces, {verdict.why}", self.why.hint) from self.why
        self.check = str(verdict)

    @property
    def report(self) -> CaptureReport:
        """The reports of all pieces as one."""
        reports = [c for p in self.pieces for c in p.fast.report().captures]
        merged = Report(reports)
        passes: list[PassReport] = [merged[name] for name in merged]
        notes = [f"captured in {len(self.pieces)} pieces, sizes fixed: {self.why.message}"]
        notes += dict.fromkeys(f"a piece is left as it was: {p.left}" for p in self.pieces if p.left)
        notes += dict.fromkeys(n for r in reports for n in r.notes)
        return CaptureReport(self.mode, passes, notes, self.check)

    def graphs(self) -> list[Graphs]:
        """Those of all pieces."""
        found = [p.fast.__dict__["_fxaccel"].graphs() for p in self.pieces]
        return [one for piece in found for graphs in piece for one in graphs]

    @property
    def source(self) -> str:
        """The generated code of all pieces."""
        return "\n\n".join(p.fast.code for p in self.pieces)
