"""One training step of a pipeline gone through action by action, with what is sent and what is in memory.

    F of stage s    starts when its rank is free and the output of s - 1 has come
    B, I            when F of s is done and the gradient of s + 1 has come
    W               when I of s is done

A rank does its actions one after the other in its order. What goes to another rank takes latency + bytes /
bandwidth of the link there, one transfer after the other in each direction, beside what the ranks compute;
what stays on a rank takes no time. Memory of a rank holds what its stages hold throughout, what came from
the start of its transfer to the end of the action that reads it, what forward saved until backward is done
(with I and W in part until each), a gradient that went to another rank until it is known to have come there
(`Order.acknowledged`, or the step ends), and what an action takes while it runs.

The order of a rank's actions is fixed and so is that of the transfers of a link, so times follow from what
each action waits for, whatever the order in which they are found.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fxaccel.errors import OptionError
from fxaccel.pipeline.orders import Action, Order


@dataclass(frozen=True)
class Stage:
    """What one microbatch costs on one stage, in seconds and bytes.

    forward, backward_input, backward_weight    seconds of F, I and W
    backward    seconds of B, I and W together if None
    sends       bytes that forward hands to the next stage
    returns     bytes of the gradient that backward hands to the stage before
    saved       bytes that wait for backward, what came from the stage before included
    kept        bytes that I leaves for W, gradients that wait for it among them; what is saved if None
    working     bytes more while an action runs
    rising      those of F, what it saves among them; working if None
    parting     those of I, what it leaves beyond what was saved among them; working and that if None
    weighing    those of W; working if None
    fixed       bytes held throughout: parameters, gradients, states of the optimizer
    """

    forward: float
    backward_input: float
    backward_weight: float
    backward: float | None = None
    sends: int = 0
    returns: int = 0
    saved: int = 0
    kept: int | None = None
    working: int = 0
    fixed: int = 0
    rising: int | None = None
    parting: int | None = None
    weighing: int | None = None

    def seconds(self, kind: str) -> float:
        """Of an action of this kind."""
        if kind == "B":
            both = self.backward_input + self.backward_weight
            return both if self.backward is None else self.backward
        return {"F": self.forward, "I": self.backward_input, "W": self.backward_weight}[kind]

    def extra(self, kind: str) -> int:
        """Bytes more while an action of this kind runs; what I leaves beyond what was saved is among them."""
        told = {"F": self.rising, "I": self.parting, "W": self.weighing}.get(kind)
        if told is not None:
            return told
        return self.working + max(0, self.change("I")) * (kind == "I")

    def change(self, kind: str) -> int:
        """Bytes that are saved when an action of this kind is done; below zero those that it lets go."""
        kept = self.saved if self.kept is None else self.kept
        return {"F": self.saved, "B": -self.saved, "I": kept - self.saved, "W": -kept}[kind]


@dataclass(frozen=True)
class Link:
    """From one rank to another: seconds before the first byte, bytes a second after."""

    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if not (0 <= self.latency < math.inf and self.bandwidth > 0):
            raise OptionError(f"expected a latency of 0 or more and a bandwidth above 0, came {self}")

    def seconds(self, nbytes: int) -> float:
        """What a transfer takes."""
        return self.latency + nbytes / self.bandwidth


INSTANT = Link()
Links = Link | Mapping[tuple[int, int], Link]
"""One for all pairs of ranks, or (from, to) -> the link; none has no cost."""


@dataclass(frozen=True)
class Event:
    """An action as it ran on its rank."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Transfer:
    """What an action sent from one rank to another."""

    source: int
    target: int
    action: Action
    nbytes: int
    start: float
    end: float


@dataclass(frozen=True)
class Simulated:
    """A step of the pipeline.

    events       in the order in which each rank does them, rank by rank
    transfers    in the order in which each link carries them
    memory       rank -> (time, bytes from then on)
    """

    order: Order
    events: tuple[Event, ...]
    transfers: tuple[Transfer, ...]
    memory: tuple[tuple[tuple[float, int], ...], ...]

    @property
    def seconds(self) -> float:
        """From the first action's start to the last one's end."""
        return max(e.end for e in self.events)

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds that each rank computes."""
        return tuple(
            math.fsum(e.end - e.start for e in self.events if e.rank == r) for r in range(len(self.memory))
        )

    @property
    def bubble(self) -> float:
        """The seconds over those of the busiest rank, as a share of these."""
        most = max(self.busy)
        return self.seconds / most - 1 if most else 0.0

    @property
    def peaks(self) -> tuple[int, ...]:
        """Most bytes on each rank."""
        return tuple(max(nbytes for _, nbytes in steps) for steps in self.memory)

    @property
    def sent(self) -> dict[tuple[int, int], int]:
        """(from, to) -> bytes."""
        total: dict[tuple[int, int], int] = {}
        for one in self.transfers:
            pair = one.source, one.target
            total[pair] = total.get(pair, 0) + one.nbytes
        return total


def simulate(order: Order, stages: Sequence[Stage], links: Links = INSTANT) -> Simulated:
    """The step that runs this order.

    Raises OptionError where no rank can go on, with what each of them waits for.
    """
    _check(order, stages)
    run = _Run(order, stages, links)
    run.finish()
    return Simulated(
        order,
        tuple(e for events in run.events for e in events),
        tuple(run.transfers),
        tuple(tuple(_steps(run.fixed(rank), changes)) for rank, changes in enumerate(run.changes)),
    )


def check_finite(costs: Any, what: str) -> None:
    """Raise OptionError where a number of a record is not one that time or bytes can be."""
    for one in fields(costs):
        value = getattr(costs, one.name)
        if value is not None and not 0 <= value < math.inf:
            raise OptionError(f"expected {one.name} of {what} to be finite, 0 or more, came {value}")


def _check(order: Order, stages: Sequence[Stage]) -> None:
    if len(stages) != len(order.placement):
        raise OptionError(f"expected {len(order.placement)} stages for this order, came {len(stages)}")
    for number, stage in enumerate(stages):
        check_finite(stage, f"stage {number}")


Key = tuple[str, int, int]
"""(what, stage, microbatch) of something that is there from some time on."""


def _needs(action: Action, last: int) -> Iterator[Key]:
    """What an action waits for besides its rank."""
    _, stage, microbatch, _ = action
    if action.kind == "F":
        if stage > 0:
            yield "the output for", stage, microbatch
    elif action.kind == "W":
        yield "I", stage, microbatch
    else:
        yield "F", stage, microbatch
        if stage < last:
            yield "the gradient for", stage, microbatch


def _hands(action: Action, last: int) -> Key | None:
    """What its result is to the stage beside it."""
    kind, stage, microbatch, _ = action
    if kind == "F" and stage < last:
        return "the output for", stage + 1, microbatch
    if kind in "BI" and stage > 0:
        return "the gradient for", stage - 1, microbatch
    return None


class _Run:
    """The step as far as it has been found.

    known      what is there, and since when
    free       (from, to) -> when the link has carried what it was given
    held       rank -> what the first of an overlapped pair sends
    changes    rank -> (time, 0 for what comes in and 1 for what its actions do, bytes)
    read       of each stage, as `Order.acknowledged` says
    come       gradients that are known to have come, by stage and microbatch;  going: that are not, and wait
    """

    def __init__(self, order: Order, stages: Sequence[Stage], links: Links) -> None:
        self.order, self.stages, self.links, self.last = order, stages, links, len(stages) - 1
        self.known: dict[Key, float] = {}
        self.free: dict[tuple[int, int], float] = {}
        self.transfers: list[Transfer] = []
        self.held: list[list[Action]] = [[] for _ in order.ranks]
        self.events: list[list[Event]] = [[] for _ in order.ranks]
        self.changes: list[list[tuple[float, int, int]]] = [[] for _ in order.ranks]
        self.read = [dict(order.acknowledged(s)) for s in range(len(stages))]
        self.come, self.going = set[tuple[int, int]](), set[tuple[int, int]]()

    def fixed(self, rank: int) -> int:
        return sum(s.fixed for s, r in zip(self.stages, self.order.placement, strict=True) if r == rank)

    def finish(self) -> None:
        """Go on with each rank until it waits, and again when that has come."""
        waiting: dict[Key, int] = {}
        ready = deque(range(len(self.order.ranks)))
        while ready:
            rank = ready.popleft()
            actions = self.order.ranks[rank]
            while len(self.events[rank]) < len(actions):
                action = actions[len(self.events[rank])]
                missing = next((k for k in _needs(action, self.last) if k not in self.known), None)
                if missing is not None:
                    waiting[missing] = rank
                    break
                for made in self.perform(rank, action):
                    if made in waiting:
                        ready.append(waiting.pop(made))
        if waiting:
            raise OptionError(self.deadlock(waiting), "let each action come after what it waits for")
        end = max(events[-1].end for events in self.events)
        for stage, _ in self.going:
            self.changes[self.order.placement[stage]].append((end, 1, -self.stages[stage].returns))

    def deadlock(self, waiting: Mapping[Key, int]) -> str:
        lines = list[str]()
        for (what, stage, microbatch), rank in sorted(waiting.items(), key=lambda w: w[1]):
            action = self.order.ranks[rank][len(self.events[rank])]
            one = f"{stage}{what}{microbatch}" if len(what) == 1 else f"{what} it"
            lines.append(f"rank {rank} waits in {action} for {one}")
        name = self.order.schedule
        return f"expected an order of actions that ends, came a deadlock of {name}: {', '.join(lines)}"

    def perform(self, rank: int, action: Action) -> list[Key]:
        """Do an action; what is known by it."""
        stage, before = self.stages[action.stage], self.events[rank]
        came = [self.known[key] for key in _needs(action, self.last)]
        start = max([before[-1].end if before else 0.0, *came])
        end = start + stage.seconds(action.kind)
        before.append(Event(rank, action, start, end))
        if action.kind == "F":
            self.acknowledge(action, start)
        extra = stage.extra(action.kind)
        self.changes[rank] += [
            (start, 1, extra),
            (end, 1, stage.change(action.kind) - extra - self.received(action)),
        ]
        if action.kind in "BW":
            self.leave(action, end)
        made: list[Key] = [(action.kind, action.stage, action.microbatch)]
        self.known[made[0]] = end
        hands = _hands(action, self.last)
        if hands is not None and self.order.placement[hands[1]] == rank:
            self.known[hands] = end
            self.changes[rank].append((end, 1, self.size(action)))
            made.append(hands)
        elif hands is not None:
            self.held[rank].append(action)
        if not action.joined:
            made += [self.send(rank, one, end) for one in self.held[rank]]
            self.held[rank] = []
        return made

    def acknowledge(self, action: Action, now: float) -> None:
        """What comes for a forward tells which gradients the stage before has read."""
        stage = self.stages[action.stage]
        for microbatch in self.read[action.stage].get(action.microbatch, ()):
            one = action.stage, microbatch
            self.come.add(one)
            if one in self.going:
                self.going.remove(one)
                self.changes[self.order.placement[action.stage]].append((now, 1, -stage.returns))

    def leave(self, action: Action, now: float) -> None:
        """When a stage is done with a microbatch, its gradient may still be on its way to another rank."""
        placement, one = self.order.placement, (action.stage, action.microbatch)
        away = action.stage > 0 and placement[action.stage - 1] != placement[action.stage]
        if away and one not in self.come:
            self.going.add(one)
            self.changes[placement[action.stage]].append((now, 1, self.stages[action.stage].returns))

    def size(self, action: Action) -> int:
        """Bytes that an action hands on."""
        stage = self.stages[action.stage]
        return stage.sends if action.kind == "F" else stage.returns

    def received(self, action: Action) -> int:
        """Bytes that came for an action, which reads them."""
        if action.kind == "F":
            return self.stages[action.stage - 1].sends if action.stage > 0 else 0
        if action.kind == "W" or action.stage == self.last:
            return 0
        return self.stages[action.stage + 1].returns

    def send(self, rank: int, action: Action, now: float) -> Key:
        """Give what an action made to the link; what is known once it has come."""
        key = _hands(action, self.last)
        assert key is not None, f"{action} hands nothing on"
        target, nbytes = self.order.placement[key[1]], self.size(action)
        pair = rank, target
        link = self.links if isinstance(self.links, Link) else self.links.get(pair, INSTANT)
        start = max(now, self.free.get(pair, 0.0))
        end = start + link.seconds(nbytes)
        self.free[pair] = self.known[key] = end
        self.transfers.append(Transfer(rank, target, action, nbytes, start, end))
        self.changes[target].append((start, 0, nbytes))
        return key


def _steps(fixed: int, changes: Sequence[tuple[float, int, int]]) -> Iterator[tuple[float, int]]:
    """Bytes over time. At one instant what comes in counts first, then what the rank does, in its order."""
    live = fixed
    yield 0.0, live
    for time, _, nbytes in sorted(changes, key=lambda c: c[:2]):
        if nbytes:
            live += nbytes
            yield time, live
