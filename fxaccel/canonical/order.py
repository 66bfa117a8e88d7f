"""The order of operands and of nodes, equal values made one, and names: what makes the listing unique."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from fxaccel import ir
from fxaccel.canonical.editor import Editor, aten
from fxaccel.canonical.storage import Storage, follows
from fxaccel.canonical.values import is_dense, same_strides
from fxaccel.effects import has_effect, is_pure, mutated_arguments
from fxaccel.ir import Program, target_name

COMMUTING = {
    aten.add.Tensor, aten.mul.Tensor, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor,
    aten.bitwise_xor.Tensor, aten.eq.Tensor, aten.ne.Tensor, aten.maximum.default, aten.minimum.default,
}  # fmt: skip


# -- equal values ----------------------------------------------------------------------------------


def merge_equal(e: Editor) -> int:
    """Make one of pure nodes that compute the same from the same in the same regions; how many went."""
    seen: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(e.graph.nodes):
        if node.op not in ("call_function", "get_attr") or e.storage.frozen(node):
            continue
        if not is_pure(node.target) and has_effect(node):
            continue
        key: Any = (node.op, node.target, _key(node.args), _key(node.kwargs), node.meta.get("regions", ()))
        if node.target is aten.sym_size.int:  # whichever tensor has it
            key = (node.target, ir.expr(node.meta["val"]), node.meta.get("regions", ()))
        first = seen.setdefault(key, node)
        if first is not node and e.forward(node, first) is not None:
            e.replace(node, first)
            merged += 1
    return merged


def _key(arg: Any) -> Any:
    """A hashable that is equal for equal arguments, 1 and 1.0 and True apart."""
    if isinstance(arg, (list, tuple)):
        return tuple(map(_key, arg))
    if isinstance(arg, dict):
        return tuple((k, _key(v)) for k, v in sorted(arg.items()))
    if isinstance(arg, (bool, int, float, complex)):
        return type(arg), repr(arg)
    return arg


# -- operands --------------------------------------------------------------------------------------


class Keys:
    """What each node is, apart from its name: hashes of its cone, and who depends on whom."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.hashes: dict[fx.Node, str] = {}
        self.local: dict[fx.Node, tuple[str, ...]] = {}
        self.ancestors: dict[fx.Node, int] = {}
        for i, node in enumerate(program.graph.nodes):
            self.add(i, node)

    def add(self, i: int, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        text = self.text(node, self.hashes)
        self.hashes[node] = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        mask = 1 << i
        for n in inputs:
            mask |= self.ancestors[n]
        self.ancestors[node] = mask
        self.local[node] = (_shallow(node), *(_shallow(n) for n in inputs))

    def text(self, node: fx.Node, names: dict[fx.Node, str]) -> str:
        """The node with its operands replaced by their hashes."""
        if node.op == "placeholder":
            slot = self.program.state.get(node.name)
            if slot is None:
                return f"input {self.program.inputs.index(node.name)}"
            return f"{slot.kind} {slot.name}"
        if node.op != "call_function":
            return f"{node.op} {node.target}"
        words = [_text(a, names) for a in node.args]
        if node.target in COMMUTING:
            words.sort()
        words += [f"{k}={_text(v, names)}" for k, v in sorted(node.kwargs.items())]
        return f"{target_name(node.target)} {' '.join(words)}"

    def precedes(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether `a` is the first of two commuting operands."""
        ka, kb = self.rank(a), self.rank(b)
        if ka != kb:
            return ka < kb
        if self.ancestors[a] != self.ancestors[b]:
            if self.ancestors[b] | self.ancestors[a] == self.ancestors[b]:
                return True
            if self.ancestors[b] | self.ancestors[a] == self.ancestors[a]:
                return False
        return (self.local[a], self.hashes[a]) <= (self.local[b], self.hashes[b])

    def rank(self, node: fx.Node) -> tuple[int, ...]:
        """Computed values before state, more dimensions before fewer, few operands before many."""
        val = node.meta.get("val")
        dims, broadcast = 0, 0
        if isinstance(val, Tensor):
            dims = val.dim()
            broadcast = sum(isinstance(s, int) and s == 1 for s in val.shape)
        return (node.op == "placeholder" and node.name in self.program.state, -dims, broadcast)


def _shallow(node: fx.Node) -> str:
    """The operator, those of one tensor first."""
    if node.op != "call_function":
        return "2" + node.op
    return f"{int(len(node.all_input_nodes) > 1)} {target_name(node.target)}"


def _text(arg: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(arg, fx.Node):
        return names[arg]
    if isinstance(arg, (list, tuple)):
        return f"[{','.join(_text(a, names) for a in arg)}]"
    return repr(arg)


def sort_operands(e: Editor) -> int:
    """Put commuting operands in order; how many calls changed."""
    keys = Keys(e.program)
    changed = 0
    for node in e.graph.nodes:
        if node.op != "call_function" or node.target not in COMMUTING or node.kwargs or len(node.args) != 2:
            continue
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b or keys.precedes(a, b):
            continue
        if not all(is_dense(n.meta["val"]) for n in (a, b) if isinstance(n.meta["val"], Tensor)):
            turned = e.value(node, node.target, (b, a), {})
            if not same_strides(turned, node.meta["val"]):
                continue  # where layouts differ, the first operand decides on that of the result
        node.args = (b, a)
        changed += 1
    return changed


def lay_out(e: Editor) -> int:
    """Bring strides in `meta["val"]` up to date behind the edits that changed a layout; how many changed."""
    changed: set[fx.Node] = set()
    for node in e.graph.nodes if e.relaid else ():
        if not changed.intersection(node.all_input_nodes) or not follows(node.target):
            changed.update({node} & e.relaid)
            continue
        new = e.value(node, node.target, node.args, dict(node.kwargs))
        pairs = zip(ir.tensors(new), ir.tensors(node.meta["val"]), strict=True)
        if node in e.relaid or not all(same_strides(a, b) for a, b in pairs):
            node.meta["val"] = new
            changed.add(node)
    e.relaid.clear()
    return len(changed)


# -- nodes -----------------------------------------------------------------------------------------


def schedule(program: Program) -> bool:
    """Put the nodes in the order in which the outputs ask for them; whether anything moved.

    Effects keep their order among themselves and against readers and writers of the storage they touch,
    and the nodes of a region stay together.
    """
    graph = program.graph
    nodes = list(graph.nodes)
    body = [n for n in nodes if n.op not in ("placeholder", "output")]
    needs = _needs(program, body)
    tops = [n for n in body if _is_size(n)]
    tops.sort(key=lambda n: _size_order(program, n))
    roots = [*tops, *nodes[-1].all_input_nodes, *(n for n in body if has_effect(n)), *body]
    order = _arranged(body, needs, roots, 0)
    if order == body:
        return False
    output = nodes[-1]
    for node in order:
        output.prepend(node)
    return True


def _is_size(node: fx.Node) -> bool:
    """Whether the node is arithmetic on sizes of inputs, outside of every region."""
    if not isinstance(node.meta.get("val"), torch.SymInt) or node.meta.get("regions"):
        return False
    inputs = node.all_input_nodes
    return all(i.op == "placeholder" or isinstance(i.meta.get("val"), torch.SymInt) for i in inputs)


def _size_order(program: Program, node: fx.Node) -> tuple[Any, ...]:
    """Sizes of inputs first, by input and dimension."""
    if node.target is not aten.sym_size.int or getattr(node.args[0], "name", None) not in program.inputs:
        return (1,)
    return (0, program.inputs.index(node.args[0].name), node.args[1])


def _needs(program: Program, body: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """What has to come before each node: its operands, and for effects what touched their storage."""
    storage = Storage(program)
    needs = {n: [i for i in n.all_input_nodes if i.op != "placeholder"] for n in body}
    last_effect: fx.Node | None = None
    writers: dict[fx.Node, fx.Node] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in body:
        if storage.last_write:
            touched = {storage.root(n) for n in (node, *node.all_input_nodes)} & set(storage.last_write)
            written = {storage.root(n) for n in mutated_arguments(node)}
            for root in touched:
                needs[node] += [writers[root]] if root in writers else []
                if root in written:
                    needs[node] += readers.pop(root, [])
                    writers[root] = node
                else:
                    readers.setdefault(root, []).append(node)
        if has_effect(node):
            if last_effect is not None:
                needs[node].append(last_effect)
            last_effect = node
    return needs


def _arranged(
    body: list[fx.Node], needs: dict[fx.Node, list[fx.Node]], roots: Iterable[fx.Node], depth: int
) -> list[fx.Node]:
    """`body` in depth-first order from `roots`, consecutive nodes of one region at `depth` as one unit."""
    unit: dict[fx.Node, int] = {}
    units: list[list[fx.Node]] = []
    last: Any = None
    for node in body:
        regions = node.meta.get("regions", ())
        region = regions[depth] if len(regions) > depth else None
        if region is None or not units or region != last:
            units.append([])
        units[-1].append(node)
        unit[node] = len(units) - 1
        last = region
    order: list[fx.Node] = []
    done: set[int] = set()
    for start in roots:
        if start in unit and unit[start] not in done:
            _visit(unit[start], units, unit, needs, done, order, depth)
    return order


def _visit(
    start: int, units: list[list[fx.Node]], unit: dict[fx.Node, int], needs: dict[fx.Node, list[fx.Node]],
    done: set[int], order: list[fx.Node], depth: int,
) -> None:  # fmt: skip
    def wanted(u: int) -> Iterable[int]:
        return iter([unit[n] for node in units[u] for n in needs[node] if n in unit and unit[n] != u])

    stack = [(start, wanted(start))]
    done.add(start)
    while stack:
        u, pending = stack[-1]
        for v in pending:
            if v not in done:
                done.add(v)
                stack.append((v, wanted(v)))
                break
        else:
            stack.pop()
            members = units[u]
            if len(members) > 1:
                inside = set(members)
                last = [n for n in members if not any(user in inside for user in n.users)]
                members = _arranged(members, needs, [*last, *members], depth + 1)
            order += members


# -- names -----------------------------------------------------------------------------------------


def rename(program: Program) -> None:
    """Name every call after its operator, numbered in order, so that equal programs have equal text."""
    graph = program.graph
    calls = [n for n in graph.nodes if n.op == "call_function"]
    counts: dict[str, int] = {n.name: 0 for n in graph.nodes if n.op != "call_function"}
    wanted = []
    for node in calls:
        name = str(getattr(node.target, "_opname", "") or getattr(node.target, "__name__", "call")).strip("_")
        count = counts.get(name, -1) + 1
        counts[name] = count
        wanted.append(f"{name}_{count}" if count else name)
    if [n.name for n in calls] == wanted:
        return
    taken = {n.name for n in graph.nodes if n.op != "call_function"}
    for i, node in enumerate(calls):
        node.name = f"_canonical_{i}"
    for node, name in zip(calls, wanted, strict=True):
        while name in taken:
            name += "_"
        taken.add(name)
        node.name = name
