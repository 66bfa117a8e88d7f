"""What a schedule costs: one training step gone through by its profile, byte by byte.

A draft says which values autograd does not keep and which calls are made again at which point of backward.
`replay` finds how long each value lives under it, the peak of all that lives, and what is computed again;
`write` turns the draft into the Schedule that the emitted code follows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fxaccel.profile import Array, Profile
from fxaccel.schedule import HIDDEN, Again, Moved, Schedule

Programs = Mapping[int, Sequence[int]]
"""step -> the calls that are made again before its backward, in the order of the graph."""


class Journey(NamedTuple):
    """Of a value that is moved to the host.

    gone     the call of forward from which on its memory is free
    fetch    the call before whose backward the copy back begins
    """

    gone: int
    fetch: int


@dataclass(frozen=True)
class Draft:
    """A plan in numbers.

    dropped    values that autograd does not keep
    again      what is computed in their place
    moved      values that lie in the host's memory between forward and backward
    waits      seconds that the step waits for copies
    """

    dropped: frozenset[int] = frozenset()
    again: Programs = field(default_factory=dict)
    moved: Mapping[int, Journey] = field(default_factory=dict)
    waits: float = 0.0


@dataclass(frozen=True)
class Replayed:
    """What a draft costs.

    peak       the most bytes that live at once, parameters and buffers left out
    inner      the same without the gradients of parameters
    flops, seconds    of what is computed again; seconds with what the step waits for copies
    """

    peak: int
    inner: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Lives:
    """How long values live under a draft.

    lowest    value -> the step whose backward is the last to read what autograd or a program keeps of it
    held      step -> (value, until): what its program leaves behind
    """

    lowest: dict[int, int]
    held: dict[int, list[tuple[int, int]]]


def lives(profile: Profile, draft: Draft) -> Lives:
    """Who reads what in backward, and until when it is kept."""
    values, calls, of = profile.values, profile.calls, profile.columns
    kept = of.first < of.size
    kept[list(draft.dropped)] = False
    lowest: dict[int, int] = dict(zip(np.flatnonzero(kept).tolist(), of.first[kept].tolist(), strict=True))
    held: dict[int, list[tuple[int, int]]] = {}
    until: dict[int, int] = {}  # dropped value -> the lowest step that reads what is computed next above it
    needs = needed(profile, draft.dropped)
    for step in sorted({*needs, *draft.again}):
        for number in needs.get(step, ()):
            until.setdefault(number, step)
        program = draft.again.get(step)
        if program is None:
            continue
        made = {v for c in program for v in results(profile, c) if v in draft.dropped}
        held[step] = [(v, until.pop(v)) for v in sorted(made) if v in until]
        read = {v for c in program for v in calls[c].reads} - made
        for number in read & draft.dropped:
            until.setdefault(number, step)
        lowest |= {v: min(step, lowest.get(v, step)) for v in read - draft.dropped}
    if until:
        number, step = next(iter(until.items()))
        raise ValueError(f"{values[number].name} is read before {calls[step].name} and never computed again")
    return Lives(lowest, held)


def needed(profile: Profile, dropped: Collection[int]) -> dict[int, list[int]]:
    """step -> the dropped values that its backward reads."""
    needs: dict[int, list[int]] = {}
    for number in dropped:
        for step in profile.values[number].needed:
            needs.setdefault(step, []).append(number)
    return needs


def results(profile: Profile, call: int) -> list[int]:
    """The values that a call makes, with what it hides."""
    one = profile.calls[call]
    return one.makes if one.hides is None else [*one.makes, one.hides]


@dataclass(frozen=True)
class Course:
    """The most bytes that live at each step, while it runs forward, computes again, and runs backward.

    forward, again, backward    by step; 0 where there is no call, or nothing is computed again
    """

    forward: Array
    again: Array
    backward: Array
    found: Lives


def course(profile: Profile, draft: Draft) -> Course:
    """What a draft takes, step by step."""
    of, found = profile.columns, lives(profile, draft)
    top = of.size - 1
    low = np.full(len(of.made), of.size)
    low[list(found.lowest)] = list(found.lowest.values())
    last, high = np.where(of.shown | (low < of.size), top, of.last), np.full(len(low), top)
    low[of.shown] = 0
    for number, journey in draft.moved.items():
        last[number], high[number] = journey
    live = np.zeros((2, of.size + 2), np.int64)  # in forward and in backward, as differences
    for line, begin, end in ((live[0], of.made + 1, last + 1), (live[1], low, high + 1)):
        np.add.at(line, begin, of.nbytes)
        np.subtract.at(line, end, of.nbytes)
    most, left = np.zeros((2, of.size), np.int64)
    for step, held in found.held.items():
        for number, until in held:  # from after the program to the backward of `until`
            live[1, until] += of.nbytes[number]
            live[1, step] -= of.nbytes[number]
        most[step], left[step] = program_bytes(profile, draft.again[step], {v for v, _ in held})
    forward, backward = np.cumsum(live, axis=1)[:, : of.size]
    again = np.where(np.isin(np.arange(of.size), [*found.held]), backward + most + of.rest, 0)
    ran, returned = np.where(of.called, (forward + of.takes, backward + left + of.surge), 0)
    return Course(ran, again, returned, found)


def replay(profile: Profile, draft: Draft, seconds: Mapping[int, float] | None = None) -> Replayed:
    """The cost of a draft; seconds: of each call."""
    calls, grads, found = profile.calls, profile.columns.grads, course(profile, draft)
    moments = np.maximum(found.again, found.backward)
    peak, inner = (max(found.forward.max(), (moments - less).max()) for less in (0, grads))
    flops = sum(calls[c].flops for program in draft.again.values() for c in program)
    return Replayed(int(peak), int(inner), flops, spent(draft, seconds) if seconds else draft.waits)


def spent(draft: Draft, seconds: Mapping[int, float]) -> float:
    """Seconds of what is computed again, and of what the step waits for."""
    return draft.waits + sum(seconds[c] for program in draft.again.values() for c in program)


def program_bytes(profile: Profile, program: Sequence[int], held: Collection[int]) -> tuple[int, int]:
    """The most bytes that computing these calls takes, and those of the values that it leaves behind."""
    values = profile.values
    last = {v: c for c in program for v in profile.calls[c].reads}
    live = most = 0
    dead: dict[int, int] = {}
    for call in program:
        one = profile.calls[call]
        most = max(most, live + one.takes)
        for number in results(profile, call) if one.hides in held else one.makes:
            live += values[number].nbytes
            if number not in held:
                until = max(last.get(number, call), call)
                dead[until] = dead.get(until, 0) + values[number].nbytes
        most = max(most, live)
        live -= dead.pop(call, 0)
    return most, sum(values[v].nbytes for v in held)


def lazily(profile: Profile, dropped: Collection[int], held: Mapping[int, int] | None = None) -> Draft:
    """The draft that computes every dropped value when it is first needed.

    held    value -> the last step whose program leaves it behind for others; what is computed for a later
            one is let go, and computed again when backward comes there. None where all is left behind
    """
    values, calls = profile.values, profile.calls
    ready = set[int]()
    again: dict[int, list[int]] = {}
    needs = needed(profile, dropped)
    for step in sorted(needs, reverse=True):
        wanted = [v for v in needs[step] if v not in ready]
        program = set[int]()
        while wanted:
            call = values[wanted.pop()].made
            if call not in program:
                program.add(call)
                wanted += [v for v in calls[call].reads if v in dropped and v not in ready]
        if program:
            again[step] = sorted(program)
            made = (v for c in program for v in results(profile, c) if v in dropped)
            ready.update(v for v in made if held is None or step <= held.get(v, -1))
    return Draft(frozenset(dropped), again)


def write(profile: Profile, draft: Draft) -> Schedule:
    """The schedule that the emitted code follows, by the names of nodes."""
    values, calls, found = profile.values, profile.calls, lives(profile, draft)
    order = {n: i for i, n in enumerate(profile.roots)}
    again = []
    for step in sorted(draft.again, reverse=True):
        made = {v for c in draft.again[step] for v in results(profile, c)}
        names: set[str] = set()
        wanted = [calls[c].name for c in draft.again[step]]
        wanted += [values[v].name for v, _ in found.held[step] if not values[v].name.endswith(HIDDEN)]
        while wanted:
            name = wanted.pop()
            if name in names:
                continue
            names.add(name)
            for read in profile.inputs[name]:
                gone = [v for v in profile.roots.get(read, ()) if v in draft.dropped or v in draft.moved]
                if any(v in made or values[v].name != read for v in gone):  # else a slot holds it
                    wanted.append(read)
        held = tuple((values[v].name, calls[until].name) for v, until in found.held[step])
        again.append(Again(calls[step].name, tuple(sorted(names, key=order.__getitem__)), held))
    dropped = tuple(values[v].name for v in sorted(draft.dropped))
    moved = (
        Moved(values[v].name, calls[one.fetch].name, calls[found.lowest[v]].name)
        for v, one in sorted(draft.moved.items())
    )
    return Schedule(dropped, tuple(again), tuple(moved))
