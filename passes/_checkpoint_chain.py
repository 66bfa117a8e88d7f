"""Ways along the parts of a step: which option each part takes, and where runs of them keep less.

What the parts before keep is there while a part's backward runs, beside what that takes itself. A run of
parts may keep nothing but its beginning. Backward then goes through it again from there, within the bytes
that are free: it keeps the boundary before a later part, goes on from that by the same rule, and comes back
to what lies before it; or keeps an option of its first part, and goes on behind that. So runs lie in runs.

Source     Griewank & Walther 2000, "Algorithm 799: revolve"; with options of different times and sizes:
           Beaumont et al. 2019, "Optimal checkpointing for heterogeneous chains", arXiv:1911.13214.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fxaccel.passes._checkpoint_parts import Option, droppable, parts
from fxaccel.profile import Profile
from fxaccel.replay import Draft, lazily

UNITS = 1000  # of bytes, of which a step takes so many if all is kept: the table of runs counts in them
STATES = 300  # kept at a cut while the shortest path is searched
RUNS = 32  # parts in a run, at the most

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Move:
    """From one cut to a later one.

    start, end    the parts between them
    option        what the part keeps, where it is one; None for a run, which keeps its beginning alone
    """

    start: int
    end: int
    option: Option | None


@dataclass(frozen=True)
class Sketch:
    """What backward does not find.

    dropped    values that are computed again
    held       value -> the last step of which it is left behind for others when it has been computed
    moved      values that come back from the host
    """

    dropped: frozenset[int]
    held: Mapping[int, int]
    moved: frozenset[int] = frozenset()


class Chain:
    """The parts of a step, cut so that each has at least so many calls.

    need    bytes that the step takes if all is kept
    """

    def __init__(self, profile: Profile, seconds: Mapping[int, float], least: int, need: int) -> None:
        self.profile, self.unit = profile, max(need / UNITS, 1.0)
        self.parts = parts(profile, seconds, least)
        self.home = {v: i for i, part in enumerate(self.parts) for v in part.values}
        self.shown = sum(part.shown for part in self.parts)
        self.spans = dict(self._spans())
        many = len(self.parts)
        table = np.zeros((many + 1, many + 1), dtype=np.int64)
        for value, (maker, reader) in self.spans.items():
            table[maker + 1, reader + 1] += profile.values[value].nbytes
        self.sums = table.cumsum(0).cumsum(1)

    def _spans(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Values that cross cuts: the part that makes each, and the last that reads it."""
        starts = [part.calls[0] for part in self.parts]
        for maker, part in enumerate(self.parts):
            for one in part.crossing:
                value = part.values[one]
                yield value, (maker, bisect.bisect_right(starts, self.profile.values[value].read) - 1)

    @cached_property
    def long(self) -> int:
        """Bytes of values that cross more than one cut."""
        values = self.profile.values
        return sum(values[v].nbytes for v, (maker, reader) in self.spans.items() if reader > maker + 1)

    def crossing(self, start: int, cut: int, end: int) -> int:
        """Bytes that parts from `start` to `cut` make, and that those from `cut` to `end` read last."""
        s = self.sums
        return int(s[cut, end] - s[start, end] - s[cut, cut] + s[start, cut])

    # -- runs -------------------------------------------------------------------------------------

    @cached_property
    def runs(self) -> dict[tuple[int, int], tuple[Array, Array]]:
        """(first, last) -> seconds of its backward from its beginning, by free units, and the choice made.

        A choice below 0 is an option of the first part, -1 the first one; above 0 it is the part before
        which the boundary is kept.
        """
        found: dict[tuple[int, int], tuple[Array, Array]] = {}
        many = len(self.parts)
        for first in range(many - 1, -1, -1):
            found[first, first] = self._alone(first)
            for last in range(first + 1, min(many, first + RUNS)):
                found[first, last] = self._run(found, first, last)
                if found[first, last][0][-1] == math.inf:
                    break
        return found

    def units(self, nbytes: float) -> int:
        """As many as these bytes take."""
        return math.ceil(nbytes / self.unit - 1e-9)

    def _alone(self, at: int) -> tuple[Array, Array]:
        part, cost = self.parts[at], np.full(UNITS + 1, math.inf)
        cost[max(self.units(part.bare.peak - part.shown + self.shown), 0) :] = part.bare.seconds
        return cost, np.zeros(UNITS + 1, dtype=np.int32)

    def _run(
        self, runs: Mapping[tuple[int, int], tuple[Array, Array]], first: int, last: int
    ) -> tuple[Array, Array]:
        """The best of all first steps into a run."""
        cost, choice = np.full(UNITS + 1, math.inf), np.zeros(UNITS + 1, dtype=np.int32)
        part, ahead = self.parts[first], self.shown + self.parts[last].rest

        def choose(number: int, held: int, most: int, after: int, seconds: float | Array) -> None:
            """Keep `held` bytes while the run from `after` on is gone through, and then do the rest."""
            if (after, last) not in runs:
                return
            shift = self.units(held)
            low = max(self.units(most), shift, 0)
            if low > UNITS:
                return
            later = runs[after, last][0][low - shift : UNITS + 1 - shift]
            all_in_all = later + (seconds if isinstance(seconds, float) else seconds[low:])
            better = all_in_all < cost[low:]
            cost[low:][better] = all_in_all[better]
            choice[low:][better] = number

        bound = self.crossing(first, first + 1, last + 1)
        for number, option in enumerate(part.options):
            most = max(option.peak - part.shown + self.shown, part.transit + ahead)
            choose(-1 - number, option.nbytes + bound, most, first + 1, option.forward + option.seconds)
        forward, most = part.bare.forward, part.transit
        for cut in range(first + 2, last + 1):
            passed = self.parts[cut - 1]
            forward += passed.bare.forward
            most = max(most, passed.transit + self.crossing(first, cut - 1, len(self.parts)))
            if (first, cut - 1) in runs:
                before = runs[first, cut - 1][0] + forward
                choose(cut, self.crossing(first, cut, last + 1), most + ahead, cut, before)
        return cost, choice

    # -- the way along the parts ------------------------------------------------------------------

    def way(self, budget: int) -> list[tuple[Move, int]] | None:
        """The least to compute again with a peak of at most `budget`; each move with its free units."""
        many = len(self.parts)
        fronts = [_Front() for _ in range(many + 1)]
        fronts[0].add(np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1, dtype=np.int64), None)
        for start in range(many):
            front = fronts[start].thinned()
            for move, nbytes, seconds in self._moves(start, budget, front.nbytes):
                fits = np.nonzero(seconds < math.inf)[0]
                if len(fits):
                    more = front.nbytes[fits] + nbytes, front.seconds[fits] + seconds[fits]
                    fronts[move.end].add(*more, fits, move)
        last = fronts[-1].thinned()
        if not len(last.nbytes):
            return None
        moves, at, cut = list[tuple[Move, int]](), len(last.nbytes) - 1, many  # the last takes least
        while cut:
            move, at = fronts[cut].before(at)
            cut = move.start
            moves.append((move, int(self._free(budget, fronts[cut].nbytes[at], move))))
        return moves[::-1]

    def _free(self, budget: int, kept: Any, move: Move) -> Any:
        """Units that a run may fill: values that it makes and that go beyond it stay."""
        long = self.crossing(move.start, move.end - 1, len(self.parts)) - self.crossing(
            move.start, move.end - 1, move.end
        )
        return np.floor((budget - kept - long) / self.unit + 1e-9)

    def _moves(self, start: int, budget: int, kept: Array) -> Iterator[tuple[Move, int, Array]]:
        """All moves from a cut: the bytes that each keeps, and its seconds by what is kept before it."""
        many, part = len(self.parts), self.parts[start]
        bound = self.crossing(start, start + 1, many)
        for option in part.options:
            room = budget - self.shown + part.shown - option.peak
            seconds = np.where(kept <= room, option.seconds, math.inf)
            yield Move(start, start + 1, option), option.nbytes + bound, seconds
        for last in range(start + 1, min(many, start + RUNS)):
            if (start, last) not in self.runs:
                return
            move = Move(start, last + 1, None)
            free = self._free(budget, kept, move)
            table = self.runs[start, last][0]
            seconds = np.where(free < 0, math.inf, table[np.clip(free, 0, UNITS).astype(np.int64)])
            yield move, self.crossing(start, last + 1, many), seconds

    def sketch(self, moves: Sequence[tuple[Move, int]]) -> Sketch:
        """What a way lets go."""
        kept, posts = set[int](), dict[int, int]()
        for move, free in moves:
            beyond = ((v, span) for v, span in self.spans.items() if move.start <= span[0] < move.end)
            kept.update(v for v, (_, reader) in beyond if reader >= move.end)
            if move.option is not None:
                kept.update(self.parts[move.start].values[v] for v in move.option.kept)
            else:
                self._trace(move.start, move.end - 1, min(free, UNITS), posts)
        last = {v: max(place, posts.get(v, -1)) for v, place in self.home.items()}
        held = {v: self.parts[place].calls[-1] for v, place in last.items()}
        return Sketch(frozenset(droppable(self.profile) - kept), held)

    def draft(self, sketch: Sketch) -> Draft:
        """With what is computed when."""
        return lazily(self.profile, sketch.dropped, sketch.held)

    def _trace(self, first: int, last: int, free: int, posts: dict[int, int]) -> None:
        """What a run holds while backward is in it: value -> the last part from which on."""
        if first == last:
            return
        choice = int(self.runs[first, last][1][free])
        cut = choice if choice > 0 else first + 1
        held = self.crossing(first, cut, last + 1)
        for value, (maker, reader) in self.spans.items():
            if first <= maker < cut <= reader <= last:
                posts[value] = max(last, posts.get(value, -1))
        if choice < 0:
            part, option = self.parts[first], self.parts[first].options[-1 - choice]
            posts.update(dict.fromkeys((part.values[v] for v in option.kept), last))
            held += option.nbytes
        self._trace(cut, last, free - self.units(held), posts)
        if choice > 0:
            self._trace(first, cut - 1, free, posts)


class _Front:
    """The ways up to a cut of which none keeps fewer bytes in less time: kept bytes rise, seconds fall."""

    def __init__(self) -> None:
        self.arrived: list[tuple[Array, Array, Array]] = []
        self.moves: list[Move | None] = []
        self.nbytes = self.seconds = self.origin = self.move = np.empty(0)

    def add(self, nbytes: Array, seconds: Array, origin: Array, move: Move | None) -> None:
        """Ways by one move, from the ways of these numbers at its beginning."""
        self.arrived.append((nbytes, seconds, origin))
        self.moves.append(move)

    def thinned(self) -> _Front:
        """Itself, with those ways alone, evenly thinned to STATES."""
        if not self.arrived:
            return self
        nbytes, seconds, origin = (np.concatenate(column) for column in zip(*self.arrived, strict=True))
        move = np.repeat(np.arange(len(self.arrived)), [len(one[0]) for one in self.arrived])
        order = np.lexsort((seconds, nbytes))
        least = np.minimum.accumulate(seconds[order])
        best = order[np.concatenate([[True], seconds[order][1:] < least[:-1]])]
        if len(best) > STATES:
            best = best[np.linspace(0, len(best) - 1, STATES).round().astype(np.int64)]
        self.nbytes, self.seconds, self.origin, self.move = (a[best] for a in (nbytes, seconds, origin, move))
        return self

    def before(self, at: int) -> tuple[Move, int]:
        """The move by which a way has come, and its number where it came from."""
        move = self.moves[int(self.move[at])]
        assert move is not None, "the first cut has no move"
        return move, int(self.origin[at])
