"""Values that a pass lays out otherwise in memory: so far as nobody sees it, and no further.

A convolution that leaves the channels of a place side by side gives the values that it gave before, with
other strides. Elementwise operators, pooling and norms take them as they come. The caller does not, nor an
operator that reads memory by its strides or that torch does not know, nor one that draws random numbers in
the order of memory: these get a copy as it was before.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxaccel.canonical.editor import Editor
from fxaccel.canonical.effects import NAMESPACES, STRICT
from fxaccel.canonical.storage import follows
from fxaccel.canonical.values import same_strides
from fxaccel.effects import aliased_arguments, is_random, storage_owner
from fxaccel.ir import Program, expr, is_call

aten = torch.ops.aten


def layouts(program: Program) -> dict[str, Any]:
    """The fake values of a graph by the names of its nodes: what `settle` is to compare with.

    Without those of torch's attention, whose kernels lay out otherwise than its fake says, and what follows.
    """
    untold, found = set[fx.Node](), dict[str, Any]()
    for node in program.graph.nodes:
        followed = follows(node.target) and not untold.isdisjoint(node.all_input_nodes)
        if followed or is_call(node, aten.scaled_dot_product_attention.default):
            untold.add(node)
        elif "val" in node.meta:
            found[node.name] = node.meta["val"]
    return found


def settle(program: Program, driver: Any, before: Mapping[str, Any], made: Iterable[fx.Node] = ()) -> int:
    """Bring the strides in the graph up to date; copy values back where another layout would be seen.

    before    of the graph that `driver` had been given, `layouts`
    made      new nodes whose readers are to be looked at

    Returns how many are copied.
    """
    e, moved, copies = Editor(program), {*made, *driver.relaid}, 0
    shown = {storage_owner(n) for n in program.graph.output_node().all_input_nodes}
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if moved.intersection(node.all_input_nodes):
            node.meta["val"] = _value(e, node)
        old, new = before.get(node.name), node.meta["val"]
        if isinstance(new, (tuple, list)) and moved.intersection(node.all_input_nodes):
            moved.add(node)  # of which getitem tells
        if not isinstance(old, Tensor) or not isinstance(new, Tensor) or same_strides(old, new):
            continue
        moved.add(node)
        dense = _dense(old, _order(old))
        seeing = [] if same_strides(new, dense) else list(_seeing(node, old, node in shown))
        if seeing:
            copy = _copied(driver, node, old)
            copies += 1
            for user in seeing:
                user.replace_input_with(node, copy)
    driver.relaid.clear()
    program.changed()
    return copies


def _value(e: Editor, node: fx.Node) -> Any:
    """The value of a call with the layout that its operands give it now, and the sizes that it has.

    Some of torch's operators take a size that varies for the captured one where channels are last (`pad`).
    """
    old, new = node.meta["val"], e.value(node, node.target, node.args, dict(node.kwargs))
    if not isinstance(old, Tensor) or list(map(expr, old.shape)) == list(map(expr, new.shape)):
        return new
    return _dense(old, _order(new))


def _seeing(node: fx.Node, old: Tensor, shown: bool) -> Iterator[fx.Node]:
    """The readers that see how a value is laid out; of what an output may be a view of, all views too.

    `empty_like` leaves out gaps, so that a draw sees the order of the dimensions alone.
    """
    turned = not same_strides(_dense(old, _order(old)), _dense(old, _order(node.meta["val"])))
    for user in node.users:
        target: Any = user.target
        known = is_call(user, operator.getitem) or getattr(target, "namespace", "") in NAMESPACES
        if (
            user.op == "output"
            or not known
            or target in STRICT
            or (shown and node in aliased_arguments(user))
            or (turned and is_random(user))
        ):
            yield user


def _copied(driver: Any, node: fx.Node, old: Tensor) -> fx.Node:
    """A copy of a value behind it, its dimensions in the order in memory that they had."""
    dims, order = list(range(old.dim())), _order(old)
    graph, made = driver.program.graph, node
    with graph.inserting_before(node.next):
        if order != dims:
            made = driver.call(node, aten.permute.default, made, order)
        made = driver.call(node, aten.clone.default, made, memory_format=torch.contiguous_format)
        if order != dims:
            made = driver.call(node, aten.permute.default, made, [order.index(d) for d in dims])
    return made


def _dense(val: Tensor, order: list[int]) -> Tensor:
    """A value without gaps, its dimensions in this order in memory."""
    return val.new_empty([val.shape[d] for d in order]).permute([order.index(d) for d in range(val.dim())])


def _order(val: Tensor) -> list[int]:
    """The dimensions of a value, the outermost in memory first: by strides with every size at a prime."""
    strides = [expr(s) for s in val.stride()]
    far = [float(s.subs(dict.fromkeys(s.free_symbols, 97))) for s in strides]
    return sorted(range(val.dim()), key=lambda d: -far[d])
