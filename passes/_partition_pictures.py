"""What partition shows in a page: a step of the pipeline, gone through by the simulator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fxaccel import svg
from fxaccel.errors import OptionError
from fxaccel.ir import Program
from fxaccel.passes._partition_costs import costs
from fxaccel.passes._partition_plan import Step, cut
from fxaccel.passes.checkpoint import said, unit
from fxaccel.passes.partition import Partition
from fxaccel.picture import Picture
from fxaccel.pipeline import orders, timeline
from fxaccel.pipeline.simulator import Simulated, simulate
from fxaccel.profile import profile
from fxaccel.roofline import speed


def pictures(one: Partition, program: Program) -> Iterator[Picture]:
    """The timeline and the memory of the ranks, for the stages that the program has."""
    if program.stages is None:
        return
    again = any(program.stages.schedules)
    bare = replace(program, stages=None, _facts={})
    found = _simulated(one, bare, program.stages.begins)
    if found is None:
        yield Picture("Timeline of the pipeline", "", ["This graph is cut otherwise here now."])
        return
    lines = [
        f"{found.order.schedule}: {1e3 * found.seconds:.4g} ms a step, bubble {100 * found.bubble:.1f} %, "
        f"{said(sum(found.sent.values()))} sent. Computed: each call takes what its FLOPs or bytes take."
    ]
    lines += ["What is computed again in backward is not in it."] * again
    yield Picture("Timeline of the pipeline", timeline.drawn(found), lines)
    if not again:
        yield _memory(found)


def _simulated(one: Partition, program: Program, begins: tuple[str, ...]) -> Simulated | None:
    """A step in these stages; None where the cut at these places is another."""
    options: Any = one  # of a dataclass that its decorator makes
    same, terms = replace(options, at=begins, stages=len(begins) + 1), one.terms()
    known = profile(program)
    step = Step(program, known, speed(program).seconds(known))
    try:
        found = cut(step, terms, same.named)
    except OptionError:
        return None
    if tuple(calls[0].name for calls in found.stages()[1:]) != begins:
        return None
    chunks = one.chunks or (2 if orders.named(one.schedule) in orders.TWO else 1)
    order = orders.order(one.schedule, terms.stages // chunks, one.microbatches, chunks)
    return simulate(order, costs(step, terms, found, order), terms.link)


def _memory(found: Simulated) -> Picture:
    """What each rank holds over time."""
    size, word = unit(max(found.peaks))
    time, name = (1e3, "ms") if found.seconds < 1 else (1.0, "s")
    series = []
    for rank, steps in enumerate(found.memory):
        points, before = list[tuple[float, float]](), 0.0
        for at, nbytes in steps:
            points += [(time * at, before), (time * at, nbytes / size)]
            before = nbytes / size
        points.append((time * found.seconds, before))
        series.append(svg.Series(("is", "third", "was")[rank % 3], f"rank {rank}", points[1:]))
    drawn = svg.chart(series, f"{name} of the step", f"{word} in use")
    peaks = ", ".join(f"rank {r} {said(p)}" for r, p in enumerate(found.peaks))
    return Picture("Memory of the ranks", drawn, [f"At most: {peaks}."])
