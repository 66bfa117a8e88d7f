"""What masks and biases of attention are made of, and what can be known of a mask without its values.

Indices are b, h, q, k and, for what depends on k - q alone, d. A fill counts as "not seen" where it is at
most HUGE and some key of its row is seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fxaccel.effects import learned
from fxaccel.indexing import (
    TRUE,
    ZERO,
    Affine,
    Call,
    Const,
    Range,
    Value,
    compare,
    conjunction,
    dimension,
    disjunction,
    elementwise,
    index,
    negation,
    reads,
    rebuilt,
)
from fxaccel.ir import Program

aten = torch.ops.aten


B, H, Q, K, D = (index(name) for name in "bhqkd")


MINUS_INFINITY = "masked_fill with -inf"  # which any fill of masked scores may be
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
    """Sizes of the attention that a mask is for: S queries, T keys, and what is known of the indices.

    Scores of more than 4 dimensions have an index b0, b1, ... for each before the heads; the kernel has all
    of them as one b, and `words` says how they follow from it.
    """

    known: Range
    s: sympy.Expr
    t: sympy.Expr
    dtype: torch.dtype  # of the scores
    learned: set[fx.Node]  # what gradients may flow to
    indices: tuple[Affine, ...] = (B, H, Q, K)
    words: tuple[tuple[sympy.Symbol, sympy.Symbol], ...] = ()

    @classmethod
    def of(cls, program: Program, shape: Sequence[Any], dtype: torch.dtype) -> Problem:
        """From the shape [.., S, T] of the scores."""
        sizes = (*[sympy.Integer(1)] * (4 - len(shape)), *map(dimension, shape))
        count = len(sizes) - 3
        before = (B,) if count == 1 else tuple(index(f"b{i}") for i in range(count))
        words = [(i.of, _word(sizes[:count], n)) for n, i in enumerate(before)] if count > 1 else []
        indices = (*before, H, Q, K)
        known = Range({i.of: n for i, n in zip(indices, sizes, strict=True)})
        return cls(known, sizes[-2], sizes[-1], dtype, program.facts(learned), indices, tuple(words))

    def at(self, rank: int) -> tuple[Affine, ...]:
        """The indices of scores of that many dimensions."""
        return self.indices[-rank:]


def _word(sizes: Sequence[sympy.Expr], n: int) -> sympy.Symbol:
    """Index n of several, in terms of the one index b over all of them."""
    below = math.prod(sizes[n + 1 :], start=sympy.Integer(1))
    text = "b" if below == 1 else f"b // {below}"
    return sympy.Symbol(f"({text} % {sizes[n]})" if n else f"({text})")


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


COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


def index_symbols(e: sympy.Expr) -> set[sympy.Symbol]:
    """The symbols that are indices, b0, h or q; the others are sizes."""
    return {x for x in e.free_symbols if x.name[0] in "bhqkd"}


def as_number(value: Value) -> float | None:
    if isinstance(value, Const) and not isinstance(value.value, bool):
        return float(value.value)
    if isinstance(value, Affine) and value.of.is_number:
        return float(value.of)
    return None


def is_zero(value: Value) -> bool:
    return as_number(value) == 0


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
        if name in COMPARISONS and len(v.args) == 2:
            return compare(name, v.args[0], v.args[1], p.known)
        if name in ("bitwise_and", "logical_and"):
            return conjunction(*v.args)
        if name in ("bitwise_or", "logical_or"):
            return disjunction(*v.args)
        return negation(v.args[0]) if name in ("bitwise_not", "logical_not") else v

    parts = dict.fromkeys(conjuncts(rebuilt(keep, decide)))
    whole: Value = TRUE  # bounds first, data last
    for part in sorted(parts, key=_order):
        whole = conjunction(whole, part)
    return whole


def _order(part: Value) -> tuple[int, int]:
    bound = band(part)
    side = 2 if bound is None else ("high", "low").index(bound[0])
    return side, len(list(reads(part)))


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


def band(part: Value) -> tuple[str, sympy.Expr] | None:
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
    if index_symbols(rest):
        return None
    upper = (name in ("lt", "le")) == (slope == 1)
    strict = name in ("lt", "gt")
    c = -rest * slope
    return ("high", c - 1 if strict else c) if upper else ("low", c + 1 if strict else c)
