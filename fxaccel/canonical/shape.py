"""Steps on how values are laid out: one spelling each of permuting, reshaping, broadcasting and taking parts."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxaccel.canonical.editor import (
    Editor,
    Shape,
    aten,
    dtype,
    is_dense,
    is_tensor,
    on,
    rank,
    same_strides,
)

# -- permuting -------------------------------------------------------------------------------------

_SWAPS = (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
_MOVES = (aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
_REVERSALS = (aten.t.default, aten.numpy_T.default)
_MATRIX = (aten.mT.default, aten.matrix_H.default, aten.mH.default, aten.adjoint.default)


def _order(node: fx.Node, n: int) -> list[int]:
    """For each dimension of the result, the dimension of the operand that it is."""
    dims = list(range(n))
    if node.target in _SWAPS:
        a, b = (d % max(n, 1) for d in node.args[1:])
        dims[a], dims[b] = dims[b], dims[a]
    elif node.target in _MOVES:
        old, new = ([d % n for d in ([a] if isinstance(a, int) else a)] for a in node.args[1:])
        rest = iter(d for d in dims if d not in old)
        at = dict(zip(new, old, strict=True))
        dims = [at[i] if i in at else next(rest) for i in range(n)]
    elif node.target in _REVERSALS:
        dims.reverse()
    elif node.target in _MATRIX:
        dims[-2:] = dims[:-3:-1]
    else:
        dims = [d % n for d in node.args[1]]
    return dims


@on(*_SWAPS, *_MOVES, *_REVERSALS, *_MATRIX, aten.permute.default, autocast=True)
def permutation(e: Editor, node: fx.Node) -> fx.Node | None:
    """Every transposition is one `permute` with all dimensions; permutes of permutes are merged."""
    x = node.args[0]
    if dtype(x).is_complex and node.target in _MATRIX[1:]:
        return None
    dims = _order(node, rank(x)) if rank(x) else []
    while e.at(x, aten.permute.default):
        x, dims = x.args[0], [x.args[1][d] for d in dims]
    if dims == sorted(dims):
        return e.forward(node, x)
    if node.target is aten.permute.default and node.args[0] is x and node.args[1] == dims:
        return None
    return e.call(node, aten.permute.default, x, dims, val=node.meta["val"])


# -- reshaping -------------------------------------------------------------------------------------

_RESHAPES = (
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.view_as.default, aten.reshape_as.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.ravel.default,
)  # fmt: skip
_COPIES = (aten.contiguous.default, aten.clone.default)


@on(*_RESHAPES, autocast=True)
def reshaping(e: Editor, node: fx.Node) -> fx.Node | None:
    """A chain of reshapes is one; one that only adds or drops sizes of 1 is `unsqueeze` or `squeeze.dims`."""
    shape = e.shape(node)
    base, chain, copied = _base(e, node)
    if not is_tensor(base):
        return None
    if e.shape(base) == shape and not copied:
        return e.forward(node, base)
    plan = _plan(e, e.shape(base), shape)
    if plan is None or [(n.target, tuple(n.args[1:])) for n in chain] == plan:
        return None
    vals = {e.shape(n): n.meta["val"] for n in chain if not copied}
    result = base
    for i, (target, args) in enumerate(plan):
        result = e.call(node, target, result, *args, val=_known(e, vals, shape, i == len(plan) - 1))
    if copied and e.exposed(node) and not same_strides(result.meta["val"], node.meta["val"]):
        e.erase(result)
        return None
    return result


def _known(e: Editor, vals: dict[Shape, Tensor], shape: Shape, last: bool) -> Tensor | None:
    return vals.get(shape) if last else None


def _base(e: Editor, node: fx.Node) -> tuple[fx.Node, list[fx.Node], bool]:
    """The value that a chain of reshapes starts from, the chain, and whether it looks through a copy."""
    base, chain, copied = node.args[0], [node], False
    outward = e.exposed(node) and e.storage.root(node) in e.storage.external
    while True:
        if e.at(base, *_RESHAPES):
            chain.append(base)
        elif e.at(base, *_COPIES) and not outward:
            if not e.storage.root(base) is e.storage.root(base.args[0]) and e.forward(base, base.args[0]) is None:
                break
            copied = True
        else:
            break
        base = base.args[0]
    return base, chain[::-1], copied


def _plan(e: Editor, old: Shape, new: Shape) -> list[tuple[Any, tuple[Any, ...]]] | None:
    """The calls that make a value of shape `new` from one of shape `old`."""
    ones = [d for d, s in enumerate(new) if s == 1]
    if len(new) > len(old) and [s for s in new if s != 1] == [s for s in old if s != 1]:
        added = _added_ones(old, new)
        if added is not None:
            return [(aten.unsqueeze.default, (d,)) for d in added]
    if len(new) < len(old):
        dropped = _added_ones(new, old)
        if dropped is not None:
            return [(aten.squeeze.dims, (dropped,))]
    del ones
    sizes = e.sizes(new)
    return None if sizes is None else [(aten.reshape.default, (sizes,))]


def _added_ones(old: Shape, new: Shape) -> list[int] | None:
    """Dimensions of `new` that are sizes of 1 put between those of `old`, None where that is not all."""
    added, i = [], 0
    for d, size in enumerate(new):
        if i < len(old) and size == old[i]:
            i += 1
        elif size == 1:
            added.append(d)
        else:
            return None
    return added if i == len(old) else None


# Elementwise operators of one tensor (and numbers): a reshape before them is written after them.
ELEMENTWISE = {
    aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default,
    aten.exp.default, aten.neg.default, aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.sqrt.default,
    aten.erf.default, aten.dropout.default, aten.to.dtype, aten.abs.default, aten.log.default,
    aten.reciprocal.default, aten.clamp.default, aten.leaky_relu.default, aten.elu.default,
    aten.softplus.default, aten.hardswish.default, aten.mish.default, aten.sin.default, aten.cos.default,
}  # fmt: skip
_WITH_NUMBER = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)


_LAST = (aten.softmax.int, aten.log_softmax.int, aten.linear.default, aten.layer_norm.default,
         aten.rms_norm.default)  # fmt: skip


@on(*ELEMENTWISE, *_WITH_NUMBER, *_LAST)
def reshape_after(e: Editor, node: fx.Node) -> fx.Node | None:
    """A reshape before an elementwise operator, or one over a last dimension that it keeps, comes after it."""
    flat = node.args[0]
    if not e.at(flat, aten.reshape.default):
        return None
    x = flat.args[0]
    kept = e.shape(x)[-1:] == e.shape(flat)[-1:] != ()
    args = list(node.args[1:])
    if node.target in _LAST:
        movable = kept and (node.target is aten.linear.default or args[0] in (rank(flat) - 1, [*flat.meta["val"].shape[-1:]]))
    else:
        others = [a for a in args if isinstance(a, fx.Node)]
        movable = len(flat.users) == 1 and all(kept and is_tensor(o) and rank(o) <= 1 for o in others)
    sizes = e.sizes(e.shape(node)) if movable else None
    if sizes is None:
        return None
    if node.target in (aten.softmax.int, aten.log_softmax.int):
        args[0] = rank(x) - 1
    inner = e.call(node, node.target, x, *args, val=_value_before(e, node, x), **node.kwargs)
    return e.call(node, aten.reshape.default, inner, sizes, val=node.meta["val"])


@on(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
def reshape_after_both(e: Editor, node: fx.Node) -> fx.Node | None:
    """Values reshaped alike are combined first."""
    a, b = node.args
    if not e.once(a, aten.reshape.default) or not e.once(b, aten.reshape.default) or node.kwargs:
        return None
    x, y = a.args[0], b.args[0]
    sizes = e.sizes(e.shape(node))
    if e.shape(x) != e.shape(y) or e.shape(a) != e.shape(b) or sizes is None:
        return None
    inner = e.call(node, node.target, x, y, val=_value_before(e, node, x))
    return e.call(node, aten.reshape.default, inner, sizes, val=node.meta["val"])


def _value_before(e: Editor, node: fx.Node, x: fx.Node) -> Tensor | None:
    """The fake value of `node` had it been computed on `x`, where some value at hand shows it."""
    val = node.meta["val"]
    if node.target is aten.linear.default:
        shape = (*e.shape(x)[:-1], e.shape(node)[-1])
        for user in node.users:
            known = user.meta.get("val")
            if isinstance(known, Tensor) and known.dtype == val.dtype and e.shape_of(known) == shape:
                return known if is_dense(known) else None
        return None
    known = x.meta["val"]
    return known if known.dtype == val.dtype and is_dense(known) else None


# -- broadcasting ----------------------------------------------------------------------------------


@on(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default, autocast=True)
def broadcast(e: Editor, node: fx.Node) -> fx.Node | None:
    """`expand` to all sizes of the result, -1 where one stays; new dimensions are unsqueezed first."""
    x, shape = node.args[0], e.shape(node)
    while e.at(x, aten.expand.default):
        x = x.args[0]
    old = e.shape(x)
    if old == shape:
        return e.forward(node, x)
    lead = len(shape) - len(old)
    sizes: list[Any] = []
    for size, before in zip(shape, [None] * lead + list(old), strict=True):
        node_or_int = -1 if size == before else (e.sizes([size], infer=False) or [None])[0]
        if node_or_int is None:
            return None
        sizes.append(node_or_int)
    if not lead and node.target is aten.expand.default and node.args == (x, sizes):
        return None
    for i in range(lead):
        x = e.call(node, aten.unsqueeze.default, x, 0)
        sizes[i] = sizes[i] if shape[i] != 1 else -1
    if all(s == -1 for s in sizes if isinstance(s, int)) and not any(isinstance(s, fx.Node) for s in sizes):
        return x
    return e.call(node, aten.expand.default, x, sizes, val=node.meta["val"])


_BROADCASTING = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor, aten.where.self, aten.eq.Tensor, aten.ne.Tensor, aten.ge.Tensor,
    aten.gt.Tensor, aten.le.Tensor, aten.lt.Tensor, aten.maximum.default, aten.minimum.default,
)  # fmt: skip


@on(*(ELEMENTWISE - {aten.dropout.default}), *_WITH_NUMBER, aten.where.ScalarSelf, aten.where.ScalarOther,
    aten.where.self)  # fmt: skip
def expand_after(e: Editor, node: fx.Node) -> fx.Node | None:
    """An `expand` before an operator whose other operands are numbers comes after it."""
    wide = [a for a in node.args if is_tensor(a) and rank(a) > 0]
    if len(wide) != 1 or not e.once(wide[0], aten.expand.default) or e.shape(wide[0]) != e.shape(node):
        return None
    x, sizes = wide[0].args
    inner = e.call(node, node.target, *(x if a is wide[0] else a for a in node.args), **node.kwargs)
    return e.call(node, aten.expand.default, inner, sizes, val=node.meta["val"])


@on(*_BROADCASTING, autocast=True)
def needless_expand(e: Editor, node: fx.Node) -> fx.Node | None:
    """An `expand` whose reader would broadcast anyway is gone."""
    shape, changed = e.shape(node), False
    for i, arg in enumerate(node.args):
        if not e.at(arg, aten.expand.default):
            continue
        others = [e.shape(a) for j, a in enumerate(node.args) if j != i and is_tensor(a)]
        if broadcast_shape([*others, e.shape(arg.args[0])]) == shape:
            node.update_arg(i, arg.args[0])
            e.erase(arg)
            changed = True
    return node if changed else None


def broadcast_shape(shapes: list[Shape]) -> Shape:
    """The shape that values of these shapes broadcast to, as far as expressions tell."""
    n = max((len(s) for s in shapes), default=0)
    out = []
    for d in range(-n, 0):
        sizes = [s[d] for s in shapes if len(s) >= -d and s[d] != 1]
        out.append(sizes[0] if sizes else next(s[d] for s in shapes if len(s) >= -d))
    return tuple(out)


@on(aten.repeat_interleave.self_int, autocast=True)
def repeated_heads(e: Editor, node: fx.Node) -> fx.Node | None:
    """`repeat_interleave` by a number is unsqueeze, expand, reshape."""
    x, n, *rest = node.args
    if not isinstance(n, int) or not rest or not isinstance(rest[0], int) or n < 1:
        return None
    sizes = e.sizes(e.shape(node))
    if sizes is None:
        return None
    d = rest[0] + 1
    wide = e.call(node, aten.unsqueeze.default, x, d)
    expanded = e.call(node, aten.expand.default, wide, [n if i == d else -1 for i in range(rank(wide))])
    return e.call(node, aten.reshape.default, expanded, sizes, val=node.meta["val"])


# -- taking parts ----------------------------------------------------------------------------------

_SPLITS = (aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
           aten.tensor_split.sections, aten.unsafe_chunk.default, aten.unsafe_split.Tensor)  # fmt: skip
_PARTS_LIMIT = 64  # readers of one value beyond which its slices are not looked over for a split


def _dim(node: fx.Node, i: int) -> int:
    """Argument `i`, a dimension that defaults to 0."""
    return node.args[i] if len(node.args) > i else 0  # type: ignore[return-value]


@on(*_SPLITS, autocast=True)
def splitting(e: Editor, node: fx.Node) -> fx.Node | None:
    """Parts that are all used are `split.Tensor` if equal, else `split_with_sizes`; other parts are slices."""
    x, d = node.args[0], _dim(node, 2)
    widths = [e.shape_of(v)[d] for v in node.meta["val"]]
    used = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    if not all(w.is_Integer for w in widths) or len(used) != len(node.users) or not used:
        return None
    sizes = [int(w) for w in widths]
    if len(used) == len(sizes) > 1:
        target, how = _split_form(sizes)
        want = (x, how, d) if d else (x, how)
        if node.target is target and node.args == want:
            return None
        return e.call(node, target, *want, val=node.meta["val"])
    for i, part in used.items():
        if part.meta["regions"] != node.meta["regions"] or e.storage.frozen(part):
            return None
        start = sum(sizes[:i])
        e.replace(part, e.call(part, aten.slice.Tensor, x, d, start, start + sizes[i], val=part.meta["val"]))
    return node


def _split_form(sizes: list[int]) -> tuple[Any, Any]:
    if len(set(sizes)) == 1:
        return aten.split.Tensor, sizes[0]
    return aten.split_with_sizes.default, sizes


@on(aten.slice.Tensor, aten.narrow.default, autocast=True)
def slicing(e: Editor, node: fx.Node) -> fx.Node | None:
    """Slices count from the front, end at the size at most, and are gone where they take everything."""
    x, d = node.args[0], _dim(node, 1)
    start, end, step = _bounds(node)
    size = e.shape(x)[d]
    if not all(isinstance(b, int) for b in (start, end, step)):
        whole = start == 0 and step == 1 and isinstance(end, fx.Node) and e.shape(node)[d] == size
        return e.forward(node, x) if whole else None
    if size.is_Integer:
        n = int(size)
        start, end = (min(max(b + n if b < 0 else b, 0), n) for b in (start, end))
        everything = (start, step) == (0, 1) and end == n
    else:
        n = None
        everything = (start, step) == (0, 1) and end >= 2**31
    if everything:
        return e.forward(node, x)
    if e.at(x, aten.slice.Tensor) and _dim(x, 1) == d and n is not None and step == 1:
        first, _, inner = _bounds(x)
        if inner == 1 and isinstance(first, int) and first >= 0:
            x, start, end = x.args[0], start + first, end + first
            outer = e.shape(x)[d]
            n = int(outer) if outer.is_Integer else None
    return _slice(e, node, x, (d, start, end, step), n)


def _slice(e: Editor, node: fx.Node, x: fx.Node, where: tuple[int, ...], n: int | None) -> fx.Node | None:
    d, start, end, step = where
    args: list[Any] = [d, start, end, step]
    if step == 1:
        args.pop()
        if end == n or end >= 2**62:
            args.pop()
    if args == [0, 0]:
        args = []
    if node.target is aten.slice.Tensor and list(node.args[1:]) == args and node.args[0] is x:
        return None
    return e.call(node, aten.slice.Tensor, x, *args, val=node.meta["val"])


def _bounds(node: fx.Node) -> tuple[Any, Any, Any]:
    if node.target is aten.narrow.default:
        _, _, start, length = node.args
        if not isinstance(start, int) or not isinstance(length, int):
            return start, length, None
        if start < 0:
            size = node.args[0].meta["val"].shape[node.args[1]]
            return (start + size, start + size + length, 1) if isinstance(size, int) else (None, None, None)
        return start, start + length, 1
    given = [*node.args[2:], None, None, None]
    start = 0 if given[0] is None else given[0]
    end = 2**63 - 1 if given[1] is None else given[1]
    return start, end, 1 if given[2] is None else given[2]


@on(aten.slice.Tensor, autocast=True)
def slices_to_split(e: Editor, node: fx.Node) -> fx.Node | None:
    """Slices that together are a whole dimension are a split."""
    x, d = node.args[0], _dim(node, 1)
    size = e.shape(x)[d]
    if not size.is_Integer or len(x.users) > _PARTS_LIMIT or _bounds(node)[0] != 0:
        return None
    parts: dict[int, fx.Node] = {}
    for user in x.users:
        if e.at(user, aten.slice.Tensor) and user.args[0] is x and _dim(user, 1) == d:
            start, _, step = _bounds(user)
            if step == 1 and isinstance(start, int) and parts.setdefault(start, user) is not user:
                return None
    sizes, end = [], 0
    for start in sorted(parts):
        width = e.shape(parts[start])[d]
        if start != end or not width.is_Integer:
            return None
        sizes.append(int(width))
        end += int(width)
    if end != int(size) or len(sizes) < 2:
        return None
    target, how = _split_form(sizes)
    return _take_apart(e, node, [parts[s] for s in sorted(parts)], target, (x, how, d) if d else (x, how))


def _take_apart(
    e: Editor, node: fx.Node, parts: list[fx.Node], target: Any, args: tuple[Any, ...]
) -> fx.Node:
    """Make one call of several results in the place of `parts`, of which `node` is one."""
    first = min(parts)
    whole = e.call(first, target, *args, val=[p.meta["val"] for p in parts])
    result = None
    for i, part in enumerate(parts):
        piece = e.call(first, operator.getitem, whole, i, val=part.meta["val"])
        if part is node:
            result = piece
        else:
            e.replace(part, piece)
    assert result is not None, "the node is one of the parts"
    return result


@on(aten.unbind.int, autocast=True)
def unbinding(e: Editor, node: fx.Node) -> fx.Node | None:
    """Elements along a dimension are `unbind` where all are used, else `select`."""
    x, d = node.args[0], _dim(node, 1)
    used = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    if len(used) != len(node.users) or not used or len(used) == len(node.meta["val"]) > 1:
        return None
    for i, part in used.items():
        if part.meta["regions"] != node.meta["regions"] or e.storage.frozen(part):
            return None
        e.replace(part, e.call(part, aten.select.int, x, d, i, val=part.meta["val"]))
    return node


@on(aten.select.int, autocast=True)
def selecting(e: Editor, node: fx.Node) -> fx.Node | None:
    """`select` counts from the front; selects of every element are `unbind`."""
    x, d, i = node.args
    size = e.shape(x)[d]
    if not isinstance(i, int) or not size.is_Integer or int(size) == 0:
        return None
    if i < 0:
        return e.call(node, aten.select.int, x, d, i + int(size), val=node.meta["val"])
    if i != 0 or len(x.users) > _PARTS_LIMIT or int(size) < 2:
        return None
    parts: dict[int, fx.Node] = {}
    for user in x.users:
        if e.at(user, aten.select.int) and user.args[1] == d and isinstance(user.args[2], int):
            if parts.setdefault(user.args[2] % int(size), user) is not user:
                return None
    if len(parts) != int(size):
        return None
    return _take_apart(e, node, [parts[k] for k in sorted(parts)], aten.unbind.int, (x, d) if d else (x,))


@on(aten.glu.default)
def gated(e: Editor, node: fx.Node) -> fx.Node | None:
    """`glu(x)` is one half of x times the sigmoid of the other."""
    x, d = node.args[0], _dim(node, 1) if len(node.args) > 1 else rank(node.args[0]) - 1
    size = e.shape(x)[d]
    if not size.is_Integer:
        return None
    whole = e.call(node, aten.split.Tensor, x, int(size) // 2, *([d] if d else []))
    first, second = (e.call(node, operator.getitem, whole, i, val=whole.meta["val"][i]) for i in (0, 1))
    gate = e.call(node, aten.sigmoid.default, second, val=node.meta["val"])
    return e.call(node, aten.mul.Tensor, first, gate, val=node.meta["val"])
