"""The choice against all there is, on a grid of ranks, batches and memory."""

import itertools
import math

import pytest
from pipelines import slowly, span, torch_schedule

from fxaccel.errors import OptionError
from fxaccel.pipeline.choice import Candidate, candidates, choose, divisors
from fxaccel.pipeline.orders import ONE, SCHEDULES, TWO, order
from fxaccel.pipeline.simulator import Link, Stage, simulate
from tests.helpers import thinned

LINK = Link(0.5, 64)
NODES = 24  # of the model whose stages these are


def cost(candidate, batch=None):
    """Stages of a chain of unequal nodes: a small microbatch costs more for its size."""
    count, size = candidate.ranks * candidate.chunks, (batch or 24) // candidate.microbatches
    ends = [NODES * s // count for s in range(count + 1)]
    stages = []
    for i, j in itertools.pairwise(ends):
        work = sum(1 + n % 3 for n in range(i, j)) * (1 + size)
        stages.append(
            Stage(
                work, work, 0.75 * work, sends=8 * size, returns=8 * size,
                saved=16 * size * (j - i), kept=6 * size * (j - i), fixed=32 * (j - i),
            )
        )  # fmt: skip
    return stages


def until(one, end, stages, s, i):
    """When it is known that a gradient has come: an output that was sent after that is needed, or the end."""
    before = [(a.kind, a.microbatch) for a in one.ranks[one.placement[s - 1]] if a.stage == s - 1]
    read = before.index(("I" if ("I", i) in before else "B", i))
    after = [end["F", s, j] - span(stages[s], "F") for kind, j in before[read:] if kind == "F"]
    return after[0] if after else max(t for key, t in end.items() if key[0] != "sent")


def peaks(one, stages, link):
    """Most bytes of each rank, from a list of what comes and goes."""
    end = slowly(one.ranks, one.placement, stages, link)
    last, changes = len(stages) - 1, [[] for _ in one.ranks]
    for rank, actions in enumerate(one.ranks):
        for kind, s, i, _ in actions:
            stage, done, goes = stages[s], end[kind, s, i], {}
            before = (s - 1, "F", "sends") if kind == "F" and s else None
            before = (s + 1, "B", "returns") if kind in "BI" and s < last else before
            if before is not None:
                other, way, what = before
                nbytes, goes["read"] = getattr(stages[other], what), -getattr(stages[other], what)
                cross = one.placement[other] != rank
                start = end["sent", way, other, i] - (link.seconds(nbytes) if cross else 0)
                changes[rank].append((start, 0 if cross else 2, nbytes))
            goes["own"] = {
                "F": stage.saved, "B": -stage.saved, "I": stage.kept - stage.saved, "W": -stage.kept
            }[kind]  # fmt: skip
            changes[rank].append((done, 1, sum(goes.values())))
            if kind in "BW" and s and one.placement[s - 1] != rank:
                gone = max([until(one, end, stages, s, i), done])
                changes[rank] += [(done, 2, stage.returns), (gone, 3, -stage.returns)]
    return [
        sum(s.fixed for s, r in zip(stages, one.placement, strict=True) if r == rank)
        + max(itertools.accumulate(n for _, _, n in sorted(at)))
        for rank, at in enumerate(changes)
    ]


def everything(ranks, batch):
    """Seconds and peaks of all that torch runs, by the plain simulator."""
    for name in SCHEDULES:
        for v in (1,) if name in ONE else (2,) if name in TWO else (1, 2):
            for m in [m for m in range(1, batch + 1) if batch % m == 0]:
                try:
                    torch_schedule(name, ranks, m, v)
                except ValueError:
                    continue
                one = order(name, ranks, m, v)
                stages = cost(Candidate(name, ranks, v, m), batch)
                end = slowly(one.ranks, one.placement, stages, LINK)
                yield max(end.values()), max(peaks(one, stages, LINK))


@thinned(2, ranks=[1, 2, 3, 4], batch=[4, 6, 8, 12, 24])
def test_the_best_of_all_in_each_cell(ranks, batch):
    """20 cells here, times the caps of memory: 100."""
    known = list(everything(ranks, batch))
    asked = list(candidates(ranks, divisors(batch)))
    assert len(known) < len(asked) or ranks == 1
    least, most = min(p for _, p in known), max(p for _, p in known)
    for share in (0, 0.05, 0.2, 0.5, 1):
        cap = least + math.floor(share * (most - least))
        found = choose(lambda c: cost(c, batch), asked, cap, LINK)
        assert found.simulated.seconds == min(t for t, p in known if p <= cap)
        assert max(found.simulated.peaks) <= cap
        assert len(found.tried) == len(known)
        assert len(found.tried) + len(found.left_out) == len(asked)
    with pytest.raises(OptionError, match=f"hint: the smallest cap that does is {least} bytes, for "):
        choose(lambda c: cost(c, batch), asked, least - 1, LINK)


def test_less_memory_takes_another_schedule():
    """That the grid above has something to choose."""
    asked = list(candidates(4, divisors(24)))
    known = list(everything(4, 24))
    caps = sorted({p for _, p in known})[::5]
    assert len({choose(cost, asked, cap, LINK).candidate for cap in caps}) >= 4


def test_a_cap_for_each_rank():
    asked = [Candidate("1F1B", 3, 1, m) for m in (3, 6)]
    stages = [Stage(1, 1, 1, saved=10)] * 3
    assert choose(lambda _: stages, asked, [30, 20, 10]).candidate.microbatches == 3
    with pytest.raises(OptionError) as error:
        choose(lambda _: stages, asked, [30, 15, 9])
    assert error.value.message == "expected a schedule within [30, 15, 9] bytes, came none"
    assert error.value.hint == (
        "the one that lacks least, 5 bytes on a rank, is 1F1B, 3 ranks, 3 microbatches: it takes [30, 20, 10]"
    )
    with pytest.raises(OptionError, match="expected a cap for each of 3 ranks, came 2"):
        choose(lambda _: stages, asked, [30, 20])


def test_equals_are_told_apart_by_their_peak_then_by_what_comes_first():
    free = [Stage(1, 1, 1, saved=1)] * 2
    asked = [Candidate("GPipe", 2, 1, 4), Candidate("1F1B", 2, 1, 4)]
    assert choose(lambda _: free, asked).candidate.schedule == "1F1B"
    nothing = [Stage(1, 1, 1)] * 2
    assert choose(lambda _: nothing, asked).candidate.schedule == "GPipe"
    assert choose(
        lambda c: [Stage(0, 0, 0)] * 2, [Candidate("GPipe", 2, 1, m) for m in (4, 2)]
    ).candidate == (Candidate("GPipe", 2, 1, 2))


def test_what_does_not_run_is_left_out_with_its_reason():
    asked = list(candidates(4, [6], ["1f1b", "dualpipev"]))
    found = choose(lambda c: [Stage(1, 1, 1)] * c.ranks * c.chunks, asked)
    assert found.candidate == Candidate("1F1B", 4, 1, 6)
    ((candidate, why),) = found.left_out
    assert candidate == Candidate("DualPipeV", 4, 2, 6)
    assert "at least as many microbatches as stages" in why
    with pytest.raises(
        OptionError, match="expected a schedule that can run, came none: DualPipeV does not run 6"
    ):
        choose(lambda c: [], [candidate])
    with pytest.raises(OptionError, match="came none: none was asked for"):
        choose(lambda c: [], [])


def test_stages_that_cannot_be_made_are_left_out():
    def no(candidate):
        if candidate.microbatches == 8:
            raise OptionError("expected 8 stages, came none")
        return [Stage(1, 1, 1)] * 2

    found = choose(no, [Candidate("GPipe", 2, 1, m) for m in (8, 4)])
    assert found.candidate.microbatches == 4
    assert found.left_out == ((Candidate("GPipe", 2, 1, 8), "expected 8 stages, came none"),)


def test_candidates():
    assert [str(c) for c in candidates(2, [4], ["interleaved1f1b", "GPipe", "zbvzerobubble"], [1, 3])] == [
        "Interleaved1F1B, 2 ranks, 4 microbatches",
        "Interleaved1F1B, 2 ranks of 3 stages, 4 microbatches",
        "GPipe, 2 ranks, 4 microbatches",
        "ZBVZeroBubble, 2 ranks of 2 stages, 4 microbatches",
    ]
    assert divisors(12) == (1, 2, 3, 4, 6, 12)
    with pytest.raises(OptionError, match="expected a batch of 1 or more, came 0"):
        divisors(0)


def test_the_second_memory_count_agrees_with_the_first():
    for candidate in candidates(3, [6]):
        one = order(candidate.schedule, 3, 6, candidate.chunks)
        stages = cost(candidate)
        assert list(simulate(one, stages, LINK).peaks) == peaks(one, stages, LINK)
        assert span(stages[0], "B") == stages[0].seconds("B")
