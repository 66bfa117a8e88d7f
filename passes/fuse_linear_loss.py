"""Run the last linear and its cross entropy as one operator, which never holds all logits.

    logits = linear(x, w, b)                                  loss = fxaccel.linear_cross_entropy(
    loss = cross_entropy(logits[:, :-1], y[:, 1:])    =>          x[:, :-1], w, b, y[:, 1:])

Fires on   a cross entropy of class labels over the results of a linear that nothing else reads: called as one
           operator, as nll_loss of log_softmax, or written out with logsumexp or log_softmax and gather; as
           mean or sum; with label smoothing, an ignored label, a z-loss added to it; over logits that are cast
           to float32, scaled, or capped (cap * tanh(logits / cap)); whose rows are sliced: then x's are.
Saves      the logits, their log_softmax and the gradients of both: 3 to 4 of [N, V] at the peak of a step, of
           which a chunk of `budget` remains. On the CPU the products of rows whose label is ignored.
Exact      agrees with the original within its own rounding.
Source     Wijmans et al. 2024, arXiv:2411.09009; Hsu et al. 2024, arXiv:2410.10989.
"""

from typing import Any

import torch
from torch import fx

from fxaccel.canonical.values import under_autocast
from fxaccel.errors import OptionError
from fxaccel.ir import arguments
from fxaccel.kernels import linear_cross_entropy as kernel
from fxaccel.passes._loss_site import ROOTS, Site, find, said
from fxaccel.passes.checkpoint import read
from fxaccel.rule import Finder, Match, Ops, Refusals, Rule, register

aten = torch.ops.aten


@register
class FuseLinearLoss(Rule):
    """The last linear and its cross entropy become one operator, which holds a chunk of the logits at a time.

    budget   "64MiB": bytes of a chunk; chosen by device and sizes where not said
    """

    name = "fuse-linear-loss"
    step = "raise"

    budget: str | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and not read(self.budget)[1]:
            raise OptionError(f"budget is {self.budget!r}, expected bytes", 'as budget="64MiB"')

    def traced(self):
        return Finder(ROOTS, find)

    def refuse(self, m: Match) -> Refusals:
        site = m.site
        yield from site.why
        if site.logits.linear is None:
            yield site.logits.why
            return
        made, linear = m.root.meta["val"].dtype, site.logits.linear.meta["val"].dtype
        if made not in (linear, torch.float32):
            yield f"the loss is {made}, the logits are {linear}"
        yield from unsupported(site)

    def rewrite(self, op: Ops, m: Match):
        site = m.site
        linear = site.logits.linear
        x, w, b = arguments(linear).values()
        x, labels = rows(op, x, site), site.labels
        if labels.meta["val"].dim() != 1:
            labels = op.aten.reshape.default(labels, [-1])
        wide = m.root.meta["val"].dtype != linear.meta["val"].dtype
        budget = 0 if self.budget is None else int(read(self.budget)[0])
        logits = site.logits
        return op.fxaccel.linear_cross_entropy.default(
            x, w, b, labels, site.reduction, site.ignored, site.smoothing, logits.scale, logits.softcap,
            site.z_loss, wide, budget,
        )  # fmt: skip

    def remark(self, m: Match) -> str:
        site = m.site
        words = [f"{said(site.logits.linear)} of {m.site.logits.linear.meta['val'].shape[-1]}"]
        more = ("softcap", site.logits.softcap), ("smoothed", site.smoothing), ("z-loss", site.z_loss)
        return ", ".join([*words[1:], site.reduction, *(word for word, there in more if there)])


def rows(op: Ops, x: fx.Node, site: Site) -> fx.Node:
    """The rows of x that the loss reads, as a matrix."""
    moved = site.logits.moved[::-1]
    while moved and moved[-1].target not in (aten.slice.Tensor, aten.select.int):
        moved.pop()
    width = int(x.meta["val"].shape[-1])
    for node in moved:
        rest: list[Any] = list(node.args[1:])
        if node.target is aten.reshape.default:
            rest = [[*rest[0][:-1], width]]
        x = op(node.target, x, *rest)
    return x if x.meta["val"].dim() == 2 else op.aten.reshape.default(x, [-1, width])


def unsupported(site: Site) -> Refusals:
    """Why the kernel does not take this loss."""
    linear, labels = site.logits.linear, site.labels
    x, w, b = (a if a is None else a.meta["val"] for a in arguments(linear).values())
    if under_autocast(linear.meta.get("regions", ())):
        x, w, b = (t if t is None else t.to(linear.meta["val"].dtype) for t in (x, w, b))
    yield from kernel.unsupported(
        x.flatten(0, -2), w, b, labels.meta["val"].flatten(), site.reduction, site.ignored, site.smoothing
    )
