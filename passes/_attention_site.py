"""Finds attention in a graph: called as one operator, or written out as two products around a softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from fxaccel.effects import written
from fxaccel.indexing import ZERO, Affine, Range, Read, Value, compare, dimension, index, symbols
from fxaccel.ir import Program, arguments, incremental, is_call
from fxaccel.passes._attention_mask import understand
from fxaccel.passes._attention_scores import Scores, chain, element, named, untouched
from fxaccel.passes._attention_terms import Fill, H, K, Mask, Problem, Q, Term
from fxaccel.reading import Reader, Views
from fxaccel.rule import Match, Miss, Ops

aten = torch.ops.aten


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


def called(program: Program, root: fx.Node) -> Match | Miss:
    """A call of scaled_dot_product_attention."""
    a = arguments(root)
    q, k, v = a["query"], a["key"], a["value"]
    (*batch, d), t = q.meta["val"].shape, k.meta["val"].shape[-2]
    p = Problem.of(program, (*batch, t), q.meta["val"].dtype)
    reader = _reader(program, p)
    fills, terms = list[Fill](), list[Term]()
    if a["is_causal"]:
        keep = compare("le", K, Q, p.known)
        fills.append(Fill(keep, -math.inf, False, keep))
    if a["attn_mask"] is not None:
        mask = a["attn_mask"]
        value, whole = element(reader, mask, p.indices), untouched(mask, p.indices)
        if mask.meta["val"].dtype is torch.bool:
            fills.append(Fill(value, -math.inf, False, whole))
        else:
            terms.append(Term(value, whole))
    scale = a["scale"]
    if scale is None and dimension(d).is_number:
        scale = 1 / math.sqrt(int(dimension(d)))
    found = understand(p, fills, terms, "zero")
    site = Site(Operand(q), *operands(k, v, False), scale, found, dropout=float(a["dropout_p"]))
    return _match(program, root, [root], site, reader)


def written_out(program: Program, root: fx.Node) -> Match | Miss:
    """Two products around a softmax, `root` being the second."""
    node, v = root.args
    core, dropout, cut = [root], 0.0, False
    while is_call(node, *_BETWEEN):
        a = arguments(node)
        if node.target is aten.dropout.default:
            if dropout and a["train"]:
                return Miss(2, "the weights are dropped twice", "one dropout of the weights")
            dropout = float(a["p"]) if a["train"] else dropout
        elif node.target is aten.slice.Tensor:
            cut = True
        core.append(node)
        node = a.get("self", node.args[0])
    if not is_call(node, aten.softmax.int):
        if _comes_from_softmax(node):
            why = f"{named(node)} stands between the softmax and the product with v"
            return Miss(2, why, "the weights as the softmax makes them, or a dropout of them")
        return Miss(0, "no softmax")
    return _below_softmax(program, root, [*core, node], v, dropout, cut)


_BETWEEN = (
    aten.dropout.default, aten.to.dtype, aten.slice.Tensor, aten.reshape.default, aten.contiguous.default,
    aten.clone.default,
)  # fmt: skip


def _comes_from_softmax(node: Any, depth: int = 6) -> bool:
    """Whether the values of a softmax reach the node in a few steps."""
    if is_call(node, aten.softmax.int):
        return True
    inputs = getattr(node, "all_input_nodes", ())[:2] if depth else ()
    return any(_comes_from_softmax(n, depth - 1) for n in inputs)


def _below_softmax(
    program: Program, root: fx.Node, core: list[fx.Node], v: Any, dropout: float, cut: bool
) -> Match | Miss:
    softmax = core[-1]
    a = arguments(softmax)
    scores, rank = a["self"], a["self"].meta["val"].dim()
    if a["dim"] % rank != rank - 1:
        why = f"the softmax is over dimension {a['dim'] % rank} of {rank}, not over the keys"
        return Miss(2, why, "softmax(scores, -1)")
    sink_node = None
    if cut:
        if not (is_call(scores, aten.cat.default) and len(scores.args[0]) == 2 and _cuts_sink(core, scores)):
            return Miss(
                2, "the weights are sliced before the product with v", "k, v and mask sliced in their place"
            )
        core.append(scores)
        scores, sink_node = scores.args[0]
    shapes = [n.meta["val"].shape for n in (root.args[0], *chain(scores))]
    p = Problem.of(program, max(shapes, key=len), scores.meta["val"].dtype)
    reader = _reader(program, p)
    at = _above_scores(reader, p, core)
    if at is None:
        why = "the weights are reshaped between the softmax and the product with v"
        return Miss(2, why, "v reshaped in their place")
    walk = Scores(reader, at)
    product = walk.descend(scores)
    if product is None:
        return Miss(3 if walk.core else 2, walk.why)
    return _assembled(program, root, [*core, *walk.core], walk, p, product, v, sink_node, dropout)


def _above_scores(reader: Reader, p: Problem, core: Sequence[fx.Node]) -> tuple[Value, ...] | None:
    """The indices of the scores under the softmax: those of the weights, through what reshapes them."""
    at = _indices(reader, p, core[0].args[0])
    for node in core[1:]:
        if at is not None and node.target is aten.reshape.default:
            shape, below = (list(map(dimension, n.meta["val"].shape)) for n in (node, node.args[0]))
            at = reader.reshaped(shape, below, at)
    return at if at is not None and at[-1] == K else None


def _indices(reader: Reader, p: Problem, node: fx.Node) -> tuple[Value, ...] | None:
    """The indices of scores or weights, in terms of those of the problem."""
    shape = tuple(map(dimension, node.meta["val"].shape))
    sizes = [p.known.sizes[i.of] for i in p.indices]
    if all(size == 1 for size in sizes[: len(sizes) - len(shape)]):
        return p.at(len(shape))
    return reader.reshaped(sizes, shape, p.indices)


def _cuts_sink(core: Sequence[fx.Node], cat: fx.Node) -> bool:
    """Whether the slice drops the last column, which is the sink's."""
    (one,) = [n for n in core if n.target is aten.slice.Tensor][:1]
    a, last = arguments(one), cat.meta["val"].dim() - 1
    width = dimension(cat.args[0][1].meta["val"].shape[-1])
    kept = dimension(one.meta["val"].shape[-1]) == dimension(cat.args[0][0].meta["val"].shape[-1])
    return a["dim"] == last and a["start"] in (0, None) and a["step"] == 1 and width == 1 and kept


def _assembled(
    program: Program, root: fx.Node, core: list[fx.Node], walk: Scores, p: Problem, product: fx.Node,
    v: Any, sink_node: fx.Node | None, dropout: float,
) -> Match | Miss:  # fmt: skip
    why = []
    own = _indices(walk.reader, p, product)
    if walk.at != own or (len(own) < 4 and own != p.at(len(own))):
        why.append("the scores are reshaped between the product and the softmax")
    sink = None
    if sink_node is not None:
        sink = element(walk.reader, sink_node, (*p.indices[:-1], ZERO))
        if symbols(sink) & {i.of for i in p.indices if i != H}:
            why.append("the extra logit is not one a head")
    without_key = "nan" if sink is None else "zero"
    found = understand(p, walk.fills, walk.terms, without_key, sink=sink is not None)
    k, v = operands(product.args[1], v, True)
    wanted = v.node.meta["val"].dtype
    q, k = narrowed(Operand(product.args[0]), wanted), narrowed(k, wanted)
    if walk.clamped and not found.seen:
        why.append("a row may see no key, and its scores are clamped")
    site = Site(q, k, v, walk.factor, found, walk.cap, sink, dropout, tuple(walk.factors), tuple(why))
    return _match(program, root, core, site, walk.reader)


def _match(program: Program, root: fx.Node, core: Sequence[fx.Node], site: Site, reader: Reader) -> Match:
    opened = {*reader.opened, *site.q.passed, *site.k.passed, *site.v.passed}
    also = _above(core, opened - {t.source for t in site.mask.tables})
    bound = {"site": site, "q": site.q.node, "k": site.k.node, "v": site.v.node}
    return Match(program, root, bound, dict(enumerate(core)), outputs=(root,), also=also)


def _above(core: Sequence[fx.Node], opened: set[fx.Node]) -> frozenset[fx.Node]:
    """The opened nodes that the core is computed from, through such nodes alone."""
    found, queue = set[fx.Node](), list(core)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node in opened and node not in found and node not in core:
                found.add(node)
                queue.append(node)
    return frozenset(found)


def _reader(program: Program, p: Problem) -> Reader:
    return Reader(p.known, (Q.of, K.of), program.facts(written), program.facts(numbers))


@incremental(lambda program, found, made: None)  # of placeholders
def numbers(program: Program) -> dict[fx.Node, Any]:
    """The constants of the graph that are one number (an analysis)."""
    slots = ((n, program.state.get(n.name)) for n in program.graph.find_nodes(op="placeholder"))
    found = {n: program.constants[s.name] for n, s in slots if s is not None and s.kind == "constant"}
    return {n: t.item() for n, t in found.items() if t.dim() == 0}


def padded(shape: Sequence[Any]) -> list[Any]:
    """Sizes of q, k or v as four dimensions: what comes before the heads is one."""
    sizes = [1] * (4 - len(shape)) + list(shape)
    return [math.prod(sizes[:-3]), *sizes[-3:]]


def narrowed(x: Operand, wanted: torch.dtype) -> Operand:
    """q or k before a cast to a wider dtype than v's, which the kernel makes itself."""
    node = x.node
    if is_call(node, aten.to.dtype) and node.args[0].meta["val"].dtype == wanted != node.meta["val"].dtype:
        return replace(x, node=node.args[0], passed=(*x.passed, node))
    return x


def operands(k: fx.Node, v: fx.Node, transposed: bool) -> tuple[Operand, Operand]:
    """k, which may be given as [.., D, T], and v, repeated heads taken apart in both or in neither."""
    size = dimension(padded(k.meta["val"].shape)[1])
    count = int(size) if size.is_number else 1
    for n in range(count, 1, -1):
        if count % n == 0 and k.meta["val"].dim() >= 4:
            fewer_k, fewer_v = _unviewed(k, n, transposed), _unviewed(v, n, False)
            if fewer_k is not None and fewer_v is not None:
                return fewer_k, fewer_v
    rank = k.meta["val"].dim()
    swapped = Operand(k, (*range(rank - 2), rank - 1, rank - 2)) if transposed else Operand(k)
    return (_unviewed(k, 1, True) or swapped) if transposed else swapped, Operand(v)


def _unviewed(x: fx.Node, n: int, transposed: bool) -> Operand | None:
    """The tensor below views of which `x` is a permutation, each head n times."""
    before = x.meta["val"].dim() - 3
    names = [*(index(f"b{n}") for n in range(before)), *map(index, "gij")][max(-before, 0) :]
    copy, sizes = index("r"), list(map(dimension, x.meta["val"].shape))
    ranges = dict(zip((i.of for i in names), sizes, strict=True)) | {copy.of: sympy.Integer(n)}
    at = list(names)
    if n > 1:
        ranges[names[-3].of] = sizes[-3] / n
        at[-3] = Affine(names[-3].of * n + copy.of)
    wanted = [*names[:-2], names[-1], names[-2]] if transposed else names
    wanted = [ZERO if ranges[i.of] == 1 else i for i in wanted]
    views, here, best = Views(Range(ranges)), Read(x, tuple(at)), None
    passed: list[fx.Node] = []
    while True:
        if (passed or n == 1) and sorted(map(str, here.at)) == sorted(map(str, wanted)):
            best = Operand(here.node, _order(here.at, wanted), tuple(passed))
        below = views.below(here)
        if below is None:
            return best
        passed.append(here.node)
        here = below


def _order(at: Sequence[Value], wanted: Sequence[Value]) -> tuple[int, ...]:
    """For each wanted index the dimension that it is in, each dimension once."""
    left, order = list(range(len(at))), list[int]()
    for i in wanted:
        spot = next(j for j in left if at[j] == i)
        left.remove(spot)
        order.append(spot)
    return tuple(order)
