"""The bound that holds for all orders: below every cut of every order, and met by the best of a chain."""

import itertools
import random

import networkx as nx
import pytest

from fxaccel.passes._partition_order import bound


def best(orders, seconds, stages):
    """The least time of the slowest stage, over all cuts of these orders."""
    found = []
    for order in orders:
        for cuts in itertools.combinations(range(1, len(order)), stages - 1):
            ends = itertools.pairwise((0, *cuts, len(order)))
            found.append(max(sum(seconds[n] for n in order[i:j]) for i, j in ends))
    return min(found)


@pytest.mark.parametrize("seed", range(40))
def test_no_order_and_cut_takes_less(seed):
    rng = random.Random(seed)
    count, stages = rng.randrange(4, 8), rng.randrange(2, 5)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(p for p in itertools.combinations(range(count), 2) if rng.random() < 0.5)
    seconds = {n: rng.random() ** 3 for n in range(count)}
    found = bound(graph, seconds, stages)
    assert found <= best(nx.all_topological_sorts(graph), seconds, stages) * (1 + 1e-9)
    assert found >= max(sum(seconds.values()) / stages, max(seconds.values()))


def test_what_takes_no_time_takes_none():
    """Of what follows the longest source views alone may be left."""
    graph = nx.DiGraph([(0, 1), (2, 1), (2, 3)])
    assert bound(graph, dict.fromkeys(range(4), 0.0), 2) == 0
    assert bound(graph, {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}, 2) == 1


@pytest.mark.parametrize("seed", range(20))
def test_of_a_chain_it_is_the_optimum(seed):
    rng = random.Random(seed)
    count, stages = rng.randrange(4, 12), rng.randrange(2, 5)
    seconds = {n: rng.random() for n in range(count)}
    found = bound(nx.path_graph(count, nx.DiGraph), seconds, stages)
    assert found == pytest.approx(best([list(range(count))], seconds, stages), rel=1e-8)
