"""The way from a softmax down to the product of q and k: what is done to the scores, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxaccel.indexing import ZERO, Const, Read, Value, dimension, negation
from fxaccel.ir import arguments, is_call, target_name
from fxaccel.passes._attention_terms import MINUS_INFINITY, Fill, Term, as_number
from fxaccel.reading import Reader
from fxaccel.rule import Refusal

aten = torch.ops.aten


@dataclass
class Scores:
    """The way from a softmax down to the product: what it passed, in terms of (b, h, q, k)."""

    reader: Reader
    at: tuple[Value, ...]
    factor: float = 1.0
    cap: float = 0.0
    fills: list[Fill] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    factors: list[tuple[fx.Node, bool]] = field(default_factory=list)
    clamped: bool = False
    core: list[fx.Node] = field(default_factory=list)
    why: str = ""

    def descend(self, node: fx.Node) -> fx.Node | None:
        """The product below `node`, None (with `why`) where something else stands in the way."""
        while not is_call(node, aten.matmul.default):
            step = _STEPS.get(node.target) if node.op == "call_function" else None
            if step is None:
                self.why = f"{named(node)} stands between the product of q and k and the softmax"
                return None
            self.core.append(node)
            below = step(self, node, arguments(node))
            if below is None:
                self.why = (
                    self.why or f"{named(node)} is applied to the scores in a way that is not attention's"
                )
                return None
            node = below
        self.core.append(node)
        return node

    def added(self, y: Any, sign: float = 1.0) -> bool:
        """Take in a term."""
        if self.cap:
            self.why = "a bias is added before the softcap"
            return False
        if self.factors:
            self.why = f"a bias is multiplied by a tensor, {named(self.factors[-1][0])}"
            return False
        factor = self.factor * sign
        if not isinstance(y, fx.Node):
            return True if y == 0 else self._shift()
        self.terms.append(Term(element(self.reader, y, self.at), untouched(y, self.at), factor))
        return True

    def scaled(self, y: fx.Node, divided: bool = False) -> bool:
        """Take in a factor that is a tensor: it can go into q if it is the same for all keys."""
        val = y.meta["val"]
        if self.cap:
            self.why = "scores are multiplied by a tensor before the softcap"
        elif val.dim() and dimension(val.shape[-1]) != 1:
            self.why = f"the scores are multiplied by a tensor, {named(y)}, that differs from key to key"
        elif len(self.at) != val.dim() and val.dim() > len(self.at):
            self.why = "the scores are multiplied by a tensor of more dimensions"
        else:
            self.factors.append((y, divided))
            return True
        return False

    def _shift(self) -> bool:
        self.why = Refusal("a number is added to the scores", "the scores alone, whose softmax is the same")
        return False

    def filled(self, keep: Value, whole: Value, fill: Any) -> bool:
        """Take in a replacement of scores by a number."""
        if isinstance(fill, fx.Node):
            fill = as_number(element(self.reader, fill, self.at))
        if fill is None:
            self.why = Refusal("masked scores are replaced by a tensor", MINUS_INFINITY)
            return False
        fill = float(fill) * self.factor
        if self.cap:
            self.why = "a mask lies before the softcap"
            return False
        if not fill <= -1e8:
            why = f"masked scores become {fill:g}, which a score that is seen may fall below"
            self.why = Refusal(why, MINUS_INFINITY)
            return False
        self.fills.append(Fill(keep, fill, False, whole))
        return True


def named(node: Any) -> str:
    if not isinstance(node, fx.Node):
        return repr(node)
    return target_name(node.target) if node.op == "call_function" else f"%{node.name}"


def leads_to_product(node: Any, depth: int = 40) -> bool:
    """Whether a product of q and k lies below, through steps that are understood."""
    while isinstance(node, fx.Node) and node.op == "call_function" and depth:
        if node.target is aten.matmul.default:
            return True
        if node.target not in _STEPS:
            return False
        below = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        below = [n for n in below if n.meta["val"].dim() >= 2]
        if len(below) != 1:
            return any(leads_to_product(n, depth - 1) for n in below)
        node, depth = below[0], depth - 1
    return False


def chain(node: Any) -> Iterator[fx.Node]:
    """The nodes from here down to the product of q and k, as far as the steps are understood."""
    while isinstance(node, fx.Node):
        yield node
        if node.target is aten.matmul.default or node.target not in _STEPS:
            return
        node = next((n for n in node.all_input_nodes if leads_to_product(n)), None)


def _scores_like(x: Any, node: fx.Node) -> bool:
    if not isinstance(x, fx.Node):
        return False
    a, b = x.meta["val"].shape, node.meta["val"].shape
    return list(map(dimension, a)) == list(map(dimension, b))


def element(reader: Reader, node: fx.Node, at: Sequence[Value]) -> Value:
    """The node's element, indices aligned at the right as in broadcasting."""
    return reader.read(node, at[len(at) - node.meta["val"].dim() :])


def untouched(node: fx.Node, at: Sequence[Value]) -> Value:
    """The same without a look inside."""
    shape = node.meta["val"].shape
    at = at[len(at) - len(shape) :]
    return Read(node, tuple(ZERO if dimension(s) == 1 else i for s, i in zip(shape, at, strict=True)))


def _add(s: Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    x, y = a["self"], a["other"]
    if not _scores_like(x, node) or not leads_to_product(x):
        x, y = y, x
    if not _scores_like(x, node) or a.get("alpha", 1) != 1:
        return None
    return x if s.added(y) else None


def _sub(s: Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    x, y = a["self"], a["other"]
    if not _scores_like(x, node) or a.get("alpha", 1) != 1:
        return None
    return x if s.added(y, -1.0) else None


def _mul(s: Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    x, y = a["self"], a["other"]
    if not isinstance(y, fx.Node):
        s.factor *= float(y)
        return x
    if not (_scores_like(x, node) and leads_to_product(x)):
        x, y = y, x
    return x if _scores_like(x, node) and s.scaled(y) else None


def _div(s: Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    x, y = a["self"], a["other"]
    if not isinstance(y, fx.Node):
        s.factor /= float(y)
        return x
    return x if _scores_like(x, node) and s.scaled(y, divided=True) else None


def _neg(s: Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    s.factor = -s.factor
    return a["self"]


def _maximum(s: Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    x, y = a["self"], a["other"]
    if not _scores_like(x, node):
        x, y = y, x
    least = element(s.reader, y, s.at) if isinstance(y, fx.Node) else None
    if not (_scores_like(x, node) and isinstance(least, Const) and least.value <= -1e30):
        return None
    s.clamped = True
    return x


def _tanh(s: Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    if s.cap:
        s.why = "the scores are capped twice"
        return None
    s.cap = abs(s.factor)
    return a["self"] if s.cap else None


def _where(s: Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    condition, x, fill = a["condition"], a["self"], a["other"]
    keep, whole = element(s.reader, condition, s.at), untouched(condition, s.at)
    if not (isinstance(x, fx.Node) and _scores_like(x, node) and leads_to_product(x)):
        x, fill, keep, whole = fill, x, negation(keep), negation(whole)
    if not (isinstance(x, fx.Node) and _scores_like(x, node)):
        return None
    return x if s.filled(keep, whole, fill) else None


def _masked_fill(s: Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    keep, whole = (negation(f) for f in (element(s.reader, a["mask"], s.at), untouched(a["mask"], s.at)))
    return a["self"] if _scores_like(a["self"], node) and s.filled(keep, whole, a["value"]) else None


def _cast(s: Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    return a["self"] if node.meta["val"].dtype.is_floating_point else None


def _view(s: Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    source = a["self"]
    into = tuple(map(dimension, source.meta["val"].shape))
    moved = s.reader.reshaped(tuple(map(dimension, node.meta["val"].shape)), into, s.at)
    if moved is None:
        s.why = "the scores are reshaped on the way to the softmax"
        return None
    s.at = moved
    return source


_STEPS = {
    aten.add.Tensor: _add, aten.sub.Tensor: _sub, aten.mul.Tensor: _mul, aten.div.Tensor: _div,
    aten.neg.default: _neg,
    aten.tanh.default: _tanh, aten.maximum.default: _maximum,
    aten.where.self: _where, aten.where.ScalarOther: _where, aten.where.ScalarSelf: _where,
    aten.masked_fill.Scalar: _masked_fill, aten.to.dtype: _cast, aten.reshape.default: _view,
    aten.contiguous.default: lambda s, node, a: a["self"],
    aten.clone.default: lambda s, node, a: a["self"],
}  # fmt: skip
