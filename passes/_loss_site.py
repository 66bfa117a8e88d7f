"""Finds the cross entropy of a linear's results in a graph, and what stands between the two.

From the loss down: shapes that keep the vocabulary where it is, slices of rows, a log_softmax where the loss
is the negative log likelihood, a cast to float32, a scale, a softcap; then the linear.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxaccel.ir import Program, arguments, expr, is_call, source, target_name
from fxaccel.rule import Match, Miss, Refusal

aten = torch.ops.aten

ROOTS = frozenset({
    aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.mean.dim, aten.sum.dim_IntList,
    aten.neg.default, aten.add.Tensor,
})  # fmt: skip
_SHAPES = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dims)
_CUTS = (aten.slice.Tensor, aten.select.int)
_REDUCTIONS = ("none", "mean", "sum")


@dataclass
class Logits:
    """The way from a loss down to the linear whose results it is of.

    axis       of the vocabulary
    linear     None where there is none, with `why`
    moved      shapes and slices of rows, from the loss down
    scale      logits = softcap * tanh(scale * linear / softcap), or scale * linear where softcap is 0
    likely     the log_softmax that was passed
    """

    axis: int
    linear: fx.Node | None = None
    moved: list[fx.Node] = field(default_factory=list)
    arithmetic: list[float | None] = field(default_factory=list)  # factors, None for a tanh
    likely: fx.Node | None = None
    core: list[fx.Node] = field(default_factory=list)
    why: str = ""
    scale: float = 1.0
    softcap: float = 0.0

    @classmethod
    def under(cls, node: Any, axis: int) -> Logits:
        """What stands under `node`, the vocabulary being its dimension `axis`."""
        found = cls(axis)
        while not is_call(node, aten.linear.default):
            below = found.step(node) if is_call(node) else None
            if below is None:
                found.why = found.why or (
                    f"{said(node)} stands between the linear and the loss"
                    if is_call(node)
                    else f"the logits are {said(node)}, not the results of a linear"
                )
                return found
            found.core.append(node)
            node = below
        if found.axis != node.meta["val"].dim() - 1:
            found.why = f"dimension {found.axis} of the linear's results is taken for the vocabulary"
        elif not found.capped():
            found.why = "the logits are scaled and capped in another way than softcap * tanh(x / softcap)"
        found.core.append(node)
        found.linear = None if found.why else node
        return found

    def step(self, node: fx.Node) -> fx.Node | None:
        """Pass one node: what is below it, None where the way ends here."""
        a, below = arguments(node), node.args[0]
        if node.target in _SHAPES or node.target in _CUTS:
            return below if self.reshaped(node, a, below) else None
        if node.target is aten.permute.default:
            dims = list(a["dims"])
            self.axis, rest = dims[self.axis], [d for d in dims if d != dims[self.axis]]
            return below if rest == sorted(rest) else None
        if node.target is aten.log_softmax.int and not self.likely and not self.arithmetic:
            self.likely = node
            return below if a["dim"] == self.axis else None
        if node.target is aten.to.dtype:
            half = below.meta["val"].dtype in (torch.bfloat16, torch.float16)
            return below if half and node.meta["val"].dtype is torch.float32 else None
        if node.target is aten.tanh.default:
            self.arithmetic.append(None)
            return below
        factor = _factor(node)
        self.arithmetic += [] if factor is None else [factor]
        return None if factor is None else below

    def reshaped(self, node: fx.Node, a: dict[str, Any], below: fx.Node) -> bool:
        """Whether a change of shape leaves the vocabulary alone, which is last; then it is noted."""
        before, after = below.meta["val"].shape, node.meta["val"].shape
        whole = self.axis == len(after) - 1 and expr(before[-1]) == expr(after[-1])
        if not whole or a.get("dim") == len(before) - (node.target is not aten.unsqueeze.default):
            return False
        self.moved.append(node)
        self.axis = len(before) - 1
        return True

    def capped(self) -> bool:
        """Whether the arithmetic is a scale or a softcap."""
        steps = list(self.arithmetic)
        if None not in steps:
            self.scale = _product(steps)
            return True
        at = steps.index(None)
        cap, inner = _product(steps[:at]), steps[at + 1 :]
        if None in inner:
            return False
        scale = _product(inner) * cap
        self.scale, self.softcap = 1.0 if abs(scale - 1) < 1e-12 else scale, cap
        return cap != 0

    def same(self, other: Logits) -> bool:
        """Whether these are the same numbers in the same rows."""
        cuts = [[n for n in one.moved if n.target in _CUTS] for one in (self, other)]
        return (self.linear, self.scale, self.softcap, *cuts) == (
            other.linear, other.scale, other.softcap, cuts[0], cuts[0],
        )  # fmt: skip


def _factor(node: fx.Node) -> float | None:
    """What a node multiplies by, if it is a number."""
    number = node.args[1] if is_call(node, aten.mul.Tensor, aten.div.Tensor) else None
    if not isinstance(number, (int, float)):
        return None
    return float(number) if node.target is aten.mul.Tensor else 1 / number


def _product(factors: list[Any]) -> float:
    made = 1.0
    for f in factors:
        made *= f
    return made


@dataclass
class Site:
    """A loss as found.

    logits      of what
    labels      the node that holds them, None where they are no labels
    reduction   "mean", "sum" or "none";  ignored: the label that is left out, None for none
    also        nodes that were read through and that others may read
    why         sentences that forbid the rewrite
    """

    logits: Logits
    labels: fx.Node | None = None
    reduction: str = "mean"
    ignored: int | None = None
    smoothing: float = 0.0
    z_loss: float = 0.0
    core: list[fx.Node] = field(default_factory=list)
    also: list[fx.Node] = field(default_factory=list)
    why: list[str] = field(default_factory=list)

    @property
    def nodes(self) -> set[fx.Node]:
        """All that the loss is made of."""
        return {*self.core, *self.logits.core}


def find(program: Program, root: fx.Node) -> Match | Miss:
    """The loss at `root`."""
    site = _found(root)
    if site is None:
        return Miss()
    linear = site.logits.linear
    if linear is not None:
        site.why += _readers(site)
    nodes = site.nodes if linear is not None and not site.why else {root}
    return Match(
        program, root, {"site": site}, {n: n for n in nodes}, frozenset(), (root,), frozenset(site.also)
    )


def _found(root: fx.Node) -> Site | None:
    if is_call(root, aten.add.Tensor):
        return _with_squares(root)
    if is_call(root, aten.cross_entropy_loss.default, aten.nll_loss_nd.default):
        return _called(root)
    return _gathered(root)


def _called(root: fx.Node) -> Site:
    """A call of cross_entropy or nll_loss."""
    a = arguments(root)
    scores, labels = a["self"], a["target"]
    rank = scores.meta["val"].dim()
    logits = Logits.under(scores, 1 if rank > 1 else 0)
    site = Site(logits, labels, _REDUCTIONS[int(a["reduction"])], int(a["ignore_index"]))
    site.smoothing, site.core = float(a.get("label_smoothing", 0.0)), [root]
    if a["weight"] is not None:
        site.why.append("the classes have weights")
    if rank < 2:
        site.why.append("there is one row of logits")
    named = root.target is aten.nll_loss_nd.default
    if logits.linear is not None and named != bool(logits.likely):
        once = Refusal("the logits are a log_softmax", "cross_entropy of the logits themselves")
        site.why.append("nll_loss is given no log_softmax" if named else once)
    return site


def _gathered(root: fx.Node) -> Site | None:
    """mean or sum of logsumexp(logits) - logits[label], or of -log_softmax(logits)[label]."""
    negated, core, node = False, [root], root
    if is_call(node, aten.neg.default):
        negated, node = True, node.args[0]
        core.append(node)
    if not is_call(node, aten.mean.dim, aten.sum.dim_IntList):
        return None
    reduction, rows = "mean" if node.target is aten.mean.dim else "sum", node.args[0]
    if not is_call(rows) or list(arguments(node)["dim"]) != list(range(rows.meta["val"].dim())):
        return None
    inner = rows.args[0] if is_call(rows, aten.squeeze.dims) else rows
    if is_call(inner, aten.neg.default) and not negated:
        return _picked(rows, reduction, core, negated=True)
    if negated:
        return _picked(rows, reduction, core)
    if not is_call(rows, aten.sub.Tensor) or rows.args[0].meta["val"].dim() != rows.meta["val"].dim():
        return None
    total, core = rows.args[0], [*core, rows]
    site = _picked(rows.args[1], reduction, core) if is_call(total, aten.logsumexp.default) else None
    if site is None or not is_call(rows.args[1]):
        return None
    below = Logits.under(total.args[0], total.args[0].meta["val"].dim() - 1)
    if not below.same(site.logits) or not _over_last(total) or site.logits.likely:
        return None
    if [*map(expr, rows.args[1].meta["val"].shape)] != [*map(expr, total.meta["val"].shape)]:
        return None
    site.core += [total, *below.core]
    return site


def _over_last(total: fx.Node) -> bool:
    """Whether a logsumexp is over the last dimension."""
    return list(arguments(total)["dim"]) == [total.args[0].meta["val"].dim() - 1]


def _picked(node: Any, reduction: str, core: list[fx.Node], negated: bool = False) -> Site | None:
    """logits[label], or log_softmax(logits)[label], by gather; where `negated`, with a minus on the way."""
    core = list(core)
    if is_call(node, aten.squeeze.dims) and list(node.args[1]) == [node.args[0].meta["val"].dim() - 1]:
        core.append(node)
        node = node.args[0]
    if negated:
        core.append(node)
        node = node.args[0]
    if not is_call(node, aten.gather.default):
        return None
    a = arguments(node)
    scores, index = a["self"], a["index"]
    last = scores.meta["val"].dim() - 1
    if a["dim"] != last or not is_call(index, aten.unsqueeze.default) or index.args[1] != last:
        return None
    site = Site(Logits.under(scores, last), index.args[0], reduction, None, core=[*core, node], also=[index])
    if not all(a == b for a, b in zip(scores.meta["val"].shape[:-1], index.meta["val"].shape, strict=False)):
        site.why.append("fewer rows are gathered from than there are")
    return site


def _with_squares(root: fx.Node) -> Site | None:
    """A loss plus a number times the mean, or sum, of logsumexp(logits) ** 2."""
    for one, other in (root.args[:2], root.args[1::-1]):
        site = _found(other) if is_call(other) and other.target is not aten.add.Tensor else None
        found = _squares(one)
        if site is None or found is None or site.logits.linear is None:
            continue
        number, reduction, total, core = found
        below = Logits.under(total.args[0], total.args[0].meta["val"].dim() - 1)
        if below.linear is None:
            continue
        site.core += [root, *core, total, *below.core]
        site.z_loss = number
        if not below.same(site.logits):
            site.why.append("the squares of logsumexp are of other rows than the loss")
        if reduction != site.reduction:
            site.why.append(f"the loss is a {site.reduction}, that of squares of logsumexp a {reduction}")
        return site
    return None


def _squares(node: Any) -> tuple[float, str, fx.Node, list[fx.Node]] | None:
    """number * mean(logsumexp ** 2): the number, "mean" or "sum", the logsumexp, and the nodes on the way."""
    number, reduction, core = 1.0, "", list[fx.Node]()
    while is_call(node):
        factor = _factor(node)
        if factor is not None:
            number *= factor
        elif node.target in (aten.mean.dim, aten.sum.dim_IntList) and not reduction:
            reduction = "mean" if node.target is aten.mean.dim else "sum"
            if list(arguments(node)["dim"]) != list(range(node.args[0].meta["val"].dim())):
                return None
        elif node.target is aten.pow.Tensor_Scalar and node.args[1] == 2 and reduction:
            total = node.args[0]
            good = is_call(total, aten.logsumexp.default) and _over_last(total)
            return (number, reduction, total, [*core, node]) if good else None
        else:
            return None
        core.append(node)
        node = node.args[0]
    return None


def _readers(site: Site) -> list[str]:
    """Who reads the logits besides the loss."""
    inside = site.nodes
    for node in site.logits.core[::-1]:
        reader = next((u for u in node.users if u not in inside), None)
        if reader is not None:
            at = f" at {source(reader)}" if source(reader) else ""
            by = "a result" if reader.op == "output" else f"read by {target_name(reader.target)}{at}"
            return [
                Refusal(
                    f"the logits are also {by}, so they are made whole", "a call that returns the loss alone"
                )
            ]
    return []


def said(node: Any) -> str:
    """A node as users know it."""
    if not isinstance(node, fx.Node):
        return repr(node)
    return target_name(node.target) if node.op == "call_function" else f"%{node.name}"
