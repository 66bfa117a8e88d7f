"""Which values of a training step autograd keeps, which are computed again, which lie in the host's memory.

Values are storages, named after the node that makes them; "name!" is what the call `name` saves for its
backward besides its arguments and results (the mask of a dropout, the logsumexp of attention). Backward
comes to the calls in the reverse of their order, so "before the backward of that call" is a point in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

HIDDEN = "!"


@dataclass(frozen=True)
class Again:
    """What is computed again at one point of backward.

    before    the call whose backward comes next
    nodes     what is computed, in the order of the graph
    held      (value, until): what of it is kept afterwards, until the backward of the call `until` is done
    """

    before: str
    nodes: tuple[str, ...]
    held: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Moved:
    """A value that lies in the host's memory between forward and backward.

    value    its name; what a call hides is not moved
    fetch    the call before whose backward the copy back begins
    until    the call whose backward is the last to read it
    """

    value: str
    fetch: str
    until: str


@dataclass(frozen=True)
class Schedule:
    """A plan for the memory of one training step.

    dropped    values that autograd does not keep, in the order of the graph
    again      what is computed in their place, in the order of backward
    moved      values that are moved to the host; none of them is dropped
    """

    dropped: tuple[str, ...] = ()
    again: tuple[Again, ...] = ()
    moved: tuple[Moved, ...] = ()

    def nodes(self) -> Iterator[str]:
        """Names of all nodes that are named."""
        for move in self.moved:
            yield from (move.value, move.fetch, move.until)
        yield from (value.removesuffix(HIDDEN) for value in self.dropped)
        for one in self.again:
            yield from (one.before, *one.nodes)
            for value, until in one.held:
                yield from (value.removesuffix(HIDDEN), until)
