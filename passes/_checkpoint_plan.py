"""Which values of a training step to keep for backward, so that its peak stays under a number of bytes.

The calls are cut into parts where few bytes cross, and what crosses a cut is its boundary. Within a part,
what to keep is a minimum cut: for a price a byte, keeping costs the price, computing again costs time and
needs the arguments; all prices give the part's frontier. Along the parts a shortest path chooses from the
frontiers: what the parts before keep is there while a part's backward runs, beside what that takes itself.
A run of parts may keep nothing but its beginning: then backward goes through it twice, first for its
boundaries, then part by part. The plan that comes out is gone through by fxaccel.replay, byte by byte.

Source     the closure with a price: Picard 1976, "Maximal closure of a graph", and the frontier of its
           multipliers: Everett 1963; parts as the stages of a chain: Beaumont et al. 2019, "Optimal
           checkpointing for heterogeneous chains", arXiv:1911.13214; options for a stage: Zhao et al. 2023,
           "Rockmate", arXiv:2307.01236; two passes: Chen et al. 2016, arXiv:1604.06174.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import networkx as nx
import torch
from torch import Tensor

from fxaccel.profile import Profile
from fxaccel.replay import Draft, lazily, replay, results

LEAST = (1, 2, 4, 8, 16)  # calls in a part, from the finest to the coarsest parts
MOST = 2.5  # times as many at the most
PARTS = 64  # the most of them
PRICES = 16  # of a byte, from where all is kept to where nothing is
FEW = 5  # values between two prices, of which all subsets are tried
STATES = 300  # kept at a cut while the shortest path is searched
FINE = 200  # steps of a search for a budget
NEAR = 50  # steps of a search for what the parts are to aim at
RUNS = 24  # the longest run of parts that keeps its beginning alone


@dataclass(frozen=True)
class Option:
    """What a part may keep within it.

    kept       values, by their number in the part
    nbytes     of them
    seconds    what computing the others again takes
    peak       the most bytes that live while the part runs forward or backward, its boundary included
    """

    kept: frozenset[int]
    nbytes: int
    seconds: float
    peak: int


@dataclass
class Part:
    """Consecutive calls.

    profile     of these calls alone: what others make is free
    calls       steps of the graph
    values      number in the part -> number in the step
    crossing    values that later parts read, by their number in the part
    options     from keeping all to keeping nothing
    forward     seconds to make the boundary again
    """

    profile: Profile
    calls: Sequence[int]
    values: list[int]
    crossing: frozenset[int]
    seconds: dict[int, float]
    options: list[Option] = field(default_factory=list)
    forward: float = 0.0

    @cached_property
    def boundary(self) -> int:
        """Bytes of what later parts read."""
        return sum(self.profile.values[v].nbytes for v in self.crossing)

    @property
    def bare(self) -> Option:
        """The option that keeps nothing."""
        return min(self.options, key=lambda o: (o.nbytes, o.peak))


class Planner:
    """Plans for one step.

    seconds    of each call, by which what is computed again is weighed
    """

    def __init__(self, profile: Profile, seconds: Mapping[int, float]) -> None:
        self.profile, self.seconds = profile, seconds
        self.need = replay(profile, Draft(), seconds).peak

    @cached_property
    def grains(self) -> list[list[Part]]:
        """The step in fine and in coarse parts: fine ones take less at once, coarse ones leave a choice."""
        many = sum(not call.view for call in self.profile.calls.values())
        fitting = [least for least in LEAST if many <= PARTS * least] or [-(-many // PARTS)]
        found = (parts(self.profile, self.seconds, least) for least in fitting)
        return list({tuple(part.calls[0] for part in made): made for made in found}.values())

    def plan(self, budget: int) -> Draft | None:
        """The draft of least time whose peak, replayed, is at most `budget` bytes; None if none was found."""
        if self.need <= budget:
            return Draft()
        drafts = [d for made in self.grains if (d := self.along(made, budget)) is not None]
        return min(drafts, key=lambda d: replay(self.profile, d, self.seconds).seconds, default=None)

    def along(self, made: Sequence[Part], budget: int) -> Draft | None:
        """The same for these parts.

        A part knows of the others no more than what they keep, so that the whole may peak a little higher
        than they say, or lower: the way is searched with another aim then.
        """
        low, high, aim, best = 0, budget * 5 // 4, budget, None
        while high - low > budget // NEAR + 1:
            moves = way(made, aim)
            found = None if moves is None else draft(self.profile, made, moves)
            over = 0 if found is None else replay(self.profile, found, self.seconds).peak - budget
            if found is None or over <= 0:
                low, best = aim, found or best
                if -over * NEAR <= budget and found is not None:
                    break
            else:
                high = aim
            aim = aim - over if found is not None and low < aim - over < high else (low + high) // 2
        return best

    def smallest(self) -> int:
        """The smallest budget that a plan was found for, within 1 in FINE of what the step needs."""
        return replay(self.profile, self.within(math.inf)).peak

    def within(self, seconds: float) -> Draft:
        """The draft of the smallest peak found that computes at most so many seconds again."""
        low, high, best = 0, self.need, Draft()
        while high - low > self.need // FINE + 1:
            middle = (low + high) // 2
            found = self.plan(middle)
            cost = None if found is None else replay(self.profile, found, self.seconds)
            if found is None or cost is None or cost.seconds > seconds:
                low = middle
            else:
                high, best = min(cost.peak, middle), found
        return best


def droppable(profile: Profile) -> set[int]:
    """Values that can be computed again."""
    values, calls = profile.values, profile.calls
    return {n for n, v in enumerate(values) if calls[v.made].again and not v.shown}


# -- parts -----------------------------------------------------------------------------------------


def cuts(profile: Profile, least: int) -> list[int]:
    """Calls before which the graph is cut: where the fewest bytes cross, some calls after the last."""
    order = [c for c, call in profile.calls.items() if not call.view]
    place = {call: i for i, call in enumerate(order)}
    width = [0] * (len(order) + 1)
    for value in profile.values:
        width[place[value.made] + 1] += value.nbytes
        last = bisect.bisect_right(order, value.read)
        width[max(last, place[value.made] + 1)] -= value.nbytes
    crossing = list(itertools.accumulate(width))
    at, found = 0, list[int]()
    while len(order) - at > 2 * least:
        at = min(
            range(at + least, min(at + int(MOST * least), len(order) - least) + 1),
            key=crossing.__getitem__,
        )
        found.append(order[at])
    return found


def parts(profile: Profile, seconds: Mapping[int, float], least: int) -> list[Part]:
    """The step in parts, with the frontier of each; equal parts share theirs."""
    order, marks = list(profile.calls), cuts(profile, least)
    bounds = [0, *(order.index(c) for c in marks), len(order)]
    made: list[Part] = []
    known: dict[object, Part] = {}
    for low, high in itertools.pairwise(bounds):
        part = _part(profile, order[low:high], seconds)
        signature = _signature(part)
        like = known.setdefault(signature, part)
        if like is part:
            part.options = frontier(part)
            part.forward = sum(part.seconds[c] for c in _closure(part, part.crossing))
        part.forward = like.forward
        rise = _base(part) - _base(like)
        part.options = [replace(o, peak=o.peak + rise) for o in like.options] if rise else like.options
        made.append(part)
    return made


def _part(profile: Profile, calls: Sequence[int], seconds: Mapping[int, float]) -> Part:
    ours = [v for c in calls for v in results(profile, c)]
    number = {v: i for i, v in enumerate(ours)}
    at, last = {c: i for i, c in enumerate(calls)}, calls[-1]
    values = [
        replace(
            profile.values[v], made=at[profile.values[v].made],
            read=at.get(profile.values[v].read, len(calls) if profile.values[v].read > last else -1),
            needed=[at[s] for s in profile.values[v].needed if s in at],
        )
        for v in ours
    ]  # fmt: skip
    inside = {
        i: replace(
            profile.calls[c],
            makes=[number[v] for v in profile.calls[c].makes],
            hides=number.get(hides) if (hides := profile.calls[c].hides) is not None else None,
            reads=[number[v] for v in profile.calls[c].reads if v in number],
        )
        for i, c in enumerate(calls)
    }
    crossing = frozenset(i for i, v in enumerate(ours) if profile.values[v].read > last)
    small = Profile(values, inside, {}, {}, 0, 0)
    return Part(small, calls, ours, crossing, {i: seconds[c] for i, c in enumerate(calls)})


def _base(part: Part) -> int:
    """Bytes of gradients when the part's backward begins."""
    return next((c.rest for c in reversed(part.profile.calls.values()) if c.rest), 0)


def _signature(part: Part) -> object:
    base = _base(part)
    calls = tuple(
        (tuple(c.makes), c.hides, tuple(c.reads), c.takes, c.rest and c.rest - base, c.surge - c.rest,
         c.again, part.seconds[i])
        for i, c in part.profile.calls.items()
    )  # fmt: skip
    values = tuple((v.nbytes, v.made, v.read, tuple(v.needed), v.shown) for v in part.profile.values)
    return calls, values, part.crossing


# -- the frontier of a part ------------------------------------------------------------------------


def frontier(part: Part) -> list[Option]:
    """What the part may keep: no option has another that keeps less, computes less and peaks lower."""
    profile = part.profile
    inner = droppable(profile) - part.crossing
    tried = {frozenset(v for v in inner if profile.values[v].needed): None, frozenset[int](): None}
    sets = [_closed(part, inner, price) for price in _prices(part, inner)]
    for more, less in itertools.pairwise(sorted({*tried, *sets}, key=lambda kept: -_bytes(part, kept))):
        for extra in _between(part, more - less):
            tried[less | extra] = None
    found = [_option(part, inner, kept) for kept in tried]
    found.sort(key=lambda o: (o.nbytes, o.seconds, o.peak))
    best: list[Option] = []
    for one in found:
        if not any(o.seconds <= one.seconds and o.peak <= one.peak for o in best):
            best.append(one)
    return best


def _prices(part: Part, inner: set[int]) -> Iterator[float]:
    """Prices of a byte, in even ratios from one at which nothing pays to be computed again."""
    values = part.profile.values
    sizes = [values[v].nbytes for v in inner if values[v].nbytes and values[v].needed]
    times = [t for t in part.seconds.values() if t > 0]
    if not sizes or not times:
        return
    low, high = min(times) / max(sizes) / 2, sum(times) / min(sizes) * 2
    for i in range(PRICES):
        yield low * (high / low) ** (i / (PRICES - 1))


def _closed(part: Part, inner: set[int], price: float) -> frozenset[int]:
    """The values to keep at a price a byte: a minimum cut between what is needed and what costs."""
    graph = nx.DiGraph()
    values, calls = part.profile.values, part.profile.calls
    graph.add_nodes_from(["needed", "cost"])
    for v in inner:
        graph.add_edge(("value", v), ("call", values[v].made), capacity=price * values[v].nbytes)
        if values[v].needed:
            graph.add_edge("needed", ("value", v))
    for c in {values[v].made for v in inner}:
        graph.add_edge(("call", c), "cost", capacity=part.seconds[c])
        graph.add_edges_from((("call", c), ("value", u)) for u in calls[c].reads if u in inner)
    _, (ready, _) = nx.minimum_cut(graph, "needed", "cost")
    return frozenset(v for v in inner if ("value", v) in ready and ("call", values[v].made) not in ready)


def _between(part: Part, values: frozenset[int]) -> Iterator[frozenset[int]]:
    """Subsets: all of a few values, else those of the smallest ones."""
    ordered = sorted(values, key=lambda v: part.profile.values[v].nbytes)
    if len(ordered) <= FEW:
        for size in range(len(ordered) + 1):
            yield from map(frozenset, itertools.combinations(ordered, size))
    else:
        yield from (frozenset(ordered[:n]) for n in range(len(ordered) + 1))


def _bytes(part: Part, kept: frozenset[int]) -> int:
    return sum(part.profile.values[v].nbytes for v in kept)


def _option(part: Part, inner: set[int], kept: frozenset[int]) -> Option:
    found = replay(part.profile, lazily(part.profile, inner - kept), part.seconds)
    return Option(kept, _bytes(part, kept), found.seconds, found.peak)


def _closure(part: Part, wanted: frozenset[int]) -> set[int]:
    """The calls that compute values again from what the part begins with."""
    values, calls, left, found = part.profile.values, part.profile.calls, list(wanted), set[int]()
    while left:
        call = values[left.pop()].made
        if call not in found:
            found.add(call)
            left += calls[call].reads
    return found


# -- the way along the parts -----------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """From one cut to a later one.

    start, end    the parts between them
    option        what the part keeps, where it is one; None for a run, which keeps its beginning alone
    room          the most bytes that may be kept before it
    nbytes        that it keeps in the end
    seconds       what computing the others again takes
    """

    start: int
    end: int
    option: Option | None
    room: int
    nbytes: int
    seconds: float


def way(made: Sequence[Part], budget: int) -> list[Move] | None:
    """The least to compute again with a peak of at most `budget`, by the frontiers of the parts."""
    shown = [sum(v.nbytes for v in p.profile.values if v.shown) for p in made]
    rooms = [budget - sum(shown) + own for own in shown]
    fronts = [_Front() for _ in range(len(made) + 1)]
    fronts[0].add(
        torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64), torch.zeros(1), None
    )
    for start in range(len(made)):
        front = fronts[start].thinned()
        for move in _moves(made, start, rooms):
            fits = (front.nbytes <= move.room).nonzero()[:, 0]
            if len(fits):
                more = front.nbytes[fits] + move.nbytes, front.seconds[fits] + move.seconds
                fronts[move.end].add(*more, fits, move)
    last = fronts[-1].thinned()
    if not len(last.nbytes):
        return None
    moves, at, cut = list[Move](), len(last.nbytes) - 1, len(made)  # the last keeps most and takes least
    while cut:
        move, at = fronts[cut].before(at)
        moves.append(move)
        cut = move.start
    return moves[::-1]


class _Front:
    """The ways up to a cut of which none keeps fewer bytes in less time: kept bytes rise, seconds fall."""

    def __init__(self) -> None:
        self.arrived: list[tuple[Tensor, Tensor, Tensor]] = []
        self.moves: list[Move | None] = []
        self.nbytes = self.seconds = self.origin = self.move = torch.empty(0)

    def add(self, nbytes: Tensor, seconds: Tensor, origin: Tensor, move: Move | None) -> None:
        """Ways by one move, from the ways of these numbers at its beginning."""
        self.arrived.append((nbytes, seconds, origin))
        self.moves.append(move)

    def thinned(self) -> _Front:
        """Itself, with those ways alone, evenly thinned to STATES."""
        if not self.arrived:
            return self
        nbytes, seconds, origin = (torch.cat([one[i] for one in self.arrived]) for i in range(3))
        move = torch.repeat_interleave(torch.tensor([len(one[0]) for one in self.arrived]))
        order = seconds.argsort(stable=True)
        order = order[nbytes[order].argsort(stable=True)]
        least = seconds[order].cummin(0).values
        best = order[torch.cat([torch.ones(1, dtype=torch.bool), seconds[order][1:] < least[:-1]])]
        if len(best) > STATES:
            best = best[torch.linspace(0, len(best) - 1, STATES).round().long()]
        self.nbytes, self.seconds, self.origin, self.move = (t[best] for t in (nbytes, seconds, origin, move))
        return self

    def before(self, at: int) -> tuple[Move, int]:
        """The move by which a way has come, and its number where it came from."""
        move = self.moves[int(self.move[at])]
        assert move is not None, "the first cut has no move"
        return move, int(self.origin[at])


def _moves(made: Sequence[Part], start: int, rooms: Sequence[int]) -> Iterator[Move]:
    """All moves from a cut."""
    for option in made[start].options:
        kept = option.nbytes + made[start].boundary
        yield Move(start, start + 1, option, rooms[start] - option.peak, kept, option.seconds)
    inner, room, seconds = 0, rooms[start], 0.0
    for end in range(start, min(len(made), start + RUNS)):
        bare = made[end].bare
        room = min(room, rooms[end] - inner - bare.peak)
        seconds += bare.seconds
        if room < 0:
            return
        if end > start:
            yield Move(start, end + 1, None, room, made[end].boundary, seconds)
        inner += made[end].boundary
        seconds += made[end].forward


def draft(profile: Profile, made: Sequence[Part], moves: Sequence[Move]) -> Draft:
    """The draft that a way stands for."""
    kept, posts = set[int](), set[int]()
    for move in moves:
        *inner, last = made[move.start : move.end]
        for part in inner:
            posts.update(part.values[v] for v in part.crossing)
        kept.update(last.values[v] for v in last.crossing)
        if move.option is not None:
            kept.update(last.values[v] for v in move.option.kept)
    place = {c: i for i, part in enumerate(made) for c in part.calls}
    return lazily(profile, droppable(profile) - kept, place, posts)
