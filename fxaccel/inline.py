"""One flat graph from an exported one: bodies of regions are written out and their nodes labelled."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxaccel.ir import Program, Region

INNER = "model"  # attribute of the module that is exported; its prefix is taken off every name
_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
MARK = "fxaccel checkpoint"  # key of the number that a node of a checkpointed call carries


class Inliner:
    """Copies a graph with the bodies of no_grad and autocast regions written out, their nodes labelled."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph, self.root, self.count = graph, root, 0

    def inline(
        self, body: fx.Graph, owner: nn.Module, env: dict[fx.Node, Any], regions: tuple[Region, ...]
    ) -> list[Any]:
        for node in body.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return list(fx.map_arg(node.args[0], lambda n: env[n]))
            region, inner = self.region_of(node, owner)
            if region is not None:
                around = self.checkpoint_around(inner[1], regions)
                given = fx.map_arg(node.args[inner[0] + 1 :], lambda n: env[n])
                inside = {
                    p: a for p, a in zip(inner[1].graph.find_nodes(op="placeholder"), given, strict=True)
                }
                env[node] = self.inline(inner[1].graph, inner[1], inside, (*regions, *around, region))
            elif getattr(node.target, "__name__", "") == "getitem" and isinstance(
                env.get(node.args[0]), list
            ):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                env[node] = self.copy(node, owner, env, regions)
        raise AssertionError("a graph ends in an output")

    def region_of(self, node: fx.Node, owner: nn.Module) -> tuple[Region | None, Any]:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        at = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(name)
        if at is None:
            return None, None
        kind = "grad" if at == 1 else "autocast"
        self.count += 1
        return Region(kind, self.count, tuple(node.args[:at])), (at, getattr(owner, node.args[at].target))

    def checkpoint_around(self, body: Any, regions: tuple[Region, ...]) -> tuple[Region, ...]:
        """The checkpoint that all of a region's body lies in, unless `regions` hold it already."""
        marks = set(self.marks(body))
        if len(marks) > 1 or not all(marks) or any(r.kind == "checkpoint" for r in regions):
            return ()
        return tuple(Region("checkpoint", m) for m in marks)

    def marks(self, body: Any) -> Iterator[int]:
        """The number of the checkpoint that each operator of a body lies in, 0 for none."""
        for node in body.graph.nodes:
            region, inner = self.region_of(node, body)
            if region is not None:
                yield from self.marks(inner[1])
            elif node.op == "call_function" and node.target is not operator.getitem:
                yield _mark(node)

    def copy(
        self, node: fx.Node, owner: nn.Module, env: dict[fx.Node, Any], regions: tuple[Region, ...]
    ) -> fx.Node:
        new = self.graph.node_copy(node, lambda n: env[n])
        if node.op == "get_attr" and owner is not self.root:  # a control-flow body inside a region
            new.target = f"region{self.count}_{node.target}".replace(".", "_")
            setattr(self.root, new.target, getattr(owner, node.target))
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        path = path.removeprefix(INNER).removeprefix(".")
        if _mark(node) and not any(r.kind == "checkpoint" for r in regions):
            regions = (*regions, Region("checkpoint", _mark(node)))
        new.meta = {
            "val": node.meta.get("val"),
            "path": re.sub(r"@\d+", "", path),
            "source": user_line(node.meta.get("stack_trace")),
            "regions": regions,
        }
        return new


def _mark(node: fx.Node) -> int:
    """Which call of torch.utils.checkpoint the node of an exported graph was traced in, 0 for none."""
    return (node.meta.get("custom") or {}).get(MARK, 0)


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def user_line(stack_trace: str | None) -> str:
    """`file.py:12` of the innermost frame that is neither torch's nor ours, "" where there is none."""
    for match in reversed(list(_FRAME.finditer(stack_trace or ""))):
        if is_user(match["file"]):
            return f"{Path(match['file']).name}:{match['line']}"
    return ""


def is_user(filename: str) -> bool:
    """Whether a file is neither torch's nor ours."""
    return not filename.startswith((_TORCH, _HERE, "<", "fxaccel ")) and "importlib" not in filename


def drop_mode_noise(program: Program) -> None:
    """Take out `grad` regions that only repeat the gradient mode the whole graph is run in."""
    for node in program.graph.nodes:
        kept, grad = [], program.grad
        for region in node.meta.get("regions", ()):
            if region.kind == "grad":
                if region.args[0] == grad:
                    continue
                grad = region.args[0]
            kept.append(region)
        node.meta["regions"] = tuple(kept)
