"""Better sketches near one: values are kept or let go, one by one and with those alike, while it pays.

A part knows only its own frontier, and what crosses a cut is kept whatever it costs; here the whole step is
gone through for each change. A value is kept where there is room, or in the place of one that is cheaper to
compute; or it is moved to the host, where the copies have time beside what is computed. Values are alike that
stand at the same place in equal parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from fxaccel.passes._checkpoint_chain import Chain, Sketch
from fxaccel.passes._checkpoint_parts import droppable
from fxaccel.profile import Profile
from fxaccel.replay import Draft, Replayed, replay
from fxaccel.transfers import movable, moving

EFFORT = 100_000  # calls gone through: as many steps as that makes are tried

Bundle = frozenset[int]


class Polish:
    """Looks for a sketch of less time within a budget, from one on.

    link    bytes a second to the host's memory, 0 where nothing is to be moved there
    """

    def __init__(
        self, chain: Chain, sketch: Sketch, seconds: Mapping[int, float], budget: int, link: float = 0.0
    ) -> None:
        self.chain, self.seconds, self.budget, self.link = chain, seconds, budget, link
        self.profile: Profile = chain.profile
        self.left = EFFORT // max(len(self.profile.calls), 1)
        self.sketch, self.now = sketch, self.cost(sketch)
        self.tight: list[tuple[float, int, Sketch]] = []  # what would save time if there were more room
        self.movable = frozenset(movable(self.profile) if link else ())
        self.droppable = frozenset(worth(self.profile))
        self.bundles = sorted(bundles(chain, self.droppable | self.movable), key=self.price)

    def draft(self, sketch: Sketch) -> Draft:
        """Of a sketch, with the times of its copies."""
        return moving(self.profile, self.chain.draft(sketch), sketch.moved, self.seconds, self.link)

    def cost(self, sketch: Sketch) -> Replayed:
        """Of a sketch, replayed."""
        self.left -= 1
        return replay(self.profile, self.draft(sketch), self.seconds)

    def run(self) -> Draft:
        """The best draft found."""
        while self.left > 0 and (self.more() or self.other()):
            pass
        return self.draft(self.sketch)

    def more(self) -> bool:
        """Keep or move what there is room for; whether any was."""
        before = self.now.seconds
        self.tight.clear()
        for bundle in reversed(self.bundles):
            back = bundle & self.sketch.dropped
            if not back:
                continue
            found = replace(self.sketch, dropped=self.sketch.dropped - back)
            ways = [found, replace(found, moved=found.moved | back)] if back <= self.movable else [found]
            for way in ways:
                cost = self.cost(way) if self.left > 0 else self.now
                if cost.seconds < self.now.seconds and cost.peak <= self.budget:
                    self.sketch, self.now = way, cost
                    break
                if cost.seconds < self.now.seconds:
                    saves, over = self.now.seconds - cost.seconds, cost.peak - self.budget
                    self.tight.append((saves, over, way))
        return self.now.seconds < before

    def other(self) -> bool:
        """Keep values in the place of others; whether that was better for any."""
        for saves, over, way in sorted(self.tight, key=lambda one: -one[0]):
            best: tuple[Replayed, Sketch] | None = None
            for found in self.instead(way, saves, over):
                cost = self.cost(found)
                if cost.peak <= self.budget and cost.seconds < (best[0] if best else self.now).seconds:
                    best = cost, found
                if self.left <= 0:
                    break
            if best is not None:
                self.now, self.sketch = best
                return True
        return False

    def instead(self, sketch: Sketch, saves: float, over: int) -> Iterator[Sketch]:
        """The sketch with others moved or dropped, so many bytes at the least, in less time than it saves."""
        for bundle in self.bundles:
            gone = bundle - self.sketch.dropped - sketch.moved
            if not gone or self.nbytes(gone) < over:
                continue
            if gone <= self.movable:
                yield replace(sketch, moved=sketch.moved | gone)
            if gone <= self.droppable and self.price(gone) < saves:
                yield replace(sketch, dropped=sketch.dropped | gone)

    def price(self, bundle: Bundle) -> float:
        """Seconds of the calls that make these, the least that computing them takes."""
        return sum(self.seconds[c] for c in {self.profile.values[v].made for v in bundle})

    def nbytes(self, bundle: Bundle) -> int:
        """Of these values."""
        return sum(self.profile.values[v].nbytes for v in bundle)


def worth(profile: Profile) -> Iterator[int]:
    """Values that can be dropped, and of which bytes are kept otherwise."""
    read = {v for call in profile.calls.values() for v in call.reads}
    for number in droppable(profile):
        value = profile.values[number]
        if value.nbytes and (value.needed or number in read):
            yield number


def bundles(chain: Chain, values: frozenset[int]) -> Iterator[Bundle]:
    """All values alike, and each by itself."""
    alike: dict[tuple[int, int], set[int]] = {}
    for part in chain.parts:
        for own, value in enumerate(part.values):
            if value in values:
                alike.setdefault((part.kind, own), set()).add(value)
    yield from (frozenset(one) for one in alike.values() if len(one) > 1)
    yield from (frozenset([v]) for v in sorted(values))
