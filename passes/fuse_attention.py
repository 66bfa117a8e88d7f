"""Run attention as one flash kernel, forward and backward, whatever way it is written.

    s = scale * q @ k^T; s = cap * tanh(s / cap); s = s + bias, or finfo.min where masked
    out = dropout(softmax(s, -1)) @ v

    => out = fxaccel.attention(q, k, v, tables, "(k <= q) & t0[b, 0, 0, k]", "", scale, cap, ...)

Fires on   `scaled_dot_product_attention` and the written-out core: products around a softmax over the keys, the
           scores scaled, capped, biased, masked and given a sink in any order that means the above; grouped
           heads stay grouped; masks are proved as functions of (b, h, q, k), or stay tensors.
Saves      the scores: 2 * B * H * S * T elements written and read, forward and again backward; the mask; the
           keys and values repeated for grouped heads; and the work outside of the mask.
Exact      agrees with the original within its own rounding (softmax in fp32). Dropout draws other random
           numbers, of the same distribution.
Source     Dao 2023, "FlashAttention-2", arXiv:2307.08691.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from fxaccel.effects import learned, written
from fxaccel.indexing import (
    ZERO, Affine, Call, Const, Range, Read, Reader, Value, Views, compare, dimension, index, negation,
    symbols,
)  # fmt: skip
from fxaccel.ir import Program, arguments, is_call, target_name
from fxaccel.kernels import attention as kernel
from fxaccel.passes._attention_mask import (
    B, D, H, K, Q, Emitter, Fill, Mask, Problem, Table, Term, understand,
)  # fmt: skip
from fxaccel.rule import Match, Miss, Ops, Refusals, Rule, Rules, register

aten = torch.ops.aten
INDICES = {2: (Q, K), 3: (B, Q, K), 4: (B, H, Q, K)}


@dataclass(frozen=True)
class Site:
    """An attention as found: what its scores are made of.

    scale, cap   of the scores; cap 0 for none
    mask         what is seen and what is added
    sink         an extra logit as a value of h, or None
    dropout      probability
    factors      tensors that q is multiplied by, or divided where the second is true
    why_not      sentences that forbid the rewrite
    """

    q: Operand
    k: Operand
    v: Operand
    scale: float | None
    mask: Mask
    cap: float = 0.0
    sink: Value | None = None
    dropout: float = 0.0
    factors: tuple[tuple[fx.Node, bool], ...] = ()
    why_not: tuple[str, ...] = ()


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
        site, out = m.site, m.root.meta["val"]
        q, k, v = heads(op, site)
        tables = [table(op, t, q, k) for t in site.mask.tables]
        sink = None if site.sink is None else Emitter(op, q, k, (H,)).emit(site.sink)
        made = op.fxaccel.attention.default(
            q, k, v, tables, site.mask.mask, site.mask.bias, site.scale, site.cap, sink, site.dropout,
            site.mask.empty,
        )  # fmt: skip
        for _ in range(4 - out.dim()):
            made = op.aten.squeeze.dims(made, [0])
        return made

    def remark(self, m: Match) -> str:
        q, k = _four(m.site.q.shape()), _four(m.site.k.shape())
        words = [*m.site.mask.kinds] or ["full"]
        if k[1] != q[1]:
            words.append(f"{q[1]} query heads on {k[1]}")
        words += [w for w, on in (("softcap", m.site.cap), ("sinks", m.site.sink), ("dropout", m.site.dropout)) if on]
        return ", ".join(words)


class ScaledDotProduct(Attention):
    """scaled_dot_product_attention becomes the flash kernel."""

    def traced(self):
        return _Search(frozenset({aten.scaled_dot_product_attention.default}), called)


class WrittenOut(Attention):
    """Two products around a softmax over the keys become the flash kernel."""

    def traced(self):
        return _Search(frozenset({aten.matmul.default}), written_out)


@register
class FuseAttention(Rules):
    """Attention, called as one operator or written out, becomes one flash kernel."""

    name = "fuse-attention"
    step = "raise"
    default = True
    produces = ("attention",)
    rules = (ScaledDotProduct, WrittenOut)


@dataclass(frozen=True)
class _Search:
    targets: frozenset[Any]
    find: Any


# -- arguments ---------------------------------------------------------------------------------------


def four(node: fx.Node) -> list[Any]:
    """Sizes of q, k or v as four dimensions."""
    return _four(node.meta["val"].shape)


def _four(shape: Sequence[Any]) -> list[Any]:
    return [1] * (4 - len(shape)) + list(shape)


def unsupported(site: Site) -> Iterator[str]:
    """Why the kernel does not take this attention."""
    q, k, v = (x.node.meta["val"] for x in (site.q, site.k, site.v))
    if not q.dim() == k.dim() == v.dim() <= 4:
        yield f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions; the kernel takes up to 4, alike"
        return
    k, v = (x.permute(o.order) if o.order else x for x, o in ((k, site.k), (v, site.v)))
    for _ in range(4 - q.dim()):
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    tables = [_shaped(t, q, k, site) for t in site.mask.tables]
    yield from kernel.unsupported(
        q, k, v, tables, site.mask.mask, site.mask.bias, site.scale or 1.0, site.cap, None, site.dropout,
        site.mask.empty,
    )  # fmt: skip


def unlearnable(program: Program, mask: Mask) -> Iterator[str]:
    """Why a gradient cannot reach what the mask or the bias reads."""
    for t, plain in zip(mask.tables, mask.plain, strict=True):
        if not plain and isinstance(t.source, fx.Node) and t.source in program.facts(learned):
            yield f"the bias needs a gradient and reads {_name(t.source)} in another way than element by element"


def _shaped(t: Table, q: Any, k: Any, site: Site) -> Any:
    """A tensor of the shape of a table."""
    if isinstance(t.source, fx.Node):
        return t.source.meta["val"]
    sizes = {B: q.shape[0], H: q.shape[1], D: q.shape[2] + k.shape[2] - 1}
    return q.new_empty([sizes[a] for a in t.axes])


def heads(op: Ops, site: Site) -> tuple[fx.Node, ...]:
    """q, k, v as [B, H, S, D], [B, G, T, D], [B, G, T, E]."""
    q, k, v = site.q.node, site.k.emit(op), site.v.emit(op)
    for factor, divided in site.factors:
        q = (op.aten.div.Tensor if divided else op.aten.mul.Tensor)(q, factor)
    for _ in range(4 - q.meta["val"].dim()):
        q, k, v = (op.aten.unsqueeze.default(x, 0) for x in (q, k, v))
    return q, k, v


@dataclass(frozen=True)
class Operand:
    """k or v of an attention: `node` permuted by `order` is [B, G, T, D]; `passed` are the views above it."""

    node: fx.Node
    order: tuple[int, ...] = ()
    passed: tuple[fx.Node, ...] = ()

    def emit(self, op: Ops) -> fx.Node:
        """The tensor [B, G, T, D]."""
        in_order = self.order == tuple(range(len(self.order)))
        return self.node if in_order else op.aten.permute.default(self.node, list(self.order))

    def shape(self) -> list[Any]:
        """Sizes of [B, G, T, D]."""
        shape = self.node.meta["val"].shape
        return [shape[i] for i in self.order] if self.order else list(shape)


def narrowed(x: Operand, wanted: torch.dtype) -> Operand:
    """q or k before a cast to a wider dtype than v's, which the kernel makes itself."""
    node = x.node
    if is_call(node, aten.to.dtype) and node.args[0].meta["val"].dtype == wanted != node.meta["val"].dtype:
        return replace(x, node=node.args[0], passed=(*x.passed, node))
    return x


def operands(k: fx.Node, v: fx.Node, transposed: bool) -> tuple[Operand, Operand]:
    """k, which may be given as [.., D, T], and v, repeated heads taken apart in both or in neither."""
    size = dimension(four(k)[1])
    count = int(size) if size.is_number else 1
    for n in range(count, 1, -1):
        if count % n == 0 and k.meta["val"].dim() == 4:
            found = _unviewed(k, n, transposed), _unviewed(v, n, False)
            if found[0] and found[1]:
                return found
    rank = k.meta["val"].dim()
    swapped = Operand(k, (*range(rank - 2), rank - 1, rank - 2)) if transposed else Operand(k)
    return (_unviewed(k, 1, True) or swapped) if transposed else swapped, Operand(v)


def _unviewed(x: fx.Node, n: int, transposed: bool) -> Operand | None:
    """The tensor below views of which `x` is a permutation, each head n times."""
    names = [index(c) for c in "bgij"[4 - x.meta["val"].dim() :]]
    copy, sizes = index("r"), list(map(dimension, x.meta["val"].shape))
    ranges = dict(zip((i.of for i in names), sizes, strict=True)) | {copy.of: sympy.Integer(n)}
    at = list(names)
    if len(names) == 4 and n > 1:
        ranges[names[1].of] = sizes[1] / n
        at[1] = Affine(names[1].of * n + copy.of)
    wanted = [*names[:-2], names[-1], names[-2]] if transposed else names
    wanted = [ZERO if ranges[i.of] == 1 else i for i in wanted]
    views, here = Views(Range(ranges)), Read(x, tuple(at))
    passed: list[fx.Node] = []
    best = None
    while True:
        rank = len(here.at)
        if rank == len(wanted) and sorted(map(str, here.at)) == sorted(map(str, wanted)) and passed + [1] * (n == 1):
            order, left = [], list(range(rank))
            for i in wanted:
                spot = next(j for j in left if here.at[j] == i)
                left.remove(spot)
                order.append(spot)
            best = Operand(here.node, tuple(order), tuple(passed))
        below = views.below(here)
        if below is None:
            return best
        passed.append(here.node)
        here = below


def table(op: Ops, t: Table, q: fx.Node, k: fx.Node) -> fx.Node:
    """The tensor of a table, computed here if it has to be."""
    if isinstance(t.source, fx.Node):
        return t.source if t.factor == 1 else op.aten.mul.Tensor(t.source, t.factor)
    return Emitter(op, q, k, t.axes).emit(t.source)


# -- search ------------------------------------------------------------------------------------------


def called(program: Program, root: fx.Node) -> Match | Miss:
    """A call of scaled_dot_product_attention."""
    a = arguments(root)
    q, k, v = a["query"], a["key"], a["value"]
    (b, h, s, d), t = four(q), four(k)[2]
    p = Problem.of(program, (b, h, s, t), q.meta["val"].dtype)
    reader = _reader(program, p)
    fills, terms = list[Fill](), list[Term]()
    if a["is_causal"]:
        keep = compare("le", K, Q, p.known)
        fills.append(Fill(keep, -math.inf, False, keep))
    if a["attn_mask"] is not None:
        mask = a["attn_mask"]
        value, whole = _read(reader, mask, (B, H, Q, K)), _whole(mask, (B, H, Q, K))
        if mask.meta["val"].dtype is torch.bool:
            fills.append(Fill(value, -math.inf, False, whole))
        else:
            terms.append(Term(value, whole))
    scale = a["scale"]
    if scale is None and dimension(d).is_number:
        scale = 1 / math.sqrt(int(dimension(d)))
    found = understand(p, fills, terms, "zero", "bias" if a["dropout_p"] else "kernel")
    site = Site(Operand(q), *operands(k, v, False), scale, found, dropout=float(a["dropout_p"]))
    return _match(program, root, [root], site, reader)


def _match(
    program: Program, root: fx.Node, core: Sequence[fx.Node], site: Site, reader: Reader
) -> Match:
    passed = {*reader.opened, *site.q.passed, *site.k.passed, *site.v.passed}
    also = frozenset(passed) - frozenset(core)
    bound = {"site": site, "q": site.q.node, "k": site.k.node, "v": site.v.node}
    return Match(program, root, bound, dict(enumerate(core)), outputs=(root,), also=also)


def _reader(program: Program, p: Problem) -> Reader:
    return Reader(p.known, (Q.of, K.of), program.facts(written), program.facts(numbers))


def numbers(program: Program) -> dict[fx.Node, Any]:
    """The constants of the graph that are one number (an analysis)."""
    slots = ((n, program.state.get(n.name)) for n in program.graph.find_nodes(op="placeholder"))
    found = {n: program.constants[s.name] for n, s in slots if s is not None and s.kind == "constant"}
    return {n: t.item() for n, t in found.items() if t.dim() == 0}


def _read(reader: Reader, node: fx.Node, at: Sequence[Value]) -> Value:
    """The node's element, indices aligned at the right as in broadcasting."""
    return reader.read(node, at[len(at) - node.meta["val"].dim() :])


def _whole(node: fx.Node, at: Sequence[Value]) -> Value:
    """The same without a look inside."""
    shape = node.meta["val"].shape
    at = at[len(at) - len(shape) :]
    return Read(node, tuple(ZERO if dimension(s) == 1 else i for s, i in zip(shape, at, strict=True)))


@dataclass
class _Scores:
    """The way from a softmax down to the product: what it passed, in terms of (b, h, q, k)."""

    reader: Reader
    at: tuple[Value, ...]
    factor: float = 1.0
    cap: float = 0.0
    fills: list[Fill] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    factors: list[tuple[fx.Node, bool]] = field(default_factory=list)
    clamped: bool = False
    core: list[fx.Node] = field(default_factory=list)
    why: str = ""

    def descend(self, node: fx.Node) -> fx.Node | None:
        """The product below `node`, None (with `why`) where something else stands in the way."""
        while not is_call(node, aten.matmul.default):
            step = _STEPS.get(node.target) if node.op == "call_function" else None
            if step is None:
                self.why = f"{_name(node)} stands between the product of q and k and the softmax"
                return None
            self.core.append(node)
            below = step(self, node, arguments(node))
            if below is None:
                self.why = self.why or f"{_name(node)} is applied to the scores in a way that is not attention's"
                return None
            node = below
        self.core.append(node)
        return node

    def added(self, y: Any, sign: float = 1.0) -> bool:
        """Take in a term."""
        if self.cap:
            self.why = "a bias is added before the softcap"
            return False
        if self.factors:
            self.why = f"a bias is multiplied by a tensor, {_name(self.factors[-1][0])}"
            return False
        factor = self.factor * sign
        if not isinstance(y, fx.Node):
            return True if y == 0 else self._shift()
        self.terms.append(Term(_read(self.reader, y, self.at), _whole(y, self.at), factor))
        return True

    def scaled(self, y: fx.Node, divided: bool = False) -> bool:
        """Take in a factor that is a tensor: it can go into q if it is the same for all keys."""
        val = y.meta["val"]
        if self.cap:
            self.why = "scores are multiplied by a tensor before the softcap"
        elif val.dim() and dimension(val.shape[-1]) != 1:
            self.why = f"the scores are multiplied by a tensor, {_name(y)}, that differs from key to key"
        elif len(self.at) != val.dim() and val.dim() > len(self.at):
            self.why = "the scores are multiplied by a tensor of more dimensions"
        else:
            self.factors.append((y, divided))
            return True
        return False

    def _shift(self) -> bool:
        self.why = "a number is added to the scores"
        return False

    def filled(self, keep: Value, whole: Value, fill: Any) -> bool:
        """Take in a replacement of scores by a number."""
        if isinstance(fill, fx.Node):
            read = _read(self.reader, fill, self.at)
            fill = read.value if isinstance(read, Const) else float(read.of) if isinstance(read, Affine) and read.of.is_number else None  # fmt: skip
        if fill is None:
            self.why = "masked scores are replaced by a tensor"
            return False
        fill = float(fill) * self.factor
        if self.cap:
            self.why = "a mask lies before the softcap"
            return False
        if not fill <= -1e8:
            self.why = f"masked scores become {fill:g}, which a score that is seen may fall below"
            return False
        self.fills.append(Fill(keep, fill, False, whole))
        return True


def _name(node: Any) -> str:
    if not isinstance(node, fx.Node):
        return repr(node)
    return target_name(node.target) if node.op == "call_function" else f"%{node.name}"


def leads_to_product(node: Any, depth: int = 40) -> bool:
    """Whether a product of q and k lies below, through steps that are understood."""
    while isinstance(node, fx.Node) and node.op == "call_function" and depth:
        if node.target is aten.matmul.default:
            return True
        if node.target not in _STEPS:
            return False
        below = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        below = [n for n in below if n.meta["val"].dim() >= 2]
        if len(below) != 1:
            return any(leads_to_product(n, depth - 1) for n in below)
        node, depth = below[0], depth - 1
    return False


def _add(s: _Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    x, y = a["self"], a["other"]
    if not _scores_like(x, node) or not leads_to_product(x):
        x, y = y, x
    if not _scores_like(x, node) or a.get("alpha", 1) != 1:
        return None
    return x if s.added(y) else None


def _scores_like(x: Any, node: fx.Node) -> bool:
    if not isinstance(x, fx.Node):
        return False
    a, b = x.meta["val"].shape, node.meta["val"].shape
    return list(map(dimension, a)) == list(map(dimension, b))


def _sub(s: _Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    x, y = a["self"], a["other"]
    if not _scores_like(x, node) or a.get("alpha", 1) != 1:
        return None
    return x if s.added(y, -1.0) else None


def _mul(s: _Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    x, y = a["self"], a["other"]
    if not isinstance(y, fx.Node):
        s.factor *= float(y)
        return x
    if not (_scores_like(x, node) and leads_to_product(x)):
        x, y = y, x
    return x if _scores_like(x, node) and s.scaled(y) else None


def _div(s: _Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    x, y = a["self"], a["other"]
    if not isinstance(y, fx.Node):
        s.factor /= float(y)
        return x
    return x if _scores_like(x, node) and s.scaled(y, divided=True) else None


def _neg(s: _Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    s.factor = -s.factor
    return a["self"]


def _maximum(s: _Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    x, y = a["self"], a["other"]
    if not _scores_like(x, node):
        x, y = y, x
    least = _read(s.reader, y, s.at) if isinstance(y, fx.Node) else None
    if not (_scores_like(x, node) and isinstance(least, Const) and least.value <= -1e30):
        return None
    s.clamped = True
    return x


def _tanh(s: _Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    if s.cap:
        s.why = "the scores are capped twice"
        return None
    s.cap = abs(s.factor)
    return a["self"] if s.cap else None


def _where(s: _Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    condition, x, fill = a["condition"], a["self"], a["other"]
    keep, whole = _read(s.reader, condition, s.at), _whole(condition, s.at)
    if not (isinstance(x, fx.Node) and _scores_like(x, node) and leads_to_product(x)):
        x, fill, keep, whole = fill, x, negation(keep), negation(whole)
    if not (isinstance(x, fx.Node) and _scores_like(x, node)):
        return None
    return x if s.filled(keep, whole, fill) else None


def _masked_fill(s: _Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    keep, whole = (negation(f) for f in (_read(s.reader, a["mask"], s.at), _whole(a["mask"], s.at)))
    return a["self"] if _scores_like(a["self"], node) and s.filled(keep, whole, a["value"]) else None


def _cast(s: _Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    return a["self"] if node.meta["val"].dtype.is_floating_point else None


def _view(s: _Scores, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
    source = a["self"]
    into = tuple(map(dimension, source.meta["val"].shape))
    moved = s.reader.reshaped(tuple(map(dimension, node.meta["val"].shape)), into, s.at)
    if moved is None:
        s.why = "the scores are reshaped on the way to the softmax"
        return None
    s.at = moved
    return source


_STEPS = {
    aten.add.Tensor: _add, aten.sub.Tensor: _sub, aten.mul.Tensor: _mul, aten.div.Tensor: _div, aten.neg.default: _neg,
    aten.tanh.default: _tanh, aten.maximum.default: _maximum,
    aten.where.self: _where, aten.where.ScalarOther: _where, aten.where.ScalarSelf: _where,
    aten.masked_fill.Scalar: _masked_fill, aten.to.dtype: _cast, aten.reshape.default: _view,
    aten.contiguous.default: lambda s, node, a: a["self"],
    aten.clone.default: lambda s, node, a: a["self"],
}  # fmt: skip


def written_out(program: Program, root: fx.Node) -> Match | Miss:
    """Two products around a softmax, `root` being the second."""
    weights, v = root.args
    core, dropout, cut = [root], 0.0, False
    node = weights
    while is_call(node, aten.dropout.default, aten.to.dtype, aten.slice.Tensor):
        a = arguments(node)
        if node.target is aten.dropout.default:
            if dropout and a["train"]:
                return Miss(2, "the weights are dropped twice")
            dropout = float(a["p"]) if a["train"] else dropout
        elif node.target is aten.slice.Tensor:
            cut = True
        core.append(node)
        node = a.get("self", node.args[0])
    if not is_call(node, aten.softmax.int):
        inner = [n for n in getattr(node, "all_input_nodes", ()) if is_call(n, aten.softmax.int)]
        if inner:
            return Miss(2, f"{_name(node)} stands between the softmax and the product with v")
        return Miss(0, "no softmax")
    return _below_softmax(program, root, [*core, node], v, dropout, cut)


def _below_softmax(
    program: Program, root: fx.Node, core: list[fx.Node], v: Any, dropout: float, cut: bool
) -> Match | Miss:
    softmax = core[-1]
    a = arguments(softmax)
    scores, rank = a["self"], a["self"].meta["val"].dim()
    if a["dim"] % rank != rank - 1:
        return Miss(2, f"the softmax is over dimension {a['dim'] % rank} of {rank}, not over the keys")
    if rank not in INDICES:
        return Miss(2, f"the scores have {rank} dimensions; the kernel takes up to 4")
    sink_node = None
    if cut:
        if not (is_call(scores, aten.cat.default) and len(scores.args[0]) == 2 and _cuts_sink(core, scores)):
            return Miss(2, "the weights are sliced before the product with v")
        core.append(scores)
        scores, sink_node = scores.args[0]
    shape = [1] * (4 - rank) + list(scores.meta["val"].shape)
    p = Problem.of(program, shape, scores.meta["val"].dtype)
    walk = _Scores(_reader(program, p), INDICES[rank])
    product = walk.descend(scores)
    if product is None:
        return Miss(3 if walk.core else 2, walk.why)
    return _assembled(program, root, [*core, *walk.core], walk, p, product, v, sink_node, dropout)


def _cuts_sink(core: Sequence[fx.Node], cat: fx.Node) -> bool:
    """Whether the slice drops the last column, which is the sink's."""
    (one,) = [n for n in core if n.target is aten.slice.Tensor][:1]
    a, last = arguments(one), cat.meta["val"].dim() - 1
    width = dimension(cat.args[0][1].meta["val"].shape[-1])
    kept = dimension(one.meta["val"].shape[-1]) == dimension(cat.args[0][0].meta["val"].shape[-1])
    return a["dim"] == last and a["start"] in (0, None) and a["step"] == 1 and width == 1 and kept


def _assembled(
    program: Program, root: fx.Node, core: list[fx.Node], walk: _Scores, p: Problem, product: fx.Node,
    v: Any, sink_node: fx.Node | None, dropout: float,
) -> Match | Miss:  # fmt: skip
    why = []
    if walk.at != INDICES[len(walk.at)] if len(walk.at) in INDICES else True:
        why.append("the scores are reshaped between the product and the softmax")
    sink = None
    if sink_node is not None:
        sink = _read(walk.reader, sink_node, (B, H, Q, ZERO))
        if symbols(sink) & {B.of, Q.of, K.of}:
            why.append("the extra logit is not one a head")
    equal = "nobody" if sink is not None else "bias" if dropout or walk.cap else "kernel"
    found = understand(p, walk.fills, walk.terms, "nan" if sink is None else "zero", equal)
    k, v = operands(product.args[1], v, True)
    wanted = v.node.meta["val"].dtype
    q, k = narrowed(Operand(product.args[0]), wanted), narrowed(k, wanted)
    if walk.clamped and not found.seen:
        why.append("a row may see no key, and its scores are clamped")
    site = Site(
        q, k, v, walk.factor, found, walk.cap, sink, dropout, tuple(walk.factors), tuple(why)
    )
    return _match(program, root, core, site, walk.reader)
