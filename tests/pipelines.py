"""What the tests of pipelines share: a slow and plain simulator, and orders read from torch once more."""

import math
from types import SimpleNamespace

from torch.distributed.pipelining.schedules import get_schedule_class

from fxaccel.errors import OptionError
from fxaccel.pipeline.orders import ONE, SCHEDULES, TWO, order
from fxaccel.pipeline.simulator import Link, Stage

VARIANTS = [
    (name, chunks)
    for name in SCHEDULES
    for chunks in ((1,) if name in ONE else (2,) if name in TWO else (1, 2, 3))
]


def orders(schedule, chunks, ranks=range(1, 5), microbatches=range(1, 13)):
    """All that the schedule runs."""
    for p in ranks:
        for m in microbatches:
            try:
                yield order(schedule, p, m, chunks)
            except OptionError:
                continue


def torch_schedule(name, ranks, microbatches, chunks):
    """Torch's own schedule over stages that are none."""
    stages = [
        SimpleNamespace(num_stages=ranks * chunks, group_size=ranks, group_rank=0, stage_index=i, submod=None)
        for i in range(chunks)
    ]
    return get_schedule_class(name)(stages[0] if name in ONE else stages, microbatches)


def random_stages(random, count):
    """Whole numbers, so that sums of them are exact."""
    stages = []
    for _ in range(count):
        saved = random.randrange(20)
        kept = random.choice([None, random.randrange(2 * saved + 1)])
        seconds = [random.randrange(8) for _ in range(3)]
        stages.append(
            Stage(
                *seconds, random.choice([None, sum(seconds) // 2]), sends=random.randrange(8),
                returns=random.randrange(8), saved=saved, kept=kept,
                working=random.randrange(9), fixed=random.randrange(50),
            )
        )  # fmt: skip
    return stages


def random_links(random, ranks):
    if random.random() < 0.3:
        return Link(random.randrange(3), random.choice([0.5, 1.0, 2.0, math.inf]))
    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b and random.random() < 0.8]
    return {pair: Link(random.randrange(4), random.choice([0.25, 1.0, math.inf])) for pair in pairs}


def span(stage, kind):
    if kind == "B":
        return stage.backward_input + stage.backward_weight if stage.backward is None else stage.backward
    return {"F": stage.forward, "I": stage.backward_input, "W": stage.backward_weight}[kind]


def slowly(actions, placement, stages, links):
    """Ends of all actions and transfers, by relaxing what follows what until nothing moves.

    actions: rank -> [(kind, stage, microbatch, joined)]. Keys are (kind, stage, microbatch), those of what
    is sent have "sent" before them.
    """
    last, before, cost = len(stages) - 1, {}, {}
    for rank, done in enumerate(actions):
        previous, parcels, link_before = None, [], {}
        for kind, s, i, joined in done:
            key = kind, s, i
            cost[key], before[key] = span(stages[s], kind), set() if previous is None else {previous}
            if kind == "W":
                before[key].add(("I", s, i))
            elif kind == "F" and s > 0:
                before[key].add(("sent", "F", s - 1, i))
            elif kind != "F":
                before[key] |= {("F", s, i)} | ({("sent", "B", s + 1, i)} if s < last else set())
            previous = key
            if (kind == "F" and s < last) or (kind in "BI" and s > 0):
                parcels.append((kind, s, i))
            for parcel in [] if joined else parcels:
                k, s_, i_ = parcel
                target = placement[s_ + 1 if k == "F" else s_ - 1]
                sent = "sent", "F" if k == "F" else "B", s_, i_
                before[sent], cost[sent] = {parcel}, 0.0
                if target != rank:
                    link = links if isinstance(links, Link) else links.get((rank, target), Link())
                    nbytes = stages[s_].sends if k == "F" else stages[s_].returns
                    cost[sent] = link.latency + nbytes / link.bandwidth
                    before[sent] |= {key, *link_before.get(target, ())}  # key: the pair is done
                    link_before[target] = [sent]
            parcels = parcels if joined else []
    return relaxed(before, cost)


def relaxed(before, cost):
    end = dict.fromkeys(before, 0.0)
    moved = True
    while moved:
        moved = False
        for key, needs in before.items():
            found = max((end[n] for n in needs), default=0.0) + cost[key]
            if found != end[key]:
                end[key], moved = found, True
    return end
