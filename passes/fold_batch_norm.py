"""Fold a BatchNorm of running statistics into the convolution or linear before or after it.

    y = conv(x, W, b)                                     s = w / sqrt(var + eps)
    z = batch_norm(y, w, c, mean, var, False, eps)    =>  z = conv(x, W * s, (b - mean) * s + c)

Fires on   inference alone: a convolution (transposed ones without groups) or a linear whose result only the
           norm reads, also through a reshape or permute of the linear's result; a norm whose result only a
           linear reads, or a convolution without padding.
Saves      a norm, 2 tensor-sized transfers: with a pointwise convolution about half of all. The weights
           are computed once, and again when a weight or a statistic changes; they take their memory twice.
Exact      agrees with the original within its own rounding: (W x - mean) s = (s W) x - mean s.
Source     Jacob et al. 2018, arXiv:1712.05877, section 3.2.
"""

from typing import Any

from torch import fx

from fxaccel.derived import standing
from fxaccel.ir import arguments, is_call
from fxaccel.passes._advice import ONE_DTYPE, STANDING
from fxaccel.rule import ANY, Match, Ops, Refusal, Refusals, Rule, Rules, register


def _layer(op: Ops, x: Any, w: Any, b: Any, pad: Any = ANY) -> Any:
    """A convolution or linear of x."""
    aten = op.aten
    return op.either(
        linear=aten.linear.default(x, w, b),
        conv1d=aten.conv1d.default(x, w, b, ANY, pad, ANY, ANY),
        conv2d=aten.conv2d.default(x, w, b, ANY, pad, ANY, ANY),
        conv3d=aten.conv3d.default(x, w, b, ANY, pad, ANY, ANY),
        padded1d=aten.conv1d.padding(x, w, b, ANY, pad, ANY, ANY),
        padded2d=aten.conv2d.padding(x, w, b, ANY, pad, ANY, ANY),
        padded3d=aten.conv3d.padding(x, w, b, ANY, pad, ANY, ANY),
        transposed1d=aten.conv_transpose1d.default(x, w, b, ANY, pad, ANY, ANY, ANY),
        transposed2d=aten.conv_transpose2d.input(x, w, b, ANY, pad, ANY, ANY, ANY),
        transposed3d=aten.conv_transpose3d.input(x, w, b, ANY, pad, ANY, ANY, ANY),
    )


def _norm(op: Ops, y: Any, scale: Any, shift: Any, mean: Any, var: Any, eps: Any) -> Any:
    return op.aten.batch_norm.default(y, scale, shift, mean, var, False, ANY, eps, ANY)


def _called(m: Match) -> fx.Node:
    """The convolution or linear of a match."""
    return next(n for n in m.nodes if is_call(n) and ("conv" in str(n.target) or "linear" in str(n.target)))


def _transposed(m: Match) -> bool:
    return "transpose" in str(_called(m).target)


def _refuse(m: Match) -> Refusals:
    known = m.facts(standing)
    for name in ("w", "b", "scale", "shift", "mean", "var"):
        value = getattr(m, name)
        if isinstance(value, fx.Node) and value not in known:
            yield Refusal(f"%{value.name} is not a parameter or a buffer that stays as it is", STANDING)
    dtypes = {m.val(n).dtype for n in ("w", "mean", "scale") if isinstance(getattr(m, n), fx.Node)}
    dtypes |= {m.root.meta["val"].dtype, _called(m).meta["val"].dtype}
    if len(dtypes) > 1:
        told = ", ".join(sorted(map(str, dtypes)))
        yield Refusal(f"weights, statistics and results are of dtypes {told}", ONE_DTYPE)
    if _transposed(m) and arguments(_called(m))["groups"] != 1:
        yield f"the transposed convolution has {arguments(_called(m))['groups']} groups"


def _factors(op: Ops, m: Match) -> tuple[Any, Any]:
    """batch_norm(y) = y * factor + addend."""
    factor = op.aten.rsqrt.default(op.aten.add.Tensor(m.var, m.eps))
    factor = factor if m.scale is None else op.aten.mul.Tensor(factor, m.scale)
    addend = op.aten.neg.default(op.aten.mul.Tensor(m.mean, factor))
    return factor, addend if m.shift is None else op.aten.add.Tensor(addend, m.shift)


def _along(op: Ops, m: Match, vector: Any, dim: int) -> Any:
    """A vector laid along a dimension of the weight."""
    return op.aten.reshape.default(vector, [-1 if i == dim else 1 for i in range(m.val("w").dim())])


def _again(op: Ops, m: Match, w: Any, b: Any) -> Any:
    """The convolution or linear with other weights."""
    called = _called(m)
    return op(called.target, m.x, w, b, *list(arguments(called).values())[3:])


class NormAfter(Rule):
    """batch_norm(conv(x)) becomes conv(x) with other weights."""

    def pattern(self, op, x, w, b, scale, shift, mean, var, eps, dims, sizes):
        y = _layer(op, x, w, b)
        moved = op.either(
            directly=y, permuted=op.aten.permute.default(y, dims), reshaped=op.aten.reshape.default(y, sizes)
        )
        return _norm(op, moved, scale, shift, mean, var, eps)

    def refuse(self, m: Match) -> Refusals:
        yield from _refuse(m)
        y, normed = _called(m).meta["val"], m.root.meta["val"]
        linear = m.chose("linear")
        if m.chose("permuted") and not (linear and m.dims[1] % y.dim() == y.dim() - 1):
            yield f"permute {list(m.dims)} puts no outputs of a linear into the dimension that is normalised"
        elif m.chose("reshaped") and not (linear and normed.dim() == 2 and y.shape[-1] == normed.shape[1]):
            yield f"the reshape to {list(normed.shape)} does not keep the outputs of a linear last of two"
        elif m.chose("directly") and linear and y.dim() != 2:
            yield f"the linear's outputs are dimension {y.dim() - 1}, the norm is over dimension 1"

    def rewrite(self, op: Ops, m: Match):
        factor, addend = _factors(op, m)
        w = op.aten.mul.Tensor(m.w, _along(op, m, factor, int(_transposed(m))))
        b = addend if m.b is None else op.aten.add.Tensor(op.aten.mul.Tensor(m.b, factor), addend)
        y = _again(op, m, w, b)
        if m.chose("permuted"):
            return op.aten.permute.default(y, m.dims)
        return op.aten.reshape.default(y, m.sizes) if m.chose("reshaped") else y


class NormBefore(Rule):
    """conv(batch_norm(x)) becomes conv(x) with other weights, where nothing is padded."""

    def pattern(self, op, x, w, b, scale, shift, mean, var, eps, pad):
        return _layer(op, _norm(op, x, scale, shift, mean, var, eps), w, b, pad)

    def refuse(self, m: Match) -> Refusals:
        yield from _refuse(m)
        if m.pad not in (None, "valid") and any(m.pad):
            yield f"the convolution pads the normed value with zeros, by {m.pad}"
        groups = arguments(_called(m)).get("groups", 1)
        if groups != 1:
            yield f"the convolution has {groups} groups"
        if m.chose("linear") and m.val("x").dim() != 2:
            yield f"the norm is over dimension 1, the linear reads dimension {m.val('x').dim() - 1}"
        if _transposed(m):
            yield "a transposed convolution adds borders to what it reads"

    def rewrite(self, op: Ops, m: Match):
        factor, addend = _factors(op, m)
        w = op.aten.mul.Tensor(m.w, _along(op, m, factor, 1))
        rest = list(range(1, m.val("w").dim()))
        b = op.aten.sum.dim_IntList(op.aten.mul.Tensor(m.w, _along(op, m, addend, 1)), rest)
        return _again(op, m, w, b if m.b is None else op.aten.add.Tensor(b, m.b))


class GroupNorm(Rule):
    """Named for its refusal: a group norm cannot be folded."""

    def pattern(self, op, x, w, b, groups, scale, shift, eps):
        return op.aten.group_norm.default(_layer(op, x, w, b), groups, scale, shift, eps, ANY)

    def refuse(self, m: Match) -> Refusals:
        yield "a group norm takes its statistics from each input; there is nothing to fold"


@register
class FoldBatchNorm(Rules):
    """BatchNorms of running statistics are folded into the convolution or linear next to them."""

    name = "fold-batch-norm"
    serves = ("inference",)
    default = True
    rules = (NormAfter, NormBefore, GroupNorm)

    def apply(self, program, plan, driver):
        """Into what stands before a norm first: that has no conditions on padding."""
        for rules in ([NormAfter()], [NormBefore(), GroupNorm()]):
            driver.rewrite(rules)
