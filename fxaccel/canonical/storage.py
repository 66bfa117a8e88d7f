"""Which values share storage, and which operators touch it."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from fxaccel.effects import aliased_arguments, is_plain, mutated_arguments
from fxaccel.ir import Program

aten = torch.ops.aten

_FOLLOWING = {
    aten.softmax.int, aten.log_softmax.int, aten.dropout.default, aten.cumsum.default, aten.clone.default,
    aten.type_as.default, aten._to_copy.default, aten.scaled_dot_product_attention.default,
    operator.getitem,
}  # fmt: skip


@functools.cache
def follows(target: Any) -> bool:
    """Whether results of an operator are laid out like its operands: views and elementwise operators."""
    if not isinstance(target, torch._ops.OpOverload):
        return target in _FOLLOWING
    views = any(r.alias_info for r in target._schema.returns)
    return views or torch.Tag.pointwise in target.tags or target in _FOLLOWING


class Storage:
    """Which values may share storage, kept up to date while the graph is edited."""

    def __init__(self, program: Program) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}
        self.external: set[fx.Node] = set()
        self.escaping: set[fx.Node] = set()
        self.last_write: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            root = self.root(node)
            if node.op == "placeholder":
                self.external.add(root)
        for node in program.graph.nodes:
            if node.op == "output":
                self.escaping.update(self.root(n) for n in node.all_input_nodes)
            elif not is_plain(node.target):
                for target in mutated_arguments(node):
                    self.last_write[self.root(target)] = node

    def root(self, node: fx.Node) -> fx.Node:
        """The representative of the values that may share storage with `node`."""
        if node not in self.parent:
            self.parent[node] = node
            if node.op == "call_function" and not is_plain(node.target):
                for other in aliased_arguments(node):
                    self.unite(node, other)
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def unite(self, node: fx.Node, other: fx.Node) -> None:
        a, b = self.root(node), self.root(other)
        if a is b:
            return
        self.parent[a] = b
        for marks in (self.external, self.escaping):
            if a in marks:
                marks.add(b)
        if a in self.last_write:
            self.last_write[b] = max(self.last_write[a], self.last_write.get(b, self.last_write[a]))

    def frozen(self, node: fx.Node) -> bool:
        """Whether a write happens at or after `node` to the storage it makes or reads."""
        if not self.last_write:
            return False
        for value in (node, *node.all_input_nodes):
            write = self.last_write.get(self.root(value))
            if write is not None and not write < node:
                return True
        return False
