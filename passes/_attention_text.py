"""Masks and biases as the text of index expressions, and the tables that these read.

`Spelling` writes values in the language of fxaccel.kernels.attention; `Emitter` writes a value that has no
words there as graph code, over a grid of indices, to be read from a table.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from fxaccel.indexing import ZERO, Affine, Call, Const, Read, Value, reads, rebuilt, symbols
from fxaccel.passes._attention_terms import (
    COMPARISONS,
    B,
    D,
    H,
    K,
    Problem,
    Q,
    Table,
    Term,
    band,
    index_symbols,
    is_zero,
)  # fmt: skip
from fxaccel.rule import Ops

aten = torch.ops.aten


MAX_TABLES = 4


_NOT = ("bitwise_not", "logical_not")
_FORMS = {
    **{name: f"({{}} {sign} {{}})" for name, sign in COMPARISONS.items()},
    "add": "({} + {})",
    "sub": "({} - {})",
    "mul": "({} * {})",
    "neg": "(-{})",
    "floor_divide": "({} // {})",
    "remainder": "({} % {})",
    **dict.fromkeys(("bitwise_and", "logical_and"), "({} & {})"),
    **dict.fromkeys(("bitwise_or", "logical_or"), "({} | {})"),
    **dict.fromkeys(_NOT, "(~{})"),
}
_CALLS = {"minimum": "min", "maximum": "max", "abs": "abs", "where": "where"}


_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}


@dataclass
class Spelling:
    """Writes values as index expressions, and collects the tables they read."""

    p: Problem
    tables: list[Table] = field(default_factory=list)
    plain: list[bool] = field(default_factory=list)
    names: dict[Any, str] = field(default_factory=dict)

    def term(self, term: Term) -> tuple[str, str]:
        """An added term as text, and the words for it."""
        parts = [part for part in term.parts() if not is_zero(part)]
        if all(Spelling(self.p).part(part)[0] for part in parts):
            found = [self.part(part) for part in parts]
            return " + ".join(t for t, _ in found), ", ".join(k for _, k in found)
        return self.whole(term)

    def whole(self, term: Term) -> tuple[str, str]:
        """An added term as the tensor that holds it."""
        whole = term.whole
        if not (isinstance(whole, Read) and all(isinstance(i, Affine) for i in whole.at)):
            return "", "a tensor that cannot be read"
        return self.read(whole, term.factor), _tensor_kind(whole)

    def part(self, value: Value) -> tuple[str, str]:
        """A summand as text, "" where it has to stay a tensor, and the words for it."""
        plain = _one_read(value)
        if plain is not None and Spelling(self.p).spell(plain):
            return self.read(plain), _tensor_kind(plain)
        offset = relative(value)
        learns = any(r.node in self.p.learned for r in reads(value))
        if offset is not None and (learns or not Spelling(self.p).spell(value)):
            axes = (*(a for a in (B, H) if a.of in symbols(offset)), D)
            name = self.table(Table(offset, axes))
            spot = ", ".join([*(str(a.of) for a in axes if a is not D), "k - q + S - 1"])
            return f"{name}[{spot}]", "relative bias"
        return ("", "") if learns else (self.spell(value), "an additive index function")

    def spell(self, value: Any) -> str:
        """The value as text, "" where the language has no words for it."""
        if isinstance(value, Affine):
            return self.affine(value.of)
        if isinstance(value, Const):
            return _literal(value.value)
        if isinstance(value, Read):
            return self.read(value)
        if not isinstance(value, Call):
            return _literal(value) if isinstance(value, (int, float, bool)) else ""
        return self.call(value)

    def call(self, value: Call) -> str:
        name = value.target._opname
        if value.kwargs and value.kwargs != (("rounding_mode", "floor"),):
            return ""
        if value.target is aten.to.dtype:
            return self.cast(value)
        if name in COMPARISONS and isinstance(value.args[0], Affine) and value.args[1] == ZERO:
            return self.bound(value)
        parts = [self.spell(a) for a in value.args]
        if not all(parts) or (name in _NOT and not _truth(value.args[0])):
            return ""
        if name in _CALLS:
            return f"{_CALLS[name]}({', '.join(parts)})"
        form = "({} // {})" if name == "div" and value.kwargs else _FORMS.get(name, "")
        return form.format(*parts) if form.count("{}") == len(parts) else ""

    def cast(self, value: Call) -> str:
        inner = self.spell(value.args[0])
        if value.dtype is torch.bool:
            return inner and f"({inner} != 0)"
        return inner if value.dtype.is_floating_point else ""

    def bound(self, value: Call) -> str:
        """A linear expression compared with 0: indices on the left, the rest on the right."""
        limit = band(value)
        if limit is not None:
            edge = self.affine(Q.of + limit[1])
            return edge and f"(k {'<=' if limit[0] == 'high' else '>='} {bare(edge)})"
        name, e = value.target._opname, value.args[0].of
        left = sum((t for t in sympy.Add.make_args(e) if index_symbols(t)), ZERO.of)
        right = left - e
        if str(left).startswith("-"):
            left, right, name = -left, -right, _MIRRORED.get(name, name)
        sides = self.affine(left), self.affine(sympy.expand(right))
        return f"({sides[0]} {COMPARISONS[name]} {sides[1]})" if all(sides) else ""

    def affine(self, e: sympy.Expr) -> str:
        """An integer over q, k, b, h, S and T; "" where it reads another size."""
        p, s, t = self.p, sympy.Symbol("S"), sympy.Symbol("T")
        if not p.s.is_number:
            e = e.subs(p.s, s) if p.s.is_Symbol else e
        if not p.t.is_number and p.t != p.s:
            if p.t.is_Symbol:
                e = e.subs(p.t, t)
            else:
                more = p.t.free_symbols - p.s.free_symbols
                if len(more) == 1 and (x := next(iter(more))) in e.free_symbols:
                    (solved,) = sympy.solve(p.t.subs(p.s, s) - t, x) or (x,)
                    e = e.subs(x, solved)
        e = sympy.expand(e.subs(p.words))
        names = {str(x) for x in e.free_symbols} - {word.name for _, word in p.words if _spelled(word)}
        if not names <= {"b", "h", "q", "k", "S", "T"} or not e.is_polynomial():
            return ""
        return str(e) if e.is_Symbol or (e.is_number and e >= 0) else f"({e})"

    def read(self, value: Read, factor: float = 1.0) -> str:
        if not value.at:
            return ""
        at = [self.spell(i) if isinstance(i, Affine) else "" for i in value.at]
        if not all(at):
            return ""
        spots = [i for i in value.at if i != ZERO]
        plain = len(set(spots)) == len(spots) and all(i in (B, H, Q, K) for i in spots)
        name = self.table(Table(value.node, factor=factor), plain)
        return f"{name}[{', '.join(bare(i) for i in at)}]"

    def table(self, table: Table, plain: bool = True) -> str:
        if table not in self.names:
            self.names[table] = f"t{len(self.tables)}"
            self.tables.append(table)
            self.plain.append(plain)
        return self.names[table]


def bare(text: str) -> str:
    depth = 0
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if not depth:
            return text[1:-1] if text.startswith("(") and at == len(text) - 1 else text
    return text


def _spelled(word: sympy.Symbol) -> bool:
    """Whether the text holds numbers alone beside b: the language has no words for other sizes."""
    return not set(word.name) - set("b0123456789 /%()")


def _literal(x: Any) -> str:
    if isinstance(x, float) and not math.isfinite(x):
        return ""
    return repr(x)


def _truth(value: Any) -> bool:
    if isinstance(value, Read):
        return value.node.meta["val"].dtype is torch.bool
    return isinstance(value, Call) and value.dtype is torch.bool


def _one_read(value: Value) -> Read | None:
    """The read that an added value is, through casts to a floating dtype."""
    while isinstance(value, Call) and value.target is aten.to.dtype and value.dtype.is_floating_point:
        value = value.args[0]
    if not (isinstance(value, Read) and value.node.meta["val"].dtype.is_floating_point):
        return None
    plain = all(isinstance(i, Affine) and (i.of.is_Symbol or i == ZERO) for i in value.at)
    return value if plain else None


def _tensor_kind(value: Read) -> str:
    names = {str(s) for s in symbols(value)}
    if {"q", "k"} <= names:
        return "a bias tensor"
    return "a bias of keys" if "k" in names else "a bias of queries" if "q" in names else "a bias of heads"


def relative(value: Value) -> Value | None:
    """The value as a function of d = k - q, None where it is not."""
    ok = True

    def change(v: Value) -> Value:
        nonlocal ok
        if isinstance(v, Affine) and v.of.free_symbols & {Q.of, K.of}:
            slope = v.of.coeff(K.of)
            ok &= v.of.coeff(Q.of) == -slope
            return Affine(sympy.expand(v.of.subs({Q.of: 0, K.of: D.of})))
        return v

    changed = rebuilt(value, change)
    left = {x for x in symbols(changed) if x.name[0] in "bhqk"}
    return changed if ok and left <= {B.of, H.of} and D.of in symbols(changed) else None


class Emitter:
    """Writes a value as graph code over a grid of index symbols."""

    def __init__(self, op: Ops, q: fx.Node, k: fx.Node, axes: Sequence[Affine]) -> None:
        self.op, self.q, self.k, self.axes = op, q, k, tuple(axes)
        self.vectors: dict[sympy.Symbol, fx.Node] = {}

    def emit(self, value: Any) -> Any:
        """A node that broadcasts over the axes, or a number."""
        if isinstance(value, Affine):
            return self.affine(value.of)
        if isinstance(value, Const):
            return value.value
        if isinstance(value, Read):
            spots = [self.tensor(self.emit(i), torch.int64) for i in value.at]
            return self.op.aten.index.Tensor(value.node, spots)
        if not isinstance(value, Call):
            return value
        args = [self.emit(a) for a in value.args]
        return self.call(value, args)

    def call(self, value: Call, args: list[Any]) -> Any:
        name, op = value.target._opname, self.op.aten
        if value.target is aten.where.self:
            c, a, b = args
            dtype = value.dtype
            return op.where.self(c, self.tensor(a, dtype), self.tensor(b, dtype))
        if name in ("minimum", "maximum") or (name in COMPARISONS and not isinstance(args[0], fx.Node)):
            args = [self.tensor(a, value.dtype if name.endswith("imum") else torch.int64) for a in args]
        if name in COMPARISONS and not isinstance(args[1], fx.Node):
            return self.op(getattr(aten, name).Scalar, *args)
        return self.op(value.target, *args, **dict(value.kwargs))

    def tensor(self, value: Any, dtype: torch.dtype) -> fx.Node:
        if isinstance(value, fx.Node):
            return value
        device = self.q.meta["val"].device
        return self.op.aten.full.default([], value, dtype=dtype, device=device)

    def affine(self, e: sympy.Expr) -> Any:
        found: Any = None
        constant = e
        for axis in self.axes:
            slope = e.coeff(axis.of)
            if slope == 0:
                continue
            constant = constant - slope * axis.of
            part = self.vector(axis.of)
            if slope != 1:
                part = self.op.aten.mul.Tensor(part, int(slope))
            found = part if found is None else self.op.aten.add.Tensor(found, part)
        constant = sympy.expand(constant)
        if found is None:
            return int(constant)
        return found if constant == 0 else self.op.aten.add.Tensor(found, int(constant))

    def vector(self, symbol: sympy.Symbol) -> fx.Node:
        """The index along one axis, as an integer tensor of the grid's rank."""
        if symbol not in self.vectors:
            i = [a.of for a in self.axes].index(symbol)
            device = self.q.meta["val"].device
            start, end = self.span(symbol)
            if isinstance(start, int) and start == 0:
                made = self.op.aten.arange.default(end, device=device)
            else:
                made = self.op.aten.arange.start(start, end, device=device)
            for _ in range(len(self.axes) - 1 - i):
                made = self.op.aten.unsqueeze.default(made, len(made.meta["val"].shape))
            self.vectors[symbol] = made
        return self.vectors[symbol]

    def span(self, symbol: sympy.Symbol) -> tuple[Any, Any]:
        if symbol == D.of:  # k - q
            s, t = size_of(self.op, self.q, 2), size_of(self.op, self.k, 2)
            return (1 - s if isinstance(s, int) else self.op(operator.sub, 1, s)), t
        if symbol == K.of:
            return 0, size_of(self.op, self.k, 2)
        return 0, size_of(self.op, self.q, [B.of, H.of, Q.of].index(symbol))


def size_of(op: Ops, node: fx.Node, dim: int) -> Any:
    """A size of a tensor: the number, or the node that holds it."""
    size = node.meta["val"].shape[dim]
    return size if isinstance(size, int) else op.aten.sym_size.int(node, dim)
