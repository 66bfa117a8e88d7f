"""Run the last linear and its cross entropy as one operator, which never holds all logits.

    logits = linear(x, w, b)                                  loss = fxaccel.linear_cross_entropy(
    loss = cross_entropy(logits[:, :-1], y[:, 1:])    =>          x[:, :-1], w, b, y[:, 1:])

Fires on   a cross entropy of class labels over the results of a linear that nothing else reads: called as one
           operator, as nll_loss of log_softmax, or written out with logsumexp or log_softmax and gather; as
           mean or sum; with label smoothing, an ignored label, a z-loss added to it; over logits that are
           cast to float32, scaled or capped (cap * tanh(logits / cap)); where their rows are sliced, x's are.
Saves      the logits, their log_softmax and the gradients of both: 3 to 4 of [N, V] at the peak of a step, of
           which a chunk of `budget` remains. On the CPU the products of rows whose label is ignored.
Exact      agrees with the original within its own rounding.
Source     Wijmans et al. 2024, arXiv:2411.09009; Hsu et al. 2024, arXiv:2410.10989.
"""

import math
from typing import Any

import torch
from torch import fx

from fxaccel.canonical.values import under_autocast
from fxaccel.errors import OptionError
from fxaccel.ir import arguments, expr, number
from fxaccel.kernels import linear_cross_entropy as kernel
from fxaccel.passes._loss_site import ROOTS, Site, find
from fxaccel.passes.checkpoint import read
from fxaccel.passes.checkpoint import said as text
from fxaccel.rule import Finder, Match, Ops, Refusal, Refusals, Rule, register

aten = torch.ops.aten


@register
class FuseLinearLoss(Rule):
    """The last linear and its cross entropy become one operator, which holds a chunk of the logits at a time.

    budget   "64MiB": bytes of a chunk; chosen by device and sizes where not said
    least    bytes of logits, at the sizes of the example, below which it is not worth its calls
    """

    name = "fuse-linear-loss"
    step = "raise"
    default = True
    at_most = 1.15  # for the logits that are not held

    budget: str | None = None
    least: str = "4MiB"

    def __post_init__(self) -> None:
        for name in ("budget", "least"):
            given = getattr(self, name)
            if given is not None and not read(given)[1]:
                raise OptionError(f"{name} is {given!r}, expected bytes", f'as {name}="64MiB"')

    def traced(self):
        return Finder(ROOTS, find)

    def refuse(self, m: Match) -> Refusals:
        site = m.site
        yield from site.why
        linear = site.logits.linear
        if linear is None:
            yield site.logits.why
            return
        size = nbytes(m, linear)
        if size < read(self.least)[0]:
            yield Refusal(
                f"all logits are {text(size)}; it is worth its calls from {self.least} on",
                f"least={size // 1024}KiB",
            )
        if site.labels.meta["val"].dtype.is_floating_point:
            yield "the targets are probabilities, not labels"
        else:
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

    def any_size(self, m: Match) -> int | None:
        """The classes, where nothing else is as many."""
        x, w, _ = arguments(m.site.logits.linear).values()
        classes = int(w.meta["val"].shape[0])
        others = [*x.meta["val"].shape, *m.site.labels.meta["val"].shape]
        return None if classes in map(expr, others) else classes

    def remark(self, m: Match) -> str:
        site = m.site
        more = ("softcap", site.logits.softcap), ("smoothed", site.smoothing), ("z-loss", site.z_loss)
        return ", ".join([site.reduction, *(word for word, there in more if there)])


def nbytes(m: Match, linear: fx.Node) -> int:
    """Of all logits that the loss reads, at the sizes of the example."""
    *_, classes = linear.meta["val"].shape
    rows = math.prod(number(s, m.program.hints) for s in m.site.labels.meta["val"].shape)
    return rows * int(classes) * linear.meta["val"].itemsize


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
    assert linear is not None, "it was found"
    assert labels is not None, "it was found"
    given: list[Any] = [a if a is None else a.meta["val"] for a in arguments(linear).values()]
    if under_autocast(linear.meta.get("regions", ())):
        given = [t if t is None else t.to(linear.meta["val"].dtype) for t in given]
    x, w, b = given
    yield from kernel.unsupported(
        x.flatten(0, -2), w, b, labels.meta["val"].flatten(), site.reduction, site.ignored, site.smoothing
    )
