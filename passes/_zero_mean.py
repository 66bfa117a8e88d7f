"""Which values of a graph can be made zero-mean over their channels, so that a LayerNorm is an RMSNorm.

Let C x = x - mean(x). Where every reader of x takes C x as well as x itself, x may be replaced by C x, and
what x is made of by whatever makes C x of it. One pass over the graph, last node first, finds out of every
value whether it is needed as it is, needed centred, or both:

norm       layer_norm(x) = rms_norm(C x): it needs x centred
link       an operation on the other dimensions, C f(u, v) = f(C u, C v): it needs what is needed of it
source     anything else; its weights are centred, if it is a linear, a convolution or a parameter, and
           otherwise its result, by an operation of its own

A value that is needed both ways is computed as it is and centred by an operation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from fxaccel.effects import is_random, written
from fxaccel.ir import Program, arguments, expr, is_call, is_tensor, source, target_name
from fxaccel.passes._advice import EVEN_IF_SLOWER, LAST, ONE_DTYPE
from fxaccel.rule import Ops, Refusal

aten = torch.ops.aten
LAYER_NORM = aten.layer_norm.default
_SHAPE_ONLY = {
    aten.sym_size.int, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.empty_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
    aten.new_empty.default,
}  # fmt: skip

Place = tuple[fx.Node, int]
"""A value and the dimension of its channels."""


def shape(node: fx.Node) -> list[sympy.Expr]:
    """Sizes of a tensor's dimensions."""
    return [expr(s) for s in node.meta["val"].shape]


def is_value(x: Any) -> bool:
    """Whether it is a node that computes a tensor."""
    return isinstance(x, fx.Node) and is_tensor(x.meta.get("val"))


# -- links: what must be centred for their result to be --------------------------------------------


def links(node: fx.Node, axis: int) -> list[Place] | None:
    """The operands of a link with their channels, where `axis` has those of its result; None for no link."""
    rule = _LINKS.get(node.target) if node.op == "call_function" else None
    found = rule(node, arguments(node), axis) if rule is not None else None
    if not found or len(dict(found)) < len(set(found)):  # one value by two of its dimensions
        return None
    good = all(is_value(x) and at >= 0 and shape(x)[at] == shape(node)[axis] for x, at in found)
    return found if good else None


def _aligned(node: fx.Node, x: Any, axis: int) -> int:
    """The dimension of x that is broadcast to `axis` of the node; negative where it has none."""
    return axis - node.meta["val"].dim() + x.meta["val"].dim()


def _even(node: fx.Node, x: Any, axis: int) -> bool:
    """Whether x is the same for all channels."""
    return not is_value(x) or _aligned(node, x, axis) < 0 or shape(x)[_aligned(node, x, axis)] == 1


def _sum(node: fx.Node, a: dict[str, Any], axis: int) -> list[Place] | None:
    terms = (a["self"], a["other"])
    return [(x, _aligned(node, x, axis)) for x in terms] if all(map(is_value, terms)) else None


def _scaled(node: fx.Node, a: dict[str, Any], axis: int) -> list[Place] | None:
    x, scale = a["self"], a["other"]
    if node.target is aten.mul.Tensor and _even(node, x, axis):
        x, scale = scale, x
    return [(x, _aligned(node, x, axis))] if is_value(x) and _even(node, scale, axis) else None


def _same(node: fx.Node, a: dict[str, Any], axis: int) -> list[Place] | None:
    x: Any = a.get("self", a.get("input"))
    floats = is_value(x) and x.meta["val"].is_floating_point() and node.meta["val"].is_floating_point()
    return [(x, axis)] if floats and not is_random(node) else None


def _reshaped(node: fx.Node, a: dict[str, Any], axis: int) -> list[Place] | None:
    """The channels stay one dimension where as many elements lie behind it before and after."""
    sizes, of = shape(a["self"]), shape(node)
    behind = sympy.prod(of[axis + 1 :])
    found = [i for i, n in enumerate(sizes) if n == of[axis] and sympy.prod(sizes[i + 1 :]) == behind]
    return [(a["self"], found[0])] if found else None


def _permuted(node: fx.Node, a: dict[str, Any], axis: int) -> list[Place] | None:
    return [(a["self"], a["dims"][axis] % len(a["dims"]))]


def _swapped(node: fx.Node, a: dict[str, Any], axis: int) -> list[Place] | None:
    rank = node.meta["val"].dim()
    i, j = a["dim0"] % rank, a["dim1"] % rank
    return [(a["self"], {i: j, j: i}.get(axis, axis))]


def _expanded(node: fx.Node, a: dict[str, Any], axis: int) -> list[Place] | None:
    return [(a["self"], _aligned(node, a["self"], axis))]


def _cut(node: fx.Node, a: dict[str, Any], axis: int) -> list[Place] | None:
    dim = a["dim"] % a["self"].meta["val"].dim()
    at = axis + (node.target is aten.select.int and axis >= dim)
    return [(a["self"], at)] if at != dim else None


def _joined(node: fx.Node, a: dict[str, Any], axis: int) -> list[Place] | None:
    dim = a["dim"] % node.meta["val"].dim()
    at = axis - (node.target is aten.stack.default and axis > dim)
    return [(x, at) for x in a["tensors"]] if axis != dim else None


def _filled(node: fx.Node, a: dict[str, Any], axis: int) -> list[Place] | None:
    good = a["value"] == 0 and _even(node, a["mask"], axis)
    return [(a["self"], _aligned(node, a["self"], axis))] if good else None


def _chosen(node: fx.Node, a: dict[str, Any], axis: int) -> list[Place] | None:
    return _sum(node, a, axis) if _even(node, a["condition"], axis) else None


def _pooled(node: fx.Node, a: dict[str, Any], axis: int) -> list[Place] | None:
    rank = a["self"].meta["val"].dim()
    dims = {d % rank for d in a["dim"] or range(rank)}
    kept = [i for i in range(rank) if a["keepdim"] or i not in dims]
    return [(a["self"], kept[axis])] if kept[axis] not in dims else None


_LINKS: dict[Any, Callable[[fx.Node, dict[str, Any], int], list[Place] | None]] = {
    **dict.fromkeys([aten.add.Tensor, aten.sub.Tensor], _sum),
    **dict.fromkeys([aten.mul.Tensor, aten.div.Tensor], _scaled),
    **dict.fromkeys(
        [
            aten.to.dtype, aten.neg.default, aten.clone.default, aten.contiguous.default, aten.detach.default,
            aten.alias.default, aten.dropout.default,
        ],
        _same,
    ),
    **dict.fromkeys(
        [
            aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
            aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
        ],
        _reshaped,
    ),
    aten.permute.default: _permuted,
    aten.transpose.int: _swapped,
    aten.expand.default: _expanded,
    **dict.fromkeys([aten.slice.Tensor, aten.select.int, aten.index_select.default], _cut),
    **dict.fromkeys([aten.cat.default, aten.stack.default], _joined),
    aten.masked_fill.Scalar: _filled,
    aten.where.self: _chosen,
    **dict.fromkeys([aten.mean.dim, aten.sum.dim_IntList], _pooled),
}  # fmt: skip


# -- sources ---------------------------------------------------------------------------------------

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
OWN, WRITTEN, TWICE = "its result", "is written in place", "is read along two of its dimensions"


def producer(program: Program, place: Place, tables: bool) -> str:
    """What of a source is centred: its "weights", its "scaled weights", the rows of its "table", a "state"
    tensor, "nothing" where its mean is 0 already; OWN where only its result can be."""
    node, axis = place
    if node.op == "placeholder":
        return "state" if node.name in program.state else OWN
    a, last = arguments(node), axis == node.meta["val"].dim() - 1
    if is_call(node, aten.linear.default) and last:
        return "weights"
    if is_call(node, *_CONVOLUTIONS) and a["groups"] == 1:
        return "weights" if axis == node.meta["val"].dim() - a["weight"].meta["val"].dim() + 1 else OWN
    if is_call(node, aten.embedding.default) and last and tables:
        return "table"
    if is_call(node, aten.mul.Tensor) and last and scaled(node) is not None:
        return "scaled weights"
    if is_call(node, LAYER_NORM) and last and a["weight"] is None and a["bias"] is None:
        return "nothing" if over_last(node) else OWN
    return OWN


def scaled(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The linear and the vector whose product the node is, where nothing else reads the linear."""
    for x, s in (node.args, reversed(node.args)):
        if is_call(x, aten.linear.default) and len(x.users) == 1 and is_value(s) and s.meta["val"].dim() == 1:
            return x, s
    return None


def over_last(norm: fx.Node) -> bool:
    """Whether a LayerNorm normalises over the last dimension alone."""
    return len(norm.args[1]) == 1


# -- the analysis ----------------------------------------------------------------------------------


@dataclass
class Stream:
    """Values that are centred together.

    norms      the LayerNorms that become RMSNorms
    links      the operations in between
    sources    place -> what is centred of it, as `producer` says
    terms      sum that is centred instead of its terms -> those of them that would be too
    """

    norms: list[fx.Node] = field(default_factory=list)
    links: list[Place] = field(default_factory=list)
    sources: dict[Place, str] = field(default_factory=dict)
    terms: dict[Place, list[Place]] = field(default_factory=dict)

    def own(self) -> list[Place]:
        """The values that are centred by an operation of their own."""
        return [p for p, how in self.sources.items() if how == OWN]

    def hoist(self) -> None:
        """Centre sums of such values instead of their terms, where nothing else reads the terms centred."""
        readers: dict[Place, int] = {}
        read = [p for link in self.links for p in links(*link) or ()]
        for place in [*read, *map(norm_input, self.norms)]:
            readers[place] = readers.get(place, 0) + 1
        for link in list(self.links):
            operands = dict.fromkeys(links(*link) or ())
            how = [self.sources.get(p) for p in operands]
            good = not {None, WRITTEN, TWICE}.intersection(how)
            if good and OWN in how and all(readers[p] == 1 for p in operands):
                self.links.remove(link)
                own = [p for p in operands if self.sources.pop(p) == OWN]
                self.terms[link] = [t for p in own for t in self.terms.pop(p, [p])]
                self.sources[link] = OWN


def unfit(norm: fx.Node, even_if_slower: bool) -> Iterator[str]:
    """Why an RMSNorm cannot take the place of this LayerNorm, whatever it reads."""
    x, dtypes = norm.meta["val"], {n.meta["val"].dtype for n in norm.args[:4] if is_value(n)}
    if not over_last(norm):
        yield Refusal(f"it normalises over {len(norm.args[1])} dimensions; an RMSNorm is over one", LAST)
    if len(dtypes) > 1:
        told = ", ".join(sorted(map(str, dtypes)))
        yield Refusal(f"its input and weights are of dtypes {told}", ONE_DTYPE)
    if x.device.type == "cpu" and not even_if_slower:
        yield Refusal("on the CPU a LayerNorm is one fused kernel and the faster of the two", EVEN_IF_SLOWER)


def rms_norm(op: Ops, norm: fx.Node, x: Any, of: Callable[[Any], Any] = lambda v: v) -> Any:
    """A LayerNorm's RMSNorm of x, with its bias; `of(v)` stands for its weights."""
    _, dims, w, b, eps, _ = arguments(norm).values()
    y = op.aten.rms_norm.default(x, dims, of(w), eps)
    return y if b is None else op.aten.add.Tensor(y, of(b))


def norm_input(norm: fx.Node) -> Place:
    """What a LayerNorm normalises."""
    x = norm.args[0]
    return x, x.meta["val"].dim() - 1


class Analysis:
    """What is needed of every value if all of `norms` become RMSNorms."""

    def __init__(self, program: Program, norms: Iterable[fx.Node], tables: bool) -> None:
        self.program, self.norms, self.tables = program, set(norms), tables
        self.raw: set[fx.Node] = set()
        self.centred: dict[fx.Node, list[int]] = {}
        self.parent: dict[Any, Any] = {}
        self.links: list[Place] = []
        self.sources: dict[Place, str] = {}
        self.writers = program.facts(written)
        for node in reversed(program.graph.nodes):
            self.visit(node)

    def visit(self, node: fx.Node) -> None:
        axes = self.centred.get(node, [])
        if node in self.norms:
            self.need(node, norm_input(node))
            self.raw.update(a for a in node.args[2:4] if a is not None)
            for axis in axes:
                self.sources[node, axis] = self.produced((node, axis))
        else:
            if not axes and node.target not in _SHAPE_ONLY:
                self.raw.add(node)
            for axis in axes:
                self.place((node, axis), len(axes) > 1)
            if node in self.raw:
                self.raw.update(node.all_input_nodes)

    def place(self, place: Place, twice: bool) -> None:
        node, _ = place
        operands = links(*place)
        if node in self.raw or node in self.writers or twice or operands is None:
            self.sources[place] = TWICE if twice else self.produced(place)
            self.raw.update(node.all_input_nodes)
            return
        self.links.append(place)
        for operand in operands:
            self.need(place, operand)
        self.raw.update(set(node.all_input_nodes).difference(x for x, _ in operands))

    def produced(self, place: Place) -> str:
        if place[0] in self.writers:
            return WRITTEN
        return OWN if place[0] in self.raw else producer(self.program, place, self.tables)

    def need(self, by: Any, place: Place) -> None:
        axes = self.centred.setdefault(place[0], [])
        if place[1] not in axes:
            axes.append(place[1])
        self.parent[self.root(by)] = self.root(place)

    def root(self, x: Any) -> Any:
        while self.parent.setdefault(x, x) != x:
            x = self.parent[x]
        return x

    def streams(self) -> list[Stream]:
        """The values that hang together, in the graph's order."""
        found: dict[Any, Stream] = {}
        for norm in sorted(self.norms):
            found.setdefault(self.root(norm), Stream()).norms.append(norm)
        for link in reversed(self.links):
            found[self.root(link)].links.append(link)
        for place in reversed(self.sources):
            found[self.root(place)].sources[place] = self.sources[place]
        for stream in found.values():
            stream.hoist()
        return list(found.values())

    def why(self, place: Place) -> str:
        """Why a value is not made zero-mean by weights."""
        node, what = place[0], _at(place[0])
        able = links(*place) or producer(self.program, place, self.tables) != OWN
        found = self.reader(node) if able else None
        if found is not None:
            value, reader = found
            how = "returned" if reader.op == "output" else f"also read by {_at(reader)} as it is"
            return f"the value of {_at(value)} is {how}"
        if node.op == "placeholder":
            return f"the input %{node.name} has whatever mean the caller gives it"
        if is_call(node, aten.dropout.default):
            return f"{what} drops single channels between a producer and the stream"
        if is_call(node, aten.mul.Tensor, aten.div.Tensor) and _channels(node):
            return f"{what} scales the channels one by one"
        if is_call(node, LAYER_NORM):
            return f"the weight and bias of {what} give its result a mean"
        if is_call(node, aten.embedding.default):
            return f"the table of {what} would be centred at each step"
        if is_call(node, *_CONVOLUTIONS):
            return f"{what} makes its channels in groups, of different inputs"
        return f"{what} has no weights of its own that could be centred"

    def reader(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Who needs a value, or what is added up from it, as it is."""
        centred = {n for n, _ in self.links} | self.norms
        readers = [u for u in node.users if u not in centred and u.target not in _SHAPE_ONLY]
        sums = [u for u in readers if any(node in dict(links(u, i) or ()) for i in _dimensions(u))]
        further = next(filter(None, map(self.reader, sums)), None)
        return further or ((node, readers[0]) if readers else None)


def _at(node: fx.Node) -> str:
    return target_name(node.target) + (f" at {source(node)}" if source(node) else "")


def _dimensions(node: fx.Node) -> range:
    return range(node.meta["val"].dim() if is_value(node) else 0)


def _channels(node: fx.Node) -> bool:
    return all(is_value(x) and shape(x)[-1:] == shape(node)[-1:] for x in node.args)
