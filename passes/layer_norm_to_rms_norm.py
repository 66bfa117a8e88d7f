"""Turn LayerNorm into RMSNorm where its input can be given a zero mean exactly.

    h = x + linear(a, W, b)                h = x' + linear(a, W - mean(W, 0), b - mean(b))
    y = layer_norm(h, [C], w, c, eps)  =>  y = rms_norm(h, [C], w, eps) + c

Fires on   residual streams (pre-norm GPT-2, OPT, GPT-NeoX, ViT, Whisper): values joined by adds and by
           operations on other dimensions, whose producers are linears, convolutions, embeddings and
           parameters, and which nothing but LayerNorms reads as they are. At most `own` values of a stream,
           and fewer than its norms, are centred by an operation of their own.
Saves      a reduction a norm, and its saved mean; the weights are centred once in inference (as much memory
           as they have), and in training at each call: 3 passes over the weights.
Exact      layer_norm(h) = rms_norm(h - mean(h)), and the mean is linear: each producer, each operation in
           between and each norm is proved by itself. Gradients are the original's, whatever the optimizer:
           the parameters stay, and what reads them is centred.
Source     Jiang et al. 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers", arXiv:2305.14858; Ashkboos et al.
           2024, "SliceGPT", arXiv:2401.15024.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from fxaccel.effects import UNWRITTEN
from fxaccel.ir import Program, Replacement, is_call, without_defaults
from fxaccel.passes._zero_mean import (
    LAYER_NORM,
    OWN,
    TWICE,
    WRITTEN,
    Analysis,
    Place,
    Stream,
    links,
    norm_input,
    rms_norm,
    scaled,
    unfit,
)  # fmt: skip
from fxaccel.rule import Ops, Pass, Refusal, joined, register

aten = torch.ops.aten


@dataclass(frozen=True)
class Conversion:
    """The streams to convert, and the LayerNorms that stay with the sentence that says why."""

    streams: tuple[Stream, ...]
    refused: tuple[tuple[fx.Node, str], ...]

    def __str__(self) -> str:
        parts = []
        for one in self.streams:
            kinds = Counter(one.sources.values())
            made = ", ".join(f"{n} by {how}" for how, n in sorted(kinds.items()))
            parts.append(f"{len(one.norms)} norms of a stream with {len(one.sources)} sources: {made}")
        return "; ".join([*parts, f"{len(self.refused)} LayerNorms stay"])


@register
class LayerNormToRMSNorm(Pass):
    """LayerNorm becomes RMSNorm, exactly, where what it reads can be made zero-mean.

    own               how many values of a stream may be centred by an operation of their own
    even_if_slower    convert on the CPU too, where a LayerNorm is the faster of the two
    fold              put centred weights in the place of the parameters, which saves their centring and their
                      memory; trained, they need not stay centred, and the model becomes one with RMSNorms.
                      The state_dict stays the original's: their mean is kept beside them
    """

    name = "layer-norm-to-rms-norm"
    step = "raise"
    requires = ("canonical-norms",)

    own: int = 1
    even_if_slower: bool = False
    fold: bool = False

    def plan(self, program: Program) -> Conversion:
        """Find the streams."""
        norms = [n for n in program.graph.nodes if is_call(n, LAYER_NORM) and self.covers(n)]
        why = {n: joined(unfit(n, self.even_if_slower)) for n in norms}
        refused = [(n, w) for n, w in why.items() if w]
        streams, left = self.streams(program, [n for n in norms if not why[n]], tables=False)
        if not program.grad:  # tables are centred once
            more, left = self.streams(program, [n for n, _ in left], tables=True)
            streams += more
        return Conversion(tuple(streams), tuple(sorted([*refused, *left], key=lambda pair: pair[0])))

    def streams(
        self, program: Program, norms: list[fx.Node], tables: bool
    ) -> tuple[list[Stream], list[tuple[fx.Node, str]]]:
        """Those that may be converted, and the norms of the others with the reason."""
        found, good, bad = Analysis(program, norms, tables), list[Stream](), list[tuple[fx.Node, str]]()
        for stream in found.streams():
            why = self.refusal(found, stream)
            bad += [(n, why) for n in stream.norms if why]
            good += [] if why else [stream]
        return good, bad

    def refusal(self, found: Analysis, stream: Stream) -> str:
        """Why a stream stays as it is, "" for no reason."""
        for (node, _), how in stream.sources.items():
            if how in (WRITTEN, TWICE):
                why = f"%{node.name} of its stream {how}"
                return Refusal(why, UNWRITTEN) if how == WRITTEN else why
        own = stream.own()
        if len(own) <= self.own and len(own) < len(stream.norms):
            return ""
        reasons = Counter(found.why(t) for p in own for t in stream.terms.get(p, [p]))
        told = "; ".join(f"{w}{f' ({n} times)' if n > 1 else ''}" for w, n in reasons.most_common(3))
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        limit = f"more than own={self.own}" if len(own) > self.own else "which costs what its norms save"
        values = f"{len(own)} values" if len(own) > 1 else "a value"
        why = f"{values} of its stream would be centred at each call, {limit}: {told}{more}"
        return Refusal(why, f"own={len(own)}") if len(own) < len(stream.norms) else why

    def apply(self, program: Program, plan: Conversion, driver: Any) -> None:
        """Centre the sources, and exchange the norms."""
        for norm, why in plan.refused:
            driver.refused(norm, why)
        streams = [_Rewriting(program, driver, stream) for stream in plan.streams]
        for one in streams:
            one.prepare()
        for one in streams:
            for norm in one.stream.norms:
                new = one.norm(norm)
                for other in streams:
                    other.follow(norm, new)
        folded = [r for r in program.replacements if r.by == self.name]
        if folded and program.grad:
            program.notes.append(
                f"{self.name} has folded the centring into {len(folded)} parameters: after a step of "
                "training they need not be centred, and the model is not the original any more"
            )


def centre(op: Ops, x: Any, axis: int) -> Any:
    """x - mean(x) over its channels."""
    return op.aten.sub.Tensor(x, op.aten.mean.dim(x, [axis], True))


class _Rewriting:
    """One stream, from its sources to its norms. Each step is proved by itself, for any input:

    a source with centred weights = its result centred
    a link of centred values      = its result centred
    rms_norm of a centred value   = layer_norm of the value
    """

    def __init__(self, program: Program, driver: Any, stream: Stream) -> None:
        self.program, self.driver, self.stream = program, driver, stream
        self.zero_mean: dict[Place, fx.Node] = {}
        self.folded: dict[fx.Node, fx.Node] = {}

    def prepare(self) -> None:
        """Centre all that the norms read."""
        for place, how in self.stream.sources.items():
            self.zero_mean[place] = self.source(place, how)
        for place in self.stream.links:
            self.zero_mean[place] = self.link(place)

    def follow(self, old: fx.Node, new: fx.Node) -> None:
        """Know a norm that was exchanged: without a weight it is a source of the stream behind it."""
        if any(node is old for node, _ in self.zero_mean):
            known = self.zero_mean.items()
            self.zero_mean = {
                (new if n is old else n, axis): new if v is old else v for (n, axis), v in known
            }

    def source(self, place: Place, how: str) -> fx.Node:
        """Centre what of a source is to be centred; returns the zero-mean value."""
        node, axis = place
        if how == "nothing":
            self.prove("zero-mean", node, centred=axis, after=lambda op, of: op(node.target, *of(node.args)))
            return node
        if how in (OWN, "state"):
            first = min(node.users) if node.op == "placeholder" else node.next
            with self.program.graph.inserting_before(first):
                like = first if node.op == "placeholder" else node
                return centre(self.driver.ops(like), node, axis)
        target, build, inside = _with_centred_weights(node, how)
        self.prove(
            "weights", node, centred=axis, after=lambda op, of: op(target, *build(op, of)), inside=inside
        )
        with self.program.graph.inserting_before(node):
            whole = self.driver.one.fold and how == "weights"
            args = self.replaced(node) if whole else build(self.driver.ops(node), lambda x: x)
        node.target, node.args = target, without_defaults(target, args)
        node.meta["by"] = self.driver.one.name
        return node

    def replaced(self, node: fx.Node) -> tuple[Any, ...]:
        """The arguments of a linear or convolution with centred parameters in the place of its own."""
        x, w, b, *rest = (*node.args, None)[: max(3, len(node.args))]
        return x, self.parameter(node, w), None if b is None else self.parameter(node, b), *rest

    def parameter(self, node: fx.Node, w: fx.Node) -> fx.Node:
        """The parameter w centred for good, or at each call where something else reads it as it is."""
        turned = is_call(w, aten.permute.default) and w.args[1] == [1, 0]
        old = w.args[0] if turned else w
        if old not in self.folded:
            slot = self.program.state.get(old.name)
            readers = {r for u in old.users for r in (u.users if u.target is aten.permute.default else [u])}
            own = {n for (n, _), how in self.stream.sources.items() if how == "weights"}
            tied = slot is not None and any(slot.name in names for names in self.program.ties)
            if slot is None or slot.kind != "parameter" or tied or not readers <= own:
                return centre(self.driver.ops(node), w, 0)
            val, dim = old.meta["val"], int(turned)
            one = Replacement(
                self.driver.one.name, (slot.name,), (f"{slot.name}_centred", f"{slot.name}_mean"),
                partial(_parted, dim), _joined,
            )  # fmt: skip
            with val.fake_mode:
                vals = _parted(dim, torch.empty_like(val))
            self.folded[old] = self.program.replace_parameters(one, vals)[0]
        new = self.folded[old]
        return self.driver.call(node, aten.permute.default, new, [1, 0]) if turned else new

    def link(self, place: Place) -> fx.Node:
        """Let a link read centred values."""
        node, axis = place
        operands = dict(links(node, axis) or ())

        def after(op: Ops, of: Any) -> Any:
            read = {x: of(x) for x in node.all_input_nodes}
            read |= {x: centre(op, read[x], at) for x, at in operands.items()}
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), read.__getitem__)
            return op(node.target, *args, **kwargs)

        self.prove("link", node, centred=axis, after=after)
        for x, at in operands.items():
            node.replace_input_with(x, self.zero_mean[x, at])
        return node

    def norm(self, norm: fx.Node) -> fx.Node:
        """Exchange a norm, whose input is centred by now; returns the new one."""
        x, axis = norm_input(norm)
        proof = self.prove("norm", norm, after=lambda op, of: rms_norm(op, norm, centre(op, of(x), axis), of))
        with self.program.graph.inserting_before(norm):
            new = rms_norm(self.driver.ops(norm), norm, self.zero_mean[x, axis])
        what = f"one of {len(self.stream.norms)} norms of a stream with {len(self.stream.sources)} sources"
        self.driver.applied(norm, what, proof=proof.key)
        self.driver.exchange(norm, new)
        return new

    def prove(
        self,
        step: str,
        node: fx.Node,
        *,
        after: Any,
        centred: int | None = None,
        inside: tuple[fx.Node, ...] = (),
    ) -> Any:
        """That `after` is what a node computes with those `inside`, centred over a dimension if given."""

        def before(op: Ops, of: Any) -> Any:
            known = {n: op(n.target, *of(n.args)) for n in inside}
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: known.get(n) or of(n))
            y = op(node.target, *args, **kwargs)
            return y if centred is None else centre(op, y, centred)

        nodes = [node, *inside]
        read = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside)
        return self.driver.lemma(f"{type(self.driver.one).__name__}: {step}", node, list(read), before, after)


def _parted(dim: int, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight without its mean over the outputs, and that mean."""
    mean = w.mean(dim, keepdim=True)
    return w - mean, mean


def _joined(centred: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor]:
    return (centred + mean,)


def _with_centred_weights(node: fx.Node, how: str) -> tuple[Any, Any, tuple[fx.Node, ...]]:
    """The target of a source with centred weights, its arguments given Ops and what stands for a node, and
    the nodes that it takes in."""
    if how == "table":
        table, *rest = node.args
        return node.target, lambda op, of: (centre(op, of(table), 1), *of(rest)), ()
    linear, scale = (scaled(node) or (node, None)) if how == "scaled weights" else (node, None)
    x, w, b, *rest = (*linear.args, None)[: max(3, len(linear.args))]

    def build(op: Ops, of: Any) -> tuple[Any, ...]:
        w_, b_ = of(w), of(b)
        if scale is not None:
            w_ = op.aten.mul.Tensor(w_, op.aten.unsqueeze.default(of(scale), 1))
            b_ = None if b is None else op.aten.mul.Tensor(b_, of(scale))
        return of(x), centre(op, w_, 0), None if b is None else centre(op, b_, 0), *of(rest)

    return linear.target, build, () if scale is None else (linear,)
