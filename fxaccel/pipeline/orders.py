"""What each rank of a pipeline does, action by action, under the schedules that torch runs.

    schedule               stages a rank   source
    GPipe                  1               Huang et al. 2019, arXiv:1811.06965
    1F1B                   1               Narayanan et al. 2021, arXiv:2006.09503
    Interleaved1F1B        any             Narayanan et al. 2021, arXiv:2104.04473
    LoopedBFS              any             Lamy-Poirier 2023, arXiv:2211.05953
    InterleavedZeroBubble  any             Qi et al. 2024, arXiv:2401.10241; with one stage a rank ZB-H1
    ZBVZeroBubble          2, as a V       section 6 of the same
    DualPipeV              2, as a V       DeepSeek-AI 2024, arXiv:2412.19437

All but the first two are read from the schedules of torch.distributed.pipelining, built over stages that are
none, so that what is simulated is what will run. Torch runs the first two by loops of their own, which are
written here again: the list that its 1F1B shows names on the last rank other microbatches than it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from fxaccel.errors import OptionError

SCHEDULES = (
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV",
)  # fmt: skip
ONE, TWO = SCHEDULES[:2], SCHEDULES[-2:]  # that take exactly so many stages a rank
KINDS = "FBIW"


class Action(NamedTuple):
    """One microbatch on one stage, written as torch writes it: 2F0.

    kind      F forward, B backward, or its two parts: I for the input, W for the weights
    joined    the first of an overlapped pair: what it sends leaves when the next action is done
    """

    kind: str
    stage: int
    microbatch: int
    joined: bool = False

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class Order:
    """The actions of each rank, one after the other.

    placement    stage -> rank
    ranks        rank -> its actions
    """

    schedule: str
    microbatches: int
    placement: tuple[int, ...]
    ranks: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        for sentence in _defects(self):
            raise OptionError(f"the order of {self.schedule} is not whole: {sentence}")

    def stages(self, rank: int) -> list[int]:
        """The stages of a rank."""
        return [stage for stage, at in enumerate(self.placement) if at == rank]

    def parted(self, stage: int) -> bool:
        """Whether any backward of a stage is done in two parts."""
        return any(a.kind == "I" and a.stage == stage for a in self.ranks[self.placement[stage]])

    def in_flight(self) -> tuple[int, ...]:
        """Stage -> the most microbatches whose forward is done and whose backward, B or W, is not."""
        most, live = [0] * len(self.placement), [0] * len(self.placement)
        for action in (a for actions in self.ranks for a in actions if a.kind != "I"):
            live[action.stage] += 1 if action.kind == "F" else -1
            most[action.stage] = max(most[action.stage], live[action.stage])
        return tuple(most)

    def acknowledged(self, stage: int) -> Iterator[tuple[int, list[int]]]:
        """(microbatch, those whose gradient the stage before has read when it sends the output for that)."""
        read = list[int]()
        for action in self.ranks[self.placement[stage - 1]] if stage else ():
            if action.stage == stage - 1 and action.kind in "BI":
                read.append(action.microbatch)
            elif action.stage == stage - 1 and action.kind == "F":
                yield action.microbatch, read
                read = []


def _defects(order: Order) -> Iterator[str]:
    stages, seen = range(len(order.placement)), Counter[tuple[str, int, int]]()
    for rank, actions in enumerate(order.ranks):
        for action in actions:
            if action.stage not in stages or order.placement[action.stage] != rank:
                yield f"rank {rank} does {action}, expected stages that are placed there"
            seen[action[:3]] += 1
    for stage in stages:
        for microbatch in range(order.microbatches):
            counts = [seen.pop((kind, stage, microbatch), 0) for kind in KINDS]
            if counts not in ([1, 1, 0, 0], [1, 0, 1, 1]):
                came = ", ".join(f"{n} {k}" for k, n in zip(KINDS, counts, strict=True))
                what = f"microbatch {microbatch} on stage {stage}"
                yield f"expected one F and one B or I and W of {what}, came {came}"
    for kind, stage, microbatch in seen:
        yield f"{stage}{kind}{microbatch} is of none of the {order.microbatches} microbatches"


def named(schedule: str) -> str:
    """The name as it is written above, whatever case it came in."""
    for name in SCHEDULES:
        if name.lower() == str(schedule).lower():
            return name
    raise OptionError(f"expected a schedule of {', '.join(SCHEDULES)}, came {schedule!r}")


def order(schedule: str, ranks: int, microbatches: int, chunks: int | None = None) -> Order:
    """The actions of a schedule; chunks: stages a rank, the fewest that the schedule takes if not said.

    Raises OptionError where the schedule does not run that many microbatches on that many ranks.
    """
    schedule = named(schedule)
    for what, count in (("ranks", ranks), ("microbatches", microbatches), ("chunks", chunks)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise OptionError(f"expected {what} to be a number from 1 on, came {count!r}")
    fewest = 2 if schedule in TWO else 1
    chunks = fewest if chunks is None else chunks
    if schedule in (*ONE, *TWO) and chunks != fewest:
        raise OptionError(
            f"expected {fewest} stage{'s' * (fewest > 1)} a rank for {schedule}, came {chunks}",
            f"leave chunks out, or take {SCHEDULES[2]}",
        )
    if schedule in ONE:
        return _single(schedule, ranks, microbatches)
    return _of_torch(schedule, ranks, microbatches, chunks)


def _single(schedule: str, ranks: int, microbatches: int) -> Order:
    """One stage a rank: some forwards ahead, backward and forward in turn, the backwards that are left."""
    if schedule == "1F1B" and microbatches < ranks:
        raise OptionError(
            f"expected at least {ranks} microbatches for 1F1B on {ranks} ranks, came {microbatches}"
        )
    actions = list[tuple[Action, ...]]()
    for rank in range(ranks):
        ahead = microbatches if schedule == "GPipe" else ranks - rank
        forward = [Action("F", rank, i) for i in range(microbatches)]
        backward = [Action("B", rank, i) for i in range(microbatches)]
        turns = [a for pair in zip(backward, forward[ahead:], strict=False) for a in pair]
        actions.append((*forward[:ahead], *turns, *backward[microbatches - ahead :]))
    return Order(schedule, microbatches, tuple(range(ranks)), tuple(actions))


def _of_torch(schedule: str, ranks: int, microbatches: int, chunks: int) -> Order:
    from torch.distributed.pipelining.schedules import get_schedule_class  # seconds to import

    stages = [
        SimpleNamespace(num_stages=ranks * chunks, group_size=ranks, group_rank=0, stage_index=i, submod=None)
        for i in range(chunks)
    ]
    make: Any = get_schedule_class(schedule)
    try:
        made = make(stages, microbatches)
    except ValueError as error:  # how torch says that a schedule does not take these numbers
        why = " ".join(str(error).split())
        raise OptionError(
            f"{schedule} does not run {microbatches} microbatches on {ranks} ranks: {why}"
        ) from error
    placement = made.stage_index_to_group_rank
    return Order(
        schedule,
        microbatches,
        tuple(placement[i] for i in range(ranks * chunks)),
        tuple(tuple(_actions(made.pipeline_order[rank])) for rank in range(ranks)),
    )


def _actions(shown: Sequence[Any]) -> Iterator[Action]:
    """Torch's actions as ours; an idle step is none, since the runtime passes over it."""
    for action in shown:
        if action is not None:
            parts = action.sub_actions or (action,)
            for part in parts:
                joined = part is not parts[-1]
                yield Action(part.computation_type.value, part.stage_index, part.microbatch_index, joined)
