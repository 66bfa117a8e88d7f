"""Parameters that passes put in the place of others: in the module's tables, and in its `state_dict`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxaccel.errors import CaptureError
from fxaccel.ir import Program, Replacement
from fxaccel.tree import clone_tree

Opener: TypeAlias = Callable[[str, Tensor, tuple[str, ...]], "Replacement | None"]
"""As Pass.opened."""

ROUNDING = 256  # eps of its dtype that a tensor may lose on the way there and back and count as the same


@dataclass(frozen=True)
class Before:
    """What `give_back` needs: the parameters of each module, and how many replacements there were."""

    parameters: dict[str, dict[str, Any]]
    replacements: int


def adopt(module: nn.Module, program: Program, replacements: list[Replacement]) -> Before:
    """Give the module the parameters that the passes put in the place of others."""
    tables = {n: dict(m._parameters) for n, m in module.named_modules()} if program.replacements else {}
    before = Before(tables, len(replacements))
    known = {(r.by, r.old, r.new) for r in replacements}
    for one in program.replacements:
        if (one.by, one.old, one.new) in known:
            continue
        with torch.no_grad():
            made = one.made(*(module.get_parameter(n) for n in one.old))
        _exchange(module, (*one.old, *one.aliases), one, made)
        replacements.append(replace(one, initial=None))
    _refuse_lost(module, program, replacements)
    return before


def _exchange(module: nn.Module, gone: Sequence[str], one: Replacement, made: Sequence[Tensor]) -> None:
    """Put tensors in the module under the new names of a replacement; they train if what is gone did."""
    trains = not one.frozen and any(module.get_parameter(n).requires_grad for n in gone)
    for name in gone:
        owner, key = _owner(module, name)
        del owner._parameters[key]
    for name, tensor in zip(one.new, made, strict=True):
        owner, key = _owner(module, name)
        floating = tensor.dtype.is_floating_point
        owner._parameters[key] = nn.Parameter(tensor.detach().clone(), requires_grad=trains and floating)


def convert(module: nn.Module, replacements: list[Replacement]) -> None:
    """Exchange what passes train in the place of something cheaper for that, in the module.

    The `forward` of such a replacement has a method `converted`, which is given the replacement and its
    tensors and returns the next one, with `initial` tensors.
    """
    made = dict[int, Replacement]()
    for at, one in enumerate(replacements):
        converted = getattr(one.forward, "converted", None)
        if converted is not None:
            with torch.no_grad():
                made[at] = converted(one, *(module.get_parameter(n) for n in one.new))
    if not made:
        raise CaptureError(
            "nothing in this module waits to be converted",
            "call it once with a pass that trains what it converts later, as 'quantize{train=learned}'; a "
            "file that was loaded holds graphs alone: convert before saving",
        )
    for at, new in made.items():  # all of them could be made
        _exchange(module, replacements[at].new, new, new.made())
        replacements[at] = replace(new, initial=None)


def opened(module: nn.Module, openers: Sequence[Opener]) -> list[Replacement]:
    """Exchange the parameters that other libraries hold in tensors of their own kinds, which openers know.

    Others of such kinds stay: a capture sees them as the calls that they make.
    """
    kinds: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if type(parameter) not in (nn.Parameter, Tensor):
            kinds.setdefault(id(parameter), []).append(name)
    made = []
    for name, *aliases in kinds.values():
        tensor = module.get_parameter(name)
        found = (one for opener in openers if (one := opener(name, tensor, tuple(aliases))) is not None)
        one = next(found, None)
        if one is not None:
            _exchange(module, (*one.old, *one.aliases), one, one.made(tensor))
            made.append(replace(one, initial=None))
    return made


def _refuse_lost(module: nn.Module, program: Program, replacements: list[Replacement]) -> None:
    """Raise where the graph reads a parameter that an earlier capture has replaced and this one has not."""
    here = {(r.by, r.old, r.new) for r in program.replacements}
    read = {slot.name for slot in program.state.values()}
    for one in replacements:
        lost = read.intersection((*one.old, *one.aliases))
        if lost and (one.by, one.old, one.new) not in here:
            raise CaptureError(
                f"this call reads {', '.join(sorted(lost))}, which {one.by} has replaced in an earlier "
                "capture and cannot replace here",
                "see fast.report(); accelerate the model again for calls of this kind",
            )


def give_back(module: nn.Module, before: Before, replacements: list[Replacement]) -> None:
    """Undo `adopt`."""
    for name, table in before.parameters.items():
        owner = module.get_submodule(name)
        owner._parameters.clear()
        owner._parameters.update(table)
    del replacements[before.replacements :]


def restored(bare: nn.Module, replacements: list[Replacement]) -> nn.Module:
    """A tree of the original class with the original parameters."""
    tree = clone_tree(bare)
    for one in reversed(replacements):
        if one.inverse is None:
            raise CaptureError(
                f"pass {one.by!r} replaced {', '.join(one.old)} and cannot give them back, so no other "
                "mode or shape can be captured",
                "capture every mode you need before training, or accelerate the original again",
            )
        new = [tree.get_parameter(n) for n in one.new]
        with torch.no_grad():
            old = one.inverse(*new)
        for name in one.new:
            owner, key = _owner(tree, name)
            del owner._parameters[key]
        for name, tensor in zip(one.old, old, strict=True):
            owner, key = _owner(tree, name)
            owner._parameters[key] = nn.Parameter(tensor, requires_grad=new[0].requires_grad)
        for name in one.aliases:
            owner, key = _owner(tree, name)
            owner._parameters[key] = tree.get_parameter(one.old[0])
    return tree


def to_original(state: Any, prefix: str, replacements: list[Replacement]) -> Any:
    """A state_dict in the names and values of the original."""
    for one in reversed(replacements):
        new = [state[prefix + n] for n in one.new]
        if one.inverse is None:
            continue
        for name in one.new:
            del state[prefix + name]
        with torch.no_grad():
            state.update(zip((prefix + n for n in one.old), one.inverse(*new), strict=True))
        state.update((prefix + n, state[prefix + one.old[0]]) for n in one.aliases)
    return state


def from_original(state: Any, prefix: str, replacements: list[Replacement]) -> None:
    """Turn a state_dict of the original, in place, into one of the module.

    Warns where a tensor can only be come near to, and says by how much.
    """
    lost = dict[str, float]()
    for one in replacements:
        if all(prefix + n in state for n in one.old):
            old = [state.pop(prefix + n) for n in one.old]
            for name in one.aliases:
                state.pop(prefix + name, None)
            with torch.no_grad():
                made = one.made(*old)
                state.update(zip((prefix + n for n in one.new), made, strict=True))
                lost |= _lost(one, old, made)
    if lost:
        name = max(lost, key=lambda n: lost[n])
        warnings.warn(
            f"{len(lost)} tensors of the state_dict do not fit what has taken their place and were "
            f"projected: {name} is off by {lost[name]:.2g} of its norm, the others by less",
            UserWarning,
            stacklevel=4,
        )


def _lost(one: Replacement, old: list[Tensor], made: tuple[Tensor, ...]) -> dict[str, float]:
    """By how much of its norm each tensor is off after there and back, if by more than rounding explains."""
    if one.inverse is None:
        return {}
    away = {}
    for name, a, b in zip(one.old, old, one.inverse(*made), strict=True):
        error = float((b - a).norm() / a.norm()) if a.any() else float(b.any())
        if error > ROUNDING * torch.finfo(a.dtype).eps:
            away[name] = error
    return away


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return module.get_submodule(path), key
