"""Plans of what to compute again beside the exact optimum, on small steps made by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest

from fxaccel.passes._checkpoint_exact import solved
from fxaccel.passes._checkpoint_plan import Planner
from fxaccel.profile import Call, Profile, Value
from fxaccel.replay import Draft, replay
from fxaccel.roofline import FORWARDS
from tests.passes.checkpoint_optimum import searched

KIB = 2**10
GAP = 0.02  # of forward and backward, between a plan and the optimum


@dataclass
class Steps:
    """A step that grows call by call; a call makes one value, and may hide another.

    Sizes are in KiB. Gradients have those of their values, and live from the last reader's backward to the
    maker's.
    """

    values: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)

    def call(
        self,
        reads: Sequence[int],
        nbytes: int,
        seconds: float,
        *,
        needs: Iterable[int] = (),
        own: bool = False,
        hides: int = 0,
        extra: int = 0,
        again: bool = True,
        shown: bool = False,
    ) -> int:
        """The number of its value. needs: values that its backward reads; own: and its result."""
        step, made = len(self.calls), len(self.values)
        nbytes, hides, extra = nbytes * KIB, hides * KIB, extra * KIB
        self.values.append(Value(f"v{step}", nbytes, step, shown=shown))
        call = Call(f"v{step}", [made], None, list(reads), nbytes + hides + extra, again=again)
        if hides:
            call.hides = len(self.values)
            self.values.append(Value(f"v{step}!", hides, step, needed=[step]))
        for v in reads:
            self.values[v].read = step
        for v in (*needs, *([made] if own else [])):
            self.values[v].needed.append(step)
        self.calls.append(call)
        self.seconds[step] = seconds
        return made

    def profile(self) -> Profile:
        """With the gradients filled in."""
        for step, call in enumerate(self.calls):
            call.rest = sum(v.nbytes for v in self.values if v.made <= step < v.read)
            call.rest += self.values[call.makes[0]].nbytes if step == len(self.calls) - 1 else 0
            new = {v for v in call.reads if self.values[v].read == step}
            call.surge = call.rest + sum(self.values[v].nbytes for v in new)
        return Profile(
            self.values, dict(enumerate(self.calls)), {c.name: [c.makes[0]] for c in self.calls}, {}, 0, 0
        )


def chain(layers: int, widths: Sequence[int] = (8,)) -> Steps:
    """Products and element-wise calls in turn."""
    s = Steps()
    x = s.call([], widths[0], 1)
    for i in range(layers):
        width = widths[i % len(widths)]
        h = s.call([x], width, 8, needs=[x])
        x = s.call([h], width, 1, needs=[h])
    s.call([x], 1, 1, needs=[x], again=False, shown=True)
    return s


def transformer(blocks: int) -> Steps:
    """Norms, attention and a dropout, a residual, a wide MLP."""
    s = Steps()
    x = s.call([], 16, 1, again=False)
    for _ in range(blocks):
        n = s.call([x], 16, 1, needs=[x], hides=1)
        qkv = [s.call([n], 16, 6, needs=[n]) for _ in range(3)]
        a = s.call(qkv, 16, 8, needs=qkv, own=True, hides=1)
        o = s.call([s.call([a], 16, 6, needs=[a])], 16, 1, hides=4)
        x = s.call([x, o], 16, 1.5)
        n = s.call([x], 16, 1, needs=[x], hides=1)
        h = s.call([n], 64, 24, needs=[n])
        g = s.call([h], 64, 4, needs=[h])
        o = s.call([s.call([g], 16, 24, needs=[g])], 16, 1, hides=4)
        x = s.call([x, o], 16, 1.5)
    n = s.call([x], 16, 1, needs=[x], hides=1)
    s.call([s.call([n], 32, 20, needs=[n])], 1, 2, hides=32, again=False, shown=True)
    return s


def written_out(blocks: int) -> Steps:
    """Attention in its parts: scores whose product hides copies, a bias that all read, softmax, dropout."""
    s = Steps()
    x, bias = s.call([], 8, 1, again=False), s.call([], 32, 1)
    for _ in range(blocks):
        q, k, v = (s.call([x], 8, 6, needs=[x]) for _ in range(3))
        scores = s.call([s.call([q, k], 32, 6, hides=16), bias], 32, 2)
        p = s.call([s.call([scores], 32, 3, own=True)], 32, 3, hides=8)
        o = s.call([p, v], 8, 6, needs=[p], hides=8)
        x = s.call([x, s.call([o], 8, 6, needs=[o])], 8, 1)
    s.call([x], 1, 1, needs=[x], again=False, shown=True)
    return s


def unet(depth: int) -> Steps:
    """Convolutions and batch norms; what the first make the last read."""
    s, size, skips = Steps(), 64, []
    x = s.call([], size, 1, again=False)

    def layer(x: int, seconds: float) -> int:
        c = s.call([x], size, seconds, needs=[x])
        return s.call([s.call([c], size, 2, needs=[c], hides=1)], size, 1, own=True)

    for _ in range(depth):
        skips.append(layer(x, 10))
        size //= 2
        x = s.call(skips[-1:], size, 1, hides=size // 2)
    for skip in reversed(skips):
        size *= 2
        x = layer(s.call([s.call([x], size, 1), skip], 2 * size, 2), 20)
    s.call([x], 1, 1, needs=[x], again=False, shown=True)
    return s


STEPS: dict[str, Callable[[], Steps]] = {
    "chain of 14": lambda: chain(6),
    "chain of 26": lambda: chain(12),
    "uneven of 26": lambda: chain(12, (8, 16, 4, 8, 16)),
    "uneven of 42": lambda: chain(20, (8, 16, 4, 8, 16)),
    "chain of 58": lambda: chain(28),
    "transformer of 18": lambda: transformer(1),
    "transformer of 33": lambda: transformer(2),
    "transformer of 48": lambda: transformer(3),
    "written out of 23": lambda: written_out(2),
    "written out of 33": lambda: written_out(3),
    "U-Net of 11": lambda: unet(1),
    "U-Net of 20": lambda: unet(2),
    "U-Net of 29": lambda: unet(3),
}
"""Steps by name, with their numbers of calls."""


def drawn(seed: int, least: int = 4, most: int = 6) -> Steps:
    """A random step: skips, calls that cannot be made again, hidden values, kernels that take more."""
    draw, s = random.Random(seed), Steps()
    for i in range(draw.randint(least, most)):
        reads = [i - 1 if draw.random() < 0.8 else draw.randrange(i)] if i else []
        if i and draw.random() < 0.35:
            reads.append(draw.randrange(i))
        values = [s.calls[c].makes[0] for c in dict.fromkeys(reads)]
        s.call(
            values, draw.choice([1, 2, 3, 4, 8]), draw.choice([1, 2, 5, 9]),
            needs=[v for v in values if draw.random() < 0.6], own=draw.random() < 0.3,
            hides=draw.choice([0, 0, 0, 1, 2]), extra=draw.choice([0, 0, 1, 2]), again=draw.random() < 0.93,
        )  # fmt: skip
    last = s.calls[-1].makes
    s.call(last, 1, 1, needs=last, again=False, shown=True)
    return s


def confirmed(profile, seconds, budget, found):
    cost = replay(profile, found.draft, seconds)
    assert cost.peak <= budget
    assert cost.seconds == pytest.approx(found.seconds)


SEEDS = [*range(16), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(16, 40))]


@pytest.mark.parametrize("seed", SEEDS)
def test_both_ways_to_the_optimum_agree(seed):
    steps = drawn(seed)
    profile, seconds = steps.profile(), steps.seconds
    need = replay(profile, Draft(), seconds).peak
    for share in (0.75, 0.5):
        budget = int(share * need)
        one, other = searched(profile, seconds, budget), solved(profile, seconds, budget)
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            confirmed(profile, seconds, budget, one)
            confirmed(profile, seconds, budget, other)
            assert one.seconds == pytest.approx(other.seconds)
            assert other.exact


def test_optimum_of_a_chain_by_hand():
    s = Steps()
    a = s.call([], 4, 1)
    b = s.call([a], 4, 2, needs=[a])
    c = s.call([b], 4, 3, needs=[b])
    s.call([c], 1, 1, needs=[c], again=False, shown=True)
    profile = s.profile()
    # kept: a b c and the loss, 13; the gradients of the loss and of c beside them, 5
    assert replay(profile, Draft()).peak == 18 * KIB
    # without a, computed before the backward of b when c is gone: 2 gradients of 4, b (dead), a, the loss
    assert searched(profile, s.seconds, 14 * KIB).seconds == solved(profile, s.seconds, 14 * KIB).seconds == 1
    assert searched(profile, s.seconds, 4 * KIB) is None
    assert solved(profile, s.seconds, 4 * KIB) is None


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("chain of 14", (0.9, 0.7, 0.6)),
        ("chain of 26", (0.9, 0.7)),
        ("uneven of 26", (0.8, 0.6)),
        ("U-Net of 11", (0.8, 0.7)),
    ],
)
def test_plans_are_near_the_optimum(name, shares):
    steps = STEPS[name]()
    profile, seconds = steps.profile(), steps.seconds
    planner, total = Planner(profile, seconds), FORWARDS * sum(seconds.values())
    for share in shares:
        budget = int(share * planner.need)
        found, best = planner.plan(budget), solved(profile, seconds, budget)
        assert found is not None
        assert best is not None
        assert best.exact
        cost = replay(profile, found, seconds)
        assert cost.peak <= budget
        assert best.seconds <= cost.seconds + 1e-9
        assert cost.seconds - best.seconds <= GAP * total


@pytest.mark.parametrize(
    ("name", "share", "best"),  # the best known: found in 30 s, not proved
    [
        ("U-Net of 20", 0.6, 0.1383),
        ("U-Net of 29", 0.6, 0.0820),
        ("written out of 23", 0.7, 0.1183),
        ("written out of 33", 0.7, 0.0507),
    ],
)
def test_plans_are_near_the_best_known(name, share, best):
    steps = STEPS[name]()
    planner, total = Planner(steps.profile(), steps.seconds), FORWARDS * sum(steps.seconds.values())
    budget = int(share * planner.need)
    found = planner.plan(budget)
    assert found is not None
    cost = replay(planner.profile, found, steps.seconds)
    assert cost.peak <= budget
    assert cost.seconds <= (best + GAP) * total


def test_the_way_down_leaves_the_parts():
    steps = unet(2)
    planner = Planner(steps.profile(), steps.seconds)
    peaks = [way.cost.peak for way in planner.lower]
    assert peaks == sorted(set(peaks), reverse=True)
    assert planner.smallest == peaks[-1] < 0.9 * peaks[0]  # of which no way along the parts has a lower one
    assert peaks[-1] < 0.51 * planner.need  # the optimum has plans down to 0.5, and none for 0.4
    for way in planner.lower:
        assert replay(planner.profile, way.chain.draft(way.sketch), steps.seconds) == way.cost
    assert planner.plan(planner.smallest) is not None
    assert planner.plan(planner.smallest - 1) is None
