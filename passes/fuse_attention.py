"""Run attention as one flash kernel, forward and backward.

    p = softmax(scale * q @ k^T, -1)
    out = p @ v                            =>   out = fxaccel.attention(q, k, v, [], "", "", scale)

Fires on   `scaled_dot_product_attention` with any mask and grouped heads, and the written-out core of two
           products around a softmax, scaled or not, with the softmax in float32 or not.
Saves      the scores: 2 * B * H * S * T elements written and read, forward and again backward.
Exact      agrees with the original within its own rounding (softmax in fp32).
Source     Dao 2023, "FlashAttention-2", arXiv:2307.08691.
"""

import math
from typing import Any

import torch

from fxaccel.kernels import attention as kernel
from fxaccel.rule import Match, Ops, Refusals, Rule, Rules, register


class ScaledDotProduct(Rule):
    """scaled_dot_product_attention becomes the flash kernel."""

    def pattern(self, op, q, k, v, bias, p, causal, scale, grouped):
        return op.aten.scaled_dot_product_attention.default(
            q, k, v, bias, p, causal, scale=scale, enable_gqa=grouped
        )

    def refuse(self, m: Match) -> Refusals:
        q, k, v, bias = m.val("q", "k", "v", "bias")
        if m.p:
            yield f"it drops attention weights with probability {m.p}; the kernel has no dropout"
        if m.scale is None and not isinstance(q.shape[-1], int):
            yield "the scale is left to a head size that is not a number"
        terms = _terms(bias, bias, m.causal) if q.ndim == 4 else ()
        yield from kernel.unsupported(q, k, v, *terms)

    def rewrite(self, op: Ops, m: Match):
        scale = m.scale if m.scale is not None else 1 / math.sqrt(m.val("q").shape[-1])
        tables, mask, bias = _terms(m.bias, m.val("bias"), m.causal)
        return op.fxaccel.attention.default(m.q, m.k, m.v, tables, mask, bias, scale)


def _terms(given, bias, causal: bool) -> tuple[list[Any], str, str]:
    """Tables, mask and bias of the kernel for an SDPA mask, `given`, of the type of `bias`."""
    mask = "k <= q" if causal else ""
    if bias is None:
        return [], mask, ""
    names = ("b", "h", "q", "k")[4 - bias.ndim :]
    indices = ["0" if kernel.known(n) == 1 else name for n, name in zip(bias.shape, names, strict=True)]
    read = f"t0[{', '.join(indices)}]"
    if bias.dtype == torch.bool:
        return [given], f"({mask}) & {read}" if causal else read, ""
    return [given], mask, read


class WrittenOut(Rule):
    """Two products around a softmax over the keys become the flash kernel."""

    def pattern(self, op, q, kt, v, scale, wide, low):
        aten = op.aten
        product = aten.matmul.default(q, kt)
        scores = op.either(scaled=aten.mul.Tensor(product, scale), unscaled=product)
        weights = op.either(
            cast=aten.to.dtype(aten.softmax.int(aten.to.dtype(scores, wide), 3), low),
            wide=aten.to.dtype(aten.softmax.int(scores, 3, wide), low),
            plain=aten.softmax.int(scores, 3),
        )
        return aten.matmul.default(weights, v)

    def refuse(self, m: Match) -> Refusals:
        q, kt, v = m.val("q", "kt", "v")
        if m.chose("scaled") and not isinstance(m.scale, (int, float)):
            yield "the scores are scaled by a tensor; the kernel takes a number"
        if m.low is not None and m.low != q.dtype:
            yield f"the weights are cast to {m.low}, the queries are {q.dtype}"
        if not q.ndim == kt.ndim == v.ndim == 4:
            yield f"q, k, v have {q.ndim}, {kt.ndim}, {v.ndim} dimensions; the kernel takes 4 each"
            return
        yield from kernel.unsupported(q, kt.mT, v)

    def rewrite(self, op: Ops, m: Match):
        k = op.aten.permute.default(m.kt, [0, 1, 3, 2])
        scale = float(m.scale) if m.chose("scaled") else 1.0
        return op.fxaccel.attention.default(m.q, k, m.v, [], "", "", scale)


@register
class FuseAttention(Rules):
    """Attention, called as one operator or written out, becomes one flash kernel."""

    name = "fuse-attention"
    step = "raise"
    default = True
    produces = ("attention",)
    rules = (ScaledDotProduct, WrittenOut)
