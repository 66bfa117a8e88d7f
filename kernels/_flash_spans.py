"""Triton functions generated from a mask that judge whole blocks: is some pair kept, is every one?

    blocks(b, h, q0, k0, S, T, tables, strides, BLOCK_M, BLOCK_N)     (some, every)

Shapes     q0 and k0, where blocks of queries and keys begin, are [C] or [1].
Limits     Judged by interval arithmetic, a table read by the least and the greatest of what the block loads.
           Where an operator's interval is not known, a block counts as kept in part, which is always right.
"""

import ast
from functools import lru_cache
from typing import Any, NamedTuple

from fxaccel.kernels._flash_source import SIGNS, Kinds, Part, Writer, define, literal, spelled, table_of
from fxaccel.kernels._score import parse

CHUNK = 16  # blocks judged at a time
ENDS = {"int32": ("2147483647", "-2147483648"), "float": ('float("inf")', 'float("-inf")')}
ENDS |= {"int64": ("9223372036854775807", "-9223372036854775808"), "bool": ("1", "0")}


class Span(NamedTuple):
    """Code of the least and the greatest value in a block; of a boolean, whether all and whether any hold."""

    low: str
    high: str
    kind: str
    positive: bool = False


class BlockWriter(Writer):
    """Writes what is known of an expression over a whole block: a Span, or None where nothing is."""

    dense = False  # whether a table is read at both a query and a key

    def truth(self, node: ast.expr) -> Span:
        """The span of a boolean."""
        return self.span(node) or Span("False", "True", "bool")

    def span(self, node: ast.expr) -> Span | None:
        """What an expression may be in a block."""
        number = literal(node)
        if number is not None:
            code, kind = spelled(number), "int" if isinstance(number, int) else "float"
            return Span(code, code, kind, number >= 0)
        if isinstance(node, ast.Name):
            ends = (f"{node.id}_low", f"{node.id}_high") if node.id in "qk" else (node.id, node.id)
            return Span(*ends, "int", True)
        if isinstance(node, ast.Subscript):
            return self.read(node)
        if isinstance(node, ast.UnaryOp):
            return self.unary(node)
        if isinstance(node, ast.Compare):
            return self.compare(node)
        if isinstance(node, ast.BinOp):
            return self.both(node)
        assert isinstance(node, ast.Call), f"the parser lets no {type(node).__name__} through"
        return self.called(node)

    def read(self, node: ast.Subscript) -> Span:
        """The least and the greatest of the entries that a block reads."""
        kind = self.kinds[table_of(node)][0]
        code, mask = self.load(node)
        if kind == "bool":
            code = self.put(f"tl.cast({code}, tl.int32)")
        ends = [code, code]
        if kind == "float":  # of NaN nothing is known
            ends = [self.put(f"tl.where({code} != {code}, {end}, {code})") for end in reversed(ENDS[kind])]
        if mask:
            self.dense |= mask.count("<") == 2
            ends = [
                self.put(f"tl.where({mask}, {x}, {end})") for x, end in zip(ends, ENDS[kind], strict=True)
            ]
            ends = [self.put(f"tl.{f}(tl.{f}({x}, 2), 1)") for x, f in zip(ends, ("min", "max"), strict=True)]
        if kind == "bool":
            ends = [self.put(f"{x} != 0") for x in ends]
        return Span(ends[0], ends[1], kind if kind in ("bool", "float") else "int", kind == "bool")

    def unary(self, node: ast.UnaryOp) -> Span | None:
        """~x or -x."""
        x = self.span(node.operand)
        if x is None:
            return None
        if isinstance(node.op, ast.Invert):
            return Span(self.put(f"{x.high} == 0"), self.put(f"{x.low} == 0"), "bool", True)
        return Span(self.put(f"-{x.high}"), self.put(f"-{x.low}"), x.kind) if x.kind != "bool" else None

    def compare(self, node: ast.Compare) -> Span | None:
        """x < y and its kin; a block has some such pair unless the ends prove that it has none."""
        x, y, op = self.span(node.left), self.span(node.comparators[0]), type(node.ops[0])
        if x is None or y is None or "bool" in (x.kind, y.kind):
            return self.same(node, x, y) if x and y and x.kind == y.kind else None
        if op in (ast.Eq, ast.NotEq):
            none = f"({x.high} < {y.low}) | ({x.low} > {y.high})"
            every = f"({x.low} == {y.high}) & ({x.high} == {y.low})"
        else:
            if op in (ast.Gt, ast.GtE):
                x, y, op = y, x, {ast.Gt: ast.Lt, ast.GtE: ast.LtE}[op]
            every = f"{x.high} {SIGNS[op]} {y.low}"
            none = f"{y.high} {'<=' if op is ast.Lt else '<'} {x.low}"
        every, none = (self.truth_of(code, "float" in (x.kind, y.kind)) for code in (every, none))
        if op is ast.NotEq:
            every, none = none, every
        return Span(every, self.put(f"{none} == 0"), "bool", True)

    def same(self, node: ast.Compare, x: Span, y: Span) -> Span | None:
        """Equality of two booleans."""
        if not isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
            return None
        every = self.put(f"({x.low} & {y.low}) | (({x.high} == 0) & ({y.high} == 0))")
        none = self.put(f"({x.low} & ({y.high} == 0)) | (({x.high} == 0) & {y.low})")
        if isinstance(node.ops[0], ast.NotEq):
            every, none = none, every
        return Span(every, self.put(f"{none} == 0"), "bool", True)

    def both(self, node: ast.BinOp) -> Span | None:
        """x op y: & and | of booleans, and what is monotone in whole numbers."""
        sign = SIGNS[type(node.op)]
        if sign in "&|":
            p, q = self.truth(node.left), self.truth(node.right)
            every, some = self.put(f"{p.low} {sign} {q.low}"), self.put(f"{p.high} {sign} {q.high}")
            return Span(every, some, "bool", True)
        x, y = self.span(node.left), self.span(node.right)
        if x is None or y is None or x.kind != "int" or y.kind != "int":
            return None
        if sign == "+":
            low, high = self.put(f"{x.low} + {y.low}"), self.put(f"{x.high} + {y.high}")
            return Span(low, high, "int", x.positive & y.positive)
        if sign == "-":
            return Span(self.put(f"{x.low} - {y.high}"), self.put(f"{x.high} - {y.low}"), "int")
        if sign == "*" and x.positive and y.positive:
            ends = (f"tl.cast({a}, tl.int64) * {b}" for a, b in ((x.low, y.low), (x.high, y.high)))
            low, high = map(self.put, ends)
            return Span(low, high, "int", True)
        divisor = literal(node.right)
        if sign == "//" and divisor is not None and divisor > 0:
            by = Part(str(divisor), "int", True)
            low, high = (self.binary(node.op, Part(end, "int", x.positive), by).code for end in x[:2])
            return Span(low, high, "int", x.positive)
        return None

    def called(self, node: ast.Call) -> Span | None:
        """min, max and abs of whole numbers; where of anything."""
        assert isinstance(node.func, ast.Name), "the parser lets nothing else be called"
        spans = [self.span(n) for n in node.args[node.func.id == "where" :]]
        if any(s is None for s in spans) or node.func.id == "float":
            return None
        known = [s for s in spans if s is not None]
        positive = all(s.positive for s in known)
        if node.func.id == "where" and {s.kind for s in known} == {"bool"}:
            (x, y) = known
            return Span(self.put(f"{x.low} & {y.low}"), self.put(f"{x.high} | {y.high}"), "bool", True)
        if {s.kind for s in known} != {"int"}:
            return None
        if node.func.id == "abs":
            (x,) = known
            low = self.put(f"tl.maximum(tl.maximum({x.low}, -{x.high}), 0)")
            return Span(low, self.put(f"tl.maximum({x.high}, -{x.low})"), "int", True)
        x, y = known
        low, high = {"min": ("minimum",) * 2, "max": ("maximum",) * 2, "where": ("minimum", "maximum")}[
            node.func.id
        ]
        ends = self.put(f"tl.{low}({x.low}, {y.low})"), self.put(f"tl.{high}({x.high}, {y.high})")
        return Span(*ends, "int", positive)


@lru_cache(maxsize=1024)
def blocks(text: str, kinds: Kinds) -> tuple[Any, int]:
    """The function that judges blocks by a mask, and how many it takes at a time."""
    writer = BlockWriter(kinds)
    span = writer.truth(parse(text))
    lines = [
        "q_low, q_high = q0, tl.minimum(q0 + BLOCK_M, S) - 1",
        "k_low, k_high = k0, tl.minimum(k0 + BLOCK_N, T) - 1",
        "top, edge = q0[:, None, None], k0[:, None, None]",
        "m, n = tl.arange(0, BLOCK_M)[None, :, None], tl.arange(0, BLOCK_N)[None, None, :]",
        "q, k = top + m, edge + n",
    ]
    parameters = "b, h, q0, k0, S, T, tables, strides, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr"
    function = define("blocks", parameters, [*lines, *writer.lines, f"return {span.high}, {span.low}"])
    return function, 1 if writer.dense else CHUNK
