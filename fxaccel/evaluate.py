"""Run a program, or a part of one, node by node: as it is, or with every float in double precision.

The double-precision run is the yardstick of every proof: the same graph, with float64 inputs and with the
casts to lower precision that the model wrote turned into casts to float64. Under `Unsteady` the result of
every operator in it, forward and backward, is off by a relative 2**-30: what that does to the outputs,
scaled to the eps of another dtype, is what rounding may do there (a random running-error analysis).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxaccel.effects import is_random, last_uses
from fxaccel.ir import Program, Region, arguments, entered

_WIDE = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex32: torch.complex128, torch.complex64: torch.complex128,
}  # fmt: skip


UNSTEADY = 2.0**-30
_SELECTS = {"amax", "amin", "aminmax", "max", "min", "median", "nanmedian"}  # backward looks for the result


class Unsteady(TorchDispatchMode):
    """Inside, each float that an operator computes is off: by a relative +-2**-30 in float64, else by +-eps.

    `largest` is the number of elements of the largest tensor that was computed.
    """

    def __init__(self, seed: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator, self.largest = torch.Generator().manual_seed(seed), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._opname in _SELECTS or any(r.alias_info for r in func._schema.returns):
            return result  # values that were off already
        for tensor in pytree.tree_leaves(result):
            floats = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.itemsize > 1
            if floats and tensor.numel():  # floats of one byte are codes, rounded on purpose
                self.largest = max(self.largest, tensor.numel())
                wide = tensor.dtype is torch.float64
                step = UNSTEADY if wide else torch.finfo(tensor.dtype).eps
                signs = torch.randint(0, 2, tensor.shape, generator=self.generator).to(tensor)
                moved = tensor * (1 + step * (2 * signs - 1))
                exact = moved.isinf()  # finfo.max stays finite
                if not wide:  # and a count, which a model may read as a size, stays a count
                    exact |= tensor == tensor.round()
                tensor.copy_(torch.where(exact, tensor, moved))
        return result


def _attention_steps(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, p: float = 0.0, causal: bool = False, **kwargs: Any
) -> Tensor:
    """Attention by its definition, where the fused kernel would hide the rounding of its steps."""
    steps = torch.ops.aten._scaled_dot_product_attention_math.default
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return steps(q, k, v, mask, p, causal, **kwargs)[0]


def _batch_norm_steps(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    training: bool, momentum: float, eps: float, cudnn: bool,
) -> Tensor:  # fmt: skip
    """Batch norm in steps: an error of the batch's mean is one for all of its elements."""
    if not training:
        return torch.batch_norm(x, weight, bias, mean, var, False, momentum, eps, cudnn)
    dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    average = x.mean(dims, keepdim=True)
    away = x - average
    spread = (away * away).mean(dims, keepdim=True)
    if mean is not None and var is not None:
        n = x.numel() // x.shape[1]
        unbiased = n / (n - 1) if n > 1 else math.nan
        mean.data.lerp_(average.detach().flatten(), momentum)
        var.data.lerp_(spread.detach().flatten() * unbiased, momentum)
    y = away * torch.rsqrt(spread + eps)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


_BY_DEFINITION = {
    torch.ops.aten.scaled_dot_product_attention.default: _attention_steps,
    torch.ops.aten.batch_norm.default: _batch_norm_steps,
}


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


_PROBABILITY = ("p", "dropout_p", "dropout")
_DROPS = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
    "feature_alpha_dropout", "scaled_dot_product_attention", "attention",
}  # fmt: skip
_ATTENTION_DROPS = {  # functions of torch that drop weights: the argument's place and name
    "scaled_dot_product_attention": (4, "dropout_p"), "multi_head_attention_forward": (10, "dropout_p"),
}  # fmt: skip


def dropped(node: fx.Node) -> float:
    """The probability with which a call drops values at random: 0 where it does not."""
    if not is_random(node) or getattr(node.target, "_opname", "") not in _DROPS:
        return 0.0
    bound = arguments(node)
    return float(next(bound[name] for name in _PROBABILITY if name in bound))


def calmed(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with nothing dropped."""
    if not dropped(node):
        return node.args, dict(node.kwargs)
    names = [a.name for a in node.target._schema.arguments]
    args = [0.0 if names[i] in _PROBABILITY else a for i, a in enumerate(node.args)]
    return tuple(args), {k: 0.0 if k in _PROBABILITY else v for k, v in node.kwargs.items()}


def calm(program: Program) -> Program:
    """A copy of the program in which nothing is dropped."""
    copy = program.copy()
    for node in copy.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = calmed(node)
    return copy


class Calm(TorchFunctionMode):
    """Inside, torch's dropouts and attention drop nothing: what `calm` does to a graph, for a model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", "").rstrip("_"), dict(kwargs or {})
        spot = _ATTENTION_DROPS.get(name, (1, "p") if name in _DROPS else None)
        if spot is not None:
            at, key = spot
            if len(args) > at:
                args = (*args[:at], 0.0, *args[at + 1 :])
            else:
                kwargs[key] = 0.0
        return func(*args, **kwargs)


def run_nodes(
    nodes: Iterable[fx.Node], env: dict[fx.Node, Any], root: torch.nn.Module, *, double: bool = False,
    still: bool = False, free: Mapping[fx.Node, Iterable[fx.Node]] | None = None,
    watch: Mapping[str, Callable[[fx.Node, Any], None]] | None = None,
) -> None:  # fmt: skip
    """Evaluate `nodes`, in topological order, reading and extending `env`; drop nothing if `still`.

    `free` has the values that leave `env` after a node, `watch` what is told of the node of a name.
    """
    for node in nodes:
        if node.op == "get_attr":
            env[node] = getattr(root, str(node.target))
        elif node.op == "call_function":
            given = calmed(node) if still else (node.args, dict(node.kwargs))
            args, kwargs = fx.map_arg(given, lambda n: env[n])
            regions: Sequence[Region] = node.meta.get("regions", ())
            if double:
                args = tuple(widen(a) for a in args)
                kwargs = {k: widen(v) for k, v in kwargs.items()}
                regions = [r for r in regions if r.kind != "autocast"]
            target: Any = _BY_DEFINITION.get(node.target, node.target) if double else node.target
            with entered(regions):
                result = target(*args, **kwargs)
            env[node] = widen_result(result) if double else result
        if watch and node.name in watch:
            watch[node.name](node, env[node])
        for value in free.get(node, ()) if free else ():
            del env[value]


def widen_result(result: Any) -> Any:
    """The result of an operator that chose its own dtype (a factory, say), in double precision."""
    return pytree.tree_map_only(Tensor, widen, result)


def run(
    program: Program, state: dict[str, Tensor], leaves: Sequence[Any], *, double: bool = False,
    watch: Mapping[str, Callable[[fx.Node, Any], None]] | None = None,
) -> list[Any]:  # fmt: skip
    """The program's flat outputs.

    state     placeholder name -> tensor, written to where the program writes to it
    leaves    the flattened inputs
    watch     node name -> function that is called with the node and its value
    """
    watch = watch or {}
    given = {n: leaves[i] for i, n in enumerate(program.inputs) if n is not None}
    env: dict[fx.Node, Any] = {}
    body: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = state[node.name] if node.name in program.state else given[node.name]
            env[node] = widen(env[node]) if double else env[node]
            if node.name in watch:
                watch[node.name](node, env[node])
        elif node.op == "output":
            free = last_uses(body, node.all_input_nodes)
            run_nodes(body, env, program.root, double=double, free=free, watch=watch)
            return list(fx.map_arg(node.args[0], lambda n: env[n]))
        else:
            body.append(node)
    raise AssertionError("a graph ends in an output")
