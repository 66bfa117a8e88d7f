"""Programs, proofs and module state as JSON values, for fxaccel.artifact; fxaccel.decode reads them back."""

from __future__ import annotations

import json
import math
import operator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fxaccel.errors import ArtifactError
from fxaccel.ir import Region, Replacement, SizeSpec, expr, is_tensor
from fxaccel.module import AcceleratedModule
from fxaccel.pieces import Pieces
from fxaccel.proof import Claim
from fxaccel.report import Report
from fxaccel.session import Capture, Session
from fxaccel.structure import Given, Kept, Opened, Structure, children

FUNCTIONS = {
    f"{f.__module__.lstrip('_')}.{f.__name__}": f
    for f in (
        operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv,
        operator.mod, operator.neg, operator.pow, operator.eq, operator.ne, operator.lt, operator.le,
        operator.gt, operator.ge, operator.and_, operator.or_, math.ceil, math.floor, math.trunc,
        torch.sym_max, torch.sym_min, torch.sym_float, torch.sym_int, torch.sym_not, torch.sym_sqrt,
    )
}  # fmt: skip
HIGHER = ("cond", "while_loop", "scan", "map_impl", "associative_scan")


def model(module: AcceleratedModule, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Everything but the tensors, which are collected in `tensors` by the names they are saved under."""
    session: Session = module.__dict__["_fxaccel"]
    if not session.captures:
        raise ArtifactError("nothing is captured yet, so there is nothing to save", "call the model once")
    state = _state(module, tensors)
    captures: list[dict[str, Any]] = []
    for key, group in session.captures.items():
        for one in group:
            if isinstance(one, Pieces):
                raise ArtifactError("the model was captured in pieces, which a saved file cannot hold")
            captures.append(_capture(one, key, f"constant/{len(captures)}/", tensors))
    return {
        "class": _class_name(module._original_class),
        "modules": [[name, m.training] for name, m in module.named_modules(remove_duplicate=False)],
        "state": state,
        "captures": captures,
        "replacements": _replacements(session.replacements, module),
    }


def _state(module: nn.Module, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Every parameter and buffer; a tied one names the entry that holds its values."""
    first: dict[int, str] = {}
    entries = []
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for kind, table in (("parameter", owner._parameters), ("buffer", owner._buffers)):
            for key, tensor in table.items():
                name = f"{prefix}.{key}".lstrip(".")
                if tensor is None:
                    continue
                same = first.setdefault(id(tensor), name)
                if same == name:
                    tensors[name] = tensor.detach().cpu().contiguous().clone()
                entries.append({
                    "name": name, "kind": kind, "same_as": same, "trains": tensor.requires_grad,
                    "persistent": key not in owner._non_persistent_buffers_set,
                    "device": str(tensor.device),
                })  # fmt: skip
    return entries


def _capture(one: Capture, key: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    program = one.program
    for name, tensor in program.constants.items():
        tensors[prefix + name] = tensor.detach().cpu().contiguous().clone()
    structure, flags, grad, cast = key
    return {
        "key": {
            "structure": structure if isinstance(structure, int) else None,
            "flags": list(flags), "grad": grad, "autocast": [_region(r) for r in cast or ()],
        },
        "constants": prefix,
        "graph": _graph(program.graph, program.root),
        "state": {n: [s.kind, s.name] for n, s in program.state.items()},
        "constant_names": list(program.constants),
        "ties": program.ties,
        "buffers": sorted(program.buffers),
        "inputs": program.inputs,
        "baked": [[i, _value(v)] for i, v in program.baked.items()],
        "in_spec": _structure(program.in_spec),
        "out_spec": _structure(program.out_spec),
        "sizes": {k: list(v) for k, v in program.sizes.items()},
        "guards": program.guards,
        "hints": program.hints,
        "contiguous": sorted(program.contiguous),
        "training": program.training,
        "grad": program.grad, "redrawn": program.redrawn,
        "notes": program.notes,
        "schedule": None if program.schedule is None else asdict(program.schedule),
        "stages": None if program.stages is None else asdict(program.stages),
        "report": json.loads(Report([one.report]).to_json()),
        "proofs": [
            {
                "proof": {**vars(p), "trials": list(p.trials)}, "sites": one.manifest.sites[p.key],
                "claim": _claim(one.manifest.claims[p.key]),
            }
            for p in one.manifest.proofs.values()
        ],
    }  # fmt: skip


def _claim(claim: Claim) -> dict[str, Any]:
    return {
        "rule": claim.rule, "numerics": claim.numerics, "note": claim.note,
        "before": _graph(claim.before.graph, claim.before.root),
        "after": _graph(claim.after.graph, claim.after.root),
    }  # fmt: skip


def _graph(graph: fx.Graph, root: nn.Module) -> dict[str, Any]:
    nodes, inner = [], {}
    for node in graph.nodes:
        if node.op == "get_attr":
            body = getattr(root, str(node.target))
            if not isinstance(body, fx.GraphModule):
                raise ArtifactError("a weight map holds a constant tensor, which a saved file cannot hold")
            inner[str(node.target)] = _graph(body.graph, body)
        nodes.append({
            "name": node.name, "op": node.op, "target": _target(node),
            "args": _value(tuple(node.args)), "kwargs": {k: _value(v) for k, v in node.kwargs.items()},
            "val": _val(node.meta.get("val")), "path": node.meta.get("path", ""),
            "source": node.meta.get("source", ""), "by": node.meta.get("by", ""),
            "regions": [_region(r) for r in node.meta.get("regions", ())],
        })  # fmt: skip
    return {"nodes": nodes, "inner": inner}


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if node.op != "call_function":
        return str(target)
    if isinstance(target, torch._ops.OpOverload):
        return f"{target._schema.name}.{target._overloadname}"
    if isinstance(target, torch._ops.HigherOrderOperator) and target.name() in HIGHER:
        return f"higher_order::{target.name()}"
    name = f"{(target.__module__ or '').lstrip('_')}.{target.__name__}"
    if name not in FUNCTIONS:
        raise ArtifactError(
            f"the graph calls {name}, which a saved file cannot name", "rewrite it as a registered operator"
        )
    return name


def _value(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list) or type(value).__name__ == "immutable_list":
        return [_value(v) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [_value(v) for v in value]}
    if isinstance(value, slice):
        return {"slice": [_value(v) for v in (value.start, value.stop, value.step)]}
    for kind in ("dtype", "device", "layout", "memory_format"):
        if isinstance(value, getattr(torch, kind)):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ArtifactError(f"the graph holds a {type(value).__name__}, which a saved file cannot hold")


def _val(val: Any) -> Any:
    if is_tensor(val):
        return {
            "dtype": str(val.dtype).removeprefix("torch."), "device": str(val.device),
            "shape": [_size(s) for s in val.shape], "stride": [_size(s) for s in val.stride()],
        }  # fmt: skip
    if isinstance(val, (torch.SymInt, SizeSpec)):
        return {"size": _size(val)}
    if isinstance(val, (list, tuple)):
        return [_val(v) for v in val]
    return None


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(expr(size))


def _region(region: Region) -> list[Any]:
    return [region.kind, region.index, [_value(a) for a in region.args]]


def _replacements(made: list[Replacement], module: nn.Module) -> list[dict[str, Any]]:
    """Each with its maps; what a later one has replaced again is had back from that one."""
    values = {n: p.detach() for n, p in module.named_parameters(remove_duplicate=False)}
    entries = []
    for one in reversed(made):
        new = [values[n] for n in one.new]
        inverse, old = None, None
        if one.inverse is not None:
            with torch.no_grad():
                old = list(one.inverse(*new))
            values.update(zip(one.old, old, strict=True))
            inverse = _traced(one.inverse, new)
        forward = None if old is None or one.forward is None else _traced(one.forward, old)
        entries.append(
            {
                "by": one.by, "old": one.old, "new": one.new, "forward": forward, "inverse": inverse,
                "frozen": one.frozen, "aliases": one.aliases,
            }
        )  # fmt: skip
    return entries[::-1]


def _traced(function: Any, example: list[Tensor]) -> dict[str, Any] | None:
    """A weight map as a graph, None where it cannot be written as one."""
    try:
        traced = make_fx(
            lambda *t: tuple(function(*t)), tracing_mode="fake", _allow_non_fake_inputs=True
        )(*example)  # fmt: skip
        return _graph(traced.graph, traced)
    except (RuntimeError, ArtifactError, TypeError):
        return None


def _class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _structure(structure: Structure) -> dict[str, Any]:
    return {
        "spec": _tree(structure.spec),
        "special": [[i, _special(s)] for i, s in structure.special.items()],
        "size": structure.size,
    }


def _special(special: Kept | Given | Opened) -> dict[str, Any]:
    if isinstance(special, Given):
        return {"given": special.index}
    if isinstance(special, Opened):
        return {"opened": _class_name(special.cls), "attributes": _structure(special.attributes)}
    if isinstance(special.value, type):
        return {"class": _class_name(special.value)}
    return {"kept": _value(special.value)}


def _tree(spec: pytree.TreeSpec) -> Any:
    if spec.is_leaf():
        return "*"
    inner = [_tree(c) for c in children(spec)]
    if spec.type in (list, tuple):
        return {spec.type.__name__: inner}
    if not isinstance(spec.context, (list, tuple)) or len(spec.context) != len(inner):
        raise ArtifactError(f"a {spec.type.__name__} in the arguments or results cannot be saved")
    return {"keys": list(spec.context), "type": _class_name(spec.type), "values": inner}
