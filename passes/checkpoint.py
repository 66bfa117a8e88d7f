"""Keep fewer activations for backward and compute them again, so that a training step fits into a budget.

    h = linear(x, w)     =>    the same, of which autograd keeps x alone, and before y's backward:
    a = gelu(h)                h = linear(x, w)
    y = linear(a, v)           a = gelu(h)

Fires on   whatever autograd keeps of a training step and can be had again: results of pure calls, masks of
           dropouts (their random state is kept), batch norms (whose statistics move once), attention.
Saves      activation memory, down to the budget; costs the time of what is computed again, least first:
           element-wise calls and norms before products.
           On a GPU values also go to the host's memory and back, where copies have time beside the rest.
Exact      bit for bit where the kernels are deterministic: the same calls on the same numbers.
Source     Griewank & Walther 2000, "Algorithm 799: revolve"; Chen et al. 2016, "Training deep nets with
           sublinear memory cost", arXiv:1604.06174; the plan: passes/_checkpoint_plan.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fxaccel.errors import OptionError
from fxaccel.ir import Program
from fxaccel.passes._checkpoint_plan import Planner
from fxaccel.picture import Picture
from fxaccel.profile import Profile, profile
from fxaccel.replay import Draft, Replayed, lives, replay, write
from fxaccel.roofline import FORWARDS, speed
from fxaccel.rule import Pass, register
from fxaccel.schedule import Schedule
from fxaccel.stages import nbytes, parts

UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9}
STATES = {"none": 0, "sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}
"""Tensors that an optimizer keeps for each parameter, of its size."""
NEAR = 100  # steps of a search for what one microbatch of several may take


@dataclass(frozen=True)
class Plan:
    """What autograd keeps of a step, and what that costs.

    need, peak    bytes of the step at its peak, as it was and as planned: parameters, gradients, the
                  optimizer's state and activations
    activations   (as it was, as planned) of these without parameters, their gradients and that state
    overhead      seconds that computing again takes, and waiting for copies, as a share of forward and
                  backward
    flops         that are computed again
    let_go        call -> bytes that are not kept of what it makes
    moved         call -> bytes of it that lie in the host's memory between forward and backward
    """

    schedule: Schedule
    need: int
    peak: int
    activations: tuple[int, int]
    overhead: float
    flops: int
    let_go: dict[str, int]
    moved: dict[str, int]

    def __str__(self) -> str:
        if not self.let_go and not self.moved:
            return f"everything is kept: the step takes {said(self.need)} at its peak"
        before, after = self.activations
        moved = sum(self.moved.values())
        return (
            f"{said(self.peak)} at the peak of the step instead of {said(self.need)}, activations "
            f"{said(after)} instead of {said(before)}: {len(self.let_go)} calls are not kept, computing them "
            f"again takes {100 * self.overhead:.1f} % of the step's time"
            + (f"; {said(moved)} are moved to the host and back beside it" if moved else "")
        )


@dataclass(frozen=True)
class StagedPlan:
    """A plan for each stage of a step that is cut, for one of its microbatches."""

    stages: tuple[Plan, ...]

    def __str__(self) -> str:
        return "\n".join(f"stage {i}: {plan}" for i, plan in enumerate(self.stages))


@dataclass(frozen=True)
class TrainingStep:
    """One training step of a program, and what there is to plan with.

    fixed     bytes of parameters and of the optimizer's state; of gradients, too, where there are several
              microbatches, which add up in them
    link      bytes a second to the host's memory, 0 where the step's memory is that
    flight    of how many microbatches at once there is what waits for backward
    carried   bytes of each of them besides the values of the step: what a stage has received
    """

    profile: Profile
    seconds: dict[int, float]
    fixed: int
    link: float = 0.0
    flight: int = 1
    carried: int = 0

    @classmethod
    def of(cls, program: Program, optimizer: str, found: Profile | None = None) -> TrainingStep:
        """Of the step at the sizes that the program was captured with, or with the profile at others."""
        found = found or profile(program)
        device = speed(program)
        return cls(found, device.seconds(found), found.state * (1 + STATES[optimizer]), device.link)

    @classmethod
    def of_stage(cls, program: Program, number: int, optimizer: str) -> TrainingStep:
        """Of one microbatch on a stage of a program that is cut."""
        part, stages = program.facts(parts)[number], program.stages
        assert stages is not None, "the program is cut"
        last = number == len(stages.begins)
        step = cls.of(part.program, optimizer, profile(part.program, loss=last))
        carried = sum(nbytes(part.program, part.program.placeholder(n.name)) for n in part.receives)
        step = replace(step, flight=stages.flight(number), carried=carried)
        if stages.microbatches == 1:
            return step
        grads = step.profile.grads
        return replace(step, profile=step.profile.without_gradients(), fixed=step.fixed + grads)

    @cached_property
    def whole(self) -> Replayed:
        """What it costs to keep everything."""
        return self.cost(Draft())

    def cost(self, draft: Draft) -> Replayed:
        """Of a draft, with what the other microbatches hold."""
        cost = replay(self.profile, draft, self.seconds)
        more = self.carried
        if self.flight > 1:
            found, values = lives(self.profile, draft), enumerate(self.profile.values)
            waits = sum(
                v.nbytes for i, v in values if (i in found.lowest or v.shown) and i not in draft.moved
            )
            more += (self.flight - 1) * (waits + self.carried)
        return replace(cost, peak=cost.peak + more, inner=cost.inner + more)

    def draft(self, planner: Planner, limit: int, exact: bool) -> Draft | None:
        """A draft that costs at most `limit`, by a planner of the step, which sees one microbatch alone."""
        make = planner.optimum if exact else planner.plan
        if self.flight == 1:
            return make(limit - self.carried)
        low, high, middle, best = 0, planner.need + 1, planner.need, None
        while high - low > planner.need // NEAR + 1:
            found = make(middle)
            if found is not None and self.bytes(found, planner) > limit:
                high = middle
            else:
                low, best = middle, found or best
            middle = (low + high) // 2
        return best

    def bytes(self, draft: Draft, planner: Planner) -> int:
        """What a planner's budget is one of: the peak, or that of activations alone."""
        cost = self.cost(draft)
        return cost.peak if planner.profile is self.profile else cost.inner

    @cached_property
    def planners(self) -> dict[bool, Planner]:
        """Those that there are already: what a planner finds out of a step serves all budgets."""
        return {}

    def planner(self, share: bool) -> Planner:
        """Plans for a peak, or where a share is asked for, for the peak of activations alone."""
        if share not in self.planners:
            found = self.profile.without_gradients() if share else self.profile
            self.planners[share] = Planner(found, self.seconds, self.link)
        return self.planners[share]

    def planned(self, draft: Draft) -> Plan:
        """A draft with what it costs."""
        cost, values = self.cost(draft), self.profile.values

        def rows(numbers: Iterable[int]) -> dict[str, int]:
            found = dict[str, int]()
            for value in (values[n] for n in sorted(numbers)):
                if value.needed:
                    call = self.profile.calls[value.made].name
                    found[call] = found.get(call, 0) + value.nbytes
            return found

        return Plan(
            write(self.profile, draft), self.fixed + self.whole.peak, self.fixed + cost.peak,
            (self.whole.inner, cost.inner), cost.seconds / (FORWARDS * sum(self.seconds.values()) or 1.0),
            cost.flops, rows(draft.dropped), rows(draft.moved),
        )  # fmt: skip


def largest(steps: Iterable[TrainingStep]) -> int:
    """Bytes of activations of the stage that needs most, of which a share is one for all stages."""
    return max(step.whole.inner for step in steps)


def said(nbytes: float) -> str:
    """Bytes with a binary unit."""
    unit = min(int(math.log2(max(nbytes, 1)) // 10), 3)
    return f"{nbytes / 2 ** (10 * unit):.{2 if unit else 0}f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def unit(most: float) -> tuple[int, str]:
    """The binary unit of a chart that goes up to so many bytes, and its name."""
    return (2**20, "MiB") if most < 2**32 else (2**30, "GiB")


def read(budget: str | float) -> tuple[float, bool]:
    """The number of a budget, and whether it is one of bytes; OptionError where it is neither."""
    form = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", str(budget))
    if form is None or form[2] not in UNITS or (not form[2] and not 0 < float(form[1]) <= 1):
        raise OptionError(
            f"budget is {budget!r}, expected bytes or a share of the activation memory from 0 to 1",
            'as budget="6GiB" or budget="0.4"',
        )
    return float(form[1]) * UNITS[form[2]], bool(form[2])


@register
class Checkpoint(Pass):
    """Activations are kept or computed again so that a training step fits into a budget of memory.

    budget         "6GiB", the peak of the whole step: parameters, their gradients, the optimizer's state and
                   activations; or "0.4", the share of the activation memory of the step as it is (its peak
                   without those others). Where partition has cut the step, each stage keeps within the
                   budget; a share is one of what the stage needs that needs most
    max_overhead   in the place of a budget: the most to compute again, as a share of the time of forward and
                   backward; the smallest peak that it buys is taken
    optimizer      whose state counts: none, sgd, momentum, adam, adamw
    exact          the plan of least time there is, by an integer program, for steps of up to 60 calls: it
                   can take a minute, and takes scipy
    """

    name = "checkpoint"
    step = "schedule"
    numerics = "bitwise"
    serves = ("training",)

    budget: str | float | None = None
    max_overhead: float | None = None
    optimizer: str = "none"
    exact: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in STATES:
            raise OptionError(f"optimizer is {self.optimizer!r}, expected one of {', '.join(STATES)}")
        if (self.budget is None) == (self.max_overhead is None):
            raise OptionError("checkpoint takes a budget or max_overhead, one of the two", 'as budget="6GiB"')
        if self.exact and self.budget is None:
            raise OptionError("an exact plan is one for a budget", 'as budget="6GiB"')
        if self.budget is not None:
            read(self.budget)
        elif not isinstance(self.max_overhead, (int, float)) or not 0 <= self.max_overhead < math.inf:
            raise OptionError(f"max_overhead is {self.max_overhead!r}, expected a share from 0, as 0.1")

    def plan(self, program: Program) -> Plan | StagedPlan:
        if program.stages is None:
            return self.for_step(TrainingStep.of(program, self.optimizer))
        count = len(program.stages.begins) + 1
        steps = [TrainingStep.of_stage(program, i, self.optimizer) for i in range(count)]
        most = largest(steps)
        return StagedPlan(tuple(self._for_stage(i, step, most) for i, step in enumerate(steps)))

    def _for_stage(self, number: int, step: TrainingStep, most: int) -> Plan:
        try:
            return self.for_step(step, most)
        except OptionError as error:
            raise OptionError(f"of stage {number}, {error.message}", error.hint) from None

    def for_step(self, step: TrainingStep, most: int | None = None) -> Plan:
        """The plan of a step; OptionError where the budget cannot be kept.

        most    bytes of activations that a budget is a share of, those of the step if not said
        """
        return step.planned(self.drafted(step, most))

    def drafted(self, step: TrainingStep, most: int | None = None) -> Draft:
        """The same in numbers."""
        most = step.whole.inner if most is None else most
        if self.budget is None:
            spare = float(self.max_overhead or 0.0) * FORWARDS * sum(step.seconds.values())
            return step.planner(share=False).within(spare)
        amount, bytes_asked = read(self.budget)
        planner = step.planner(share=not bytes_asked)
        limit = amount - step.fixed if bytes_asked else amount * most
        found = step.draft(planner, int(limit), self.exact)
        if found is None:
            least = step.bytes(planner.within(math.inf), planner)
            smallest = said(step.fixed + least) if bytes_asked else f"{least / most:.3f}"
            raise OptionError(
                f"the budget of {self.budget} cannot be kept, the smallest that can is {smallest}",
                "a smaller batch or a shorter sequence takes less",
            )
        return found

    def pictures(self, program: Program) -> Iterator[Picture]:
        """Memory over the step, and what other budgets would cost: passes/_checkpoint_pictures.py."""
        from fxaccel.passes._checkpoint_pictures import pictures  # which plans by what is here

        return pictures(self, program)

    def study(self, program: Program, points: int) -> Any:
        """The plan for a program and so many others beside it: passes/_checkpoint_curve.py."""
        from fxaccel.passes._checkpoint_curve import study  # which plans by what is here

        return study(program, self, points)

    def apply(self, program: Program, plan: Plan | StagedPlan, driver: Any) -> None:
        plans = plan.stages if isinstance(plan, StagedPlan) else (plan,)
        schedules = tuple(one.schedule if one.let_go or one.moved else None for one in plans)
        if not any(schedules):
            driver.refused(program.graph.output_node(), str(plan))
            return
        if program.stages is None:
            (program.schedule,) = schedules
        else:
            program.stages = replace(program.stages, schedules=schedules)
            program.changed()
        nodes = {n.name: n for n in program.graph.nodes}
        for one in plans:
            for call, size in one.let_go.items():
                driver.applied(nodes[call], f"{said(size)} are computed again in backward")
            for call, size in one.moved.items():
                driver.applied(nodes[call], f"{said(size)} are moved to the host until backward")
