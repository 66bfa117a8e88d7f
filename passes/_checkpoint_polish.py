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
from fxaccel.replay import Draft, Replayed, replay, results, spent
from fxaccel.transfers import movable, moving

EFFORT = 300_000  # calls gone through, of a sketch that is replayed three times: so many are tried

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
        self.take(sketch, replay(self.profile, self.draft(sketch), seconds))
        self.tight: list[
            tuple[float, int, Bundle, Bundle]
        ] = []  # what would save time if there were more room
        self.movable = frozenset(movable(self.profile) if link else ())
        self.droppable = frozenset(worth(self.profile))
        found = sorted(bundles(chain, self.droppable | self.movable), key=self.price)
        self.bundles = {bundle: self.nbytes(bundle) for bundle in found}

    def draft(self, sketch: Sketch) -> Draft:
        """Of a sketch, with the times of its copies."""
        return moving(self.profile, self.chain.draft(sketch), sketch.moved, self.seconds, self.link)

    def faster(self, sketch: Sketch, than: float) -> Replayed | None:
        """Of a sketch that takes less than so many seconds, replayed."""
        if self.left <= 0:
            return None
        draft = self.draft(sketch)
        found = replay(self.profile, draft, self.seconds) if spent(draft, self.seconds) < than else None
        self.left -= 1 if found is None else 3
        return found

    def take(self, sketch: Sketch, cost: Replayed) -> None:
        """Go on from here."""
        self.sketch, self.now = sketch, cost
        self.again = {c for program in self.chain.draft(sketch).again.values() for c in program}

    def run(self) -> Draft:
        """The best draft found."""
        while self.left > 0 and any([self.more(), self.other()]):
            pass
        return self.draft(self.sketch)

    def more(self) -> bool:
        """Keep or move what there is room for; whether any was."""
        before = self.now.seconds
        self.tight.clear()
        for bundle in reversed(self.bundles):
            back = bundle & self.sketch.dropped
            if self.again.isdisjoint(self.profile.values[v].made for v in back):
                continue  # what nobody computes again is not in anyone's way
            for moved in (Bundle(), back) if back <= self.movable else (Bundle(),):
                way = self.without(back, moved)
                cost = self.faster(way, self.now.seconds)
                if cost is not None and cost.peak <= self.budget:
                    self.take(way, cost)
                    break
                if cost is not None:
                    saves, over = self.now.seconds - cost.seconds, cost.peak - self.budget
                    self.tight.append((saves, over, back, moved))
        return self.now.seconds < before

    def other(self) -> bool:
        """Keep values in the place of others; whether that was better for any."""
        before = self.now.seconds
        for saves, over, back, moved in sorted(self.tight, key=lambda one: -one[0]):
            best: tuple[Sketch, Replayed] | None = None
            for least, found in self.instead(self.without(back, moved), saves, over):
                below = self.now.seconds if best is None else best[1].seconds
                if self.now.seconds - saves + least >= below:
                    continue
                cost = self.faster(found, below)
                if cost is not None and cost.peak <= self.budget:
                    best = found, cost
            if best is not None:
                self.take(*best)
        return self.now.seconds < before

    def without(self, back: Bundle, moved: Bundle) -> Sketch:
        """The sketch in which these are kept, or some of them moved."""
        return replace(self.sketch, dropped=self.sketch.dropped - back, moved=self.sketch.moved | moved)

    def instead(self, sketch: Sketch, saves: float, over: int) -> Iterator[tuple[float, Sketch]]:
        """The sketch with others moved or dropped, so many bytes at the least, in less time than it saves.

        With the seconds that this takes at least, the fastest first; at last with several that cost little.
        """
        together, room = Bundle(), 0
        for bundle, nbytes in self.bundles.items():
            if self.left <= 0:
                return
            if nbytes < over <= room:
                continue
            gone = bundle - self.sketch.dropped - sketch.moved
            if not gone:
                continue
            if self.nbytes(gone) >= over:
                if gone <= self.movable:
                    yield 0.0, replace(sketch, moved=sketch.moved | gone)
                if gone <= self.droppable and self.price(gone) < saves:
                    yield self.price(gone), replace(sketch, dropped=sketch.dropped | gone)
            if room < over and gone <= self.droppable:
                room += self.nbytes(gone - together)
                together |= gone
        if self.price(together) < saves:
            yield self.price(together), replace(sketch, dropped=sketch.dropped | together)

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
    """All values alike, each by itself, and all that one call makes and hides."""
    alike: dict[tuple[int, int], set[int]] = {}
    for part in chain.parts:
        for own, value in enumerate(part.values):
            if value in values:
                alike.setdefault((part.kind, own), set()).add(value)
    calls = (values.intersection(results(chain.profile, call)) for call in chain.profile.calls)
    yield from (frozenset(one) for one in (*alike.values(), *calls) if len(one) > 1)
    yield from (frozenset([v]) for v in sorted(values))
