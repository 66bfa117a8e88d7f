"""Run a program, or a part of one, node by node: as it is, or with every float in double precision.

The double-precision run is the yardstick of every proof: the same graph, with float64 inputs and with the
casts to lower precision that the model wrote turned into casts to float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxaccel.ir import Program, Region, entered

_WIDE = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex32: torch.complex128, torch.complex64: torch.complex128,
}  # fmt: skip


def widen(value: Any) -> Any:
    """Tensors, dtypes and lists of them with floating dtypes made double; other values unchanged."""
    if isinstance(value, Tensor):
        wide = _WIDE.get(value.dtype)
        return value if wide is None else value.to(wide)
    if isinstance(value, torch.dtype):
        return _WIDE.get(value, value)
    if isinstance(value, (list, tuple)):
        return type(value)(widen(v) for v in value) if type(value) in (list, tuple) else value
    return value


def run_nodes(
    nodes: Iterable[fx.Node], env: dict[fx.Node, Any], root: torch.nn.Module, *, double: bool = False
) -> None:
    """Evaluate `nodes`, which are in topological order, reading and extending `env`."""
    for node in nodes:
        if node.op == "get_attr":
            env[node] = getattr(root, str(node.target))
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: env[n])
            regions: Sequence[Region] = node.meta.get("regions", ())
            if double:
                args = tuple(widen(a) for a in args)
                kwargs = {k: widen(v) for k, v in kwargs.items()}
                regions = [r for r in regions if r.kind != "autocast"]
            with entered(regions):
                result = node.target(*args, **kwargs)  # type: ignore[operator]
            env[node] = widen_result(result) if double else result


def widen_result(result: Any) -> Any:
    """The result of an operator that chose its own dtype (a factory, say), in double precision."""
    return pytree.tree_map_only(Tensor, widen, result)


def run(
    program: Program, state: dict[str, Tensor], leaves: Sequence[Any], *, double: bool = False
) -> list[Any]:
    """The program's flat outputs.

    state     placeholder name -> tensor, written to where the program writes to it
    leaves    the flattened inputs
    """
    given = {n: leaves[i] for i, n in enumerate(program.inputs) if n is not None}
    env: dict[fx.Node, Any] = {}
    body = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = state[node.name] if node.name in program.state else given[node.name]
            env[node] = widen(env[node]) if double else env[node]
        elif node.op == "output":
            run_nodes(body, env, program.root, double=double)
            return list(fx.map_arg(node.args[0], lambda n: env[n]))
        else:
            body.append(node)
    raise AssertionError("a graph ends in an output")
