"""Run attention as one flash kernel, forward and backward, whatever way it is written.

    s = scale * q @ k^T; s = cap * tanh(s / cap); s = s + bias, or finfo.min where masked
    out = dropout(softmax(s, -1)) @ v

    => out = fxaccel.attention(q, k, v, tables, "(k <= q) & t0[b, 0, 0, k]", "", scale, cap, ...)

Fires on   `scaled_dot_product_attention` and the written-out core: products around a softmax over the keys,
           the scores scaled, capped, biased, masked and given a sink in any order that means the above;
           grouped heads stay grouped; masks are proved as functions of (b, h, q, k), or stay tensors.
Saves      the scores: 2 * B * H * S * T elements written and read, forward and again backward; the mask; the
           keys and values repeated for grouped heads; and the work outside of the mask.
Exact      agrees with the original within its own rounding (softmax in fp32). Dropout draws other random
           numbers, of the same distribution. A fill of -1e8 or less is taken for "not seen".
Source     Dao 2023, "FlashAttention-2", arXiv:2307.08691.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxaccel.effects import learned
from fxaccel.indexing import dimension
from fxaccel.ir import Program
from fxaccel.kernels import attention as kernel
from fxaccel.passes._attention_pictures import pictures
from fxaccel.passes._attention_scores import named
from fxaccel.passes._attention_site import Site, called, padded, written_out
from fxaccel.passes._attention_terms import B, D, H, Mask, Table
from fxaccel.passes._attention_text import Emitter
from fxaccel.picture import Picture
from fxaccel.rule import Finder, Match, Ops, Refusals, Rule, Rules, register

aten = torch.ops.aten


class Attention(Rule):
    """One attention becomes the flash kernel."""

    redraws = True

    def refuse(self, m: Match) -> Refusals:
        site = m.site
        yield from site.why_not
        yield from site.mask.why_not
        yield from unlearnable(m.program, site.mask)
        if site.scale is None:
            yield "the scale is left to a head size that is not a number"
        yield from unsupported(site)

    def rewrite(self, op: Ops, m: Match):
        site, mask = m.site, m.site.mask
        q, k, v = heads(op, site)
        tables = [table(op, t, q, k) for t in mask.tables]
        sink = None if site.sink is None else Emitter(op, q, k, (H,)).emit(site.sink)
        out = op.fxaccel.attention.default(
            q, k, v, tables, mask.mask, mask.bias, site.scale, site.cap, sink, site.dropout, mask.empty
        )
        shape = m.root.meta["val"].shape
        for _ in range(4 - len(shape)):
            out = op.aten.squeeze.dims(out, [0])
        if len(shape) > 4:
            sizes = [
                s if isinstance(s, int) else op.aten.sym_size.int(site.q.node, i) for i, s in enumerate(shape)
            ]
            out = op.aten.unflatten.int(out, 0, [-1, *sizes[1:-3]])
        return out

    def remark(self, m: Match) -> str:
        site = m.site
        q, k = padded(site.q.shape()), padded(site.k.shape())
        words = [*site.mask.kinds] or ["full"]
        if k[1] != q[1]:
            words.append(f"{q[1]} query heads on {k[1]}")
        more = ("softcap", site.cap), ("sinks", site.sink), ("dropout", site.dropout)
        return ", ".join([*words, *(word for word, there in more if there)])


class ScaledDotProduct(Attention):
    """scaled_dot_product_attention becomes the flash kernel."""

    def traced(self):
        return Finder(frozenset({aten.scaled_dot_product_attention.default}), called)


class WrittenOut(Attention):
    """Two products around a softmax over the keys become the flash kernel."""

    def traced(self):
        return Finder(frozenset({aten.matmul.default}), written_out)


@register
class FuseAttention(Rules):
    """Attention, called as one operator or written out, becomes one flash kernel."""

    name = "fuse-attention"
    step = "raise"
    default = True
    produces = ("attention",)
    rules = (ScaledDotProduct, WrittenOut)

    def pictures(self, program: Program) -> Iterator[Picture]:
        """The masks, each kind once."""
        return pictures(program)


def unsupported(site: Site) -> Iterator[str]:
    """Why the kernel does not take this attention."""
    q, k, v = (x.node.meta["val"] for x in (site.q, site.k, site.v))
    if not q.dim() == k.dim() == v.dim():
        yield f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions; the kernel takes equally many"
        return
    shapes = [list(q.shape), site.k.shape(), site.v.shape()]
    before = [list(map(dimension, shape[:-3])) for shape in shapes]
    if q.dim() > 4 and before != [before[0]] * 3:
        yield f"q, k, v are {shapes}: the dimensions before the heads differ"
        return
    made: Any = [_Like(padded(s), x.dtype, x.device) for s, x in zip(shapes, (q, k, v), strict=True)]
    q, k, v = made
    mask = site.mask
    tables = [_shaped(t, q, k) for t in mask.tables]
    scale = site.scale or 1.0
    yield from kernel.unsupported(
        q, k, v, tables, mask.mask, mask.bias, scale, site.cap, None, site.dropout, mask.empty
    )


def unlearnable(program: Program, mask: Mask) -> Iterator[str]:
    """Why a gradient cannot reach what the mask or the bias reads."""
    for t, plain in zip(mask.tables, mask.plain, strict=True):
        if not plain and isinstance(t.source, fx.Node) and t.source in program.facts(learned):
            yield f"the bias needs a gradient and reads {named(t.source)} in another way than as it is"


def _shaped(t: Table, q: Any, k: Any) -> Any:
    """A tensor of the shape of a table."""
    if isinstance(t.source, fx.Node):
        return t.source.meta["val"]
    sizes = {B: q.shape[0], H: q.shape[1], D: q.shape[2] + k.shape[2] - 1}
    return _Like([sizes[a] for a in t.axes], q.dtype, q.device)


@dataclass(frozen=True)
class _Like:
    """What there is to know of a tensor that is not computed yet."""

    shape: list[Any]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def is_complex(self) -> bool:
        return self.dtype.is_complex

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def heads(op: Ops, site: Site) -> tuple[fx.Node, ...]:
    """q, k, v as [B, H, S, D], [B, G, T, D], [B, G, T, E]."""
    q, k, v = site.q.node, site.k.emit(op), site.v.emit(op)
    for factor, divided in site.factors:
        q = (op.aten.div.Tensor if divided else op.aten.mul.Tensor)(q, factor)
    rank = q.meta["val"].dim()
    for _ in range(4 - rank):
        q, k, v = (op.aten.unsqueeze.default(x, 0) for x in (q, k, v))
    if rank > 4:
        q, k, v = (op.aten.flatten.using_ints(x, 0, rank - 4) for x in (q, k, v))
    return q, k, v


def table(op: Ops, t: Table, q: fx.Node, k: fx.Node) -> fx.Node:
    """The tensor of a table, computed here if it has to be."""
    if isinstance(t.source, fx.Node):
        return t.source if t.factor == 1 else op.aten.mul.Tensor(t.source, t.factor)
    return Emitter(op, q, k, t.axes).emit(t.source)
