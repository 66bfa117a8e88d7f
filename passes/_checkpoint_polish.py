"""Better sketches near one: values are kept or let go, one by one and with those alike, while it pays.

A part knows only its own frontier, and what crosses a cut is kept whatever it costs; here the whole step is
gone through for each change. A value is kept where there is room, or in the place of one that is cheaper to
compute. Values are alike that stand at the same place in equal parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from fxaccel.passes._checkpoint_chain import Chain, Sketch
from fxaccel.passes._checkpoint_parts import droppable
from fxaccel.profile import Profile
from fxaccel.replay import Draft, Replayed, replay

EFFORT = 100_000  # calls gone through: as many steps as that makes are tried

Bundle = frozenset[int]


class Polish:
    """Looks for a sketch of less time within a budget, from one on."""

    def __init__(self, chain: Chain, sketch: Sketch, seconds: Mapping[int, float], budget: int) -> None:
        self.chain, self.seconds, self.budget = chain, seconds, budget
        self.profile: Profile = chain.profile
        self.left = EFFORT // max(len(self.profile.calls), 1)
        self.sketch, self.now = sketch, self.cost(sketch)
        self.bundles = list(bundles(chain))

    def cost(self, sketch: Sketch) -> Replayed:
        """Of a sketch, replayed."""
        self.left -= 1
        return replay(self.profile, self.chain.draft(sketch), self.seconds)

    def run(self) -> Draft:
        """The best draft found."""
        while self.left > 0 and (self.more() or self.other()):
            pass
        return self.chain.draft(self.sketch)

    def more(self) -> bool:
        """Keep what there is room for; whether any was."""
        before = self.now.seconds
        self.tight = list[tuple[float, int, Bundle]]()  # what would save time if there were more room
        for bundle in sorted(self.bundles, key=self.price, reverse=True):
            back = bundle & self.sketch.dropped
            if back and self.left > 0:
                found = replace(self.sketch, dropped=self.sketch.dropped - back)
                cost = self.cost(found)
                if cost.seconds < self.now.seconds and cost.peak <= self.budget:
                    self.sketch, self.now = found, cost
                elif cost.seconds < self.now.seconds:
                    saves, over = self.now.seconds - cost.seconds, cost.peak - self.budget
                    self.tight.append((saves, over, back))
        return self.now.seconds < before

    def other(self) -> bool:
        """Keep values in the place of others; whether that was better for any."""
        for saves, over, back in sorted(self.tight, key=lambda one: -one[0]):
            best: tuple[Replayed, Sketch] | None = None
            for bundle in sorted(self.bundles, key=self.price):
                gone = bundle - self.sketch.dropped
                if self.left <= 0 or self.price(gone) >= saves:
                    break
                if gone and self.nbytes(gone) >= over:
                    found = replace(self.sketch, dropped=self.sketch.dropped - back | gone)
                    cost = self.cost(found)
                    if cost.peak <= self.budget and cost.seconds < (best[0] if best else self.now).seconds:
                        best = cost, found
            if best is not None:
                self.now, self.sketch = best
                return True
        return False

    def price(self, bundle: Bundle) -> float:
        """Seconds of the calls that make these, the least that computing them takes."""
        return sum(self.seconds[c] for c in {self.profile.values[v].made for v in bundle})

    def nbytes(self, bundle: Bundle) -> int:
        """Of these values."""
        return sum(self.profile.values[v].nbytes for v in bundle)


def bundles(chain: Chain) -> Iterator[Bundle]:
    """All values alike, and each by itself."""
    values, calls = chain.profile.values, chain.profile.calls
    read = {v for call in calls.values() for v in call.reads}
    can = {v for v in droppable(chain.profile) if values[v].nbytes and (values[v].needed or v in read)}
    alike: dict[tuple[int, int], set[int]] = {}
    for part in chain.parts:
        for own, value in enumerate(part.values):
            if value in can:
                alike.setdefault((part.kind, own), set()).add(value)
    yield from (frozenset(one) for one in alike.values() if len(one) > 1)
    yield from (frozenset([v]) for v in sorted(can))
