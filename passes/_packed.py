"""Weights that are laid out once for the CPU's kernels: which can be, and how many are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from fxaccel.derived import derived, standing
from fxaccel.ir import Program, arguments, incremental, is_call, target_name
from fxaccel.passes._advice import STANDING
from fxaccel.rule import Match, Refusal, Refusals

KERNELS = ("fxaccel.packed_linear", "fxaccel.packed_convolution")  # which read `w` in a layout of their own


@incremental(lambda program, found, made: None)  # these passes leave weights what they are
def ready(program: Program) -> set[fx.Node]:
    """Parameters and buffers that no call writes to, and what is computed from them ahead (an analysis)."""
    ahead = set(derived(program)[0])
    return {n for n in program.facts(standing) if n.op == "placeholder" or n in ahead}


def _mebibytes(w: torch.Tensor) -> float:
    return w.numel() * w.element_size() / 2**20


def _more(program: Program, found: dict[fx.Node, float], made: Sequence[fx.Node]) -> None:
    weights = [arguments(n)["w"] for n in made if is_call(n) and target_name(n.target) in KERNELS]
    found |= {w: _mebibytes(w.meta["val"]) for w in weights}


@incremental(_more)
def packed(program: Program) -> dict[fx.Node, float]:
    """MiB of each weight that a kernel reads in its own layout (an analysis)."""
    found: dict[fx.Node, float] = {}
    _more(program, found, list(program.graph.nodes))
    return found


def changes(m: Match) -> Refusals:
    """Why the weight `w` of a match is not one to lay out once."""
    if m.w not in m.facts(ready):
        yield Refusal(
            f"%{m.w.name} is no parameter or buffer that stays as it is, and none that a pass made", STANDING
        )


def crowds(m: Match, most: float) -> Refusals:
    """Why the weight `w` of a match would be one too many, where at most so many MiB are kept twice."""
    known, size = m.facts(packed), _mebibytes(m.val("w"))
    total = sum(known.values())
    if m.w not in known and total + size > most:
        yield Refusal(
            f"the weight has {size:.3g} MiB and those kept twice {total:.3g}; mebibytes={most:g} is the most",
            f"mebibytes={math.ceil(total + size)} or more",
        )
