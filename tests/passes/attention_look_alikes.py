"""Code that looks like attention and is not, or not one the kernel takes, each with the reason.

An entry is (function of the module, q, k, v; words of the reason). "" as the reason: it is attention after
all, of other operands than a careless pattern would take, and the rewrite must keep their meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

D = 8
SCALE = D**-0.5
LOOK_ALIKES: dict[str, tuple[Callable[..., Any], str]] = {}


def look_alike(why: str) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        LOOK_ALIKES[function.__name__.strip("_")] = (function, why)
        return function

    return add


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


# -- the softmax -----------------------------------------------------------------------------------------


@look_alike("the softmax is over dimension 2 of 4, not over the keys")
def softmax_over_queries(m, q, k, v):  # pytorch #196468
    return _scores(q, k).softmax(-2) @ v


@look_alike("the softmax is over dimension 1 of 4, not over the keys")
def softmax_over_heads(m, q, k, v):
    return _scores(q, k).softmax(1) @ v


@look_alike("the softmax is over dimension 0 of 4, not over the keys")
def softmax_over_batch(m, q, k, v):
    return _scores(q, k).softmax(0) @ v


@look_alike("")  # the kernel without the scale, and the scale after it
def scale_after_softmax(m, q, k, v):
    return ((q @ k.mT).softmax(-1) * SCALE) @ v


@look_alike("aten.where.ScalarOther stands between the softmax and the product with v")
def mask_after_softmax(m, q, k, v):
    weights = _scores(q, k).softmax(-1)
    return weights.masked_fill(~torch.ones(weights.shape[-2:], dtype=torch.bool).tril(), 0.0) @ v


@look_alike("aten.mul.Tensor stands between the softmax and the product with v")
def gate_on_weights(m, q, k, v):
    return (_scores(q, k).softmax(-1) * m.gate) @ v


@look_alike("aten.add.Tensor stands between the softmax and the product with v")
def residual_on_weights(m, q, k, v):
    return (_scores(q, k).softmax(-1) + m.gate) @ v


@look_alike("aten.div.Tensor stands between the softmax and the product with v")
def normalised_again(m, q, k, v):
    weights = _scores(q, k).softmax(-1)
    return (weights / weights.sum(-2, keepdim=True)) @ v


@look_alike("aten.sigmoid stands between")
def sigmoid_of_scores_then_softmax(m, q, k, v):
    return _scores(q, k).sigmoid().softmax(-1) @ v


@look_alike("no softmax")
def sigmoid_attention(m, q, k, v):
    return _scores(q, k).sigmoid() @ v


@look_alike("no softmax")
def linear_attention(m, q, k, v):
    return _scores(q, k) @ v


@look_alike("no softmax")
def relu_attention(m, q, k, v):
    return _scores(q, k).relu() @ v


@look_alike("no softmax")
def log_softmax(m, q, k, v):
    return _scores(q, k).log_softmax(-1) @ v


@look_alike("aten.softmax.int stands between")
def softmax_twice(m, q, k, v):
    return _scores(q, k).softmax(-1).softmax(-1) @ v


@look_alike("the weights are sliced before the product with v")
def some_weights(m, q, k, v):
    return _scores(q, k).softmax(-1)[..., 1:] @ v[..., 1:, :]


@look_alike("the weights are sliced before the product with v")
def first_queries(m, q, k, v):
    return _scores(q, k).softmax(-1)[:, :, :3] @ v


# -- what else reads the weights -------------------------------------------------------------------------


@look_alike("is also read by the output")
def weights_returned(m, q, k, v):
    weights = _scores(q, k).softmax(-1)
    return weights @ v, weights


@look_alike("is also read by aten.sum")
def weights_reused(m, q, k, v):
    weights = _scores(q, k).softmax(-1)
    return weights @ v + weights.sum((-1, -2), keepdim=True)


@look_alike("is also read by the output")
def scores_returned(m, q, k, v):
    scores = _scores(q, k)
    return scores.softmax(-1) @ v, scores


@look_alike("is also read by")
def weights_used_twice(m, q, k, v):
    weights = _scores(q, k).softmax(-1)
    return weights @ (weights @ v)


@look_alike("is also read by the output")
def product_returned(m, q, k, v):
    product = q @ k.mT
    return (product * SCALE).softmax(-1) @ v, product


# -- the scores ------------------------------------------------------------------------------------------


@look_alike("that differs from key to key")
def scores_times_a_matrix(m, q, k, v):
    return (_scores(q, k) * m.gate).softmax(-1) @ v


@look_alike("masked scores become -1, which a score that is seen may fall below")
def small_fill(m, q, k, v):
    scores = _scores(q, k)
    return torch.where(torch.ones(scores.shape[-2:]).tril() > 0, scores, -1.0).softmax(-1) @ v


@look_alike("masked scores become -10000, which a score that is seen may fall below")
def old_fill(m, q, k, v):
    scores = _scores(q, k)
    return torch.where(torch.ones(scores.shape[-2:]).tril() > 0, scores, -1e4).softmax(-1) @ v


@look_alike("masked scores become 50, which a score that is seen may fall below")
def filled_with_much(m, q, k, v):
    scores = _scores(q, k)
    return torch.where(torch.ones(scores.shape[-2:]).tril() > 0, scores, 50.0).softmax(-1) @ v


@look_alike("masked scores are replaced by a tensor")
def filled_with_a_tensor(m, q, k, v):
    scores = _scores(q, k)
    return torch.where(torch.ones(scores.shape[-2:]).tril() > 0, scores, m.gate).softmax(-1) @ v


@look_alike("a mask lies before the softcap")
def mask_before_softcap(m, q, k, v):
    scores = _scores(q, k)
    scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -1e9)
    return (torch.tanh(scores / 5) * 5).softmax(-1) @ v


@look_alike("a bias is added before the softcap")
def bias_before_softcap(m, q, k, v):
    return (torch.tanh((_scores(q, k) + m.gate) / 5) * 5).softmax(-1) @ v


@look_alike("the scores are capped twice")
def capped_twice(m, q, k, v):
    return (torch.tanh(torch.tanh(_scores(q, k)) * 3) * 5).softmax(-1) @ v


@look_alike("a bias is multiplied by a tensor")
def bias_scaled_by_a_tensor(m, q, k, v):
    return ((_scores(q, k) + m.gate) * m.temperature).softmax(-1) @ v


@look_alike("aten.pow.Tensor_Scalar stands between")
def squared_scores(m, q, k, v):
    return (_scores(q, k) ** 2).softmax(-1) @ v


@look_alike("aten.flip stands between")
def flipped_scores(m, q, k, v):
    return _scores(q, k).flip(-1).softmax(-1) @ v


@look_alike("aten.permute stands between")
def transposed_scores(m, q, k, v):
    return _scores(q, k).transpose(-1, -2).softmax(-1) @ v[..., : q.shape[-2], :]


@look_alike("aten.roll stands between")
def shifted_scores(m, q, k, v):
    return _scores(q, k).roll(1, -1).softmax(-1) @ v


@look_alike("the dimensions before the heads differ")
def keys_of_all_windows(m, q, k, v):
    q, k, v = q.unflatten(1, (2, 2)), k.unflatten(1, (2, 2))[:1], v.unflatten(1, (2, 2))[:1]
    return (_scores(q, k).softmax(-1) @ v).flatten(1, 2)


@look_alike("stands between the softmax and the product with v")
def talking_heads(m, q, k, v):
    return (_scores(q, k).softmax(-1).permute(0, 2, 3, 1) @ m.gate[:4, :4]).permute(0, 3, 1, 2) @ v


@look_alike("the weights are dropped twice")
def dropped_twice(m, q, k, v):
    return F.dropout(F.dropout(_scores(q, k).softmax(-1), 0.1, True), 0.2, True) @ v


@look_alike("is not within 1 .. 256")
def wide_heads(m, q, k, v):
    q, k = (x.repeat(1, 1, 1, 40) for x in (q, k))
    return _scores(q, k).softmax(-1) @ v


@look_alike("is written in place")
def bias_written_later(m, q, k, v):
    bias = m.gate + 0.0
    scores = _scores(q, k) + bias
    bias[:2].mul_(2.0)
    return scores.softmax(-1) @ v + bias.sum()


@look_alike("inside a no_grad, autocast or checkpoint region")
def half_without_gradient(m, q, k, v):
    with torch.no_grad():
        weights = _scores(q, k).softmax(-1)
    return weights @ v


# -- attention after all ---------------------------------------------------------------------------------


@look_alike("")
def permuted_keys(m, q, k, v):  # pytorch #195320
    """The keys' transpose is taken over other dimensions: [B, S, D, H] read as [B, H', D', T']."""
    square = q[:, :4, :4, :4], k[:, :4, :4, :4], v[:, :4, :4]
    return (square[0] @ square[1].permute(0, 2, 3, 1) / 4).softmax(-1) @ square[2]


@look_alike("")
def key_not_transposed(m, q, k, v):
    square = q[:, :, :8], k[:, :, :8], v[:, :, :8]
    return (square[0] @ square[1] * SCALE).softmax(-1) @ square[2]


@look_alike("")
def heads_repeated_in_another_order(m, q, k, v):
    k, v = (x[:, :2].repeat(1, 2, 1, 1) for x in (k, v))
    return _scores(q, k).softmax(-1) @ v


@look_alike("")
def groups_of_keys_alone(m, q, k, v):
    return _scores(q, k[:, :2].repeat_interleave(2, 1)).softmax(-1) @ v


@look_alike("")
def transposed_value(m, q, k, v):
    return _scores(q, k[:, :, :8]).softmax(-1) @ v[:, :, :8].mT


@look_alike("")
def flipped_value(m, q, k, v):
    return _scores(q, k).softmax(-1) @ v.flip(2)


@look_alike("")
def upper_triangle(m, q, k, v):
    scores = _scores(q, k)
    return (
        scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).tril(-1), -math.inf).softmax(-1)
        @ v
    )


@look_alike("")
def causal_but_for_one(m, q, k, v):
    scores = _scores(q, k)
    return (
        scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(1), -math.inf).softmax(-1)
        @ v
    )


@look_alike("")
def transposed_mask(m, q, k, v):
    scores = _scores(q, k)
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril().T
    return scores.masked_fill(~keep, -math.inf).softmax(-1) @ v


@look_alike("")
def negative_scale(m, q, k, v):
    return (_scores(q, k) * -1.0).softmax(-1) @ v
