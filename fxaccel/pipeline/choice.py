"""The schedule and the count of microbatches that take the least time within the memory of each rank.

Every candidate is simulated; the caller says what the stages of each cost, since both the count of stages
and the size of a microbatch change with it. Among equals the one of the lower peak is taken, then that of
fewer microbatches, then the one that comes first in the lists that were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fxaccel.errors import OptionError
from fxaccel.pipeline.orders import ONE, SCHEDULES, TWO, named, order
from fxaccel.pipeline.simulator import INSTANT, Links, Simulated, Stage, simulate


@dataclass(frozen=True)
class Candidate:
    """A schedule to try; chunks: stages a rank."""

    schedule: str
    ranks: int
    chunks: int
    microbatches: int

    def __str__(self) -> str:
        many = f" of {self.chunks} stages" if self.chunks > 1 else ""
        return f"{self.schedule}, {self.ranks} ranks{many}, {self.microbatches} microbatches"


@dataclass(frozen=True)
class Tried:
    """A candidate, what it takes, and whether every rank has the memory for it."""

    candidate: Candidate
    seconds: float
    peaks: tuple[int, ...]
    fits: bool


@dataclass(frozen=True)
class Choice:
    """What was chosen, all that was tried, and what could not be with its reason."""

    candidate: Candidate
    simulated: Simulated
    tried: tuple[Tried, ...]
    left_out: tuple[tuple[Candidate, str], ...]


Cost = Callable[[Candidate], Sequence[Stage]]
"""What each stage of a candidate costs with one of its microbatches; OptionError where it has none."""


def divisors(batch: int) -> tuple[int, ...]:
    """The counts of equal microbatches that a batch can be cut into."""
    if batch < 1:
        raise OptionError(f"expected a batch of 1 or more, came {batch}")
    return tuple(m for m in range(1, batch + 1) if batch % m == 0)


def candidates(
    ranks: int,
    microbatches: Sequence[int],
    schedules: Sequence[str] = SCHEDULES,
    chunks: Sequence[int] = (1, 2),
) -> Iterator[Candidate]:
    """Each schedule with each count of microbatches, and of stages a rank where it takes several counts."""
    for schedule in map(named, schedules):
        for count in (1,) if schedule in ONE else (2,) if schedule in TWO else chunks:
            yield from (Candidate(schedule, ranks, count, m) for m in microbatches)


def choose(
    cost: Cost, asked: Sequence[Candidate], caps: float | Sequence[float] = math.inf, links: Links = INSTANT
) -> Choice:  # fmt: skip
    """The candidate of least time; caps: bytes of every rank, or of each.

    Raises OptionError where none fits, with the smallest cap for which one does.
    """
    best: tuple[tuple[float, int, int], Candidate, Simulated] | None = None
    tried, left_out = list[Tried](), list[tuple[Candidate, str]]()
    for candidate in asked:
        room = _caps(caps, candidate.ranks)
        try:
            actions = order(candidate.schedule, candidate.ranks, candidate.microbatches, candidate.chunks)
            found = simulate(actions, cost(candidate), links)
        except OptionError as error:
            left_out.append((candidate, error.message))
            continue
        fits = all(peak <= cap for peak, cap in zip(found.peaks, room, strict=True))
        tried.append(Tried(candidate, found.seconds, found.peaks, fits))
        rank = found.seconds, max(found.peaks), candidate.microbatches
        if fits and (best is None or rank < best[0]):
            best = rank, candidate, found
    if best is None:
        raise _refused(tried, left_out, caps)
    return Choice(best[1], best[2], tuple(tried), tuple(left_out))


def _caps(caps: float | Sequence[float], ranks: int) -> Sequence[float]:
    if not isinstance(caps, Sequence):
        return [caps] * ranks
    if len(caps) != ranks:
        raise OptionError(f"expected a cap for each of {ranks} ranks, came {len(caps)}")
    return caps


def _refused(
    tried: Sequence[Tried], left_out: Sequence[tuple[Candidate, str]], caps: float | Sequence[float]
) -> OptionError:
    if not tried:
        reasons = "; ".join(dict.fromkeys(reason for _, reason in left_out)) or "none was asked for"
        return OptionError(f"expected a schedule that can run, came none: {reasons}")

    def lacks(one: Tried) -> float:
        return max(p - c for p, c in zip(one.peaks, _caps(caps, len(one.peaks)), strict=True))

    least = min(tried, key=lacks)
    if isinstance(caps, Sequence):
        return OptionError(
            f"expected a schedule within {list(caps)} bytes, came none",
            f"the one that lacks least, {lacks(least):.0f} bytes on a rank, is {least.candidate}: "
            f"it takes {list(least.peaks)}",
        )
    return OptionError(
        f"expected a schedule within {caps} bytes a rank, came none",
        f"the smallest cap that does is {max(least.peaks)} bytes, for {least.candidate}",
    )
