"""The last proof: the emitted module beside the original model, on the user's own example.

Outputs, gradients of every parameter and input, and buffers after the call are compared, with the random
state of the call. The yardstick is the captured graph in float64: the emitted module may be at most twice
as far from it as the original is, plus two eps. Where the graph has no float64 run (random operators draw
other numbers, some operators take one dtype only) the yardstick is what a change of every parameter and
input by one eps does to the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxaccel import evaluate
from fxaccel.capture import Call, belongings, clone_tree
from fxaccel.ir import Program, is_random
from fxaccel.proof import share_of_tolerance
from fxaccel.structure import Structure, deliver, flatten, objects

if TYPE_CHECKING:
    from fxaccel.session import Capture


@dataclass(frozen=True)
class Verdict:
    """ok, and the largest distance found as a share of the tolerance, or the first disagreement."""

    ok: bool
    share: float = 0.0
    why: str = ""
    yardstick: str = "float64"

    def __str__(self) -> str:
        if not self.ok:
            return self.why
        return (
            f"checked against the model: outputs, gradients and buffers at {self.share:.2f} of the "
            f"tolerance ({self.yardstick})"
        )


@dataclass(frozen=True)
class _Seen:
    """What one run shows: named tensors (outputs, gradients, buffers) and the structure of the output."""

    values: dict[str, Any]
    spec: Structure


def compare(capture: Capture, original: nn.Module, module: Any, example: Call) -> Verdict:
    """Run both on `example` (nothing that it holds is written to) and compare all that is seen."""
    state = torch.get_rng_state()
    old = _observe(_isolated(original), lambda tree, leaves: _eager(tree, example, leaves), example, state)
    emitted = _isolated(module._bare())
    forward = capture.code.bind(emitted, "<fxaccel check>")["forward"]
    new = _observe(emitted, lambda _, leaves: _emitted(capture, example, forward, leaves), example, state)
    if old.spec != new.spec:
        return Verdict(False, why=f"the output is {new.spec} where the model returns {old.spec}")
    reference, yardstick = _yardstick(capture.raw, original, example, state, old)
    worst = 0.0
    for name, value in old.values.items():
        if name not in new.values:
            continue  # a parameter that a pass replaced has no gradient of its own
        found, why = _difference(value, new.values[name], reference.get(name), yardstick)
        if why or found > 1:
            return Verdict(False, found, f"{name} {why or f'is {found:.3g} times the tolerance away'}")
        worst = max(worst, found)
    return Verdict(True, worst, yardstick=yardstick)


def _eager(tree: nn.Module, example: Call, leaves: tuple[Tensor, ...]) -> Any:
    args, kwargs = example.unflatten(leaves)
    given = objects((args, kwargs))
    return tree(*args, **kwargs), [dict(vars(g)) for g in given]


def _emitted(capture: Capture, example: Call, forward: Callable[..., Any], leaves: tuple[Tensor, ...]) -> Any:
    args, kwargs = example.unflatten(leaves)
    given = objects((args, kwargs))
    value = deliver(forward(*leaves), capture.program.out_spec, given)
    return value, [dict(vars(g)) for g in given]


def _isolated(module: nn.Module) -> nn.Module:
    """A tree that shares the parameters and has buffers of its own; tied buffers stay tied."""
    tree, made = clone_tree(module), dict[int, Tensor]()
    tree._forward_hooks.clear()  # the root's own hooks run around the emitted forward as well
    tree._forward_pre_hooks.clear()
    for m in tree.modules():
        for key, buffer in m._buffers.items():
            if buffer is not None:
                m._buffers[key] = made.setdefault(id(buffer), buffer.detach().clone())
    return tree


def _observe(
    tree: nn.Module, run: Callable[[nn.Module, tuple[Tensor, ...]], Any], example: Call, state: Tensor
) -> _Seen:
    leaves = tuple(_fresh(t) for t in example.tensors)
    watched = dict(tree.named_parameters()) | {f"input {i}": t for i, t in enumerate(leaves)}
    torch.set_rng_state(state)
    outputs, spec = flatten(run(tree, leaves), keep=belongings(tree))
    values: dict[str, Any] = {f"output {i}": _detached(v) for i, v in enumerate(outputs)}
    values |= _gradients(outputs, watched)
    values |= {f"buffer {n}": b for n, b in tree.named_buffers()}
    values |= {f"input {i} after the call": t.detach() for i, t in enumerate(leaves)}
    return _Seen(values, spec)


def _fresh(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    return copy.requires_grad_(tensor.requires_grad)


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


def _yardstick(
    raw: Program, original: nn.Module, example: Call, state: Tensor, old: _Seen
) -> tuple[dict[str, Any], str]:
    """The captured graph in float64, or where there is none, moved by one eps."""
    if not any(is_random(n) for n in raw.graph.nodes):
        try:
            return _run_graph(raw, original, example, state, evaluate.widen, double=True), "float64"
        except (RuntimeError, NotImplementedError, TypeError):
            pass  # an operator of one dtype only: the other yardstick is named in the report
    return _run_graph(raw, original, example, state, _nudged, double=False), "one eps"


def _run_graph(
    raw: Program, original: nn.Module, example: Call, state: Tensor,
    change: Callable[[Tensor], Tensor], *, double: bool,
) -> dict[str, Any]:  # fmt: skip
    tensors = dict(original.named_parameters(remove_duplicate=False)) | dict(
        original.named_buffers(remove_duplicate=False)
    )
    made: dict[int, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, slot in raw.state.items():
        source = raw.constants[slot.name] if slot.kind == "constant" else tensors[slot.name]
        fresh = made.setdefault(id(source), change(source.detach().clone()).requires_grad_(source.requires_grad))
        values[name] = fresh
    names = {slot.name: values[p] for p, slot in raw.state.items()}
    leaves = list(example.leaves)
    watched = {n: t for n, t in names.items() if t.requires_grad}
    for k, i in enumerate(example.tensor_at):
        leaves[i] = change(_fresh(leaves[i]).detach()).requires_grad_(leaves[i].requires_grad)
        watched[f"input {k}"] = leaves[i]
    torch.set_rng_state(state)
    outputs = evaluate.run(raw, values, leaves, double=double)
    result: dict[str, Any] = {f"output {i}": _detached(v) for i, v in enumerate(outputs)}
    result |= _gradients(outputs, watched)
    result |= {f"buffer {n}": b for n, b in names.items() if n in raw.buffers}
    return result


def _nudged(value: Tensor) -> Tensor:
    if not value.dtype.is_floating_point:
        return value
    generator = torch.Generator().manual_seed(7)
    signs = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
    return value * (1 + torch.finfo(value.dtype).eps * signs.to(value.device)).to(value.dtype)


def _difference(old: Any, new: Any, reference: Any, yardstick: str) -> tuple[float, str]:
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
    if reference is None:
        return math.inf, "differs, and nothing says by how much it may"
    if yardstick == "float64":
        return share_of_tolerance(reference, old, new), ""
    return share_of_tolerance(evaluate.widen(old), reference, new), ""


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)} on {value.device}"
    return repr(value)
