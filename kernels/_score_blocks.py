"""Which blocks of the scores a mask reaches, from intervals: neither the mask nor the scores are computed.

A value is an interval (low, high) for each block of queries and keys, over all batches and heads: two
tensors that broadcast to [query blocks, key blocks], of float64, or of bool: "surely" and "perhaps".
Where an interval is not known it is (-inf, inf) or (False, True): a block too many, never one too few.
"""

import ast
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fxaccel.kernels import _score

CPU = torch.device("cpu")
EXACT = 2.0**53  # an integer beyond has no exact float64

Interval = tuple[Tensor, Tensor]


class Reach(NamedTuple):
    """For a block of queries: the keys first .. stop, all of them kept but for those from left to right."""

    first: int
    stop: int
    left: int
    right: int

    @property
    def whole(self) -> bool:
        """Whether every query keeps every key."""
        return self.left == self.right


def reach(
    mask: str, tables: Sequence[Tensor], sizes: tuple[int, int, int, int], queries: int, keys: int
) -> tuple[Reach, ...]:
    """What each block of `queries` queries can see, to the block of `keys` keys."""
    if {*_score.TABLES} & _score.names(mask):
        return _reach(mask, tables, sizes, queries, keys)
    return _reach_of_text(mask, sizes, queries, keys)


@lru_cache(256)
def _reach_of_text(mask: str, sizes: tuple[int, int, int, int], queries: int, keys: int) -> tuple[Reach, ...]:
    return _reach(mask, (), sizes, queries, keys)


def _reach(
    mask: str, tables: Sequence[Tensor], sizes: tuple[int, int, int, int], queries: int, keys: int
) -> tuple[Reach, ...]:
    T = sizes[3]
    rows, columns = -(-sizes[2] // queries), -(-T // keys)
    if not mask or not T:
        return (Reach(0, T, 0, 0),) * rows
    surely, perhaps = _Intervals(tables, sizes, queries, keys).of(_score.parse(mask))
    found = []
    for sure, may in zip(
        surely.expand(rows, columns).tolist(), perhaps.expand(rows, columns).tolist(), strict=True
    ):
        first, stop = _span(may)
        left, right = _span([not x for x in sure[first:stop]])
        ends = first, stop, first + left, first + right
        found.append(Reach(*(min(T, x * keys) for x in ends)))
    return tuple(found)


def _span(flags: list[bool]) -> tuple[int, int]:
    """From the first to after the last that is true; (0, 0) where none is."""
    if True not in flags:
        return 0, 0
    return flags.index(True), len(flags) - flags[::-1].index(True)


class _Intervals:
    """Intervals of syntax trees."""

    def __init__(self, tables, sizes, queries, keys) -> None:
        self.tables, self.sizes, self.step = tables, sizes, {"q": queries, "k": keys}

    def of(self, node: ast.expr) -> Interval:
        match node:
            case ast.Constant(value=int(value) | float(value)):
                return self.point(value)
            case ast.Name(id=name):
                return self.name(name)
            case ast.Subscript():
                return self.read(node)
            case ast.UnaryOp(op=op, operand=operand):
                low, high = self.of(operand)
                return (-high, -low) if isinstance(op, ast.USub) else (~high, ~low)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self.compare(op, left, right)
            case ast.BinOp(op=ast.BitAnd() | ast.BitOr() as op, left=left, right=right):
                symbol = _score.OPERATORS["&" if isinstance(op, ast.BitAnd) else "|"]
                (a, b), (c, d) = self.of(left), self.of(right)
                return symbol(a, c), symbol(b, d)
            case ast.BinOp(op=op, left=left, right=right):
                return self.arithmetic(op, self.of(left), self.of(right), self.kind(node))
            case ast.Call(func=ast.Name(id=name), args=args):
                return self.call(name, [self.of(a) for a in args], self.kind(node))
        raise ValueError(f"{ast.unparse(node)!r} has no interval")  # parse lets no other node through

    def kind(self, node: ast.expr) -> str:
        return _score.kind(node, [_score.kind_of(t) for t in self.tables])

    def point(self, value: float) -> Interval:
        x = torch.full((1, 1), value, dtype=torch.float64, device=CPU)
        return known(x, x) if abs(value) < EXACT else unknown(self.sort(value))

    def sort(self, value: float) -> str:
        return "float" if isinstance(value, float) else "int"

    def name(self, name: str) -> Interval:
        size = self.sizes["bhqk".index(name)] if name in "bhqk" else self.sizes["ST".index(name) + 2]
        if name in _score.SIZES:
            return self.point(size)
        if name in "bh":
            return self.point(0)[0], self.point(max(size - 1, 0))[0]
        first = torch.arange(0, size, self.step[name], dtype=torch.float64, device=CPU)
        last = (first + self.step[name] - 1).clamp(max=size - 1)
        return (first[:, None], last[:, None]) if name == "q" else (first[None], last[None])

    def read(self, node: ast.Subscript) -> Interval:
        """Least and largest entry: looked up where a read depends on queries or on keys, not on both."""
        text = ast.unparse(node)
        if {"q", "k"} <= _score.names(text):
            return unknown(self.kind(node))
        values = _score.evaluate(text, self.tables, *self.sizes, dtype=torch.float64)
        logical = values.dtype == torch.bool
        if not values.numel() or (values.is_floating_point() and bool(values.isnan().any())):
            return unknown(self.kind(node))
        low, high = values.double().amin((0, 1)), values.double().amax((0, 1))  # [S or 1, T or 1]
        for dim, step in enumerate(self.step.values()):
            if low.shape[dim] > 1:
                parts = zip(low.split(step, dim), high.split(step, dim), strict=True)
                ends = [(x.amin(dim), y.amax(dim)) for x, y in parts]
                low, high = (torch.stack(x, dim) for x in zip(*ends, strict=True))
        return (low.bool(), high.bool()) if logical else known(low, high)

    def compare(self, op: ast.cmpop, left: ast.expr, right: ast.expr) -> Interval:
        kinds = {self.kind(left), self.kind(right)}
        (a, b), (c, d) = self.of(left), self.of(right)
        if kinds == {"int", "float"}:  # compared after rounding
            return unknown("bool")
        match op:
            case ast.Lt():
                return b < c, a < d
            case ast.LtE():
                return b <= c, a <= d
            case ast.Gt():
                return a > d, b > c
            case ast.GtE():
                return a >= d, b >= c
        same, overlap = (a == b) & (c == d) & (a == c), (a <= d) & (c <= b)
        return (same, overlap) if isinstance(op, ast.Eq) else (~overlap, ~same)

    def arithmetic(self, op: ast.operator, x: Interval, y: Interval, kind: str) -> Interval:
        (a, b), (c, d) = x, y
        if kind != "int":
            return unknown(kind)
        match op:
            case ast.Add():
                return known(a + c, b + d)
            case ast.Sub():
                return known(a - d, b - c)
            case ast.Mult():
                products = torch.stack(torch.broadcast_tensors(a * c, a * d, b * c, b * d))
                return known(products.amin(0), products.amax(0))
        if c.numel() > 1 or c.item() != d.item() or c.item() <= 0:  # // and % of what is no plain size
            return unknown(kind)
        low, high = (a / c).floor(), (b / c).floor()
        if isinstance(op, ast.FloorDiv):
            return known(low, high)
        one = low == high
        return known(torch.where(one, a - low * c, 0.0), torch.where(one, b - low * c, c - 1))

    def call(self, name: str, args: list[Interval], kind: str) -> Interval:
        if kind not in ("int", "bool"):
            return unknown(kind)
        *cond, (a, b) = args
        if name == "abs":
            crosses = (a <= 0) & (b >= 0)
            return torch.where(crosses, 0.0, torch.minimum(a.abs(), b.abs())), torch.maximum(a.abs(), b.abs())
        c, d = cond.pop()
        if name in ("min", "max"):
            least = torch.minimum if name == "min" else torch.maximum
            return least(c, a), least(d, b)
        surely, perhaps = cond[0]
        if kind == "bool":
            low, high = c & a, d | b
        else:
            low, high = torch.minimum(c, a), torch.maximum(d, b)
        low = torch.where(surely, c, torch.where(perhaps, low, a))
        return low, torch.where(surely, d, torch.where(perhaps, high, b))


def unknown(kind: str) -> Interval:
    """Anything of that kind."""
    low, high = (False, True) if kind == "bool" else (-torch.inf, torch.inf)
    return torch.full((1, 1), low, device=CPU), torch.full((1, 1), high, device=CPU)


def known(low: Tensor, high: Tensor) -> Interval:
    """The interval, its ends given up where they are not exact, or no numbers."""
    return (
        torch.where(low.abs() < EXACT, low, -torch.inf),
        torch.where(high.abs() < EXACT, high, torch.inf),
    )
