"""How a graph becomes a chain that can be cut, and where it is cut best.

Calls that must stay together are one link of the chain (`Links`); the links are put in several orders that
the graph allows, and each is cut exactly (fxaccel/pipeline/balance.py). The best of the orders is taken.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import networkx as nx
import torch
from torch import fx

from fxaccel.effects import aliased_arguments, flowing, has_effect, mutated_arguments, written
from fxaccel.errors import OptionError
from fxaccel.ir import Program, is_tensor
from fxaccel.passes._partition_backward import gradients
from fxaccel.passes._partition_order import bound, fewest_alive
from fxaccel.pipeline.balance import Balanced, Node, Scarce, balance
from fxaccel.pipeline.simulator import Link
from fxaccel.profile import Profile
from fxaccel.stages import again, closure, leaves, nbytes

_AS_STRIDED = torch.ops.aten.as_strided.default


@dataclass(frozen=True)
class Terms:
    """What a cut is chosen by.

    stages          how many
    memory          bytes that each stage may hold
    link            between two stages
    microbatches    that the captured batch is cut into
    states          tensors that the optimizer keeps for each parameter
    in_flight       microbatches of which each stage holds what it saves (`Order.in_flight`)
    of_step         microbatches that a step has, over which what is done once in it is spread
    """

    stages: int
    memory: tuple[float, ...]
    link: Link
    microbatches: int
    states: int
    in_flight: tuple[int, ...]
    of_step: int


class Step:
    """The training step that is cut: its graph, and what each call costs."""

    def __init__(self, program: Program, profile: Profile, seconds: dict[int, float]) -> None:
        self.program = program
        self.nodes = list(program.graph.nodes)
        self.index = {n: i for i, n in enumerate(self.nodes)}
        self.again: set[fx.Node] = program.facts(again)
        self.leaves: dict[fx.Node, frozenset[fx.Node]] = program.facts(leaves)
        self.calls = [n for n in self.nodes if n.op == "call_function" and n not in self.again]
        self.learns: set[fx.Node] = program.facts(flowing)
        self.profile, self.at = profile, {self.nodes[i]: i for i in seconds}
        self.forward = {n: seconds[i] for n, i in self.at.items()}
        self.gradients = {n: self._gradients(n) for n in self.at}
        self.seconds = {n: s + sum(self.gradients[n].values()) for n, s in self.forward.items()}
        self.saved = Counter[fx.Node]()
        for value in profile.values:
            if value.needed:
                self.saved[self.nodes[value.made]] += value.nbytes
        self.tied = {name: group[0] for group in program.ties for name in group}
        self.read = {n: self._read(n) for n in self.calls}
        self.names = {
            program.placeholder(n): self.tied.get(slot.name, slot.name) for n, slot in program.state.items()
        }
        self.trains = {name for n, name in self.names.items() if n in self.learns}

    def _gradients(self, node: fx.Node) -> dict[fx.Node, float]:
        """Seconds of the backward of a call, by argument."""
        product = self.profile.calls[self.at[node]].flops > 0
        state = {a for a in node.all_input_nodes if a in self.again or a.name in self.program.state}
        return gradients(node, self.forward[node], product, self.learns, state)

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """What a call reads, itself or through what is made again for it."""
        more = closure(self.again, node.all_input_nodes)
        return list(dict.fromkeys(a for n in [node, *more] for a in n.all_input_nodes))

    def wants(self, node: fx.Node) -> set[fx.Node]:
        """What the stage of a call has to receive for it, if it does not make it."""
        return {leaf for a in node.all_input_nodes for leaf in self.leaves[a]}

    def states(self, node: fx.Node) -> set[str]:
        """Names of the parameters and buffers that a call reads, a tied one by its first."""
        return {self.names[a] for a in self.read[node] if a in self.names}

    def sizes(self) -> dict[str, int]:
        """Bytes of each of them."""
        return {name: nbytes(self.program, n) for n, name in self.names.items()}

    def held(self, states: int) -> dict[str, int]:
        """These, with gradients and the optimizer's states."""
        return {n: size * (2 + states if n in self.trains else 1) for n, size in self.sizes().items()}


# -- what stays together ---------------------------------------------------------------------------


class Links:
    """The calls in groups that stay in one stage, and the order that the groups depend on each other in."""

    def __init__(self, step: Step, together: Iterable[tuple[fx.Node, ...]] = ()) -> None:
        self.step = step
        self.parent = {n: n for n in step.calls}
        self.why: dict[fx.Node, str] = {}
        for nodes, why in [*_together(step), *((n, "they read one parameter") for n in together)]:
            self.unite([n for n in nodes if n in self.parent], why)
        self.collapse()
        self.members: dict[fx.Node, list[fx.Node]] = {}
        for node in step.calls:
            self.members.setdefault(self.root(node), []).append(node)

    def root(self, node: fx.Node) -> fx.Node:
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def unite(self, nodes: Sequence[fx.Node], why: str) -> None:
        for a, b in pairwise(nodes):
            a, b = sorted((self.root(a), self.root(b)), key=self.step.index.__getitem__)
            if a is not b:
                self.parent[b] = a
                self.why[a] = why

    def edges(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Group -> a group that comes after it: it reads its values, or has its effects later."""
        effects = [n for n in self.step.calls if has_effect(n) and not mutated_arguments(n)]
        pairs = [(a, n) for n in self.step.calls for a in self.step.wants(n) if a in self.parent]
        for a, b in [*pairs, *pairwise(effects)]:
            if self.root(a) is not self.root(b):
                yield self.root(a), self.root(b)

    def collapse(self) -> None:
        """Groups that depend on each other in a circle become one."""
        graph = nx.DiGraph(self.edges())
        for circle in nx.strongly_connected_components(graph):
            self.unite(sorted(circle, key=self.step.index.__getitem__), "what is between them is, too")

    def graph(self) -> nx.DiGraph:
        """The groups, each by its first call, and what has to come after what."""
        graph = nx.DiGraph()
        graph.add_nodes_from(sorted(self.members, key=self.step.index.__getitem__))
        graph.add_edges_from(self.edges())
        return graph

    def orders(self) -> Iterator[list[fx.Node]]:
        """Orders of the groups: that of the graph, and those that keep few bytes alive, from either end."""
        index, graph = self.step.index, self.graph()
        first = list(nx.lexicographical_topological_sort(graph, key=index.__getitem__))
        yield first
        back = graph.reverse(copy=True)
        yield list(nx.lexicographical_topological_sort(back, key=lambda n: -index[n]))[::-1]
        yield fewest_alive(graph, self, index)


def _together(step: Step) -> Iterator[tuple[list[fx.Node], str]]:
    """Calls that stay in one stage, and why."""
    for node in step.calls:
        parts = [u for u in node.users if u.target is operator.getitem]
        if isinstance(node.meta["val"], (list, tuple)):
            yield [node, *parts], "they are results of one call"
        elif not is_tensor(node.meta["val"]):
            readers = [n for n in step.calls if node in step.wants(n)]
            yield [node, *readers], "they read a number that is made of data"
        if node.target is _AS_STRIDED:
            yield _owners(node), "they read one storage by its strides"
    yield from _around_writes(step)
    regions: dict[object, list[fx.Node]] = {}
    for node in step.calls:
        for region in node.meta.get("regions", ()):
            if region.kind in ("grad", "autocast"):
                regions.setdefault(region, []).append(node)
    for region, nodes in regions.items():
        if 2 * len(nodes) <= len(step.calls):  # one around most of the step is entered by each stage
            yield nodes, f"they are in the region {region}"


def _owners(node: fx.Node) -> list[fx.Node]:
    """A call and those whose storage it may share, up to the one that made it."""
    found = [node]
    while shared := aliased_arguments(found[-1]):
        found.append(shared[0])
    return found[::-1]


def _around_writes(step: Step) -> Iterator[tuple[list[fx.Node], str]]:
    """What writes to a storage, and what touches it; writes to the buffers of one module."""
    writers, modules = step.program.facts(written), dict[str, list[fx.Node]]()
    touching: dict[fx.Node, list[fx.Node]] = {}
    for node in step.calls:
        for value in [node, *step.read[node]]:
            if value in writers:
                touching.setdefault(writers[value], []).append(node)
        for target in mutated_arguments(node):
            slot = step.program.state.get(target.name)
            if slot is not None:
                modules.setdefault(slot.name.rpartition(".")[0], []).append(node)
    for writer, nodes in touching.items():
        yield [writer, *nodes], "they touch a tensor that is written to"
    for nodes in modules.values():
        yield nodes, "they write to the buffers of one module"


# -- the cut ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Groups in order, cut into stages.

    seconds   of each stage, with what it sends, receives, and sums of shared gradients
    sent      bytes from each stage but the last to the next one, and of gradients back
    held      bytes that each stage holds at most
    shared    parameter or buffer -> the stages that read it, where they are several
    least     seconds that the slowest stage takes at least in any order of these groups
    """

    order: list[list[fx.Node]]
    balanced: Balanced
    seconds: tuple[float, ...]
    sent: tuple[tuple[int, int], ...]
    held: tuple[int, ...]
    shared: dict[str, tuple[int, ...]]
    least: float = 0.0

    @property
    def bound(self) -> float:
        """Seconds that the slowest stage takes at least: in any order, or at any cut of this one."""
        return max(self.least, self.balanced.bound)

    @property
    def slowest(self) -> float:
        """Seconds of the slowest stage."""
        return max(self.seconds)

    def stages(self) -> list[list[fx.Node]]:
        """The calls of each stage."""
        ends = [0, *self.balanced.cuts, len(self.order)]
        return [[n for group in self.order[i:j] for n in group] for i, j in pairwise(ends)]


def cut(step: Step, terms: Terms, named: Callable[[list[list[fx.Node]]], list[int]]) -> Cut:
    """The best cut; `named` says which groups of an order have to begin a stage.

    Parameters that several stages read are shared, or their readers are put together, whichever costs less.
    """
    best, together = _best(step, terms, (), named), list[tuple[fx.Node, ...]]()
    for name in sorted(best.shared):
        readers = tuple(n for n in step.calls if name in step.states(n))
        if name in best.shared and name in step.trains:
            try:
                other = _best(step, terms, [*together, readers], named)
            except OptionError:
                continue  # there are too few places to cut, or too little memory, with them together
            if (other.slowest, other.balanced.sent) < (best.slowest, best.balanced.sent):
                best, together = other, [*together, readers]
    return best


def _best(
    step: Step, terms: Terms, together: Iterable[tuple[fx.Node, ...]],
    named: Callable[[list[list[fx.Node]]], list[int]],
) -> Cut:  # fmt: skip
    links = Links(step, together)
    if len(links.members) < terms.stages:
        raise OptionError(_too_few(links, terms.stages))
    best: Cut | None = None
    refused = list[OptionError]()
    for order in links.orders():
        groups = [links.members[g] for g in order]
        try:
            found = _cut(step, terms, groups, named(groups))
        except OptionError as error:
            refused.append(error)
            continue
        if best is None or (found.slowest, found.balanced.sent) < (best.slowest, best.balanced.sent):
            best = found
    if best is None:
        raise min(refused, key=lambda e: e.lacks if isinstance(e, Scarce) else math.inf)
    parts = {g: sum(step.seconds.get(n, 0.0) for n in own) for g, own in links.members.items()}
    return replace(best, least=bound(links.graph(), parts, terms.stages) / terms.microbatches)


def _too_few(links: Links, stages: int) -> str:
    largest = max(links.members, key=lambda g: len(links.members[g]))
    count, why = len(links.members[largest]), links.why.get(largest, "")
    held = f"; {count} calls stay together, for {why}" if count > 1 else ""
    apart = f"the step has {len(links.members)} calls that can be apart"
    return f"{apart}, which is too few for {stages} stages{held}"


def _cut(step: Step, terms: Terms, groups: list[list[fx.Node]], at: list[int]) -> Cut:
    forward, back = _crossing(step, groups)

    def balanced(every: bool) -> Balanced:
        chain = _chain(step, terms, groups, forward, back, every)
        return balance(
            chain, terms.stages, memory=terms.memory, in_flight=terms.in_flight, link=terms.link, at=at
        )

    found = balanced(every=False)
    held = _held(step, terms, groups, found.cuts, forward)
    if any(h > m for h, m in zip(held, terms.memory, strict=True)):
        found = balanced(every=True)  # all stages that read a parameter hold it, so each reader counts it
    shared, seconds, sizes = _shared(step, groups, found.cuts), list(found.seconds), step.sizes()
    for name in shared.keys() & step.trains:
        for s in shared[name]:  # the sum of the gradients, to and fro, once for all microbatches
            seconds[s] += 2 * terms.link.seconds(sizes[name]) / terms.of_step
    sent = tuple((forward[c - 1], back[c - 1]) for c in found.cuts)
    held = _held(step, terms, groups, found.cuts, forward)
    return Cut(groups, found, tuple(seconds), sent, held, shared)


def _held(
    step: Step, terms: Terms, groups: list[list[fx.Node]], cuts: Sequence[int], forward: Sequence[int]
) -> tuple[int, ...]:
    """Bytes that each stage holds at most."""
    state, found = step.held(terms.states), []
    for flight, (i, j) in zip(terms.in_flight, pairwise([0, *cuts, len(groups)]), strict=True):
        calls = [n for group in groups[i:j] for n in group]
        waiting = sum(step.saved[n] for n in calls) + (forward[i - 1] if i else 0)
        names = {name for n in calls for name in step.states(n)}
        found.append(sum(state[n] for n in names) + flight * waiting // terms.microbatches)
    return tuple(found)


def _shared(step: Step, groups: list[list[fx.Node]], cuts: Sequence[int]) -> dict[str, tuple[int, ...]]:
    stages: dict[str, set[int]] = {}
    for i, group in enumerate(groups):
        for name in {name for n in group for name in step.states(n)}:
            stages.setdefault(name, set()).add(sum(c <= i for c in cuts))
    return {name: tuple(sorted(s)) for name, s in stages.items() if len(s) > 1}


def _chain(
    step: Step, terms: Terms, groups: list[list[fx.Node]], forward: Sequence[int], back: Sequence[int],
    every: bool,
) -> list[Node]:  # fmt: skip
    """The groups with their costs for one microbatch; `every` reader of a parameter counts it, or one."""
    held, counted, made = step.held(terms.states), set[str](), set[fx.Node]()
    chain, m = list[Node](), terms.microbatches
    for i, group in enumerate(groups):
        names = {name for n in group for name in step.states(n)}
        parameters = sum(held[n] for n in names if every or n not in counted)
        inner = closure(step.again, [a for n in group for a in n.all_input_nodes]) - made
        counted, made = counted | names, made | inner
        chain.append(
            Node(
                sum(step.seconds.get(n, 0.0) for n in [*group, *inner]) / m, parameters,
                sum(step.saved[n] for n in group) // m, forward[i] // m, back[i] // m,
            )
        )  # fmt: skip
    return chain


def _crossing(step: Step, groups: list[list[fx.Node]]) -> tuple[list[int], list[int]]:
    """Bytes that cross behind each group, forward and back: each value once, however many read it."""
    made = {n: i for i, group in enumerate(groups) for n in group}
    last = dict[fx.Node, int]()
    for i, group in enumerate(groups):
        for value in {v for n in group for v in step.wants(n)}:
            last[value] = i
    for output in step.program.graph.output_node().all_input_nodes:
        for value in step.leaves[output]:
            last[value] = len(groups)
    forward, back = [0] * len(groups), [0] * len(groups)
    for value, end in last.items():
        size = nbytes(step.program, value)
        for i in range(made.get(value, 0), min(end, len(groups))):
            forward[i] += size
            back[i] += size if value in step.learns else 0
    return forward, back
