"""In-place operators on values of the model's own become out-of-place ones."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

from fxaccel.canonical.editor import Editor
from fxaccel.canonical.values import same_strides
from fxaccel.effects import mutated_arguments

# Operators besides the elementwise ones whose in-place form only names where the result goes.
_ALSO = {"masked_fill", "index_put", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy",
         "index_fill", "tril", "triu", "addmm", "baddbmm", "addbmm", "addmv", "detach"}  # fmt: skip


def functionalise(e: Editor) -> int:
    """Give every in-place operator on a value that nobody else holds its out-of-place form; how many."""
    if not e.storage.last_write:
        return 0
    nodes = [n for n in e.graph.nodes if mutated_arguments(n) and functional(n.target) is not None]
    if not nodes:
        return 0
    changed = 0
    members = _members(e)
    for node in nodes:
        base = node.args[0]
        if not isinstance(base, fx.Node):
            continue
        group = members[e.storage.root(base)]
        if _free(node, base, group):
            new = _replace(e, node, base)
            if new is not None:
                e.storage.unite(new, base)
                group.append(new)
                changed += 1
    return changed


@functools.cache
def functional(target: Any) -> Any:
    """The out-of-place form of an in-place operator, None where there is none that means the same."""
    if not isinstance(target, torch._ops.OpOverload) or not target._opname.endswith("_"):
        return None
    name = target._opname.removesuffix("_")
    packet = getattr(torch.ops.aten, name, None) if target.namespace == "aten" else None
    twin = getattr(packet, target._overloadname, None)
    if twin is None or torch.Tag.nondeterministic_seeded in twin.tags:
        return None
    same = [(a.name, str(a.type)) for a in twin._schema.arguments] == [
        (a.name, str(a.type)) for a in target._schema.arguments
    ]
    elementwise = torch.Tag.pointwise in twin.tags
    return twin if same and (elementwise or name in _ALSO) else None


def _members(e: Editor) -> dict[fx.Node, list[fx.Node]]:
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in e.graph.nodes:
        groups.setdefault(e.storage.root(node), []).append(node)
    return groups


def _free(node: fx.Node, base: fx.Node, group: list[fx.Node]) -> bool:
    """Whether nothing made before `node` that shares storage with `base`, but `base`, is read after it."""
    for other in group:
        if other._erased or other is node or other is base:
            continue
        if other.op == "placeholder":
            return False
        if other < node and any(node < user for user in other.users):
            return False
    return base.op != "placeholder"


def _replace(e: Editor, node: fx.Node, base: fx.Node) -> fx.Node | None:
    """Put the out-of-place form in, and let later readers of `base` read it."""
    target = functional(node.target)
    new = e.call(node, target, *node.args, **node.kwargs)
    result, same = new.meta["val"], base.meta["val"]
    alike = isinstance(result, Tensor) and e.shape_of(result) == e.shape_of(same)
    if not alike or result.dtype != same.dtype or not same_strides(result, same):
        e.graph.erase_node(new)
        return None
    for user in list(base.users):
        if node < user:
            user.replace_input_with(base, new)
    node.replace_all_uses_with(new)
    e.graph.erase_node(node)
    return new
