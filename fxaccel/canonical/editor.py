"""What the steps of the canonical form share: safe edits of a program, and questions about its values.

A step asks `at(node, target)` before it looks through a node, and builds with `call`. It never has to
think about storage: nodes whose storage is written later are opaque (`frozen`), and `forward` declines
where an output would become an alias that it was not before.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxaccel import ir
from fxaccel.canonical.storage import Storage, follows
from fxaccel.canonical.values import describe, is_dense, is_tensor, same_strides
from fxaccel.effects import has_effect, is_random
from fxaccel.ir import Program, expr, is_call

aten = torch.ops.aten
BY = "canonicalize"
Shape = tuple[sympy.Expr, ...]
Step = Callable[["Editor", fx.Node], fx.Node | None]

STEPS: dict[Any, list[Step]] = {}
ORDER: list[Step] = []
UNDER_AUTOCAST: set[Step] = set()


def on(*targets: Any, autocast: bool = False) -> Callable[[Step], Step]:
    """Register a step for calls of `targets`; `autocast` says that it also holds under autocast.

    A step returns the node that takes the place of its argument, the argument itself where it changed
    that in place, or None where there is nothing to do.
    """

    def register(step: Step) -> Step:
        ORDER.append(step)
        if autocast:
            UNDER_AUTOCAST.add(step)
        for target in targets:
            STEPS.setdefault(target, []).append(step)
        return step

    return register


class Editor:
    """A program under rewriting: `node` is the one the running step was called for."""

    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, program.graph
        self.storage = Storage(program)
        self.regions: tuple[ir.Region, ...] = ()
        self.done: set[fx.Node] = set()  # nodes whose arguments are known to be in normal form
        self.counts: Counter[str] = Counter()
        self.late = False  # whether nothing is left to do but what would hide from steps what they look for
        self.relaid: set[fx.Node] = set()  # nodes laid out otherwise than what they took the place of
        self.remade: set[fx.Node] = set()  # nodes with an effect that stand again elsewhere
        self._shapes: dict[int, tuple[Any, Shape]] = {}
        self._values: dict[Any, Any] = {}
        self._numbers: dict[fx.Node, Tensor | None] = {}
        self._from_state: dict[fx.Node, bool] = {}
        self._sizes: dict[sympy.Expr, fx.Node] = {}
        self._adopt_sizes()

    def refresh(self) -> None:
        """Recompute what edits have made needlessly cautious."""
        self.program.changed()
        self.storage = Storage(self.program)
        self._numbers.clear()
        self._from_state.clear()

    # -- looking ----------------------------------------------------------------------------------

    def at(self, node: Any, *targets: Any) -> bool:
        """Whether `node` calls one of `targets` in the present regions and may be looked through."""
        return (
            is_call(node, *targets)
            and node.meta.get("regions", ()) == self.regions
            and not self.storage.frozen(node)
        )

    def once(self, node: Any, *targets: Any) -> bool:
        """`at`, and nothing but one node reads it."""
        return self.at(node, *targets) and len(node.users) == 1

    def shape(self, node: fx.Node) -> Shape:
        """Sizes of the tensor that `node` computes, as expressions."""
        return self.shape_of(node.meta["val"])

    def shape_of(self, val: Tensor) -> Shape:
        known = self._shapes.get(id(val))
        if known is None:
            known = self._shapes[id(val)] = (val, tuple(expr(s) for s in val.shape))
        return known[1]

    def arguments(self, node: fx.Node) -> Iterable[Any]:
        """Every argument of an operator call, in the order of its schema."""
        return ir.arguments(node).values()

    def from_state(self, node: fx.Node) -> bool:
        """Whether the value depends on parameters, buffers and constants alone."""
        pending = [node]
        while pending:
            n = pending[-1]
            inputs = n.all_input_nodes
            if n in self._from_state:
                pending.pop()
            elif n.op == "placeholder" or not inputs or is_random(n):
                self._from_state[n] = n.op == "placeholder" and n.name in self.program.state
            elif unknown := [i for i in inputs if i not in self._from_state]:
                pending += unknown
            else:
                self._from_state[n] = all(self._from_state[i] for i in inputs)
        return self._from_state[node]

    def grad_on(self, node: fx.Node) -> bool:
        """Whether gradients are enabled where the node stands."""
        inner = [r for r in node.meta.get("regions", ()) if r.kind == "grad"]
        return bool(inner[-1].args[0]) if inner else self.program.grad

    def grad_free(self, node: fx.Node, limit: int = 200) -> bool:
        """Whether the value is computed from integers, buffers and constants alone."""
        seen, pending = {node}, [node]
        while pending:
            n = pending.pop()
            val = n.meta.get("val")
            if isinstance(val, (torch.SymInt, int)):
                continue
            if isinstance(val, Tensor) and not val.dtype.is_floating_point and not val.dtype.is_complex:
                continue
            slot = self.program.state.get(n.name) if n.op == "placeholder" else None
            if n.op == "placeholder" and (slot is None or slot.kind == "parameter"):
                return False
            pending += [i for i in n.all_input_nodes if i not in seen]
            seen.update(n.all_input_nodes)
            if len(seen) > limit:
                return False
        return True

    def number(self, arg: Any) -> float | int | None:
        """The number that an argument is, or that a constant 0-d tensor holds."""
        if isinstance(arg, (int, float)) and not isinstance(arg, bool):
            return arg
        if not is_tensor(arg) or arg.meta["val"].dim() != 0:
            return None
        constant = self._constant(arg, 4)
        return None if constant is None or constant.dtype is torch.bool else constant.item()

    def _constant(self, node: fx.Node, depth: int) -> Tensor | None:
        if node in self._numbers:
            return self._numbers[node]
        value = None
        if self.storage.root(node) in self.storage.last_write or not depth:
            return None
        if node.op == "placeholder":
            slot = self.program.state.get(node.name)
            if slot is not None and slot.kind == "constant" and slot.name.startswith(_LIFTED):
                value = self.program.constants[slot.name]
        elif node.target in _CONSTANT_OPS and node.meta["val"].device.type == "cpu":
            known = {n: self._constant(n, depth - 1) for n in node.all_input_nodes}
            if all(k is not None and k.device.type == "cpu" for k in known.values()):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
                value = node.target(*args, **kwargs)
        self._numbers[node] = value
        return value

    def like(self, x: fx.Node) -> Tensor | None:
        """The value of an elementwise operator of `x` that keeps its dtype, None where only a run tells."""
        val = x.meta["val"]
        return val if is_dense(val) else None

    # -- building ---------------------------------------------------------------------------------

    def call(self, like: fx.Node, target: Any, *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
        """A new call before `like`, which lends its provenance; run on fakes if `val` is not known."""
        if val is None:
            val = self.value(like, target, args, kwargs)
        with self.graph.inserting_before(like):
            return ir.call(self.graph, like, target, args, kwargs, by=BY, val=val)

    def value(self, like: fx.Node, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The fake result of a call, run once for all operands of equal type and layout."""
        described = describe([args, kwargs])
        key = (target, described, like.meta.get("regions", ()))
        if key not in self._values:
            with ir.unguarded(self.graph):
                self._values[key] = ir.fake_result(self.graph, like, target, args, kwargs)
        return self._values[key]

    def forward(self, node: fx.Node, to: fx.Node) -> fx.Node | None:
        """`to` for the place of `node`, None where an output would newly be an alias."""
        storage = self.storage
        a, b = storage.root(node), storage.root(to)
        if a is b:
            return to
        if a in storage.escaping and (b in storage.external or b in storage.escaping):
            return None
        storage.unite(node, to)
        return to

    def exposed(self, node: fx.Node) -> bool:
        """Whether the value may be, or share storage with, an output of the model."""
        return self.storage.root(node) in self.storage.escaping

    def shown(self, node: fx.Node, new: fx.Node) -> bool:
        """Whether an output would be laid out otherwise with `new` in the place of `node`."""
        old, val = node.meta.get("val"), new.meta.get("val")
        if not isinstance(old, Tensor) or not isinstance(val, Tensor) or old is val:
            return False
        if same_strides(old, val):
            return False
        wide = new.target is aten.expand.default  # whose strides of 0 an elementwise reader does not follow
        seen, pending = {node}, [node]
        while pending:
            for user in pending.pop().users:
                if user.op == "output":
                    return True
                if user not in seen and follows(user.target) and not (wide and _is_elementwise(user.target)):
                    seen.add(user)
                    pending.append(user)
        return False

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Put `new` in the place of `node` and erase what nothing reads any more."""
        old, val = node.meta.get("val"), new.meta.get("val")
        both = isinstance(old, Tensor) and isinstance(val, Tensor) and old is not val
        if both and not same_strides(old, val):
            self.relaid.add(new)
        node.replace_all_uses_with(new)
        self.erase(node)

    def erase(self, node: fx.Node) -> None:
        """Erase a node that nothing reads, and whatever was only there for it."""
        pending = [node]
        while pending:
            dead = pending.pop()
            if dead._erased or dead.users or dead.op == "placeholder":
                continue
            inputs = dead.all_input_nodes
            self.graph.erase_node(dead)
            pending += [n for n in inputs if not n.users and (n in self.remade or not has_effect(n))]

    # -- sizes ------------------------------------------------------------------------------------

    def _adopt_sizes(self) -> None:
        """Know the size nodes that stand at the top of the graph already."""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                continue
            val = node.meta.get("val")
            if not isinstance(val, torch.SymInt):
                break
            where = self.program.sizes.get(str(expr(val)))
            source = None if where is None else self.program.inputs[where[0]]
            first = node.args[0]
            if node.target is aten.sym_size.int and source == getattr(first, "name", first):
                if where is not None and node.args[1] == where[1]:
                    self._sizes.setdefault(expr(val), node)
            elif node.meta.get("by") == BY:
                self._sizes.setdefault(expr(val), node)

    def sizes(self, shape: Sequence[sympy.Expr], *, infer: bool = True) -> list[Any] | None:
        """Canonical arguments for a shape, None where one of its sizes is nowhere in the graph.

        Fixed sizes are numbers. A size that varies is -1 where it is the only one (and `infer`), else its
        node; at most one size without a node may be -1.
        """
        out: list[Any] = [int(s) if s.is_Integer else None for s in shape]
        varying = [i for i, s in enumerate(out) if s is None]
        if infer and len(varying) == 1 and 0 not in out:
            out[varying[0]] = -1
            return out
        for i in varying:
            out[i] = self.size(shape[i])
        missing = [i for i in varying if out[i] is None]
        if missing and (not infer or len(missing) > 1 or 0 in out):
            return None
        for i in missing:
            out[i] = -1
        return out

    def size(self, size: sympy.Expr) -> fx.Node | None:
        """The node at the top of the graph that computes a size, None where it cannot be made there."""
        known = self._sizes.get(size)
        if known is not None and not known._erased:
            return known
        if size.is_Symbol:
            node = self._input_size(size)
        elif isinstance(size, (sympy.Mul, sympy.Add)):
            node = self._composite_size(size)
        else:
            node = None
        if node is not None:
            self._sizes[size] = node
        return node

    def drop_idle_sizes(self) -> None:
        """Erase size nodes that a step asked for and did not use after all."""
        for node in reversed(self._sizes.values()):
            if not node._erased and not node.users:
                self.graph.erase_node(node)

    def _input_size(self, symbol: sympy.Symbol) -> fx.Node | None:
        where = self.program.sizes.get(str(symbol))
        if where is None or self.program.inputs[where[0]] is None:
            return None
        source = self.program.placeholder(self.program.inputs[where[0]])  # type: ignore[arg-type]
        return self._top(aten.sym_size.int, (source, where[1]), source.meta["val"].shape[where[1]])

    def _composite_size(self, size: sympy.Expr) -> fx.Node | None:
        combine = operator.mul if isinstance(size, sympy.Mul) else operator.add
        result: Any = None
        for part in sorted(size.args, key=lambda e: (e.is_Integer, self._rank(e), str(e))):
            term: Any = int(part) if part.is_Integer else self.size(part)
            if term is None:
                return None
            if result is None:
                result = term
                continue
            vals = [t.meta["val"] if isinstance(t, fx.Node) else t for t in (result, term)]
            result = self._top(combine, (result, term), combine(*vals))
        return result if isinstance(result, fx.Node) else None

    def _rank(self, size: sympy.Expr) -> list[tuple[int, int]]:
        """Order of sizes that does not depend on the names of symbols."""
        return sorted(self.program.sizes.get(str(s), (0, 0)) for s in size.free_symbols)

    def _top(self, target: Any, args: tuple[Any, ...], val: Any) -> fx.Node:
        for node in self._sizes.values():
            if not node._erased and node.target is target and node.args == args:
                return node
        last = None
        for node in self.graph.nodes:
            if node.op != "placeholder" and node not in self._tops():
                break
            last = node
        with self.graph.inserting_after(last):
            new = self.graph.call_function(target, args)
        new.meta = {"val": val, "path": "", "source": "", "regions": (), "by": BY}
        self._sizes.setdefault(expr(val), new)
        return new

    def _tops(self) -> set[fx.Node]:
        return {n for n in self._sizes.values() if not n._erased}


def _is_elementwise(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


_LIFTED = "lifted_tensor"  # export's name of a tensor that the forward made; others are the user's to change
_CONSTANT_OPS = {
    aten.lift_fresh_copy.default, aten.detach.default, aten.clone.default, aten.sqrt.default,
    aten.rsqrt.default, aten.reciprocal.default, aten.neg.default, aten.log.default, aten.exp.default,
    aten.scalar_tensor.default, aten.full.default, aten.to.dtype, aten._to_copy.default,
    aten.pow.Tensor_Scalar, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor,
}  # fmt: skip
