"""What the stages of a cut cost in the simulator: seconds, and bytes as torch's stages hold them.

forward            of the calls of the stage, with what it makes again
backward_input     the gradients on the way from what the stage sends to what it received
backward_weight    all others: those of parameters, and of what is made of them alone. The first stage
                   received nothing that takes a gradient and does all of its backward as W.
saved              what backward reads, what was received, what was sent: torch keeps both until then. Where
                   backward is done in two parts what is sent is a copy (fxaccel/torch_stage.py).
kept               what is still reached from a call between an activation and a parameter, and the
                   gradient at each of these calls (Qi et al. 2024, arXiv:2401.10241, as torch does it)
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx
from torch.utils import _pytree as pytree

from fxaccel.ir import is_tensor, number
from fxaccel.passes._partition_plan import Cut, Step, Terms
from fxaccel.pipeline.orders import Order
from fxaccel.pipeline.simulator import Stage
from fxaccel.stages import closure


def costs(step: Step, terms: Terms, found: Cut, order: Order) -> list[Stage]:
    """Each stage of a cut under an order, for one microbatch.

    A parameter that several stages of one rank read is there once.
    """
    sent, m, stages = [(0, 0), *found.sent, (0, 0)], terms.microbatches, found.stages()
    placement = order.placement
    shown = step.program.graph.output_node().all_input_nodes
    wanted = [{v for n in calls for v in step.wants(n)} for calls in stages]
    state, sizes, there = step.held(terms.states), step.sizes(), set[tuple[int, str]]()
    made = []
    for i, (calls, rank) in enumerate(zip(stages, placement, strict=True)):
        after = wanted[i + 1 :]
        read = set(shown).union(*after) if after else set[fx.Node]()  # a result goes when the loss is known
        stage = _Stage(step, calls, read, sent[i], sent[i + 1], order.parted(i))
        names = {name for n in calls for name in step.states(n)}
        fixed = sum(state[n] for n in names if (rank, n) not in there)
        there |= {(rank, n) for n in names}
        far = {n for n in names & found.shared.keys() & step.trains if _ranks(found.shared[n], placement) > 1}
        sums = sum(2 * terms.link.seconds(sizes[n]) for n in sorted(far))
        forward, inputs, weights = (seconds / m for seconds in stage.seconds())
        held = {name: nbytes // m for name, nbytes in stage.nbytes().items()}
        made.append(
            Stage(
                forward, inputs, weights + sums / terms.of_step, sends=sent[i + 1][0] // m,
                returns=sent[i][1] // m, fixed=fixed, **held,
            )
        )  # fmt: skip
    return made


def _ranks(stages: Iterable[int], placement: tuple[int, ...]) -> int:
    return len({placement[s] for s in stages})


class _Stage:
    """One stage: its calls, in order, and which of its values lie between what it received and what it sends.

    way     values that a gradient goes through to what was received
    read    what later stages read, and the caller
    received, returned, came    bytes of what comes from before, of its gradient, and of that from behind
    parted                      whether backward is done in two parts
    """

    def __init__(
        self, step: Step, calls: list[fx.Node], read: set[fx.Node], before: tuple[int, int],
        after: tuple[int, int], parted: bool,
    ) -> None:  # fmt: skip
        self.step, self.calls, self.read = step, calls, read
        (self.received, self.returned), self.came, self.parted = before, after[1], parted
        self.own = set(calls)
        self.inner = closure(step.again, [a for n in calls for a in n.all_input_nodes])
        came = {v for n in calls for v in step.wants(n)} - self.own
        self.way = came & step.learns if before[0] else set()
        for node in calls:
            if node in step.learns and not self.way.isdisjoint(node.all_input_nodes):
                self.way.add(node)

    def seconds(self) -> tuple[float, float, float]:
        """Of F, I and W."""
        step, inputs, weights = self.step, 0.0, 0.0
        for node in self.calls:
            for argument, seconds in step.gradients.get(node, {}).items():
                if argument in self.way:
                    inputs += seconds
                else:
                    weights += seconds
        return sum(step.forward.get(n, 0.0) for n in [*self.calls, *self.inner]), inputs, weights

    def nbytes(self) -> dict[str, int]:
        """Those of the stage in the simulator, by their names there."""
        values, needed, copied = self.step.profile.values, self.needed(), self.came if self.parted else 0
        shown = self.own & self.read
        sent = self.roots(n for n in shown if not (self.parted and n in self.step.learns))
        saved = sum(values[v].nbytes for v in needed | sent) + copied + self.received
        rising = self.rising(needed | self.roots(shown)) + copied
        if not self.way:
            found = {"kept": saved + self.came}
        else:
            alive = {self.step.at[n] for n in self.reached() if n in self.step.at}
            kept = sum(values[v].nbytes for v in needed if not alive.isdisjoint(values[v].needed))
            kept += sum(self.joins().values()) + self.received + self.returned
            found = {"kept": kept, "parting": self.parting(), "weighing": self.weighing()}
        return {"saved": saved, "rising": rising, "working": self.working(needed), **found}

    def needed(self) -> set[int]:
        """Numbers of the values made here, or made again, that a backward here reads."""
        nodes, found, made = self.step.nodes, set[int](), self.own | self.inner
        for i, value in enumerate(self.step.profile.values):
            if nodes[value.made] in made and any(nodes[c] in self.own for c in value.needed):
                found.add(i)
        return found

    def roots(self, nodes: Iterable[fx.Node]) -> set[int]:
        """Numbers of the values made here that these lie in."""
        roots, values = self.step.profile.roots, self.step.profile.values
        found = {v for n in nodes for v in roots.get(n.name, ())}
        return {v for v in found if self.step.nodes[values[v].made] in self.own}

    def surges(self) -> dict[fx.Node, int]:
        """Call -> bytes of gradients, those of parameters aside, while its backward runs."""
        calls = {n: self.step.profile.calls[self.step.at[n]] for n in self.calls if n in self.step.at}
        return {n: c.surge - c.grads for n, c in calls.items()}

    def joins(self) -> dict[fx.Node, int]:
        """Calls that a gradient goes from both on the way and off it, with the bytes of their own gradient,
        which waits there for W."""
        given, hints, found = self.step.gradients, self.step.program.hints, dict[fx.Node, int]()
        for node in self.calls:
            if node in self.way and not given.get(node, {}).keys() <= self.way:
                made = [t for t in pytree.tree_leaves(node.meta["val"]) if is_tensor(t)]
                found[node] = sum(number(t.numel(), hints) * t.element_size() for t in made)
        return found

    def working(self, needed: set[int]) -> int:
        """The most that B takes beside all that was saved, of which it lets go call by call."""
        surges, ends = self.surges(), dict[fx.Node, int]()
        for value in (self.step.profile.values[v] for v in needed):
            first = self.step.nodes[min(c for c in value.needed if self.step.nodes[c] in self.own)]
            ends[first] = ends.get(first, 0) + value.nbytes
        gone = most = 0
        for node in reversed(self.calls):
            most = max(most, surges.get(node, 0) - gone)
            gone += ends.get(node, 0)
        return most

    def parting(self) -> int:
        """The most that I takes: the gradients that wait at joins behind a call, and what the call takes."""
        surges, joins = self.surges(), self.joins()
        waiting = most = 0
        for node in reversed(self.calls):
            most = max(most, waiting + surges.get(node, 0))
            waiting += joins.get(node, 0)
        return max(most, waiting)

    def weighing(self) -> int:
        """The most that W takes: for one join gradients of its parameters and of what it adds to them."""
        sizes = self.step.sizes()
        return max(
            (n + sum(sizes[p] for p in self.step.states(c)) for c, n in self.joins().items()), default=0
        )

    def reached(self) -> set[fx.Node]:
        """What such calls are made of: torch's graph of these stays until W."""
        found, waiting = set[fx.Node](), list(self.joins())
        while waiting:
            node = waiting.pop()
            if node in self.own and node not in found:
                found.add(node)
                waiting += node.all_input_nodes
        return found

    def rising(self, saved: set[int]) -> int:
        """The most that forward takes, with all that it makes again."""
        step, values = self.step, self.step.profile.values
        again = sum(v.nbytes for v in values if step.nodes[v.made] in self.inner)
        last = dict[int, int]()
        for place, node in enumerate(self.calls):
            if node in step.at:
                last.update(dict.fromkeys(step.profile.calls[step.at[node]].reads, place))
        live = peak = 0
        ends: dict[int, list[int]] = {}
        for place, node in enumerate(self.calls):
            if node not in step.at:
                continue
            call = step.profile.calls[step.at[node]]
            made = [*call.makes, *([] if call.hides is None else [call.hides])]
            peak = max(peak, live + call.takes)
            live += sum(values[v].nbytes for v in made)
            for value in made:
                if value not in saved:
                    ends.setdefault(last.get(value, place), []).append(value)
            live -= sum(values[v].nbytes for v in ends.pop(place, ()))
        return again + max(peak, live)
