"""What a report knows beside the sites: the model's modules, and each captured graph before and after.

It holds no tensor of the model, so a report that is kept keeps no weights alive.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fxaccel.diff import Diff
from fxaccel.ir import Program
from fxaccel.proof import Manifest
from fxaccel.rule import Pass


@dataclass(frozen=True)
class Graphs:
    """One captured graph: as exported, before the passes, and after them.

    passes    those of the capture, with their options; none of a model that was loaded
    """

    raw: Program
    canonical: Program
    program: Program
    manifest: Manifest
    passes: Sequence[Pass]

    def diff(self, raw: bool) -> Diff:
        """What the passes changed; raw: against the graph as exported."""
        return Diff(self.raw if raw else self.canonical, self.program)


@dataclass(frozen=True)
class About:
    """A model as its report shows it.

    model      name of its class
    modules    path and class of every module, the root first
    files      name of a source file -> where it is, of those that define the modules' classes
    graphs     of each capture its graphs: one, or one of each piece
    """

    model: str
    modules: tuple[tuple[str, str], ...]
    files: Mapping[str, str]
    graphs: Sequence[Sequence[Graphs]]

    @classmethod
    def of(cls, module: nn.Module, graphs: Sequence[Sequence[Graphs]]) -> About:
        """Of an accelerated module."""
        root = getattr(module, "_original_class", type(module))
        kinds = {path: type(m) for path, m in module.named_modules()} | {"": root}
        return cls(
            root.__name__, tuple((p, k.__name__) for p, k in kinds.items()), _files(kinds.values()), graphs
        )

    def line(self, source: str) -> str:
        """The text of "file.py:12", "" where the file is not known."""
        name, _, number = source.rpartition(":")
        if name not in self.files or not number.isdecimal():
            return ""
        return linecache.getline(self.files[name], int(number)).strip()


def _files(kinds: Iterable[type]) -> dict[str, str]:
    """Files by name, those left out that share theirs with another."""
    classes = dict.fromkeys(k for kind in kinds for k in kind.__mro__ if issubclass(k, nn.Module))
    modules = dict.fromkeys(k.__module__ for k in classes if not k.__module__.startswith("torch."))
    found = [f for m in modules if (f := getattr(sys.modules.get(m), "__file__", None))]
    names = [Path(f).name for f in found]
    return {n: f for n, f in zip(names, found, strict=True) if names.count(n) == 1}
