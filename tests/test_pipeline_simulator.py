"""The simulator against closed forms, a plain second one, and what no schedule may do."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import VARIANTS, orders, random_links, random_stages, slowly, span

from fxaccel.errors import OptionError
from fxaccel.pipeline.orders import SCHEDULES, Action, Order, order
from fxaccel.pipeline.simulator import Link, Stage, simulate

SEEDS = st.integers(0, 2**32)


def close(value):
    return pytest.approx(value, rel=1e-9, abs=1e-9)


# -- closed forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_the_bubbles_of_the_papers(p, rounds):
    m = p * rounds
    f, i, w = 0.37, 0.53, 0.29
    for name in ("GPipe", "1F1B"):
        assert simulate(order(name, p, m), [Stage(f, i, w)] * p).bubble == close((p - 1) / m)
    for v in (1, 2, 3):
        for name in ("Interleaved1F1B", "LoopedBFS"):
            found = simulate(order(name, p, m, v), [Stage(f, i, w)] * (p * v))
            assert found.bubble == close((p - 1) / (v * m))
    zero = simulate(order("InterleavedZeroBubble", p, m), [Stage(f, f, f)] * p)
    assert zero.bubble == close((p - 1) / (3 * m))


def stages_of(count, v):
    return [Stage(1 / v, 1 / v, 1 / v, saved=12 // v)] * count


TABLE = [  # p = 4, F = I = W = 1 and 12 bytes for a whole rank: seconds at m = 8 and 16, peaks
    ("GPipe", 1, 33, 57, lambda m: [m] * 4),
    ("1F1B", 1, 33, 57, lambda m: [4, 3, 2, 1]),
    ("Interleaved1F1B", 2, 28.5, 52.5, lambda m: [5.5, 4.5, 3.5, 2.5]),
    ("LoopedBFS", 2, 28.5, 52.5, lambda m: [m] * 4),
    ("InterleavedZeroBubble", 1, 27, 51, lambda m: [4] * 4),
    ("InterleavedZeroBubble", 2, 25.5, 49.5, lambda m: [4] * 4),
    ("ZBVZeroBubble", 2, 25.5, 49.5, lambda m: [4] * 4),
    ("DualPipeV", 2, 27, 51, lambda m: [4.5] * 4),  # as torch sends after a pair; 25.5, 49.5 if it did not
]


@pytest.mark.parametrize(("name", "v", "eight", "sixteen", "peaks"), TABLE)
def test_seconds_and_peaks_of_each_schedule(name, v, eight, sixteen, peaks):
    for m, seconds in ((8, eight), (16, sixteen)):
        found = simulate(order(name, 4, m, v), stages_of(4 * v, v))
        assert found.seconds == close(seconds)
        assert [peak / 12 for peak in found.peaks] == close(peaks(m))
        assert found.busy == close([3 * m] * 4)


def apart(one):
    """The order with each part of an overlapped pair sending for itself."""
    ranks = tuple(tuple(a._replace(joined=False) for a in actions) for actions in one.ranks)
    return Order(one.schedule, one.microbatches, one.placement, ranks)


def test_what_overlapped_pairs_cost_for_sending_late():
    for m, seconds in ((8, 25.5), (16, 49.5)):
        assert simulate(apart(order("DualPipeV", 4, m)), stages_of(8, 2)).seconds == close(seconds)


def test_the_zero_bubble_of_unequal_parts():
    """A weight part fills no more of the bubble than the forward that it stands beside."""
    for f, i, w in ((3.0, 4.0, 2.0), (1.0, 2.0, 1.0), (1.0, 2.0, 2.0), (2.0, 2.0, 3.0)):
        found = simulate(order("InterleavedZeroBubble", 4, 12), [Stage(f, i, w)] * 4)
        assert found.seconds == close(12 * (f + i + w) + 3 * (f + i - min(f, w)))


def test_a_chain_with_links_by_hand():
    """Two ranks, one microbatch: 2 + (1 + 10 / 5) + 3 + (1 + 20 / 5) + 1."""
    stages = [
        Stage(2, 0.5, 0.5, sends=10, saved=7, fixed=100),
        Stage(1, 1, 1, returns=20, saved=9, working=50),
    ]
    found = simulate(order("GPipe", 2, 1), stages, Link(1, 5))
    assert found.seconds == 2 + 3 + 3 + 5 + 1
    assert [(t.source, t.target, str(t.action), t.start, t.end) for t in found.transfers] == [
        (0, 1, "0F0", 2, 5), (1, 0, "1B0", 8, 13)
    ]  # fmt: skip
    assert found.sent == {(0, 1): 10, (1, 0): 20}
    assert found.memory[0] == ((0.0, 100), (2.0, 107), (8.0, 127), (14.0, 100))
    assert found.memory[1] == (
        (0.0, 0), (2.0, 10), (5.0, 60), (6.0, 9), (6.0, 59), (8.0, 0), (8.0, 20), (14.0, 0)
    )  # fmt: skip
    assert found.peaks == (127, 60)
    assert found.bubble == 14 / 3 - 1


def test_a_link_carries_one_thing_after_the_other_and_each_direction_by_itself():
    found = simulate(order("GPipe", 2, 3), [Stage(1, 1, 1, sends=4, returns=1)] * 2, Link(0, 1))
    assert [(t.start, t.end) for t in found.transfers if t.source == 0] == [(1, 5), (5, 9), (9, 13)]
    one_way = simulate(order("GPipe", 2, 3), [Stage(1, 1, 1, sends=4)] * 2, {(1, 0): Link(0, 1)})
    assert [(t.start, t.end) for t in one_way.transfers if t.source == 0] == [(1, 1), (2, 2), (3, 3)]


def test_a_backward_in_two_parts_lets_go_in_two_parts():
    found = simulate(order("InterleavedZeroBubble", 1, 1), [Stage(1, 1, 1, saved=10, kept=4)])
    assert found.memory[0] == ((0.0, 0), (1.0, 10), (2.0, 4), (3.0, 0))
    whole = simulate(order("GPipe", 1, 1), [Stage(1, 1, 1, 1.5, saved=10, kept=4)])
    assert whole.memory[0] == ((0.0, 0), (1.0, 10), (2.5, 0))
    more = simulate(order("InterleavedZeroBubble", 1, 1), [Stage(1, 1, 1, saved=10, kept=14)])
    assert more.memory[0] == ((0.0, 0), (1.0, 10), (1.0, 14), (3.0, 0))  # gradients wait for W


def test_a_gradient_waits_until_it_is_known_to_have_come():
    """Rank 1 knows of the first one by the output of microbatch 1, which rank 0 makes after reading it."""
    one = Order(
        "in turn", 2, (0, 1), tuple(
            tuple(Action(kind, s, i) for i in (0, 1) for kind in "FB") for s in (0, 1)
        )
    )  # fmt: skip
    found = simulate(one, [Stage(1, 1, 0), Stage(1, 1, 0, returns=5)])
    assert dict(one.acknowledged(1)) == {0: [], 1: [0]}
    assert found.memory[1] == ((0.0, 0), (3.0, 5), (5.0, 0), (7.0, 5), (8.0, 0))


def test_what_a_part_of_backward_takes_may_be_more_or_less_than_the_whole():
    stage = Stage(1, 1, 1, saved=10, kept=6, working=50, rising=10, parting=7, weighing=2)
    found = simulate(order("InterleavedZeroBubble", 1, 1), [stage])
    assert found.memory[0] == (
        (0.0, 0), (0.0, 10), (1.0, 17), (2.0, 6), (2.0, 8), (3.0, 0)
    )  # fmt: skip


def test_what_a_forward_takes_may_be_more_or_less_than_what_a_backward_does():
    found = simulate(order("GPipe", 1, 1), [Stage(1, 1, 1, saved=10, working=3, rising=12)])
    assert found.memory[0] == ((0.0, 0), (0.0, 12), (1.0, 10), (1.0, 13), (3.0, 0))


# -- what holds for any -----------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "chunks"), VARIANTS)
@settings(max_examples=25)
@given(seed=SEEDS)
def test_a_random_pipeline(schedule, chunks, seed):
    r = random.Random(seed)
    one = r.choice(list(orders(schedule, chunks, [r.randint(1, 4)], range(6, 11))))
    stages, links = random_stages(r, len(one.placement)), random_links(r, len(one.ranks))
    found = simulate(one, stages, links)
    want = slowly(one.ranks, one.placement, stages, links)
    assert {tuple(e.action[:3]): e.end for e in found.events} == {
        k: t for k, t in want.items() if k[0] != "sent"
    }
    follows(found, stages)
    nothing_overlaps(found)
    memory_is_sound(found, stages)


def follows(found, stages):
    """Every action comes after what it reads."""
    at = {tuple(e.action[:3]): e for e in found.events}
    came = {tuple(t.action[:3]): t.end for t in found.transfers}
    last = len(stages) - 1
    for (kind, s, i), event in at.items():
        assert event.end - event.start == span(stages[s], kind)
        reads = []
        if kind == "F":
            reads += [("F", s - 1, i)] if s else []
        elif kind == "W":
            reads.append(("I", s, i))
        else:
            reads.append(("F", s, i))
            reads += [k for k in (("B", s + 1, i), ("I", s + 1, i)) if s < last and k in at]
        for key in reads:
            assert event.start >= at[key].end
            assert event.start >= (came.get(key, 0) if key[1] != s else 0)


def nothing_overlaps(found):
    lanes = {}
    for e in found.events:
        lanes.setdefault(e.rank, []).append(e)
    for t in found.transfers:
        lanes.setdefault((t.source, t.target), []).append(t)
    for lane in lanes.values():
        assert all(a.end <= b.start for a, b in pairwise(lane))


def memory_is_sound(found, stages):
    for rank, steps in enumerate(found.memory):
        fixed = sum(s.fixed for s, r in zip(stages, found.order.placement, strict=True) if r == rank)
        assert steps[0] == (0.0, fixed)
        assert all(nbytes >= fixed for _, nbytes in steps)
        assert steps[-1][1] == fixed
        assert all(a[0] <= b[0] for a, b in pairwise(steps))
        assert steps[-1][0] <= found.seconds


@pytest.mark.parametrize(("schedule", "chunks"), VARIANTS)
@settings(max_examples=10)
@given(seed=SEEDS)
def test_peaks_are_what_is_in_flight(schedule, chunks, seed):
    """Where nothing is sent and one stage is on a rank its peak is that of its microbatches."""
    r = random.Random(seed)
    one = r.choice(list(orders(schedule, chunks)))
    stages = [Stage(*[r.randint(1, 5) for _ in range(3)], saved=r.randrange(9)) for _ in one.placement]
    peaks, held = simulate(one, stages).peaks, [0] * len(one.ranks)
    for stage, rank, count in zip(stages, one.placement, one.in_flight(), strict=True):
        held[rank] += stage.saved * count
    assert list(peaks) == held if chunks == 1 else all(a <= b for a, b in zip(peaks, held, strict=True))


EQUAL, UNEQUAL, LINKED = "equal stages", "unequal stages", "links"
NEVER_RAISES = [  # of the others see the test below
    *((v, EQUAL) for v in VARIANTS if v[0] != "ZBVZeroBubble"),
    *((v, UNEQUAL) for v in VARIANTS if v[0] in ("GPipe", "1F1B", "LoopedBFS", "DualPipeV")),
    *((v, LINKED) for v in VARIANTS if v[0] in ("GPipe", "LoopedBFS")),
]


@pytest.mark.parametrize(("variant", "what"), NEVER_RAISES)
@settings(max_examples=3)
@given(seed=SEEDS)
def test_more_microbatches_never_raise_the_bubble(variant, what, seed):
    r = random.Random(seed)
    p = r.randint(1, 4)
    count = p * variant[1]
    stages = [Stage(*[r.randint(1, 8) for _ in range(3)]) for _ in range(count)]  # see below for zeros
    links = Link(r.randrange(3), r.choice([1, 2])) if what == LINKED else Link()
    stages = [stages[0]] * count if what == EQUAL else stages
    bubbles = [simulate(one, stages, links).bubble for one in orders(*variant, [p], range(1, 17))]
    assert all(b <= a + 1e-12 for a, b in pairwise(bubbles))


def test_more_microbatches_may_raise_the_bubble_of_an_interleaved_schedule():
    """Where stages differ: another count of microbatches a round is another order."""
    stages = [Stage(f, 1, 1) for f in (3, 4, 5, 1)]
    bubbles = [simulate(one, stages).bubble for one in orders("Interleaved1F1B", 2, [2], range(1, 17))]
    assert any(b > a + 1e-6 for a, b in pairwise(bubbles))


def test_more_microbatches_may_raise_the_bubble_of_a_zero_bubble_schedule_of_weight_parts_alone():
    """One microbatch leaves none; of two the later stages' weight parts stand before the earlier ones'."""
    bubbles = [simulate(order("InterleavedZeroBubble", 4, m, 2), [Stage(0, 0, 5)] * 8).bubble for m in (1, 2)]
    assert bubbles == [0.0, 0.25]


# -- what is refused -------------------------------------------------------------------------------


def test_a_deadlock_names_ranks_and_actions():
    def acts(*texts):
        return tuple(Action(t[1], int(t[0]), int(t[2])) for t in texts)

    crossed = Order(
        "crossed", 2, (0, 1), (acts("0F0", "0B0", "0F1", "0B1"), acts("1F0", "1F1", "1B0", "1B1"))
    )
    with pytest.raises(OptionError) as error:
        simulate(crossed, [Stage(1, 1, 1)] * 2)
    assert error.value.message == (
        "expected an order of actions that ends, came a deadlock of crossed: "
        "rank 0 waits in 0B0 for the gradient for it, rank 1 waits in 1F1 for the output for it"
    )
    early = Order("early", 1, (0,), (acts("0F0", "0W0", "0I0"),))
    with pytest.raises(OptionError, match="rank 0 waits in 0W0 for 0I0"):
        simulate(early, [Stage(1, 1, 1)])


def test_a_pair_that_waits_for_itself_is_a_deadlock():
    """Torch refuses such a pair, too: the second needs what the first sends when both are done."""
    ranks = (Action("F", 0, 0, True), Action("B", 0, 0)), (Action("F", 1, 0), Action("B", 1, 0))
    one = Order("pair", 1, (0, 1), ranks)
    with pytest.raises(OptionError, match=r"rank 0 waits in 0B0 .*, rank 1 waits in 1F0"):
        simulate(one, [Stage(1, 1, 1)] * 2)
    assert simulate(apart(one), [Stage(1, 1, 1)] * 2).seconds == 6


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([Stage(1, 1, 1)], "expected 2 stages for this order, came 1"),
        ([Stage(1, 1, 1), Stage(-1, 1, 1)], "expected forward of stage 1 to be finite, 0 or more, came -1"),
        ([Stage(float("nan"), 1, 1)] * 2, "expected forward of stage 0 to be finite"),
    ],
)
def test_costs_that_are_none_are_refused(stages, words):
    with pytest.raises(OptionError, match=words):
        simulate(order("GPipe", 2, 2), stages)


@pytest.mark.parametrize("arguments", [(-1, 1), (0, 0), (float("inf"), 1), (0, float("nan"))])
def test_a_link_that_is_none_is_refused(arguments):
    with pytest.raises(OptionError, match="expected a latency of 0 or more and a bandwidth above 0"):
        Link(*arguments)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_of_no_time(name):
    found = simulate(order(name, 2, 4), [Stage(0, 0, 0, saved=1, sends=3)] * len(order(name, 2, 4).placement))
    assert (found.seconds, found.bubble, found.busy) == (0, 0, (0, 0))
