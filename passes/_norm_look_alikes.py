"""Tells what keeps a value over a root, which the canonical form has left written out, from being a norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fxaccel.ir import Program, arguments, expr, is_call, target_name
from fxaccel.rule import Miss, Refusal, joined

aten = torch.ops.aten

TARGETS = frozenset({aten.rsqrt.default, aten.sqrt.default, aten.linalg_vector_norm.default})
_MEANS = (aten.mean.dim, aten.sum.dim_IntList, aten.var.correction)
_CLAMPS = (aten.clamp.default, aten.clamp_min.default, aten.maximum.default)
_SCALED = (aten.mul.Tensor, aten.div.Tensor, aten.to.dtype)


def look_alike(program: Program, root: fx.Node) -> Miss:
    """Every difference between what stands around a root and a norm, as a near miss."""
    found = joined(_differences(root))
    return Miss(2, found) if found else Miss()


def _differences(root: fx.Node) -> Iterator[str]:
    if root.target is aten.linalg_vector_norm.default:
        if any(is_call(u, *_SCALED, *_CLAMPS) for u in root.users):
            yield "it divides by the length of a vector, not by the root of a mean of squares"
        return
    mean, eps = root.args[0], None
    if is_call(mean, aten.add.Tensor):
        mean, eps = mean.args if is_call(mean.args[0], *_MEANS, *_CLAMPS) else mean.args[::-1]
    clamped = is_call(mean, *_CLAMPS)
    if clamped:
        mean = next((a for a in mean.args if is_call(a, *_MEANS)), None)
    if not is_call(mean, *_MEANS):
        return
    if clamped:
        yield "what is under the root is clamped, where a norm adds eps"
    elif not isinstance(eps, (int, float)):
        tensor = Refusal("eps is a tensor; the kernel takes a number", "a number as eps")
        yield _missing_eps(root) if eps is None else tensor
    yield from _statistics(mean)
    rounded = [u.args[1] for u in root.users if is_call(u, aten.to.dtype)]
    if rounded:
        yield Refusal(
            f"the root is rounded to {rounded[0]} before it scales", "the product rounded in its place"
        )
    yield from _scaled(mean, _factors(root))


def _missing_eps(root: fx.Node) -> str:
    if any(is_call(u, aten.add.Tensor) for u in root.users):
        return "eps is added to the root, not under it"
    if any(is_call(u, *_CLAMPS) for u in root.users):
        return "the root is clamped, where a norm adds eps under it"
    return "no eps is added under the root"


def _statistics(mean: fx.Node) -> Iterator[str]:
    """What is unusual about the mean of squares or the variance."""
    a = arguments(mean)
    rank = a["self"].meta["val"].dim()
    if mean.target is aten.sum.dim_IntList:
        yield "the root is of a sum, not of a mean"
    if mean.target is aten.var.correction and a["correction"] != 0:
        yield f"the variance divides by n - {1 if a['correction'] is None else a['correction']}, not by n"
    if a["dim"] != [rank - 1]:
        yield f"the mean is over {a['dim']} of {rank} dimensions, not over the last"
    elif not expr(a["self"].meta["val"].shape[-1]).is_Integer:
        yield "the last dimension has no fixed size"
    elif not a["keepdim"]:
        yield "the mean drops the dimension that it is over"
    if mean.target is not aten.var.correction and _squared(mean) is None:
        yield f"the mean is of {target_name(a['self'].target)}, not of squares"


def _squared(mean: fx.Node) -> fx.Node | None:
    square = mean.args[0]
    squared = is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2
    return square.args[0] if squared else None


def _factors(root: fx.Node) -> list[fx.Node]:
    """What the product holds that `root` goes into, the casts left out."""
    top: fx.Node | None = root
    pending = []
    while top is not None:
        pending += [a for a in top.all_input_nodes if a is not top] if top is not root else []
        top = next((u for u in top.users if is_call(u, *_SCALED, *_CLAMPS, aten.add.Tensor)), None)
    found = []
    while pending:
        n = pending.pop()
        found.append(n)
        if is_call(n, *_SCALED):
            pending += n.all_input_nodes
    return found


def _scaled(mean: fx.Node, factors: list[fx.Node]) -> Iterator[str]:
    """Why what is scaled is not what the statistics are of."""
    if mean.target is not aten.var.correction:
        x = _squared(mean)
        if x is not None and not {x, _uncast(x)} & set(factors):
            yield "what is scaled is another tensor than the squares are of"
        return
    x = mean.args[0]
    centred = [n for n in factors if is_call(n, aten.sub.Tensor)]
    if not centred:
        yield "the mean is not subtracted"
    elif all(n.args[0] is not x for n in centred):
        yield "what is scaled is another tensor than the variance is of"
    elif not any(is_call(n.args[1], aten.mean.dim) and n.args[1].args[:2] == mean.args[:2] for n in centred):
        yield "what is subtracted is not the mean that the variance is about"


def _uncast(x: fx.Node) -> fx.Node:
    return x.args[0] if is_call(x, aten.to.dtype) else x
