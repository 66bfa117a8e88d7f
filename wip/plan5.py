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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import networkx as nx
import torch
from torch import Tensor

from fxaccel.profile import Profile
from fxaccel.replay import Draft, lazily, replay, results

GRAINS=((1,1),(2,5),(4,10),(8,20),(16,40))
GRAIN_PARTS=110
UNITS=300
LEAST, MOST = 8, 20  # calls in a part
PARTS = 256  # the most parts
PRICES = 24  # of a byte, from where all is kept to where nothing is
FEW = 5  # values between two prices, of which all subsets are tried
STATES = 300  # kept at a cut while the shortest path is searched
FINE = 200  # steps of a search for a budget
TRIES = 8  # with a lower aim, where the parts together take more than each by itself
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
    def parts(self):
        return self.grains[-1].made

    @cached_property
    def grains(self):
        many = sum(not c.view for c in self.profile.calls.values())
        found = {}
        for least, most in GRAINS:
            if many / least <= GRAIN_PARTS:
                g = Grain(self.profile, self.seconds, least, most)
                found[tuple(len(p.calls) for p in g.made)] = g
        return list(found.values())

    def plan(self, budget):
        if self.need <= budget:
            return Draft()
        best = None
        for grain in self.grains:
            found = self.one(grain, budget)
            if found is not None:
                cost = replay(self.profile, found, self.seconds).seconds
                if best is None or cost < best[0]:
                    best = cost, found, grain
        return best and self.polish(best[2], best[1], budget)

    def polish(self, grain, found, budget):
        profile = self.profile
        can = droppable(profile)
        readable = {v for c in profile.calls.values() for v in c.reads}
        values = profile.values
        can = [v for v in can if values[v].nbytes and (values[v].needed or v in readable)]
        dropped, top = set(found.dropped), found.top
        left = [min(EVALS, EFFORT // len(profile.calls))]
        def cost(dropped, top):
            left[0] -= 1
            return replay(profile, lazily2(profile, dropped, grain.at, top), self.seconds)
        now = cost(dropped, top)
        better = True
        while better and left[0] > 0:
            better = False
            # keep one more where there is room; else swap: keep one and drop another
            gains = sorted((v for v in can if v in dropped), key=lambda v: -self.seconds[values[v].made])
            singles = []
            for v in gains:
                if left[0] <= 0: break
                c = cost(dropped - {v}, top)
                if c.seconds < now.seconds:
                    if c.peak <= budget:
                        dropped, now, better = dropped - {v}, c, True
                    else:
                        singles.append((c.seconds - now.seconds, c.peak, v))
            singles.sort()
            for gain, peak, v in singles:
                if left[0] <= 0: break
                trial = None
                for u in sorted((u for u in can if u not in dropped), key=lambda u: self.seconds[values[u].made]):
                    if left[0] <= 0: break
                    c = cost((dropped - {v}) | {u}, top)
                    if c.peak <= budget and c.seconds < now.seconds - 1e-15 and (trial is None or c.seconds < trial[0].seconds):
                        trial = c, u
                if trial:
                    dropped, now, better = (dropped - {v}) | {trial[1]}, trial[0], True
                    break
        return Draft2(frozenset(dropped), lazily2(profile, dropped, grain.at, top).again, top)

    def one(self, grain, budget):
        low, high, aim, best = 0, None, budget, None
        for _ in range(TRIES):
            moves = grain.way(int(aim)) if aim > 0 else None
            if moves is None:
                if aim <= budget: low = max(low, aim)
                if best is not None or high is None: 
                    if best is not None: break
                aim = aim * 1.05 if high is None else (aim + high) / 2
                if aim > budget * 1.25: break
                continue
            found = grain.draft(moves)
            cost = replay(self.profile, found, self.seconds)
            if cost.peak <= budget:
                if best is None or cost.seconds < best[0]:
                    best = cost.seconds, found
                low = aim
                nxt = aim + (budget - cost.peak)
                if budget - cost.peak < budget // FINE: break
            else:
                high = aim
                nxt = aim - (cost.peak - budget)
            if high is not None and nxt >= high: nxt = (low + high) / 2
            if nxt <= low: nxt = (low + high) / 2 if high else low * 1.02
            if abs(nxt - aim) < budget / 400: break
            aim = nxt
        return best and best[1]

    def smallest(self) -> int:
        """The smallest budget that a plan was found for, within 1 in FINE of what the step needs."""
        low, high = 0, self.need
        while high - low > self.need // FINE + 1:
            middle = (low + high) // 2
            found = self.plan(middle)
            if found is None:
                low = middle
            else:
                high = replay(self.profile, found).peak
        return high

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


def cuts(profile: Profile, LEAST=LEAST, MOST=MOST) -> list[int]:
    """Calls before which the graph is cut: where the fewest bytes cross, LEAST to MOST after the last."""
    order = [c for c, call in profile.calls.items() if not call.view]
    place = {call: i for i, call in enumerate(order)}
    width = [0] * (len(order) + 1)
    for value in profile.values:
        width[place[value.made] + 1] += value.nbytes
        last = bisect.bisect_right(order, value.read)
        width[max(last, place[value.made] + 1)] -= value.nbytes
    crossing = list(itertools.accumulate(width))
    least = max(LEAST, len(order) // PARTS)
    at, found = 0, list[int]()
    while len(order) - at > 2 * least:
        at = min(
            range(at + least, min(at + MOST * least // LEAST, len(order) - least) + 1),
            key=crossing.__getitem__,
        )
        found.append(order[at])
    return found


def parts(profile: Profile, seconds: Mapping[int, float], LEAST=LEAST, MOST=MOST) -> list[Part]:
    """The step in parts, with the frontier of each; equal parts share theirs."""
    order, marks = list(profile.calls), cuts(profile, LEAST, MOST)
    bounds = [0, *(order.index(c) for c in marks), len(order)]
    made: list[Part] = []
    known: dict[object, Part] = {}
    for low, high in itertools.pairwise(bounds):
        part = _part(profile, order[low:high], seconds)
        signature = _signature(part)
        like = known.setdefault(signature, part)
        if like is part:
            part.options = frontier(part)
            part.forward = sum(part.seconds[c] for c in _closure(part, part.crossing, frozenset()))
        part.forward = like.forward
        rise = _base(part) - _base(like)
        part.options = [replace(o, peak=o.peak + rise) for o in like.options] if rise else like.options
        made.append(part)
    return made


def _part(profile: Profile, calls: Sequence[int], seconds: Mapping[int, float]) -> Part:
    ours = [v for c in calls for v in results(profile, c)]
    number = {v: i for i, v in enumerate(ours)}
    first, last = calls[0], calls[-1]
    at = {c: i for i, c in enumerate(calls)}
    values = [
        replace(
            profile.values[v], made=at[profile.values[v].made],
            read=at.get(profile.values[v].read, len(calls) if profile.values[v].read > last else -1),
            needed=[at[s] for s in profile.values[v].needed if first <= s <= last and s in at],
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
    sets = [kept for price in _prices(part, inner) if (kept := _closed(part, inner, price)) is not None]
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


def _closure(part: Part, wanted: frozenset[int], kept: frozenset[int]) -> set[int]:
    """The calls that compute values again from what the part begins with."""
    values, calls, left, found = part.profile.values, part.profile.calls, list(wanted), set[int]()
    while left:
        call = values[left.pop()].made
        if call not in found:
            found.add(call)
            left += [v for v in calls[call].reads if v not in kept]
    return found



import numpy as np
EVALS=2000
EFFORT=200_000
@dataclass(frozen=True)
class Draft2(Draft):
    top: dict = field(default_factory=dict)
from fxaccel.replay import _program, needed
INF=float("inf")

class Grain:
    def __init__(self, profile, seconds, least, most):
        self.profile, self.seconds = profile, seconds
        self.made = made = parts(profile, seconds, least, most)
        n = len(made)
        at = {c: i for i, part in enumerate(made) for c in part.calls}
        self.at = at
        self.where = {}
        W = np.zeros((n + 1, n + 1))
        for p, part in enumerate(made):
            for v in part.crossing:
                g = part.values[v]
                order = [c for c in profile.calls if c <= profile.values[g].read]
                q = at[order[-1]] if order else p
                q = max(q, p)
                self.where[g] = (p, q)
                W[p, q] += profile.values[g].nbytes
        self.S = np.zeros((n + 2, n + 2))
        self.S[1:, 1:] = W.cumsum(0).cumsum(1)
        self.ones = []
        known = {}
        for part in made:
            sig = id(part.options[0].kept), part.forward, part.boundary, len(part.options)
            clo = _closure(part, part.crossing, frozenset())
            t = _program(part.profile, sorted(clo), [(v, 0) for v in part.crossing])[0]
            opts = []
            for o in part.options:
                c = _closure(part, part.crossing | o.kept, frozenset())
                fw = sum(part.seconds[x] for x in c)
                opts.append((o, fw))
            rest = part.profile.calls[len(part.calls) - 1].rest
            self.ones.append((t, opts, rest, part.forward))
        self.shown = [sum(v.nbytes for v in p.profile.values if v.shown) for p in made]

    def between(self, p0, p1, q0, q1):
        """bytes of values made in parts p0..p1-1 whose last reader is in q0..q1-1"""
        if p1 <= p0 or q1 <= q0: return 0.0
        S = self.S
        return S[p1, q1] - S[p0, q1] - S[p1, q0] + S[p0, q0]

    def table(self, budget):
        made, n = self.made, len(self.made)
        self.unit = unit = max(budget / UNITS, 1e-9)
        off = sum(self.shown)
        ceil = lambda b: int(np.ceil(b / unit - 1e-9))
        R, choice = {}, {}
        fwd = np.concatenate([[0], np.cumsum([o[3] for o in self.ones])])
        for s in range(n - 1, -1, -1):
            t, opts, rest, forward = self.ones[s]
            bare = made[s].bare
            row = np.full(UNITS + 1, INF); need = ceil(bare.peak - self.shown[s] + off)
            if need <= UNITS: row[max(need, 0):] = bare.seconds
            R[s, s] = row
            for e in range(s + 1, min(n, s + RUNS)):
                best = np.full(UNITS + 1, INF); pick = np.zeros(UNITS + 1, dtype=np.int32)
                resting = self.ones[e][2]
                h = self.between(s, s + 1, s + 1, e + 1)
                for i, (o, fw) in enumerate(opts):
                    low, shift = ceil(o.peak - self.shown[s] + off), ceil(o.nbytes + h)
                    low = max(low, shift, ceil(t + resting + off), 0)
                    if low > UNITS: continue
                    if (s + 1, e) not in R: continue
                    c = R[s + 1, e][low - shift: UNITS + 1 - shift] + (fw + o.seconds)
                    better = c < best[low:]
                    best[low:][better] = c[better]; pick[low:][better] = -1 - i
                if not self.made[s].options: pass
                trans = t + self.between(s, s + 1, s + 1, n)
                for k in range(s + 2, e + 1):
                    trans = max(trans, self.ones[k - 1][0] + self.between(s, k - 1, k - 1, n))
                    h = self.between(s, k, k, e + 1)
                    shift = ceil(h); low = max(shift, ceil(trans + resting + off))
                    if low > UNITS or (k, e) not in R or (s, k - 1) not in R: continue
                    c = R[k, e][low - shift: UNITS + 1 - shift] + R[s, k - 1][low:] + (fwd[k] - fwd[s])
                    better = c < best[low:]
                    best[low:][better] = c[better]; pick[low:][better] = k
                R[s, e], choice[s, e] = best, pick
                if best[-1] == INF: break
        self.R, self.choice = R, choice

    def way(self, budget):
        made, n = self.made, len(self.made)
        self.table(budget)
        off = sum(self.shown); unit = self.unit
        # fronts: arrays nbytes, seconds, origin, move
        arrived = [[] for _ in range(n + 1)]
        arrived[0].append((np.zeros(1), np.zeros(1), np.zeros(1, int), None))
        fronts = [None] * (n + 1)
        for s in range(n + 1):
            fr = fronts[s] = thin(arrived[s])
            if fr is None:
                if s == n: return None
                continue
            if s == n: break
            nb, sec = fr[0], fr[1]
            h = self.between(s, s + 1, s + 1, n + 1)
            for o in made[s].options:
                fit = np.nonzero(nb <= budget - off + self.shown[s] - o.peak)[0]
                if len(fit):
                    arrived[s + 1].append((nb[fit] + o.nbytes + h, sec[fit] + o.seconds, fit, (s, s + 1, o)))
            m = np.floor((budget - nb) / unit + 1e-9).astype(int)
            for e in range(s + 1, min(n, s + RUNS)):
                if (s, e) not in self.R: break
                c = np.where(m >= 0, self.R[s, e][np.clip(m, 0, UNITS)], INF)
                fit = np.nonzero(c < INF)[0]
                if len(fit):
                    arrived[e + 1].append((nb[fit] + self.between(s, e + 1, e + 1, n + 1), sec[fit] + c[fit], fit, (s, e + 1, None)))
        moves, at, cut = [], len(fronts[n][0]) - 1, n
        while cut:
            nb, sec, org, mv, names = fronts[cut]
            move = names[mv[at]]; at = org[at]; cut = move[0]
            moves.append((*move, int(np.floor((budget - fronts[cut][0][at]) / unit + 1e-9))))
        return moves[::-1]

    def draft(self, moves):
        made, profile = self.made, self.profile
        kept, top = set(), {}
        for s, end, o, m in moves:
            kept.update(g for g, (p, q) in self.where.items() if s <= p < end <= q)
            if o is not None:
                kept.update(made[s].values[v] for v in o.kept)
            else:
                self.trace(s, end - 1, min(m, UNITS), top)
        return lazily2(profile, droppable(profile) - kept, self.at, top)

    def trace(self, s, e, m, top):
        if s == e: return
        c = int(self.choice[s, e][m])
        ceil = lambda b: int(np.ceil(b / self.unit - 1e-9))
        k = c if c > 0 else s + 1
        for g, (p, q) in self.where.items():
            if s <= p < k <= q <= e: top[g] = max(e, top.get(g, -1))
        if c > 0:
            self.trace(k, e, m - ceil(self.between(s, k, k, e + 1)), top)
            self.trace(s, k - 1, m, top)
        else:
            o = self.ones[s][1][-1 - c][0]
            for v in o.kept: top[self.made[s].values[v]] = e
            self.trace(s + 1, e, m - ceil(o.nbytes + self.between(s, s + 1, s + 1, e + 1)), top)

def thin(arrived):
    if not arrived: return None
    nb, sec, org = (np.concatenate([a[i] for a in arrived]) for i in range(3))
    mv = np.repeat(np.arange(len(arrived)), [len(a[0]) for a in arrived])
    order = np.lexsort((sec, nb))
    least = np.minimum.accumulate(sec[order])
    best = order[np.concatenate([[True], sec[order][1:] < least[:-1]])]
    if len(best) > STATES: best = best[np.linspace(0, len(best) - 1, STATES).round().astype(int)]
    return nb[best], sec[best], org[best], mv[best], [a[3] for a in arrived]

def lazily2(profile, dropped, part, top):
    values, calls = profile.values, profile.calls
    ready, again = set(), {}
    needs = needed(profile, dropped)
    for step in sorted(needs, reverse=True):
        wanted = [v for v in needs[step] if v not in ready]
        program = set()
        while wanted:
            call = values[wanted.pop()].made
            if call not in program:
                program.add(call)
                wanted += [v for v in calls[call].reads if v in dropped and v not in ready]
        if program:
            again[step] = sorted(program)
            for c in program:
                ready.update(v for v in results(profile, c) if v in dropped and (part[c] == part[step] or part[step] <= top.get(v, -1)))
    return Draft2(frozenset(dropped), again, top)
