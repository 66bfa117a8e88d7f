"""Attention on the CPU, forward and backward: PyTorch's flash kernel over blocks of queries, or written out.

Shapes     q: [B, H, S, D]; k: [B, G, T, D]; v: [B, G, T, E]; out, dout: [B, H, S, E]; lse: [B, H, S] in fp32
           (fp64 for fp64), to the base e, +inf for a row that keeps no key.
Numerics   softmax in fp32 (fp64 for fp64), and so the products of a written-out block; dk, dv and the tables'
           gradients are added up in that dtype and rounded once.
Cost       one call of the flash kernel where mask and bias are no tensor of size S * T, or the bias is one
           as it lies; a causal square in halves (is_causal alone computes up to 512 keys too many). Otherwise
           blocks of BLOCK queries, each with the keys it reaches, to blocks of KEYS; mask and bias exist for
           one block at a time, within ELEMENTS (or for 16 queries). Written out, a block at a time: softcap,
           dropout, the backward of a table.
Choice     PyTorch's kernel in fp32 beats a written-out block, and torch's math from S 64 on. Milliseconds of
           its forward + backward in the inputs' dtype / the same in fp32, casts included: B * S 1024, H 8,
           D 64, 1 thread of an AMD EPYC (Zen 4), torch 2.13, 2026-11-21 (bench/attention.py):
               S      16         64         128        256        512        1024
               bf16   32 / 5     22 / 10    28 / 17    30 / 27    49 / 52    81 / 97
               fp16   26 / 6     68 / 11    129 / 17   227 / 28   429 / 52   818 / 97
           So fp16 is cast, and bf16 up to WIDEN scores a head and where it goes in blocks.
Limits     dropout draws a block's mask from the call's seed and the block's number: forward and backward take
           the same blocks, which follow from sizes and mask alone.
Source     PyTorch's aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, whose traps are these: it scales after
           it masks, assumes unit last strides and equal head sizes, and divides by a size of 0.
"""

import ast
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxaccel.kernels import _score, _score_blocks

BLOCK, KEYS = 128, 64
TRIANGLE = 128  # queries that are one causal call, or twice that beyond 8 times that; more are halved
ELEMENTS = 1 << 20  # of a block's scores or mask: 4 MiB in fp32
REPEATED = 1 << 14  # entries of a mask's block that is kept: 64 KiB each
WIDEN = 256 * 256  # scores a head, up to which a low precision is faster in fp32

log = math.log  # as lse has it
aten = torch.ops.aten

Grads = tuple[Tensor, Tensor, Tensor, Tensor | None, list[Tensor | None]]


@dataclass(frozen=True)
class _Call:
    """The arguments of a call, and what follows from them."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: Sequence[Tensor]
    mask: str
    bias: str
    scale: float
    softcap: float
    sinks: Tensor | None
    dropout: float
    seed: Tensor
    flat: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, H, S, T."""
        return *self.q.shape[:3], self.k.shape[2]

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def empty(self) -> bool:
        return not (self.q.numel() and self.k.numel() and self.v.numel())

    def added(self, mask: str, dtype: torch.dtype, **ranges: Any) -> Tensor | None:
        """Mask and bias as one tensor to add, of 4 dimensions."""
        if not self.bias:
            return _hidden(mask, self.tables, self.sizes, dtype, **ranges) if mask else None
        total = _score.evaluate(self.bias, self.tables, *self.sizes, dtype=dtype, **ranges).to(dtype)
        if mask:
            keep = _score.evaluate(mask, self.tables, *self.sizes, dtype=dtype, **ranges)
            total = torch.where(keep, total, total.new_full((), -torch.inf))
        return total

    def added_block(self, reach: _score_blocks.Reach, **ranges: range) -> Tensor | None:
        """The same for a block and the keys it reaches; the mask is asked where it hides some of them."""
        keys, asked = range(reach.first, reach.stop), range(reach.left, reach.right)
        if reach.whole or self.bias:
            return self.added("" if reach.whole else self.mask, self.wide, k=keys, **ranges)
        part = self.hidden(k=asked, **ranges)
        if len(asked) == len(keys):
            return part
        part = part.expand(*part.shape[:3], len(asked))
        return F.pad(part, (reach.left - reach.first, reach.stop - reach.right))

    def hidden(self, **ranges: range) -> Tensor:
        """The mask alone, kept for the next call where it is small and the same for all: layers repeat it."""
        if {"b", "h", *_score.TABLES} & _score.names(self.mask) or len(ranges["q"]) * len(
            ranges["k"]
        ) > REPEATED:
            return _hidden(self.mask, self.tables, self.sizes, self.wide, **ranges)
        return _repeated(self.mask, self.sizes[2:], self.wide, ranges["q"], ranges["k"])


def _hidden(
    mask: str, tables: Sequence[Tensor], sizes: tuple[int, ...], dtype: torch.dtype, **ranges: Any
) -> Tensor:
    keep = _score.evaluate(mask, tables, *sizes, dtype=dtype, **ranges)
    return torch.where(keep, keep.new_zeros((), dtype=dtype), keep.new_full((), -torch.inf, dtype=dtype))


@lru_cache(64)
def _repeated(mask: str, sizes: tuple[int, int], dtype: torch.dtype, q: range, k: range) -> Tensor:
    with torch.inference_mode(False):
        return _hidden(mask, (), (1, 1, *sizes), dtype, q=q, k=k)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    mask: str,
    bias: str,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    dropout: float,
    seed: Tensor,
    save: bool = False,
    flat: bool = False,
) -> tuple[Tensor, Tensor]:
    """out, and lse to the base e, +inf for rows that keep no key. `flat`: weights are as if scores were 0."""
    call = _Call(q, k, v, tables, mask, bias, scale, softcap, sinks, dropout, seed, flat)
    b, h, s, _ = q.shape
    if call.empty:
        out = q.new_zeros(b, s, h, v.shape[3]).transpose(1, 2)
        return out, q.new_full((b, h, s), torch.inf, dtype=call.wide)
    if softcap or dropout or flat:
        return _written_forward(call)
    if _widens(call):
        wide = replace(call, q=q.float(), k=k.float(), v=v.float())
        out, lse = _flash_forward(wide)
        return out.to(q.dtype), lse
    return _flash_forward(call)


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    mask: str,
    bias: str,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    dropout: float,
    seed: Tensor,
    wanted: Sequence[bool],
    flat: bool = False,
) -> Grads:
    """dq, dk, dv, dsinks, the tables' gradients, where wanted: a bool for each table, then the sinks'."""
    call = _Call(q, k, v, tables, mask, bias, scale, softcap, sinks, dropout, seed, flat)
    dsinks = None
    if wanted[-1] and sinks is not None:
        delta = (dout.to(call.wide) * out).sum(-1)
        dsinks = -((sinks.to(call.wide)[:, None] - lse).exp() * delta).sum((0, 2)).to(sinks.dtype)
    if call.empty:
        zeros = [x.new_zeros(x.shape, dtype=x.dtype) for x in (q, k, v)]
        dtables = [torch.zeros_like(t) if w else None for t, w in zip(tables, wanted[:-1], strict=True)]
        return zeros[0], zeros[1], zeros[2], dsinks, dtables
    if softcap or dropout or flat or any(wanted[:-1]):
        dq, dk, dv, dtables = _written_backward(call, dout, out, lse, wanted[:-1])
        return dq, dk, dv, dsinks, dtables
    if _widens(call):
        wide = replace(call, q=q.float(), k=k.float(), v=v.float())
        dq, dk, dv = (g.to(q.dtype) for g in _flash_backward(wide, dout.float(), out.float(), lse))
    else:
        dq, dk, dv = _flash_backward(call, dout, out, lse)
    return dq, dk, dv, dsinks, [None] * len(tables)


def _widens(call: _Call) -> bool:
    """Whether it is faster in fp32, and not only as exact."""
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return False
    _, _, s, t = call.sizes
    return call.q.dtype == torch.float16 or s * t <= WIDEN or _one(call) is None


# PyTorch's kernel


@dataclass(frozen=True)
class _Part:
    """One call of PyTorch's kernel: these queries, these keys, and what is added to their scores.

    A query's keys may lie in several parts: `again` says that its first came before.
    """

    queries: slice
    keys: slice
    causal: bool
    added: Tensor | None
    again: bool = False


def _one(call: _Call) -> tuple[str, bool, torch.dtype] | None:
    """How to do it in one part: what of the mask to add, whether it is causal, the dtype of what is added."""
    rest, causal = _causal(call.mask, *call.sizes[2:])
    view = None if rest else _view_dtype(call)
    if view is None and "q" in _score.names(rest) | _score.names(call.bias):
        return None
    return rest, causal, view or call.wide


def _parts(call: _Call) -> Iterator[_Part]:
    """The whole, or blocks of queries; queries that reach no key are left out."""
    s, t = call.sizes[2:]
    one = _one(call)
    if one is not None:
        rest, causal, dtype = one
        if causal and not rest and not call.bias and min(s, t) > TRIANGLE and call.q.dtype == call.wide:
            yield from _triangle(0, min(s, t), TRIANGLE if min(s, t) <= 8 * TRIANGLE else 2 * TRIANGLE)
            if s > t:
                yield _Part(slice(t, s), slice(0, t), False, None)
        else:
            yield _Part(slice(0, s), slice(0, t), causal, call.added(rest, dtype))
        return
    step = _rows(call, _score.names(call.mask) | _score.names(call.bias))
    for i, reach in enumerate(_score_blocks.reach(call.mask, call.tables, call.sizes, step, KEYS)):
        queries = range(i * step, min(s, (i + 1) * step))
        if reach.first < reach.stop:
            added = call.added_block(reach, q=queries)
            yield _Part(slice(queries.start, queries.stop), slice(reach.first, reach.stop), False, added)


def _triangle(start: int, stop: int, least: int) -> Iterator[_Part]:
    """A causal square: two smaller ones, and the square below the first, which needs no mask."""
    if stop - start <= least:
        yield _Part(slice(start, stop), slice(start, stop), True, None)
        return
    middle = (start + stop) // 2
    yield from _triangle(start, middle, least)
    yield from _triangle(middle, stop, least)
    yield _Part(slice(middle, stop), slice(start, middle), False, None, again=True)


@lru_cache(1024)
def _causal(mask: str, s: int, t: int) -> tuple[str, bool]:
    """What the mask says beside being causal from the top left, and whether it is that."""
    band = _score.band(mask)
    low, high = band.limits(s, t)
    if low is not None and low > 1 - s:
        return mask, False
    if high is None or high >= t - 1:
        return band.rest, False
    return (band.rest, True) if high == 0 else (mask, False)


def _view_dtype(call: _Call) -> torch.dtype | None:
    """The bias' dtype, where it is entries of a table as they lie, and the kernel takes that dtype."""
    match _score.parse(call.bias) if call.bias else None:
        case ast.Subscript(value=ast.Name(id=name)) as read:
            dtype = call.tables[_score.TABLES.index(name)].dtype
            plain = all(isinstance(i, (ast.Name, ast.Constant)) for i in _score.subscripts(read))
            return dtype if plain and dtype in (call.q.dtype, call.wide) else None
    return None


def _rows(call: _Call, names: frozenset[str]) -> int:
    """Queries a block: BLOCK, or fewer where the mask or the bias of a block would be large."""
    b, h, _, t = call.sizes
    lead = (b if "b" in names else 1) * (h if "h" in names else 1)
    return max(16, min(BLOCK, ELEMENTS // (lead * t)))


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """q and scale with scale > 0, and the factor taken into q."""
    if scale > 0:
        return q, scale, 1.0
    return (-q, -scale, -1.0) if scale else (torch.zeros_like(q), 1.0, 0.0)


def _fitted(*given: Tensor) -> list[Tensor]:
    """All of one head size and with unit last stride."""
    width = max(x.shape[3] for x in given)
    padded = (x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in given)
    return [x if x.stride(3) == 1 else x.contiguous() for x in padded]


def _cut(x: Tensor, part: slice) -> Tensor:
    return x if part.stop - part.start == x.shape[2] else x[:, :, part]


def _flash_forward(call: _Call) -> tuple[Tensor, Tensor]:
    (b, h, s, _), e = call.q.shape, call.v.shape[3]
    q, scale, _ = _positive(call.q, call.scale)
    q, k, v = _fitted(q, call.k, call.v)
    out, lse = None, None
    for part in _parts(call):
        some, sums = aten._scaled_dot_product_flash_attention_for_cpu(
            _cut(q, part.queries), _cut(k, part.keys), _cut(v, part.keys), 0.0, part.causal,
            attn_mask=part.added, scale=scale,
        )  # fmt: skip
        if some.shape[2] == s:
            out, lse = _joined(some[..., :e]), sums.contiguous()
            break
        if out is None or lse is None:
            out = (q.new_zeros if _one(call) is None else q.new_empty)(b, s, h, e).transpose(1, 2)
            lse = sums.new_full((b, h, s), -torch.inf)
        rows, logs = out[:, :, part.queries], lse[:, :, part.queries]
        if part.again:
            rows.lerp_(some[..., :e], (sums - logs).sigmoid_().unsqueeze(-1))
            torch.logaddexp(logs, sums, out=logs)
        else:
            rows.copy_(some[..., :e])
            logs.copy_(sums)
    if out is None or lse is None:
        return q.new_zeros(b, s, h, e).transpose(1, 2), q.new_full((b, h, s), torch.inf, dtype=call.wide)
    none = None
    if call.bias or not _score.keeps_every_row(call.mask, *call.sizes[2:]):
        none = _empty_rows(call, out, lse)
    if call.sinks is not None:
        total = torch.logaddexp(lse, call.sinks.to(call.wide)[:, None])
        out.mul_((lse - total).exp_().unsqueeze(-1))
        lse = total
    return out, lse if none is None else lse.masked_fill_(none, torch.inf)


def _empty_rows(call: _Call, out: Tensor, lse: Tensor) -> Tensor:
    """Which rows keep no key: by the mask, where out is 0. The kernel's lse is 0 there, as others' may be."""
    none = ~(lse.abs() > 0) | lse.isinf()
    if not none.any():
        return none
    none &= ~out.any(-1)
    s = out.shape[2]
    step = _rows(call, _score.names(call.mask) | _score.names(call.bias))
    for start in range(0, s, step):
        some = none[:, :, start : start + step]
        if some.any():
            added = call.added(call.mask, call.wide, q=range(start, min(s, start + step)))
            some &= False if added is None else (added == -torch.inf).all(-1)
    return none


def _joined(out: Tensor) -> Tensor:
    """[B, H, S, E] stored as [B, S, H, E], copied only if it is not."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _flash_backward(call: _Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, e = call.q.shape[3], call.v.shape[3]
    q, scale, factor = _positive(call.q, call.scale)
    q, k, v, dout, out = _fitted(q, call.k, call.v, dout, out)
    sums: list[Tensor] = []
    for part in _parts(call):
        rows, keys = part.queries, part.keys
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows],
            0.0, part.causal, attn_mask=part.added, scale=scale,
        )  # fmt: skip
        if grads[0].shape[2] == q.shape[2] and grads[1].shape[2] == k.shape[2]:
            sums = list(grads)
            break
        sums = sums or [
            q.new_zeros(q.shape, dtype=q.dtype),
            *(x.new_zeros(x.shape, dtype=call.wide) for x in (k, v)),
        ]
        sums[0][:, :, rows] += grads[0]
        sums[1][:, :, keys] += grads[1]
        sums[2][:, :, keys] += grads[2]
    dq, dk, dv = sums or (x.new_zeros(x.shape, dtype=q.dtype) for x in (q, k, v))
    if factor != 1.0:
        dq = dq * factor
    dq, dk, dv = (x[..., :w].to(q.dtype).contiguous() for x, w in ((dq, d), (dk, d), (dv, e)))
    return dq, dk, dv


# written out


@dataclass(frozen=True)
class _Tile:
    """Some batches, some key heads with their query heads, some queries, and the keys these reach."""

    number: int
    b: range
    g: range
    h: range
    q: range
    k: range
    reach: _score_blocks.Reach

    @property
    def rows(self) -> tuple[slice, ...]:
        return tuple(slice(x.start, x.stop) for x in (self.b, self.h, self.q))

    @property
    def keys(self) -> tuple[slice, ...]:
        return tuple(slice(x.start, x.stop) for x in (self.b, self.g, self.k))


def _tiles(call: _Call) -> Iterator[_Tile]:
    """Tiles within ELEMENTS, or of 16 queries of the heads that share a key head."""
    (b, h, s, t), g = call.sizes, call.k.shape[1]
    n = h // g
    step = max(16, min(s, BLOCK, ELEMENTS // (n * t)))
    reaches = _score_blocks.reach(call.mask, call.tables, call.sizes, step, KEYS)
    heads = max(1, min(g, ELEMENTS // (n * step * t)))
    batches = max(1, min(b, ELEMENTS // (h * step * t))) if heads == g else 1
    number = 0
    for b0 in range(0, b, batches):
        for g0 in range(0, g, heads):
            g1 = min(g, g0 + heads)
            for i, reach in enumerate(reaches):
                number += 1
                if reach.stop > reach.first:
                    yield _Tile(
                        number, range(b0, min(b, b0 + batches)), range(g0, g1), range(g0 * n, g1 * n),
                        range(i * step, min(s, (i + 1) * step)), range(reach.first, reach.stop), reach,
                    )  # fmt: skip


def _grouped(x: Tensor, g: int) -> Tensor:
    """[b, h, q, x] as [b, g, (h // g) * q, x]: the queries that read one key head, one under another."""
    b, h, q, w = x.shape
    return x.reshape(b, g, h // g * q, w)


def _scores(call: _Call, tile: _Tile) -> tuple[Tensor, Tensor | None]:
    """Scores [b, h, q, k], masked, and with a softcap what they were before mask and bias, over the cap."""
    q, k = call.q[tile.rows].to(call.wide), call.k[tile.keys].to(call.wide)
    s = (_grouped(q, len(tile.g)) @ k.mT).mul_(call.scale).view(*q.shape[:3], len(tile.k))
    capped = None
    if call.softcap:
        capped = s.div_(call.softcap).tanh_()
        s = capped * call.softcap
    if call.flat:  # of the scores only the softcap's slope is left
        s, call = torch.zeros_like(s), replace(call, bias="")
    added = call.added_block(tile.reach, b=tile.b, h=tile.h, q=tile.q)
    return s if added is None else s.add_(added), capped


def _kept(call: _Call, tile: _Tile, p: Tensor) -> Tensor:
    """The weights that dropout keeps, a bool each: the same ones whenever it is asked."""
    generator = torch.Generator("cpu")
    number = -tile.number if call.flat else tile.number  # draws of its own: blocks of other rows and widths
    generator.manual_seed((int(call.seed) + number * 0x9E3779B97F4A7C15) % 2**63)
    return p.new_empty(p.shape, dtype=torch.bool).bernoulli_(1 - call.dropout, generator=generator)


def _written_forward(call: _Call) -> tuple[Tensor, Tensor]:
    (b, h, s, _), e = call.q.shape, call.v.shape[3]
    out = call.q.new_zeros(b, s, h, e).transpose(1, 2)
    lse = call.q.new_full((b, h, s), torch.inf, dtype=call.wide)
    for tile in _tiles(call):
        scores, _ = _scores(call, tile)
        sums = scores.logsumexp(-1)
        none = sums == -torch.inf
        if call.sinks is not None:
            sums = torch.logaddexp(sums, call.sinks[tile.rows[1]].to(call.wide)[:, None])
        lse[tile.rows] = sums.masked_fill_(none, torch.inf)  # and not -inf, from which -inf is no number
        p = scores.sub_(sums.unsqueeze(-1)).exp_()
        if call.dropout:
            p.mul_(_kept(call, tile, p)).div_(1 - call.dropout)
        v = call.v[tile.keys].to(call.wide)
        out[tile.rows] = (_grouped(p, len(tile.g)) @ v).view(*p.shape[:3], e).to(out.dtype)
    return out, lse


def _written_backward(
    call: _Call, dout: Tensor, out: Tensor, lse: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    q, k, v = call.q, call.k, call.v
    dq, dk, dv = (x.new_zeros(x.shape, dtype=call.wide) for x in (q, k, v))
    dtables = [
        t.new_zeros(t.shape, dtype=call.wide) if w else None for t, w in zip(call.tables, wanted, strict=True)
    ]
    for tile in _tiles(call):
        g = len(tile.g)
        part = dout[tile.rows].to(call.wide)
        delta = (part * out[tile.rows]).sum(-1, keepdim=True)
        scores, capped = _scores(call, tile)
        p = scores.sub_(lse[tile.rows].unsqueeze(-1)).exp_()
        dp = (_grouped(part, g) @ v[tile.keys].to(call.wide).mT).view(p.shape)
        weights = p
        if call.dropout:
            kept = _kept(call, tile, p)
            weights = (p * kept).div_(1 - call.dropout)
            dp.mul_(kept).div_(1 - call.dropout)
        dv[tile.keys] += _grouped(weights, g).mT @ _grouped(part, g)
        ds = dp.sub_(delta).mul_(p)
        for number, dtable in enumerate(dtables):
            if dtable is not None:
                for form in _score.gradient_forms(call.bias, number):
                    _accumulate(dtable, form, ds, tile, q.shape[2])
        if capped is not None:
            ds.mul_(capped.square_().neg_().add_(1))
        ds = _grouped(ds.mul_(call.scale), g)
        dq[tile.rows] = (ds @ k[tile.keys].to(call.wide)).view(dq[tile.rows].shape)
        dk[tile.keys] += ds.mT @ _grouped(q[tile.rows].to(call.wide), g)
    rounded = [d if d is None else d.to(t.dtype) for d, t in zip(dtables, call.tables, strict=True)]
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), rounded


def _accumulate(dtable: Tensor, form: tuple[str, ...], ds: Tensor, tile: _Tile, S: int) -> None:
    """Add dS [b, h, q, k], summed over what the table is not read by, to the table's gradient."""
    axes = [x for x in form if x != "0"]
    kept = {"q", "k"} | {*axes} if "relative" in axes else {*axes}
    over = [i for i, name in enumerate(_score.INDICES) if name not in kept]
    names = [name for name in _score.INDICES if name in kept]
    x = ds.sum(over) if over else ds
    ranges = {"b": tile.b, "h": tile.h, "q": tile.q, "k": tile.k}
    if "relative" in axes:
        x = _diagonals(x)
        names = [*names[:-2], "relative"]
        start = tile.k.start - (tile.q.stop - 1) + S - 1
        ranges["relative"] = range(start, start + x.shape[-1])
    x = x.permute([names.index(name) for name in axes])
    at = tuple(0 if n == "0" else slice(ranges[n].start, ranges[n].stop) for n in form)
    dtable[at] += x


def _diagonals(x: Tensor) -> Tensor:
    """[..., q, k] to the sums over equal k - q, least first: [..., q + k - 1]."""
    *lead, m, n = x.shape
    rows = F.pad(x.flip(-2), (0, m)).flatten(-2)[
        ..., : m * (m + n - 1)
    ]  # each row one to the right of the last
    return rows.reshape(*lead, m, m + n - 1).sum(-2)
