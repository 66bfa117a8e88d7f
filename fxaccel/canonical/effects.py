"""In-place operators on values of the model's own become out-of-place ones."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxaccel import ir
from fxaccel.canonical.editor import Editor, aten
from fxaccel.canonical.storage import follows
from fxaccel.canonical.values import is_dense, same_strides, under_autocast
from fxaccel.effects import differentiable, is_random, learned, mutated_arguments

_RANDOM = torch.Tag.nondeterministic_seeded
# `copy` would be an operator of its own for what a cast and an expand are; `bernoulli` has no derivative.
_NO_TWIN = {"copy", "bernoulli"}
# What these do depends on the strides of their operand, or fails for some.
STRICT = {
    aten.view.default, aten.view.dtype, aten.view_as_complex.default, aten.as_strided.default,
    aten._unsafe_view.default, aten.sym_stride.int, aten.sym_storage_offset.default,
}  # fmt: skip
NAMESPACES = ("aten", "prims", "fxaccel")  # of operators that read values, however they are laid out
_WALK_LIMIT = 32  # values that may be laid out anew by one step


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
        base = node.args[0] if node.args else None
        if not isinstance(base, fx.Node):
            continue
        group = members[e.storage.root(base)]
        if _free(e, node, base, group) and not _reads_itself(node, base):
            new = _replace(e, node, base)
            if new is not None:
                e.storage.unite(new, base)
                group.append(new)
                changed += 1
    return changed


@functools.cache
def functional(target: Any) -> Any:
    """The out-of-place form of an in-place operator, None where there is none that means the same.

    That is the overload with the same arguments of the operator without the `_`. What torch generated from
    the in-place operator is none: it copies first, and has no derivative.
    """
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name, tags, arguments = target._opname, target.tags, target._schema.arguments
    if not name.endswith("_") or name.startswith("_"):
        return None
    name = name.removesuffix("_")
    writes = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    packet = getattr(aten, name, None)
    if writes != [0] or packet is None or name in _NO_TWIN:
        return None
    for overload in packet.overloads():
        twin = getattr(packet, overload)
        returns = [(str(r.type), r.alias_info is None or name == "detach") for r in twin._schema.returns]
        if (
            _written(twin) == _written(target)
            and returns == [("Tensor", True)]
            and torch.Tag.generated not in twin.tags
            and (_RANDOM in twin.tags) == (_RANDOM in tags)
        ):
            return twin
    return None


def _written(target: Any) -> list[tuple[str, str, bool]]:
    """Name, type and whether it is keyword-only, for each argument; the first may be called anything."""
    arguments = [(a.name, str(a.type), bool(a.kwarg_only)) for a in target._schema.arguments]
    return [("", *arguments[0][1:]), *arguments[1:]] if arguments else []


def _members(e: Editor) -> dict[fx.Node, list[fx.Node]]:
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in e.graph.nodes:
        groups.setdefault(e.storage.root(node), []).append(node)
    return groups


def _free(e: Editor, node: fx.Node, base: fx.Node, group: list[fx.Node]) -> bool:
    """Whether nothing made before `node` that shares storage with `base`, but `base`, is read at or after it.

    Without gradients the write leaves those of an earlier value alone and a new value would have none: then
    there must be none to begin with.
    """
    cuts = e.program.grad and not e.grad_on(node) and differentiable(base.meta["val"])
    for other in group:
        if other._erased or other is node:
            continue
        if other.op == "placeholder" or (cuts and other < node and e.grad_on(other)):
            return False
        if other is not base and other < node and any(not user < node for user in other.users):
            return False
    return True


def _reads_itself(node: fx.Node, base: fx.Node) -> bool:
    """Whether what is written is read as another operand too, in an order that is the operator's own."""
    again = base in [a for arg in (*node.args[1:], *node.kwargs.values()) for a in pytree.tree_leaves(arg)]
    return again and torch.Tag.pointwise not in functional(node.target).tags


def _replace(e: Editor, node: fx.Node, base: fx.Node) -> fx.Node | None:
    """Put the out-of-place form in, and let later readers of `base` read it."""
    old = base.meta["val"]
    if is_random(node) and not (old.device.type == "cpu" and is_dense(old)):
        return None  # CUDA's dropout and dropout_ draw otherwise, and some draw in the order of the memory
    target, bound = functional(node.target), list(ir.arguments(node).values())
    given = [v for v, a in zip(bound, target._schema.arguments, strict=True) if not a.kwarg_only]
    kwargs = {k: v for k, v in node.kwargs.items() if target._schema.arguments[-1].kwarg_only}
    new = e.call(node, target, *ir.without_defaults(target, tuple(given)), **kwargs)
    result = new.meta["val"]
    fits = isinstance(result, Tensor) and e.shape_of(result) == e.shape_of(old)
    if fits and result.dtype != old.dtype:
        fits = _only_rounds(e, node)
        new = e.call(node, aten.to.dtype, new, old.dtype) if fits else new
    if not fits or not (same_strides(new.meta["val"], old) or any_layout(e, node, base, new.meta["val"])):
        e.erase(new)
        return None
    take_over(node, base, new)
    node.replace_all_uses_with(new)
    e.graph.erase_node(node)
    return new


def take_over(node: fx.Node, base: fx.Node, new: fx.Node) -> None:
    """Let the readers of `base` after `node` read `new`."""
    for user in list(base.users):
        if node < user:
            user.replace_input_with(base, new)


def _only_rounds(e: Editor, node: fx.Node) -> bool:
    """Whether writing a result of another dtype does what a cast of it does, and no gradient is rounded."""
    target = functional(node.target)
    plain = torch.Tag.pointwise in target.tags and not under_autocast(node.meta.get("regions", ()))
    return plain and node not in e.program.facts(learned)


def any_layout(e: Editor, node: fx.Node, base: fx.Node, new: Any) -> bool:
    """Whether nothing after `node` tells that its result is laid out as `new` is, whose layout they follow.

    The values that follow it get their new layout. Outputs and some views tell, random operators may; and
    where a reshape copies or not matters to what is written to later.
    """
    if e.exposed(node):
        return False
    before = {n: n.meta["val"] for n in (node, base)}
    node.meta["val"] = base.meta["val"] = new
    pending = [*node.users, *(u for u in base.users if node < u)]
    fine = True
    while pending and fine:
        user = min(pending)
        pending = [u for u in pending if u is not user]
        fine = _indifferent(e, user) and len(before) < _WALK_LIMIT
        if fine and follows(user.target):
            old = user.meta["val"]
            val = e.value(user, user.target, user.args, dict(user.kwargs))
            if not all(same_strides(a, b) for a, b in zip(ir.tensors(val), ir.tensors(old), strict=True)):
                fine = not e.exposed(user)  # else a view of it could become a copy, or a copy a view
                before.setdefault(user, old)
                user.meta["val"] = val
                pending += [u for u in user.users if u not in pending]
    for changed, val in before.items():
        if changed is base or not fine:
            changed.meta["val"] = val
    return fine


def _later(e: Editor, node: fx.Node) -> bool:
    """Whether the storage of the value is written to after `node`."""
    last = e.storage.last_write.get(e.storage.root(node))
    return last is not None and node < last


def _indifferent(e: Editor, user: fx.Node) -> bool:
    """Whether a reader does the same however its operands are laid out."""
    known = user.target is operator.getitem or getattr(user.target, "namespace", "") in NAMESPACES
    return known and user.target not in STRICT and not is_random(user) and not _later(e, user)
