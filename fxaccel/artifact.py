"""Saved models: one safetensors file that holds the weights and, in its header, the graphs as JSON.

    header "fxaccel"   {"format": 1, "captures": [...], "state": [...], "report": {...}}
    header "sha256"    of that JSON and of every tensor's bytes, in the order of their names
    tensors            parameters and buffers by their state_dict names (tied ones once), and the graph's
                       constants as "constant/<capture>/<name>"

Nothing in the file is executed. Operators are looked up in `torch.ops` and in a short list of arithmetic
functions; sizes and guards are parsed as arithmetic; the Python code is generated again from the graph.
Loading runs no pass. A result type that this process has not imported comes back as a dict.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import math
import operator
import os
import sys
import types
from pathlib import Path
from typing import Any

import sympy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Mod

from fxaccel.emit import emit
from fxaccel.errors import ArtifactError, CaptureError
from fxaccel.ir import Program, Region, Replacement, SizeSpec, Slot, TensorSpec, expr, is_tensor
from fxaccel.module import AcceleratedModule, wrap
from fxaccel.pieces import Pieces
from fxaccel.proof import Claim, Fragment, Manifest, Proof
from fxaccel.report import Report
from fxaccel.session import Capture, Session, Settings
from fxaccel.structure import Given, Kept, Opened, Structure

FORMAT = 1
_FUNCTIONS = {
    f"{f.__module__.lstrip('_')}.{f.__name__}": f
    for f in (
        operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv,
        operator.mod, operator.neg, operator.pow, operator.eq, operator.ne, operator.lt, operator.le,
        operator.gt, operator.ge, operator.and_, operator.or_, math.ceil, math.floor, math.trunc,
        torch.sym_max, torch.sym_min, torch.sym_float, torch.sym_int, torch.sym_not, torch.sym_sqrt,
    )
}  # fmt: skip
_HIGHER = ("cond", "while_loop", "scan", "map_impl", "associative_scan")


# -- save ------------------------------------------------------------------------------------------


def save(module: AcceleratedModule, path: str | os.PathLike[str]) -> None:
    """Write the module to `path`; raises ArtifactError for what a file cannot hold. See README.md."""
    session: Session = module.__dict__["_fxaccel"]
    if not session.captures:
        raise ArtifactError("nothing is captured yet, so there is nothing to save", "call the model once")
    tensors: dict[str, Tensor] = {}
    state = _state(module, tensors)
    captures: list[dict[str, Any]] = []
    for key, group in session.captures.items():
        for one in group:
            if isinstance(one, Pieces):
                raise ArtifactError("the model was captured in pieces, which a saved file cannot hold")
            captures.append(_capture(one, key, f"constant/{len(captures)}/", tensors))
    content = {
        "format": FORMAT,
        "torch": torch.__version__,
        "class": _class_name(module._original_class),
        "modules": [[name, m.training] for name, m in module.named_modules(remove_duplicate=False)],
        "state": state,
        "captures": captures,
        "replacements": [_replacement(r, module) for r in session.replacements],
    }
    text = json.dumps(content, separators=(",", ":"))
    target, temporary = Path(path), Path(f"{os.fspath(path)}.{os.getpid()}.part")
    try:
        save_file(tensors, temporary, {"fxaccel": text, "sha256": _digest(text, tensors)})
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


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


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        raw = tensors[name].reshape(-1)
        digest.update(raw.view(torch.uint8).numpy().data if raw.numel() else b"")
    return digest.hexdigest()


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
        "grad": program.grad,
        "notes": program.notes,
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
        "rule": claim.rule, "numerics": claim.numerics,
        "before": _graph(claim.before.graph, claim.before.root),
        "after": _graph(claim.after.graph, claim.after.root),
    }  # fmt: skip


def _graph(graph: fx.Graph, root: nn.Module) -> dict[str, Any]:
    nodes, inner = [], {}
    for node in graph.nodes:
        if node.op == "get_attr":
            body = getattr(root, str(node.target))
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
    if isinstance(target, torch._ops.HigherOrderOperator) and target.name() in _HIGHER:
        return f"higher_order::{target.name()}"
    name = f"{(target.__module__ or '').lstrip('_')}.{target.__name__}"
    if name not in _FUNCTIONS:
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


def _replacement(one: Replacement, module: nn.Module) -> dict[str, Any]:
    new = [module.get_parameter(n).detach() for n in one.new]
    inverse, old = None, None
    if one.inverse is not None:
        old = list(one.inverse(*new))
        inverse = _traced(one.inverse, new)
    forward = None if old is None else _traced(one.forward, old)
    return {"by": one.by, "old": one.old, "new": one.new, "forward": forward, "inverse": inverse}


def _traced(function: Any, example: list[Tensor]) -> dict[str, Any] | None:
    """A weight map as a graph, None where it cannot be written as one."""
    try:
        traced = make_fx(lambda *t: tuple(function(*t)))(*example)
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
    children = [_tree(spec.child(i)) for i in range(spec.num_children)]
    if spec.type in (list, tuple):
        return {spec.type.__name__: children}
    if not isinstance(spec.context, (list, tuple)) or len(spec.context) != len(children):
        raise ArtifactError(f"a {spec.type.__name__} in the arguments or results cannot be saved")
    return {"keys": list(spec.context), "type": _class_name(spec.type), "values": children}


# -- load ------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> AcceleratedModule:
    """The module that `save` wrote: its weights and its graphs, with no pass run again.

    It serves the modes and input structures that were captured before saving. Raises ArtifactError for a
    file that is damaged, truncated, foreign or of another version; executes nothing that the file holds.
    """
    content, tensors = _read(path)
    try:
        return _module(content, tensors)
    except (
        KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, ImportError, SyntaxError,
    ) as error:  # fmt: skip
        raise ArtifactError(
            f"{os.fspath(path)} does not describe a model: {type(error).__name__}: {error}",
            "save the model again",
        ) from error


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    name = os.fspath(path)
    try:
        with safe_open(name, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ArtifactError(f"there is no file {name}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{name} is not a saved model, or is damaged: {error}", "expected a file that fast.save() wrote"
        ) from error
    if "fxaccel" not in header:
        raise ArtifactError(f"{name} is a safetensors file of something else", "expected fast.save()'s")
    if _digest(header["fxaccel"], tensors) != header.get("sha256"):
        raise ArtifactError(f"{name} is damaged: its checksum does not match", "save the model again")
    content = json.loads(header["fxaccel"])
    if not isinstance(content, dict):
        raise ArtifactError(f"{name} describes no model", "expected a file that fast.save() wrote")
    if content.get("format") != FORMAT:
        raise ArtifactError(
            f"{name} has format {content.get('format')!r}, this version reads {FORMAT}",
            "load it with the fxaccel version that wrote it and save it again",
        )
    return content, tensors


class SavedModel(nn.Module):
    """The tree of a loaded model: its modules by name, without the code of their classes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Only captured graphs can run."""
        raise CaptureError(
            "this model was loaded from a file, which holds the captured graphs and not the code, and none "
            "of them fits this call's mode, arguments or sizes",
            "make such a call before fast.save()",
        )


def _module(content: dict[str, Any], tensors: dict[str, Tensor]) -> AcceleratedModule:
    tree = SavedModel()
    for name, training in content["modules"]:
        owner: nn.Module = tree
        for part in [p for p in name.split(".") if p]:
            if part not in owner._modules:
                owner._modules[part] = nn.Module()
            owner = owner._modules[part]  # type: ignore[assignment]
        owner.training = bool(training)
    made: dict[str, Tensor] = {}
    for entry in content["state"]:
        _place(tree, entry, tensors, made)
    session_captures: dict[Any, list[Capture | Pieces]] = {}
    settings = Settings((), (), "approximate", False, (), False, "python", len(content["captures"]) + 1)
    fast = wrap(tree, settings)
    for data in content["captures"]:
        one = _load_capture(data, tensors)
        for slot in one.program.state.values():
            if slot.kind != "constant":
                {"parameter": fast.get_parameter, "buffer": fast.get_buffer}[slot.kind](slot.name)
        one.bind(fast, sum(map(len, session_captures.values())), "python")
        session_captures.setdefault(_key(data["key"], one.program), []).append(one)
    session: Session = fast.__dict__["_fxaccel"]
    session.captures, session.loaded = session_captures, True
    session.replacements = [_load_replacement(r) for r in content["replacements"]]
    return fast


def _place(
    tree: nn.Module, entry: dict[str, Any], tensors: dict[str, Tensor], made: dict[str, Tensor]
) -> None:
    name, same = entry["name"], entry["same_as"]
    path, _, key = name.rpartition(".")
    owner = tree.get_submodule(path)
    if same not in made:
        value = tensors[same].to(entry["device"])
        made[same] = (
            nn.Parameter(value, requires_grad=bool(entry["trains"])) if entry["kind"] == "parameter" else value
        )
    if entry["kind"] == "parameter":
        owner._parameters[key] = made[same]  # type: ignore[assignment]
    else:
        owner.register_buffer(key, made[same], persistent=bool(entry["persistent"]))


def _key(data: dict[str, Any], program: Program) -> Any:
    if data["structure"] is not None:
        structure: Any = int(data["structure"])
    else:
        structure = (program.in_spec, tuple((type(v), v) for v in program.baked.values()))
    cast = tuple(_load_region(r) for r in data["autocast"]) or None
    return structure, tuple(map(bool, data["flags"])), bool(data["grad"]), cast


def _load_capture(data: dict[str, Any], tensors: dict[str, Tensor]) -> Capture:
    guards = tuple(_guard(g, data["sizes"]) for g in data["guards"])
    root = _load_graph(data["graph"])
    program = Program(
        graph=root.graph,
        root=root,
        state={n: Slot(kind, name) for n, (kind, name) in data["state"].items()},
        constants={n: tensors[data["constants"] + n] for n in data["constant_names"]},
        ties=tuple(map(tuple, data["ties"])), buffers=frozenset(data["buffers"]),
        inputs=tuple(data["inputs"]), baked={i: _load_value(v, {}) for i, v in data["baked"]},
        in_spec=_load_structure(data["in_spec"]), out_spec=_load_structure(data["out_spec"]),
        sizes={_name(k): (int(i), int(d)) for k, (i, d) in data["sizes"].items()}, guards=guards,
        hints=dict(data["hints"]), contiguous=frozenset(data["contiguous"]),
        training=data["training"], grad=data["grad"], notes=list(data["notes"]),
    )  # fmt: skip
    placeholders = {n.name for n in root.graph.find_nodes(op="placeholder")}
    if placeholders != {*program.state, *(n for n in program.inputs if n is not None)}:
        raise ValueError("inputs and state are not those of the graph")
    manifest = Manifest()
    for entry in data["proofs"]:
        p, c = entry["proof"], entry["claim"]
        parts = [_load_graph(c["before"]), _load_graph(c["after"])]
        before, after = (Fragment(p.graph, p) for p in parts)
        manifest.claims[p["key"]] = Claim(c["rule"], before, after, c["numerics"])
        manifest.proofs[p["key"]] = Proof(**{**p, "trials": tuple(p["trials"])})
        manifest.sites[p["key"]] = int(entry["sites"])
    report = Report.from_json(json.dumps(data["report"])).captures[0]
    return Capture(program, program, program, manifest, report, emit(program))


def _load_graph(data: dict[str, Any]) -> fx.GraphModule:
    graph, env, owner = fx.Graph(), dict[str, fx.Node](), nn.Module()
    for name, inner in data["inner"].items():
        setattr(owner, _name(name), _load_graph(inner))
    for n in data["nodes"]:
        args, kwargs = _load_value(n["args"], env), {k: _load_value(v, env) for k, v in n["kwargs"].items()}
        target = _load_target(n["target"]) if n["op"] == "call_function" else _name(n["target"])
        if n["op"] not in ("placeholder", "call_function", "get_attr", "output"):
            raise ValueError(f"a node of kind {n['op']!r}")
        node = graph.create_node(n["op"], target, args, kwargs, name=_name(n["name"]))
        node.meta = {
            "val": _load_val(n["val"]), "path": n["path"], "source": n["source"],
            "regions": tuple(_load_region(r) for r in n["regions"]),
        }  # fmt: skip
        if n["by"]:
            node.meta["by"] = n["by"]
        env[n["name"]] = node
    graph.lint()
    return fx.GraphModule(owner, graph)


def _name(text: str) -> str:
    if not isinstance(text, str) or not text.isidentifier():
        raise ValueError(f"{text!r} is not a name")
    return text


def _load_target(text: str) -> Any:
    if text in _FUNCTIONS:
        return _FUNCTIONS[text]
    namespace, _, rest = text.partition("::")
    name, _, overload = rest.rpartition(".")
    if namespace == "higher_order" and rest in _HIGHER:
        return getattr(torch.ops.higher_order, rest)
    if namespace == "fxaccel":  # one of our kernels: its module registers the operator
        importlib.import_module(f"fxaccel.kernels.{_name(name)}")
    found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"there is no operator {text!r}")
    return found


def _load_value(data: Any, env: dict[str, fx.Node]) -> Any:
    if isinstance(data, list):
        return [_load_value(v, env) for v in data]
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "node":
        return env[value]
    if kind == "tuple":
        return tuple(_load_value(v, env) for v in value)
    if kind == "slice":
        return slice(*(_load_value(v, env) for v in value))
    if kind == "device":
        return torch.device(value)
    if kind in ("dtype", "layout", "memory_format"):
        found = getattr(torch, value)
        if not isinstance(found, getattr(torch, kind)):
            raise ValueError(f"{value!r} is not a {kind}")
        return found
    if kind == "complex":
        return complex(*value)
    if kind == "float":
        return float(value)
    raise ValueError(f"a value of kind {kind!r}")


def _load_val(data: Any) -> Any:
    if isinstance(data, list):
        return [_load_val(v) for v in data]
    if not isinstance(data, dict):
        return None
    if "size" in data:
        return SizeSpec(_load_size(data["size"]))
    return TensorSpec(
        _load_value({"dtype": data["dtype"]}, {}), tuple(map(_load_size, data["shape"])),
        tuple(map(_load_size, data["stride"])), torch.device(data["device"]),
    )  # fmt: skip


def _load_size(data: int | str) -> Any:
    return data if isinstance(data, int) else _arithmetic(ast.parse(data, mode="eval").body)


_BINARY: dict[type[ast.operator], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: FloorDiv,
    ast.Mod: Mod, ast.Pow: operator.pow,
    ast.Div: operator.truediv,
}  # fmt: skip
_CALLS: dict[str, Any] = {"Max": sympy.Max, "Min": sympy.Min, "FloorDiv": FloorDiv, "Mod": Mod,
                          "PythonMod": Mod}  # fmt: skip


def _arithmetic(tree: ast.expr) -> Any:
    """A size expression from its syntax tree; anything but arithmetic on names and integers is refused."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, (int, float)):
        return sympy.sympify(tree.value)
    if isinstance(tree, ast.Name):
        return sympy.Symbol(tree.id, integer=True, positive=True)
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_arithmetic(tree.operand)
    if isinstance(tree, ast.BinOp) and type(tree.op) in _BINARY:
        return _BINARY[type(tree.op)](_arithmetic(tree.left), _arithmetic(tree.right))
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in _CALLS:
        return _CALLS[tree.func.id](*map(_arithmetic, tree.args))
    return sympy.Symbol(ast.unparse(tree), integer=True, positive=True)  # shown, never computed with


_GUARD_NODES = (
    ast.Expression, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Constant, ast.Name, ast.Load,
    ast.And, ast.Or, ast.Not, ast.USub, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow, ast.Div,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Call,
)  # fmt: skip


def _guard(text: str, sizes: dict[str, Any]) -> str:
    """The guard, if it is plain arithmetic over the sizes; it becomes part of generated code."""
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        known = not isinstance(node, ast.Name) or node.id in {*sizes, "max", "min"}
        called = not isinstance(node, ast.Call) or isinstance(node.func, ast.Name)
        number = not isinstance(node, ast.Constant) or isinstance(node.value, (int, float))
        if not isinstance(node, _GUARD_NODES) or not (known and called and number):
            raise ValueError(f"the condition {text!r} is not arithmetic")
    return text


def _load_region(data: list[Any]) -> Region:
    kind, index, args = data
    loaded = tuple(_load_value(a, {}) for a in args)
    types_of = {"grad": (bool,), "autocast": (str, (torch.dtype, type(None)), bool, bool)}.get(kind, ())
    fit = len(loaded) == len(types_of) and all(map(isinstance, loaded, types_of))
    if kind == "autocast" and fit:
        torch.device(loaded[0])  # raises for what is no device
    if kind not in ("grad", "autocast", "checkpoint", "stage") or not fit:
        raise ValueError(f"a region of kind {kind!r} with {args!r}")
    return Region(kind, int(index), loaded)


def _load_replacement(data: dict[str, Any]) -> Replacement:
    def graph(part: dict[str, Any] | None) -> Any:
        return None if part is None else _load_graph(part)

    forward, inverse = graph(data["forward"]), graph(data["inverse"])
    return Replacement(data["by"], tuple(data["old"]), tuple(data["new"]), forward, inverse)


def _load_structure(data: dict[str, Any]) -> Structure:
    spec = pytree.tree_flatten(_sample(data["spec"]))[1]
    special = {int(i): _load_special(s) for i, s in data["special"]}
    return Structure(spec, special, int(data["size"]))


def _load_special(data: dict[str, Any]) -> Kept | Given | Opened:
    if "given" in data:
        return Given(int(data["given"]))
    if "opened" in data:
        cls = _imported(data["opened"]) or types.SimpleNamespace
        return Opened(cls, _load_structure(data["attributes"]))
    if "class" in data:
        return Kept(_imported(data["class"]))
    return Kept(_load_value(data["kept"], {}))


def _sample(data: Any) -> Any:
    """A value with the saved structure and a number at every leaf."""
    if data == "*":
        return 0
    if "list" in data:
        return [_sample(d) for d in data["list"]]
    if "tuple" in data:
        return tuple(_sample(d) for d in data["tuple"])
    pairs = dict(zip(data["keys"], map(_sample, data["values"]), strict=True))
    cls = _imported(data["type"])
    if cls is None or cls is dict or cls not in pytree.SUPPORTED_NODES:
        return pairs
    return pytree.SUPPORTED_NODES[cls].unflatten_fn(list(pairs.values()), list(pairs))


def _imported(name: str) -> Any:
    """The class of that name if this process has imported it already; nothing is imported here."""
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None
