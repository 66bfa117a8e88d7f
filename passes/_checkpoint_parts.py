"""A training step in parts, and what each of them may keep within it.

The calls are cut where few bytes cross, and what crosses a cut is its boundary. Within a part, what to keep
is a minimum cut: for a price a byte, keeping costs the price, computing again costs time and needs the
arguments; all prices give the part's frontier. Equal parts share theirs.

Source     the closure with a price: Picard 1976, "Maximal closure of a graph", and the frontier of its
           multipliers: Everett 1963; options for a stage: Zhao et al. 2023, "Rockmate", arXiv:2307.01236.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import networkx as nx

from fxaccel.profile import Profile
from fxaccel.replay import lazily, program_bytes, replay, results

MOST = 2.5  # times as many calls in a part as the least, at the most
PRICES = 16  # of a byte, from where all is kept to where nothing is
FEW = 5  # values between two prices, of which all subsets are tried


@dataclass(frozen=True)
class Option:
    """What a part may keep within it.

    kept       values, by their number in the part
    nbytes     of them
    seconds    what computing the others again takes
    peak       the most bytes that live while the part runs forward or backward, its boundary included
    forward    seconds to make them, and the boundary, from the beginning of the part
    """

    kept: frozenset[int]
    nbytes: int
    seconds: float
    peak: int
    forward: float


@dataclass
class Part:
    """Consecutive calls.

    profile     of these calls alone: what others make is free
    calls       steps of the graph
    values      number in the part -> number in the step
    crossing    values that later parts read, by their number in the part
    options     from keeping all to keeping nothing
    transit     the most bytes that live while its boundary is made again
    kind        a number that equal parts share
    """

    profile: Profile
    calls: Sequence[int]
    values: list[int]
    crossing: frozenset[int]
    seconds: dict[int, float]
    options: list[Option] = field(default_factory=list)
    transit: int = 0
    kind: int = 0

    @cached_property
    def boundary(self) -> int:
        """Bytes of what later parts read."""
        return sum(self.profile.values[v].nbytes for v in self.crossing)

    @cached_property
    def shown(self) -> int:
        """Bytes of what the caller holds in the end."""
        return sum(v.nbytes for v in self.profile.values if v.shown)

    @cached_property
    def rest(self) -> int:
        """Bytes of gradients when its backward begins."""
        return next((c.rest for c in reversed(self.profile.calls.values()) if c.rest), 0)

    @cached_property
    def bare(self) -> Option:
        """The option that keeps nothing."""
        return min(self.options, key=lambda o: (o.nbytes, o.peak))


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
    found: list[Part] = []
    known: dict[object, Part] = {}
    for low, high in itertools.pairwise(bounds):
        part = _part(profile, order[low:high], seconds)
        signature = _signature(part)
        like = known.setdefault(signature, part)
        if like is part:
            part.options = frontier(part)
            calls = sorted(_closure(part, part.crossing))
            part.transit, _ = program_bytes(part.profile, calls, part.crossing)
            part.kind = len(known)
        part.transit, part.kind = like.transit, like.kind
        rise = part.rest - like.rest
        part.options = [replace(o, peak=o.peak + rise) for o in like.options] if rise else like.options
        found.append(part)
    return found


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


def _signature(part: Part) -> object:
    calls = tuple(
        (tuple(c.makes), c.hides, tuple(c.reads), c.takes, c.rest and c.rest - part.rest, c.surge - c.rest,
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
    forward = sum(part.seconds[c] for c in _closure(part, kept | part.crossing))
    return Option(kept, _bytes(part, kept), found.seconds, found.peak, forward)


def _closure(part: Part, wanted: frozenset[int]) -> set[int]:
    """The calls that compute values again from what the part begins with."""
    values, calls, left, found = part.profile.values, part.profile.calls, list(wanted), set[int]()
    while left:
        call = values[left.pop()].made
        if call not in found:
            found.add(call)
            left += calls[call].reads
    return found
