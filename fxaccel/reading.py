"""Reads the value of a graph's node as a function of its indices (fxaccel.indexing says what it is made of).

`Reader.read(node, indices)` walks back through views and elementwise operators. Nothing is approximated: an
operator that is not understood makes its node a Read of itself. A node that depends on data is looked into
only as far as its indices mix the two symbols of `mixed` (a query and a key): what depends on one of them is
small, and is left as the tensor of its natural size.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxaccel.indexing import (
    ELEMENTWISE,
    INTEGERS,
    ZERO,
    Affine,
    Call,
    Const,
    Indices,
    Range,
    Read,
    Value,
    compare,
    compared_branches,
    conjunction,
    dimension,
    elementwise,
    is_number,
    literal,
    number,
    plain,
    select,
    symbols,
)
from fxaccel.ir import arguments

aten = torch.ops.aten

_FULL = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2}
_ONES = {aten.ones.default, aten.ones_like.default, aten.new_ones.default}
_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_SAME = {
    aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default,
    aten.expand_as.default, aten.to.device, aten.lift_fresh_copy.default,
}  # fmt: skip


class Reader:
    """Reads nodes of one graph; `mixed` are the two symbols whose meeting makes a tensor worth opening."""

    def __init__(
        self,
        known: Range,
        mixed: tuple[sympy.Symbol, sympy.Symbol],
        frozen: Iterable[fx.Node] = (),
        numbers: Mapping[fx.Node, Any] | None = None,
    ) -> None:
        self.known, self.mixed = known, frozenset(mixed)
        self.frozen = frozenset(frozen)  # nodes whose storage is written to
        self.numbers = numbers or {}  # nodes that are one constant
        self.opened: dict[fx.Node, None] = {}  # nodes looked into, in the order of the visits
        self.constant: dict[fx.Node, bool] = {}

    def read(self, node: fx.Node, at: Sequence[Value]) -> Value:
        """The element of `node` at indices `at`, one for each dimension."""
        shape = node.meta["val"].shape
        where = tuple(ZERO if dimension(s) == 1 else i for s, i in zip(shape, at, strict=True))
        if node in self.numbers:
            return number(self.numbers[node], node.meta["val"].dtype)
        meet = self.mixed <= frozenset().union(*map(symbols, where)) if where else False
        if node.op != "call_function" or node in self.frozen:
            return Read(node, where)
        if not (meet or self.pure(node)) and node.target not in _VIEWS:
            return Read(node, where)
        value = self.opened_at(node, where)
        if value is None:
            return Read(node, where)
        self.opened[node] = None
        return value

    def anywhere(self, node: fx.Node, at: Indices, dim: int) -> Value:
        """The element of `node` at an index of dimension `dim` that may be any."""
        one, known = sympy.Dummy(integer=True, nonnegative=True), self.known
        self.known = Range({**known.sizes, one: dimension(node.meta["val"].shape[dim])})
        try:
            return self.read(node, (*at[:dim], Affine(one), *at[dim + 1 :]))
        finally:
            self.known = known

    def pure(self, node: fx.Node) -> bool:
        """Whether the node depends on sizes alone, on no data."""
        if node not in self.constant:
            self.constant[node] = node.op == "call_function" and all(
                not isinstance(n.meta.get("val"), Tensor) or self.pure(n) for n in node.all_input_nodes
            ) and (bool(node.all_input_nodes) or node.target in _CREATE)  # fmt: skip
        return self.constant[node]

    def opened_at(self, node: fx.Node, at: Indices) -> Value | None:
        """The element through the operator of `node`, None where that is not understood."""
        target = node.target
        if target is operator.getitem:
            return self.part(node, at)
        if not isinstance(target, torch._ops.OpOverload):
            return None
        a = arguments(node)
        if target in _SAME:
            return self.read(a.get("self", node.args[0]), at)
        step = _STEPS.get(target)
        if step is not None:
            return step(self, node, a, at)
        random = torch.Tag.nondeterministic_seeded in target.tags
        if target in ELEMENTWISE or (torch.Tag.pointwise in target.tags and not random):
            return self.pointwise(node, a, at)
        return None

    def pointwise(self, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
        schema = {s.name: s.kwarg_only for s in node.target._schema.arguments}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        given = {**a, "dtype": a["dtype"]} if node.target is aten.to.dtype else a
        for name, arg in given.items():
            if isinstance(arg, fx.Node):
                val = arg.meta["val"]
                arg = self.read(arg, at[len(at) - val.dim() :]) if isinstance(val, Tensor) else _size(val)
            elif isinstance(arg, (list, tuple)):
                return None
            if schema[name]:
                kwargs[name] = arg
            else:
                args.append(arg)
        dtype = node.meta["val"].dtype
        if node.target is aten.to.dtype:
            return self.cast(args[0], node.args[0].meta["val"].dtype, dtype)
        if kwargs.get("alpha") == 1:
            kwargs.pop("alpha")
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        if any(isinstance(v, (Affine, Const, Read, Call)) for v in kwargs.values()):
            return None
        while args and args[-1] is None:
            args.pop()
        return elementwise(node.target, args, kwargs, dtype, self.known)

    def cast(self, x: Value, old: torch.dtype, new: torch.dtype) -> Value:
        if old == new or (new in INTEGERS and isinstance(x, Affine)):
            return x
        if is_number(x):
            return number(plain(x), new) if new.is_floating_point or new is torch.bool else literal(
                int(plain(x))
            )  # fmt: skip
        if old is torch.bool and new is not torch.bool:
            return select(x, number(1, new), number(0, new), new)
        if new is torch.bool and isinstance(x, Call) and x.target is aten.where.self:
            branch = compared_branches(aten.ne.Scalar, x, ZERO, self.known)
            if branch is not None:
                return branch
        return elementwise(aten.to.dtype, (x, new), {}, new, self.known)

    # -- one operator each ----------------------------------------------------------------------------

    def part(self, node: fx.Node, at: Indices) -> Value | None:
        whole, i = node.args
        if not isinstance(whole, fx.Node) or not isinstance(whole.target, torch._ops.OpOverload):
            return None
        a = arguments(whole)
        dim = a.get("dim", 0)
        if whole.target is aten.unbind.int:
            return self.read(a["self"], (*at[:dim], _int(i), *at[dim:]))
        if whole.target is aten.split.Tensor:
            start = _size(a["split_size"]).of * i
        elif whole.target is aten.split_with_sizes.default:
            start = sum((_size(s).of for s in a["split_sizes"][:i]), sympy.Integer(0))
        else:
            return None
        self.opened[whole] = None
        return self.read(a["self"], _shifted(at, dim, start))

    def reshape(self, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
        source = a["self"]
        into = tuple(map(dimension, source.meta["val"].shape))
        moved = self.reshaped(tuple(map(dimension, node.meta["val"].shape)), into, at)
        return None if moved is None else self.read(source, moved)

    def reshaped(
        self, shape: Sequence[sympy.Expr], into: Sequence[sympy.Expr], at: Indices
    ) -> Indices | None:
        """Where element `at` of a tensor of `shape` lies in the same tensor viewed as `into`."""
        moved: list[Value] = []
        for left, right in groups(shape, into):
            if right == [-1]:
                return None
            flat = sympy.Integer(0)
            for i in left:
                x = at[i]
                if not isinstance(x, Affine):
                    return None
                flat = flat * shape[i] + x.of
            split = self.unflattened(sympy.expand(flat), [into[j] for j in right])
            if split is None:
                return None
            moved += split
        return tuple(moved) if len(moved) == len(into) else None

    def unflattened(self, flat: sympy.Expr, sizes: list[sympy.Expr]) -> list[Value] | None:
        found: list[Value] = []
        for n in reversed(sizes[1:]):
            parts = self.known.divided(flat, n)
            if parts is None:
                return None
            flat, rest = parts
            found.append(Affine(rest))
        return [Affine(flat), *reversed(found)] if sizes else []

    def cat(self, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
        dim = a["dim"] % len(at)
        start = sympy.Integer(0)
        pieces: list[tuple[Value, Value]] = []
        here = at[dim]
        if not isinstance(here, Affine):
            return None
        for tensor in a["tensors"]:
            size = dimension(tensor.meta["val"].shape[dim])
            end = compare("lt", here, Affine(start + size), self.known)
            pieces.append((end, self.read(tensor, _shifted(at, dim, -start))))
            start += size
        value = pieces[-1][1]
        for condition, piece in reversed(pieces[:-1]):
            value = select(condition, piece, value, node.meta["val"].dtype)
        return value

    def triangle(self, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
        row, col = at[-2:]
        if not (isinstance(row, Affine) and isinstance(col, Affine)):
            return None
        name = "le" if node.target is aten.tril.default else "ge"
        inside = compare(name, Affine(col.of - row.of), _size(a["diagonal"]), self.known)
        dtype = node.meta["val"].dtype
        x = self.read(a["self"], at)
        if dtype is torch.bool:
            return conjunction(inside, x)
        return select(inside, x, number(0, dtype), dtype)

    def looked_up(self, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
        """`table[indices]`, each index a tensor of its own or a whole dimension."""
        source, given = a["self"], list(a["indices"])
        chosen = [i for i, x in enumerate(given) if x is not None]
        if not chosen or chosen != list(range(chosen[0], chosen[-1] + 1)):
            return None  # dimensions change places
        if any(given[i].meta["val"].dtype is torch.bool for i in chosen):
            return None
        rank = max(given[i].meta["val"].dim() for i in chosen)
        first = chosen[0]
        inner = at[first : first + rank]
        found = [self.read(given[i], inner[rank - given[i].meta["val"].dim() :]) for i in chosen]
        return self.read_within(source, (*at[:first], *found, *at[first + rank :]))

    def embedded(self, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
        return self.read_within(a["weight"], (self.read(a["indices"], at[:-1]), at[-1]))

    def read_within(self, source: fx.Node, at: Indices) -> Value | None:
        """An element at computed indices; they are in range only as far as the graph's own operator checks
        them, so the element is known where they are plain and the sizes agree."""
        for i, size in zip(at, source.meta["val"].shape, strict=True):
            if not isinstance(i, Affine):
                return Read(source, at)
            if not all(self.known.nonnegative(x) for x in (i.of, dimension(size) - 1 - i.of)):
                return Read(source, at)
        return self.read(source, at)


def groups(a: Sequence[sympy.Expr], b: Sequence[sympy.Expr]) -> Iterator[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions of two shapes of one tensor that hold equally many elements."""
    i = j = 0
    while i < len(a) or j < len(b):
        left, right = ([i] if i < len(a) else []), ([j] if j < len(b) else [])
        i, j = i + len(left), j + len(right)
        p = math.prod((a[x] for x in left), start=sympy.Integer(1))
        r = math.prod((b[x] for x in right), start=sympy.Integer(1))
        while sympy.expand(p - r) != 0:
            ratio = sympy.cancel(p / r)
            smaller = ratio < 1 if ratio.is_number else not ratio.is_polynomial()
            if (smaller or j >= len(b)) and i < len(a):
                left.append(i)
                p, i = sympy.expand(p * a[i]), i + 1
            elif not smaller and j < len(b):
                right.append(j)
                r, j = sympy.expand(r * b[j]), j + 1
            else:
                yield [], [-1]  # the shapes do not say how one is the other
                return
        while i < len(a) and a[i] == 1 and j >= len(b):
            left.append(i)
            i += 1
        while j < len(b) and b[j] == 1 and i >= len(a):
            right.append(j)
            j += 1
        yield left, right


def _shifted(at: Indices, dim: int, by: Any) -> Indices:
    dim %= len(at)
    moved = at[dim]
    if isinstance(moved, Affine):
        moved = Affine(sympy.expand(moved.of + by))
    elif by != 0:
        moved = Call(aten.add.Tensor, (moved, Affine(sympy.sympify(by))), torch.int64)
    return (*at[:dim], moved, *at[dim + 1 :])


def _int(i: int) -> Affine:
    return Affine(sympy.Integer(i))


def _size(value: Any) -> Affine:
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    return Affine(dimension(value))


def _unsqueeze(r: Reader, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
    dim = a["dim"] % len(at)
    return r.read(a["self"], (*at[:dim], *at[dim + 1 :]))


def _squeeze(r: Reader, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
    rank = a["self"].meta["val"].dim()
    gone = {d % rank for d in (a["dim"] if isinstance(a["dim"], (list, tuple)) else [a["dim"]])}
    gone = {d for d in gone if dimension(a["self"].meta["val"].shape[d]) == 1}
    left = iter(at)
    return r.read(a["self"], tuple(ZERO if d in gone else next(left) for d in range(rank)))


def _permute(r: Reader, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
    where: list[Any] = [None] * len(at)
    for i, d in enumerate(a["dims"]):
        where[d % len(at)] = at[i]
    return r.read(a["self"], tuple(where))


def _transpose(r: Reader, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
    where = list(at)
    x, y = a["dim0"] % len(at), a["dim1"] % len(at)
    where[x], where[y] = where[y], where[x]
    return r.read(a["self"], tuple(where))


def _expand(r: Reader, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
    return r.read(a["self"], at[len(at) - a["self"].meta["val"].dim() :])


def _slice(r: Reader, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
    dim, size = a["dim"] % len(at), dimension(a["self"].meta["val"].shape[a["dim"]])
    start = sympy.Integer(0) if a["start"] is None else _size(a["start"]).of
    if not r.known.nonnegative(start):
        start += size  # counted from the end
        if not r.known.nonnegative(start):
            return None
    if not r.known.nonnegative(size - start):
        return None  # a start past the end is clamped
    here = at[dim]
    if a["step"] != 1:
        if not isinstance(here, Affine) or not isinstance(a["step"], int):
            return None
        at = (*at[:dim], Affine(here.of * a["step"]), *at[dim + 1 :])
    return r.read(a["self"], _shifted(at, dim, start))


def _select(r: Reader, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
    rank = len(at) + 1
    i, size = _size(a["index"]).of, dimension(a["self"].meta["val"].shape[a["dim"]])
    i = i if r.known.nonnegative(i) else i + size
    dim = a["dim"] % rank
    return r.read(a["self"], (*at[:dim], Affine(i), *at[dim:]))


def _flip(r: Reader, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
    where = list(at)
    for d in a["dims"]:
        if not isinstance(where[d], Affine):
            return None
        where[d] = Affine(dimension(a["self"].meta["val"].shape[d]) - 1 - where[d].of)
    return r.read(a["self"], tuple(where))


def _arange(r: Reader, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
    start, step = _size(a.get("start", 0)).of, a.get("step", 1)
    (i,) = at
    if not (isinstance(i, Affine) and isinstance(step, int)) or not start.is_integer:
        return None
    dtype = node.meta["val"].dtype
    value = Affine(sympy.expand(start + step * i.of))
    return value if dtype in INTEGERS else elementwise(aten.to.dtype, (value, dtype), {}, dtype, r.known)


def _filled(r: Reader, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
    target, dtype = node.target, node.meta["val"].dtype
    value = 1 if target in _ONES else 0 if target in _ZEROS else a.get("fill_value", a.get("s"))
    if isinstance(value, fx.Node):
        return _size(value) if dtype in INTEGERS else None
    return number(value, dtype)


def _masked_fill(r: Reader, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
    x, mask, value = a["self"], a["mask"], a["value"]
    if isinstance(value, fx.Node):
        return None
    dtype = node.meta["val"].dtype
    condition = r.read(mask, at[len(at) - mask.meta["val"].dim() :])
    return select(condition, number(value, dtype), r.read(x, at[len(at) - x.meta["val"].dim() :]), dtype)


def _difference(r: Reader, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
    """Of neighbours, the first perhaps of one element that stands before all; narrower integers wrap."""
    x, first, dim, dtype = a["self"], a["prepend"], a["dim"] % len(at), node.meta["val"].dtype
    if a["n"] != 1 or a["append"] is not None or dtype is not torch.int64 or not isinstance(at[dim], Affine):
        return None

    def between(after: Value, before: Value) -> Value:
        return elementwise(aten.sub.Tensor, [after, before], {}, dtype, r.known)

    if first is None:
        return between(r.read(x, _shifted(at, dim, 1)), r.read(x, at))
    if dimension(first.meta["val"].shape[dim]) != 1:
        return None
    start = (*at[:dim], ZERO, *at[dim + 1 :])
    begins, later = between(r.read(x, start), r.read(first, start)), r.read(x, _shifted(at, dim, -1))
    return select(compare("eq", at[dim], ZERO, r.known), begins, between(r.read(x, at), later), dtype)


def _cumulated(r: Reader, node: fx.Node, a: dict[str, Any], at: Indices) -> Value | None:
    """Of integers that are one number at every index, in a type that their sum does not wrap in."""
    dim = a["dim"] % len(at)
    here, each = at[dim], r.anywhere(a["self"], at, dim)
    if not (isinstance(here, Affine) and is_number(each) and node.meta["val"].dtype is torch.int64):
        return None
    return Affine(sympy.expand(int(plain(each)) * (here.of + 1)))


class Views(Reader):
    """Reads through one view at a time."""

    def __init__(self, known: Range) -> None:
        super().__init__(known, (ZERO.of, ZERO.of))

    def read(self, node: fx.Node, at: Sequence[Value]) -> Value:
        """The element as it is."""
        shape = node.meta["val"].shape
        return Read(node, tuple(ZERO if dimension(s) == 1 else i for s, i in zip(shape, at, strict=True)))

    def below(self, one: Read) -> Read | None:
        """The same element of the tensor that `one.node` is a view of."""
        if one.node.op != "call_function" or one.node.target not in _VIEWS:
            return None
        found = self.opened_at(one.node, one.at)
        return found if isinstance(found, Read) else None


_CREATE = {*_FULL, *_ONES, *_ZEROS, aten.arange.default, aten.arange.start, aten.arange.start_step,
           aten.scalar_tensor.default}  # fmt: skip
_VIEWS = {
    aten.reshape.default, aten.view.default, aten.permute.default, aten.transpose.int, aten.expand.default,
    aten.unsqueeze.default, aten.squeeze.dims, aten.squeeze.dim,
}  # fmt: skip
_STEPS: dict[Any, Callable[[Reader, fx.Node, dict[str, Any], Indices], Value | None]] = {
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dims: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.expand.default: _expand,
    aten.reshape.default: Reader.reshape,
    aten.view.default: Reader.reshape,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.flip.default: _flip,
    aten.cat.default: Reader.cat,
    aten.tril.default: Reader.triangle,
    aten.triu.default: Reader.triangle,
    aten.index.Tensor: Reader.looked_up,
    aten.embedding.default: Reader.embedded,
    aten.masked_fill.Scalar: _masked_fill,
    aten.diff.default: _difference,
    aten.cumsum.default: _cumulated,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.scalar_tensor.default: _filled,
    **dict.fromkeys((*_FULL, *_ONES, *_ZEROS), _filled),
}
