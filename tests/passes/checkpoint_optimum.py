"""The exact optimum of what to compute again within a peak, by a search over sets of values.

It finds what passes/_checkpoint_exact.py finds with an integer program, by another way: A* over (step,
values kept, values there), for steps of up to about 8 values.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator

from fxaccel.passes._checkpoint_exact import Facts, Optimum
from fxaccel.profile import Profile
from fxaccel.replay import Draft

_Key = tuple[int, int, int, int, int, int]
"""(step, next call of its program, kept, there, made by the program, kept ones whose double is gone)"""


class _Search:
    """A* from the end of forward to the end of backward; sets are bits."""

    def __init__(self, profile: Profile, seconds: dict[int, float], budget: int) -> None:
        self.facts, self.seconds, self.budget = Facts(profile), seconds, budget
        used = self.facts.used
        self.bit = {v: 1 << i for i, v in enumerate(used)}
        self.size = {1 << i: profile.values[v].nbytes for i, v in enumerate(used)}
        self.maker = {1 << i: profile.values[v].made for i, v in enumerate(used)}
        self.sums: dict[int, int] = {0: 0}
        self.wants = {s: self.mask(self.facts.needs.get(s, ())) for s in self.facts.steps}
        self.reads = {c: self.mask(self.facts.calls[c].reads) for c in self.facts.steps}
        self.makes = {c: self.mask(made) for c, made in self.facts.makes.items()}
        self.until = {s: self.mask(v for v in used if profile.values[v].made <= s) for s in self.facts.steps}
        self.best: dict[_Key, float] = {}
        self.came: dict[_Key, tuple[_Key, int | None]] = {}
        self.queue: list[tuple[float, int, _Key]] = []
        self.order = itertools.count()

    def mask(self, values: Iterable[int]) -> int:
        return sum({self.bit[v] for v in values if v in self.bit})

    def bytes(self, mask: int) -> int:
        if mask not in self.sums:
            low = mask & -mask
            self.sums[mask] = self.size[low] + self.bytes(mask ^ low)
        return self.sums[mask]

    def left(self, step: int, kept: int, there: int) -> float:
        """A lower bound: what is needed and not there is computed at least once, with what that reads."""
        wanted, calls = 0, set[int]()
        for s, want in self.wants.items():
            wanted |= want if s <= step else 0
        while wanted := wanted & ~there:
            low = wanted & -wanted
            call = self.maker[low]
            if low & kept or call not in self.makes:
                return float("inf")
            calls.add(call)
            there |= low
            wanted |= self.reads[call]
        return sum(self.seconds[c] for c in calls)

    def push(self, key: _Key, cost: float, before: _Key | None, ran: int | None = None) -> None:
        step, _, kept, there, made, _ = key
        if cost >= self.best.get(key, float("inf")):
            return
        bound = self.left(step, kept, there | made) if step >= 0 else 0.0
        if bound == float("inf"):
            return
        self.best[key] = cost
        if before is not None:
            self.came[key] = (before, ran)
        heapq.heappush(self.queue, (cost + bound, next(self.order), key))

    def starts(self) -> None:
        """All sets to keep that forward has room for."""
        rows = [(fixed, self.mask(more)) for fixed, more in self.facts.forward()]
        forced = self.mask(self.facts.forced)
        last = self.facts.steps[-1]
        for kept in range(1 << len(self.bit)):
            if kept & forced == forced and all(f + self.bytes(kept & m) <= self.budget for f, m in rows):
                self.push((last, -1, kept, kept, 0, 0), 0.0, None)

    def run(self) -> tuple[_Key, float] | None:
        """The last state, and its cost."""
        self.starts()
        done = set[_Key]()
        while self.queue:
            _, _, key = heapq.heappop(self.queue)
            if key in done:
                continue
            done.add(key)
            if key[0] < 0:
                return key, self.best[key]
            self.expand(key)
        return None

    def expand(self, key: _Key) -> None:
        step, call, kept, there, made, gone = key
        cost = self.best[key]
        if call < 0:  # before the program: what no one reads from here on is let go
            for low in self.size:
                if there & low:
                    self.push((step, -1, kept, there ^ low, 0, 0), cost, key)
            self.push((step, 0, kept, there, 0, 0), cost, key)
        elif call > step:
            self.finish(key, cost)
        else:
            self.push((step, call + 1, kept, there, made, gone), cost, key)
            if call in self.makes:
                self.make(key, cost)

    def make(self, key: _Key, cost: float) -> None:
        """The program makes the call; what it has read or made may be let go."""
        step, call, kept, there, made, gone = key
        one = self.facts.calls[call]
        results = self.makes[call]
        if self.reads[call] & ~((there & ~gone) | (made & ~kept)) or results & there & ~kept:
            return
        live = self.facts.shown + self.bytes(there) + self.bytes(made) + self.facts.calls[step].rest
        if live + one.takes > self.budget:
            return
        hidden = 0 if one.hides is None else self.bit.get(one.hides, 0)
        for hold in {0, hidden & ~kept}:
            new = (results & ~hidden) | hold
            if live + self.bytes(new) > self.budget:
                continue
            loose = (new & ~hold) | (self.reads[call] & made)
            for gone_now in subsets(loose):
                self.push(
                    (step, call + 1, kept, there, (made | new) & ~gone_now, gone | (gone_now & kept)),
                    cost + self.seconds[call], key, call,
                )  # fmt: skip

    def finish(self, key: _Key, cost: float) -> None:
        """The backward of the step."""
        step, _, kept, there, made, _ = key
        if made & kept or self.wants[step] & ~(there | made):
            return
        if (
            self.facts.shown + self.bytes(there) + self.bytes(made) + self.facts.calls[step].surge
            > self.budget
        ):
            return
        lower = [s for s in self.facts.steps if s < step]
        below = self.until[lower[-1]] if lower else 0
        after = (lower[-1] if lower else -1, -1, kept & below, (there | made) & below, 0, 0)
        self.push(after, cost, key)

    def draft(self, key: _Key) -> Draft:
        again: dict[int, list[int]] = {}
        while key in self.came:
            key, ran = self.came[key]
            if ran is not None:
                again.setdefault(key[0], []).insert(0, ran)
        kept = {v for v, low in self.bit.items() if key[2] & low}
        return Draft(self.facts.dropped(kept), again)


def subsets(mask: int) -> Iterator[int]:
    """All sets of some of its bits."""
    part = mask
    while True:
        yield part
        if not part:
            return
        part = (part - 1) & mask


def searched(profile: Profile, seconds: dict[int, float], budget: int) -> Optimum | None:
    """The optimum by the search; None where no draft fits."""
    search = _Search(profile, seconds, budget)
    found = search.run()
    return None if found is None else Optimum(search.draft(found[0]), found[1], found[1])
