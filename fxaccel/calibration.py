"""What a pass that is not exact changes, measured on the user's data with the model's own weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxaccel import evaluate
from fxaccel.capture import Call
from fxaccel.errors import OptionError
from fxaccel.ir import Program
from fxaccel.tree import random_kept


@dataclass(frozen=True)
class Calibration:
    """Calls of a model to run programs on, and the model whose tensors they read.

    given     whether the user gave them; otherwise they are the call that was captured
    """

    original: nn.Module
    calls: Sequence[Call]
    given: bool

    def change(self, before: Program, after: Program) -> float:
        """Largest relative difference of an output over all calls: |new - old| / |old|, Euclidean norms."""
        worst = 0.0
        for i, call in enumerate(self.calls):
            olds, news = (self.run(p, call, i) for p in (before, after))
            for old, new in zip(olds, news, strict=True):
                if isinstance(old, Tensor) and isinstance(new, Tensor) and old.is_floating_point():
                    worst = max(worst, _relative(old.double(), new.double()))
        return worst

    def run(self, program: Program, call: Call, number: int = 0) -> list[Any]:
        """The outputs of a program, always with the same random numbers."""
        hint = "give calls of the structure, dtypes and sizes that the model is captured for"
        if call.spec != program.in_spec:
            raise OptionError(f"calibration call {number} has another structure than the captured one", hint)
        try:
            with torch.no_grad(), random_kept():
                torch.manual_seed(0)
                leaves = [x.clone() if isinstance(x, Tensor) else x for x in call.leaves]
                return evaluate.run(program, self.state(program), leaves)
        except (RuntimeError, IndexError) as error:
            why = str(error).splitlines()[0]
            raise OptionError(
                f"calibration call {number} does not run through the captured graph: {why}", hint
            ) from error

    def state(self, program: Program) -> dict[str, Tensor]:
        """The tensors that a program reads, by placeholder; what it writes to is its own."""
        values: dict[str, Tensor] = dict(self.original.named_parameters(remove_duplicate=False))
        values |= {n: b.clone() for n, b in self.original.named_buffers(remove_duplicate=False)}
        for one in program.replacements:
            values.update(zip(one.new, one.forward(*(values[n] for n in one.old)), strict=True))
        return {
            name: program.constants[slot.name] if slot.kind == "constant" else values[slot.name]
            for name, slot in program.state.items()
        }


def _relative(old: Tensor, new: Tensor) -> float:
    """|new - old| / |old| where either is finite; infinite where only one of them is."""
    same = (old == new) | (old.isnan() & new.isnan())
    away = float((new - old).masked_fill(same, 0.0).norm())
    size = float(old.masked_fill(~old.isfinite(), 0.0).norm())
    if math.isnan(away):
        return math.inf
    return away / size if size else float(away > 0)
