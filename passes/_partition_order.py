"""Orders of groups of calls, and what holds for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import networkx as nx
from torch import fx

from fxaccel.stages import nbytes

if TYPE_CHECKING:
    from fxaccel.passes._partition_plan import Links

ROUNDS = 60  # of halving an interval


def fewest_alive(graph: nx.DiGraph, links: Links, index: dict[fx.Node, int]) -> list[fx.Node]:
    """Groups in an order that at each step takes the one that leaves the fewest bytes alive."""
    step, waiting = links.step, {n: graph.in_degree(n) for n in graph}
    readers = Counter[fx.Node]()
    wants = {g: {v for n in links.members[g] for v in step.wants(n)} for g in graph}
    makes = {g: [n for n in links.members[g] if n in step.leaves[n]] for g in graph}
    for wanted in wants.values():
        readers.update(wanted)
    ready, order = [g for g in graph if not waiting[g]], list[fx.Node]()
    size = {v: nbytes(step.program, v) for v in readers}

    def change(group: fx.Node) -> int:
        freed = sum(size[v] for v in wants[group] if readers[v] == 1)
        return sum(size.get(v, 0) for v in makes[group]) - freed

    while ready:
        group = min(ready, key=lambda g: (change(g), index[g]))
        ready.remove(group)
        order.append(group)
        readers.subtract(wants[group])
        for after in graph.successors(group):
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)
    return order


def bound(graph: nx.DiGraph, seconds: dict[fx.Node, float], stages: int) -> float:
    """Seconds that the slowest of so many stages takes at least, in whatever order the groups are.

    A group that comes before or after every other one has its place in each order, and is whole: it ends a
    stage or does not fit into it. What is between two such groups counts as if it could be cut anywhere. What
    holds for some of the groups alone holds for all.
    """
    sources = [n for n in graph if not graph.in_degree(n)]
    main = max(sources, key=lambda n: len(nx.descendants(graph, n)))
    after = graph.subgraph([main, *nx.descendants(graph, main)])  # without tables that are made by the way
    return max(_least(g, {n: seconds[n] for n in g}, stages) for g in (graph, after))


def _least(graph: nx.DiGraph, seconds: dict[fx.Node, float], stages: int) -> float:
    high = sum(seconds.values())
    if not high:  # views alone
        return 0.0
    runs = list(_runs(graph, seconds))
    low = max(high / stages, max(seconds.values()))
    if _ends(runs, low) <= stages:
        return low
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if _ends(runs, middle) <= stages else (middle, high)
    return low


def _runs(graph: nx.DiGraph, seconds: dict[fx.Node, float]) -> list[tuple[float, float]]:
    """(seconds of what may be in any order, those of the group that comes after all of it), in order."""
    order = list(nx.topological_sort(graph))
    before, after = _reach(order, graph.predecessors), _reach(order[::-1], graph.successors)
    fixed = [i for i, n in enumerate(order) if before[n] + after[n] == len(order) + 1]
    runs, start = list[tuple[float, float]](), 0
    for place in fixed:
        runs.append((sum(seconds[n] for n in order[start:place]), seconds[order[place]]))
        start = place + 1
    return [*runs, (sum(seconds[n] for n in order[start:]), 0.0)]


def _reach(order: list[fx.Node], next_to: Callable[[fx.Node], Iterable[fx.Node]]) -> dict[fx.Node, int]:
    """How many nodes there are before each one, itself among them."""
    found: dict[fx.Node, int] = {}
    for i, node in enumerate(order):
        found[node] = 1 << i
        for other in next_to(node):
            found[node] |= found[other]
    return {n: mask.bit_count() for n, mask in found.items()}


def _ends(runs: list[tuple[float, float]], most: float) -> float:
    """How many stages of at most so many seconds are full when all is placed as early as it can be."""
    stage, filled = 0, 0.0
    for loose, whole in runs:
        filled += loose
        full = int(filled / most)
        stage, filled = stage + full, filled - full * most
        if filled + whole > most * (1 + 1e-12):
            stage, filled = stage + 1, 0.0
        filled += whole
    return stage + filled / most * (1 - 1e-9)
