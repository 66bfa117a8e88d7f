"""Cut a training step into the stages of a pipeline.

    def forward(x):                    def stage_0(x):              def stage_1(h, x):
        h = f(x, w)             =>         h = f(x, w)                  return [g(h, x, v)]
        return [g(h, x, v)]                return h, x

Fires on   training steps with as many calls that can be apart as stages are asked for. Calls that touch a
           tensor that is written to stay together, and regions of no_grad and autocast.
Saves      nothing where all stages run in one process, one after the other; each can be taken out
           (fxaccel/staged.py) and holds its own parameters alone.
Exact      results bit for bit, random numbers drawn in the same order; gradients up to the order in which
           those of a value with several readers are summed.
Source     the cut of a chain: Narayanan et al. 2019, "PipeDream", and Zheng et al. 2022, "Alpa",
           arXiv:2201.12023; orders and what must stay together: passes/_partition_plan.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import fx

from fxaccel.errors import OptionError
from fxaccel.ir import Program, path
from fxaccel.passes._partition_plan import Cut, Step, Terms, cut
from fxaccel.passes.checkpoint import STATES, read, said
from fxaccel.picture import Picture
from fxaccel.pipeline import orders
from fxaccel.pipeline.simulator import Link
from fxaccel.profile import profile
from fxaccel.roofline import speed
from fxaccel.rule import Pass, register
from fxaccel.stages import Stages, again, closure


@dataclass(frozen=True)
class StagePlan:
    """A stage of a plan, for one microbatch.

    begins        name of its first call, and the module of that
    seconds       forward and backward, with what it sends, receives and sums
    parameters    bytes of its parameters
    held          bytes that it holds at most: these with gradients and the optimizer's states, what it
                  received and what waits for backward
    sends         bytes to the next stage;  returns: bytes of gradients that come back
    """

    begins: str
    path: str
    seconds: float
    parameters: int
    held: int
    sends: int
    returns: int


@dataclass(frozen=True)
class Plan:
    """A training step in stages.

    order     names of the calls, stage by stage
    shared    parameters that several stages read, with the numbers of these; their gradients are summed
    gap       how far the slowest stage is above a bound below which no cut is, as a share
    """

    stages: tuple[StagePlan, ...]
    order: tuple[tuple[str, ...], ...]
    shared: tuple[tuple[str, tuple[int, ...]], ...]
    gap: float

    def __str__(self) -> str:
        rows = ["stage  begins in                    ms  parameters       holds       sends     returns"]
        rows += [
            f"{i:>5}  {s.path or '(root)':<20.20}{1e3 * s.seconds:>11.3g}"
            + "".join(f"{said(n):>12}" for n in (s.parameters, s.held, s.sends, s.returns))
            for i, s in enumerate(self.stages)
        ]
        rows += [
            f"{name} is shared by the stages {', '.join(map(str, stages))}: its gradient is summed"
            for name, stages in self.shared
        ]
        return "\n".join([*rows, f"the slowest stage is {100 * self.gap:.1f} % above the lower bound"])


@register
class Partition(Pass):
    """A training step is cut into balanced stages of a pipeline.

    stages          how many; if `at` is given, one more than its places where left out
    at              module paths or names of calls before which a stage begins in any case
    memory          of each device, "6GiB", or of one after the other, ["6GiB", "4GiB"], in text 6GiB|4GiB; an
                    equal part for each of its stages: parameters with gradients and the optimizer's state,
                    and what waits for backward of the microbatches in flight
    bandwidth       bytes a second between stages; without it sending takes no time
    microbatches    that the captured batch is to be cut into
    optimizer       whose state counts: none, sgd, momentum, adam, adamw
    schedule        that says how many microbatches are in flight, by its name in torch
    chunks          stages on a device, the fewest that the schedule takes if not said
    """

    name = "partition"
    step = "cut"
    numerics = "reassociated"
    serves = ("training",)

    stages: int | None = None
    at: tuple[str, ...] | str = ()
    memory: str | tuple[str, ...] | None = None
    bandwidth: float | None = None
    microbatches: int = 1
    optimizer: str = "none"
    schedule: str = "1f1b"
    chunks: int | None = None

    def __post_init__(self) -> None:
        orders.named(self.schedule)
        if self.stages is None and not self.at:
            raise OptionError("partition takes stages or at, or both", "as stages=2")
        for name, value in (
            ("stages", self.stages), ("microbatches", self.microbatches), ("chunks", self.chunks)
        ):  # fmt: skip
            if value is not None and (not isinstance(value, int) or value < 1):
                raise OptionError(f"{name} is {value!r}, expected 1 or more")
        if self.optimizer not in STATES:
            raise OptionError(f"optimizer is {self.optimizer!r}, expected one of {', '.join(STATES)}")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise OptionError(f"bandwidth is {self.bandwidth!r}, expected bytes a second, above 0")
        for one in self.memories():
            if not read(one)[1]:
                raise OptionError(f"memory is {one!r}, expected bytes with a unit", 'as memory="6GiB"')

    def places(self) -> tuple[str, ...]:
        """The places of `at`."""
        return tuple(self.at.split("|")) if isinstance(self.at, str) and self.at else tuple(self.at)

    def memories(self) -> tuple[str, ...]:
        """Those that `memory` tells: none, one for all devices, or one for each."""
        return tuple(self.memory.split("|")) if isinstance(self.memory, str) else tuple(self.memory or ())

    def rooms(self, devices: int) -> tuple[float, ...]:
        """Bytes of each device."""
        told = [read(one)[0] for one in self.memories()] or [math.inf]
        if len(told) not in (1, devices):
            raise OptionError(
                f"memory is of {len(told)} devices, expected one for all or one for each of {devices}",
                'as memory="6GiB", or memory=["6GiB", "4GiB"] of two',
            )
        return tuple(told * (devices // len(told)))

    def terms(self) -> Terms:
        """What a cut is chosen by."""
        stages = self.stages or len(self.places()) + 1
        chunks = self.chunks or (2 if orders.named(self.schedule) in orders.TWO else 1)
        if stages % chunks:
            raise OptionError(
                f"{self.schedule} has {chunks} stages on each device, which {stages} stages do not give"
            )
        devices, flight = stages // chunks, (1,) * stages  # of one microbatch, which any order runs
        if self.microbatches > 1:
            flight = orders.order(self.schedule, devices, self.microbatches, chunks).in_flight()
        rooms, placement = self.rooms(devices), tuple(range(stages))
        if chunks > 1:
            placement = orders.order(self.schedule, devices, 2 * devices, chunks).placement  # of any count
        return Terms(
            stages, tuple(rooms[device] / chunks for device in placement),
            Link(bandwidth=self.bandwidth or math.inf), self.microbatches, STATES[self.optimizer], flight,
            self.microbatches,
        )  # fmt: skip

    def plan(self, program: Program) -> Plan:
        self.refuse_planned(program)
        found = profile(program)
        step, terms = Step(program, found, speed(program).seconds(found)), self.terms()
        return planned(step, terms, cut(step, terms, self.named))

    def refuse_planned(self, program: Program) -> None:
        """Raise OptionError for a step that has stages, or a plan for the whole of it."""
        if program.stages is not None:
            raise OptionError("the step is cut into stages already")
        if program.schedule is not None:
            raise OptionError(
                "another pass says when values of the whole step are computed again, and a stage has a "
                "backward of its own",
                "let it run after partition, on the stages",
            )

    def named(self, groups: list[list[fx.Node]]) -> list[int]:
        """The groups of an order that `at` names: the first that has a call of the module, or the call."""
        return [_position(place, groups) for place in self.places()]

    def study(
        self, program: Program, *, batch: int | None = None, microbatches: int | None = None,
        schedule: str | None = None, latency: float = 0.0,
    ) -> Any:  # fmt: skip
        """The pipeline on `stages` devices that takes the least time: passes/_partition_study.py.

        What is not said, the schedule and the count of microbatches of the batch, is chosen.
        """
        from fxaccel.passes._partition_study import study  # which plans by what is here

        return study(program, self, batch, microbatches, schedule, latency)

    def pictures(self, program: Program) -> Iterator[Picture]:
        """A step on the devices, and what they hold over it: passes/_partition_pictures.py."""
        from fxaccel.passes._partition_pictures import pictures  # which cuts by what is here

        return pictures(self, program)

    def apply(self, program: Program, plan: Plan, driver: Any) -> None:
        nodes, made_again = {n.name: n for n in program.graph.nodes}, program.facts(again)
        calls = [nodes[name] for stage in plan.order for name in stage]
        if calls != sorted(calls):
            _move(calls, made_again, program.graph.output_node())
        begins = [nodes[stage[0]] for stage in plan.order[1:]]
        flights = self.terms().in_flight
        program.stages = Stages(tuple(n.name for n in begins), self.microbatches, flights)
        program.changed()
        for node, stage in zip(begins, plan.stages[1:], strict=True):
            driver.applied(node, f"a stage begins, of {1e3 * stage.seconds:.3g} ms")


def _move(calls: list[fx.Node], made_again: set[fx.Node], output: fx.Node) -> None:
    """Put the calls in this order, what is made again for one before its first reader."""
    placed = set[fx.Node]()
    for node in [*calls, output]:
        for one in [*sorted(closure(made_again, node.all_input_nodes) - placed), node]:
            placed.add(one)
            if one is not output:
                output.prepend(one)


def _position(place: str, groups: list[list[fx.Node]]) -> int:
    for i, group in enumerate(groups):
        if any(n.name == place or f"{path(n)}.".startswith(f"{place}.") for n in group):
            if i == 0:
                raise OptionError(f"at names {place!r}, with which the step begins anyway")
            return i
    paths = dict.fromkeys(path(n) for group in groups for n in group)
    close = get_close_matches(place, paths, 1)
    raise OptionError(
        f"at names {place!r}, which is no module of the step and no call of it",
        f"did you mean {close[0]!r}?" if close else "see the paths in fast.report() and fast.diff()",
    )


def planned(step: Step, terms: Terms, found: Cut) -> Plan:
    """The plan that a cut is."""
    sizes, sent = step.sizes(), [*found.sent, (0, 0)]
    m = terms.microbatches
    stages = list[StagePlan]()
    for i, calls in enumerate(found.stages()):
        names = {name for n in calls for name in step.states(n)} & step.trains
        first = calls[0]
        stages.append(
            StagePlan(
                first.name,
                path(first),
                found.seconds[i],
                sum(sizes[n] for n in names),
                found.held[i],
                sent[i][0] // m,
                sent[i][1] // m,
            )
        )
    shared = tuple((n, s) for n, s in sorted(found.shared.items()) if n in step.trains)
    order = tuple(tuple(n.name for n in calls) for calls in found.stages())
    gap = found.slowest / found.bound - 1 if found.bound else 0.0
    return Plan(tuple(stages), order, shared, gap)
