"""Run RMSNorm and LayerNorm, alone or after a residual add, as one kernel each.

    h = x + r
    y = rms_norm(h, [C], w, eps) + b       =>   y, h = fxaccel.add_rms_norm(x, r, w, eps, b=b)
    y = layer_norm(x, [C], w, b, eps)      =>   y = fxaccel.layer_norm(x, w, b, eps)

Fires on   canonical norms over the last dimension: with a weight, without, with `1 + w` (Gemma), with a bias;
           in a lower-precision model with float32 statistics, its weights cast or kept in float32, and the
           cast back before (Llama, T5) or after (Gemma) the weight; with the residual add before it, which
           may have other readers.
Saves      a norm: 2 tensor-sized transfers forward and 3 backward, where written-out ATen takes 8 and more;
           the add: one read of `h`.
Exact      agrees with the original within its own rounding (statistics in fp32, one rounding; RMSNorm also
           where Llama rounds before the weight); `h` is bit-equal.
Source     Zhang & Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
"""

from typing import Any

import torch

from fxaccel.ir import Program
from fxaccel.kernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fxaccel.passes._advice import not_last
from fxaccel.passes._norm_look_alikes import TARGETS, look_alike
from fxaccel.pattern import Pattern
from fxaccel.rule import ANY, Finder, Match, Miss, Ops, Refusal, Refusals, Rule, Rules, register


class Norm(Rule):
    """A norm, found by its pattern."""

    def traced(self):
        pattern = Pattern.trace(self.pattern)

        def find(program: Program, root: Any) -> Match | Miss:
            found = pattern.find(program, root)
            if isinstance(found, Miss) or _adds_no_vector(found):
                return Miss()  # of what comes near LookAlike tells
            return found

        return Finder(pattern.targets, find)


def _adds_no_vector(m: Match) -> bool:
    """Whether what is added to the norm is no bias but, say, the residual."""
    return m.chose("biased") and getattr(m.val("b"), "ndim", 0) != 1


def _wide(op: Ops, v: Any, wide: Any) -> Any:
    """A weight in the dtype of the statistics."""
    return op.either(cast=op.aten.to.dtype(v, wide), kept=v)


def _rms(op: Ops, x: Any, w: Any, b: Any, dims: Any, eps: Any, offset: Any, wide: Any, low: Any) -> Any:
    """The canonical spellings of an RMSNorm of x."""
    aten = op.aten
    widened, weight = aten.to.dtype(x, wide), _wide(op, w, wide)
    weight = op.either(offset=aten.add.Tensor(weight, offset), weighted=weight)
    inner = aten.rms_norm.default(widened, dims, weight, eps)
    inner = op.either(biased=aten.add.Tensor(inner, _wide(op, b, wide)), unbiased=inner)
    shifted = op.either(offset=aten.add.Tensor(w, offset), weighted=w)
    bare = aten.to.dtype(aten.rms_norm.default(widened, dims, None, eps), low)
    cast_first = aten.mul.Tensor(bare, shifted)
    plain = aten.rms_norm.default(x, dims, shifted, eps)
    return op.either(
        cast_last=aten.to.dtype(inner, low),
        biased=aten.add.Tensor(op.either(cast_first=cast_first, plain=plain), b),
        cast_first=cast_first,
        plain=plain,
    )


def _layer(op: Ops, x: Any, w: Any, b: Any, dims: Any, eps: Any, wide: Any, low: Any) -> Any:
    """The canonical spellings of a LayerNorm of x."""
    aten = op.aten
    widened = aten.to.dtype(x, wide)
    inner = aten.layer_norm.default(widened, dims, _wide(op, w, wide), _wide(op, b, wide), eps, ANY)
    bare = aten.to.dtype(aten.layer_norm.default(widened, dims, None, None, eps, ANY), low)
    weighted = aten.mul.Tensor(bare, w)
    return op.either(
        biased=aten.add.Tensor(weighted, b),
        weighted=weighted,
        cast_last=aten.to.dtype(inner, low),
        plain=aten.layer_norm.default(x, dims, w, b, eps, ANY),
    )


def _refuse(m: Match, x: torch.Tensor, unsupported: Refusals) -> Refusals:
    """What RMSNorm and LayerNorm have in common, then what a kernel says of the last dimension."""
    if list(m.dims) != [x.shape[-1]]:
        yield not_last(m.dims, x.shape[-1])
        return
    if m.eps is None:
        yield Refusal("eps is left to the dtype; the kernel needs a number", "a number as eps")
    made, kept = m.root.meta["val"].dtype, torch.float64 if x.dtype == torch.float64 else torch.float32
    if made != x.dtype:
        yield Refusal(f"the result is {made}, the input is {x.dtype}", f"a result in {x.dtype}")
    if m.wide not in (None, kept):
        yield Refusal(f"the statistics are {m.wide}, those of the kernel {kept}", f"statistics in {kept}")
    yield from unsupported


def _refuse_rms(m: Match, x: torch.Tensor, unsupported: Refusals) -> Refusals:
    yield from _refuse(m, x, unsupported)
    if m.chose("offset") and not isinstance(m.offset, (int, float)):
        yield Refusal(
            "the weight is shifted by a tensor; the kernel takes a number",
            "a number, or a parameter that holds the sum",
        )


def _rest(m: Match) -> tuple[Any, ...]:
    """The arguments of RMSNorm after eps."""
    return float(m.offset) if m.chose("offset") else 0.0, m.chose("cast_first"), m.b


def _no_tensors(x: Any, r: Any) -> Refusals:
    if not isinstance(r, torch.Tensor) or not isinstance(x, torch.Tensor):
        yield "the addend is a number, not a residual tensor"


class AddRMSNorm(Norm):
    """rms_norm(x + r) becomes one kernel that also returns x + r."""

    def pattern(self, op, x, r, w, b, dims, eps, offset, wide, low):
        h = op.aten.add.Tensor(x, r)
        return _rms(op, h, w, b, dims, eps, offset, wide, low), h

    def refuse(self, m: Match) -> Refusals:
        x, r, w, b = m.val("x", "r", "w", "b")
        if why := list(_no_tensors(x, r)):
            yield from why
            return
        yield from _refuse_rms(m, x, add_rms_norm.unsupported(x, r, w, b=b))

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.add_rms_norm.default(m.x, m.r, m.w, m.eps, *_rest(m))


class AddLayerNorm(Norm):
    """layer_norm(x + r) becomes one kernel that also returns x + r."""

    def pattern(self, op, x, r, w, b, dims, eps, wide, low):
        h = op.aten.add.Tensor(x, r)
        return _layer(op, h, w, b, dims, eps, wide, low), h

    def refuse(self, m: Match) -> Refusals:
        x, r, w, b = m.val("x", "r", "w", "b")
        if why := list(_no_tensors(x, r)):
            yield from why
            return
        yield from _refuse(m, x, add_layer_norm.unsupported(x, r, w, b))

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.add_layer_norm.default(m.x, m.r, m.w, m.b, m.eps)


class RMSNorm(Norm):
    """Any spelling of RMSNorm becomes one kernel."""

    def pattern(self, op, x, w, b, dims, eps, offset, wide, low):
        return _rms(op, x, w, b, dims, eps, offset, wide, low)

    def refuse(self, m: Match) -> Refusals:
        x, w, b = m.val("x", "w", "b")
        yield from _refuse_rms(m, x, rms_norm.unsupported(x, w, b=b))

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.rms_norm.default(m.x, m.w, m.eps, *_rest(m))


class LayerNorm(Norm):
    """LayerNorm over the last dimension becomes one kernel."""

    def pattern(self, op, x, w, b, dims, eps, wide, low):
        return _layer(op, x, w, b, dims, eps, wide, low)

    def refuse(self, m: Match) -> Refusals:
        x, w, b = m.val("x", "w", "b")
        yield from _refuse(m, x, layer_norm.unsupported(x, w, b))

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.layer_norm.default(m.x, m.w, m.b, m.eps)


class LookAlike(Rule):
    """What only looks like a norm stays, and the report tells the difference."""

    def traced(self):
        return Finder(TARGETS, look_alike)


@register
class FuseNorm(Rules):
    """RMSNorm and LayerNorm, with a residual add before them, become one kernel each."""

    name = "fuse-norm"
    step = "raise"
    default = True
    produces = ("norms",)
    invalidates = ("canonical-norms",)
    rules = (AddRMSNorm, AddLayerNorm, RMSNorm, LayerNorm, LookAlike)
