"""A pipeline before anything runs: the schedule, the microbatches and the cut that take the least time.

For each schedule and each count of microbatches the step is profiled at the size of one microbatch, cut for
as many stages as the schedule has, and gone through by the simulator. A cut whose ranks lack memory is made
again with less room for each stage, by what was lacking.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fxaccel.errors import OptionError
from fxaccel.formulas import Sizes
from fxaccel.ir import Program
from fxaccel.passes._checkpoint_curve import batch as batch_of
from fxaccel.passes._partition_costs import costs
from fxaccel.passes._partition_plan import Cut, Step, Terms, cut
from fxaccel.passes.checkpoint import STATES, said
from fxaccel.passes.partition import Partition, Plan, planned
from fxaccel.pipeline import orders, timeline
from fxaccel.pipeline.balance import Scarce
from fxaccel.pipeline.choice import Candidate, Choice, candidates, choose, divisors
from fxaccel.pipeline.simulator import Link, Stage, simulate
from fxaccel.profile import profile
from fxaccel.roofline import speed

ROWS = 12  # of a table of what was tried
TRIES = 4  # cuts of one candidate with ever less room, of which the last has the least that can be


@dataclass(frozen=True)
class Asked:
    """What a pipeline is planned for.

    devices         ranks, each with one stage or several
    batch           of a step
    schedules       to choose from;  microbatches: counts to choose from
    memory          bytes of all devices, or of each
    """

    devices: int
    batch: int
    schedules: Sequence[str]
    microbatches: Sequence[int]
    memory: float | tuple[float, ...]
    link: Link
    optimizer: str

    @property
    def caps(self) -> tuple[float, ...]:
        """Bytes of each device."""
        return self.memory if isinstance(self.memory, tuple) else (self.memory,) * self.devices

    def __str__(self) -> str:
        each = " each" if isinstance(self.memory, float) else ""
        caps = self.caps[:1] if each else self.caps
        room = "" if math.inf in caps else f", {' and '.join(map(said, caps))}{each}"
        rate = self.link.bandwidth / 1e9
        link = "" if math.isinf(rate) else f", {rate:.4g} GB/s between them"
        return f"{self.devices} devices{room}{link}, a batch of {self.batch}"


class Pipeline:
    """A program in stages under any candidate, at what size of its microbatches whatever."""

    def __init__(self, program: Program, one: Partition, asked: Asked) -> None:
        self.program, self.one, self.asked = program, one, asked
        self.step = cache(self._step)
        self.cut = cache(self._cut)
        self.found: dict[Candidate, tuple[Step, Terms, Cut]] = {}

    def _step(self, size: int) -> Step:
        """The step of one microbatch."""
        program = sized(self.program, size)
        found = profile(program)
        return Step(program, found, speed(program).seconds(found))

    def _cut(self, size: int, terms: Terms) -> Cut:
        return cut(self.step(size), terms, self.one.named)

    def __call__(self, candidate: Candidate) -> Sequence[Stage]:
        """What its stages cost; what they are is kept."""
        many, size = candidate.microbatches, self.asked.batch // candidate.microbatches
        order = orders.order(candidate.schedule, candidate.ranks, many, candidate.chunks)
        count, caps, least = len(order.placement), self.asked.caps, math.inf
        free = Terms(
            count, (math.inf,) * count, self.asked.link, 1, STATES[self.asked.optimizer], (1,) * count, many
        )
        terms, stages = free, list[Stage]()
        rooms = caps
        for attempt in range(TRIES):
            found = self.within(size, terms)
            made = costs(self.step(size), terms, found, order)
            peaks = simulate(order, made, self.asked.link).peaks
            lacks = max(peak - cap for peak, cap in zip(peaks, caps, strict=True))
            if not stages or lacks < least:
                least, stages = lacks, made
                self.found[candidate] = self.step(size), replace(free, in_flight=order.in_flight()), found
            if lacks <= 0:
                break
            if attempt:
                rooms = tuple(0.0 if attempt == TRIES - 2 else max(room - lacks, 0.0) for room in rooms)
            memory = tuple(rooms[rank] / candidate.chunks for rank in order.placement)
            terms = replace(free, in_flight=order.in_flight(), memory=memory)
        return stages

    def within(self, size: int, terms: Terms) -> Cut:
        """The cut for these terms, or where none has so little room, that of the least that there is."""
        while True:
            try:
                return self.cut(size, terms)
            except Scarce as error:  # which does not count what several stages read until there is a cut
                terms = replace(terms, memory=tuple(m + max(math.ceil(error.lacks), 1) for m in terms.memory))

    def plan(self, candidate: Candidate) -> Plan:
        """Of one that has been asked for."""
        step, terms, found = self.found[candidate]
        return planned(step, terms, found)


def sized(program: Program, size: int) -> Program:
    """The program at another batch; its graph is shared, and with it what each stage makes again."""
    try:
        name = batch_of(program)
    except OptionError:
        return program  # of the one size that it takes
    sizes = Sizes(program)
    return replace(program, hints=sizes.all(sizes.point({name: size})) or {}, _facts=program._facts)


def captured(program: Program) -> tuple[int, bool]:
    """The batch of the example, and whether others are taken."""
    try:
        name = batch_of(program)
    except OptionError:
        first = next(iter(program.input_nodes()), None)
        shape: Any = first.meta["val"].shape if first is not None else ()
        return (int(shape[0]) if len(shape) else 1), False
    sizes = Sizes(program)
    return next(program.hints[s] for s, n in sizes.names.items() if n == name), True


def counts(program: Program, batch: int | None, microbatches: int | None) -> tuple[int, tuple[int, ...]]:
    """The batch, and the counts of microbatches that it can be cut into."""
    example, others = captured(program)
    batch = example if batch is None else batch
    found = divisors(batch)
    if not others:
        found = tuple(m for m in found if m * example == batch)
    if not found:
        raise OptionError(
            f"the step was captured for a batch of {example} alone, of which {batch} is no multiple",
            "capture with a batch of two or more, the first dimension of the first input",
        )
    if microbatches is not None and microbatches not in found:
        raise OptionError(
            f"a batch of {batch} cannot be cut into {microbatches} microbatches",
            f"expected one of {', '.join(map(str, found))}",
        )
    return batch, found if microbatches is None else (microbatches,)


@dataclass(frozen=True)
class Study:
    """A pipeline that was chosen, and what else was tried.

    plan      the stages of it, for one of its microbatches
    """

    asked: Asked
    plan: Plan
    choice: Choice

    @property
    def option(self) -> str:
        """The pass with the options that cut so."""
        one, asked = self.choice.candidate, self.asked
        caps = asked.caps[:1] if isinstance(asked.memory, float) else asked.caps
        options = {
            "stages": len(self.plan.stages), "microbatches": one.microbatches, "schedule": one.schedule,
            "chunks": one.chunks if one.chunks > 1 else None,
            "memory": None if math.inf in caps else "|".join(f"{cap / 2**20:.6g}MiB" for cap in caps),
            "bandwidth": None if math.isinf(asked.link.bandwidth) else f"{asked.link.bandwidth:g}",
            "optimizer": None if asked.optimizer == "none" else asked.optimizer,
        }  # fmt: skip
        return f"partition{{{','.join(f'{k}={v}' for k, v in options.items() if v is not None)}}}"

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        found, one = self.choice.simulated, self.choice.candidate
        yield str(self.asked)
        yield f"{one}: {_time(found.seconds)} a step, bubble {100 * found.bubble:.1f} %"
        yield ""
        yield str(self.plan)
        yield ""
        yield "rank  stages            busy        peak       sends"
        for rank, (busy, peak) in enumerate(zip(found.busy, found.peaks, strict=True)):
            stages = ", ".join(map(str, found.order.stages(rank)))
            sends = sum(n for (source, _), n in found.sent.items() if source == rank)
            share = 100 * busy / found.seconds if found.seconds else 0.0
            yield f"{rank:>4}  {stages:<12}{share:>8.1f} %{said(peak):>12}{said(sends):>12}"
        yield f"{said(sum(found.sent.values()))} are sent in a step"
        yield ""
        yield from self.tables()
        yield ""
        yield f"the pass that cuts it so: {self.option}"

    def tables(self) -> Iterator[str]:
        """What was tried, the fastest first, and what was not."""
        tried = sorted(self.choice.tried, key=lambda t: (not t.fits, t.seconds))
        yield f"{'tried':<60}{'a step':>12}{'peak':>12}"
        for one in tried[:ROWS]:
            room = "" if one.fits else "  does not fit"
            yield f"  {one.candidate!s:<58}{_time(one.seconds):>12}{said(max(one.peaks)):>12}{room}"
        if len(tried) > ROWS:
            others = sum(not t.fits for t in tried[ROWS:])
            yield f"  and {len(tried) - ROWS} more{f', of which {others} do not fit' if others else ''}"
        alike: dict[str, list[tuple[Candidate, str]]] = {}
        for candidate, why in self.choice.left_out:
            alike.setdefault(re.sub(r"\d+", "", why), []).append((candidate, why))
        for (candidate, why), *more in alike.values():
            yield f"left out: {candidate}{f' and {len(more)} more' if more else ''}: {why}"

    def to_json(self) -> str:
        """All of it, in seconds and bytes."""
        found = self.choice.simulated
        return json.dumps(
            {
                "schema": "fxaccel-pipeline/1", "devices": self.asked.devices, "batch": self.asked.batch,
                "memory": None if math.inf in self.asked.caps else self.asked.memory,
                **asdict(self.choice.candidate), "seconds": found.seconds, "bubble": found.bubble,
                "busy": found.busy, "peaks": found.peaks, "sent": sum(found.sent.values()),
                "placement": found.order.placement, "pass": self.option, "plan": asdict(self.plan),
                "tried": [asdict(t) for t in self.choice.tried],
                "left_out": [{**asdict(c), "why": why} for c, why in self.choice.left_out],
            },
            indent=2,
        )  # fmt: skip

    def draw(self, file: Path) -> None:
        """The timeline of a step, as a picture or as text."""
        timeline.write(self.choice.simulated, file)


def _time(seconds: float) -> str:
    return f"{seconds:.4g} s" if seconds >= 1 else f"{1e3 * seconds:.4g} ms"


def study(
    program: Program, one: Partition, batch: int | None, microbatches: int | None, schedule: str | None,
    latency: float,
) -> Study:  # fmt: skip
    """The pipeline for a program; raises OptionError where none can be had."""
    one.refuse_planned(program)
    plain: Any = one
    size, many = counts(program, batch, microbatches)
    terms = replace(plain, schedule="1F1B", chunks=None, microbatches=1).terms()
    caps: float | tuple[float, ...] = terms.memory if len(one.memories()) > 1 else terms.memory[0]
    schedules = orders.SCHEDULES if schedule is None else (orders.named(schedule),)
    asked = Asked(
        terms.stages, size, schedules, many, caps, replace(terms.link, latency=latency), one.optimizer
    )
    pipeline = Pipeline(program, one, asked)
    choice = choose(pipeline, list(candidates(asked.devices, many, schedules)), asked.memory, asked.link)
    return Study(asked, pipeline.plan(choice.candidate), choice)
