"""The program a model becomes: one flat FX graph of ATen operators, its state, and where each node came from.

Every value of the model is a node of one `torch.fx.Graph`. Parameters, buffers and constants are
placeholders, so the graph is a pure function of its placeholders (up to the in-place operators that the
model itself wrote). Regions of the source (`torch.no_grad`, `torch.autocast`) and regions made by passes
(checkpoints, pipeline stages) are labels on nodes, never nested graphs: a pattern sees straight through
them and the emitter turns each label back into a `with` block or a function.

Keys of `node.meta` that fxaccel reads and writes:

    val       the FakeTensor, SymInt, number, or list of them that the node computes
    path      module path of the node, "layers.0.attn", "" at the root
    source    the user's own "file.py:12", "" where none is known
    by        name of the pass that made the node, absent on captured nodes
    regions   tuple of Region labels, outermost first
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from fxaccel.errors import CaptureError, RuleError
from fxaccel.schedule import Schedule
from fxaccel.structure import Structure

if TYPE_CHECKING:
    from fxaccel.stages import Stages

StateKind = Literal["parameter", "buffer", "constant"]


@dataclass(frozen=True)
class Slot:
    """Where the tensor of a state placeholder lives: `name` is its key in the module or in the constants."""

    kind: StateKind
    name: str


@dataclass(frozen=True)
class Region:
    """A label on consecutive nodes that the emitter writes as one block.

    kind      "grad" (args: enabled), "autocast" (args: device, dtype, enabled, cache), "checkpoint" or
              "stage" (no args)
    index     tells two regions of one kind apart
    """

    kind: str
    index: int
    args: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}[{self.index}]"


@dataclass(frozen=True)
class TensorSpec:
    """What a loaded graph knows of a tensor; answers like a fake tensor, and costs nothing to make.

    Sizes and strides are ints or sympy expressions over the program's size symbols.
    """

    dtype: torch.dtype
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    device: torch.device

    def dim(self) -> int:
        return len(self.shape)

    def stride(self) -> tuple[Any, ...]:
        return self.strides

    def numel(self) -> Any:
        return sympy.prod(self.shape) if self.shape else 1

    def element_size(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True)
class SizeSpec:
    """What a loaded graph knows of a symbolic integer."""

    expr: Any


@dataclass(frozen=True)
class Replacement:
    """Parameters that a pass put in the place of others, with the two-way map between them.

    old, new    names in the original and in the rewritten `state_dict`
    forward     original tensors -> new tensors, in the order of `old` and `new`; None in a file that could
                not hold it
    inverse     new tensors -> original tensors, or None where the original cannot be had back
    initial     what the parameters become now, where `forward` would be dear or gives what is best for any
                tensors and not for these; the module takes these tensors over
    frozen      whether the new parameters are held fixed in training
    aliases     other names of the one parameter in `old`, which is tied
    """

    by: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    forward: Callable[..., tuple[Tensor, ...]] | None
    inverse: Callable[..., tuple[Tensor, ...]] | None
    initial: tuple[Tensor, ...] | None = field(default=None, compare=False, repr=False)
    frozen: bool = False
    aliases: tuple[str, ...] = ()

    def made(self, *old: Tensor) -> tuple[Tensor, ...]:
        """The new tensors, of the original ones as the pass found them or of any."""
        if self.initial is not None:
            return self.initial
        if self.forward is None:
            raise CaptureError(
                f"{', '.join(self.old)} cannot be turned into what {self.by} made of them: the "
                "file that was loaded does not hold the way there",
                "accelerate the original again",
            )
        return self.forward(*old)


def incremental(extend: Callable[[Program, Any, Sequence[fx.Node]], None]) -> Callable[[Any], Any]:
    """Make an analysis one whose result `extend` brings up to date for nodes put in the place of others."""

    def mark(analysis: Any) -> Any:
        analysis.extend = extend
        return analysis

    return mark


@dataclass
class Program:
    """A captured model: the graph and everything needed to call it as the model was called.

    graph         every operator call; its placeholders are the state, then the inputs
    root          holds the sub-graphs of control-flow operators
    state         placeholder name -> Slot, for parameters, buffers and constant tensors
    constants     name -> tensor, for slots of kind "constant"
    ties          groups of parameters, then of buffers, that are one tensor, by all of their names
    contiguous    inputs that were contiguous; a call must agree
    buffers       names of the module's buffers, all others in its state_dict are parameters
    inputs        one entry a flattened input: the placeholder's name, or None for a value baked in
    baked         flattened input index -> the Python value the graph was captured for
    in_spec       structure of (args, kwargs)
    out_spec      structure of the result, and of what became of the objects passed in
    sizes         symbol -> (flattened input index, dimension) to read its value from
    guards        conditions on symbols, as Python expressions, that hold wherever the graph is valid
    hints         symbol -> its value in the example input
    training      whether the root module was in training mode
    grad          whether gradients were enabled
    redrawn       whether a pass has changed which random numbers are drawn, not their distribution
    notes         sentences for the report: what capture had to specialise or could not keep
    replacements  parameters that passes have put in the place of others in this graph
    adopted       those that earlier captures of this module have; a pass does them again, as they are
    calibration   fxaccel.calibration.Calibration: what a pass that is not exact decides by
    schedule      which values autograd does not keep, and when they are computed
                  again; None for all as it likes
    stages        where the graph is cut into the stages of a pipeline; None for nowhere
    """

    graph: fx.Graph
    root: nn.Module
    state: dict[str, Slot]
    constants: dict[str, Tensor]
    ties: tuple[tuple[str, ...], ...]
    buffers: frozenset[str]
    inputs: tuple[str | None, ...]
    baked: dict[int, Any]
    in_spec: Structure
    out_spec: Structure
    sizes: dict[str, tuple[int, int]]
    guards: tuple[str, ...]
    hints: dict[str, int]
    contiguous: frozenset[str]
    training: bool
    grad: bool
    redrawn: bool = False
    notes: list[str] = field(default_factory=list)
    replacements: list[Replacement] = field(default_factory=list)
    adopted: tuple[Replacement, ...] = ()
    calibration: Any = None
    schedule: Schedule | None = None
    stages: Stages | None = None
    _facts: dict[Callable[[Program], Any], Any] = field(default_factory=dict, repr=False)

    def facts(self, analysis: Callable[[Program], Any]) -> Any:
        """The result of a whole-graph analysis, computed once until the graph changes."""
        if analysis not in self._facts:
            self._facts[analysis] = analysis(self)
        return self._facts[analysis]

    def changed(self, made: Sequence[fx.Node] | None = None) -> None:
        """Forget analyses: whoever edits the graph calls this.

        made    the new nodes, where the edit put them in the place of equal ones: `incremental` analyses
                take them in and are kept
        """
        for analysis, found in list(self._facts.items()):
            extend = getattr(analysis, "extend", None)
            if made is None or extend is None:
                del self._facts[analysis]
            else:
                extend(self, found, made)

    def copy(self) -> Program:
        """An independent copy: nodes, state table and notes; tensors and fake values are shared."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            new = graph.node_copy(node, lambda n: env[n])
            new.meta = dict(node.meta)
            env[node] = new
        return replace(
            self,
            graph=graph,
            state=dict(self.state),
            constants=dict(self.constants),
            notes=list(self.notes),
            replacements=list(self.replacements),
            _facts={},
        )

    def kind(self, name: str) -> StateKind:
        """Whether a name of the module's state is a parameter or a buffer."""
        return "buffer" if name in self.buffers else "parameter"

    def placeholder(self, name: str) -> fx.Node:
        """The placeholder node called `name`."""
        return next(n for n in self.graph.nodes if n.op == "placeholder" and n.name == name)

    def input_nodes(self) -> list[fx.Node]:
        """The placeholders of the inputs, in the order of a call's tensors."""
        nodes = {n.name: n for n in self.graph.find_nodes(op="placeholder")}
        return [nodes[name] for name in self.inputs if name is not None]

    def state_node(self, name: str) -> fx.Node:
        """The placeholder that holds the parameter or buffer `name` of the module."""
        for node in self.graph.nodes:
            slot = self.state.get(node.name) if node.op == "placeholder" else None
            if slot is not None and slot.name == name:
                return node
        raise KeyError(name)

    def add_state(self, slot: Slot, val: FakeTensor, by: str) -> fx.Node:
        """A new placeholder for `slot`, after the last state placeholder."""
        last = None
        for node in self.graph.nodes:
            if node.op != "placeholder":
                break
            if node.name in self.state:
                last = node
        first = next(iter(self.graph.nodes))
        where = self.graph.inserting_before(first) if last is None else self.graph.inserting_after(last)
        with where:
            node = self.graph.placeholder("p_" + slot.name.replace(".", "_"))
        node.meta = {"val": val, "path": slot.name.rpartition(".")[0], "source": "", "by": by, "regions": ()}
        self.state[node.name] = slot
        self.changed()
        return node

    def replace_parameters(self, one: Replacement, vals: Sequence[Tensor]) -> list[fx.Node]:
        """Placeholders for the parameters `one.new`, whose fake values are `vals`.

        The pass rewires the readers of the old parameters; the module takes over the new ones when the
        graph is emitted, and keeps reading and writing the original `state_dict` through the map.
        """
        for name in one.old:
            group = next((g for g in self.ties if name in g), (name,))
            others = [n for n in group if n != name]
            if set(others) == set(one.aliases):
                self.ties = tuple(g for g in self.ties if g is not group)
            else:
                raise RuleError(
                    f"{one.by} replaces {name!r}, which is one tensor with {', '.join(others)}; untie them "
                    "first"
                )
        self.replacements.append(one)
        trains = not one.frozen and any(self.state_node(n).meta["val"].requires_grad for n in one.old)
        for val in vals:
            val.requires_grad_(trains and val.dtype.is_floating_point)
        return [
            self.add_state(Slot("parameter", name), val, one.by)  # type: ignore[arg-type]
            for name, val in zip(one.new, vals, strict=True)
        ]

    def drop_unused_state(self) -> None:
        """Erase state placeholders that nothing reads any more."""
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node.name in self.state and not node.users:
                slot = self.state.pop(node.name)
                self.graph.erase_node(node)
                if slot.kind == "constant":
                    self.constants.pop(slot.name, None)


# -- values ----------------------------------------------------------------------------------------


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a (nested) value."""
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]


def is_tensor(val: Any) -> bool:
    """Whether a node's value is a tensor."""
    return isinstance(val, (Tensor, TensorSpec))


def expr(size: Any) -> sympy.Expr:
    """The symbolic size behind an int, SymInt or expression, without adding a guard."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return size.expr if isinstance(size, SizeSpec) else sympy.sympify(size)


def number(size: Any, sizes: dict[str, int]) -> int:
    """The size with every symbol given a value by its name."""
    if isinstance(size, int):
        return size
    e = expr(size)
    return int(e.xreplace({s: sympy.Integer(sizes[str(s)]) for s in e.free_symbols}))


def value_of(arg: Any) -> Any:
    """`arg` with every node replaced by the fake value it computes."""
    return fx.map_arg(arg, lambda n: n.meta["val"])


def fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode that the graph's values were made in."""
    for node in graph.nodes:
        for leaf in tensors(node.meta.get("val")):
            if isinstance(leaf, FakeTensor):
                return leaf.fake_mode
    return None


def assumed(program: Program) -> tuple[str, ...]:
    """Conditions on the sizes that someone has relied on and that are not among the guards yet.

    `if x.shape[0] > 4` and `int(x.shape[0])` on a fake value note such a condition, whoever asks.
    """
    mode = fake_mode(program.graph)
    environment = None if mode is None else mode.shape_env
    if environment is None:
        return ()
    printer, known = PythonPrinter(), set(program.guards)
    texts = []
    for guard in environment.guards:
        # A size that export found to be a number, or that of another, is no symbol of the program.
        gone = [s for s in guard.expr.free_symbols if str(s) not in program.sizes]
        said = guard.expr.xreplace({s: environment.replace(s) for s in gone})
        if said.free_symbols and {str(s) for s in said.free_symbols} <= set(program.sizes):
            texts.append(printer.doprint(said))
    return tuple(dict.fromkeys(t for t in texts if t not in known))


# -- nodes -----------------------------------------------------------------------------------------


def path(node: fx.Node) -> str:
    """Module path of the node."""
    return node.meta.get("path", "")


def source(node: fx.Node) -> str:
    """The user's own file and line."""
    return node.meta.get("source", "")


def is_call(node: Any, *targets: Any) -> bool:
    """Whether `node` calls one of `targets` (any call where none is given)."""
    return (
        isinstance(node, fx.Node) and node.op == "call_function" and (not targets or node.target in targets)
    )


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of an operator call by its schema name, defaults filled in.

    Calls of plain Python functions have their positional arguments named "0", "1", ...
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for i, arg in enumerate(target._schema.arguments):
        if i < len(node.args) and not arg.kwarg_only:
            bound[arg.name] = node.args[i]
        elif arg.name in node.kwargs:
            bound[arg.name] = node.kwargs[arg.name]
        else:
            bound[arg.name] = arg.default_value
    return bound


def without_defaults(target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Positional arguments of an operator, trailing ones that equal the schema's defaults left out."""
    if not isinstance(target, torch._ops.OpOverload):
        return args
    for schema in reversed(target._schema.arguments[: len(args)]):
        default, given = schema.default_value, args[-1]
        if not schema.has_default_value() or type(given) is not type(default) or given != default:
            break
        args = args[:-1]
    return args


def call(
    graph: fx.Graph,
    like: fx.Node,
    target: Any,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    by: str,
    val: Any = None,
) -> fx.Node:
    """Insert a call at the graph's insertion point, with the provenance of `like`.

    `val` is the fake value of the result where it is already known (a fake run costs milliseconds on
    symbolic shapes); otherwise the operator is run on fake tensors.
    """
    node = graph.call_function(target, tuple(args), kwargs or {})
    if val is None:
        val = fake_result(graph, like, target, args, kwargs or {})
    node.meta = {k: like.meta[k] for k in ("path", "source", "regions") if k in like.meta}
    node.meta.update(val=val, by=by)
    return node


def fake_result(
    graph: fx.Graph, like: fx.Node, target: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Run `target` on the fake values of its arguments, in the regions of `like`."""
    mode = fake_mode(graph)
    fake_args, fake_kwargs = value_of(tuple(args)), value_of(kwargs)
    if mode is None:
        return target(*fake_args, **fake_kwargs)
    # Which library convolves so many images is asked for, and says nothing of the result.
    asked = unguarded(graph) if getattr(target, "_opname", "").startswith("conv") else nullcontext()
    with mode, asked, entered(like.meta.get("regions", ())), torch.no_grad():
        return target(*fake_args, **fake_kwargs)


def unguarded(graph: fx.Graph) -> AbstractContextManager[None]:
    """While it is open, fake runs leave no conditions on sizes behind."""
    mode = fake_mode(graph)
    if mode is None or mode.shape_env is None:
        return nullcontext()
    return mode.shape_env.suppress_guards()


class entered:
    """Context manager: the run-time state (grad mode, autocast) that a tuple of regions stands for."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self.managers = [m for r in regions if (m := region_context(r)) is not None]

    def __enter__(self) -> None:
        for manager in self.managers:
            manager.__enter__()

    def __exit__(self, *exc: Any) -> None:
        for manager in reversed(self.managers):
            manager.__exit__(*exc)


def region_context(region: Region) -> Any:
    """The context manager of one region, None where it has no run-time state."""
    if region.kind == "grad":
        return torch.set_grad_enabled(region.args[0])
    if region.kind == "autocast":
        device, dtype, enabled, cache = region.args
        return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
    return None


# -- structure -------------------------------------------------------------------------------------


def target_name(target: Any) -> str:
    """`aten.add.Tensor`, `operator.getitem`, `fxaccel.rms_norm`: stable on every machine."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removesuffix(".default")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    module = getattr(target, "__module__", "") or ""
    module = {"_operator": "operator"}.get(module, module)
    return f"{module}.{getattr(target, '__name__', repr(target))}"


def structure(nodes: Iterable[fx.Node], leaf: Callable[[fx.Node], str]) -> str:
    """Hash of a set of nodes that is equal for equal structure, whatever the names.

    `leaf` describes the nodes outside of the set that are read.
    """
    inside = {n: i for i, n in enumerate(nodes)}
    text = []
    for node in inside:
        args = fx.map_arg(
            (node.args, dict(node.kwargs)),
            lambda n: f"%{inside[n]}" if n in inside else leaf(n),
        )
        regions = [(r.kind, r.args) for r in node.meta.get("regions", ())]
        text.append(f"{target_name(node.target)}{args}{regions}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def topological(nodes: Iterable[fx.Node], graph: fx.Graph) -> Iterator[fx.Node]:
    """`nodes` in the order of the graph."""
    wanted = set(nodes)
    return (n for n in graph.nodes if n in wanted)
