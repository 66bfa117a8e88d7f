"""Steps that recognise one operator written as several: activations, softmax, norms."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import fx

from fxaccel.canonical.editor import Editor, aten, close, dtype, is_float, is_tensor, on, rank

_LIMIT = 8  # factors of a product that are looked at


def factors(e: Editor, node: Any) -> tuple[float, list[fx.Node]]:
    """A product taken apart: the number in it and the tensors, seen through products that only it reads."""
    number, pending = 1.0, [node]
    found: list[fx.Node] = []
    while pending:
        n = pending.pop()
        inner = e.at(n, aten.mul.Tensor) if n is node else e.once(n, aten.mul.Tensor) and len(found) < _LIMIT
        if isinstance(n, (int, float)):
            number *= n
        elif inner and not n.kwargs and dtype(n) == dtype(node):
            pending += n.args[::-1]
        elif (e.at(n) if n is node else e.once(n)) and _is_neg_or_quotient(n):
            number *= -1.0 if n.target is aten.neg.default else 1.0 / n.args[1]
            pending.append(n.args[0])
        else:
            found.append(n)
    return number, found


def _is_neg_or_quotient(n: fx.Node) -> bool:
    if n.target is aten.neg.default:
        return True
    return n.target is aten.div.Tensor and isinstance(n.args[1], float) and n.args[1] != 0 and not n.kwargs


def plus_number(e: Editor, node: Any) -> tuple[fx.Node, float] | None:
    """(x, c) of a value x + c with a number c."""
    if e.at(node, aten.add.Tensor) and not node.kwargs and isinstance(node.args[1], (int, float)):
        return node.args[0], float(node.args[1])
    return None


def multiply(e: Editor, like: fx.Node, x: fx.Node, number: float, rest: list[fx.Node]) -> fx.Node:
    """x times what is left of a product."""
    if number != 1:
        x = e.call(like, aten.mul.Tensor, x, number, val=e.like(x))
    for other in rest:
        x = e.call(like, aten.mul.Tensor, x, other)
    return x


def _others(found: list[fx.Node], *taken: fx.Node) -> list[fx.Node]:
    left = list(found)
    for t in taken:
        left.remove(t)
    return left


# -- activations -----------------------------------------------------------------------------------


@on(aten.reciprocal.default, aten.div.Tensor)
def sigmoid(e: Editor, node: fx.Node) -> fx.Node | None:
    """1 / (1 + exp(-x)) is `sigmoid(x)`, x / (1 + exp(-x)) is `silu(x)`."""
    denominator = node.args[-1]
    one = plus_number(e, denominator)
    if one is None or one[1] != 1 or not e.at(one[0], aten.exp.default):
        return None
    inner = one[0].args[0]
    if not e.at(inner, aten.neg.default) or not is_float(inner.args[0]):
        return None
    x = inner.args[0]
    gate = e.call(node, aten.sigmoid.default, x, val=denominator.meta["val"])
    if node.target is aten.reciprocal.default:
        return gate
    return e.call(node, aten.mul.Tensor, node.args[0], gate, val=node.meta["val"])


@on(aten.mul.Tensor)
def silu(e: Editor, node: fx.Node) -> fx.Node | None:
    """x * sigmoid(x) is `silu(x)`, x * tanh(softplus(x)) is `mish(x)`."""
    number, found = factors(e, node)
    for gate in found:
        if e.at(gate, aten.sigmoid.default) and gate.args[0] in found:
            result = e.call(node, aten.silu.default, gate.args[0], val=e.like(gate.args[0]))
            return multiply(e, node, result, number, _others(found, gate, gate.args[0]))
        if e.at(gate, aten.tanh.default) and e.at(gate.args[0], aten.softplus.default):
            x, *options = gate.args[0].args
            if x in found and not options:
                result = e.call(node, aten.mish.default, x, val=e.like(x))
                return multiply(e, node, result, number, _others(found, gate, x))
    return None


@on(aten.mul.Tensor)
def gelu(e: Editor, node: fx.Node) -> fx.Node | None:
    """x * (1 + erf(x / sqrt(2))) / 2, and its approximation by tanh, are `gelu`."""
    number, found = factors(e, node)
    for bell in found:
        shifted = plus_number(e, bell)
        if shifted is None:
            continue
        half, inner = factors(e, shifted[0])
        if len(inner) != 1 or not close(half, shifted[1], node):
            continue
        for x in found:
            if x is bell or dtype(x) != dtype(node):
                continue
            kind = _gelu_kind(e, inner[0], x)
            if kind is not None:
                kwargs = {"approximate": "tanh"} if kind == "tanh" else {}
                result = e.call(node, aten.gelu.default, x, val=e.like(x), **kwargs)
                left = number * 2 * half
                return multiply(e, node, result, 1 if close(left, 1, node) else left, _others(found, x, bell))
    return None


def _gelu_kind(e: Editor, bell: fx.Node, x: fx.Node) -> str | None:
    """Which gelu of `x` the value (erf or tanh of a polynomial) belongs to."""
    if e.at(bell, aten.erf.default):
        number, found = factors(e, bell.args[0])
        return "none" if found == [x] and close(number, math.sqrt(0.5), x) else None
    if not e.at(bell, aten.tanh.default):
        return None
    number, found = factors(e, bell.args[0])
    if len(found) == 1 and e.at(found[0], aten.add.Tensor):
        terms = [factors(e, t) for t in found[0].args]
        linear, cubic = sorted(terms, key=lambda t: 0 if t[1] == [x] else 1)
        a, b = number * linear[0], number * cubic[0]
        if linear[1] == [x] and _is_power(e, cubic[1], x, 3) and _tanh_constants(a, b, x):
            return "tanh"
    for part in found:
        shifted = plus_number(e, part)
        if shifted is not None and len(found) == 2 and x in found:
            scale, square = factors(e, shifted[0])
            a, b = number * shifted[1], number * scale
            return "tanh" if _is_power(e, square, x, 2) and _tanh_constants(a, b, x) else None
    return None


def _tanh_constants(linear: float, cubic: float, x: fx.Node) -> bool:
    root = math.sqrt(2 / math.pi)
    return close(linear, root, x) and close(cubic, root * 0.044715, x)


def _is_power(e: Editor, found: list[fx.Node], x: fx.Node, n: int) -> bool:
    """Whether the factors are the n-th power of `x`."""
    total = 0
    for f in found:
        if f is x:
            total += 1
        elif e.at(f, aten.pow.Tensor_Scalar) and f.args[0] is x:
            total += f.args[1]
        else:
            return False
    return total == n


# -- softmax ---------------------------------------------------------------------------------------


def _reduced_over(e: Editor, node: Any, *targets: Any) -> tuple[fx.Node, int] | None:
    """What a reduction that keeps its one dimension reduces, and the dimension."""
    if not e.at(node, *targets) or node.kwargs or len(node.args) != 3 or node.args[2] is not True:
        return None
    x, d, _ = node.args
    d = d[0] if isinstance(d, list) and len(d) == 1 else d
    return (x, d) if isinstance(d, int) else None


def _maximum(e: Editor, node: Any) -> tuple[fx.Node, int] | None:
    """What a maximum along a kept dimension is the maximum of."""
    while e.at(node, aten.detach.default):
        node = node.args[0]
    if e.at(node, operator.getitem) and node.args[1] == 0:
        return _reduced_over(e, node.args[0], aten.max.dim)
    return _reduced_over(e, node, aten.amax.default)


@on(aten.div.Tensor)
def softmax(e: Editor, node: fx.Node) -> fx.Node | None:
    """exp(x) over its sum is `softmax(x)`."""
    top, bottom = node.args
    over = _reduced_over(e, bottom, aten.sum.dim_IntList)
    if over is None or over[0] is not top or not e.at(top, aten.exp.default) or not is_float(top.args[0]):
        return None
    return e.call(node, aten.softmax.int, top.args[0], over[1], val=node.meta["val"])


@on(aten.softmax.int, aten.log_softmax.int, aten.logsumexp.default)
def shifted_softmax(e: Editor, node: fx.Node) -> fx.Node | None:
    """Subtracting the maximum before a softmax is its own affair."""
    x, d = node.args[:2]
    if not e.at(x, aten.sub.Tensor) or x.kwargs or node.target is aten.logsumexp.default:
        return None
    shift = _maximum(e, x.args[1])
    if shift is None or shift[0] is not x.args[0] or shift[1] != d or dtype(x) != dtype(x.args[0]):
        return None
    return e.call(node, node.target, x.args[0], *node.args[1:], val=node.meta["val"])


@on(aten.log.default)
def log_of(e: Editor, node: fx.Node) -> fx.Node | None:
    """log(softmax(x)) is `log_softmax(x)`; log of a kept sum of exp(x) is `logsumexp(x)`."""
    x = node.args[0]
    if e.at(x, aten.softmax.int):
        return e.call(node, aten.log_softmax.int, *x.args, val=node.meta["val"])
    over = _reduced_over(e, x, aten.sum.dim_IntList)
    if over is not None and e.at(over[0], aten.exp.default) and is_float(over[0].args[0]):
        return e.call(node, aten.logsumexp.default, over[0].args[0], [over[1]], True, val=node.meta["val"])
    return None


@on(aten.sub.Tensor)
def log_softmax(e: Editor, node: fx.Node) -> fx.Node | None:
    """x - logsumexp(x) is `log_softmax(x)`."""
    x, total = node.args
    over = _reduced_over(e, total, aten.logsumexp.default)
    if node.kwargs or over is None or over[0] is not x or not is_float(x):
        return None
    return e.call(node, aten.log_softmax.int, x, over[1], val=node.meta["val"])


@on(aten.exp.default)
def exp_of(e: Editor, node: fx.Node) -> fx.Node | None:
    """exp(log_softmax(x)) is `softmax(x)`."""
    x = node.args[0]
    if not e.once(x, aten.log_softmax.int):
        return None
    return e.call(node, aten.softmax.int, *x.args, val=node.meta["val"])


# -- norms -----------------------------------------------------------------------------------------


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
            if x is inverse or dtype(x) != dtype(node) or dtype(inverse) != dtype(x) or not is_float(x):
                continue
            plan = _rms(e, inside[0], x) or _layer(e, inside[0], x)
            if plan is not None:
                target, operand, sizes = plan
                args = (operand, sizes, None, inside[1])
                if target is aten.layer_norm.default:
                    args = (operand, sizes, None, None, inside[1])  # type: ignore[assignment]
                result = e.call(node, target, *args, val=e.like(operand))
                return multiply(e, node, result, number, _others(found, x, inverse))
    return None


def _rms(e: Editor, mean: fx.Node, x: fx.Node) -> tuple[Any, fx.Node, list[int]] | None:
    if not e.at(mean, aten.mean.dim) or not _kept(mean):
        return None
    square = mean.args[0]
    if not e.at(square, aten.pow.Tensor_Scalar) or square.args != (x, 2):
        return None
    sizes = _trailing(e, x, mean.args[1])
    return None if sizes is None else (aten.rms_norm.default, x, sizes)


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
        if list(e.shape(w)) == sizes and dtype(w) == dtype(norm) and not e.from_state(x):
            return e.call(node, norm.target, x, sizes, w, *rest, val=e.like(node))
    return None


@on(aten.add.Tensor)
def norm_bias(e: Editor, node: fx.Node) -> fx.Node | None:
    """A bias of the normalised shape on a layer norm with a weight and none is its argument."""
    for norm, b in (node.args, node.args[::-1]):
        if not e.once(norm, aten.layer_norm.default) or not is_tensor(b) or node.kwargs:
            continue
        x, sizes, weight, bias, *rest = [*norm.args, None, None][: max(len(norm.args), 4)]
        if weight is None or bias is not None:
            continue
        if list(e.shape(b)) == sizes and dtype(b) == dtype(norm):
            return e.call(node, norm.target, x, sizes, weight, b, *rest, val=e.like(node))
    return None


@on(aten.native_layer_norm.default)
def native_norm(e: Editor, node: fx.Node) -> fx.Node | None:
    """`native_layer_norm` whose statistics are not used is `layer_norm`."""
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in node.users):
        return None
    for user in list(node.users):
        e.replace(user, e.call(user, aten.layer_norm.default, *node.args, val=user.meta["val"]))
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
    defaults: list[Any] = [None, True, False]
    x, dims, unbiased, keep = [*node.args, *defaults[len(node.args) - 1 :]]
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


