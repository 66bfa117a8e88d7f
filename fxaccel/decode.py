"""What fxaccel.encode wrote, as programs and modules again; executes nothing of it.

Operators are looked up in `torch.ops` and in a short list of functions; sizes and guards are parsed as
arithmetic. Malformed values raise KeyError, TypeError, ValueError and their like, which fxaccel.artifact
turns into an ArtifactError.
"""

from __future__ import annotations

import ast
import importlib
import json
import operator
import sys
import types
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Mod

from fxaccel.emit import emit
from fxaccel.encode import FUNCTIONS, HIGHER
from fxaccel.errors import CaptureError
from fxaccel.ir import Program, Region, Replacement, SizeSpec, Slot, TensorSpec, expr
from fxaccel.module import AcceleratedModule, wrap
from fxaccel.pieces import Pieces
from fxaccel.proof import Claim, Fragment, Manifest, Proof
from fxaccel.report import Report
from fxaccel.schedule import Again, Moved, Schedule
from fxaccel.session import Capture, Session, Settings
from fxaccel.stages import Stages
from fxaccel.structure import Given, Kept, Opened, Structure
from fxaccel.tree import module_at


class SavedModel(nn.Module):
    """The tree of a loaded model: its modules by name, without the code of their classes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Only captured graphs can run."""
        raise CaptureError(
            "this model was loaded from a file, which holds the captured graphs and not the code, and none "
            "of them fits this call's mode, arguments or sizes",
            "make such a call before fast.save()",
        )


def model(content: dict[str, Any], tensors: dict[str, Tensor]) -> AcceleratedModule:
    """The module that encode.model described."""
    tree = SavedModel()
    for name, training in content["modules"]:
        module_at(tree, name).training = bool(training)
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
            nn.Parameter(value, requires_grad=bool(entry["trains"]))
            if entry["kind"] == "parameter"
            else value
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
        redrawn=bool(data["redrawn"]),
        schedule=_load_schedule(data["schedule"], {n.name for n in root.graph.nodes}),
        stages=_load_stages(data, root.graph),
    )  # fmt: skip
    placeholders = {n.name for n in root.graph.find_nodes(op="placeholder")}
    if placeholders != {*program.state, *(n for n in program.inputs if n is not None)}:
        raise ValueError("inputs and state are not those of the graph")
    for name in filter(None, program.inputs):  # their sizes become part of generated code
        used = {
            str(s) for size in program.placeholder(name).meta["val"].shape for s in expr(size).free_symbols
        }
        if not used <= set(program.sizes):
            raise ValueError(f"the sizes of input {name!r} are not arithmetic on the known ones")
    manifest = Manifest()
    for entry in data["proofs"]:
        p, c = entry["proof"], entry["claim"]
        parts = [_load_graph(c["before"]), _load_graph(c["after"])]
        before, after = (Fragment(p.graph, p) for p in parts)
        manifest.claims[p["key"]] = Claim(c["rule"], before, after, c["numerics"], c["note"])
        manifest.proofs[p["key"]] = Proof(**{**p, "trials": tuple(p["trials"])})
        manifest.sites[p["key"]] = int(entry["sites"])
    report = Report.from_json(json.dumps(data["report"])).captures[0]
    return Capture(program, program, program, manifest, report, emit(program))


def _load_schedule(data: dict[str, Any] | None, nodes: set[str]) -> Schedule | None:
    if data is None:
        return None
    again = [
        Again(one["before"], tuple(one["nodes"]), tuple((value, until) for value, until in one["held"]))
        for one in data["again"]
    ]
    moved = [Moved(one["value"], one["fetch"], one["until"]) for one in data.get("moved", ())]
    schedule = Schedule(tuple(data["dropped"]), tuple(again), tuple(moved))
    held, away = {value for one in again for value, _ in one.held}, {one.value for one in moved}
    apart = away.isdisjoint(schedule.dropped) and len(away) == len(moved)
    if not nodes.issuperset(schedule.nodes()) or not held.issubset(schedule.dropped) or not apart:
        raise ValueError("the schedule is not of this graph")
    return schedule


def _load_stages(data: dict[str, Any], graph: fx.Graph) -> Stages | None:
    one = data["stages"]
    if one is None:
        return None
    begins, schedules, flights = one["begins"], one["schedules"], one["in_flight"]
    calls = [n.name for n in graph.nodes if n.op not in ("placeholder", "output")]
    fit = all(len(given) in (0, len(begins) + 1) for given in (schedules, flights))
    counts = [one["microbatches"], *flights]
    fit &= all(isinstance(n, int) and n > 0 for n in counts)
    if not fit or begins != [n for n in calls if n in set(begins)]:
        raise ValueError("the stages are not of this graph")
    if data["schedule"] is not None or not data["grad"]:
        raise ValueError("only a training step without a schedule has stages")
    loaded = tuple(_load_schedule(s, set(calls)) for s in schedules)
    return Stages(tuple(begins), one["microbatches"], tuple(flights), loaded)


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
    if text in FUNCTIONS:
        return FUNCTIONS[text]
    namespace, _, rest = text.partition("::")
    name, _, overload = rest.rpartition(".")
    if namespace == "higher_order" and rest in HIGHER:
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
    if kind in ("tuple", "slice"):
        items = [_load_value(v, env) for v in value]
        return tuple(items) if kind == "tuple" else slice(*items)
    if kind in ("dtype", "layout", "memory_format"):
        found = getattr(torch, value)
        if not isinstance(found, getattr(torch, kind)):
            raise ValueError(f"{value!r} is not a {kind}")
        return found
    plain: dict[str, Any] = {"device": torch.device, "float": float, "complex": lambda v: complex(*v)}
    return plain[kind](value)


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
    return Replacement(
        data["by"], tuple(data["old"]), tuple(data["new"]), forward, inverse,
        frozen=bool(data["frozen"]), aliases=tuple(data["aliases"]),
    )  # fmt: skip


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
