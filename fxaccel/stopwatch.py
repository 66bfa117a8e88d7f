"""What a rewrite takes on this machine beside what it takes the place of.

Both are emitted as they would be within the model and run by turns at the sizes of the example, forward and,
where gradients flow, backward. Values are random, masks let everything pass; parameters, and what passes
compute from them ahead, are there already. Equal sites are timed once.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxaccel.derived import standing
from fxaccel.emit import Emitter, Tables
from fxaccel.ir import Program, Slot, is_tensor
from fxaccel.proof import Claim, Fragment, fragment, key, materialise

MARGIN = 1.03  # times as long, which a clock cannot tell from as long
ENOUGH = (15.0, 400.0)  # ms that the runs of a site take together; of one that looks slower then
MOST = 7  # rounds
SCALE = 0.25  # of values: those of larger ones' softmax are too small for a CPU to be quick with
WARM = 6  # calls of a whole graph after which what kernels prepare, for weights that come often, is there


@dataclass(frozen=True)
class Times:
    """Milliseconds of a site: as it was, and rewritten."""

    old: float
    new: float

    def slower(self, at_most: float) -> bool:
        """Whether the new is longer than `at_most` times the old, by more than a clock errs."""
        return self.new > at_most * MARGIN * self.old

    def __str__(self) -> str:
        return f"takes {self.new / self.old:.2f} times as long here ({self.new:.3g} ms for {self.old:.3g})"

    @classmethod
    def told(cls, sentence: str) -> Times | None:
        """The times that a sentence of the report tells, if it tells any."""
        found = re.search(r"times as long here \((\S+) ms for (\S+)\)", sentence)
        return None if found is None else cls(float(found[2]), float(found[1]))


@dataclass
class Stopwatch:
    """Times rewrites; `known` has those of all kinds of sites so far, by the key of their claim."""

    known: dict[str, Times] = field(default_factory=dict)

    def times(
        self, program: Program, claim: Claim, at_most: float, in_common: bool = False, warm: int = 0
    ) -> Times | None:
        """What both sides of a claim take; None on a device that is not here.

        at_most      times the old that the new may take: near it, it is measured for longer
        in_common    whether what a kernel prepares serves other sites, too: it is made once, untimed
        warm         calls of each ahead of those that are timed
        """
        values = (n.meta["val"] for n in claim.before.inputs)
        device = next((v.device for v in values if is_tensor(v)), torch.device("cpu"))
        if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()):
            return None
        name = key(program, claim)
        if name not in self.known:
            self.known[name] = _timed(program, claim, device, at_most, in_common, warm)
        return self.known[name]

    def whole(self, before: Program, after: Program, at_most: float) -> Times | None:
        """What two graphs of the same inputs and parameters take, each as a whole."""
        claim = Claim("", _all(before), _all(after), "reassociated")
        return self.times(before, claim, at_most, warm=WARM)


def _all(program: Program) -> Fragment:
    """The graph as a function of its inputs and its state."""
    nodes = list(program.graph.nodes)
    calls = [n for n in nodes if n.op == "call_function"]
    outputs = [o for o in program.graph.output_node().args[0] if isinstance(o, fx.Node)]
    return fragment(program, calls, [n for n in nodes if n.op == "placeholder"], outputs)


def _timed(
    program: Program, claim: Claim, device: torch.device, at_most: float, in_common: bool, warm: int
) -> Times:
    clock: Any = importlib.import_module("fxaccel.kernels._clock")  # kernels choose their way by it, too
    generator = torch.Generator().manual_seed(0)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.set_grad_enabled(program.grad),
    ):
        values = [_value(n, program, generator, device) for n in claim.before.inputs]
        runs = [_run(program, part, values, in_common) for part in (claim.before, claim.after)]
        for run in runs * warm:
            run()
        found = Times(*clock.by_turns(runs, device, 1))
        for enough in ENOUGH:
            rounds = min(MOST, int(enough / (found.old + found.new)))
            if rounds:
                old, new = clock.by_turns(runs, device, rounds)
                found = Times(min(found.old, old), min(found.new, new))
            if not found.slower(at_most):
                break
    return found


def _value(node: fx.Node, program: Program, generator: torch.Generator, device: torch.device) -> Any:
    """What an input is in a timed run."""
    if node.meta.get("number") is not None:
        return node.meta["number"]
    value = materialise(node.meta["val"], program.hints, generator, device=device, scale=SCALE)
    if not isinstance(value, Tensor):
        return value
    if value.dtype is torch.bool:
        return value.fill_(True)  # a kernel may pass over what a mask hides
    floating = value.is_floating_point() or value.is_complex()
    return value.requires_grad_(program.grad and floating and node.meta["learned"])


def _run(program: Program, part: Fragment, values: list[Any], in_common: bool) -> Callable[[], Any]:
    """A call of a fragment, with its backward where gradients are wanted."""
    known = {n.name for n in program.facts(standing)}
    names = [n.name for n in part.inputs]
    state = {n: v for n, v in zip(names, values, strict=True) if n in known and isinstance(v, Tensor)}
    own = replace(
        program, graph=part.graph, state={n: Slot("parameter", n) for n in state}, constants={}, ties=(),
        inputs=tuple(n for n in names if n not in state), schedule=None, stages=None, _facts={},
    )  # fmt: skip
    forward = _Emitter(own, in_common).code().bind(Tables(state), "<fxaccel stopwatch>")["forward"]
    given = [v for n, v in zip(names, values, strict=True) if n not in state]
    leaves = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
    learned = [i for i, o in enumerate(forward(*given)) if isinstance(o, Tensor) and o.requires_grad]
    if not leaves or not learned:
        return lambda: forward(*given)
    seeds = [torch.ones_like(o) for i, o in enumerate(forward(*given)) if i in learned]

    def step() -> Any:
        outputs = forward(*given)
        return torch.autograd.grad([outputs[i] for i in learned], leaves, seeds, allow_unused=True)

    return step


class _Emitter(Emitter):
    """Writes what computes, without what asks whether a call fits."""

    def __init__(self, program: Program, in_common: bool) -> None:
        super().__init__(program)
        self.in_common = in_common

    def maker(self, shared: Any) -> Any:
        return _Once(shared.made) if self.in_common else shared.made

    def accepts(self, inputs: list[str]) -> Iterator[str]:
        return iter(())

    def fits(self) -> Iterator[str]:
        return iter(())


class _Once:
    """A function that is called once; its result is that of every other call."""

    def __init__(self, made: Callable[..., Any]) -> None:
        self.made, self.found = made, list[Any]()
        self.__name__ = made.__name__

    def __call__(self, *args: Any) -> Any:
        if not self.found:
            self.found.append(self.made(*args))
        return self.found[0]
