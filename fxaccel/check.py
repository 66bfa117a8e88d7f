"""The last proof: the emitted module beside the original model, on the user's own example.

Outputs, gradients of every parameter and input, and buffers after the call are compared, with the random
state of the call. The yardstick is the captured graph in float64: the emitted module may lose two bits
against the original (fxaccel.proof says what that means). Where the graph has no float64 run (random
operators draw other numbers, some operators take one dtype only, pieces are no graph) the yardstick is what
an error of one eps in every operator does to the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxaccel import evaluate
from fxaccel.capture import Call
from fxaccel.effects import is_random
from fxaccel.ir import Program, tensors
from fxaccel.structure import Structure, deliver, flatten, objects
from fxaccel.tolerance import DRAWS, distance, share_of_tolerance
from fxaccel.tree import belongings, clone_tree, random_kept, without_root_hooks

if TYPE_CHECKING:
    from fxaccel.session import Capture


_PLAUSIBLE = 64  # times the rounding that draws show: more than they see of it by chance


@dataclass(frozen=True)
class Verdict:
    """ok, and the largest distance found as a share of the tolerance, or the first disagreement."""

    ok: bool
    share: float = 0.0
    why: str = ""
    yardstick: str = "float64"
    still: bool = False

    def __str__(self) -> str:
        if not self.ok:
            return self.why
        return (
            f"checked against the model: outputs, gradients and buffers at {self.share:.2f} of the "
            f"tolerance ({self.yardstick}{', nothing dropped' if self.still else ''})"
        )


@dataclass(frozen=True)
class _Seen:
    """What one run shows: named tensors (outputs, gradients, buffers) and the structure of the output."""

    values: dict[str, Any]
    spec: Structure


Runner = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Any, list[Any]]]
"""Calls a tree on tensors: its result, and the objects that were passed in and perhaps changed."""


def compare(
    capture: Capture, original: nn.Module, module: Any, example: Call, loaded: bool = False
) -> Verdict:
    """Run both on `example` (nothing that it holds is written to) and compare all that is seen.

    A capture that was `loaded` has no graph of the model's own to be the yardstick.
    """
    still, emitted = capture.program.redrawn, emitted_by(capture, example)
    raw = None if loaded else capture.raw
    return replace(compare_runs(emitted, original, module, example, raw, still), still=still)


def emitted_by(capture: Capture, example: Call) -> Runner:
    """What runs the capture on inputs like the example's; its code is bound to a tree once.

    Nothing is dropped where its dropout draws other numbers than the model's.
    """
    bound: dict[nn.Module, Any] = {}

    def emitted(tree: nn.Module, leaves: tuple[Tensor, ...]) -> Any:
        if tree not in bound:
            functions = capture.functions(tree, "<fxaccel check>", capture.program.redrawn)
            bound[tree] = functions["forward"]
        args, kwargs = example.unflatten(leaves)
        given = objects((args, kwargs))
        return deliver(bound[tree](*leaves), capture.program.out_spec, given), given

    return emitted


def written_by(example: Call, still: bool) -> Runner:
    """What runs a model as written on inputs like the example's, with nothing dropped if `still`."""

    def eager(tree: nn.Module, leaves: tuple[Tensor, ...]) -> Any:
        args, kwargs = example.unflatten(leaves)
        given = objects((args, kwargs))
        with evaluate.Calm() if still else nullcontext():
            return tree(*args, **kwargs), given

    return eager


def compare_runs(
    emitted: Runner, original: nn.Module, module: Any, example: Call, raw: Program | None, still: bool = False
) -> Verdict:
    """Compare what `emitted` does over the tree of `module` with the original, both on `example`."""
    eager, state = written_by(example, still), torch.get_rng_state()
    old = _observe(isolated(original), eager, example, state)
    try:
        new = _observe(isolated(module), emitted, example, state)
    except Exception as error:  # whatever it raises, the model did not
        return Verdict(False, why=f"it raises {type(error).__name__}: {error}")
    if old.spec != new.spec:
        return Verdict(False, why=f"the output is {new.spec} where the model returns {old.spec}")
    raw = evaluate.calm(raw) if raw is not None and still else raw
    found = None if raw is None else _in_float64(raw, original, example, state)
    if found is None or raw is None:
        return _by_eps(old, new, lambda: _observe(isolated(original), eager, example, state))
    eps = _coarsest(raw)
    verdict = _verdict(old, new, found, "float64", eps=eps)
    if verdict.ok or verdict.share in (0.0, math.inf):
        return verdict
    # Beyond the original's own error: allow what one eps in every operator explains.
    draws = [_unsteady(raw, original, example, state, seed) for seed in range(1, DRAWS + 1)]
    return _verdict(old, new, found, "float64", draws, eps)


def _by_eps(old: _Seen, new: _Seen, again: Callable[[], _Seen]) -> Verdict:
    """The verdict by what one eps in every operator does to the model: in one draw, or in DRAWS."""
    draws = list[_Draw]()
    verdict = _verdict(old, new, {}, "one eps")
    for seed in range(1, DRAWS + 1):
        if verdict.ok:
            break
        try:
            with evaluate.Unsteady(seed) as mode:
                draws.append(_Draw(again().values, mode.largest))
        except (RuntimeError, IndexError, ValueError):
            continue  # a value that the model takes for exact: this draw says nothing
        verdict = _verdict(old, new, {}, "one eps", draws)
    return verdict


@dataclass(frozen=True)
class _Draw:
    """What a run shows in which every operator is off by a little, and the size of its largest tensor."""

    values: dict[str, Any]
    largest: int


def _unsteady(raw: Program, original: nn.Module, example: Call, state: Tensor, seed: int) -> _Draw:
    with evaluate.Unsteady(seed) as mode:
        return _Draw(_in_float64(raw, original, example, state) or {}, mode.largest)


def _verdict(
    old: _Seen,
    new: _Seen,
    reference: dict[str, Any],
    yardstick: str,
    draws: Sequence[_Draw] = (),
    eps: float = 0.0,
) -> Verdict:
    worst = 0.0
    for name, value in old.values.items():
        if name not in new.values:
            continue  # a parameter that a pass replaced has no gradient of its own
        share, why = _difference(value, new.values[name], reference.get(name), yardstick, name, draws, eps)
        if why or share > 1:
            return Verdict(False, share, f"{name} {why or f'is {share:.3g} times the tolerance away'}")
        worst = max(worst, share)
    return Verdict(True, worst, yardstick=yardstick)


def isolated(module: nn.Module, apart: bool = False) -> nn.Module:
    """A tree with buffers of its own and parameters over the same memory, or apart; ties are kept.

    (Parameters of its own, so that no hook of the user sees the gradients of the comparison.)
    """
    tree, made = without_root_hooks(clone_tree(module)), dict[int, Any]()
    for m in tree.modules():
        for key, buffer in m._buffers.items():
            if buffer is not None:
                m._buffers[key] = made.setdefault(id(buffer), buffer.detach().clone())
        for key, parameter in m._parameters.items():
            if parameter is not None:
                values = parameter.detach().clone() if apart else parameter.detach()
                own = nn.Parameter(values, parameter.requires_grad)
                m._parameters[key] = made.setdefault(id(parameter), own)
    return tree


def _observe(tree: nn.Module, run: Runner, example: Call, state: Tensor) -> _Seen:
    leaves, given = inputs(example)
    watched = dict(tree.named_parameters()) | {f"input {i}": t for i, t in enumerate(leaves)}
    with random_kept():  # numpy and Python draw the same numbers in each run
        torch.set_rng_state(state)
        value, changed = run(tree, given)
    # Flat as the graph's own outputs are, which the float64 run numbers: what was passed in comes once.
    outputs, spec = flatten((value, [dict(vars(c)) for c in changed]), changed, belongings(tree))
    values: dict[str, Any] = {f"output {i}": _detached(v) for i, v in enumerate(outputs)}
    if torch.is_grad_enabled():  # export loses an enable_grad within no_grad
        flags = [(i, v.requires_grad) for i, v in enumerate(outputs) if isinstance(v, Tensor)]
        values |= {f"requires_grad of output {i}": flag for i, flag in flags}
    values |= _gradients(outputs, watched)
    values |= {f"buffer {n}": b for n, b in tree.named_buffers()}
    values |= {f"input {i} after the call": t.detach() for i, t in enumerate(given)}
    return _Seen(values, spec)


def inputs(example: Call) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Copies of the example's tensors, and what of them a call is given: those, or with a history."""
    leaves = tuple(_fresh(t) for t in example.tensors)
    return leaves, tuple(_like(leaf, t) for leaf, t in zip(leaves, example.tensors, strict=True))


def _fresh(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    return copy.requires_grad_(tensor.requires_grad)


def _like(leaf: Tensor, tensor: Tensor) -> Tensor:
    """`leaf`, or a copy with a history if `tensor` has one: only such a tensor may be written to in place."""
    return leaf if tensor.is_leaf else leaf.clone()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _gradients(outputs: list[Any], watched: dict[str, Tensor]) -> dict[str, Any]:
    flowing = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
    wanted = {n: t for n, t in watched.items() if t.requires_grad}
    if not flowing or not wanted:
        return {}
    weights = []
    for i, o in enumerate(flowing):
        generator = torch.Generator().manual_seed(i)
        real = torch.randn(o.shape, generator=generator, dtype=torch.float64)
        weights.append(real.to(o.dtype).to(o.device))
    try:
        grads = torch.autograd.grad(flowing, list(wanted.values()), weights, allow_unused=True)
    except RuntimeError as error:
        return {"backward": f"raises {type(error).__name__}"}  # compared like any other value
    return {f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True)}


# -- yardsticks ------------------------------------------------------------------------------------


def _in_float64(raw: Program, original: nn.Module, example: Call, state: Tensor) -> dict[str, Any] | None:
    """What the captured graph shows in float64, None where it cannot be run so."""
    if any(is_random(n) for n in raw.graph.nodes):
        return None
    tensors = dict(original.named_parameters(remove_duplicate=False)) | dict(
        original.named_buffers(remove_duplicate=False)
    )
    made: dict[int, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, slot in raw.state.items():
        source = raw.constants[slot.name] if slot.kind == "constant" else tensors[slot.name]
        wide = evaluate.widen(source.detach().clone()).requires_grad_(source.requires_grad)
        values[name] = made.setdefault(id(source), wide)
    names = {slot.name: values[p] for p, slot in raw.state.items()}
    leaves = list(example.leaves)
    watched = {n: t for n, t in names.items() if t.requires_grad}
    for k, i in enumerate(example.tensor_at):
        wide = evaluate.widen(_fresh(leaves[i]).detach()).requires_grad_(leaves[i].requires_grad)
        watched[f"input {k}"] = wide
        leaves[i] = _like(wide, leaves[i])
    try:
        outputs = evaluate.run(raw, values, leaves, double=True)
    except (RuntimeError, TypeError):
        return None  # an operator of one dtype only; the report names the other yardstick
    result: dict[str, Any] = {f"output {i}": _detached(v) for i, v in enumerate(outputs)}
    result |= _gradients(outputs, {n: t for n, t in watched.items() if t.requires_grad})
    result |= {f"input {k} after the call": leaves[i].detach() for k, i in enumerate(example.tensor_at)}
    return result | {f"buffer {n}": b for n, b in names.items() if n in raw.buffers}


def _difference(
    old: Any, new: Any, reference: Any, yardstick: str, name: str, draws: Sequence[_Draw], eps: float
) -> tuple[float, str]:
    """Distance as a share of the tolerance, or a sentence where the two cannot be compared."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        same = old is new or (type(old) is type(new) and old == new)
        return 0.0, "" if same else f"is {_kind(new)} where the model has {_kind(old)}"
    if (old.dtype, old.shape, old.device) != (new.dtype, new.shape, new.device):
        return 0.0, f"is {_kind(new)} where the model has {_kind(old)}"
    if torch.equal(old, new):
        return 0.0, ""
    if not old.dtype.is_floating_point and not old.dtype.is_complex:
        return math.inf, f"differs in {int((old != new).sum())} of {old.numel()} places"
    moved = [m for m in (d.values.get(name) for d in draws) if isinstance(m, Tensor) and m.shape == old.shape]
    if yardstick == "one eps" and moved:
        shares = (share_of_tolerance(evaluate.widen(old), m, new) for m in moved)
        return min(shares), ""
    if reference is None:
        return math.inf, "differs, and nothing says by how much it may"
    share, why = share_of_tolerance(reference, old, new, moved), _doubt(old, reference, moved, draws, eps)
    return (math.inf if draws else 2.0, why) if why else (share, "")


def _coarsest(program: Program) -> float:
    """eps of the least precise dtype that the graph computes in, which its other values inherit."""
    made = (t for n in program.graph.nodes for t in tensors(n.meta.get("val")))
    return max((torch.finfo(t.dtype).eps for t in made if t.dtype.is_floating_point), default=0.0)


def _doubt(
    old: Tensor, reference: Tensor, moved: Sequence[Tensor], draws: Sequence[_Draw], eps: float
) -> str:
    """Why the graph is no yardstick: the model is further away from it than rounding can explain."""
    if not reference.numel():
        return ""
    eps, away = max(eps, torch.finfo(old.dtype).eps), distance(reference, old)
    if away <= math.sqrt(eps) * float(torch.nan_to_num(reference.detach()).abs().max()):
        return ""
    rounding = eps / evaluate.UNSTEADY * max((distance(reference, m) for m in moved), default=0.0)
    terms = max((d.largest for d in draws), default=0)  # of a sum, at most: its error grows with their root
    if away <= max(_PLAUSIBLE, math.sqrt(terms)) * rounding:
        return ""
    return f"is {away:.3g} away from the captured graph run in float64, in the model itself"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)} on {value.device}"
    return repr(value)
