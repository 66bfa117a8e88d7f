"""The module tree with the number of sites in each module; equal modules in a row are shown once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fxaccel.page.blocks import Found
from fxaccel.page.markup import Markup, count, folded, joined, tag

WORDS = {"applied": ("applied", "applied"), "refused": ("refused", "refused"),
         "near_misses": ("near miss", "near misses")}  # fmt: skip


@dataclass
class Node:
    """A module: its own sites by kind, and the modules in it."""

    path: str
    kind: str
    sites: Counter[str] = field(default_factory=Counter)
    children: list[Node] = field(default_factory=list)

    def total(self) -> Counter[str]:
        """Sites of the module and of those in it."""
        return sum((c.total() for c in self.children), self.sites)

    def shape(self) -> str:
        """Equal for modules that look the same but for their paths."""
        return f"({self.kind} {sorted(self.sites.items())} {''.join(c.shape() for c in self.children)})"


def badges(sites: Counter[str]) -> list[Markup]:
    """Numbers of sites, in colours."""
    return [tag("span", count(sites[k], *WORDS[k]), cls=f"badge {k}") for k in WORDS if sites[k]]


def modules_of(modules: Sequence[tuple[str, str]], found: Sequence[Found]) -> Markup:
    """The tree, its root open."""
    nodes = dict[str, Node]()
    for path, kind in sorted(modules, key=lambda m: m[0] != ""):
        nodes[path] = Node(path, kind)
        outer = path.rpartition(".")[0]
        if path:
            nodes.get(outer, nodes[""]).children.append(nodes[path])
    for one in found:
        nodes.get(one.site.path, nodes[""]).sites[one.kind] += 1
    tree = _node([nodes[""]], True)
    return tag("section", [tag("h3", "Modules"), tag("div", tree, cls="tree")])


def _node(alike: list[Node], opened: bool = False) -> Markup:
    """A module and those right after it that are equal."""
    one = alike[0]
    name = [tag("b", one.path or "(root)"), " ", tag("span", one.kind, cls="kind")]
    if len(alike) > 1:
        name += [" ", tag("span", f"x {len(alike)}", cls="times")]
        name += [" ", tag("span", f"to {alike[-1].path}", cls="muted")]
    head = tag("span", [*name, " ", *badges(one.total())], cls="l")
    if not one.children:
        return tag("div", head, cls="leaf")
    groups = list[list[Node]]()
    shapes = [c.shape() for c in one.children]
    for i, child in enumerate(one.children):
        if i and shapes[i] == shapes[i - 1]:
            groups[-1].append(child)
        else:
            groups.append([child])
    return folded(head, joined(_node(g) for g in groups), "m", opened)
