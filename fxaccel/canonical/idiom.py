"""Steps that recognise one operator written as several: activations, softmax, norms."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import fx

from fxaccel.canonical.editor import Editor, aten, on
from fxaccel.canonical.values import close, dtype, is_float

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


def others(found: list[fx.Node], *taken: fx.Node) -> list[fx.Node]:
    """The factors but those taken."""
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
            return multiply(e, node, result, number, others(found, gate, gate.args[0]))
        if e.at(gate, aten.tanh.default) and e.at(gate.args[0], aten.softplus.default):
            x, *options = gate.args[0].args
            if x in found and not options:
                result = e.call(node, aten.mish.default, x, val=e.like(x))
                return multiply(e, node, result, number, others(found, gate, x))
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
                return multiply(e, node, result, 1 if close(left, 1, node) else left, others(found, x, bell))
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
    return e.call(node, aten.softmax.int, top.args[0], over[1], val=e.like(node))


@on(aten.softmax.int, aten.log_softmax.int, aten.logsumexp.default)
def shifted_softmax(e: Editor, node: fx.Node) -> fx.Node | None:
    """Subtracting the maximum before a softmax is its own affair."""
    x, d = node.args[:2]
    if not e.at(x, aten.sub.Tensor) or x.kwargs or node.target is aten.logsumexp.default:
        return None
    shift = _maximum(e, x.args[1])
    if shift is None or shift[0] is not x.args[0] or shift[1] != d or dtype(x) != dtype(x.args[0]):
        return None
    return e.call(node, node.target, x.args[0], *node.args[1:], val=e.like(node))


@on(aten.log.default)
def log_of(e: Editor, node: fx.Node) -> fx.Node | None:
    """log(softmax(x)) is `log_softmax(x)`; log of a kept sum of exp(x) is `logsumexp(x)`."""
    x = node.args[0]
    if e.at(x, aten.softmax.int):
        return e.call(node, aten.log_softmax.int, *x.args, val=e.like(node))
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
    return e.call(node, aten.log_softmax.int, x, over[1], val=e.like(node))


@on(aten.exp.default)
def exp_of(e: Editor, node: fx.Node) -> fx.Node | None:
    """exp(log_softmax(x)) is `softmax(x)`."""
    x = node.args[0]
    if not e.once(x, aten.log_softmax.int):
        return None
    return e.call(node, aten.softmax.int, *x.args, val=e.like(node))
