"""Run RMSNorm and LayerNorm, alone or after a residual add, as one kernel each.

    h = x + r
    y = rms_norm(h, [C], w, eps)           =>   y, h = fxaccel.add_rms_norm(x, r, w, eps)
    y = layer_norm(x, [C], w, b, eps)      =>   y = fxaccel.layer_norm(x, w, b, eps)

Fires on   canonical norms over the last dimension: with a weight, without, with `1 + w` (Gemma), in a
           lower-precision model with float32 statistics and the cast back before (Llama, T5) or after
           (Gemma) the weight; with the residual add before it, which may have other readers.
Saves      a norm: 2 tensor-sized transfers forward and 3 backward, where written-out ATen takes 8 and more;
           the add: one read of `h`.
Exact      agrees with the original within its own rounding (statistics in fp32, one rounding); `h` is
           bit-equal.
Source     Zhang & Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
"""

from typing import Any

import torch

from fxaccel.kernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fxaccel.rule import ANY, Match, Ops, Refusals, Rule, Rules, register


def _rms(op: Ops, x: Any, w: Any, dims: Any, eps: Any, offset: Any, wide: Any, low: Any) -> Any:
    """The canonical spellings of an RMSNorm of x."""
    aten = op.aten
    shifted = aten.add.Tensor(w, offset)
    widened = aten.to.dtype(x, wide)
    inner = aten.rms_norm.default(widened, dims, None, eps)
    weight = op.either(
        offset=aten.add.Tensor(aten.to.dtype(w, wide), offset), cast_weight=aten.to.dtype(w, wide)
    )
    return op.either(
        cast_first=aten.mul.Tensor(aten.to.dtype(inner, low), op.either(offset=shifted, weighted=w)),
        cast_last=aten.to.dtype(aten.rms_norm.default(widened, dims, weight, eps), low),
        bare_cast=aten.to.dtype(inner, low),
        offset=aten.rms_norm.default(x, dims, shifted, eps),
        plain=aten.rms_norm.default(x, dims, w, eps),
    )


def _refuse(m: Match, x: torch.Tensor) -> Refusals:
    """What RMSNorm and LayerNorm have in common."""
    if list(m.dims) != [x.shape[-1]]:
        yield f"it normalises over {list(m.dims)}; the kernel takes the last dimension, {x.shape[-1]}"
    if m.eps is None:
        yield "eps is left to the dtype; the kernel needs a number"


def _refuse_rms(m: Match, x: torch.Tensor) -> Refusals:
    yield from _refuse(m, x)
    if m.chose("offset") and not isinstance(m.offset, (int, float)):
        yield "the weight is shifted by a tensor; the kernel takes a number"
    if m.low is not None and m.low != x.dtype:
        yield f"the result is cast to {m.low}, the input is {x.dtype}"


class AddRMSNorm(Rule):
    """rms_norm(x + r) becomes one kernel that also returns x + r."""

    def pattern(self, op, x, r, w, dims, eps, offset, wide, low):
        h = op.aten.add.Tensor(x, r)
        return _rms(op, h, w, dims, eps, offset, wide, low), h

    def refuse(self, m: Match) -> Refusals:
        x, r, w = m.val("x", "r", "w")
        if not isinstance(r, torch.Tensor) or not isinstance(x, torch.Tensor):
            yield "the addend is a number, not a residual tensor"
            return
        yield from _refuse_rms(m, x)
        yield from add_rms_norm.unsupported(x, r, w)

    def rewrite(self, op: Ops, m: Match):
        offset = m.offset if m.chose("offset") else 0.0
        return op.fxaccel.add_rms_norm.default(m.x, m.r, m.w, m.eps, float(offset), m.chose("cast_first"))


class AddLayerNorm(Rule):
    """layer_norm(x + r) becomes one kernel that also returns x + r."""

    def pattern(self, op, x, r, w, b, dims, eps):
        h = op.aten.add.Tensor(x, r)
        return op.aten.layer_norm.default(h, dims, w, b, eps, ANY), h

    def refuse(self, m: Match) -> Refusals:
        x, r, w, b = m.val("x", "r", "w", "b")
        if not isinstance(r, torch.Tensor) or not isinstance(x, torch.Tensor):
            yield "the addend is a number, not a residual tensor"
            return
        yield from _refuse(m, x)
        yield from add_layer_norm.unsupported(x, r, w, b)

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.add_layer_norm.default(m.x, m.r, m.w, m.b, m.eps)


class RMSNorm(Rule):
    """Any spelling of RMSNorm becomes one kernel."""

    def pattern(self, op, x, w, dims, eps, offset, wide, low):
        return _rms(op, x, w, dims, eps, offset, wide, low)

    def refuse(self, m: Match) -> Refusals:
        x, w = m.val("x", "w")
        yield from _refuse_rms(m, x)
        yield from rms_norm.unsupported(x, w)

    def rewrite(self, op: Ops, m: Match):
        offset = m.offset if m.chose("offset") else 0.0
        return op.fxaccel.rms_norm.default(m.x, m.w, m.eps, float(offset), m.chose("cast_first"))


class LayerNorm(Rule):
    """LayerNorm over the last dimension becomes one kernel."""

    def pattern(self, op, x, w, b, dims, eps):
        return op.aten.layer_norm.default(x, dims, w, b, eps, ANY)

    def refuse(self, m: Match) -> Refusals:
        x, w, b = m.val("x", "w", "b")
        yield from _refuse(m, x)
        yield from layer_norm.unsupported(x, w, b)

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.layer_norm.default(m.x, m.w, m.b, m.eps)


@register
class FuseNorm(Rules):
    """RMSNorm and LayerNorm, with a residual add before them, become one kernel each."""

    name = "fuse-norm"
    step = "raise"
    default = True
    produces = ("norms",)
    invalidates = ("canonical-norms",)
    rules = (AddRMSNorm, AddLayerNorm, RMSNorm, LayerNorm)
