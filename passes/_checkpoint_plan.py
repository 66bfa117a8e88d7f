"""Which values of a training step to keep for backward, so that its peak stays under a number of bytes.

The step is cut into parts (passes/_checkpoint_parts.py) and a shortest way along them chosen
(passes/_checkpoint_chain.py), for several sizes of parts; the best is polished value by value
(passes/_checkpoint_polish.py). Where skips are long, or no way is short enough, the whole step is gone down
(passes/_checkpoint_descent.py). The plan that comes out is gone through by
fxaccel.replay, byte by byte: what it says is what a step will take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

from fxaccel.errors import OptionError
from fxaccel.passes._checkpoint_chain import Chain, Sketch
from fxaccel.passes._checkpoint_descent import Descent
from fxaccel.passes._checkpoint_exact import solved
from fxaccel.passes._checkpoint_polish import Polish
from fxaccel.profile import Profile
from fxaccel.replay import Draft, Replayed, replay

LEAST = (1, 2, 4, 8, 16)  # calls in a part, from the finest to the coarsest parts
PARTS = 64  # the most of them
EXACT = 60  # calls, views left out, up to which the optimum is looked for
LIMIT = 120.0  # seconds
LONG = 50  # of the bytes that a step takes: one part of so many is much
FINE = 200  # steps of a search for a budget
NEAR = 100  # steps of a search for what the parts are to aim at


class Way(NamedTuple):
    """What a way along a chain lets go, and what that costs."""

    chain: Chain
    sketch: Sketch
    cost: Replayed


class Planner:
    """Plans for one step.

    seconds    of each call, by which what is computed again is weighed
    link       bytes a second to the host's memory, 0 where nothing is to be moved there
    """

    def __init__(self, profile: Profile, seconds: Mapping[int, float], link: float = 0.0) -> None:
        self.profile, self.seconds, self.link = profile, seconds, link
        self.need = replay(profile, Draft(), seconds).peak
        self.many = sum(not call.view for call in profile.calls.values())

    @cached_property
    def chains(self) -> list[Chain]:
        """The step in fine and in coarse parts: fine ones take less at once, coarse ones leave a choice."""
        fitting = [least for least in LEAST if self.many <= PARTS * least] or [-(-self.many // PARTS)]
        found = [Chain(self.profile, self.seconds, least, self.need) for least in fitting]
        return list({tuple(part.calls[0] for part in chain.parts): chain for chain in found}.values())

    def plan(self, budget: int) -> Draft | None:
        """The draft of least time whose peak, replayed, is at most `budget` bytes; None if none was found."""
        if self.need <= budget:
            return Draft()
        rough = self.rough(budget)
        found = rough or next((way for way in self.lower if way.cost.peak <= budget), None)
        if found is None:
            return None
        polish = Polish(found.chain, found.sketch, self.seconds, budget, self.link)
        draft = polish.run()
        if rough is not None and not self.skips:
            return draft
        return polish.draft(Descent(self.profile, self.seconds, polish.sketch, polish.draft).within(budget))

    def optimum(self, budget: int) -> Draft | None:
        """The same without a better one; OptionError where that cannot be proved."""
        if self.need <= budget:
            return Draft()
        if self.many > EXACT:
            raise OptionError(
                f"exact plans are for steps of up to {EXACT} calls, this one has {self.many}",
                "without exact the plan is near the optimum",
            )
        try:
            found = solved(self.profile, self.seconds, budget, LIMIT)
        except TimeoutError as error:
            raise OptionError(f"the optimum was not found: {error}") from None
        if found is not None and not found.exact:
            raise OptionError(f"the optimum was not proved in {LIMIT:.0f} s", "without exact a plan is found")
        return None if found is None else found.draft

    def fits(self, budget: int) -> bool:
        """Whether there is a plan for this budget, without making a good one."""
        return self.need <= budget or self.rough(budget) is not None or self.smallest <= budget

    def rough(self, budget: int) -> Way | None:
        """The best way along any of the chains."""
        found = [way for chain in self.chains if (way := self.along(chain, budget)) is not None]
        return min(found, key=lambda way: way.cost.seconds, default=None)

    def along(self, chain: Chain, budget: int) -> Way | None:
        """The best way along these parts.

        A part knows of the others no more than what they keep, so that the whole may peak a little higher
        than they say, or lower: the way is searched with another aim then.
        """
        low, high, aim, best = 0, budget * 5 // 4, budget, None
        while high - low > budget // NEAR + 1:
            moves = chain.way(aim)
            found = None if moves is None else self.way(chain, chain.sketch(moves))
            over = 0 if found is None else found.cost.peak - budget
            if found is None or over <= 0:
                low, best = aim, found or best
                if -over * NEAR <= budget and found is not None:
                    break
            else:
                high = aim
            aim = aim - over if found is not None and low < aim - over < high else (low + high) // 2
        return best

    def way(self, chain: Chain, sketch: Sketch) -> Way:
        """A way along a chain, replayed."""
        return Way(chain, sketch, replay(self.profile, chain.draft(sketch), self.seconds))

    @cached_property
    def skips(self) -> bool:
        """Whether much crosses more than one cut in whatever parts: each way along them keeps that."""
        long = [chain.long for chain in self.chains if len(chain.parts) > 2]
        return bool(long) and min(long) * LONG > self.need

    @cached_property
    def lower(self) -> list[Way]:
        """The way of the smallest peak found along the parts, and lower ones that leave them, downwards."""
        found = self._tightest(math.inf)
        if found is None:
            return []
        descent = Descent(self.profile, self.seconds, found.sketch, found.chain.draft)
        descent.run()
        return [found, *(Way(found.chain, *one) for one in descent.trail)]

    @cached_property
    def smallest(self) -> int:
        """The smallest budget that a plan was found for."""
        return self.lower[-1].cost.peak if self.lower else self.need

    def within(self, seconds: float) -> Draft:
        """The draft of the smallest peak found that computes at most so many seconds again."""
        found = self._tightest(seconds)
        return Draft() if found is None else found.chain.draft(found.sketch)

    def _tightest(self, seconds: float) -> Way | None:
        low, high = 0, self.need
        best: Way | None = None
        while high - low > self.need // FINE + 1:
            middle = (low + high) // 2
            found = self.rough(middle)
            if found is None or found.cost.seconds > seconds:
                low = middle
            else:
                high, best = min(found.cost.peak, middle), found
        return best
