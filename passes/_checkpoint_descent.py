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

from fxaccel.passes._checkpoint_chain import Sketch
from fxaccel.passes._checkpoint_polish import worth
from fxaccel.profile import Profile
from fxaccel.replay import Course, Draft, Replayed, course, replay

EFFORT = 20_000  # calls gone through
FIRST = 12  # values whose changes are tried together, those that promise most first
SHARE = 50  # of the peak, the one part of so many that each round is to take away


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
        now, draft = self.gone(self.sketch)
        while self.left > 0:
            peak = _peak(now)
            for aim in (peak - peak // SHARE - 1, peak - 1):
                found = self.below(aim, self.sketch, now, draft)
                if found is not None:
                    break
            if found is None:
                return
            self.sketch, now, draft = found
            self.trail.append((self.sketch, replay(self.profile, draft, self.seconds)))

    def gone(self, sketch: Sketch) -> tuple[Course, Draft]:
        """A sketch, step by step."""
        self.left -= 1
        draft = self.draft(sketch)
        return course(self.profile, draft), draft

    def below(
        self, aim: int, sketch: Sketch, now: Course, draft: Draft
    ) -> tuple[Sketch, Course, Draft] | None:
        """A sketch whose peak is at most `aim`, by change after change that lowers what is above it."""
        spent = self.spent(draft)
        over = _over(now, aim)
        while over:
            best: tuple[float, Sketch, Course, Draft] | None = None
            for number, value in enumerate(self.promising(aim, sketch, now, draft)):
                if self.left <= 0 or (best is not None and number >= FIRST):
                    break
                for way in self.ways(sketch, value):
                    found, made = self.gone(way)
                    less, more = over - _over(found, aim), self.spent(made) - spent
                    rate = less / more if more > 0 else math.inf
                    if less > 0 and spent + more < self.most and (best is None or rate > best[0]):
                        best = rate, way, found, made
            if best is None:
                return None
            _, sketch, now, draft = best
            over, spent = _over(now, aim), self.spent(draft)
        return sketch, now, draft

    def within(self, budget: int) -> Sketch:
        """A sketch of less time within a budget: from one on, by changes that save time, and their repair."""
        _, draft = self.gone(self.sketch)
        while self.left > 0:
            self.most = self.spent(draft)
            ways = (way for value in self.worth for way in self.ways(self.sketch, value))
            tried = [(way, *self.gone(way)) for way in itertools.takewhile(lambda _: self.left > 0, ways)]
            saving = [one for one in tried if self.spent(one[2]) < self.most]
            saving.sort(key=lambda one: self.spent(one[2]))
            fitting = (self.below(budget, *one) for one in saving)
            found = next((one for one in fitting if one is not None), None)
            if found is None:
                break
            self.sketch, _, draft = found
        return self.sketch

    def spent(self, draft: Draft) -> float:
        """Seconds of what is computed again, and of waiting for copies."""
        return draft.waits + sum(self.seconds[c] for program in draft.again.values() for c in program)

    def ways(self, sketch: Sketch, value: int) -> Iterator[Sketch]:
        """What else may become of a value."""
        if value in sketch.dropped:
            yield replace(sketch, dropped=sketch.dropped - {value})
        for until in {-1, self.top, *self.profile.values[value].needed}:
            if value not in sketch.dropped or until != sketch.held.get(value, -1):
                dropped = sketch.dropped | {value}
                yield replace(sketch, dropped=dropped, held={**sketch.held, value: until})

    def promising(self, aim: int, sketch: Sketch, now: Course, draft: Draft) -> list[int]:
        """Values that lie above the aim, or whose making does, by bytes a second."""
        forward = sorted(i for i, n in now.forward.items() if n > aim)
        again = {i for i, n in now.again.items() if n > aim}
        backward = sorted({*again, *(i for i, n in now.backward.items() if n > aim)})
        times: dict[int, int] = {}
        for number in self.worth:
            value = self.profile.values[number]
            if number not in sketch.dropped:
                beyond = len(forward) - bisect_right(forward, max(value.read, value.made))
                times[number] = (
                    beyond + len(backward) - bisect_left(backward, now.found.lowest.get(number, 0))
                )
        for step, held in now.found.held.items():
            for number, until in held:
                times[number] = times.get(number, 0) + _between(backward, until, step)
        for step in again:
            for call in draft.again[step]:
                for number in self.profile.calls[call].makes:
                    times[number] = times.get(number, 0) + 1
        return sorted((v for v in self.worth if times.get(v)), key=lambda v: -times[v] * self.rate(v))

    def rate(self, number: int) -> float:
        """Bytes of a value for a second of the call that makes it."""
        value = self.profile.values[number]
        return value.nbytes / max(self.seconds[value.made], 1e-12)


def _peak(now: Course) -> int:
    return max(max(one.values(), default=0) for one in (now.forward, now.again, now.backward))


def _over(now: Course, aim: int) -> int:
    """Bytes above the aim, of all moments together."""
    moments = (now.forward, now.again, now.backward)
    return sum(n - aim for one in moments for n in one.values() if n > aim)


def _between(steps: list[int], low: int, high: int) -> int:
    """How many of them lie from `low` to `high`."""
    return bisect_right(steps, high) - bisect_left(steps, low)
