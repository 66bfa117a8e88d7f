"""Cuts a chain of calls into stages so that the slowest takes as little time as it can.

A stage is some consecutive nodes. It takes their seconds, and those of what it sends and receives at both of
its ends, forward the values and backward their gradients; it holds the parameters of its nodes throughout
and, for each microbatch in flight there, what they save and what it received. How many are in flight depends
on the stage and the schedule (`Order.in_flight`).

The cut is exact: by dynamic programming over (stage, end) the least time of the slowest stage, then among all
cuts that have it the fewest bytes sent, then the earliest cuts. Source: the intervals of Narayanan et al.
2019, "PipeDream", and Zheng et al. 2022, "Alpa", arXiv:2201.12023, for stages of one device each. It takes
n^2 * k steps, of which numpy does n at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fxaccel.errors import OptionError
from fxaccel.pipeline.simulator import INSTANT, Link, check_finite

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Node:
    """A call of the chain, or several that stay together, for one microbatch.

    seconds       forward and backward
    parameters    bytes held throughout, with their gradients and states of the optimizer
    saved         bytes of its results that wait for backward
    crossing      bytes that a stage which ends here sends to the next one; None where none may end
    returning     bytes of gradients that come back, as many as cross if None
    """

    seconds: float
    parameters: int = 0
    saved: int = 0
    crossing: int | None = 0
    returning: int | None = None


@dataclass(frozen=True)
class Balanced:
    """Stages of a chain.

    cuts       number of the first node of each stage but the first
    seconds    of each stage, with what it sends and receives
    nbytes     that each stage holds
    sent       bytes over all cuts, both ways
    bound      seconds that the slowest stage takes at least, wherever the cuts are
    """

    cuts: tuple[int, ...]
    seconds: tuple[float, ...]
    nbytes: tuple[int, ...]
    sent: int
    bound: float

    @property
    def slowest(self) -> float:
        """Seconds of the slowest stage."""
        return max(self.seconds)

    @property
    def gap(self) -> float:
        """How far the slowest stage is above the bound, as a share of it; the optimum may be as far."""
        return self.slowest / self.bound - 1 if self.bound else 0.0


class Scarce(OptionError):
    """No cut fits; lacks: bytes more on each device with which one does."""

    def __init__(self, message: str, hint: str | None = None, lacks: float = math.inf) -> None:
        super().__init__(message, hint)
        self.lacks = lacks


def balance(
    chain: Sequence[Node], stages: int, *, memory: float | Sequence[float] = math.inf,
    in_flight: int | Sequence[int] = 1, link: Link = INSTANT, at: Sequence[int] = (),
) -> Balanced:  # fmt: skip
    """The stages whose slowest takes the least time.

    memory       bytes of every stage's device, or of each
    in_flight    microbatches whose saved bytes every stage holds at once, or each
    at           numbers of nodes before which there is a cut in any case

    Raises OptionError where no cut fits, with the smallest memory for which one does.
    """
    _check(chain, stages)
    room, flight = _each("memory", memory, stages), _each("in_flight", in_flight, stages)
    sums = _Sums(chain, stages, room, flight, link, at)
    least = _least(sums, sums.seconds)
    if math.isinf(least):
        raise _refused(sums, room)
    return sums.balanced(_cuts(sums, least))


def _check(chain: Sequence[Node], stages: int) -> None:
    if not 1 <= stages <= len(chain):
        raise OptionError(
            f"expected 1 to {len(chain)} stages for a chain of {len(chain)} nodes, came {stages}"
        )
    for number, node in enumerate(chain):
        check_finite(node, f"node {number}")


def _each(what: str, value: float | Sequence[float], stages: int) -> Sequence[float]:
    values = value if isinstance(value, Sequence) else [value] * stages
    if len(values) != stages or not all(v >= 0 for v in values):
        raise OptionError(f"expected {what} of 0 or more for each of {stages} stages, came {value}")
    return values


Index = int | slice


class _Sums:
    """What a stage of nodes i .. j - 1 costs, for one i and many j or many i and one j.

    The cost is that of each stage, one a row, or of any. Position i lies before node i; wire, received and
    crossing are what a cut there costs, nothing at both ends of the chain.
    """

    def __init__(
        self, chain: Sequence[Node], stages: int, room: Sequence[float], in_flight: Sequence[float],
        link: Link, at: Sequence[int],
    ) -> None:  # fmt: skip
        self.count, self.stages = len(chain), stages
        self.room = np.array(room, dtype=np.float64)[:, None]
        self.in_flight = np.array(in_flight, dtype=np.float64)[:, None]
        self.time, self.fixed, self.saved = (
            np.concatenate([[0.0], np.cumsum([float(v) for v in values])])
            for values in (
                [n.seconds for n in chain],
                [n.parameters for n in chain],
                [n.saved for n in chain],
            )
        )
        self.wire, self.received, self.crossing = (np.zeros(self.count + 1) for _ in range(3))
        for i, node in enumerate(chain[:-1], 1):
            if node.crossing is None:
                self.wire[i] = math.inf
                continue
            back = node.crossing if node.returning is None else node.returning
            self.wire[i] = link.seconds(node.crossing) + (link.seconds(back) if back else 0.0)
            self.received[i], self.crossing[i] = node.crossing, node.crossing + back
        self.places = np.flatnonzero(np.isfinite(self.wire))
        self.number = np.arange(self.count + 1)
        forced = self._forced(at)
        self.until = np.array([*forced, self.count])[np.searchsorted(forced, self.number, side="right")]

    def _forced(self, at: Sequence[int]) -> list[int]:
        """The cuts asked for, in order."""
        inner = set(self.places[1:-1].tolist())
        if wrong := sorted(set(at) - inner):
            raise OptionError(f"expected cuts before nodes where the chain can be cut, came {wrong}")
        if len(set(at)) >= self.stages:
            raise OptionError(
                f"expected at most {self.stages - 1} cuts for {self.stages} stages, came {sorted(set(at))}"
            )
        if len(inner) < self.stages - 1:
            raise OptionError(
                f"expected {self.stages - 1} places to cut the chain, came {len(inner)}", "fewer stages"
            )
        return sorted(set(at))

    def whole(self, i: Index, j: Index) -> npt.NDArray[np.bool_]:
        """Whether there may be such a stage: both ends can be cut, and no forced cut is inside."""
        return np.isfinite(self.wire[i] + self.wire[j]) & (self.until[i] >= self.number[j])

    def held(self, i: Index, j: Index) -> Floats:
        """Bytes that each stage would hold."""
        waiting = self.saved[j] - self.saved[i] + self.received[i]
        return self.fixed[j] - self.fixed[i] + self.in_flight * waiting

    def lacks(self, i: Index, j: Index) -> Floats:
        """Bytes that each stage's device lacks, below zero those that it has left."""
        return np.where(self.whole(i, j), self.held(i, j) - self.room, math.inf)

    def seconds(self, i: Index, j: Index) -> Floats:
        """Seconds of each stage, infinite where its device lacks memory."""
        taken = self.time[j] - self.time[i] + self.wire[i] + self.wire[j]
        return np.where(self.lacks(i, j) <= 0, taken, math.inf)

    def bound(self) -> float:
        """Seconds that some stage takes at least: an equal part of all; what cannot be cut, and one end."""
        wires = np.sort(self.wire[self.places[1:-1]])
        equal = (self.time[-1] + 2 * wires[: self.stages - 1].sum()) / self.stages
        longest = np.diff(self.time[self.places]).max()
        return float(max(equal, longest + (wires[0] if self.stages > 1 else 0.0)))

    def balanced(self, cuts: Sequence[int]) -> Balanced:
        """The stages between these positions."""
        ends = [0, *cuts, self.count]
        pairs = list(enumerate(pairwise(ends)))
        return Balanced(
            tuple(cuts),
            tuple(float(self.seconds(i, j)[s, 0]) for s, (i, j) in pairs),
            tuple(int(self.held(i, j)[s, 0]) for s, (i, j) in pairs),
            int(self.crossing[list(cuts)].sum()),
            self.bound(),
        )


def _least(sums: _Sums, cost: Callable[[Index, Index], Floats]) -> float:
    """The least that the dearest stage of a cut costs.

    best[s, j]: of the first s stages, if they end at j.
    """
    best = np.full((sums.stages + 1, sums.count + 1), math.inf)
    best[0, 0] = -math.inf
    for j in range(1, sums.count + 1):
        before = slice(0, j)
        best[1:, j] = np.maximum(best[:-1, before], cost(before, j)).min(1)
    return float(best[-1, -1])


def _cuts(sums: _Sums, least: float) -> list[int]:
    """The cut of fewest bytes, then of the earliest positions, of which no stage takes more seconds.

    best[s, i]: bytes from position i on, where stage s starts;  end[s, i]: where it ends then.
    """
    best = np.full((sums.stages + 1, sums.count + 1), math.inf)
    best[-1, -1] = 0.0
    end = np.zeros((sums.stages, sums.count + 1), dtype=np.int64)
    for i in reversed(range(sums.count)):
        after = slice(i + 1, sums.count + 1)
        sent = np.where(sums.seconds(i, after) <= least, best[1:, after] + sums.crossing[after], math.inf)
        end[:, i] = i + 1 + sent.argmin(1)  # the first of equals
        best[:-1, i] = sent.min(1)
    cuts, at = list[int](), 0
    for stage in range(sums.stages - 1):
        at = int(end[stage, at])
        cuts.append(at)
    return cuts


def _refused(sums: _Sums, room: Sequence[float]) -> OptionError:
    lacks, alike = _least(sums, sums.lacks), len(set(room)) == 1
    least = f"{room[0] + lacks:.0f} bytes a device" if alike else f"{lacks:.0f} bytes more on each device"
    within = room[0] if alike else list(room)
    message = f"expected {sums.stages} stages within {within} bytes, came none"
    return Scarce(message, f"the smallest memory that does is {least}", lacks)
