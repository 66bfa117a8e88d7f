"""Triton functions generated from index expressions: a mask or a bias over a tile.

    keep(b, h, top, edge, m, n, S, T, tables, strides)     "k <= q" for queries top + m and keys edge + n
    bias(s, b, h, top, edge, m, n, S, T, tables, strides)  base-2 logits s with the bias added

Shapes     m and n are int32 tiles that broadcast: [M, 1] and [1, N], or [1, M] and [N, 1].
Numerics   integers as in Python: // and % floor. Floating tables are read as fp32.
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

Kinds = tuple[tuple[str, int], ...]
"""Of each table its rank, and what it holds: "bool", "int32", "int64" or "float"."""

SIGNS: dict[type, str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%"}
SIGNS |= {
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
}
SIGNS |= {ast.GtE: ">="}


@triton.jit
def add_bias(s, bias):
    """Base-2 logits with a bias that may be -inf, or finfo.min for a key to be seen if alone."""
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
    """(x, y, rest) of an index x * q + y * k + rest, where rest reads neither; None of any other."""
    if isinstance(node, ast.Name) and node.id in ("q", "k"):
        return int(node.id == "q"), int(node.id == "k"), "0"
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        left, right = affine(node.left), affine(node.right)
        if left is None or right is None:
            return None
        sign = 1 if isinstance(node.op, ast.Add) else -1
        rest = f"({left[2]} {SIGNS[type(node.op)]} {right[2]})"
        return left[0] + sign * right[0], left[1] + sign * right[1], rest
    plain = all(
        isinstance(n, (ast.BinOp, ast.Name, ast.Constant, ast.operator, ast.Load)) for n in ast.walk(node)
    )
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
            x, y = (self.value(n) for n in (node.left, node.comparators[0]))
            code = f"{self.number(x)} {SIGNS[type(node.ops[0])]} {self.number(y)}"
            return Part(self.truth_of(code, "float" in (x.kind, y.kind)), "bool", True)
        if isinstance(node, ast.BinOp):
            return self.binary(node.op, *(self.factor(n, node) for n in (node.left, node.right)))
        assert isinstance(node, ast.Call), f"the parser lets no {type(node).__name__} through"
        return self.call(node)

    def truth_of(self, code: str, floating: bool) -> str:
        """The name of a comparison; one of float scalars the interpreter would broadcast as floats."""
        return self.put(f"tl.where({code}, 1, 0) == 1" if floating else code)

    def factor(self, node: ast.expr, parent: ast.BinOp) -> Part:
        """An operand; in int64 where two unknown integers are multiplied, as q * k may pass 2**31."""
        x = self.value(node)
        known = literal(parent.left) is not None or literal(parent.right) is not None
        wide = isinstance(parent.op, ast.Mult) and not known and x.kind == "int"
        return x._replace(code=f"tl.cast({x.code}, tl.int64)") if wide else x

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
        return Part(self.put(code), kind, (positive and sign != "-") or (sign == "%" and y.positive))

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


@lru_cache(maxsize=1)
def flat() -> Any:
    """The function that makes all logits 0, whatever they were."""
    return define("flat", f"s, {TILE}", ["return tl.where(s == s, 0.0, 0.0)"])


def tame(node: ast.AST) -> bool:
    """Whether a bias holds no -inf or finfo.min: it reads tables at b and h alone and has no such literal."""
    reads = [n for n in ast.walk(node) if isinstance(n, ast.Subscript)]
    large = any(abs(literal(n) or 0) > 1e30 for n in ast.walk(node) if isinstance(n, ast.Constant))
    return not large and not any(names(r) & {"q", "k"} for r in reads)


@lru_cache(maxsize=1024)
def bias(text: str, kinds: Kinds, below: bool = False) -> Any:
    """The function that adds a bias to base-2 logits."""
    writer, node = Writer(kinds, below), parse(text)
    code = f"tl.cast({writer.value(node).code}, tl.float32)"
    code = f"s + {code} * LOG2E" if tame(node) else f"add_bias(s, {code})"
    return define("bias", f"s, {TILE}", ["q = top + m", "k = edge + n", *writer.lines, f"return {code}"])
