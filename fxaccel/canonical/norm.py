"""Steps that recognise norms and variances written as several operators."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxaccel.canonical.editor import Editor, aten, on
from fxaccel.canonical.idiom import factors, multiply, others, plus_number
from fxaccel.canonical.values import dtype, is_float, is_tensor, rank


def _trailing(e: Editor, x: fx.Node, dims: Any) -> list[int] | None:
    """The sizes of the last dimensions, where `dims` are those and fixed."""
    dims = sorted([dims] if isinstance(dims, int) else dims or ())
    n = rank(x)
    sizes = e.shape(x)[n - len(dims) :]
    if not dims or dims != list(range(n - len(dims), n)) or not all(s.is_Integer for s in sizes):
        return None
    return [int(s) for s in sizes]


def _kept(node: fx.Node) -> bool:
    return len(node.args) > 2 and node.args[2] is True and not node.kwargs


@on(aten.mul.Tensor)
def written_norm(e: Editor, node: fx.Node) -> fx.Node | None:
    """A value over its root mean square is `rms_norm`, a centred one over its deviation `layer_norm`."""
    number, found = factors(e, node)
    for inverse in found:
        if not e.at(inverse, aten.rsqrt.default):
            continue
        inside = plus_number(e, inverse.args[0])
        if inside is None:
            continue
        for x in found:
            if x is inverse or dtype(inverse) != dtype(node) or not is_float(x):
                continue
            plan = _rms(e, inside[0], x) or _layer(e, inside[0], x)
            if plan is not None:
                target, operand, sizes = plan
                args = (operand, sizes, None, inside[1])
                if target is aten.layer_norm.default:
                    args = (operand, sizes, None, None, inside[1])  # type: ignore[assignment]
                result = e.call(node, target, *args, val=e.like(operand))
                return multiply(e, node, result, number, others(found, x, inverse))
    return None


def _rms(e: Editor, mean: fx.Node, x: fx.Node) -> tuple[Any, fx.Node, list[int]] | None:
    if not e.at(mean, aten.mean.dim) or not _kept(mean):
        return None
    square = mean.args[0]
    if not e.at(square, aten.pow.Tensor_Scalar) or square.args[1] != 2 or dtype(square) != dtype(mean):
        return None
    wide = square.args[0]
    if wide is not x and not (e.at(wide, aten.to.dtype) and wide.args[0] is x):  # the product casts x
        return None
    sizes = _trailing(e, x, mean.args[1])
    return None if sizes is None else (aten.rms_norm.default, wide, sizes)


def _layer(e: Editor, variance: fx.Node, centred: fx.Node) -> tuple[Any, fx.Node, list[int]] | None:
    if not e.at(variance, aten.var.correction) or not e.at(centred, aten.sub.Tensor) or centred.kwargs:
        return None
    x, mean = centred.args
    if variance.args[0] is not x or variance.kwargs != {"correction": 0, "keepdim": True}:
        return None
    if not e.at(mean, aten.mean.dim) or not _kept(mean) or mean.args[0] is not x:
        return None
    sizes = _trailing(e, x, mean.args[1])
    if sizes is None or sorted(mean.args[1]) != sorted(variance.args[1]):
        return None
    return aten.layer_norm.default, x, sizes


@on(aten.mul.Tensor)
def norm_weight(e: Editor, node: fx.Node) -> fx.Node | None:
    """A weight of the normalised shape on a norm without one is its argument."""
    for norm, w in (node.args, node.args[::-1]):
        if not e.once(norm, aten.rms_norm.default, aten.layer_norm.default) or not is_tensor(w):
            continue
        x, sizes, weight, *rest = [*norm.args, None, None][: max(len(norm.args), 3)]
        if weight is not None or (norm.target is aten.layer_norm.default and rest and rest[0] is not None):
            continue
        if list(e.shape(w)) == sizes and dtype(node) == dtype(norm) and not e.from_state(x):
            return e.call(node, norm.target, x, sizes, _cast(e, node, w), *rest, val=e.like(node))
    return None


def _cast(e: Editor, node: fx.Node, w: fx.Node) -> fx.Node:
    """w as `node`, of a wider dtype, reads it."""
    return w if dtype(w) == dtype(node) else e.call(node, aten.to.dtype, w, dtype(node))


@on(aten.add.Tensor)
def norm_bias(e: Editor, node: fx.Node) -> fx.Node | None:
    """A bias of the normalised shape on a layer norm without one is its argument."""
    for norm, b in (node.args, node.args[::-1]):
        if not e.once(norm, aten.layer_norm.default) or not is_tensor(b) or node.kwargs:
            continue
        x, sizes, weight, bias, *rest = [*norm.args, None, None][: max(len(norm.args), 4)]
        if bias is None and list(e.shape(b)) == sizes and dtype(node) == dtype(norm):
            return e.call(node, norm.target, x, sizes, weight, _cast(e, node, b), *rest, val=e.like(node))
    return None


@on(aten.native_layer_norm.default, aten._fused_rms_norm.default)
def native_norm(e: Editor, node: fx.Node) -> fx.Node | None:
    """A norm that returns its statistics, where nothing reads them, is `layer_norm` or `rms_norm`."""
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in node.users):
        return None
    layer = node.target is aten.native_layer_norm.default
    target = aten.layer_norm.default if layer else aten.rms_norm.default
    for user in list(node.users):
        e.replace(user, e.call(user, target, *node.args, val=user.meta["val"]))
    return node


# -- variance --------------------------------------------------------------------------------------

_VARIANCES = (aten.var.dim, aten.var.default, aten.var.correction)


@on(*_VARIANCES)
def variance_arguments(e: Editor, node: fx.Node) -> fx.Node | None:
    """Every variance is `var.correction` with dimensions, correction and keepdim."""
    x, dims, correction, keep = _variance(node)
    args = (x, list(range(rank(x))) if dims is None else dims)
    kwargs: dict[str, Any] = {} if correction == 1 else {"correction": correction}
    kwargs |= {"keepdim": True} if keep else {}
    if (node.target, node.args, dict(node.kwargs)) == (aten.var.correction, args, kwargs) or not rank(x):
        return None
    return e.call(node, aten.var.correction, *args, val=node.meta["val"], **kwargs)


def _variance(node: fx.Node) -> tuple[Any, Any, Any, bool]:
    """Operand, dimensions, correction and keepdim of a variance."""
    name = node.target._overloadname
    if name == "correction":
        x, dims = [*node.args, None][:2]
        correction = node.kwargs.get("correction")
        return x, dims, 1 if correction is None else correction, bool(node.kwargs.get("keepdim", False))
    if name == "default":
        x, unbiased = [*node.args, True][:2]
        return x, None, int(bool(unbiased)), False
    defaults = (None, None, True, False)
    given: tuple[Any, ...] = (*node.args, *defaults[len(node.args) :])
    x, dims, unbiased, keep = given
    return x, dims, int(bool(unbiased)), bool(keep)


@on(aten.var_mean.dim, aten.var_mean.default, aten.var_mean.correction)
def variance_and_mean(e: Editor, node: fx.Node) -> fx.Node | None:
    """`var_mean` is `var.correction` and `mean.dim`."""
    x, dims, correction, keep = _variance(node)
    dims = list(range(rank(x))) if dims is None else dims
    kwargs = {"correction": correction, "keepdim": keep}
    for user in list(node.users):
        if user.target is not operator.getitem or user.meta["regions"] != node.meta["regions"]:
            return None
        val = user.meta["val"]
        if user.args[1] == 0:
            part = e.call(user, aten.var.correction, x, dims, val=val, **kwargs)
        else:
            part = e.call(user, aten.mean.dim, x, dims, *([True] if keep else []), val=val)
        e.replace(user, part)
    return node


@on(aten.pow.Tensor_Scalar)
def square_of_root(e: Editor, node: fx.Node) -> fx.Node | None:
    """A squared deviation is the variance, a squared length a sum of squares unless these may overflow."""
    root, power = node.args
    if power != 2 or node.kwargs:
        return None
    if e.at(root, *_DEVIATIONS):
        x, dims, correction, keep = _variance(root)
        kwargs = {"correction": correction, "keepdim": keep}
        return e.call(node, aten.var.correction, x, dims, val=node.meta["val"], **kwargs)
    if not e.at(root, aten.linalg_vector_norm.default) or dtype(node) is torch.float16:
        return None
    given: list[Any] = [*root.args, *_NORM[len(root.args) :]]
    x, order, dims, keep, kind = given
    if order != 2 or kind is not None or root.kwargs or dims is None:
        return None
    square = e.call(node, aten.pow.Tensor_Scalar, x, 2, val=e.like(x))
    return e.call(node, aten.sum.dim_IntList, square, dims, keep, val=node.meta["val"])


_DEVIATIONS = (aten.std.dim, aten.std.default, aten.std.correction)
_NORM: list[Any] = [None, 2, None, False, None]  # defaults of its arguments


@on(aten.mean.dim)
def variance(e: Editor, node: fx.Node) -> fx.Node | None:
    """The mean of the squared distance to the mean is the variance with correction 0."""
    square = node.args[0]
    if not e.at(square, aten.pow.Tensor_Scalar) or square.args[1] != 2:
        return None
    if not e.at(square.args[0], aten.sub.Tensor):
        return None
    x, mean = square.args[0].args
    dims = node.args[1]
    if square.args[0].kwargs or node.kwargs or not e.at(mean, aten.mean.dim) or not _kept(mean):
        return None
    if mean.args[0] is not x or mean.args[1] != dims or dtype(x) != dtype(node):
        return None
    kwargs = {"correction": 0} | ({"keepdim": True} if _kept(node) else {})
    return e.call(node, aten.var.correction, x, dims, val=node.meta["val"], **kwargs)


@on(aten.sub.Tensor)
def variance_by_moments(e: Editor, node: fx.Node) -> fx.Node | None:
    """The mean square less the squared mean is the variance with correction 0."""
    second, square = node.args
    if node.kwargs or not e.at(second, aten.mean.dim) or not e.at(square, aten.pow.Tensor_Scalar):
        return None
    mean, n = square.args
    if n != 2 or not e.at(mean, aten.mean.dim) or mean.args[1:] != second.args[1:]:
        return None
    if not e.at(second.args[0], aten.pow.Tensor_Scalar) or second.args[0].args != (mean.args[0], 2):
        return None
    kwargs = {"correction": 0} | ({"keepdim": True} if _kept(mean) else {})
    return e.call(node, aten.var.correction, *mean.args[:2], val=node.meta["val"], **kwargs)
