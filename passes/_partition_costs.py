"""What the stages of a cut cost in the simulator: seconds, and bytes as torch's stages hold them.

forward            of the calls of the stage, with what it makes again
backward_input     the gradients on the way from what the stage sends to what it received
backward_weight    all others: those of parameters, and of what is made of them alone. The first stage
                   received nothing that takes a gradient and does all of its backward as W.
saved              what backward reads, what was received, what was sent: torch keeps both until then
kept               what is still reached from a call between an activation and a parameter, and the
                   gradient at each of these calls (Qi et al. 2024, arXiv:2401.10241, as torch does it)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx
from torch.utils import _pytree as pytree

from fxaccel.ir import is_tensor, number
from fxaccel.passes._partition_plan import Cut, Step, Terms
from fxaccel.pipeline.simulator import Stage
from fxaccel.profile import Value
from fxaccel.stages import closure


def costs(step: Step, terms: Terms, found: Cut, placement: Sequence[int]) -> list[Stage]:
    """Each stage of a cut, for one microbatch; placement: stage -> rank.

    A parameter that several stages of one rank read is there once.
    """
    sent, m, stages = [(0, 0), *found.sent, (0, 0)], terms.microbatches, found.stages()
    shown = step.program.graph.output_node().all_input_nodes
    wanted = [{v for n in calls for v in step.wants(n)} for calls in stages]
    state, sizes, held = step.held(terms.states), step.sizes(), set[tuple[int, str]]()
    made = []
    for i, (calls, rank) in enumerate(zip(stages, placement, strict=True)):
        after = wanted[i + 1 :]
        read = set(shown).union(*after) if after else set[fx.Node]()  # a result goes when the loss is known
        stage = _Stage(step, calls, read, sent[i], sent[i + 1])
        names = {name for n in calls for name in step.states(n)}
        fixed = sum(state[n] for n in names if (rank, n) not in held)
        held |= {(rank, n) for n in names}
        far = {n for n in names & found.shared.keys() & step.trains if _ranks(found.shared[n], placement) > 1}
        sums = sum(2 * terms.link.seconds(sizes[n]) for n in sorted(far))
        forward, inputs, weights = (seconds / m for seconds in stage.seconds())
        saved, kept, rising, working = (nbytes // m for nbytes in stage.nbytes())
        made.append(
            Stage(
                forward, inputs, weights + sums / terms.of_step, sends=sent[i + 1][0] // m,
                returns=sent[i][1] // m, saved=saved, kept=kept, working=working, fixed=fixed, rising=rising,
            )
        )  # fmt: skip
    return made


def _ranks(stages: Iterable[int], placement: Sequence[int]) -> int:
    return len({placement[s] for s in stages})


class _Stage:
    """One stage: its calls, in order, and which of its values lie between what it received and what it sends.

    way     values that a gradient goes through to what was received
    read    what later stages read, and the caller
    received, returned, came    bytes of what comes from before, of its gradient, and of that from behind
    """

    def __init__(
        self, step: Step, calls: list[fx.Node], read: set[fx.Node], before: tuple[int, int],
        after: tuple[int, int],
    ) -> None:  # fmt: skip
        self.step, self.calls, self.read = step, calls, read
        (self.received, self.returned), self.came = before, after[1]
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

    def nbytes(self) -> tuple[int, int, int, int]:
        """Saved, kept, and what F and the rest take while they run."""
        values, saved = self.step.profile.values, self.waiting()
        total = sum(values[v].nbytes for v in saved) + self.received
        kept = total + self.returned + self.came
        if self.way:
            alive = {self.step.at[n] for n in self.reached() if n in self.step.at}
            free = (v for v in saved - self.sent() if alive.isdisjoint(values[v].needed))
            kept += self.gradients() - sum(values[v].nbytes for v in free)
        calls = [self.step.profile.calls[self.step.at[n]] for n in self.calls if n in self.step.at]
        return total, kept, self.rising(saved), max((c.surge - c.grads for c in calls), default=0)

    def waiting(self) -> set[int]:
        """Numbers of the values made here that wait for backward."""
        found = {
            number
            for number, value in enumerate(self.step.profile.values)
            if value.needed and self.here(value)
        }
        return found | self.sent()

    def here(self, value: Value) -> bool:
        """Whether it waits here: it is made here, or made again and read by a backward here."""
        nodes = self.step.nodes
        made = nodes[value.made]
        return made in self.own or (made in self.inner and any(nodes[c] in self.own for c in value.needed))

    def sent(self) -> set[int]:
        """Numbers of the values made here that others read, or the caller."""
        roots, values = self.step.profile.roots, self.step.profile.values
        found = {v for n in self.own & self.read for v in roots.get(n.name, ())}
        return {v for v in found if self.step.nodes[values[v].made] in self.own}

    def joins(self) -> list[fx.Node]:
        """Calls that a gradient goes from both on the way and off it."""
        given = self.step.gradients
        return [n for n in self.calls if n in self.way and not given.get(n, {}).keys() <= self.way]

    def reached(self) -> set[fx.Node]:
        """What such calls are made of: torch's graph of these stays until W."""
        found, waiting = set[fx.Node](), self.joins()
        while waiting:
            node = waiting.pop()
            if node in self.own and node not in found:
                found.add(node)
                waiting += node.all_input_nodes
        return found

    def gradients(self) -> int:
        """Bytes of the gradients that wait at such calls; those that came from behind wait anyway."""
        hints = self.step.program.hints
        made = [
            t
            for n in self.joins()
            if n not in self.read
            for t in pytree.tree_leaves(n.meta["val"])
            if is_tensor(t)
        ]
        return sum(number(t.numel(), hints) * t.element_size() for t in made)

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
