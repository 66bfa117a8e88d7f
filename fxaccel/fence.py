"""What no pass may touch: what is set in torch for all, and what a program says of its captured call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fxaccel.errors import RuleError
from fxaccel.ir import Program, Replacement
from fxaccel.proof import holds
from fxaccel.schedule import Schedule
from fxaccel.stages import Stages
from fxaccel.tree import random_kept

# How each is read and set.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the default dtype of torch": (torch.get_default_dtype, torch.set_default_dtype),
    "whether gradients are recorded": (torch.is_grad_enabled, torch.set_grad_enabled),
    "whether torch is deterministic": (
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms,
    ),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
}  # fmt: skip
# Of the call that was captured. Guards may come to them, notes and replacements too; with these, ties go.
_CAPTURED = (
    "inputs", "sizes", "hints", "contiguous", "buffers", "training", "grad", "in_spec", "out_spec",
)  # fmt: skip
_VALUES = (Tensor, int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool, tuple, list, type(None))


@contextmanager
def around(name: str) -> Iterator[None]:
    """Inside runs a pass: what it sets for all is put back, and it has failed if that was anything."""
    before = {what: read() for what, (read, _) in _SETTINGS.items()}
    changed: list[str] = []
    try:
        with random_kept():
            yield
    finally:
        for what, (read, set_back) in _SETTINGS.items():
            if read() != before[what]:
                changed.append(what)
                set_back(before[what])
    if changed:
        raise RuleError(f"{name} changed {' and '.join(changed)}")


def captured(before: Program, after: Program, name: str) -> None:
    """Raise RuleError where a pass has changed what the program says of the call that it was captured for."""
    for what in _CAPTURED:
        old, new = getattr(before, what), getattr(after, what)
        if new is not old and (type(new) is not type(old) or new != old):
            raise RuleError(f"{name} changed the {what} of the program")
    if before.baked is not after.baked:
        raise RuleError(f"{name} changed the baked values of the program")
    kinds: dict[str, Any] = {"schedule": Schedule, "stages": Stages, "guards": tuple, "notes": list}
    for what, kind in kinds.items():
        value = getattr(after, what)
        if value is not getattr(before, what) and not isinstance(value, kind):
            raise RuleError(f"{name} made the {what} of the program {value!r}")
    if not set(before.guards) <= set(after.guards) or not holds(after.guards, after.hints):
        raise RuleError(f"{name} changed the guards of the program to {after.guards}")
    if not isinstance(after.ties, tuple) or not set(after.ties) <= set(before.ties):
        raise RuleError(f"{name} changed the ties of the program to {after.ties!r}")
    if not all(isinstance(one, Replacement) for one in after.replacements):
        raise RuleError(f"{name} replaces parameters by {after.replacements!r}")


def calls(after: Program, name: str) -> None:
    """Raise RuleError where a node calls what cannot be called, or stands for what is no value."""
    for slot in after.state.values():
        if slot.kind == "constant" and slot.name not in after.constants:
            raise RuleError(f"{name} lost the constant {slot.name!r}")
    for node in after.graph.nodes:
        if node.op == "call_function" and not callable(node.target):
            raise RuleError(f"{name} calls {node.target!r} as %{node.name}")
        if not isinstance(node.meta.get("val"), _VALUES):
            raise RuleError(f"{name} gave %{node.name} the value {node.meta['val']!r}")
