"""Steps on how values are laid out: one spelling each of permuting, reshaping and broadcasting."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fxaccel.canonical.editor import Editor, Shape, aten, on
from fxaccel.canonical.values import dtype, is_dense, is_tensor, rank
from fxaccel.ir import is_call

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


@on(aten.permute.default, autocast=True)
def permutation_before(e: Editor, node: fx.Node) -> fx.Node | None:
    """Permuting the last dimensions, which a reshape kept, comes before the reshape."""
    flat, dims = node.args
    if not e.at(flat, aten.reshape.default):
        return None
    x = flat.args[0]
    kept = common_suffix(e.shape(x), e.shape(flat))
    lead = rank(flat) - kept
    sizes = e.sizes(e.shape(node))
    if dims[:lead] != list(range(lead)) or sizes is None:
        return None
    shift = rank(x) - rank(flat)
    order = [*range(lead + shift), *(d + shift for d in dims[lead:])]
    inner = e.call(node, aten.permute.default, x, order)
    result = e.call(node, aten.reshape.default, inner, sizes)
    return result


def common_suffix(a: Shape, b: Shape) -> int:
    """How many last sizes two shapes share."""
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n


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
    plain = is_dense(base.meta["val"]) or (len(chain) == 1 and plan[0][0] is aten.reshape.default)
    vals = {e.shape(n): n.meta["val"] for n in chain if plain and not copied}
    result = base
    for i, (target, args) in enumerate(plan):
        result = e.call(node, target, result, *args, val=_known(e, vals, shape, i == len(plan) - 1))
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
            if e.forward(base, base.args[0]) is None:
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
    aten.where.ScalarSelf, aten.where.ScalarOther,
)  # fmt: skip


@on(*_BROADCASTING, autocast=True)
def needless_expand(e: Editor, node: fx.Node) -> fx.Node | None:
    """An `expand`, or sizes of 1 in front, that broadcasting makes up for are gone."""
    shape, changed = e.shape(node), False
    for i, arg in enumerate(node.args):
        if not is_tensor(arg) or (is_call(arg, aten.unsqueeze.default) and not e.late):
            continue  # what was flattened from one batch is to meet that first
        others = [e.shape(a) for j, a in enumerate(node.args) if j != i and is_tensor(a)]
        for x in narrower(e, arg):
            if broadcast_shape([*others, e.shape(x)]) == shape:
                node.update_arg(i, x)
                e.erase(arg)
                changed = True
                break
    return node if changed else None


def narrower(e: Editor, node: fx.Node) -> list[fx.Node]:
    """The values, smallest first, that broadcasting makes `node` of."""
    found: list[fx.Node] = []
    x = node
    while e.at(x, aten.expand.default, aten.unsqueeze.default):
        shape, x = e.shape(node), x.args[0]
        inner = e.shape(x)
        lead = len(shape) - len(inner)
        if all(s == 1 or s == t for s, t in zip(inner, shape[lead:], strict=True)):
            found.append(x)
    return found[::-1]


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
