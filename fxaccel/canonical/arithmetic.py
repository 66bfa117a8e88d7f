"""Steps on arithmetic: powers, roots, signs, sums of numbers, comparisons and choices in one spelling."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from fxaccel.canonical.editor import Editor, aten, on
from fxaccel.canonical.values import dtype, is_dense, is_float, is_tensor, rank

_BINARY = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)


def _same_type(node: fx.Node, x: Any) -> bool:
    """Whether `x` already has the dtype of the result."""
    return is_tensor(x) and dtype(x) == dtype(node)


def _identity(e: Editor, node: fx.Node, x: fx.Node) -> bool:
    return _same_type(node, x) and e.shape(x) == e.shape(node)


# -- numbers ---------------------------------------------------------------------------------------


@on(*_BINARY, aten.pow.Tensor_Tensor, autocast=True)
def constant_operand(e: Editor, node: fx.Node) -> fx.Node | None:
    """A constant 0-d tensor beside a tensor of its kind is a number."""
    x, c = node.args
    if not is_tensor(c):
        return None
    if not is_tensor(x) or rank(x) == 0 or rank(c) != 0:
        x, c = c, x
        commutes = node.target in (aten.mul.Tensor, aten.add.Tensor)
        if not commutes or not is_tensor(c) or rank(c) or not rank(x):
            return None
    number = e.number(c)
    if number is None or (is_float(c) and not is_float(x)) or dtype(x) is torch.bool:
        return None
    if not _same_type(node, x):
        return None
    target = aten.pow.Tensor_Scalar if node.target is aten.pow.Tensor_Tensor else node.target
    return e.call(node, target, x, number, val=node.meta["val"], **node.kwargs)


_SCALAR_COMPARISONS = (aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar,
                       aten.le.Scalar)  # fmt: skip


@on(*_BINARY, aten.rsub.Scalar, *_SCALAR_COMPARISONS, autocast=True)
def number_type(e: Editor, node: fx.Node) -> fx.Node | None:
    """A number beside a floating tensor is a float, and stands second."""
    x, c, *rest = node.args
    if is_tensor(c) and isinstance(x, (int, float)) and node.target in (aten.mul.Tensor, aten.add.Tensor):
        return e.call(node, node.target, c, x, val=node.meta["val"]) if not node.kwargs else None
    if is_tensor(x) and is_float(x) and type(c) is int and abs(c) < 2**53:
        node.args = (x, float(c), *rest)
        return node
    return None


@on(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.rsub.Tensor)
def written_out_alpha(e: Editor, node: fx.Node) -> fx.Node | None:
    """An alpha is a product; subtracting a number is adding its opposite; rsub of tensors is sub."""
    x, y, *rest = node.args
    alpha = node.kwargs.get("alpha", rest[0] if rest else 1)
    val = node.meta["val"]
    if alpha == 1 and (node.kwargs or rest):
        return e.call(node, node.target, x, y, val=val)
    if alpha != 1:
        if node.target in (aten.rsub.Scalar, aten.rsub.Tensor):
            x = e.call(node, aten.mul.Tensor, x, alpha)
        elif is_tensor(y):
            y = e.call(node, aten.mul.Tensor, y, alpha)
        else:
            y = y * alpha
        return e.call(node, node.target, x, y, val=val)
    if node.target is aten.rsub.Tensor:
        return e.call(node, aten.sub.Tensor, y, x, val=val)
    if node.target is aten.sub.Tensor and isinstance(y, (int, float)) and not isinstance(y, bool):
        return e.call(node, aten.add.Tensor, x, -y, val=val)
    return None


@on(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.pow.Tensor_Scalar)
def neutral(e: Editor, node: fx.Node) -> fx.Node | None:
    """Times 1, over 1, plus 0 and to the power 1 are gone; times -1 is `neg`."""
    x, c = node.args
    if isinstance(c, (fx.Node, bool)) or node.kwargs or not _identity(e, node, x):
        return None
    if c == (0 if node.target is aten.add.Tensor else 1):
        return e.forward(node, x)
    if c == -1 and node.target in (aten.mul.Tensor, aten.div.Tensor) and is_float(node):
        return e.call(node, aten.neg.default, x, val=node.meta["val"])
    return None


@on(aten.add.Tensor, aten.mul.Tensor)
def numbers_together(e: Editor, node: fx.Node) -> fx.Node | None:
    """Integers added or multiplied one after another are one number."""
    x, c = node.args
    if type(c) is not int or node.kwargs or not e.once(x, node.target) or is_float(node):
        return None
    if type(x.args[1]) is not int or x.kwargs or not _identity(e, node, x.args[0]):
        return None
    both = c + x.args[1] if node.target is aten.add.Tensor else c * x.args[1]
    return e.call(node, node.target, x.args[0], both, val=node.meta["val"]) if abs(both) < 2**31 else None


# -- signs -----------------------------------------------------------------------------------------


@on(aten.neg.default)
def double_negation(e: Editor, node: fx.Node) -> fx.Node | None:
    """The opposite of the opposite is the value; of a difference, the difference turned round."""
    x = node.args[0]
    return e.forward(node, x.args[0]) if e.at(x, aten.neg.default) else None


@on(aten.add.Tensor, aten.sub.Tensor)
def signed_sum(e: Editor, node: fx.Node) -> fx.Node | None:
    """Adding the opposite is `sub`, subtracting it is `add`; a number minus a value is `rsub`."""
    x, y = node.args
    val = node.meta["val"]
    if node.kwargs:
        return None
    if node.target is aten.sub.Tensor:
        return e.call(node, aten.add.Tensor, x, y.args[0], val=val) if e.at(y, aten.neg.default) else None
    if e.at(y, aten.neg.default):
        return e.call(node, aten.sub.Tensor, x, y.args[0], val=val)
    if e.at(x, aten.neg.default):
        if is_tensor(y):
            return e.call(node, aten.sub.Tensor, y, x.args[0], val=val)
        return e.call(node, aten.rsub.Scalar, x.args[0], y, val=val)
    return None


# -- powers and roots ------------------------------------------------------------------------------


@on(aten.square.default, aten.mul.Tensor, aten.pow.Tensor_Scalar)
def power(e: Editor, node: fx.Node) -> fx.Node | None:
    """x * x is `pow(x, 2)`, another times x is `pow(x, 3)`; integral exponents are integers."""
    x = node.args[0]
    val = node.meta["val"]
    if node.target is aten.square.default:
        return e.call(node, aten.pow.Tensor_Scalar, x, 2, val=val)
    if node.target is aten.pow.Tensor_Scalar:
        n = node.args[1]
        if isinstance(n, float) and n.is_integer() and is_float(x) and abs(n) < 2**31:
            return e.call(node, aten.pow.Tensor_Scalar, x, int(n), val=val)
        return None
    if x is node.args[1] and dtype(x) is not torch.bool:
        return e.call(node, aten.pow.Tensor_Scalar, x, 2, val=val)
    for a, b in (node.args, node.args[::-1]):
        if e.at(a, aten.pow.Tensor_Scalar) and a.args == (b, 2):
            return e.call(node, aten.pow.Tensor_Scalar, b, 3, val=val)
    return None


_ROOTS = {0.5: aten.sqrt.default, -0.5: aten.rsqrt.default, -1: aten.reciprocal.default}


@on(aten.pow.Tensor_Scalar, aten.reciprocal.default)
def root(e: Editor, node: fx.Node) -> fx.Node | None:
    """Powers of 0.5, -0.5 and -1 are `sqrt`, `rsqrt` and `reciprocal`; one over a root is `rsqrt`."""
    x = node.args[0]
    if not is_float(x):
        return None
    if node.target is aten.pow.Tensor_Scalar:
        target = _ROOTS.get(node.args[1])
        return None if target is None else e.call(node, target, x, val=node.meta["val"])
    if e.at(x, aten.sqrt.default):
        return e.call(node, aten.rsqrt.default, x.args[0], val=node.meta["val"])
    if e.at(x, aten.rsqrt.default):
        return e.call(node, aten.sqrt.default, x.args[0], val=node.meta["val"])
    return None


@on(aten.div.Tensor, aten.mul.Tensor)
def quotient(e: Editor, node: fx.Node) -> fx.Node | None:
    """x / sqrt(v) is x * rsqrt(v); x * (1 / v) is x / v."""
    x, y = node.args
    val = node.meta["val"]
    if node.target is aten.div.Tensor:
        if e.at(y, aten.sqrt.default) and is_tensor(x) and is_float(x):
            inverse = e.call(node, aten.rsqrt.default, y.args[0], val=y.meta["val"])
            return e.call(node, aten.mul.Tensor, x, inverse, val=val)
        if e.once(y, aten.reciprocal.default):
            return e.call(node, aten.mul.Tensor, x, y.args[0], val=val)
        return None
    for a, b in ((x, y), (y, x)):
        if e.once(b, aten.reciprocal.default) and is_tensor(a) and e.shape(a) == e.shape(node):
            return e.call(node, aten.div.Tensor, a, b.args[0], val=val)
    return None


@on(aten.addcmul.default, aten.addcdiv.default)
def fused_sum(e: Editor, node: fx.Node) -> fx.Node | None:
    """addcmul and addcdiv are written out."""
    x, a, b = node.args
    combine = aten.mul.Tensor if node.target is aten.addcmul.default else aten.div.Tensor
    if not all(_same_type(node, t) for t in node.args):
        return None
    term = e.call(node, combine, a, b)
    value = node.kwargs.get("value", 1)
    if value != 1:
        term = e.call(node, aten.mul.Tensor, term, value, val=term.meta["val"])
    return e.call(node, aten.add.Tensor, x, term, val=node.meta["val"])


# -- averages --------------------------------------------------------------------------------------

_REDUCTIONS = {aten.sum.default: aten.sum.dim_IntList, aten.mean.default: aten.mean.dim}
_WITH_DTYPE = {
    aten.sum.default: None, aten.sum.dim_IntList: None, aten.mean.default: None, aten.mean.dim: None,
    aten.softmax.int: 2, aten.log_softmax.int: 2,
}  # fmt: skip


@on(*_WITH_DTYPE)
def reduction_dtype(e: Editor, node: fx.Node) -> fx.Node | None:
    """The dtype argument of a sum, mean or softmax is a cast before it."""
    x, at = node.args[0], _WITH_DTYPE[node.target]
    kwargs = dict(node.kwargs)
    args = list(node.args)
    wanted = kwargs.pop("dtype", None) if at is None else args[at] if len(args) > at else None
    if wanted is None:
        return None
    if at is not None:
        del args[at:]
    if dtype(x) != wanted:
        args[0] = e.call(node, aten.to.dtype, x, wanted)
    return e.call(node, node.target, *args, val=node.meta["val"], **kwargs)


@on(*_REDUCTIONS)
def whole_reduction(e: Editor, node: fx.Node) -> fx.Node | None:
    """A sum or mean of everything names its dimensions."""
    x = node.args[0]
    if node.kwargs or not rank(x):
        return None
    return e.call(node, _REDUCTIONS[node.target], x, list(range(rank(x))), val=node.meta["val"])


@on(aten.div.Tensor, aten.mul.Tensor)
def average(e: Editor, node: fx.Node) -> fx.Node | None:
    """A sum over as many elements as it is divided by is `mean`."""
    total, n = node.args
    if not e.once(total, aten.sum.dim_IntList) or total.kwargs or not is_float(total.args[0]):
        return None
    x, dims = total.args[:2]
    count = sympy.Mul(*(e.shape(x)[d] for d in dims or range(rank(x))))
    if isinstance(n, fx.Node):
        size = n.meta["val"]
        agrees = isinstance(size, torch.SymInt) and size.node.expr == count
    else:
        agrees = bool(count.is_Integer) and n in (float(count), 1.0 / float(count or 1))
    right = (isinstance(n, float) and n < 1) == (node.target is aten.mul.Tensor)
    if not agrees or not right or dtype(x) != dtype(node):
        return None
    return e.call(node, aten.mean.dim, *total.args, val=node.meta["val"])


# -- comparisons and choices -----------------------------------------------------------------------

_TURNED = {aten.lt.Tensor: aten.gt.Tensor, aten.le.Tensor: aten.ge.Tensor}
_COMPARISONS = {
    aten.eq.Tensor: aten.eq.Scalar, aten.ne.Tensor: aten.ne.Scalar, aten.gt.Tensor: aten.gt.Scalar,
    aten.ge.Tensor: aten.ge.Scalar, aten.lt.Tensor: aten.lt.Scalar, aten.le.Tensor: aten.le.Scalar,
}  # fmt: skip


@on(*_COMPARISONS, autocast=True)
def comparison(e: Editor, node: fx.Node) -> fx.Node | None:
    """Tensors are compared with `gt` and `ge`, never `lt` and `le`; numbers with the Scalar overloads."""
    x, y = node.args
    if not is_tensor(y):
        return e.call(node, _COMPARISONS[node.target], x, y, val=node.meta["val"])
    turned = _TURNED.get(node.target)
    return None if turned is None else e.call(node, turned, y, x, val=node.meta["val"])


@on(aten.eq.Scalar, aten.ne.Scalar, autocast=True)
def truth(e: Editor, node: fx.Node) -> fx.Node | None:
    """Comparing a boolean with true or false is the boolean or its opposite."""
    x, c = node.args
    if dtype(x) is not torch.bool or c not in (0, 1):
        return None
    if (c == 1) == (node.target is aten.eq.Scalar):
        return e.forward(node, x)
    return e.call(node, aten.bitwise_not.default, x, val=node.meta["val"])


@on(aten.bitwise_not.default, autocast=True)
def double_not(e: Editor, node: fx.Node) -> fx.Node | None:
    """Not not is nothing; the opposite of an integer comparison is the other comparison."""
    x = node.args[0]
    if e.at(x, aten.bitwise_not.default):
        return e.forward(node, x.args[0])
    return _opposite(e, node, x)


def _opposite(e: Editor, node: fx.Node, condition: fx.Node) -> fx.Node | None:
    """The comparison that holds where a comparison of integers does not, None where it is none."""
    opposite = _OPPOSITE.get(condition.target)
    if opposite is None or not e.at(condition):
        return None
    if any(is_tensor(a) and is_float(a) for a in condition.args):
        return None  # nothing compares with NaN
    return e.call(node, opposite, *condition.args, val=condition.meta["val"])


_OPPOSITE = {
    aten.eq.Scalar: aten.ne.Scalar, aten.ne.Scalar: aten.eq.Scalar, aten.gt.Scalar: aten.le.Scalar,
    aten.le.Scalar: aten.gt.Scalar, aten.lt.Scalar: aten.ge.Scalar, aten.ge.Scalar: aten.lt.Scalar,
    aten.eq.Tensor: aten.ne.Tensor, aten.ne.Tensor: aten.eq.Tensor, aten.gt.Tensor: aten.le.Tensor,
    aten.ge.Tensor: aten.lt.Tensor, aten.gt.Tensor: aten.le.Tensor,
}  # fmt: skip


@on(aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, autocast=True)
def known_truth(e: Editor, node: fx.Node) -> fx.Node | None:
    """`and` with all true and `or` with all false are gone."""
    for x, c in (node.args, node.args[::-1]):
        known = e.at(c, aten.full.default) and c.args[1] is (node.target is aten.bitwise_and.Tensor)
        if known and _identity(e, node, x):
            return e.forward(node, x)
    return None


_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_CHOICES = (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)


@on(*_FILLS, autocast=True)
def filling(e: Editor, node: fx.Node) -> fx.Node | None:
    """`masked_fill(x, mask, v)` is `where(mask, v, x)`."""
    x, mask, value = node.args
    number = e.number(value) if not isinstance(value, bool) else value
    if dtype(mask) is not torch.bool or number is None or not _same_type(node, x):
        return None
    number = float(number) if is_float(x) else number
    if isinstance(number, float) and not is_float(x):
        return None
    plain = is_dense(mask.meta["val"]) and is_dense(x.meta["val"])
    val = node.meta["val"] if plain else None  # `where` is laid out like its condition, `masked_fill` like x
    return e.call(node, aten.where.ScalarSelf, mask, number, x, val=val)


@on(*_CHOICES, autocast=True)
def choice(e: Editor, node: fx.Node) -> fx.Node | None:
    """No `not` in the condition of `where`; a comparison there holds where the tensor is kept."""
    condition, a, b = node.args
    val = node.meta["val"]
    if e.at(condition, aten.bitwise_not.default):
        a, b, condition = b, a, condition.args[0]
    for x, c in ((a, b), (b, a)):
        if is_tensor(x) and is_tensor(c) and rank(x) and _same_type(node, x) and dtype(x) == dtype(c):
            number = e.number(c)
            a, b = (number if number is not None and y is c else y for y in (a, b))
    if not is_tensor(a) and is_tensor(b) and len(condition.users) == 1:
        turned = _opposite(e, node, condition)
        a, b, condition = (b, a, turned) if turned is not None else (a, b, condition)
    if [condition, a, b] == list(node.args):
        return _float_choice(node)
    target = _CHOICES[(not is_tensor(a)) + 2 * (not is_tensor(b))]
    return e.call(node, target, condition, a, b, val=val)


def _float_choice(node: fx.Node) -> fx.Node | None:
    numbers = [type(a) is int for a in node.args[1:]]
    if not is_float(node) or not any(numbers) or not any(is_tensor(a) for a in node.args[1:]):
        return None
    node.args = tuple(float(a) if type(a) is int else a for a in node.args)
    return node


# -- size arithmetic -------------------------------------------------------------------------------

INTEGERS = (aten.sym_size.int, aten.sym_numel.default, operator.mul, operator.add, operator.sub,
            operator.floordiv)  # fmt: skip


@on(*INTEGERS, autocast=True)
def integer(e: Editor, node: fx.Node) -> fx.Node | None:
    """Every size is one node at the top of the graph."""
    val = node.meta.get("val")
    if not isinstance(val, torch.SymInt):
        return None
    same = e.size(val.node.expr)
    return same if same is not None and same is not node else None
