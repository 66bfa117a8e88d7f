"""Write attention with dropout on the CPU as the calls that it is made of, each of which can be kept or not.

    out = scaled_dot_product_attention(q, k, v, mask, p, causal)

    => s = sqrt(scale);  a = safe_softmax((s * q) @ (s * k^T) + where(mask, 0, -inf))
       out = dropout(a, p) @ v

Fires on   calls with dropout in training on the CPU, where torch itself computes them so, and saves for each
           score the probability, the mask and their product: three numbers.
Saves      nothing by itself. `checkpoint` takes a call as one: it keeps all three, or makes both products
           again. Of the parts it can keep the probability alone, and make the others without a product.
Exact      the same operators on the same numbers, and the same random numbers.
Source     torch, aten/src/ATen/native/transformers/attention.cpp, `_scaled_dot_product_attention_math`.
"""

import math
from typing import Any

import torch

from fxaccel.rule import Match, Ops, Refusal, Refusals, Rule, register


@register
class SplitAttention(Rule):
    """Attention with dropout on the CPU becomes its products, softmax and dropout."""

    name = "split-attention"
    step = "lower"
    serves = ("training",)
    redraws = True

    def pattern(self, op: Ops, q, k, v, mask, p, causal, scale, grouped):
        return op.aten.scaled_dot_product_attention.default(
            q, k, v, mask, p, causal, scale=scale, enable_gqa=grouped
        )

    def refuse(self, m: Match) -> Refusals:
        q = m.val("q")
        if not m.p:
            yield "without dropout it is one kernel, which saves no probabilities"
        if q.device.type != "cpu":
            yield f"on {q.device.type} its kernels save no probabilities"
        if m.grouped:
            yield Refusal("grouped heads are repeated inside of it", "keys and values repeated before it")
        if q.dtype not in (torch.float32, torch.float64):
            yield Refusal(f"inside of it {q.dtype} is computed in float32", "q, k and v in torch.float32")
        if m.scale is None and not isinstance(q.shape[-1], int):
            yield Refusal("the scale is left to a head size that is not a number", "a number as scale")
        elif m.scale is not None and m.scale <= 0:
            yield f"the scale is {m.scale}, whose root it takes"

    def rewrite(self, op: Ops, m: Match):
        aten: Any = op.aten
        root = math.sqrt(m.val("q").shape[-1] ** -0.5 if m.scale is None else m.scale)
        keys = aten.mul.Tensor(aten.transpose.int(m.k, -2, -1), root)
        scores = aten.matmul.default(aten.mul.Tensor(m.q, root), keys)
        mask = m.mask
        if m.causal:
            sizes = [self.size(op, m, "q"), self.size(op, m, "k")]
            mask = aten.tril.default(aten.ones.default(sizes, dtype=torch.bool, device=m.val("q").device))
        if mask is not None:
            if m.causal or m.val("mask").dtype is torch.bool:
                mask = aten.where.Scalar(mask, 0.0, -math.inf)
            scores = aten.add.Tensor(scores, mask)
        weights = aten.dropout.default(aten._safe_softmax.default(scores, -1), m.p, True)
        return aten.matmul.default(weights, m.v)

    def size(self, op: Ops, m: Match, name: str) -> Any:
        """How many queries or keys there are."""
        found = m.val(name).shape[-2]
        return found if isinstance(found, int) else op.aten.sym_size.int(getattr(m, name), -2)
