"""Attention written in many ways: a program is a layout, a core and a mask, and what it must be raised to.

`PROGRAMS` lists those that are attention, `LOOK_ALIKES` (in attention_look_alikes) those that are not. B, S,
E, H and D name sizes as everywhere; T is the length of the memory in cross-attention, R the repeats of heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, S, T, H, D, R = 2, 9, 13, 4, 8, 2
E = H * D
NEG = torch.finfo(torch.float32).min

# -- layouts: x -> q, k, v of [B, H, S, D] (or [B, G, S, D]) -------------------------------------------


def _heads(x: Tensor, n: int = H) -> Tensor:
    return x.view(x.shape[0], x.shape[1], n, D).transpose(1, 2)


def separate(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(_heads(w(x)) for w in (m.q, m.k, m.v))


def chunked(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(_heads(t) for t in m.packed(x).chunk(3, dim=-1))


def split(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(_heads(t) for t in m.packed(x).split(E, dim=2))


def sliced(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = m.packed(x)
    return tuple(_heads(y[..., i * E : (i + 1) * E]) for i in range(3))


def unbound(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return m.packed(x).reshape(x.shape[0], x.shape[1], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)


def rows_first(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    """BSHD until the products."""
    return tuple(w(x).unflatten(-1, (H, D)).permute(0, 2, 1, 3) for w in (m.q, m.k, m.v))


def crossing(m: Any, x: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
    return _heads(m.q(x)), _heads(m.k(memory)), _heads(m.v(memory))


def interleaved(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    k, v = (_heads(w(x), H // R).repeat_interleave(R, 1) for w in (m.few_k, m.few_v))
    return _heads(m.q(x)), k, v


def expanded(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    def repeat(y: Tensor) -> Tensor:
        b, g, s, d = y.shape
        return y[:, :, None].expand(b, g, R, s, d).reshape(b, g * R, s, d)

    k, v = (repeat(_heads(w(x), H // R)) for w in (m.few_k, m.few_v))
    return _heads(m.q(x)), k, v


def one_key_head(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return _heads(m.q(x)), m.one_k(x)[:, None], m.one_v(x)[:, None]


def three_dimensional(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return m.q(x) / 4, m.k(x), m.v(x)  # heads of size E


# -- cores: q, k, v and a change of the scores -> [B, H, S, D] -----------------------------------------

Change = Callable[[Tensor], Tensor]


def plain(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    return change(q @ k.transpose(-2, -1) / math.sqrt(D)).softmax(-1) @ v


def query_scaled(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    return F.softmax(change((q * D**-0.5) @ k.mT), dim=-1) @ v


def both_scaled(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    return torch.matmul(change(torch.matmul(q * D**-0.25, (k * D**-0.25).permute(0, 1, 3, 2))).softmax(3), v)


def einsum(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    weights = change(torch.einsum("bhqd,bhkd->bhqk", q, k) * D**-0.5).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def bmm(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, -1, d) for t in (q, k, v))
    scores = change(torch.bmm(q * D**-0.5, k.transpose(1, 2)).view(b, h, s, -1)).view(b * h, s, -1)
    return torch.bmm(scores.softmax(-1), v).view(b, h, s, d)


def baddbmm(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    b, h, s, d = q.shape
    q, k, v = (t.reshape(b * h, -1, d) for t in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=D**-0.5)
    return (change(scores.view(b, h, s, -1)).softmax(-1).view(b * h, s, -1) @ v).view(b, h, s, d)


def wide_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    weights = F.softmax(change(q @ k.mT * D**-0.5), dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


def cast_around(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    return change((q @ k.mT).float() * D**-0.5).softmax(-1).type_as(q) @ v


def wide_products(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    return change(q.float() @ k.float().mT * D**-0.5).softmax(-1).to(v.dtype) @ v


def mask_then_scale(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    return (change(q @ k.mT) * D**-0.5).softmax(-1) @ v


def capped(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    return change(torch.tanh(q @ k.mT * D**-0.5 / 5.0) * 5.0).softmax(-1) @ v


def sunk(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    scores = change(q @ k.mT * D**-0.5)
    sinks = m.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1] @ v


def learned_scale(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    return change(q @ k.mT * m.head_scale).softmax(-1) @ v


def dropped(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    return F.dropout(change(q @ k.mT * D**-0.5).softmax(-1), 0.2, m.training) @ v


# -- masks: a change of the scores ---------------------------------------------------------------------


def _windows(x: Tensor) -> Tensor:
    return torch.stack([x, x.flip(2)], 1)


def windowed(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    """Windows in a dimension of their own."""
    q, k, v = map(_windows, (q, k, v))
    return (change(q @ k.mT / math.sqrt(D)).softmax(-1) @ v).sum(1)


def windowed_sdpa(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    q, k, v = map(_windows, (q, k, v))
    mask = change(torch.zeros(q.shape[-2], q.shape[-2], dtype=q.dtype, device=q.device))
    return F.scaled_dot_product_attention(q, k, v, mask).sum(1)


def shifted(m: Any, q: Tensor, k: Tensor, v: Tensor, change: Change) -> Tensor:
    """As Swin: windows are part of the batch, but where the mask is put on."""
    q, k, v = (_windows(x).flatten(0, 1) for x in (q, k, v))
    s = q @ k.mT / math.sqrt(D)
    s = change(s.unflatten(0, (-1, 2))).flatten(0, 1)
    return (s.softmax(-1) @ v).unflatten(0, (-1, 2)).sum(1)


def _positions(s: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (torch.arange(n, device=s.device) for n in s.shape[-2:])
    return q[:, None], k[None, :]


def none(m: Any, s: Tensor) -> Tensor:
    return s


def tril_inf(m: Any, s: Tensor) -> Tensor:
    return s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), -math.inf)


def triu_add(m: Any, s: Tensor) -> Tensor:
    return s + torch.full(s.shape[-2:], -math.inf, dtype=s.dtype).triu(1)


def where_finfo(m: Any, s: Tensor) -> Tensor:
    q, k = _positions(s)
    return torch.where(q >= k, s, torch.finfo(s.dtype).min)


def added_finfo(m: Any, s: Tensor) -> Tensor:
    q, k = _positions(s)
    return s + torch.where(k <= q, torch.zeros((), dtype=s.dtype), torch.finfo(s.dtype).min)[None, None]


def one_minus_tril(m: Any, s: Tensor) -> Tensor:
    allowed = torch.tril(torch.ones(s.shape[-2:], dtype=s.dtype))
    return s + (1.0 - allowed) * -1e9


def tril_zero(m: Any, s: Tensor) -> Tensor:
    return s.masked_fill(torch.ones(s.shape[-2:]).tril() == 0, -1e9)


def bottom_right(m: Any, s: Tensor) -> Tensor:
    q, k = _positions(s)
    return s.masked_fill(k > q + (s.shape[-1] - s.shape[-2]), -math.inf)


def window(m: Any, s: Tensor) -> Tensor:
    q, k = _positions(s)
    return s.masked_fill((k > q) | (q - k >= 4), -math.inf)


def two_sided(m: Any, s: Tensor) -> Tensor:
    q, k = _positions(s)
    return torch.where((q - k).abs() <= 3, s, -math.inf)


def prefix(m: Any, s: Tensor) -> Tensor:
    q, k = _positions(s)
    return s.masked_fill(~((k <= q) | (k < 3)), -math.inf)


def chunks(m: Any, s: Tensor) -> Tensor:
    q, k = _positions(s)
    return s.masked_fill((q // 4 != k // 4) | (k > q), -math.inf)


def padding(m: Any, s: Tensor, keep: Tensor) -> Tensor:
    return s + (1.0 - keep[:, None, None, :].to(s.dtype)) * torch.finfo(s.dtype).min


def bool_padding(m: Any, s: Tensor, keep: Tensor) -> Tensor:
    return s.masked_fill(~keep.bool()[:, None, None, :], torch.finfo(s.dtype).min)


def causal_padding(m: Any, s: Tensor, keep: Tensor) -> Tensor:
    q, k = _positions(s)
    allowed = (k <= q)[None, None] & keep.bool()[:, None, None, :]
    return s + torch.where(allowed, torch.tensor(0.0, dtype=s.dtype), torch.finfo(s.dtype).min)


def documents(m: Any, s: Tensor, ids: Tensor) -> Tensor:
    q, k = _positions(s)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return s.masked_fill(~(same & (k <= q)), -math.inf)


def packed_positions(m: Any, s: Tensor, position: Tensor) -> Tensor:
    """As transformers finds packed sequences: where the positions do not go up by one."""
    first = position[:, :1] - 1
    ids = (torch.diff(position, prepend=first, dim=-1) != 1).cumsum(-1)
    return documents(m, s, ids)


def own_positions(m: Any, s: Tensor) -> Tensor:
    """Positions that go up by one: one sequence."""
    return packed_positions(m, s, torch.arange(s.shape[-1])[None])


def later_positions(m: Any, s: Tensor) -> Tensor:
    """From 7 on; what goes before the first is put there afterwards."""
    position = torch.arange(s.shape[-1])[None] + 7
    changes = (torch.diff(position, dim=-1) != 1).cumsum(-1)
    return documents(m, s, torch.cat([torch.zeros(1, 1, dtype=torch.int64), changes], -1))


def summed_positions(m: Any, s: Tensor) -> Tensor:
    """As they are counted from a mask of ones."""
    position = torch.ones(1, s.shape[-1], dtype=torch.int64).cumsum(-1) - 1
    return s.masked_fill(position[:, None, :, None] < position[:, None, None, :], -math.inf)


def restarted_positions(m: Any, s: Tensor) -> Tensor:
    """Positions that start again after every third."""
    return packed_positions(m, s, torch.arange(s.shape[-1])[None] % 3)


def counted_positions(m: Any, s: Tensor) -> Tensor:
    """Sums of positions, which are no number."""
    ids = torch.arange(s.shape[-1])[None].cumsum(-1)
    q, k = _positions(s)
    return s.masked_fill(~((ids[:, None, :, None] >= ids[:, None, None, :]) & (k <= q)), -math.inf)


def alibi(m: Any, s: Tensor) -> Tensor:
    q, k = _positions(s)
    return s + m.slopes[:, None, None].to(s.dtype) * (k - q)


def causal_alibi(m: Any, s: Tensor) -> Tensor:
    return tril_inf(m, alibi(m, s))


def bucketed(m: Any, s: Tensor) -> Tensor:
    """T5's relative bias."""
    q, k = _positions(s)
    away = (k - q).abs()
    far = 4 + (torch.log(away.float().clamp(min=1) / 4) / math.log(4) * 4).long()
    bucket = torch.where(away < 4, away, far.clamp(max=7)) + 8 * (k > q)
    return s + m.buckets(bucket).permute(2, 0, 1)[None].to(s.dtype)


def clipped(m: Any, s: Tensor) -> Tensor:
    """A relative bias clipped at a distance."""
    q, k = _positions(s)
    return s + m.distances[:, (k - q).clamp(-5, 5) + 5].to(s.dtype)


def bucketed_padding(m: Any, s: Tensor, keep: Tensor) -> Tensor:
    return causal_padding(m, bucketed(m, s), keep)


def tensor_bias(m: Any, s: Tensor, bias: Tensor) -> Tensor:
    return s + bias.to(s.dtype)


def mask_argument(m: Any, s: Tensor, mask: Tensor) -> Tensor:
    return s.masked_fill(~mask, -math.inf)


def added_argument(m: Any, s: Tensor, mask: Tensor) -> Tensor:
    return s + torch.where(mask, torch.zeros((), dtype=s.dtype), -math.inf)


def by_window(m: Any, s: Tensor) -> Tensor:
    """The second of two windows sees one key more; scores are [B, 2, H, S, S]."""
    q, k = _positions(s)
    window = torch.arange(2, device=s.device)[:, None, None, None]
    return s.masked_fill(k > q + window, -math.inf)


# -- programs ------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Projections, one attention, and a projection after it."""

    def __init__(self, layout: Any, core: Any, mask: Any, extra: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layout, self.core, self.mask, self.extra = layout, core, mask, extra
        self.q, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(4))
        self.packed = nn.Linear(E, 3 * E)
        self.few_k, self.few_v = (nn.Linear(E, E // R) for _ in range(2))
        self.one_k, self.one_v = (nn.Linear(E, D) for _ in range(2))
        self.sinks = nn.Parameter(torch.empty(H))
        self.head_scale = nn.Parameter(torch.empty(H, 1, 1))
        self.buckets = nn.Embedding(16, H)
        self.distances = nn.Parameter(torch.empty(H, 11))
        for p in self.parameters():
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.dim() < 2 else 0.3))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, H + 1))
        used = {"q", "k", "v", "out"}
        self.used = used

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        mine, rest = given[: self.extra], given[self.extra :]
        q, k, v = self.layout(self, x, *mine)
        y = self.core(self, q, k, v, lambda s: self.mask(self, s, *rest))
        y = y if y.dim() == 3 else y.transpose(1, 2).flatten(2)
        return self.out(y)


@dataclass(frozen=True)
class Program:
    """One way to write attention, and the words of the report for what it is."""

    layout: Any
    core: Any
    mask: Any
    kind: str
    inputs: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    train: bool = True
    empty: str = "zero"
    tags: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        words = [f.__name__ for f in (self.layout, self.core, self.mask)]
        words += [str(self.dtype)[6:]] * (self.dtype != torch.float32) + ["eval"] * (not self.train)
        return "-".join(words)

    def model(self) -> Model:
        model = Model(self.layout, self.core, self.mask, int(self.layout is crossing))
        return model.to(self.dtype).train(self.train)

    def arguments(self, b: int = B, s: int = S, seed: int = 0) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        made: dict[str, Tensor] = {
            "memory": torch.randn(b, T, E, generator=g).to(self.dtype),
            "keep": _padded(torch.rand(b, s, generator=g) > 0.3),
            "ids": torch.randint(0, 2, (b, s), generator=g).cumsum(-1),
            "position": torch.cat([torch.arange(s // 2), torch.arange(s - s // 2)])
            .expand(b, -1)
            .contiguous(),
            "bias": torch.randn(1, H, s, s, generator=g).to(self.dtype),
            "mask": torch.rand(b, 1, s, s, generator=g) > 0.3,
        }
        x = torch.randn(b, s, E, generator=g).to(self.dtype)
        return x, *(made[n] for n in self.inputs)


def _padded(keep: Tensor) -> Tensor:
    """Rows that begin with a key, but for the last, whose first two queries see none under a causal mask."""
    keep[:, 0], keep[-1, :2] = True, False
    return keep.long()


CAUSAL = (tril_inf, triu_add, where_finfo, added_finfo, one_minus_tril, tril_zero)
LAYOUTS = (separate, chunked, split, sliced, unbound, rows_first, interleaved, expanded, one_key_head)
GROUPED = {
    interleaved: ", 4 query heads on 2",
    expanded: ", 4 query heads on 2",
    one_key_head: ", 4 query heads on 1",
}
CORES = (plain, query_scaled, both_scaled, einsum, bmm, baddbmm, wide_softmax, cast_around, wide_products)
MASKS: dict[Any, tuple[str, tuple[str, ...], str]] = {
    none: ("full", (), "zero"),
    window: ("causal, window 4", (), "zero"),
    two_sided: ("keys up to q + 3, window 4", (), "zero"),
    prefix: ("causal or prefix", (), "zero"),
    chunks: ("causal, chunks", (), "zero"),
    padding: ("a bias of keys", ("keep",), "zero"),
    bool_padding: ("key padding", ("keep",), "fill"),
    causal_padding: ("causal, key padding", ("keep",), "mean"),
    documents: ("causal, documents", ("ids",), "zero"),
    packed_positions: ("causal, documents", ("position",), "zero"),
    own_positions: ("causal", (), "zero"),
    later_positions: ("causal", (), "zero"),
    summed_positions: ("causal", (), "zero"),
    restarted_positions: ("causal, documents", (), "zero"),
    counted_positions: ("causal, data of queries and keys", (), "nan_fill"),
    alibi: ("an additive index function", (), "zero"),
    causal_alibi: ("causal, an additive index function", (), "zero"),
    bucketed: ("relative bias", (), "zero"),
    clipped: ("relative bias", (), "zero"),
    tensor_bias: ("a bias tensor", ("bias",), "zero"),
    mask_argument: ("a mask tensor", ("mask",), "nan_fill"),
    added_argument: ("a mask tensor", ("mask",), "nan"),
}


def programs() -> list[Program]:
    """Every program that has to become one attention."""
    found = [Program(layout, plain, tril_inf, "causal" + GROUPED.get(layout, "")) for layout in LAYOUTS]
    found += [Program(separate, core, none, "full") for core in CORES]
    found += [Program(separate, core, mask, "causal") for core in (plain, einsum, bmm) for mask in CAUSAL]
    found += [
        Program(separate, core, mask, kind, inputs, empty=empty)
        for core in (plain, baddbmm)
        for mask, (kind, inputs, empty) in MASKS.items()
    ]
    found += [Program(crossing, plain, none, "full", ("memory",))]
    found += [Program(crossing, plain, bottom_right, "causal, bottom right", ("memory",), empty="nan_fill")]
    found += [
        Program(expanded, capped, window, "causal, window 4, 4 query heads on 2, softcap"),
        Program(separate, capped, none, "full, softcap"),
        Program(separate, sunk, tril_inf, "causal, sinks"),
        Program(expanded, sunk, window, "causal, window 4, 4 query heads on 2, sinks"),
        Program(separate, sunk, causal_padding, "causal, key padding, sinks", ("keep",)),
        Program(separate, learned_scale, tril_inf, "causal"),
        Program(separate, mask_then_scale, tril_inf, "causal"),
        Program(separate, dropped, none, "full, dropout"),
        Program(chunked, dropped, tril_inf, "causal, dropout"),
        Program(separate, dropped, tril_inf, "causal", train=False),
        Program(separate, dropped, causal_padding, "causal, key padding, dropout", ("keep",), empty="mean"),
        Program(separate, dropped, bool_padding, "key padding, dropout", ("keep",), empty="fill"),
        Program(separate, capped, causal_padding, "causal, key padding, softcap", ("keep",), empty="mean"),
        Program(
            separate, plain, bucketed_padding, "causal, key padding, relative bias", ("keep",), empty="mean"
        ),
        Program(three_dimensional, plain, tril_inf, "causal"),
    ]
    found += [
        Program(separate, core, mask, kind)
        for core in (windowed, shifted)
        for mask, kind in (
            (tril_inf, "causal"),
            (by_window, "an index function"),
            (bucketed, "relative bias"),
        )
    ]
    found += [Program(separate, windowed_sdpa, triu_add, "causal")]
    for dtype, train in ((torch.bfloat16, True), (torch.float64, True), (torch.float32, False)):
        wide = dtype == torch.float64  # where a cast to float32 would lose precision
        found += [
            Program(layout, core, mask, kind + GROUPED.get(layout, ""), (), dtype, train)
            for layout, core, mask, kind in (
                (separate, plain, tril_inf, "causal"),
                (expanded, plain if wide else wide_softmax, where_finfo, "causal"),
                (unbound, einsum if wide else cast_around, window, "causal, window 4"),
                (separate, query_scaled, bucketed, "relative bias"),
            )
        ]
    return list({p.name: p for p in found}.values())


PROGRAMS = programs()
