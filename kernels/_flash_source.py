"""Triton functions generated from index expressions: a mask or bias over a tile, and a mask over blocks.

    keep(b, h, top, edge, m, n, S, T, tables, strides)            "k <= q" for queries top + m, keys edge + n
    bias(s, b, h, top, edge, m, n, S, T, tables, strides)         base-2 logits s with the bias added
    blocks(b, h, q0, k0, S, T, tables, strides, BLOCK_M, BLOCK_N) whether a mask keeps some, or every, pair of
                                                                  the blocks that start at q0 and k0

Shapes     m and n are int32 tiles that broadcast: [M, 1] and [1, N], or [1, M] and [N, 1]; q0 and k0 [C] or [1].
Numerics   integers as in Python: // and % floor. Floating tables are read as fp32.
Limits     Blocks are judged by interval arithmetic, a table read by the least and the greatest of what it loads.
           Where an operator's interval is not known, a block counts as kept in part, which is always right.
"""

import ast
import hashlib
import linecache
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

from fxaccel.kernels._score import parse, subscripts
from fxaccel.kernels._triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # finite: a row of such scores is a uniform one, a row of -inf an empty one
CHUNK = 16  # blocks judged at a time

Kinds = tuple[tuple[str, int], ...]
"""Of each table what it holds, one of "bool", "int32", "int64" or "float", and its rank."""

SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%", ast.BitAnd: "&"}
SIGNS |= {ast.BitOr: "|", ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">"}
SIGNS |= {ast.GtE: ">="}
ENDS = {"int32": ("2147483647", "-2147483648"), "float": ('float("inf")', 'float("-inf")')}
ENDS |= {"int64": ("9223372036854775807", "-9223372036854775808"), "bool": ("1", "0")}


@triton.jit
def add_bias(s, bias):
    """Base-2 logits with a bias that may hold -inf, or finfo.min for a key to be seen if there is no other."""
    return tl.where(bias == float("-inf"), bias, tl.maximum(s + bias * LOG2E, LOWEST))


@triton.jit
def floor_div(x, y):
    """x // y rounded down; Triton rounds towards 0."""
    down = (x % y != 0) & ((x % y < 0) != (y < 0))
    return x // y - tl.where(down, 1, 0)


@triton.jit
def floor_mod(x, y):
    """x % y with the sign of y; Triton's has that of x."""
    other = (x % y != 0) & ((x % y < 0) != (y < 0))
    return x % y + tl.where(other, y, 0)


class Part(NamedTuple):
    """A subexpression's code, what it holds ("bool", "int" or "float") and whether it is known to be >= 0."""

    code: str
    kind: str
    positive: bool = False


class Span(NamedTuple):
    """Code of the least and the greatest value in a block; of a boolean, whether all and whether any hold."""

    low: str
    high: str
    kind: str
    positive: bool = False


def names(node: ast.AST) -> set[str]:
    """The indices and sizes that an expression mentions."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def literal(node: ast.expr) -> Any:
    """The number that a literal stands for, or None."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = literal(node.operand)
        return None if value is None else -value
    return node.value if isinstance(node, ast.Constant) else None


def spelled(value: float) -> str:
    """A number as Triton reads it."""
    return f'float("{value}")' if value in (inf, -inf) else f"({value!r})"


def table_of(node: ast.Subscript) -> int:
    """The number of the table that is read."""
    assert isinstance(node.value, ast.Name), "the parser lets nothing else be indexed"
    return int(node.value.id[1:])


def affine(node: ast.expr) -> tuple[int, int, str] | None:
    """(x, y, rest) where an index is x * q + y * k + rest, and rest reads neither; None where it is not so."""
    if isinstance(node, ast.Name) and node.id in ("q", "k"):
        return int(node.id == "q"), int(node.id == "k"), "0"
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        left, right = affine(node.left), affine(node.right)
        if left is None or right is None:
            return None
        sign = 1 if isinstance(node.op, ast.Add) else -1
        rest = f"({left[2]} {SIGNS[type(node.op)]} {right[2]})"
        return left[0] + sign * right[0], left[1] + sign * right[1], rest
    plain = all(isinstance(n, (ast.BinOp, ast.Name, ast.Constant, ast.operator, ast.Load)) for n in ast.walk(node))
    exact = not any(isinstance(n, (ast.FloorDiv, ast.Mod)) for n in ast.walk(node))
    if plain and exact and not names(node) & {"q", "k"}:
        return 0, 0, f"({ast.unparse(node)})"
    return None


class Writer:
    """The body of a generated function, a line a value."""

    def __init__(self, kinds: Kinds, below: bool = False) -> None:
        self.kinds, self.below = kinds, below
        self.lines: list[str] = []

    def put(self, code: str) -> str:
        """Give a value a name of its own."""
        self.lines.append(f"x{len(self.lines)} = {code}")
        return f"x{len(self.lines) - 1}"

    def value(self, node: ast.expr) -> Part:
        """The value of an expression over a tile."""
        number = literal(node)
        if isinstance(number, bool):
            return Part(str(number), "bool", True)
        if number is not None:
            return Part(spelled(number), "int" if isinstance(number, int) else "float", number >= 0)
        if isinstance(node, ast.Name):
            return Part(node.id, "int", True)
        if isinstance(node, ast.Subscript):
            kind = self.kinds[table_of(node)][0]
            return Part(self.load(node)[0], kind if kind in ("bool", "float") else "int", kind == "bool")
        if isinstance(node, ast.UnaryOp):
            x = self.value(node.operand)
            flipped = isinstance(node.op, ast.Invert)
            return Part(self.put(f"{x.code} == 0" if flipped else f"-{self.number(x)}"), x.kind)
        if isinstance(node, ast.Compare):
            x, y = (self.number(self.value(n)) for n in (node.left, node.comparators[0]))
            return Part(self.put(f"{x} {SIGNS[type(node.ops[0])]} {y}"), "bool", True)
        if isinstance(node, ast.BinOp):
            return self.binary(node.op, self.value(node.left), self.value(node.right))
        assert isinstance(node, ast.Call), f"the parser lets no {type(node).__name__} through"
        return self.call(node)

    def number(self, x: Part) -> str:
        """The code of a value that takes part in arithmetic."""
        return f"tl.cast({x.code}, tl.int32)" if x.kind == "bool" else x.code

    def binary(self, op: ast.operator, x: Part, y: Part) -> Part:
        """x op y."""
        sign = SIGNS[type(op)]
        if sign in "&|":
            return Part(self.put(f"{x.code} {sign} {y.code}"), "bool", True)
        positive = x.positive and y.positive
        kind = "float" if "float" in (x.kind, y.kind) else "int"
        code = f"{self.number(x)} {sign} {self.number(y)}"
        if sign in ("//", "%") and not positive:
            code = f"{'floor_div' if sign == '//' else 'floor_mod'}({self.number(x)}, {self.number(y)})"
        return Part(self.put(code), kind, positive and sign != "-" or (sign == "%" and y.positive))

    def call(self, node: ast.Call) -> Part:
        """min, max, abs, where or float of values."""
        assert isinstance(node.func, ast.Name), "the parser lets nothing else be called"
        x, *rest = (self.value(n) for n in node.args)
        if node.func.id == "float":
            return Part(self.put(f"tl.cast({x.code}, tl.float32)"), "float", x.positive)
        if node.func.id == "abs":
            return Part(self.put(f"tl.abs({self.number(x)})"), x.kind, True)
        if node.func.id == "where":
            a, b = rest
            kind = "float" if "float" in (a.kind, b.kind) else a.kind if a.kind == b.kind else "int"
            return Part(self.put(f"tl.where({x.code}, {a.code}, {b.code})"), kind, a.positive and b.positive)
        a = rest[0]
        kind = "float" if "float" in (x.kind, a.kind) else "int"
        least = node.func.id == "min"
        positive = x.positive and a.positive if least else x.positive or a.positive
        function = "tl.minimum" if least else "tl.maximum"
        return Part(self.put(f"{function}({self.number(x)}, {self.number(a)})"), kind, positive)

    def load(self, node: ast.Subscript) -> tuple[str, str]:
        """A table read over a tile, and the code of its mask ("" where it needs none).

        What is alike for the whole tile is an int64 scalar; within the tile offsets fit 32 bits.
        """
        at, place = table_of(node), f"tables[{table_of(node)}]"
        first = sum(rank for _, rank in self.kinds[:at])
        near, wide, axes = [], [], set()
        for step, index in enumerate(subscripts(node), first):
            linear = affine(index)
            if linear is None:
                wide.append(f"tl.cast({self.value(index).code}, tl.int64) * strides[{step}]")
                axes |= names(index) & {"q", "k"}
                continue
            x, y, rest = linear
            far = "".join(f" + {c} * {t}" for c, t in ((x, "top"), (y, "edge")) if c)
            place += f" + tl.cast({rest}{far}, tl.int64) * strides[{step}]"
            if x or y:
                tile = " + ".join(f"{c} * {t}" for c, t in ((x, "m"), (y, "n")) if c)
                near.append(f"({tile}) * strides[{step}]")
            axes |= {axis for axis, c in (("q", x), ("k", y)) if c}
        offsets = " + ".join(near + wide)
        mask = " & ".join(f"({axis} < {size})" for axis, size in (("q", "S"), ("k", "T")) if axis in axes)
        mask = f"(k >= 0) & {mask}" if self.below and "k" in axes else mask
        place = f"{place} + ({offsets})" if offsets else place
        code = self.put(f"tl.load({place}, {mask}, other=0)" if mask else f"tl.load({place})")
        kind = self.kinds[at][0]
        return self.put(f"{code} != 0" if kind == "bool" else f"tl.cast({code}, tl.{to_type(kind)})"), mask


def to_type(kind: str) -> str:
    """The Triton type in which a table of this kind takes part."""
    return "float32" if kind == "float" else kind


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
            kind = "bool" if isinstance(number, bool) else "int" if isinstance(number, int) else "float"
            code = str(number) if kind == "bool" else spelled(number)
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
            ends = [self.put(f"tl.where({mask}, {x}, {end})") for x, end in zip(ends, ENDS[kind], strict=True)]
            ends = [self.put(f"tl.{f}(tl.{f}({x}, 2), 1)") for x, f in zip(ends, ("min", "max"), strict=True)]
        if kind == "bool":
            ends = [self.put(f"{x} != 0") for x in ends]
        return Span(*ends, kind if kind in ("bool", "float") else "int", kind == "bool")

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
            none = self.put(f"({x.high} < {y.low}) | ({x.low} > {y.high})")
            every = self.put(f"({x.low} == {y.high}) & ({x.high} == {y.low})")
        else:
            if op in (ast.Gt, ast.GtE):
                x, y, op = y, x, {ast.Gt: ast.Lt, ast.GtE: ast.LtE}[op]
            every = self.put(f"{x.high} {SIGNS[op]} {y.low}")
            none = self.put(f"{y.high} {'<=' if op is ast.Lt else '<'} {x.low}")
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
            x, y = self.truth(node.left), self.truth(node.right)
            return Span(*(self.put(f"{a} {sign} {b}") for a, b in ((x.low, y.low), (x.high, y.high))), "bool", True)
        x, y = self.span(node.left), self.span(node.right)
        if x is None or y is None or x.kind != "int" or y.kind != "int":
            return None
        if sign == "+":
            return Span(self.put(f"{x.low} + {y.low}"), self.put(f"{x.high} + {y.high}"), "int", x.positive & y.positive)
        if sign == "-":
            return Span(self.put(f"{x.low} - {y.high}"), self.put(f"{x.high} - {y.low}"), "int")
        if sign == "*" and x.positive and y.positive:
            return Span(self.put(f"{x.low} * {y.low}"), self.put(f"{x.high} * {y.high}"), "int", True)
        divisor = literal(node.right)
        if sign == "//" and divisor is not None and divisor > 0:
            parts = (self.binary(node.op, Part(end, "int", x.positive), Part(str(divisor), "int", True)) for end in x[:2])
            return Span(*(p.code for p in parts), "int", x.positive)
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
        low, high = {"min": ("minimum",) * 2, "max": ("maximum",) * 2, "where": ("minimum", "maximum")}[node.func.id]
        ends = self.put(f"tl.{low}({x.low}, {y.low})"), self.put(f"tl.{high}({x.high}, {y.high})")
        return Span(*ends, "int", positive)


def define(kind: str, parameters: str, lines: list[str]) -> Any:
    """The Triton function of these lines; its source stands in `linecache`, where inspect looks for it."""
    body = "".join(f"    {line}\n" for line in lines)
    name = f"{kind}_{hashlib.sha256(f'{parameters}{body}'.encode()).hexdigest()[:16]}"
    source, file = f"def {name}({parameters}):\n{body}", f"<fxaccel {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    helpers = {f.__name__: f for f in (add_bias, floor_div, floor_mod)}
    scope = {"tl": tl, "LOG2E": LOG2E, "__name__": f"{__name__}.{name}", **helpers}
    exec(compile(source, file, "exec"), scope)
    return triton.jit(scope[name])


TILE = "b, h, top, edge, m, n, S, T, tables, strides"


@lru_cache(maxsize=1024)
def keep(text: str, kinds: Kinds, below: bool = False) -> Any:
    """The function of a mask over a tile, whose keys may be below 0 if `below`."""
    writer = Writer(kinds, below)
    result = writer.value(parse(text))
    code = result.code if result.kind == "bool" else f"{result.code} != 0"
    return define("keep", TILE, ["q = top + m", "k = edge + n", *writer.lines, f"return {code}"])


def tame(node: ast.AST) -> bool:
    """Whether a bias can hold no -inf or finfo.min: it reads tables at b and h alone, and has no such literal."""
    reads = [n for n in ast.walk(node) if isinstance(n, ast.Subscript)]
    large = any(isinstance(n, ast.Constant) and abs(n.value) > 1e30 for n in ast.walk(node))
    return not large and not any(names(r) & {"q", "k"} for r in reads)


@lru_cache(maxsize=1024)
def bias(text: str, kinds: Kinds, below: bool = False) -> Any:
    """The function that adds a bias to base-2 logits."""
    writer, node = Writer(kinds, below), parse(text)
    code = f"tl.cast({writer.value(node).code}, tl.float32)"
    code = f"s + {code} * LOG2E" if tame(node) else f"add_bias(s, {code})"
    return define("bias", f"s, {TILE}", ["q = top + m", "k = edge + n", *writer.lines, f"return {code}"])


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
