"""Where a program runs: the devices that its graph names, and the same graph for another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxaccel.ir import Program, Region, TensorSpec, is_tensor


def devices(program: Program) -> list[torch.device]:
    """Those of its values, in the order of the graph."""
    leaves = (v for n in program.graph.nodes for v in pytree.tree_leaves(n.meta.get("val")))
    return list(dict.fromkeys(v.device for v in leaves if is_tensor(v)))


def moved(program: Program, device: torch.device) -> Program:
    """A copy of a program that is on one device, for another one; what its values are is known no closer
    than in a file."""

    def other(leaf: Any) -> Any:
        return device if isinstance(leaf, torch.device) else leaf

    def spec(val: Any) -> Any:
        return TensorSpec(val.dtype, tuple(val.shape), tuple(val.stride()), device) if is_tensor(val) else val

    copy = program.copy()
    for node in copy.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate(node.args, other), _words(node.kwargs, other)
        node.meta["val"] = pytree.tree_map(spec, node.meta.get("val"), is_leaf=is_tensor)
        node.meta["regions"] = tuple(_region(r, device) for r in node.meta.get("regions", ()))
    copy.constants = {k: v.to(device) for k, v in program.constants.items()}
    return copy


def _words(kwargs: Any, other: Any) -> dict[str, Any]:
    return {k: fx.node.map_aggregate(v, other) for k, v in kwargs.items()}


def _region(region: Region, device: torch.device) -> Region:
    return replace(region, args=(device.type, *region.args[1:])) if region.kind == "autocast" else region
