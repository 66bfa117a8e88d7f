"""When values go to the host's memory and come back, beside what a step computes: a timeline.

Copies out are made one after the other, each from the first call on that has autograd save the value; so are
copies back, each as late as it can be to be there in time. Both are beside forward and backward, and cost
time only where these have to wait: for a copy out, so that its memory can be used again, or for the first
value to come back.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from fxaccel.offload import STEPS
from fxaccel.profile import Profile
from fxaccel.replay import Draft, Journey
from fxaccel.roofline import BACKWARD
from fxaccel.schedule import HIDDEN

LEAST = 2**20  # bytes that are worth a copy


def movable(profile: Profile) -> set[int]:
    """Values that can be moved: large ones with a name, which autograd saves and the caller is not given."""
    values = enumerate(profile.values)
    return {
        n for n, v in values
        if v.nbytes >= LEAST and v.needed and not v.shown and not v.name.endswith(HIDDEN)
    }  # fmt: skip


def moving(
    profile: Profile, draft: Draft, values: Collection[int], seconds: Mapping[int, float], link: float
) -> Draft:
    """The draft with these values moved, over a link of so many bytes a second each way."""
    if not values:
        return draft
    gone, late = _out(profile, values, seconds, link)
    fetch, early = _back(profile, draft, values, seconds, link)
    moved = {v: Journey(gone[v], fetch[v]) for v in sorted(values)}
    return replace(draft, moved=moved, waits=late + early)


def _out(
    profile: Profile, values: Collection[int], seconds: Mapping[int, float], link: float
) -> tuple[dict[int, int], float]:
    """Value -> the call of forward behind which its memory is free; seconds that forward waits."""
    steps = list(profile.calls)
    saved = sorted((min(profile.values[v].needed), v) for v in values)
    ends, gone, now, free, waits = list[tuple[int, float]](), dict[int, int](), 0.0, 0.0, 0.0
    at = 0
    for step in steps:
        now += seconds[step]
        while at < len(saved) and saved[at][0] <= step:
            first, value = saved[at]
            free = max(free, now) + profile.values[value].nbytes / link
            due = bisect.bisect_left(steps, first + STEPS)
            until = steps[min(due, len(steps) - 1)]
            gone[value] = max(until, profile.values[value].read)
            ends.append((until, free))
            at += 1
        while ends and (ends[0][0] <= step or step == steps[-1]):
            _, end = ends.pop(0)
            waits += max(0.0, end - now)
            now = max(now, end)
    return gone, waits


def _back(
    profile: Profile, draft: Draft, values: Collection[int], seconds: Mapping[int, float], link: float
) -> tuple[dict[int, int], float]:
    """Value -> the call before whose backward its copy back begins; seconds that backward waits."""
    steps, starts, now = sorted(profile.calls, reverse=True), list[float](), 0.0
    for step in steps:
        starts.append(now)
        now += BACKWARD * seconds[step] + sum(seconds[c] for c in draft.again.get(step, ()))
    reads = dict(_first_reads(profile, draft, values))
    place = {step: i for i, step in enumerate(steps)}
    fetch, free = dict[int, int](), now
    for value in sorted(values, key=lambda v: reads[v]):  # the last to be read first
        free = min(free, starts[place[reads[value]]]) - profile.values[value].nbytes / link
        fetch[value] = steps[max(bisect.bisect_right(starts, free) - 1, 0)]
    return fetch, max(0.0, -free)


def _first_reads(profile: Profile, draft: Draft, values: Collection[int]) -> Iterator[tuple[int, int]]:
    """(value, the step whose backward, or what is computed before it, is the first to read it)."""
    again: dict[int, int] = {}
    for step, program in draft.again.items():
        for call in program:
            for value in profile.calls[call].reads:
                again[value] = max(step, again.get(value, step))
    for value in values:
        yield value, max([*profile.values[value].needed, again.get(value, -1)])
