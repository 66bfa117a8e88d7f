"""Attention and the views around it in many spellings; `tests.spellings` says how the tables are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings import B, D, E, Function, H, S, idiom

PROJECTIONS = {"q": (E, E), "k": (E, E), "v": (E, E)}
SCALE = D**-0.5
attention = idiom("attention", "linear reshape permute matmul mul softmax matmul", **PROJECTIONS)


def _heads(m: Any, x: Tensor) -> list[Tensor]:
    """q, k, v of shape [B, H, S, D]."""
    return [F.linear(x, w).view(*x.shape[:2], H, D).transpose(1, 2) for w in (m.q, m.k, m.v)]


def _flat_heads(m: Any, x: Tensor) -> list[Tensor]:
    """q, k, v of shape [B * H, S, D]."""
    return [t.reshape(-1, x.shape[1], D) for t in _heads(m, x)]


def _merge(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], E)


def _attend(weights: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """Attention whose weights are a function of q and k."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = _heads(m, x)
        return _merge(weights(q, k) @ v)

    return run


@attention.same.append
def _einsum_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (F.linear(x, w).view(*x.shape[:2], H, D) for w in (m.q, m.k, m.v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], E)


@attention.same.append
def _bmm_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = _flat_heads(m, x)
    y = torch.bmm(torch.softmax(torch.bmm(q * SCALE, k.transpose(1, 2)), -1), v)
    return _merge(y.view(x.shape[0], H, x.shape[1], D))


@attention.same.append
def _baddbmm_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = _flat_heads(m, x)
    nothing = torch.empty(q.shape[0], x.shape[1], x.shape[1])
    weights = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=SCALE).softmax(-1)
    return _merge(torch.bmm(weights, v).view(x.shape[0], H, x.shape[1], D))


attention.same += [
    _attend(lambda q, k: (q @ k.transpose(-1, -2) * SCALE).softmax(-1)),
    _attend(lambda q, k: (q @ k.transpose(2, 3) / math.sqrt(D)).softmax(dim=-1)),
    _attend(lambda q, k: ((q * SCALE) @ k.mT).softmax(-1)),
    _attend(lambda q, k: (q @ (k * SCALE).permute(0, 1, 3, 2)).softmax(-1)),
    _attend(lambda q, k: ((q / D**0.25) @ (k / D**0.25).transpose(-2, -1)).softmax(-1)),
    _attend(lambda q, k: ((q @ k.swapaxes(2, 3)) / torch.sqrt(torch.tensor(float(D)))).softmax(-1)),
    _attend(
        lambda q, k: F.dropout(
            F.softmax(q @ k.movedim(-1, -2) * SCALE, -1, dtype=torch.float32).to(q.dtype), 0.1, False
        )
    ),
    _attend(lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k).div(D**0.5).softmax(-1)),
    _attend(lambda q, k: torch.einsum("...qd,...kd->...qk", q * SCALE, k).softmax(-1)),
    _attend(lambda q, k: (s := torch.exp(q @ k.mT * SCALE)) / s.sum(-1, keepdim=True)),
]
attention.other += [
    _attend(lambda q, k: (q @ k.mT * SCALE).softmax(-2)),
    _attend(lambda q, k: (q @ k.mT * SCALE).softmax(1)),
    _attend(lambda q, k: (k @ q.mT * SCALE).softmax(-1)),  # q and k changed places
    _attend(lambda q, k: (q @ k.reshape(*k.shape[:2], D, -1) * SCALE).softmax(-1)),  # not a transpose
    _attend(lambda q, k: (q @ k.flip(1).mT * SCALE).softmax(-1)),
    _attend(lambda q, k: (q @ k.mT * D).softmax(-1)),
    _attend(lambda q, k: (q @ k.mT).softmax(-1)),
    _attend(lambda q, k: (q @ k.mT * SCALE).softmax(-1) * SCALE),
    _attend(lambda q, k: F.dropout((q @ k.mT * SCALE).softmax(-1), 0.5, True)),
    _attend(lambda q, k: (q @ k.mT * SCALE).sigmoid()),
]

causal = idiom("causal attention", "matmul mul where softmax matmul", **PROJECTIONS)


def _lower(x: Tensor) -> Tensor:
    n = x.shape[-2]
    return torch.ones(n, n, dtype=torch.bool).tril()


causal.same += [
    _attend(lambda q, k: (q @ k.mT * SCALE).masked_fill(~_lower(q), float("-inf")).softmax(-1)),
    _attend(lambda q, k: torch.where(_lower(q), q @ k.mT * SCALE, float("-inf")).softmax(-1)),
    _attend(lambda q, k: torch.where(_lower(q), q @ k.mT / D**0.5, torch.tensor(float("-inf"))).softmax(-1)),
    _attend(lambda q, k: ((q * SCALE) @ k.mT).masked_fill(_lower(q) == 0, -math.inf).softmax(-1)),
    _attend(
        lambda q, k: (
            ((q * SCALE) @ k.mT).masked_fill(torch.logical_not(_lower(q))[None, None], -math.inf).softmax(-1)
        )
    ),
    _attend(lambda q, k: (q @ k.mT).mul_(SCALE).masked_fill_(~_lower(q), -math.inf).softmax(-1)),
]
causal.other += [
    _attend(lambda q, k: (q @ k.mT * SCALE).masked_fill(_lower(q), float("-inf")).softmax(-2)),
    _attend(lambda q, k: (q @ k.mT * SCALE).masked_fill(~_lower(q).T, float("-inf")).softmax(-1)),
    _attend(lambda q, k: (q @ k.mT * SCALE).masked_fill(~_lower(q), -1.0).softmax(-1)),
    _attend(
        lambda q, k: (
            (q @ k.mT * SCALE)
            .masked_fill(~torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril(1), -math.inf)
            .softmax(-1)
        )
    ),
    _attend(lambda q, k: (q @ k.mT * SCALE).softmax(-1).masked_fill(~_lower(q), 0.0)),
]

biased = idiom("attention with a bias", "matmul mul add softmax matmul", (B, S, E), (S, S), **PROJECTIONS)


def _attend_biased(weights: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
    def run(m: Any, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = _heads(m, x)
        return _merge(weights(q, k, bias) @ v)

    return run


@biased.same.append
def _baddbmm_biased(m: Any, x: Tensor, bias: Tensor) -> Tensor:
    q, k, v = _flat_heads(m, x)
    y = torch.baddbmm(bias, q, k.mT, beta=1, alpha=SCALE).softmax(-1).bmm(v)
    return _merge(y.view(x.shape[0], H, x.shape[1], D))


@biased.same.append
def _opt_attention(m: Any, x: Tensor, bias: Tensor) -> Tensor:
    """As OPT and BART had it: the mask is added to scores that are viewed as 4-d and flattened again."""
    q, k, v = _flat_heads(m, x)
    n = x.shape[1]
    scores = torch.bmm(q * SCALE, k.transpose(1, 2)).view(x.shape[0], H, n, n) + bias[None, None]
    y = torch.bmm(F.softmax(scores.view(-1, n, n), dim=-1), v)
    return _merge(y.view(x.shape[0], H, n, D))


biased.same += [
    _attend_biased(lambda q, k, a: (q @ k.mT * SCALE + a).softmax(-1)),
    _attend_biased(lambda q, k, a: (a + q @ k.mT / D**0.5).softmax(-1)),
    _attend_biased(lambda q, k, a: torch.add(a, q @ k.mT, alpha=SCALE).softmax(-1)),
    _attend_biased(lambda q, k, a: (q @ k.mT * SCALE + a.expand(q.shape[0], H, -1, -1)).softmax(-1)),
]
biased.other += [
    _attend_biased(lambda q, k, a: ((q @ k.mT + a) * SCALE).softmax(-1)),
    _attend_biased(lambda q, k, a: (q @ k.mT * SCALE - a).softmax(-1)),
    _attend_biased(lambda q, k, a: (q @ k.mT * SCALE + a.t()).softmax(-1)),
    _attend_biased(lambda q, k, a: (q @ k.mT * SCALE * a).softmax(-1)),
]

grouped = idiom("grouped heads", "unsqueeze expand reshape matmul", (B, 2 * H, S, D), (B, H, S, D), k=(1,))
grouped.same += [
    lambda m, q, k: q @ k.repeat_interleave(2, dim=1).mT,
    lambda m, q, k: q @ torch.repeat_interleave(k, 2, 1).transpose(2, 3),
    lambda m, q, k: (
        q @ k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(*q.shape[:2], k.shape[2], k.shape[3]).mT
    ),
    lambda m, q, k: q @ k.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2).mT,
]
grouped.other += [
    lambda m, q, k: q @ k.repeat(1, 2, 1, 1).mT,  # heads in another order
    lambda m, q, k: q @ k[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2).mT,
]


def _slice(y: Tensor, i: int) -> Tensor:
    return y[..., i * E : (i + 1) * E]


packed = idiom("packed projections, heads split and merged", "linear split reshape permute", w=(3 * E, E))
packed.same += [
    lambda m, x: [t.view(*x.shape[:2], H, D).transpose(1, 2) for t in F.linear(x, m.w).split(E, -1)],
    lambda m, x: [t.unflatten(-1, (H, D)).movedim(2, 1) for t in F.linear(x, m.w).chunk(3, dim=2)],
    lambda m, x: [
        _slice(y, i).reshape(*x.shape[:2], H, D).permute(0, 2, 1, 3) for y in [x @ m.w.t()] for i in range(3)
    ],
]
packed.other += [
    lambda m, x: [t.view(*x.shape[:2], D, H).permute(0, 3, 1, 2) for t in F.linear(x, m.w).split(E, -1)],
    lambda m, x: [
        t.view(*x.shape[:2], H, D).transpose(1, 2) for t in reversed(F.linear(x, m.w).split(E, -1))
    ],
    lambda m, x: [t.reshape(x.shape[0], H, x.shape[1], D) for t in F.linear(x, m.w).split(E, -1)],
]

stacked = idiom("packed projections, stacked", "linear reshape permute unbind", w=(3 * E, E))
stacked.same += [
    lambda m, x: list(F.linear(x, m.w).view(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)),
    lambda m, x: [
        (y := F.linear(x, m.w).reshape(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4))[0],
        y[1],
        y[2],
    ],
    lambda m, x: [
        y[i] for y in [F.linear(x, m.w).unflatten(-1, (3, H, D)).movedim((2, 3), (0, 2))] for i in range(3)
    ],
]
stacked.other += [
    lambda m, x: F.linear(x, m.w).view(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)[1],
    lambda m, x: list(F.linear(x, m.w).view(*x.shape[:2], H, 3, D).permute(3, 0, 2, 1, 4).unbind(0)),
]

views = idiom("views", "mul permute reshape", (B, S, 6), w=(6,))
views.same += [
    lambda m, x: (x * m.w).transpose(0, 1).reshape(-1, 6),
    lambda m, x: (x * m.w).permute(1, 0, 2).contiguous().view(x.shape[0] * x.shape[1], 6),
    lambda m, x: (x * m.w).permute(2, 1, 0).permute(1, 2, 0).flatten(0, 1),
    lambda m, x: (x * m.w).swapdims(0, 1).unsqueeze(0).reshape(-1, 6),
    lambda m, x: (x * m.w).transpose(0, 1).clone().reshape(1, -1, 3, 2).flatten(2).squeeze(0),
    lambda m, x: torch.einsum("bse->sbe", x * m.w)[..., :].reshape(-1, 2, 3).reshape(-1, x.shape[2]),
]
views.other += [
    lambda m, x: (x * m.w).reshape(-1, 6),
    lambda m, x: (x * m.w).transpose(0, 1).reshape(-1, 3),
    lambda m, x: (x * m.w).transpose(1, 2).reshape(-1, 6),
]

rotary = idiom("rotary", "split neg cat mul mul add", (B, H, S, 8), (S, 8), (S, 8))
rotary.same += [
    lambda m, x, c, s: x * c + torch.cat((-x[..., 4:], x[..., :4]), -1) * s,
    lambda m, x, c, s: torch.cat([-(p := x.chunk(2, -1))[1], p[0]], dim=3) * s + x * c,
    lambda m, x, c, s: (
        c[None, None] * x + s.unsqueeze(0) * torch.concat((x.split(4, -1)[1].neg(), x.split(4, -1)[0]), -1)
    ),
]
rotary.other += [
    lambda m, x, c, s: x * c + torch.cat((x[..., 4:], -x[..., :4]), -1) * s,
    lambda m, x, c, s: x * s + torch.cat((-x[..., 4:], x[..., :4]), -1) * c,
    lambda m, x, c, s: x * c + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * s,
]

# -- rows and matrices -----------------------------------------------------------------------------

rows = idiom("rows flattened for a while", "permute reshape linear relu", (B, S, 4, 3), w=(E, 12), b=(E,))
rows.same += [
    lambda m, x: F.linear(x.transpose(1, 2).reshape(x.shape[0], -1, 12), m.w, m.b).relu(),
    lambda m, x: F.linear(x.transpose(1, 2).reshape(-1, 12), m.w, m.b).relu().view(x.shape[0], x.shape[1], E),
    lambda m, x: F.relu_(F.linear(x.transpose(1, 2).reshape(-1, 12), m.w, m.b).unflatten(0, x.shape[:2])),
]
rows.other += [
    lambda m, x: F.linear(x.reshape(x.shape[0], -1, 12), m.w, m.b).relu(),
    lambda m, x: F.linear(x.transpose(1, 2).reshape(-1, 12), m.w, m.b).relu().view(x.shape[1], x.shape[0], E),
]

streams = idiom("a flattened residual stream", "linear add", w=(E, E))
streams.same += [
    lambda m, x: F.linear(x, m.w) + x.sin(),
    lambda m, x: (F.linear(x.view(-1, E), m.w) + x.sin().view(-1, E)).view(x.shape),
    lambda m, x: (F.linear(x, m.w).flatten(0, 1) + x.flatten(0, 1).sin()).unflatten(0, x.shape[:2]),
]
streams.other += [lambda m, x: F.linear(x, m.w) - x.sin(), lambda m, x: F.linear(x, m.w.t()) + x.sin()]

scores = idiom("a product of computed matrices", "permute matmul", (S, 4), (7, 4))
scores.same += [
    lambda m, x, y: x.sin() @ y.t(),
    lambda m, x, y: F.linear(x.sin(), y),
    lambda m, x, y: torch.einsum("id,jd->ij", x.sin(), y),
    lambda m, x, y: torch.mm(x.sin(), y.T),
]
scores.other += [lambda m, x, y: y @ x.sin().t(), lambda m, x, y: x.sin() @ y.flip(0).t()]
