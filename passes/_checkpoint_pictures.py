"""What checkpoint shows in a page: memory over a step, as it was and as planned, and other budgets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from fxaccel import svg
from fxaccel.ir import Program
from fxaccel.passes._checkpoint_curve import baselines, curve
from fxaccel.passes.checkpoint import Checkpoint, TrainingStep, largest, read, said, unit
from fxaccel.picture import Picture
from fxaccel.replay import Draft, course, write
from fxaccel.schedule import Schedule

POINTS = 200  # on a line of memory, beyond which the highest of neighbours stands for them
BUDGETS = 6  # on the curve


def pictures(one: Checkpoint, program: Program) -> Iterator[Picture]:
    """Of the whole step, or of each stage."""
    if program.stages is None:
        step = TrainingStep.of(program, one.optimizer)
        if program.schedule is not None:  # else everything is kept, and the pass has said so
            draft = one.drafted(step)
            yield _memory(step, draft, program.schedule, "a training step")
            yield _budgets(one, step, draft)
        return
    steps = [TrainingStep.of_stage(program, i, one.optimizer) for i in range(len(program.stages.begins) + 1)]
    most = largest(steps)
    for number, step in enumerate(steps):
        schedule = program.stages.schedule(number)
        if schedule is not None:
            yield _memory(step, one.drafted(step, most), schedule, f"stage {number}, one microbatch")


def _memory(step: TrainingStep, draft: Draft, schedule: Schedule, name: str) -> Picture:
    """Over the step, as it was and as planned."""
    if write(step.profile, draft) != schedule:  # the constants of the device were measured again since
        return Picture(f"Memory of {name}", "", ["The plan of this graph is not what is planned here now."])
    size, word = unit(step.fixed + step.whole.peak)
    was, now = _line(step, Draft(), size), _line(step, draft, size)
    drawn = svg.chart(
        [svg.Series("was", "as it was", was), svg.Series("is", "as planned", now)],
        "calls of the step: forward, then backward", f"{word} in use",
    )  # fmt: skip
    plan = step.planned(draft)
    return Picture(
        f"Memory of {name}", drawn, [*str(plan).splitlines(), "Computed by going through the plan."]
    )


def _line(step: TrainingStep, draft: Draft, size: int) -> list[tuple[float, float]]:
    """(number of the call, most bytes in use in it), forward and then backward."""
    found = course(step.profile, draft)
    steps = sorted(step.profile.calls)
    alive = [*found.forward[steps], *np.maximum(found.again, found.backward)[steps[::-1]]]
    length = -(-len(alive) // POINTS) or 1
    ends = [*range(0, len(alive), length), len(alive)]
    return [(float(i), (step.fixed + max(alive[i:j])) / size) for i, j in pairwise(ends)]


def _budgets(one: Checkpoint, step: TrainingStep, draft: Draft) -> Picture:
    """Time over memory for other budgets, and where this plan is."""
    share = one.budget is not None and not read(one.budget)[1]
    planner = step.planner(share=share)
    size, word = unit(step.fixed + step.whole.peak)
    plan, others = step.planned(draft), baselines(step, planner)
    made = curve(step, planner, BUDGETS)
    if share:  # of the activations, which need not be largest where the whole is
        what, points, at = "activations", [p.activations for p in made], plan.activations[1]
    else:
        what, points, at = "peak", [p.peak for p in made], plan.peak
    line = [(n / size, 100 * p.overhead) for n, p in zip(points, made, strict=True)]
    drawn = svg.chart(
        [svg.Series("is", "other budgets", line),
         svg.Series("mark", "this plan", [(at / size, 100 * plan.overhead)])],
        f"{what} of the step, {word}", "computed again, % of the step", (0.98 * min(at, *points) / size, 0.0),
    )  # fmt: skip
    said_others = [f"{n}: {said(p.peak)}, {100 * p.overhead:.1f} % again" for n, p in others.items()]
    return Picture("What other budgets cost", drawn, ["; ".join(said_others)])
