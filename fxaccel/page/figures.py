"""What a site costs before and after, computed from its shapes at the sizes of the example."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from fxaccel.cost import node_flops
from fxaccel.effects import aliased_arguments
from fxaccel.ir import expr, is_tensor, number
from fxaccel.proof import Claim, Fragment

UNITS = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True)
class Figures:
    """Of one side of a site.

    flops     as fxaccel.cost counts them
    moved     bytes, if each call reads its arguments and writes its results once
    made      bytes of the results, those that no one reads outside of the site among them
    """

    flops: int
    moved: int
    made: int

    @classmethod
    def of(cls, part: Fragment, hints: dict[str, int]) -> Figures | None:
        """Of a fragment; None where its values are not known."""
        nodes = [n for n in part.graph.nodes if n.op == "call_function"]
        if not all("val" in a.meta for n in nodes for a in (n, *n.all_input_nodes)):
            return None
        made = [n for n in nodes if not aliased_arguments(n)]
        written = sum(_nbytes([n], hints) for n in made)
        read = sum(_nbytes(n.all_input_nodes, hints) for n in made)
        return cls(sum(number(node_flops(n), hints) for n in made), read + written, written)


def sides(claim: Claim, hints: dict[str, int]) -> tuple[Figures, Figures] | None:
    """Before and after; None where a claim does not say."""
    if claim.note:
        return None if claim.whole is None else sides(claim.whole, hints)
    before, after = Figures.of(claim.before, hints), Figures.of(claim.after, hints)
    return None if before is None or after is None else (before, after)


def _nbytes(nodes: Iterable[fx.Node], hints: dict[str, int]) -> int:
    total = 0
    for node in nodes:
        val = node.meta["val"]
        for one in val if isinstance(val, (list, tuple)) else (val,):
            if is_tensor(one):
                total += number(expr(one.numel()), hints) * one.element_size()
    return total


def counted(amount: float) -> str:
    """1.25 G, for FLOPs."""
    step = 0
    while amount >= 1000 and step < len(UNITS) - 1:
        amount, step = amount / 1000, step + 1
    return f"{amount:.3g} {UNITS[step]}".strip() if step else f"{amount:.0f}"


def sized(nbytes: float) -> str:
    """Bytes with a binary unit."""
    step = 0
    while nbytes >= 1024 and step < 4:
        nbytes, step = nbytes / 1024, step + 1
    return f"{nbytes:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[step]}" if step else f"{nbytes:.0f} B"
