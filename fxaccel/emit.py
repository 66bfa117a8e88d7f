"""From a Program to straight Python: one statement a node, no interpretation left at call time.

The generated module holds three functions. `accepts(...)` says in microseconds whether a call fits the
capture: dtypes, devices, ranks, sizes, layouts and every guard; `fits()` whether the parameters do.
`forward(...)` computes; values that fxaccel.derived keeps come to it from `derive()`. Frequent ATen
operators are called through torch's own Python bindings, which cost less than half of an
`torch.ops.aten` call and reach the same kernels; every other operator is called as what it is.
Parameters are read from the module's tables at each call, so loading, moving and training them works.
"""

from __future__ import annotations

import importlib
import itertools
import keyword
import linecache
import math
import operator
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from fxaccel.derived import Derived, derived, mebibytes, standing
from fxaccel.effects import last_uses, written
from fxaccel.ir import Program, Region, arguments, expr, is_tensor, target_name

# Operators whose Python binding takes the schema's arguments in the schema's order.
_BOUND = """
abs add addmm all amax amin any arange argmax baddbmm bitwise_and bitwise_not bitwise_or bmm cat ceil chunk
clamp clone conv1d conv2d conv3d cos cumsum detach div dropout embedding eq erf exp exp2 flatten
full ge gt index_select isinf isnan layer_norm le log log_softmax logical_and logical_not logical_or lt
masked_fill matmul max_pool2d mean min max mm mul ne neg ones permute pow prod reciprocal relu
rms_norm round rsqrt rsub scalar_tensor sigmoid sin softmax split sqrt square squeeze stack sub sum
tanh transpose tril triu unbind unsqueeze where zeros zeros_like ones_like full_like
gelu:nn linear:nn scaled_dot_product_attention:nn silu:nn softplus:nn leaky_relu:nn hardswish:nn
avg_pool2d:nn adaptive_avg_pool2d:nn pad:nn
contiguous:method expand:method repeat:method reshape:method to:method type_as:method
view:method
"""
_PLAIN_OVERLOADS = re.compile(
    r"default|Tensor|Scalar|Tensor_Scalar|int|dim|ScalarOpt_dim|dtype|self|start_step"
)
_POSITIONAL = {"to": 4}  # arguments above this number are keyword-only in the binding
_OPERATORS = {
    operator.getitem: "{}[{}]", operator.add: "{} + {}", operator.sub: "{} - {}",
    operator.mul: "{} * {}", operator.floordiv: "{} // {}", operator.mod: "{} % {}",
    operator.truediv: "{} / {}", operator.neg: "-{}", operator.eq: "{} == {}",
    operator.ne: "{} != {}", operator.lt: "{} < {}", operator.le: "{} <= {}",
    operator.gt: "{} > {}", operator.ge: "{} >= {}",
}  # fmt: skip


def _bindings() -> dict[str, Any]:
    homes = {"": torch._C._VariableFunctions, "nn": torch._C._nn, "method": torch._C.TensorBase}
    found = {}
    for word in _BOUND.split():
        name, _, home = word.partition(":")
        if hasattr(homes[home], name):
            found[name] = getattr(homes[home], name)
    return found


_BINDINGS = _bindings()
# What expressions of sizes and arguments call by these names, as torch prints them.
_PYTHON = ("abs", "float", "len", "math", "max", "min", "round", "slice")
_FUNCTIONS = ("accepts", "fits", "forward", "compute", "sources", "derive", "derived")
_serial = itertools.count()


class Tree(Protocol):
    """Where the tables of parameters and buffers are: a module, or what stands for one."""

    def get_submodule(self, path: str, /) -> Any:
        """What has the tables `_parameters` and `_buffers` at a path."""


class Tables:
    """Stands for a module tree: tables of parameters and buffers by path."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.tables: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            path, _, own = name.rpartition(".")
            self.tables.setdefault(path, {})[own] = tensor

    def get_submodule(self, path: str, /) -> Any:
        """The tables of a path, empty where nothing is."""
        table = self.tables.get(path, {})  # ties name modules whose parameter is read by another name
        return SimpleNamespace(_parameters=table, _buffers=table)


@dataclass(frozen=True)
class Code:
    """Generated source and the objects that it names.

    source      the module text
    constants   global name -> object (operators, constant tensors, sub-graphs)
    tables      global name -> ("parameter" | "buffer", module path): filled in by `bind`
    choices     kernel name -> what calls it on a GPU, the way that measures fastest there
    twice       a sentence on what is kept a second time, "" where nothing is
    """

    source: str
    constants: dict[str, Any]
    tables: dict[str, tuple[str, str]]
    choices: dict[str, Any]
    twice: str = ""

    def notes(self) -> list[str]:
        """What was chosen so far, a sentence for each kernel and size; and what is kept twice."""
        return [line for c in self.choices.values() for line in c.lines()] + [self.twice] * bool(self.twice)

    def bind(self, module: Tree, filename: str) -> dict[str, Any]:
        """Execute the source with its tables bound to `module`; returns the functions by name."""
        filename = f"{filename.strip('<>')} #{next(_serial)}"  # linecache shows no source for <...>
        # Dynamo would import a __name__.
        namespace: dict[str, Any] = {"torch": torch, "math": math, **self.constants}
        for name, (kind, path) in self.tables.items():
            owner = module.get_submodule(path)
            namespace[name] = owner._parameters if kind == "parameter" else owner._buffers
        exec(compile(self.source, filename, "exec"), namespace)
        if "derive" in namespace:
            namespace["derived"] = Derived(namespace["sources"], namespace["derive"])
        linecache.cache[filename] = (lambda: self.source,)  # for tracebacks
        weakref.finalize(namespace["forward"], linecache.cache.pop, filename, None)
        return namespace


def emit(program: Program) -> Code:
    """The Python code of the program."""
    return emitter(program).code()


def emitter(program: Program, outer: Emitter | None = None) -> Emitter:
    """What writes the functions of a program, for itself or into the code of another."""
    if program.schedule is None and program.stages is None:
        return Emitter(program, outer)
    home = "fxaccel.scheduled" if program.stages is None else "fxaccel.staged"
    made: Any = importlib.import_module(home)  # which are made of what is here
    found: Emitter = made.Emitter(program, outer)
    return found


class Emitter:
    """Writes the functions of one program.

    outer    the emitter into whose code they go: what is global is one, local names are a function's own
    """

    def __init__(self, program: Program, outer: Emitter | None = None) -> None:
        self.program = program
        self.constants: dict[str, Any] = {} if outer is None else outer.constants
        self.tables: dict[str, tuple[str, str]] = {} if outer is None else outer.tables
        self.choices: dict[str, Any] = {} if outer is None else outer.choices
        self.read: dict[str, str] = {} if outer is None else outer.read
        self.everywhere: set[str] = (
            {"torch", "inf", "nan", *_PYTHON, *_FUNCTIONS} if outer is None else outer.everywhere
        )
        self.taken: set[str] = set()
        self.shared: dict[Any, str] = {}
        self.laid: dict[Any, str] = {}
        self.twice = ""
        self.takes: dict[fx.Node, str] = {}
        self.names: dict[fx.Node, str] = {}
        self.inputs = [n for n in program.inputs if n is not None]
        self.functions: list[list[str]] = []

    def code(self) -> Code:
        nodes, inputs = list(self.program.graph.nodes), self.input_names()
        body = [n for n in nodes if n.op not in ("placeholder", "output")]
        ahead, kept = derived(self.program)
        body = [n for n in body if n not in ahead]
        functions = self.ahead(inputs, ahead, kept, body)
        given = [*inputs, *(self.names[n] for n in kept), *self.laid.values()]
        name = "compute" if functions else "forward"
        lines = [
            f"def {name}({', '.join(given)}):",
            *indented(self.body(body, nodes[-1])),
        ]
        functions = [[*self.accepts(inputs)], [*self.fits()], *self.functions, lines, *functions]
        source = "\n\n\n".join("\n".join(f) for f in functions) + "\n"
        return Code(source, self.constants, self.tables, self.choices, self.twice)

    def function(self, name: str) -> list[list[str]]:
        """The program as one function of this name, behind those that it calls."""
        nodes, inputs = list(self.program.graph.nodes), self.input_names()
        body = [n for n in nodes if n.op not in ("placeholder", "output")]
        lines = self.body(body, nodes[-1])
        return [*self.functions, [f"def {name}({', '.join(inputs)}):", *indented(lines)]]

    def input_names(self) -> list[str]:
        """Names of the inputs; state is read where it is."""
        for node in self.program.graph.find_nodes(op="placeholder"):
            is_state = node.name in self.program.state
            self.names[node] = self.state_read(node) if is_state else self.local(node.name)
        return [self.names[n] for n in self.program.input_nodes()]

    def body(self, body: list[fx.Node], output: fx.Node) -> list[str]:
        """Statements that compute all nodes and return what the output node reads."""
        lines = self.block(body, last_uses(body, output.all_input_nodes), 0)
        return [*lines, f"return {self.argument(list(output.args[0]))}"]

    def ahead(
        self, inputs: list[str], nodes: list[fx.Node], kept: list[fx.Node], calls: list[fx.Node]
    ) -> list[list[str]]:
        """Functions for the values that are computed once, and the `forward` that passes them on.

        nodes, kept    what is computed, and what of it the `calls` read
        """
        packs = self.packs(calls)
        if not kept and not packs:
            return []
        state = [a for n in packs.values() for a in n if a.op == "placeholder"]
        read = dict.fromkeys(
            self.names[a] for a in [*(a for n in nodes for a in n.all_input_nodes), *state] if a in self.names
        )
        body = self.block(nodes, last_uses(nodes, kept), 0)
        for node in packs:
            body += self.prepared(node, ahead=True)
        self.laid = self.shared
        if packs:
            size = mebibytes(self.program, dict.fromkeys(a for n in packs.values() for a in n))
            what = f"{len(self.laid)} weights of {size:.3g} MiB are kept a second time"
            self.twice = f"{what}, as the CPU's kernels read them, where calls gain by it"
        names = [*(self.names[n] for n in kept), *self.laid.values()]
        self.shared = dict(self.laid)  # other names within the function are its own
        return [
            ["def sources():", f"    return [{', '.join(read)}]"],
            ["def derive():", *indented(body), f"    return [{', '.join(names)}]"],
            [
                f"def forward({', '.join(inputs)}):",
                f"    return compute({', '.join([*inputs, '*derived()'])})",
            ],
        ]

    def packs(self, calls: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """The calls whose kernel lays weights out ahead, with the weights."""
        if self.program.grad:
            return {}
        fixed, found = self.program.facts(standing), dict[fx.Node, list[fx.Node]]()
        for node in calls:
            module, device = _kernel(node)
            shared = getattr(module, "shared", None)
            if shared is not None and device == "cpu" and shared.ahead:
                given = arguments(node)
                read = [a for name in shared.read for a in _nodes(given[name])]
                if fixed.issuperset(read) and shared.worth(given):
                    found[node] = read
        return found

    # -- names ------------------------------------------------------------------------------------

    def local(self, wish: str) -> str:
        """A name within the function."""
        name = self.free(wish)
        self.taken.add(name)
        return name

    def title(self, wish: str) -> str:
        """A name that is global."""
        name = self.free(wish)
        self.everywhere.add(name)
        return name

    def free(self, wish: str) -> str:
        name = re.sub(r"\W", "_", wish)
        name = f"_{name}" if not name.isidentifier() or keyword.iskeyword(name) else name
        base, i = name, 0
        while name in self.taken or name in self.everywhere:
            i += 1
            name = f"{base}_{i}"
        return name

    def constant(self, wish: str, value: Any) -> str:
        for name, known in self.constants.items():
            if known is value and name not in self.taken:  # a local name of another function may be the same
                return name
        name = self.title(wish)
        self.constants[name] = value
        return name

    def state_read(self, node: fx.Node) -> str:
        slot = self.program.state[node.name]
        if slot.kind == "constant":
            return self.constant(node.name, self.program.constants[slot.name])
        read = self.entry(slot.name)
        self.read[read] = str(node.meta["val"].dtype)
        return read

    def entry(self, name: str) -> str:
        """Expression for the parameter or buffer with this name in the `state_dict`."""
        path, _, key = name.rpartition(".")
        kind = self.program.kind(name)
        want = (kind, path)
        table = next((t for t, at in self.tables.items() if at == want and t not in self.taken), None)
        if table is None:
            prefix = "" if kind == "parameter" else "b_"
            table = self.title(prefix + (path.replace(".", "_") or "root"))
            self.tables[table] = want
        return f"{table}[{key!r}]"

    # -- statements -------------------------------------------------------------------------------

    def block(self, body: list[fx.Node], last_use: dict[fx.Node, list[fx.Node]], depth: int) -> list[str]:
        """Statements for consecutive nodes; nodes with a region at `depth` become one inner block."""
        lines: list[str] = []
        for region, nodes in self.runs(body, depth):
            if region is None:
                for n in nodes:
                    lines += self.statements(n, last_use)
            elif region.kind == "checkpoint":
                lines += self.checkpoint(region, nodes, last_use, depth)
            else:
                lines += [self.header(region), *indented(self.block(nodes, last_use, depth + 1))]
        return lines

    def runs(self, body: list[fx.Node], depth: int) -> Iterator[tuple[Region | None, list[fx.Node]]]:
        """Consecutive nodes that share their region at `depth`."""
        run: list[fx.Node] = []
        current: Region | None = None
        for node in body:
            regions = self.regions(node)
            region = regions[depth] if len(regions) > depth else None
            if run and region != current:
                yield current, run
                run = []
            current = region
            run.append(node)
        if run:
            yield current, run

    def regions(self, node: fx.Node) -> tuple[Region, ...]:
        """The regions whose blocks a node is written into."""
        return tuple(node.meta.get("regions", ()))

    def header(self, region: Region) -> str:
        if region.kind == "grad":
            return f"with torch.set_grad_enabled({bool(region.args[0])}):"
        if region.kind == "autocast":
            device, dtype, enabled, cache = region.args
            return (
                f"with torch.autocast({device!r}, dtype={self.argument(dtype)}, enabled={bool(enabled)}, "
                f"cache_enabled={bool(cache)}):"
            )
        return f"if True:  # {region}"

    def checkpoint(
        self,
        region: Region,
        nodes: list[fx.Node],
        last_use: dict[fx.Node, list[fx.Node]],
        depth: int,
    ) -> list[str]:
        """A region whose values are recomputed in backward: a function run by torch's checkpoint."""
        inside = set(nodes)
        reads = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside)
        given = [n for n in reads if n.op != "placeholder" or n.name not in self.program.state]
        results = [n for n in nodes if any(u not in inside for u in n.users)]
        run = self.constant("checkpoint", torch.utils.checkpoint.checkpoint)
        name = self.local(f"recomputed_{region.index}")
        arguments = [self.names[n] for n in given]
        outside, self.shared = self.shared, {}  # names within the function are its own
        inner = self.block(nodes, last_uses(nodes, results), depth + 1)
        self.shared = outside
        names = [self.names[n] for n in results]
        returns = ", ".join(names) + ("," if len(names) == 1 else "")
        call = ", ".join([name, *arguments, "use_reentrant=False"])
        dead = [v for n in nodes for v in last_use.get(n, ()) if v not in inside]
        return [
            f"def {name}({', '.join(arguments)}):",
            *indented([*inner, f"return {returns}"]),
            f"{returns} = {run}({call}){self.delete(dead)}",
        ]

    def statements(self, node: fx.Node, last_use: dict[fx.Node, list[fx.Node]]) -> list[str]:
        """All that one node takes."""
        return [*self.prepared(node), self.statement(node, last_use)]

    def statement(self, node: fx.Node, last_use: dict[fx.Node, list[fx.Node]]) -> str:
        value = self.expression(node)
        name = self.names[node] = self.local(node.name)
        text = f"{name} = {value}" if node.users else value
        text += self.delete(last_use.get(node, []))
        where = "  ".join(
            w for w in (node.meta.get("path"), node.meta.get("source"), node.meta.get("by")) if w
        )
        where = "".join(c if c.isprintable() else " " for c in where)  # a comment ends with its line
        return f"{text}  # {where}" if where else text

    def prepared(self, node: fx.Node, ahead: bool = False) -> Iterator[str]:
        """The statement for what a kernel's call has in common with later ones, at the first of them."""
        module, device = _kernel(node)
        shared = getattr(module, "shared", None)
        if shared is None or device != "cpu" or shared.ahead != ahead:
            return
        given = arguments(node)
        read = [given[name] for name in shared.read]
        if not shared.worth(given) or set(_nodes(read)) & self.program.facts(written).keys():
            return
        sizes = [(str(v.dtype), *map(str, v.shape)) for v in (given[n].meta["val"] for n in shared.sized)]
        key = repr((node.target, node.meta.get("regions", ()), read, sizes))
        if key not in self.shared:
            name = self.shared[key] = self.local(f"shared_{node.target._opname}")
            made = self.constant(shared.made.__name__, self.maker(shared))
            words = [self.argument(given[n]) for n in (*shared.sized, *shared.read)]
            yield f"{name} = {made}({', '.join(words)})"
        self.takes[node] = self.shared[key]

    def maker(self, shared: Any) -> Any:
        """What makes a part that calls have in common."""
        return shared.made

    def delete(self, dead: list[fx.Node]) -> str:
        return f"; del {', '.join(self.names[n] for n in dead)}" if dead else ""

    def expression(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return self.constant(str(node.target), getattr(self.program.root, str(node.target)))
        if node.target in _OPERATORS:
            return _OPERATORS[node.target].format(*map(self.argument, node.args))
        if node.target is torch.ops.aten.sym_size.int:
            return f"{self.argument(node.args[0])}.shape[{node.args[1]}]"
        words = [self.argument(a) for a in node.args]
        words += [f"{k}={self.argument(v)}" for k, v in node.kwargs.items()]
        if node in self.takes:
            words.append(f"shared={self.takes[node]}")
        return f"{self.operator(node)}({', '.join(words)})"

    def operator(self, node: fx.Node) -> str:
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
            name = target._opname
            limit = _POSITIONAL.get(name, len(node.args))
            if (
                name in _BINDINGS
                and len(node.args) <= limit
                and _PLAIN_OVERLOADS.fullmatch(target._overloadname)
            ):
                return self.constant(name, _BINDINGS[name])
        return self.constant(re.sub(r"\W", "_", target_name(target)), self.lowered(node) or target)

    def lowered(self, node: fx.Node) -> Any:
        """What one of our kernels is called by, if not by its operator.

        On the CPU `direct` of its module: torch's own operators, past the dispatcher. On a GPU `fastest()`,
        one for the program: it chooses between the kernel and its peers by measurement.
        """
        module, device = _kernel(node)
        if device == "cpu":
            return getattr(module, "direct", None)
        if device != "cuda" or not hasattr(module, "fastest"):
            return None
        name = str(node.target)
        if name not in self.choices:
            self.choices[name] = module.fastest()
        return self.choices[name]

    def argument(self, arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return self.names[arg]
        if isinstance(arg, list):
            return f"[{', '.join(map(self.argument, arg))}]"
        if isinstance(arg, tuple):
            return f"({', '.join(map(self.argument, arg))}{',' if len(arg) == 1 else ''})"
        if isinstance(arg, slice):
            return f"slice({', '.join(map(self.argument, (arg.start, arg.stop, arg.step)))})"
        if isinstance(arg, float) and not math.isfinite(arg):
            return f'float("{arg}")'
        if isinstance(arg, torch.device):
            return self.constant(f"device_{arg.type}", arg)
        if arg is None or isinstance(arg, (bool, int, float, complex, str)):
            return repr(arg)
        if isinstance(arg, (torch.dtype, torch.layout, torch.memory_format)):
            return str(arg)
        return self.constant("value", arg)

    # -- checks -----------------------------------------------------------------------------

    def accepts(self, inputs: list[str]) -> Iterator[str]:
        yield f"def accepts({', '.join(inputs)}):"
        read: dict[str, str] = {}
        conditions: list[str] = []
        for name, given in zip(self.inputs, inputs, strict=True):
            val = self.program.placeholder(name).meta["val"]
            yield f"    {given}_shape = {given}.shape"
            conditions += self.tensor_conditions(name, given, val)
            at = self.program.inputs.index(name)
            read |= {s: f"{given}_shape[{d}]" for s, (i, d) in self.program.sizes.items() if i == at}
        ranks = [c for c in conditions if c.startswith("len(")]
        yield f"    if not ({' and '.join(ranks) or 'True'}):"
        yield "        return False"
        for symbol, text in read.items():
            yield f"    {symbol} = {text}"
        rest = [c for c in conditions if c not in ranks]
        rest += [
            f"({g})" if re.search(r"\b(or|if)\b", g) else g for g in self.program.guards if _is_condition(g)
        ]
        yield f"    return {' and '.join(rest) or 'True'}"

    def fits(self) -> Iterator[str]:
        """Whether the module's state still is what was captured: dtypes, and what is tied."""
        yield "def fits():"
        # One tensor a module is enough to notice a cast; operators refuse mixed dtypes by themselves.
        firsts = {read.partition("[")[0]: (read, dtype) for read, dtype in reversed(self.read.items())}
        conditions = [f"{read}.dtype is {dtype}" for read, dtype in firsts.values()]
        for first, *others in self.program.ties:
            conditions += [f"{self.entry(n)} is {self.entry(first)}" for n in others]
        yield f"    return {' and '.join(conditions) or 'True'}"

    def tensor_conditions(self, name: str, given: str, val: Tensor) -> Iterator[str]:
        yield f"len({given}_shape) == {val.dim()}"
        yield f"{given}.dtype is {val.dtype}"
        yield f"{given}.device == {self.argument(val.device)}"
        for d, size in enumerate(val.shape):
            symbol = expr(size)
            if self.program.sizes.get(str(symbol)) != (self.program.inputs.index(name), d):
                yield f"{given}_shape[{d}] == {PythonPrinter().doprint(symbol)}"
        if val.dim() > 1:
            yield f"{given}.is_contiguous() is {name in self.program.contiguous}"


def _kernel(node: fx.Node) -> tuple[Any, str]:
    """The module of the kernel of ours that a node calls, and the type of its device; None and "" if none."""
    target, val = node.target, node.meta.get("val")
    first = val[0] if isinstance(val, (tuple, list)) and val else val
    if getattr(target, "namespace", "") != "fxaccel" or not is_tensor(first):
        return None, ""
    try:
        module = importlib.import_module(f"fxaccel.kernels.{target._opname}")
    except ModuleNotFoundError:
        return None, ""
    shared = getattr(module, "shared", None)
    if not isinstance(first, Tensor) and (shared is None or not shared.ahead):
        return None, ""  # some look at sizes that a loaded graph does not hold
    return module, first.device.type


def _nodes(value: Any) -> list[fx.Node]:
    return [a for a in pytree.tree_leaves(value) if isinstance(a, fx.Node)]


def _is_condition(guard: str) -> bool:
    return re.fullmatch(r"[\w\s+\-*/%<>=!().,]+", guard) is not None


def indented(lines: list[str]) -> list[str]:
    """The lines one level further in."""
    return [f"    {line}" for line in lines]
