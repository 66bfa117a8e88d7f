"""The exact optimum of what to compute again within a peak, by an integer program.

It is the draft of least seconds whose peak, as `fxaccel.replay` counts it, is within a budget, of all drafts
there are: any values kept, any calls made again before any backward, each result held as long as a later
reader wants it. A value that is kept is kept until its last reader. Stages are the steps of backward; a value
that is let go within a stage is freed after its last reader there, which needs no binary of its own.

Source     Jain et al. 2020, "Checkmate", arXiv:1910.02653; solved by HiGHS through scipy, an optional extra.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fxaccel.errors import OptionError
from fxaccel.profile import Profile
from fxaccel.replay import Draft, needed, results


@dataclass(frozen=True)
class Optimum:
    """The best draft and its seconds; `exact` is False where time ran out, then `least` bounds them."""

    draft: Draft
    seconds: float
    least: float
    exact: bool = True


class Facts:
    """Values of a step by who makes, reads and needs them; `used` are those that there is a choice for."""

    def __init__(self, profile: Profile) -> None:
        self.profile, self.values, self.calls = profile, profile.values, profile.calls
        self.steps = sorted(profile.calls)
        self.free = {n for n, v in enumerate(profile.values) if v.shown}  # there at all times
        readable = {v for c in profile.calls.values() if c.again for v in c.reads}
        self.used = [n for n, v in enumerate(profile.values) if not v.shown and (v.needed or n in readable)]
        self.forced = {
            n for n in self.used if not self.calls[self.values[n].made].again and self.values[n].needed
        }
        self.makes = {
            c: results(profile, c) for c in self.steps if self.calls[c].again and results(profile, c)
        }
        self.needs = needed(profile, self.used)
        self.shown = sum(profile.values[v].nbytes for v in self.free)

    def dropped(self, kept: set[int]) -> frozenset[int]:
        """What a draft drops that keeps these."""
        return frozenset({v for made in self.makes.values() for v in made} - kept - self.free)

    def forward(self) -> Iterator[tuple[int, list[int]]]:
        """Bytes at each step of forward, and values that add theirs to them if they are kept."""
        for step in self.steps:
            there = [n for n, v in enumerate(self.values) if v.made < step]
            alive = [n for n in there if n in self.free or step <= self.values[n].read]
            fixed = self.calls[step].takes + sum(self.values[n].nbytes for n in alive)
            yield fixed, [n for n in there if n in set(self.used) - set(alive)]


class _Rows:
    """A linear program that grows row by row; variables are numbers."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.whole: list[int] = []
        self.top: list[float] = []
        self.entries: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def variable(self, whole: bool, cost: float = 0.0) -> int:
        self.cost.append(cost)
        self.whole.append(int(whole))
        self.top.append(1.0)
        return len(self.cost) - 1

    def most(self, limit: float, *terms: tuple[float, int | None], least: float = -np.inf) -> None:
        """least <= the sum of factor * variable <= limit; a variable None is 0."""
        row = len(self.high)
        self.entries += [(row, v, f) for f, v in terms if v is not None]
        self.low.append(least)
        self.high.append(limit)


class _Program:
    """Variables: keep[v]; there[s, v] before and held[s, v] after the program of step s; run[s, c]."""

    def __init__(self, profile: Profile, seconds: Mapping[int, float], budget: int) -> None:
        self.facts, self.seconds, self.budget = Facts(profile), seconds, budget
        self.rows, f = _Rows(), self.facts
        self.size = {v: profile.values[v].nbytes for v in f.used}
        self.unit = max([1, *self.size.values()])  # so that the numbers are near 1
        least = min((t for t in seconds.values() if t > 0), default=1.0)
        self.time = max([least, *seconds.values()])
        self.keep = {v: self.rows.variable(True) for v in f.used}
        self.there: dict[tuple[int, int], int] = {}
        self.held: dict[tuple[int, int], int] = {}
        self.run: dict[tuple[int, int], int] = {}
        for step in f.steps:
            for v in f.used:
                if profile.values[v].made <= step:
                    self.there[step, v] = self.rows.variable(False)
            for c, made in f.makes.items():
                if c <= step:
                    self.run[step, c] = self.rows.variable(True, seconds[c] / self.time)
                    self.held |= {(step, v): self.rows.variable(True) for v in made if v in self.size}
        self.stays()
        self.forward()
        for step in f.steps:
            self.stage(step)

    def stays(self) -> None:
        """A value is there if it is kept or held, and was not let go since."""
        f, most = self.facts, self.rows.most
        for v in f.forced:
            most(1, (1, self.keep[v]), least=1)
        for (step, v), held in self.held.items():
            most(0, (1, held), (-1, self.run[step, f.values[v].made]))
            most(1, (1, held), (1, self.keep[v]))
        for higher, step in itertools.pairwise([-1, *reversed(f.steps)]):
            for v in f.used:
                if (step, v) in self.there:
                    before = self.keep[v] if higher < 0 else self.there.get((higher, v))
                    most(0, (1, self.there[step, v]), (-1, before), (-1, self.held.get((higher, v))))
        for step, wanted in f.needs.items():
            for v in wanted:
                most(2, (1, self.there[step, v]), (1, self.held.get((step, v))), least=1)

    def bound(self, nbytes: float, terms: list[tuple[float, int | None]]) -> None:
        self.rows.most(
            (self.budget - self.facts.shown - nbytes) / self.unit, *((s / self.unit, v) for s, v in terms)
        )

    def forward(self) -> None:
        for fixed, more in self.facts.forward():
            terms: list[tuple[float, int | None]] = [(self.size[v], self.keep[v]) for v in more]
            self.bound(fixed - self.facts.shown, terms)

    def stage(self, step: int) -> None:
        """The program of a step, call by call, and its backward."""
        f, most = self.facts, self.rows.most
        one = f.calls[step]
        live: list[tuple[float, int | None]]
        live = [(self.size[v], self.there[step, v]) for v in f.used if (step, v) in self.there]
        left = [(self.size[v], self.held[step, v]) for v in f.used if (step, v) in self.held]
        self.bound(one.surge, [*live, *left])
        program = [c for c in f.makes if c <= step]
        readers = {v: [c for c in program if v in f.calls[c].reads and c > f.values[v].made] for v in f.used}
        for c in program:
            run = self.run[step, c]
            for v in f.calls[c].reads:
                if v in self.size:  # from what is there, or from the program unless it is kept
                    made = self.run.get((step, f.values[v].made))
                    most(0, (1, run), (-1, self.there[step, v]), (-1, made))
                    most(1, (1, run), (-1, self.there[step, v]), (1, self.keep[v]))
            self.bound(one.rest, [*live, (f.calls[c].takes, run)])
            for v in f.makes[c]:
                hidden = v == f.calls[c].hides
                if hidden and v not in self.size:
                    continue
                live.append((f.values[v].nbytes, self.held[step, v] if hidden else run))
            self.bound(one.rest, live)
            for v in {*f.makes[c], *f.calls[c].reads}:
                if v in self.size and v != f.calls[f.values[v].made].hides and (step, v) in self.held:
                    live.append((-self.size[v], self.freed(step, v, c, readers[v])))
                elif v in f.makes[c] and v not in self.size:
                    live.append((-f.values[v].nbytes, run))

    def freed(self, step: int, v: int, at: int, readers: list[int]) -> int:
        """1 if what the program has made is let go after this call; bounds from above are enough."""
        most, made = self.rows.most, self.run[step, self.facts.values[v].made]
        free = self.rows.variable(False)
        most(0, (1, free), (-1, self.run[step, at]))
        most(0, (1, free), (-1, made))
        most(1, (1, free), (1, self.held[step, v]))
        for later in readers:
            if later > at:
                most(1, (1, free), (1, self.run[step, later]))
        return free

    def solve(self, limit: float) -> Optimum | None:
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
            from scipy.sparse import csr_matrix
        except ImportError:
            raise OptionError(
                "exact plans are made with scipy, which is not installed", "pip install 'fxaccel[exact]'"
            ) from None
        rows = self.rows
        row, column, factor = zip(*rows.entries, strict=True)
        matrix = csr_matrix((factor, (row, column)), shape=(len(rows.high), len(rows.cost)))
        found = milp(
            rows.cost, integrality=rows.whole, bounds=Bounds(0, rows.top),
            constraints=LinearConstraint(matrix, rows.low, rows.high),
            options={"time_limit": limit, "mip_rel_gap": 0.0},
        )  # fmt: skip
        if found.x is None:
            if found.status == 1:
                raise TimeoutError(f"no draft was found in {limit} s")
            return None
        again: dict[int, list[int]] = {}
        for (step, c), run in self.run.items():
            if found.x[run] > 0.5:
                again.setdefault(step, []).append(c)
        kept = {v for v, k in self.keep.items() if found.x[k] > 0.5}
        draft = Draft(self.facts.dropped(kept), {s: sorted(cs) for s, cs in again.items()})
        spent = sum(self.seconds[c] for cs in again.values() for c in cs)
        return Optimum(draft, spent, found.mip_dual_bound * self.time, found.status == 0)


def solved(
    profile: Profile, seconds: Mapping[int, float], budget: int, limit: float = 60.0
) -> Optimum | None:
    """The optimum by the integer program, None where no draft fits.

    Raises TimeoutError where none was found in time.
    """
    return _Program(profile, seconds, budget).solve(limit)
