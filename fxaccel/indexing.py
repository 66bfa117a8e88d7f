"""The value of a graph's node as a function of its indices: `value[i, j, ...]` as an expression.

A mask of [B, 1, S, T] built from arange, comparisons and views is a function of four numbers, and what it
says ("k <= q") can be read off that function where a tensor of its values says nothing. fxaccel.reading walks
back from a node through views and elementwise operators; here is what it finds, a tree of

    Affine   an integer: a linear combination of index symbols and sizes
    Const    another number, or a truth value
    Read     an element of a node that is not looked into: data, at the indices given
    Call     an elementwise ATen operator on such values, with the dtype of its result

and the arithmetic on it: integers stay linear, comparisons are decided where the ranges of their indices say
so, and an operator on `where(c, number, number)` is taken into the branches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from fxaccel.ir import expr

aten = torch.ops.aten


@dataclass(frozen=True)
class Affine:
    """An integer: a sympy expression, linear in the index symbols."""

    of: sympy.Expr


@dataclass(frozen=True)
class Const:
    """A number that is no integer, or a truth value."""

    value: Any


@dataclass(frozen=True)
class Read:
    """The element of `node`'s tensor at indices `at`."""

    node: fx.Node
    at: tuple[Value, ...]


@dataclass(frozen=True)
class Call:
    """An elementwise operator on values and literals; `dtype` is that of its result."""

    target: Any
    args: tuple[Any, ...]
    dtype: torch.dtype
    kwargs: tuple[tuple[str, Any], ...] = ()


Value: TypeAlias = "Affine | Const | Read | Call"
Indices: TypeAlias = "tuple[Value, ...]"
ZERO = Affine(sympy.Integer(0))
TRUE, FALSE = Const(True), Const(False)


def index(name: str) -> Affine:
    """The index symbol called `name`."""
    return Affine(sympy.Symbol(name, integer=True, nonnegative=True))


def symbols(value: Any) -> frozenset[sympy.Symbol]:
    """The index and size symbols that a value depends on."""
    if isinstance(value, Affine):
        return frozenset(value.of.free_symbols)
    parts: Iterable[Any] = ()
    if isinstance(value, Read):
        parts = value.at
    elif isinstance(value, Call):
        parts = value.args
    return frozenset().union(*(symbols(p) for p in parts if isinstance(p, (Affine, Read, Call))))


def reads(value: Any) -> Iterator[Read]:
    """Every Read in a value, also those in the indices of others."""
    if isinstance(value, Read):
        yield value
    for part in getattr(value, "at", getattr(value, "args", ())):
        yield from reads(part)


def rebuilt(value: Value, change: Callable[[Value], Value]) -> Value:
    """The value with `change` applied to each of its parts, then to itself."""

    def one(part: Any) -> Any:
        return rebuilt(part, change) if isinstance(part, (Affine, Const, Read, Call)) else part

    if isinstance(value, Call):
        value = Call(value.target, tuple(map(one, value.args)), value.dtype, value.kwargs)
    elif isinstance(value, Read):
        value = Read(value.node, tuple(map(one, value.at)))
    return change(value)


# -- sizes and bounds --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """What is known of the index symbols: each runs from 0 to its size minus 1, and sizes are at least 1."""

    sizes: dict[sympy.Symbol, sympy.Expr]

    def nonnegative(self, e: sympy.Expr) -> bool:
        """Whether a linear expression is certainly at least 0 for all indices."""
        for symbol, size in self.sizes.items():
            slope = e.coeff(symbol)
            if slope == 0:
                continue
            if self.nonnegative(slope):
                e = e.subs(symbol, 0)
            elif self.nonnegative(-slope):
                e = e.subs(symbol, size - 1)
            else:
                return False
        e = sympy.expand(positive(e))
        if not e.free_symbols:
            return bool(e >= 0)
        if not e.is_polynomial(*e.free_symbols):
            return bool(e.is_nonnegative)
        return all(c >= 0 for c in sympy.Poly(e, *e.free_symbols).coeffs())

    def divided(self, e: sympy.Expr, n: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
        """Quotient and remainder of `e` by the size `n`, where they are linear."""
        whole, rest = sympy.Integer(0), sympy.Integer(0)
        for term in sympy.Add.make_args(sympy.expand(e)):
            quotient = sympy.cancel(term / n)
            if quotient.is_polynomial() and quotient.as_coeff_Mul()[0].is_integer:
                whole += quotient
            else:
                rest += term
        if self.nonnegative(rest) and self.nonnegative(n - 1 - rest):
            return whole, rest
        return None


def positive(e: sympy.Expr) -> sympy.Expr:
    """The expression with each size written as 1 more than a number that is at least 0."""
    return e.subs({s: 1 + sympy.Dummy(s.name, integer=True, nonnegative=True) for s in e.free_symbols})


def dimension(size: Any) -> sympy.Expr:
    """A size as an expression, without a guard."""
    e = sympy.expand(expr(size))
    return e if e.is_polynomial() else sympy.expand(e.replace(_is_max, _largest))


def _is_max(e: Any) -> bool:
    return type(e).__name__ == "Max"  # torch has a class of its own


def _largest(e: Any) -> sympy.Expr:
    """The argument of a Max that is certainly the largest, or the Max."""
    known = Range({})
    return next((a for a in e.args if all(known.nonnegative(a - b) for b in e.args)), e)


# -- elementwise values ------------------------------------------------------------------------------

_ADD, _MUL = {aten.add.Tensor, aten.add.Scalar}, {aten.mul.Tensor, aten.mul.Scalar}
_SUB, _RSUB = {aten.sub.Tensor, aten.sub.Scalar}, {aten.rsub.Scalar, aten.rsub.Tensor}
_COMPARE: dict[Any, str] = {
    getattr(getattr(aten, name), overload): name
    for name in ("lt", "le", "gt", "ge", "eq", "ne")
    for overload in ("Tensor", "Scalar")
}
_AND = {aten.bitwise_and.Tensor, aten.logical_and.default}
_OR = {aten.bitwise_or.Tensor, aten.logical_or.default}
_NOT = {aten.bitwise_not.default, aten.logical_not.default}
_WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar}
ELEMENTWISE = {
    aten.to.dtype,
    *_WHERE,
    aten.floor_divide.default,
    aten.div.Tensor_mode,
    aten.div.Scalar_mode,
    aten.remainder.Scalar,
    aten.remainder.Tensor,
    aten.fmod.Scalar,
}  # among those that have no tag for it
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def conjunction(a: Value, b: Value) -> Value:
    """a and b."""
    if FALSE in (a, b):
        return FALSE
    if a in (TRUE, b):
        return b
    return a if b == TRUE else Call(aten.bitwise_and.Tensor, (a, b), torch.bool)


def disjunction(a: Value, b: Value) -> Value:
    """a or b."""
    if TRUE in (a, b):
        return TRUE
    if a in (FALSE, b):
        return b
    return a if b == FALSE else Call(aten.bitwise_or.Tensor, (a, b), torch.bool)


def negation(a: Value) -> Value:
    """not a."""
    if isinstance(a, Const):
        return Const(not a.value)
    if isinstance(a, Call) and a.target in _NOT:
        return a.args[0]
    if isinstance(a, Call) and a.dtype is torch.bool and a.target in _AND | _OR:
        join = disjunction if a.target in _AND else conjunction
        return join(*map(negation, a.args))
    if isinstance(a, Call) and a.target in _COMPARE:
        name = _COMPARE[a.target]
        if name in ("eq", "ne") or not any(map(_may_be_nan, a.args)):
            return compare(_OPPOSITE[name], a.args[0], a.args[1], None)
    return Call(aten.bitwise_not.default, (a,), torch.bool)


_OPPOSITE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}


def compare(name: str, a: Value, b: Value, known: Range | None) -> Value:
    """`a name b`, decided where both are integers and their ranges say so; of integers, their difference is
    compared with 0."""
    if isinstance(a, Affine) and isinstance(b, Affine) and known is not None:
        verdict = _decided(name, a.of - b.of, known)
        if verdict is not None:
            return Const(verdict)
    if a == b and name in ("eq", "ne") and not _may_be_nan(a):
        return Const(name == "eq")
    if isinstance(a, Affine) and isinstance(b, Affine):
        a, b = Affine(sympy.expand(a.of - b.of)), ZERO
    if isinstance(a, Call) and a.target is aten.abs.default and isinstance(a.args[0], Affine):
        both = _distance(name, a.args[0], b, known)
        if both is not None:
            return both
    return Call(getattr(aten, name).Tensor, (a, b), torch.bool)


def _may_be_nan(a: Value) -> bool:
    dtype = a.node.meta["val"].dtype if isinstance(a, Read) else getattr(a, "dtype", torch.int64)
    return dtype.is_floating_point


def _distance(name: str, x: Affine, b: Value, known: Range | None) -> Value | None:
    """|x| compared with an integer, as two bounds of x."""
    if not isinstance(b, Affine) or name not in ("lt", "le", "gt", "ge"):
        return None
    if name in ("gt", "ge"):
        near = _distance(_OPPOSITE[name], x, b, known)
        return None if near is None else negation(near)
    below = compare(name, x, b, known)
    return conjunction(below, compare(name, Affine(-x.of), b, known))


def _decided(name: str, d: sympy.Expr, known: Range) -> bool | None:
    d = sympy.expand(d)
    tests = {
        "ge": (d, -d - 1), "lt": (-d - 1, d), "gt": (d - 1, -d), "le": (-d, d - 1),
    }  # fmt: skip
    if name in tests:
        yes, no = tests[name]
        return True if known.nonnegative(yes) else False if known.nonnegative(no) else None
    apart = known.nonnegative(d - 1) or known.nonnegative(-d - 1)
    same = d == 0
    if not (apart or same):
        return None
    return same if name == "eq" else apart


def select(condition: Value, a: Value, b: Value, dtype: torch.dtype) -> Value:
    """a where the condition holds, else b."""
    if isinstance(condition, Const):
        return a if condition.value else b
    return a if a == b else Call(aten.where.self, (condition, a, b), dtype)


def elementwise(
    target: Any, args: Sequence[Any], kwargs: dict[str, Any], dtype: torch.dtype, known: Range
) -> Value:
    """An operator on values: computed if they are numbers, linear if it is, else a Call.

    An operator on `where(c, number, number)` is taken into the branches.
    """
    whole = _integer(target, args, kwargs) if dtype in INTEGERS else None
    if whole is not None:
        return Affine(sympy.expand(whole))
    logical = _logical(target, args, dtype, known)
    if logical is not None:
        return logical
    args = [select(a, number(1, dtype), number(0, dtype), dtype) if _is_truth(a) else a for a in args]
    if all(is_number(a) for a in args):
        return _computed(target, args, kwargs, dtype)
    branches = [a for a in args if isinstance(a, Call) and a.target is aten.where.self]
    if len(branches) == 1 and all(a is branches[0] or is_number(a) for a in args):
        (c, *ab) = branches[0].args
        if all(map(is_number, ab)):
            left, right = (
                elementwise(target, [x if a is branches[0] else a for a in args], kwargs, dtype, known)
                for x in ab
            )
            return select(c, left, right, dtype)
    return Call(target, tuple(args), dtype, tuple(sorted(kwargs.items())))


def is_number(a: Any) -> bool:
    """Whether a value, or an argument, is a number."""
    if isinstance(a, Affine):
        return bool(a.of.is_number)
    return not isinstance(a, (Read, Call))


def plain(a: Any) -> Any:
    """The Python number that a value is."""
    return int(a.of) if isinstance(a, Affine) else a.value if isinstance(a, Const) else a


def number(value: Any, dtype: torch.dtype) -> Value:
    """A literal as a value."""
    integral = dtype in INTEGERS and not isinstance(value, bool)
    if integral and float(value).is_integer():
        return Affine(sympy.Integer(int(value)))
    if dtype is torch.bool:
        return Const(bool(value))
    return Const(float(value))


def _computed(target: Any, args: Sequence[Any], kwargs: dict[str, Any], dtype: torch.dtype) -> Value:
    """The operator run on numbers, as 0-d tensors of the dtypes they have in the graph."""
    given = [plain(a) for a in args]
    for i, a in enumerate(args):
        if isinstance(a, (Affine, Const)) or i == 0:
            wide = isinstance(given[i], float) and not isinstance(given[i], bool)
            kind = dtype if wide and dtype.is_floating_point else torch.float64 if wide else None
            given[i] = torch.tensor(given[i], dtype=kind)
    return number(target(*given, **kwargs).to(dtype).item(), dtype)


def _linear(a: Any) -> sympy.Expr | None:
    return a.of if isinstance(a, Affine) else sympy.Integer(a) if type(a) is int else None


def _integer(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> sympy.Expr | None:
    """The operator as integer arithmetic that stays linear, None if it does not."""
    if kwargs or not args:
        return None
    if target is aten.to.dtype:
        return args[0].of if isinstance(args[0], Affine) else None
    terms = [t for a in args if (t := _linear(a)) is not None]
    if len(terms) < len(args):
        return None
    if target is aten.neg.default:
        return -terms[0]
    if len(terms) != 2:
        return None
    a, b = terms
    if target in _ADD:
        return a + b
    if target in _SUB:
        return a - b
    if target in _RSUB:
        return b - a
    if target in _MUL and (a.is_number or b.is_number):
        return a * b
    return None


def _logical(target: Any, args: Sequence[Any], dtype: torch.dtype, known: Range) -> Value | None:
    """Comparisons, connectives and choices, which have simplifications of their own."""
    if target in _COMPARE:
        a, b = (x if isinstance(x, (Affine, Const, Read, Call)) else literal(x) for x in args)
        branch = compared_branches(target, a, b, known) or _compared_truth(_COMPARE[target], a, b)
        return branch or compare(_COMPARE[target], a, b, known)
    if target in _WHERE:
        a, b = (x if isinstance(x, (Affine, Const, Read, Call)) else number(x, dtype) for x in args[1:])
        return select(args[0], a, b, dtype)
    if dtype is not torch.bool:
        return None
    if target in _AND:
        return conjunction(*args)
    if target in _OR:
        return disjunction(*args)
    if target in _NOT and _is_truth(args[0]):
        return negation(args[0])
    if target is aten.to.dtype and _is_truth(args[0]):
        return args[0]
    return None


def literal(x: Any) -> Value:
    """A Python number as a value."""
    whole = not isinstance(x, bool) and float(x).is_integer()
    return Affine(sympy.Integer(int(x))) if whole else Const(x)


def _is_truth(a: Any) -> bool:
    if isinstance(a, Read):
        return a.node.meta["val"].dtype is torch.bool
    if isinstance(a, Const):
        return isinstance(a.value, bool)
    return isinstance(a, Call) and a.dtype is torch.bool


def compared_branches(target: Any, a: Value, b: Value, known: Range) -> Value | None:
    """where(c, x, y) compared with a number, x and y being numbers: c, its negation, or a truth value."""
    if not (isinstance(a, Call) and a.target is aten.where.self and is_number(b)):
        return None
    c, x, y = a.args
    if not (is_number(x) and is_number(y)):
        return None
    left, right = (bool(getattr(operator, _COMPARE[target])(plain(v), plain(b))) for v in (x, y))
    return select(c, Const(left), Const(right), torch.bool) if left == right else c if left else negation(c)


def _compared_truth(name: str, a: Value, b: Value) -> Value | None:
    """A truth value that is or is not 0 or 1."""
    if not (_is_truth(a) and b in (ZERO, Affine(sympy.Integer(1))) and name in ("eq", "ne")):
        return None
    return negation(a) if (name == "eq") == (b == ZERO) else a
