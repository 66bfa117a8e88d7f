"""Steps that move reshapes and expands past operators that do not care, so that they meet and cancel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fxaccel.canonical.editor import Editor, aten, on
from fxaccel.canonical.shape import common_suffix
from fxaccel.canonical.values import is_dense, is_tensor, rank
from fxaccel.effects import is_random

# Elementwise operators of one tensor (and numbers): a reshape before them is written after them.
ELEMENTWISE = {
    aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default,
    aten.exp.default, aten.neg.default, aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.sqrt.default,
    aten.erf.default, aten.dropout.default, aten.to.dtype, aten.abs.default, aten.log.default,
    aten.reciprocal.default, aten.clamp.default, aten.leaky_relu.default, aten.elu.default,
    aten.softplus.default, aten.hardswish.default, aten.mish.default, aten.sin.default, aten.cos.default,
    aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar,
    aten.bitwise_not.default, aten.rsub.Scalar,
}  # fmt: skip
_WITH_NUMBER = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)


_LAST = (aten.softmax.int, aten.log_softmax.int, aten.linear.default, aten.layer_norm.default,
         aten.rms_norm.default)  # fmt: skip


@on(*ELEMENTWISE, *_WITH_NUMBER, *_LAST)
def reshape_after(e: Editor, node: fx.Node) -> fx.Node | None:
    """A reshape before an elementwise operator, or one over a last dimension it keeps, comes after."""
    flat = node.args[0]
    if not e.at(flat, aten.reshape.default):
        return None
    x = flat.args[0]
    kept = e.shape(x)[-1:] == e.shape(flat)[-1:] != ()
    args = list(node.args[1:])
    if node.target in _LAST:
        last = (rank(flat) - 1, [*flat.meta["val"].shape[-1:]])  # the dimension, or the sizes of a norm
        movable = kept and (node.target is aten.linear.default or args[0] in last)
    else:
        others = [a for a in args if isinstance(a, fx.Node)]
        same = common_suffix(e.shape(x), e.shape(flat))
        dense = not is_random(node) or is_dense(x.meta["val"])  # else the same seed drops other elements
        movable = dense and len(flat.users) == 1 and all(is_tensor(o) and rank(o) <= same for o in others)
    sizes = e.sizes(e.shape(node)) if movable else None
    if sizes is None:
        return None
    if node.target in (aten.softmax.int, aten.log_softmax.int):
        args[0] = rank(x) - 1
    inner = e.call(node, node.target, x, *args, val=_value_before(e, node, x), **node.kwargs)
    return e.call(node, aten.reshape.default, inner, sizes, val=node.meta["val"])


_OF_ONE = (*(ELEMENTWISE - {aten.dropout.default}), *_WITH_NUMBER, aten.where.ScalarSelf,
           aten.where.ScalarOther, aten.where.self)  # fmt: skip


@on(*_OF_ONE)
def unsqueeze_after(e: Editor, node: fx.Node) -> fx.Node | None:
    """Sizes of 1 are added and dropped after an operator whose other operands are numbers, not before."""
    return _view_after(e, node, aten.unsqueeze.default, aten.squeeze.dims)


@on(*_OF_ONE)
def expand_after(e: Editor, node: fx.Node) -> fx.Node | None:
    """An `expand` before an operator whose other operands are numbers comes after it."""
    return _view_after(e, node, aten.expand.default)


def _view_after(e: Editor, node: fx.Node, *views: Any) -> fx.Node | None:
    wide = [a for a in node.args if is_tensor(a) and rank(a) > 0]
    if len(wide) != 1 or not e.once(wide[0], *views) or e.shape(wide[0]) != e.shape(node):
        return None
    x, how = wide[0].args
    if rank(x) == 0:
        return None
    inner = e.call(node, node.target, *(x if a is wide[0] else a for a in node.args), **node.kwargs)
    return e.call(node, wide[0].target, inner, how)


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


@on(aten.reshape.default, aten.unsqueeze.default)
def reshape_before(e: Editor, node: fx.Node) -> fx.Node | None:
    """Rows that were flattened only for a while (linear, elementwise) never are."""
    chain: list[fx.Node] = []
    flat = node.args[0]
    while e.once(flat, aten.linear.default, *ELEMENTWISE, *_WITH_NUMBER):
        chain.append(flat)
        flat = flat.args[0]
        if chain[-1].target in _WITH_NUMBER and any(is_tensor(o) and rank(o) > 1 for o in chain[-1].args):
            return None
    views = (aten.reshape.default, aten.squeeze.dims)  # of one batch it is this
    if not chain or not e.once(flat, *views) or e.shape(node)[-1:] != e.shape(chain[0])[-1:]:
        return None
    sizes = e.sizes((*e.shape(node)[:-1], e.shape(flat)[-1]))
    if sizes is None:
        return None
    result = e.call(chain[-1], aten.reshape.default, flat.args[0], sizes)
    for link in reversed(chain):  # each in the place of the old one, so that random ones keep their order
        val = node.meta["val"] if link is chain[0] else None
        result = e.call(link, link.target, result, *link.args[1:], val=val, **link.kwargs)
    e.remade.update(chain)
    return result


_REDUCTIONS = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)


@on(*_REDUCTIONS)
def reduction_of_permuted(e: Editor, node: fx.Node) -> fx.Node | None:
    """A reduction of a permuted value is one of the value, where the dimensions left are in order."""
    if len(node.args) < 2:
        return None  # over all dimensions
    x, dims, *keep = node.args
    if not e.at(x, aten.permute.default) or any(keep) or node.kwargs or not dims:
        return None
    order = x.args[1]
    gone = sorted(order[d] for d in dims)
    left = [d for d in order if d not in gone]
    if left != sorted(left):
        return None
    return e.call(node, node.target, x.args[0], gone, val=node.meta["val"])
