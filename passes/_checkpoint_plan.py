"""Which values of a training step to keep for backward, so that its peak stays under a number of bytes.

The step is cut into parts (passes/_checkpoint_parts.py) and a shortest way along them chosen
(passes/_checkpoint_chain.py), for several sizes of parts; the best is polished value by value
(passes/_checkpoint_polish.py). The plan that comes out is gone through by
fxaccel.replay, byte by byte: what it says is what a step will take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

from fxaccel.errors import OptionError
from fxaccel.passes._checkpoint_chain import Chain, Sketch
from fxaccel.passes._checkpoint_exact import solved
from fxaccel.passes._checkpoint_polish import Polish
from fxaccel.profile import Profile
from fxaccel.replay import Draft, Replayed, replay

LEAST = (1, 2, 4, 8, 16)  # calls in a part, from the finest to the coarsest parts
PARTS = 64  # the most of them
EXACT = 60  # calls, views left out, up to which the optimum is looked for
LIMIT = 120.0  # seconds
FINE = 200  # steps of a search for a budget
NEAR = 100  # steps of a search for what the parts are to aim at


class Planner:
    """Plans for one step.

    seconds    of each call, by which what is computed again is weighed
    link       bytes a second to the host's memory, 0 where nothing is to be moved there
    """

    def __init__(self, profile: Profile, seconds: Mapping[int, float], link: float = 0.0) -> None:
        self.profile, self.seconds, self.link = profile, seconds, link
        self.need = replay(profile, Draft(), seconds).peak

    @cached_property
    def chains(self) -> list[Chain]:
        """The step in fine and in coarse parts: fine ones take less at once, coarse ones leave a choice."""
        many = sum(not call.view for call in self.profile.calls.values())
        fitting = [least for least in LEAST if many <= PARTS * least] or [-(-many // PARTS)]
        found = [Chain(self.profile, self.seconds, least, self.need) for least in fitting]
        return list({tuple(part.calls[0] for part in chain.parts): chain for chain in found}.values())

    def plan(self, budget: int) -> Draft | None:
        """The draft of least time whose peak, replayed, is at most `budget` bytes; None if none was found."""
        if self.need <= budget:
            return Draft()
        found = self.rough(budget)
        if found is None and self.smallest <= budget:
            found = self.tightest
        return None if found is None else Polish(*found, self.seconds, budget, self.link).run()

    def optimum(self, budget: int) -> Draft | None:
        """The same without a better one; OptionError where that cannot be proved."""
        if self.need <= budget:
            return Draft()
        many = sum(not call.view for call in self.profile.calls.values())
        if many > EXACT:
            raise OptionError(
                f"exact plans are for steps of up to {EXACT} calls, this one has {many}",
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

    def rough(self, budget: int) -> tuple[Chain, Sketch] | None:
        """The best way along any of the chains."""
        found = [(chain, s) for chain in self.chains if (s := self.along(chain, budget)) is not None]
        return min(found, key=lambda one: self.cost(*one).seconds, default=None)

    def cost(self, chain: Chain, sketch: Sketch) -> Replayed:
        """Of what a way along a chain lets go."""
        return replay(self.profile, chain.draft(sketch), self.seconds)

    def along(self, chain: Chain, budget: int) -> Sketch | None:
        """The best way along these parts.

        A part knows of the others no more than what they keep, so that the whole may peak a little higher
        than they say, or lower: the way is searched with another aim then.
        """
        low, high, aim, best = 0, budget * 5 // 4, budget, None
        while high - low > budget // NEAR + 1:
            moves = chain.way(aim)
            found = None if moves is None else chain.sketch(moves)
            over = 0 if found is None else self.cost(chain, found).peak - budget
            if found is None or over <= 0:
                low, best = aim, found or best
                if -over * NEAR <= budget and found is not None:
                    break
            else:
                high = aim
            aim = aim - over if found is not None and low < aim - over < high else (low + high) // 2
        return best

    @cached_property
    def tightest(self) -> tuple[Chain, Sketch] | None:
        """The way of the smallest peak found, None where that is the peak of keeping all."""
        return self._tightest(math.inf)

    @cached_property
    def smallest(self) -> int:
        """The smallest budget that a plan was found for, within 1 in FINE of what the step needs."""
        return self.need if self.tightest is None else self.cost(*self.tightest).peak

    def within(self, seconds: float) -> Draft:
        """The draft of the smallest peak found that computes at most so many seconds again."""
        found = self._tightest(seconds)
        return Draft() if found is None else found[0].draft(found[1])

    def _tightest(self, seconds: float) -> tuple[Chain, Sketch] | None:
        low, high, best = 0, self.need, None
        while high - low > self.need // FINE + 1:
            middle = (low + high) // 2
            found = self.rough(middle)
            cost = None if found is None else self.cost(*found)
            if found is None or cost is None or cost.seconds > seconds:
                low = middle
            else:
                high, best = min(cost.peak, middle), found
        return best
