"""Sketches of lower peaks than any way along the parts has: values let go wherever they are in the way.

What crosses a cut between parts is kept by every way along them, which is much where skips are long. Here
the whole step is gone through for each change, downwards: what a value takes at the steps that peak, against
the seconds that it costs to do without it there. A value may be let go, kept for what needs it to be computed
again, or be held for a shorter or longer time once it has been computed.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fxaccel.passes._checkpoint_chain import Sketch
from fxaccel.passes._checkpoint_polish import worth
from fxaccel.profile import Profile
from fxaccel.replay import Course, Draft, Replayed, course, replay, spent

EFFORT = 20_000  # calls gone through
FIRST = 12  # values whose changes are tried together, those that promise most first
SHARE = 50  # of the peak, the one part of so many that each round is to take away


class Gone(NamedTuple):
    """A sketch that has been gone through, and the seconds that it takes."""

    sketch: Sketch
    draft: Draft
    spent: float
    course: Course


class Descent:
    """Goes down from a sketch.

    draft    of a sketch;  most: seconds that none may take
    trail    the sketches on the way, each of a lower peak than the one before, with what it costs
    """

    def __init__(
        self, profile: Profile, seconds: Mapping[int, float], sketch: Sketch, draft: Callable[[Sketch], Draft]
    ) -> None:
        self.profile, self.seconds, self.sketch, self.draft = profile, seconds, sketch, draft
        self.most = math.inf
        self.left = EFFORT // max(len(profile.calls), 1)
        self.worth = sorted(set(worth(profile)) - sketch.moved)
        self.top = max(profile.calls, default=0)
        self.trail: list[tuple[Sketch, Replayed]] = []

    def run(self) -> None:
        """Go down until nothing lowers the peak."""
        now = self.gone(self.sketch)
        while now is not None and self.left > 0:
            peak = _peak(now.course)
            aims = (peak - peak // SHARE - 1, peak - 1)
            now = next((found for aim in aims if (found := self.below(aim, now)) is not None), None)
            if now is not None:
                self.trail.append((now.sketch, replay(self.profile, now.draft, self.seconds)))

    def within(self, budget: int) -> Sketch:
        """A sketch of less time within a budget: from one on, by changes that save time, and their repair."""
        now = found = self.gone(self.sketch)
        while found is not None and self.left > 0:
            now, self.most = found, found.spent
            ways = (way for value in self.worth for way in self.ways(now.sketch, value))
            tried = (self.gone(way) for way in itertools.takewhile(lambda _: self.left > 0, ways))
            saving = sorted((one for one in tried if one is not None), key=lambda one: one.spent)
            fitting = (self.below(budget, one) for one in saving)
            found = next((one for one in fitting if one is not None), None)
        return self.sketch if now is None else now.sketch

    def gone(self, sketch: Sketch) -> Gone | None:
        """A sketch, step by step; None where it takes too long."""
        self.left -= 1
        draft = self.draft(sketch)
        seconds = spent(draft, self.seconds)
        return Gone(sketch, draft, seconds, course(self.profile, draft)) if seconds < self.most else None

    def below(self, aim: int, now: Gone) -> Gone | None:
        """A sketch whose peak is at most `aim`, by change after change that lowers what is above it."""
        while over := _over(now.course, aim):
            best: tuple[float, Gone] | None = None
            for number, value in enumerate(self.promising(aim, now)):
                if self.left <= 0 or (best is not None and number >= FIRST):
                    break
                for found in map(self.gone, self.ways(now.sketch, value)):
                    if found is None or (less := over - _over(found.course, aim)) <= 0:
                        continue
                    rate = less / (found.spent - now.spent) if found.spent > now.spent else math.inf
                    if best is None or rate > best[0]:
                        best = rate, found
            if best is None:
                return None
            now = best[1]
        return now

    def ways(self, sketch: Sketch, value: int) -> Iterator[Sketch]:
        """What else may become of a value."""
        if value in sketch.dropped:
            yield replace(sketch, dropped=sketch.dropped - {value})
        for until in {-1, self.top, *self.profile.values[value].needed}:
            if value not in sketch.dropped or until != sketch.held.get(value, -1):
                dropped = sketch.dropped | {value}
                yield replace(sketch, dropped=dropped, held={**sketch.held, value: until})

    def promising(self, aim: int, now: Gone) -> list[int]:
        """Values that lie above the aim, or whose making does, by bytes a second."""
        one = now.course
        forward, again = (np.flatnonzero(n > aim).tolist() for n in (one.forward, one.again))
        backward = np.flatnonzero(np.maximum(one.again, one.backward) > aim).tolist()
        times: dict[int, int] = {}
        for number in self.worth:
            value = self.profile.values[number]
            if number not in now.sketch.dropped:
                beyond = len(forward) - bisect_right(forward, max(value.read, value.made))
                times[number] = (
                    beyond + len(backward) - bisect_left(backward, one.found.lowest.get(number, 0))
                )
        for step, held in one.found.held.items():
            for number, until in held:
                times[number] = times.get(number, 0) + _between(backward, until, step)
        for step in again:
            for call in now.draft.again[step]:
                for number in self.profile.calls[call].makes:
                    times[number] = times.get(number, 0) + 1
        return sorted((v for v in self.worth if times.get(v)), key=lambda v: -times[v] * self.rate(v))

    def rate(self, number: int) -> float:
        """Bytes of a value for a second of the call that makes it."""
        value = self.profile.values[number]
        return value.nbytes / max(self.seconds[value.made], 1e-12)


def _peak(now: Course) -> int:
    return int(max(one.max() for one in (now.forward, now.again, now.backward)))


def _over(now: Course, aim: int) -> int:
    """Bytes above the aim, of all moments together."""
    return int(sum(np.maximum(one - aim, 0).sum() for one in (now.forward, now.again, now.backward)))


def _between(steps: list[int], low: int, high: int) -> int:
    """How many of them lie from `low` to `high`."""
    return bisect_right(steps, high) - bisect_left(steps, low)
