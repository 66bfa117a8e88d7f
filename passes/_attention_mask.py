"""What a model does to its scores before the softmax, as index expressions: masks proved, biases named.

Masks arrive as tensors: arange, comparisons, `where(allowed, 0, finfo.min)`, tril. `understand` takes each as a
function of (b, h, q, k) (fxaccel.indexing) and separates what decides whether a key is seen from what is added to
its score. A fill counts as "not seen" where it is -inf, or at most -1e8 and some key of every row is seen; a
row without any key keeps the meaning it has as written (see `empty` in fxaccel.kernels.attention).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from fxaccel.effects import learned
from fxaccel.indexing import (
    TRUE, ZERO, Affine, Call, Const, Range, Read, Value, compare, conjunction, dimension,
    disjunction, elementwise, index, negation, reads, rebuilt, select, symbols,
)  # fmt: skip
from fxaccel.ir import Program
from fxaccel.rule import Ops

aten = torch.ops.aten
B, H, Q, K, D = (index(name) for name in "bhqkd")
MAX_TABLES = 4
HUGE = -1e8  # a score filled with this or less counts as no score, where another key is seen


@dataclass(frozen=True)
class Fill:
    """Scores that do not satisfy `keep` become `value`, or have it added to them.

    `whole` is the tensor that says so, for want of words: a condition, or what is added.
    """

    keep: Value
    value: float
    added: bool
    whole: Value


@dataclass(frozen=True)
class Term:
    """`factor` times a value that is added to the scores; `whole` is the tensor that holds the value."""

    value: Value
    whole: Value
    factor: float = 1.0

    def parts(self) -> Iterator[Value]:
        """What the value is a sum of, the factor taken in."""
        for part in _summands(self.value):
            if self.factor != 1:
                factor = Const(self.factor)
                part = elementwise(aten.mul.Tensor, (part, factor), {}, torch.float32, Range({}))
            yield part


def _summands(value: Value) -> Iterator[Value]:
    if isinstance(value, Call) and value.target is aten.add.Tensor and value.dtype.is_floating_point:
        for part in value.args:
            yield from _summands(part)
    else:
        yield value


@dataclass(frozen=True)
class Problem:
    """Sizes of the attention that a mask is for: S queries, T keys, and what is known of the indices."""

    known: Range
    s: sympy.Expr
    t: sympy.Expr
    dtype: torch.dtype  # of the scores
    learned: frozenset[fx.Node]  # what gradients may flow to

    @classmethod
    def of(cls, program: Program, shape: Sequence[Any], dtype: torch.dtype) -> Problem:
        """From the shape [B, H, S, T] of the scores."""
        sizes = tuple(map(dimension, shape))
        known = Range({i.of: n for i, n in zip((B, H, Q, K), sizes, strict=True)})
        return cls(known, *sizes[2:], dtype, program.facts(learned))


@dataclass(frozen=True)
class Table:
    """A tensor that an expression reads: a node times `factor`, or a value computed over `axes` first."""

    source: fx.Node | Value
    axes: tuple[Affine, ...] = ()
    factor: float = 1.0


@dataclass(frozen=True)
class Mask:
    """The arguments of fxaccel::attention that say which keys are seen, and the words for a report."""

    mask: str = ""
    bias: str = ""
    tables: tuple[Table, ...] = ()
    empty: str = "zero"
    kinds: tuple[str, ...] = ()
    plain: tuple[bool, ...] = ()  # for each table, whether its indices are b, h, q, k or 0, each once
    seen: bool = True  # every row certainly keeps a key
    why_not: tuple[str, ...] = ()  # sentences that forbid the rewrite


# -- fills and terms ---------------------------------------------------------------------------------


def as_fill(value: Value, whole: Value) -> tuple[Fill, Value] | None:
    """An added value as `where(keep, other, fill)`, a fill and the other value, if that is what it is."""
    if not (isinstance(value, Call) and value.target is aten.where.self):
        return None
    c, a, b = value.args
    if _number(b) is None or (_number(a) or 0) < (_number(b) or 0):
        c, a, b = negation(c), b, a
    fill = _number(b)
    if fill is None or not fill < 0:
        return None
    inner = as_fill(a, whole)
    if inner is not None and inner[0].value == fill:
        return replace(inner[0], keep=conjunction(c, inner[0].keep)), inner[1]
    return Fill(c, fill, True, whole), a


def _number(value: Value) -> float | None:
    if isinstance(value, Const) and not isinstance(value.value, bool):
        return float(value.value)
    if isinstance(value, Affine) and value.of.is_number:
        return float(value.of)
    return None


def _is_zero(value: Value) -> bool:
    return _number(value) == 0


def understand(
    p: Problem, fills: Sequence[Fill], terms: Sequence[Term], without_key: str, equal: str = "kernel"
) -> Mask:
    """The mask and the bias of scores with these fills and added terms.

    without_key   what a row of -inf gives, as written: "nan" or "zero"
    equal         who can give a row of huge negative numbers its equal weights: "kernel"; "bias", the numbers
                  themselves, as a bias; or "nobody" needs to, for a sink takes all the weight
    """
    hard, soft, rest = _sorted(p, fills, terms)
    keep, why = simplified(_all((*hard, *soft)), p), list[str]()
    empty, seen = "zero", sees_a_key(keep, p)
    if equal == "kernel" and any(r.node in p.learned for t in rest for r in reads(t.value)):
        equal = "bias"
    if not seen and soft:
        empty, why = _without_key(p, hard, soft, equal)
        if empty == "bias":  # exact as written: the fills are added, nothing is skipped
            rest = [Term(select(f.keep, ZERO, Const(f.value), p.dtype), f.whole) for f in soft] + rest
            keep, soft, empty = simplified(_all(hard), p), [], "zero"
    if not soft and hard and not sees_a_key(keep, p):
        empty = without_key
    text = Spelling(p)
    mask = text.spell(keep) if keep != TRUE else ""
    bias = [text.term(t) for t in rest]
    if len(text.tables) > MAX_TABLES:
        text = Spelling(p)
        mask, bias = text.spell(keep) if keep != TRUE else "", [text.whole(t) for t in rest]
    kinds = [*(() if keep == TRUE else _kinds(keep, p)), *(kind for _, kind in bias)]
    return Mask(mask, " + ".join(b for b, _ in bias), tuple(text.tables), empty, tuple(kinds), tuple(text.plain), seen, tuple(why))


def _sorted(
    p: Problem, fills: Sequence[Fill], terms: Sequence[Term]
) -> tuple[list[Fill], list[Fill], list[Term]]:
    """Fills with -inf, fills with huge numbers, and terms that are added."""
    hard, soft, rest = list[Fill](), list[Fill](), list[Term]()
    for fill in fills:
        if not Spelling(p).spell(simplified(fill.keep, p)):
            fill = replace(fill, keep=fill.whole)
        (hard if fill.value == -math.inf else soft).append(fill)
    for term in terms:
        split = _split(p, term)
        if split is None:
            rest.append(term)
            continue
        for fill in split[0]:
            (hard if fill.value == -math.inf else soft).append(fill)
        rest += split[1]
    return hard, soft, rest


def _split(p: Problem, term: Term) -> tuple[list[Fill], list[Term]] | None:
    """A term as fills and summands that can all be spelled, None where it has to stay the tensor it is."""
    fills, left, text = list[Fill](), list[Value](), Spelling(p)
    for part in term.parts():
        found = as_fill(part, term.whole)
        if found is None or found[0].value > HUGE:
            left.append(part)
            continue
        fill, other = found
        if any(r.node in p.learned for r in reads(other)) and not sees_a_key(simplified(fill.keep, p), p):
            return None  # in a row without a key the gradient of `other` is not the kernel's
        if not text.spell(simplified(fill.keep, p)):
            return None
        fills.append(fill)
        left.append(other)
    left = [part for part in left if not _is_zero(part)]
    if not all(text.part(part)[0] for part in left):
        return (fills, [term]) if not fills else None
    return fills, [Term(part, term.whole) for part in left]


def _all(fills: Sequence[Fill]) -> Value:
    keep = TRUE
    for fill in fills:
        keep = conjunction(keep, fill.keep)
    return keep


def _without_key(
    p: Problem, hard: Sequence[Fill], soft: Sequence[Fill], equal: str
) -> tuple[str, list[str]]:
    """What a row gives that may see no key, where huge numbers stand for "not seen"."""
    if equal == "nobody":
        return "zero", []
    if len(soft) == 1 and not hard:
        (fill,) = soft
        if not fill.added:
            why = "a row may see no key, and its equal weights are then capped or dropped"
            return "fill", [] if equal == "kernel" else [why]
        if equal == "kernel" and fill.value <= -(2.0**100) and p.dtype is not torch.float16:
            return "mean", []  # every score is absorbed: all weights are equal
    if all(f.added for f in soft):
        return "bias", []
    value = next(f.value for f in soft if not f.added)
    return "zero", [
        f"a row may see no key, and then {len(hard) + len(soft)} masks, one of which fills with {value:g}, "
        "leave some of its keys and not others"
    ]


# -- truths ------------------------------------------------------------------------------------------


def conjuncts(value: Value) -> Iterator[Value]:
    """The parts of a conjunction."""
    if isinstance(value, Call) and value.target is aten.bitwise_and.Tensor:
        for part in value.args:
            yield from conjuncts(part)
    else:
        yield value


def simplified(keep: Value, p: Problem) -> Value:
    """The condition with decided comparisons, equal parts and implied bounds left out."""

    def decide(v: Value) -> Value:
        if not isinstance(v, Call) or v.dtype is not torch.bool:
            return v
        name = v.target._opname
        if name in _COMPARISONS and len(v.args) == 2:
            return compare(name, v.args[0], v.args[1], p.known)
        if name in ("bitwise_and", "logical_and"):
            return conjunction(*v.args)
        if name in ("bitwise_or", "logical_or"):
            return disjunction(*v.args)
        return negation(v.args[0]) if name in ("bitwise_not", "logical_not") else v

    parts = dict.fromkeys(conjuncts(rebuilt(keep, decide)))
    whole = TRUE  # bounds first, data last
    for part in sorted(parts, key=_order):
        whole = conjunction(whole, part)
    return whole


def _order(part: Value) -> tuple[int, int]:
    band = _band(part)
    side = 2 if band is None else ("high", "low").index(band[0])
    return side, len(list(reads(part)))


_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}


def sees_a_key(keep: Value, p: Problem) -> bool:
    """Whether every row certainly keeps a key: one of a few candidates satisfies the condition."""
    candidates = [ZERO.of, p.t - 1]
    if p.known.nonnegative(p.t - p.s):
        candidates += [Q.of, Q.of + p.t - p.s]
    return any(simplified(at_key(keep, c), p) == TRUE for c in candidates)


def at_key(value: Value, key: sympy.Expr) -> Value:
    """The value at k = `key`."""
    return rebuilt(
        value, lambda v: Affine(sympy.expand(v.of.subs(K.of, key))) if isinstance(v, Affine) else v
    )


def _kinds(keep: Value, p: Problem) -> Iterator[str]:
    """The words for a mask, a conjunct each."""
    for part in conjuncts(keep):
        yield _kind(part, p)


def _kind(part: Value, p: Problem) -> str:
    names = {str(s) for s in symbols(part)} & set("bhqk")
    if any(r.node is not None and {"q", "k"} <= {str(s) for s in symbols(r)} for r in reads(part)):
        return "a mask tensor"
    band = _band(part)
    if band is not None:
        return _band_kind(*band, p)
    if list(reads(part)):
        if "q" not in names:
            return "key padding"
        if "k" not in names:
            return "query padding"
        same = isinstance(part, Call) and part.target._opname == "eq"
        return "documents" if same and _same_but_index(*part.args) else "data of queries and keys"
    if isinstance(part, Call) and part.target._opname == "bitwise_or":
        return " or ".join(_kind(a, p) for a in part.args)
    if isinstance(part, Call) and part.target._opname == "eq":
        return "chunks"
    return "prefix" if names == {"k"} else "an index function"


def _band(part: Value) -> tuple[str, sympy.Expr] | None:
    """("high", c) for k <= q + c, ("low", c) for k >= q + c."""
    if not (isinstance(part, Call) and part.target._opname in ("lt", "le", "gt", "ge")):
        return None
    a, b = part.args
    if not (isinstance(a, Affine) and isinstance(b, Affine)):
        return None
    d, name = sympy.expand(a.of - b.of), part.target._opname
    slope = d.coeff(K.of)
    if slope not in (1, -1) or d.coeff(Q.of) != -slope:
        return None
    rest = sympy.expand(d - slope * (K.of - Q.of))
    if rest.free_symbols & {B.of, H.of, Q.of, K.of}:
        return None
    upper = (name in ("lt", "le")) == (slope == 1)
    strict = name in ("lt", "gt")
    c = -rest * slope
    return ("high", c - 1 if strict else c) if upper else ("low", c + 1 if strict else c)


def _band_kind(side: str, c: sympy.Expr, p: Problem) -> str:
    if side == "low":
        return f"window {1 - c}" if not c.free_symbols else f"keys from q - {-c}"
    if c == 0:
        return "causal"
    if sympy.expand(c - (p.t - p.s)) == 0:
        return "causal, bottom right"
    return f"keys up to q + {c}"


def _same_but_index(a: Value, b: Value) -> bool:
    swapped = rebuilt(
        a,
        lambda v: Affine(v.of.subs({Q.of: K.of, K.of: Q.of}, simultaneous=True))
        if isinstance(v, Affine)
        else v,
    )
    if swapped == b:
        return True
    return isinstance(a, Read) and isinstance(b, Read)


# -- text --------------------------------------------------------------------------------------------

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
    "bitwise_and": "&", "bitwise_or": "|", "logical_and": "&", "logical_or": "|",
}  # fmt: skip
_CALLS = {"minimum": "min", "maximum": "max", "abs": "abs", "where": "where"}


@dataclass
class Spelling:
    """Writes values as index expressions, and collects the tables they read."""

    p: Problem
    tables: list[Table] = field(default_factory=list)
    plain: list[bool] = field(default_factory=list)
    names: dict[Any, str] = field(default_factory=dict)

    def term(self, term: Term) -> tuple[str, str]:
        """An added term as text, and the words for it."""
        parts = [part for part in term.parts() if not _is_zero(part)]
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
        band = _band(value)
        if band is not None:
            side, c = band
            edge = self.affine(Q.of + c)
            return edge and f"(k {'<=' if side == 'high' else '>='} {_bare(edge)})"
        if name in _COMPARISONS and isinstance(value.args[0], Affine) and value.args[1] == ZERO:
            return self.bound(name, value.args[0].of)
        if value.target is aten.to.dtype:
            inner = self.spell(value.args[0])
            if value.dtype is torch.bool:
                return inner and f"({inner} != 0)"
            return inner if value.dtype.is_floating_point and inner else ""
        parts = [self.spell(a) for a in value.args]
        if not all(parts):
            return ""
        if name in _INFIX and len(parts) == 2:
            return f"({parts[0]} {_INFIX[name]} {parts[1]})"
        if name in ("bitwise_not", "logical_not"):
            return f"(~{parts[0]})" if _truth(value.args[0]) else ""
        if name == "neg":
            return f"(-{parts[0]})"
        if name in ("floor_divide", "div") and (value.kwargs or name == "floor_divide"):
            return f"({parts[0]} // {parts[1]})"
        if name == "remainder":
            return f"({parts[0]} % {parts[1]})"
        if name == "rsub":
            return f"({parts[1]} - {parts[0]})"
        return f"{_CALLS[name]}({', '.join(parts)})" if name in _CALLS else ""

    def bound(self, name: str, e: sympy.Expr) -> str:
        """A linear expression compared with 0: indices on the left, the rest on the right."""
        left = sum((t for t in sympy.Add.make_args(e) if t.free_symbols & {B.of, H.of, Q.of, K.of}), ZERO.of)
        right = left - e
        if str(left).startswith("-"):
            left, right, name = -left, -right, _MIRRORED.get(name, name)
        sides = self.affine(left), self.affine(sympy.expand(right))
        return f"({sides[0]} {_COMPARISONS[name]} {sides[1]})" if all(sides) else ""

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
        e = sympy.expand(e)
        names = {str(x) for x in e.free_symbols}
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
        plain = len(set(spots)) == len(spots) and all(isinstance(i, Affine) and i.of.is_Symbol for i in spots)
        name = self.table(Table(value.node, factor=factor), plain)
        return f"{name}[{', '.join(_bare(i) for i in at)}]"

    def table(self, table: Table, plain: bool = True) -> str:
        if table not in self.names:
            self.names[table] = f"t{len(self.tables)}"
            self.tables.append(table)
            self.plain.append(plain)
        return self.names[table]


def _bare(text: str) -> str:
    return text[1:-1] if text.startswith("(") and text.endswith(")") and text.count("(") == 1 else text


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
    return changed if ok and not symbols(changed) & {Q.of, K.of} and D.of in symbols(changed) else None


# -- tables that are computed first ------------------------------------------------------------------


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
        if name in ("minimum", "maximum") or (name in _COMPARISONS and not isinstance(args[0], fx.Node)):
            args = [self.tensor(a, value.dtype if name.endswith("imum") else torch.int64) for a in args]
        if name in _COMPARISONS and not isinstance(args[1], fx.Node):
            return self.op(getattr(getattr(aten, name), "Scalar"), *args)
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
            s, t = self.size(self.q, 2), self.size(self.k, 2)
            return (1 - s if isinstance(s, int) else self.op(operator.sub, 1, s)), t
        return 0, self.size(self.q, [B.of, H.of, Q.of].index(symbol)) if symbol != K.of else self.size(self.k, 2)

    def size(self, node: fx.Node, dim: int) -> Any:
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.op.aten.sym_size.int(node, dim)
