"""What a call does besides computing its result: writes, random draws, shared storage."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxaccel.ir import Program, arguments, incremental, is_tensor

UNWRITTEN = "write into a copy, or make a new tensor"
"""What a pass would take in the place of a value that is written in place."""

_BATCH_NORM = torch.ops.aten.batch_norm.default
_RANDOM_TAG = torch.Tag.nondeterministic_seeded
_MAY_ALIAS_FIRST = {
    torch.ops.aten.dropout.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.alpha_dropout.default,
    torch.ops.aten.feature_alpha_dropout.default,
}  # return their input itself in eval mode
_MAY_NOT_WRITE = {
    torch.ops.aten.dropout_.default,
    torch.ops.aten.feature_dropout_.default,
    torch.ops.aten.alpha_dropout_.default,
    torch.ops.aten.feature_alpha_dropout_.default,
}  # return their input as it is in eval mode
_KEPT = {
    "_assert_async",
    "_assert_scalar",
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}


@dataclass(frozen=True)
class _Schema:
    """What the target of a call says whatever its arguments.

    writes    names of the arguments it writes to
    shares    names of the arguments whose storage its result may share
    random    whether it may draw random numbers
    kept      whether it stays although nothing reads it
    plain     whether it can neither write to an argument nor share its storage
    """

    writes: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    random: bool = False
    kept: bool = False
    plain: bool = False


@lru_cache(maxsize=4096)
def _schema(target: Any) -> _Schema:
    kept = isinstance(target, torch._ops.HigherOrderOperator)
    name = getattr(target, "_opname", "") or getattr(target, "__name__", "")
    if not isinstance(target, torch._ops.OpOverload):
        return _Schema(kept=kept or name in _KEPT)
    labelled = [a for a in target._schema.arguments if a.alias_info]
    shares = any(r.alias_info for r in target._schema.returns)
    return _Schema(
        writes=tuple(a.name for a in labelled if a.alias_info and a.alias_info.is_write),
        shares=tuple(a.name for a in labelled) if shares else (),
        random=_RANDOM_TAG in target.tags,
        kept=name in _KEPT,
        plain=not labelled and not shares and target not in _MAY_ALIAS_FIRST and target is not _BATCH_NORM,
    )


def is_plain(target: Any) -> bool:
    """Whether no call of `target` can write to or share the storage of an argument."""
    return _schema(target).plain


def is_pure(target: Any) -> bool:
    """Whether calls of `target` have no effect, whatever their arguments; False where it takes a look."""
    schema = _schema(target)
    return schema.plain and not schema.kept and not schema.random


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """Nodes whose tensors this call writes to."""
    if node.op != "call_function":
        return []
    names = _schema(node.target).writes
    if node.target in _MAY_NOT_WRITE and not is_random(node):
        return []
    if node.target is _BATCH_NORM and arguments(node)["training"]:
        names = ("running_mean", "running_var")  # although the schema does not say so
    return _nodes(node, names)


def is_random(node: fx.Node) -> bool:
    """Whether the call draws random numbers."""
    if node.op != "call_function" or not _schema(node.target).random:
        return False
    bound = arguments(node)
    if bound.get("train") is False or bound.get("training") is False:
        return False
    names = ["dropout", "dropout_p", *(["p"] if "train" in bound else [])]
    return next((bound[n] != 0 for n in names if n in bound), True)


def has_effect(node: fx.Node) -> bool:
    """Whether the node must stay although nothing reads it."""
    if node.op in ("placeholder", "output"):
        return True
    return _schema(node.target).kept or bool(mutated_arguments(node)) or is_random(node)


def _alone(program: Program, roots: dict[fx.Node, fx.Node], made: Sequence[fx.Node]) -> None:
    for node in made:
        shared = aliased_arguments(node)
        roots[node] = roots[shared[0]] if shared else node


@incremental(_alone)
def alias_roots(program: Program) -> dict[fx.Node, fx.Node]:
    """Node -> representative of the set of nodes that may share its storage (an analysis)."""
    root: dict[fx.Node, fx.Node] = {}

    def find(n: fx.Node) -> fx.Node:
        while root[n] is not n:
            root[n] = root[root[n]]
            n = root[n]
        return n

    for node in program.graph.nodes:
        root[node] = node
        for other in aliased_arguments(node):
            root[find(node)] = find(other)
    return {n: find(n) for n in root}


def storage_owner(node: fx.Node) -> Any:
    """What a value may be a view of: a placeholder, a call, or one of a call's results as (call, number)."""
    while True:
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            call, number = node.args
            if not aliased_arguments(call):
                return call, number
        shared = aliased_arguments(node)
        if not shared:
            return node
        node = shared[0]


def aliased_arguments(node: fx.Node) -> list[fx.Node]:
    """Arguments whose storage the result of this call may share."""
    target = node.target
    if node.op != "call_function":
        return []
    if target is operator.getitem:
        return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
    if target in _MAY_ALIAS_FIRST:
        return [] if is_random(node) else [n for n in node.args[:1] if isinstance(n, fx.Node)]
    if isinstance(target, torch._ops.HigherOrderOperator):
        return list(node.all_input_nodes)  # a branch may return its operand
    return _nodes(node, _schema(target).shares)


def _nodes(node: fx.Node, names: tuple[str, ...]) -> list[fx.Node]:
    """The nodes among the arguments of these names."""
    if not names:
        return []
    bound = arguments(node)
    return [n for name in names for n in pytree.tree_leaves(bound[name]) if isinstance(n, fx.Node)]


def _written_too(program: Program, writers: dict[fx.Node, fx.Node], made: Iterable[fx.Node]) -> None:
    roots = program.facts(alias_roots)
    writers |= {n: writers[roots[n]] for n in made if roots[n] in writers}  # rewrites write to nothing


@incremental(_written_too)
def written(program: Program) -> dict[fx.Node, fx.Node]:
    """Node -> the last in-place call that writes to its storage, for every node so affected (an analysis)."""
    roots = program.facts(alias_roots)
    writers: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        for target in mutated_arguments(node):
            writers[roots[target]] = node
    return {n: writers[r] for n, r in roots.items() if r in writers}


def eliminate_dead(graph: fx.Graph) -> int:
    """Erase nodes that nothing reads and that have no effect; returns how many."""
    erased = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and not has_effect(node):
            graph.erase_node(node)
            erased += 1
    return erased


def _learned_too(program: Program, found: set[fx.Node], made: Iterable[fx.Node]) -> None:
    fixed = {name for one in program.replacements if one.frozen for name in one.new}
    for node in made:
        if not program.grad or not any(differentiable(t) for t in pytree.tree_leaves(node.meta.get("val"))):
            continue
        slot = program.state.get(node.name) if node.op == "placeholder" else None
        trains = slot is None or (slot.kind == "parameter" and slot.name not in fixed)
        source = node.op == "placeholder" and trains
        if source or not found.isdisjoint(node.all_input_nodes):
            found.add(node)


@incremental(_learned_too)
def learned(program: Program) -> set[fx.Node]:
    """Nodes that a gradient may flow to: floats computed from parameters or from the caller's tensors (an
    analysis)."""
    found: set[fx.Node] = set()
    _learned_too(program, found, program.graph.nodes)
    return found


def flowing(program: Program) -> set[fx.Node]:
    """Values that a gradient goes to in this step: not to inputs and parameters that take none (an
    analysis)."""
    learns, found = program.facts(learned), set[fx.Node]()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            flows = node.meta["val"].requires_grad
        else:
            ends = node.target is torch.ops.aten.detach.default or any(
                r.kind == "grad" and not r.args[0] for r in node.meta.get("regions", ())
            )
            flows = not ends and not found.isdisjoint(node.all_input_nodes)
        if flows and node in learns:
            found.add(node)
    return found


def differentiable(val: Any) -> bool:
    """Whether it is a tensor of floats or complex numbers."""
    return is_tensor(val) and (val.dtype.is_floating_point or val.dtype.is_complex)


def last_uses(
    body: list[fx.Node], kept: Iterable[fx.Node], also: Mapping[fx.Node, Sequence[fx.Node]] | None = None
) -> dict[fx.Node, list[fx.Node]]:
    """Node -> values made in `body` whose last reader it is, so that they can be freed.

    also    what else is read where a node is computed
    """
    seen, inside = set(kept), set(body)
    dead: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(body):
        for arg in [*node.all_input_nodes, *(also or {}).get(node, ())]:
            if arg in inside and arg not in seen:
                seen.add(arg)
                dead.setdefault(node, []).append(arg)
    return dead
