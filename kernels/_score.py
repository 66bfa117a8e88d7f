"""The index expressions of attention: `mask` and `bias` as text over b, h, q, k.

    parse("(k <= q) & t0[b, k]")                     the syntax tree, or ValueError with a sentence
    evaluate(text, tables, B, H, S, T)               its values, of 4 dimensions, 1 where an index is not used
    band("(k <= q) & (q - k < 128) & t0[b, k]")      Band(low="-127", high="0", rest="t0[b, k]")
    gradient_forms("t0[0, h, q, k]", 0)              (("0", "h", "q", "k"),), or NotImplementedError

Language   indices b h q k; sizes S T; int and float literals; tables t0 .. t3, an index a dimension;
           + - * // % (the last two on integers, and they floor), unary -; == != < <= > >= of two operands;
           & | ~ on booleans; min(x, y), max(x, y), abs(x), where(cond, x, y), float(x). Python's syntax.
Kinds      a value is a bool, an int (computed in int64) or a float (in `dtype`); only float() turns a bool
           into a number, and an index is an int. What a table holds is known when it is read.
"""

import ast
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

INDICES = ("b", "h", "q", "k")
SIZES = ("S", "T")
OWN = "r4"  # of attention itself, beyond the tables it is given
TABLES = ("t0", "t1", "t2", "t3", OWN)
MAX_RANK = 4
CALLS = {"min": 2, "max": 2, "abs": 1, "where": 3, "float": 1}
ARITHMETIC: dict[type, str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%"}
LOGIC: dict[type, str] = {ast.BitAnd: "&", ast.BitOr: "|"}
COMPARISONS: dict[type, str] = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
}  # fmt: skip
RELATIVE = "k - q + S - 1"


@lru_cache(1024)
def parse(text: str) -> ast.expr:
    """The syntax tree of an index expression. ValueError, with the reason, for anything else."""
    try:
        tree = ast.parse(text, mode="eval").body
        kind(tree)
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no expression: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"{text[:60]!r}... is nested too deeply") from None
    return tree


def kind(node: ast.expr, tables: Sequence[str] = ()) -> str:
    """'bool', 'int', 'float' or, for a table beyond `tables` (the kinds of those known), 'any'."""
    match node:
        case ast.Name(id=name) if name in INDICES or name in SIZES:
            return "int"
        case ast.Constant(value=value):
            return _literal(value)
        case ast.Subscript(value=ast.Name(id=name)) if name in TABLES:
            return _read(node, name, tables)
        case ast.UnaryOp() | ast.BinOp() | ast.Compare():
            return _operation(node, tables)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if len(args) == CALLS.get(name):
            return _call(name, [kind(a, tables) for a in args], ast.unparse(node))
    raise ValueError(f"{ast.unparse(node)!r} is not part of the language of masks and biases")


def _literal(value: Any) -> str:
    if type(value) is int and value < 2**63:
        return "int"
    if type(value) is float and math.isfinite(value):
        return "float"
    raise ValueError(f"the literal {str(value)[:40]!r} is neither an int of 64 bits nor a finite float")


def _read(node: ast.Subscript, name: str, tables: Sequence[str]) -> str:
    indices = subscripts(node)
    if not 1 <= len(indices) <= MAX_RANK:
        raise ValueError(f"{ast.unparse(node)!r} has {len(indices)} indices; a table has 1 to {MAX_RANK}")
    for index in indices:
        if kind(index, tables) not in ("int", "any"):
            raise ValueError(f"{ast.unparse(index)!r} is no integer, and so not an index")
    number = TABLES.index(name)
    return tables[number] if number < len(tables) else "any"


def _operation(node: ast.expr, tables: Sequence[str]) -> str:
    text = ast.unparse(node)
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _number(text, kind(operand, tables))
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return _truth(text, kind(operand, tables))
        case ast.BinOp(op=op, left=left, right=right) if type(op) in ARITHMETIC:
            kinds = kind(left, tables), kind(right, tables)
            if "float" in kinds and isinstance(op, (ast.FloorDiv, ast.Mod)):
                raise ValueError(f"{text!r} divides floats; // and % take integers")
            return _number(text, *kinds)
        case ast.BinOp(op=op, left=left, right=right) if type(op) in LOGIC:
            return _truth(text, kind(left, tables), kind(right, tables))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            kinds = kind(left, tables), kind(right, tables)
            booleans = kinds.count("bool")
            if booleans and (booleans + kinds.count("any") < 2 or not isinstance(op, (ast.Eq, ast.NotEq))):
                raise ValueError(f"{text!r} compares a boolean with a number, or orders booleans")
            return "bool"
    raise ValueError(f"{text!r} is not part of the language of masks and biases")


def _call(name: str, kinds: list[str], text: str) -> str:
    if name == "float":
        return "float"
    if name == "where":
        _truth(text, kinds.pop(0))
        if set(kinds) <= {"bool", "any"}:
            return "any" if "any" in kinds else "bool"
    return _number(text, *kinds)


def _number(text: str, *kinds: str) -> str:
    if "bool" in kinds:
        raise ValueError(f"{text!r} calculates with a boolean; write where(...) or float(...)")
    return "float" if "float" in kinds else "any" if "any" in kinds else "int"


def _truth(text: str, *kinds: str) -> str:
    if not set(kinds) <= {"bool", "any"}:
        raise ValueError(f"{text!r} takes a number as a boolean; comparisons in it need parentheses")
    return "bool"


def subscripts(node: ast.Subscript) -> list[ast.expr]:
    """The index expressions of a table read."""
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


@lru_cache(1024)
def names(text: str) -> frozenset[str]:
    """The indices, sizes and tables that an expression uses; none if it is empty."""
    if not text:
        return frozenset()
    return frozenset(n.id for n in ast.walk(parse(text)) if isinstance(n, ast.Name)) - CALLS.keys()


def kind_of(table: Tensor) -> str:
    """What a table holds."""
    if table.dtype == torch.bool:
        return "bool"
    return "float" if table.is_floating_point() else "int"


def problems(what: str, text: str, tables: Sequence[Tensor], wanted: tuple[str, ...]) -> Iterator[str]:
    """Why `text` cannot be the `what` (mask, bias) over these tables: its syntax, kinds and ranks."""
    try:
        tree = parse(text)
        found = kind(tree, [kind_of(t) for t in tables])
    except ValueError as error:
        yield f"the {what}: {error}"
        return
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Name(id=name)):
                number, rank = TABLES.index(name), len(subscripts(node))
                if number >= len(tables):
                    yield f"the {what} reads {name}, and there are {len(tables)} tables"
                elif tables[number].ndim != rank:
                    dims = tables[number].ndim
                    yield f"the {what} reads {name} by {rank} indices; it has {dims} dimensions"
    if found not in (*wanted, "any"):
        yield f"the {what}, {text!r}, is a {found}"


# values


def evaluate(
    text: str,
    tables: Sequence[Tensor],
    B: int,
    H: int,
    S: int,
    T: int,
    *,
    b: range | None = None,
    h: range | None = None,
    q: range | None = None,
    k: range | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The values for those indices, all where None: of 4 dimensions, 1 for an index that is not used."""
    device = device if device is not None else tables[0].device if tables else torch.device("cpu")
    given = zip(INDICES, (b, h, q, k), (B, H, S, T), strict=True)
    ranges = {name: range(full) if part is None else part for name, part, full in given}
    value = _Values(tables, ranges, {"S": S, "T": T}, dtype, device).of(parse(text))
    if isinstance(value, Tensor):
        return value
    kinds = {bool: torch.bool, int: torch.int64}
    return torch.full((1, 1, 1, 1), value, dtype=kinds.get(type(value), dtype), device=device)


class _Values:
    """Values of syntax trees: tensors of 4 dimensions, or Python's numbers where no index is used."""

    def __init__(self, tables, ranges, sizes, dtype, device) -> None:
        self.tables, self.ranges, self.dtype, self.device = tables, ranges, dtype, device
        self.found: dict[str, Any] = dict(sizes)

    def of(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name):
                return self.found[name] if name in self.found else self.index(name)
            case ast.Constant(value=value):
                return value
            case ast.Subscript(value=ast.Name(id=name)):
                return self.read(self.tables[TABLES.index(name)], node)
            case ast.Call(func=ast.Name(id=name), args=args):
                return self.call(name, [self.of(a) for a in args])
            case ast.UnaryOp(op=op, operand=operand):
                x = self.of(operand)
                return -x if isinstance(op, ast.USub) else (not x) if isinstance(x, bool) else ~x
            case ast.BinOp(op=op, left=left, right=right):
                return _apply(type(op), *self.alike(self.of(left), self.of(right)))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _apply(type(op), *self.alike(self.of(left), self.of(right)))
        raise ValueError(f"{ast.unparse(node)!r} has no value")  # parse lets no other node through

    def index(self, name: str) -> Tensor:
        at = self.ranges[name]
        shape = [-1 if name == n else 1 for n in INDICES]
        self.found[name] = torch.arange(at.start, at.stop, device=self.device).view(shape)
        return self.found[name]

    def alike(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Both in `dtype` if one is a float: PyTorch would take the default dtype."""
        if self.real(x) != self.real(y):
            return self.float(x), self.float(y)
        return x, y

    def real(self, x: Any) -> bool:
        return x.is_floating_point() if isinstance(x, Tensor) else isinstance(x, float)

    def float(self, x: Any) -> Any:
        return x.to(self.dtype) if isinstance(x, Tensor) else float(x)

    def call(self, name: str, args: list[Any]) -> Any:
        if name == "float":
            return self.float(args[0])
        if name == "abs":
            return abs(args[0])
        *cond, x, y = args
        x, y = self.alike(x, y)
        if not cond:
            if not isinstance(x, Tensor) and not isinstance(y, Tensor):
                return min(x, y) if name == "min" else max(x, y)
            x, y = self.tensor(x, y), self.tensor(y, x)
            return torch.minimum(x, y) if name == "min" else torch.maximum(x, y)
        if not isinstance(cond[0], Tensor):
            return x if cond[0] else y
        return torch.where(cond[0], self.tensor(x, y), self.tensor(y, x))

    def tensor(self, x: Any, other: Any) -> Tensor:
        """x as a tensor, in the dtype that it has beside `other`."""
        if isinstance(x, Tensor):
            return x
        dtype = self.dtype if isinstance(x, float) else torch.bool if isinstance(x, bool) else torch.int64
        return torch.full((1, 1, 1, 1), x, dtype=dtype, device=self.device)

    def read(self, table: Tensor, node: ast.Subscript) -> Tensor:
        indices = subscripts(node)
        read = self.sliced(table, indices)
        if read is None:
            given = (self.of(i) for i in indices)
            at = [torch.as_tensor(i, device=self.device).view(-1, 1, 1, 1)
                  if not isinstance(i, Tensor) else i for i in given]  # fmt: skip
            read = table[tuple(at)]
        kind = kind_of(table)
        return read if kind == "bool" else read.to(self.dtype if kind == "float" else torch.int64)

    def sliced(self, table: Tensor, indices: list[ast.expr]) -> Tensor | None:
        """A view, where each index is a number, an index at most once, or (last, copied) the relative one."""
        axes: list[str] = []
        for dim, index in enumerate(indices):
            at = len(axes)
            match index:
                case ast.Constant(value=int(value)):
                    table = table.select(at, value)
                case ast.Name(id=name) if name in INDICES and name not in axes:
                    chosen = self.ranges[name]
                    table = table.narrow(at, chosen.start, len(chosen))
                    axes.append(name)
                case _ if dim == len(indices) - 1 and not {"q", "k"} & {*axes} and is_relative(index):
                    table = self.windows(table)
                    axes += ["q", "k"]
                case _:
                    return None
        table = table.permute(sorted(range(len(axes)), key=lambda i: INDICES.index(axes[i])))
        return table[tuple(slice(None) if n in axes else None for n in INDICES)]

    def windows(self, table: Tensor) -> Tensor:
        """[..., k - q + S - 1] as [..., q, k]: windows of the table, the last one for the first query."""
        q, k = self.ranges["q"], self.ranges["k"]
        if not len(q) or not len(k):
            return table.new_empty(*table.shape[:-1], len(q), len(k))
        start = k.start - (q.stop - 1) + self.found["S"] - 1
        return table.narrow(-1, start, len(q) + len(k) - 1).unfold(-1, len(k), 1).flip(-2)


def _apply(op: type, x: Any, y: Any) -> Any:
    symbol = (ARITHMETIC | LOGIC | COMPARISONS)[op]
    return OPERATORS[symbol](x, y)


OPERATORS: dict[str, Any] = {
    "+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y, "//": lambda x, y: x // y,
    "%": lambda x, y: x % y, "&": lambda x, y: x & y, "|": lambda x, y: x | y, "==": lambda x, y: x == y,
    "!=": lambda x, y: x != y, "<": lambda x, y: x < y, "<=": lambda x, y: x <= y, ">": lambda x, y: x > y,
    ">=": lambda x, y: x >= y,
}  # fmt: skip


# bands


class Band(NamedTuple):
    """low <= k - q <= high, texts over S, T and literals, where given, and `rest`, where not empty."""

    low: str | None
    high: str | None
    rest: str

    def limits(self, S: int, T: int) -> tuple[int | None, int | None]:
        """low and high as numbers."""
        return tuple(None if x is None else size(x, S, T) for x in (self.low, self.high))  # type: ignore


@lru_cache(4096)
def size(text: str, S: int, T: int) -> int:
    """The number that an expression of S, T and literals is."""
    return _Values((), {}, {"S": S, "T": T}, torch.float64, torch.device("cpu")).of(parse(text))


@lru_cache(1024)
def band(mask: str) -> Band:
    """The band of a mask: its linear conjuncts in k - q, and the rest of it."""
    if not mask:
        return Band(None, None, "")
    lows, highs, rest = [], [], []
    for conjunct in _conjuncts(parse(mask)):
        found = _bounds(conjunct)
        if found is None:
            rest.append(conjunct)
        else:
            lows += [x for x in found[:1] if x is not None]
            highs += [x for x in found[1:] if x is not None]
    joined = reduce(lambda x, y: ast.BinOp(x, ast.BitAnd(), y), rest) if rest else None
    return Band(_tightest("max", lows), _tightest("min", highs), ast.unparse(joined) if joined else "")


def _tightest(name: str, bounds: list[str]) -> str | None:
    return reduce(lambda x, y: f"{name}({x}, {y})", dict.fromkeys(bounds)) if bounds else None


_OPPOSITE: dict[type, type[ast.cmpop]] = {
    ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip


_MIRRORED: dict[type, type[ast.cmpop]] = {
    ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE
}  # fmt: skip


def _conjuncts(node: ast.expr, negated: bool = False) -> Iterator[ast.expr]:
    """What must hold at once: x & y, ~(x | y), and ~(x < y) turned to x >= y where both are integers."""
    match node:
        case ast.BinOp(op=op, left=left, right=right) if isinstance(op, ast.BitOr if negated else ast.BitAnd):
            yield from _conjuncts(left, negated)
            yield from _conjuncts(right, negated)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            yield from _conjuncts(operand, not negated)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if negated and (
            kind(left) == kind(right) == "int"  # not x < y is x >= y for no NaN
        ):
            yield ast.Compare(left, [_OPPOSITE[type(op)]()], [right])
        case _:
            yield ast.UnaryOp(ast.Invert(), node) if negated else node


def _bounds(node: ast.expr) -> tuple[str | None, str | None] | None:
    """(low, high) of k - q, if the comparison is about nothing else."""
    match node:
        case ast.Compare(left=ast.Call(func=ast.Name(id="abs"), args=[inner]), ops=[op], comparators=[right]):
            if not isinstance(op, (ast.Lt, ast.LtE)):
                return None
            below = _bounds(ast.Compare(inner, [op], [right]))
            above = _bounds(ast.Compare(ast.UnaryOp(ast.USub(), inner), [op], [right]))
            if below is None or above is None:
                return None
            return below[0] or above[0], below[1] or above[1]
        case ast.Compare(left=left, ops=[op], comparators=[ast.Call(func=ast.Name(id="abs")) as right]):
            return _bounds(ast.Compare(right, [_MIRRORED.get(type(op), ast.Eq)()], [left]))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            terms = _linear(ast.BinOp(left, ast.Sub(), right))
            return None if terms is None else _interval(terms, type(op))
    return None


def _interval(terms: dict[str, int], op: type[ast.cmpop]) -> tuple[str | None, str | None] | None:
    """(low, high) of k - q where `terms` (op) 0."""
    sign = terms.pop("k", 0)
    if abs(sign) != 1 or terms.pop("q", 0) != -sign:
        return None
    terms = {name: -sign * n for name, n in terms.items()}  # k - q (op, turned if sign < 0) terms
    if sign < 0:
        op = _MIRRORED.get(op, op)
    off = -1 if op is ast.Lt else 1 if op is ast.Gt else 0
    bound = _written(terms | {"": terms.get("", 0) + off})
    if op is ast.NotEq:
        return None
    return None if op in (ast.Lt, ast.LtE) else bound, None if op in (ast.Gt, ast.GtE) else bound


def _linear(node: ast.expr) -> dict[str, int] | None:
    """{"k": 1, "q": -1, "T": 2, "": 7} for k - q + 2 * T + 7; terms of S and T alone count as one name."""
    match node:
        case ast.Constant(value=int(value)):
            return {"": value}
        case ast.Name(id=name) if name in ("q", "k", *SIZES):
            return {name: 1}
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _scaled(_linear(operand), {"": -1})
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            x, y = _linear(left), _linear(right)
            product = _scaled(x, y) or _scaled(y, x)
            if product is not None:
                return product
        case ast.BinOp(op=ast.Add() | ast.Sub() as op, left=left, right=right):
            x, y = _linear(left), _linear(right)
            y = _scaled(y, {"": -1}) if isinstance(op, ast.Sub) else y
            if x is None or y is None:
                return None
            total = {name: x.get(name, 0) + y.get(name, 0) for name in x | y}
            return {name: n for name, n in total.items() if n}
    text = ast.unparse(node)
    return {f"({text})": 1} if names(text) <= {*SIZES} and kind(node) == "int" else None


def _scaled(terms: dict[str, int] | None, by: dict[str, int] | None) -> dict[str, int] | None:
    if terms is None or by is None or by.keys() - {""}:
        return None
    return {name: n * by.get("", 0) for name, n in terms.items() if n * by.get("", 0)}


def _written(terms: dict[str, int]) -> str:
    """T - S + 5, from {"T": 1, "S": -1, "": 5}: positive terms first."""
    parts = []
    for name, n in sorted(terms.items(), key=lambda item: (item[0] == "", item[1] < 0, item[0])):
        factor = str(abs(n)) if name == "" else name if abs(n) == 1 else f"{abs(n)} * {name}"
        if n:
            parts.append(("- " if n < 0 else "+ ") + factor)
    text = " ".join(parts).removeprefix("+ ") or "0"
    return f"-{text[2:]}" if text.startswith("- ") else text


@lru_cache(1024)
def keeps_every_row(mask: str, S: int, T: int) -> bool:
    """Whether each query surely keeps a key: the mask is a band that never leaves the keys."""
    low, high = band(mask).limits(S, T)
    least, most = -S if low is None else low, T if high is None else high
    return not band(mask).rest and least <= most and most >= 0 and S - 1 + least <= T - 1


# gradients


def is_relative(index: ast.expr) -> bool:
    """Whether this is k - q + S - 1, in any order: the index of a table of S + T - 1 relative places."""
    return _linear(index) == {"k": 1, "q": -1, "S": 1, "": -1}


@lru_cache(1024)
def gradient_forms(bias: str, number: int) -> tuple[tuple[str, ...], ...]:
    """How the bias reads table `number`: for each read, "0", "b", "h", "q", "k" or "relative" a dimension.

    NotImplementedError, with the reason, where the bias uses that table in any other way.
    """
    table = TABLES[number]
    forms = []
    for term in _terms(parse(bias)) if bias else ():
        if table not in names(ast.unparse(term)):
            continue
        match term:
            case ast.Subscript(value=ast.Name(id=name)) if name == table:
                forms.append(_form(term))
            case _:
                raise NotImplementedError(
                    f"the gradient of {table} needs it added as it is, not in {ast.unparse(term)!r}"
                )
    if not forms:
        raise NotImplementedError(f"{table} is no part of the bias {bias!r}, and has no gradient")
    return tuple(forms)


def _terms(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            yield from _terms(left)
            yield from _terms(right)
        case _:
            yield node


def _form(node: ast.Subscript) -> tuple[str, ...]:
    form = []
    for index in subscripts(node):
        match index:
            case ast.Constant(value=0):
                form.append("0")
            case ast.Name(id=name) if name in INDICES:
                form.append(name)
            case _ if is_relative(index):
                form.append("relative")
            case _:
                raise NotImplementedError(
                    f"the gradient of {ast.unparse(node)!r}: its index {ast.unparse(index)!r} is none of"
                    f" 0, b, h, q, k, {RELATIVE}"
                )
    used = [x for x in form if x != "0"] + (["q", "k"] if "relative" in form else [])
    if len({*used}) < len(used):
        raise NotImplementedError(f"the gradient of {ast.unparse(node)!r}: an index stands in it twice")
    return tuple(form)


@lru_cache(1024)
def plain_reads(text: str) -> tuple[tuple[str, int, str], ...]:
    """(table, dimension, index) wherever a dimension of a table is read by b, h, q or k itself."""
    found = []
    for node in ast.walk(parse(text)):
        match node:
            case ast.Subscript(value=ast.Name(id=table)):
                for dim, index in enumerate(subscripts(node)):
                    if isinstance(index, ast.Name) and index.id in INDICES:
                        found.append((table, dim, index.id))
    return tuple(found)
