"""The cut of a chain against all cuts there are."""

import itertools
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxaccel.errors import OptionError
from fxaccel.pipeline.balance import Node, balance
from fxaccel.pipeline.orders import order
from fxaccel.pipeline.simulator import Link, Stage, simulate


def both_ways(node, link):
    """Seconds and bytes of a cut after this node."""
    back = node.crossing if node.returning is None else node.returning
    return link.seconds(node.crossing) + (link.seconds(back) if back else 0), node.crossing + back


def costs(chain, cuts, in_flight, link):
    """Seconds and bytes of each stage, and the bytes sent."""
    ends = [0, *cuts, len(chain)]
    seconds, held = [], []
    for s, (i, j) in enumerate(itertools.pairwise(ends)):
        nodes = chain[i:j]
        wires = [both_ways(chain[e - 1], link)[0] for e in (i, j) if 0 < e < len(chain)]
        seconds.append(sum(n.seconds for n in nodes) + sum(wires))
        came = chain[i - 1].crossing if i else 0
        held.append(sum(n.parameters for n in nodes) + in_flight[s] * (sum(n.saved for n in nodes) + came))
    return seconds, held, sum(both_ways(chain[c - 1], link)[1] for c in cuts)


def all_cuts(chain, stages, at=()):
    places = [i for i in range(1, len(chain)) if chain[i - 1].crossing is not None]
    return [c for c in itertools.combinations(places, stages - 1) if set(at) <= set(c)]


def best(chain, stages, memory, in_flight, link, at=()):
    """(seconds of the slowest, bytes sent, cuts) of the best; what each device lacks for one."""
    found, lacks = [], math.inf
    for cuts in all_cuts(chain, stages, at):
        seconds, held, sent = costs(chain, cuts, in_flight, link)
        over = max(h - m for h, m in zip(held, memory, strict=True))
        lacks = min(lacks, over)
        if over <= 0:
            found.append((max(seconds), sent, cuts))
    return min(found, default=None), lacks


def random_chain(r, count):
    """Eighths of seconds, so that all sums are exact and many cuts are equal."""
    return [
        Node(
            r.randrange(12) / 8, r.randrange(30), r.randrange(20),
            None if r.random() < 0.1 else r.randrange(6) * 8, r.choice([None, None, 0, 16]),
        )
        for _ in range(count)
    ]  # fmt: skip


def compare(seed):
    r = random.Random(seed)
    chain = random_chain(r, r.randint(1, 11))
    places = [i for i in range(1, len(chain)) if chain[i - 1].crossing is not None]
    stages = r.randint(1, min(5, len(places) + 1))
    in_flight = [r.randint(1, 5) for _ in range(stages)]
    at = r.sample(places, r.randint(0, stages - 1)) if r.random() < 0.3 else []
    link = r.choice([Link(), Link(0.125, 64), Link(0.5, 16)])
    scale = sum(n.parameters for n in chain) + 3 * sum(n.saved for n in chain)
    memory = [r.choice([math.inf, int(scale * r.random())]) for _ in range(stages)]
    uniform = r.random() < 0.5
    memory = memory[:1] * stages if uniform else memory
    alike = len(set(memory)) == 1
    want, lacks = best(chain, stages, memory, in_flight, link, at)
    asked = {"memory": memory[0] if uniform else memory, "in_flight": in_flight, "link": link, "at": at}
    if want is None:
        with pytest.raises(OptionError) as error:
            balance(chain, stages, **asked)
        more = f"{memory[0] + lacks} bytes a device" if alike else f"{lacks} bytes more on each device"
        assert error.value.hint == f"the smallest memory that does is {more}"
        return "refused"
    found = balance(chain, stages, **asked)
    seconds, held, sent = costs(chain, found.cuts, in_flight, link)
    assert (found.slowest, found.sent, found.cuts) == want
    assert (list(found.seconds), list(found.nbytes), found.sent) == (seconds, held, sent)
    unbound, _ = best(chain, stages, [math.inf] * stages, in_flight, link)
    assert found.bound <= unbound[0] * (1 + 1e-12)
    slowest = [max(costs(chain, c, in_flight, link)[0]) for c in all_cuts(chain, stages, at)]
    return "tied" if slowest.count(found.slowest) > 1 else "cut"


@pytest.mark.parametrize("part", range(8))
def test_random_chains_are_cut_as_well_as_can_be(part):
    seen = [compare(seed) for seed in range(100 * part, 100 * part + 100)]
    assert all(seen.count(what) >= 5 for what in ("cut", "tied", "refused")), "each kind is tried"


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=9), st.integers(2, 4))
def test_seconds_that_are_no_eighths(seconds, stages):
    chain = [Node(t) for t in seconds]
    stages = min(stages, len(chain))
    want, _ = best(chain, stages, [math.inf] * stages, [1] * stages, Link())
    assert balance(chain, stages).slowest == pytest.approx(want[0], rel=1e-9, abs=1e-9)


def test_a_chain_by_hand():
    chain = [Node(4, 10, 1, 100), Node(1, 10, 1, 10), Node(1, 10, 1, 100), Node(2, 10, 1)]
    found = balance(chain, 2, link=Link(0, 100), in_flight=[2, 1], memory=100)
    assert found.cuts == (2,)
    assert found.seconds == (5.2, 3.2)
    assert found.nbytes == (24, 32)
    assert found.sent == 20
    assert found.bound == 4.2  # (8 + 2 * 0.2) / 2 is as much as the first node with one end
    assert found.gap == pytest.approx(5.2 / 4.2 - 1)
    assert balance(chain, 1).seconds == (8,)


def test_what_crosses_decides_among_equals_and_a_frozen_gradient_is_not_sent():
    chain = [Node(1, crossing=5), Node(0, crossing=3), Node(0, crossing=4, returning=0), Node(1)]
    assert balance(chain, 2).cuts == (3,)
    assert balance(chain, 2).sent == 4
    equal = [Node(1, crossing=5), Node(0, crossing=5), Node(1)]
    assert balance(equal, 2).cuts == (1,)


def test_cuts_that_are_asked_for():
    chain = [Node(1)] * 6
    assert balance(chain, 3, at=[1]).cuts == (1, 3)
    assert balance(chain, 3, at=[5, 1]).cuts == (1, 5)
    assert balance(chain, 2).cuts == (3,)


def test_memory_of_each_device_and_of_each_stage_in_flight():
    chain = [Node(1, 0, 10)] * 8
    assert balance(chain, 2, memory=160, in_flight=[4, 1]).cuts == (4,)
    assert balance(chain, 2, memory=100, in_flight=[4, 1]).cuts == (2,)
    assert balance(chain, 2, memory=[20, 100]).cuts == (2,)
    one = order("1F1B", 4, 8)
    assert balance(chain, 4, memory=60, in_flight=one.in_flight()).cuts == (1, 2, 5)


def test_no_rank_of_a_simulated_step_holds_more_than_was_planned():
    r = random.Random(3)
    for name, m in (("1F1B", 6), ("GPipe", 4), ("InterleavedZeroBubble", 6)):
        chain = [Node(r.randrange(1, 9), r.randrange(50), r.randrange(30)) for _ in range(15)]
        one = order(name, 3, m)
        found = balance(chain, 3, in_flight=one.in_flight())
        stages = []
        for i, j in itertools.pairwise([0, *found.cuts, 15]):
            t = sum(n.seconds for n in chain[i:j]) / 3
            saved, fixed = sum(n.saved for n in chain[i:j]), sum(n.parameters for n in chain[i:j])
            stages.append(Stage(t, t, t, saved=saved, fixed=fixed))
        assert simulate(one, stages).peaks == found.nbytes


NODES = [Node(1, 5, 5, 4), Node(1, 5, 5, None), Node(1, 5, 5, 4), Node(1, 5, 5)]


@pytest.mark.parametrize(
    ("stages", "options", "words"),
    [
        (5, {}, "expected 1 to 4 stages for a chain of 4 nodes, came 5"),
        (0, {}, "expected 1 to 4 stages for a chain of 4 nodes, came 0"),
        (4, {}, "expected 3 places to cut the chain, came 2"),
        (3, {"at": [2]}, r"expected cuts before nodes where the chain can be cut, came \[2\]"),
        (3, {"at": [0, 4]}, r"expected cuts before nodes where the chain can be cut, came \[0, 4\]"),
        (2, {"at": [1, 3]}, r"expected at most 1 cuts for 2 stages, came \[1, 3\]"),
        (2, {"memory": [5]}, r"expected memory of 0 or more for each of 2 stages, came \[5\]"),
        (2, {"memory": -1}, "expected memory of 0 or more for each of 2 stages, came -1"),
        (2, {"in_flight": [1, float("nan")]}, "expected in_flight of 0 or more for each of 2 stages"),
        (2, {"memory": 21}, "expected 2 stages within 21 bytes, came none\nhint: .* is 30 bytes a device"),
        (
            2,
            {"memory": [9, 33]},
            r"within \[9, 33\] bytes, came none\nhint: .* is 1 bytes more on each device",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(stages, options, words):
    with pytest.raises(OptionError, match=words):
        balance(NODES, stages, **options)


@pytest.mark.parametrize("node", [Node(-1), Node(float("nan")), Node(1, saved=-3), Node(math.inf)])
def test_nodes_that_cost_less_than_nothing_are_refused(node):
    with pytest.raises(OptionError, match="of node 1 to be finite, 0 or more, came"):
        balance([Node(1), node], 2)


def test_a_thousand_nodes_are_cut_within_half_a_second():
    r = random.Random(0)
    chain = [
        Node(r.random(), r.randrange(10**7), r.randrange(10**7), r.randrange(10**6)) for _ in range(1000)
    ]
    start = time.perf_counter()
    found = balance(chain, 8, memory=3 * 10**10, in_flight=range(8, 0, -1), link=Link(1e-5, 1e9))
    taken = time.perf_counter() - start
    assert found.gap < 0.01
    assert taken < 2  # it is 0.07 s where nothing else runs
