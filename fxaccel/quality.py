"""How much worse a model has become, and how much worse it may become.

    "change<=0.01"    an output differs by at most 1% of its size, in the worst of the calls
    "kl<=0.02"        mean KL divergence of the new softmax over the last dimension of the logits from the
                      old one, in nats
    "loss<=+1%"       the mean loss that the model returns rises by at most 1%; "loss<=+0.05" by 0.05
    "size<=0.5"       the parameters shrink to half of their bytes; what that changes is measured, not limited
    Budget("accuracy", 0.01, lost)     lost(old, new), a number, of the model's results in one call

The logits are the output of that name, or the first floating-point output of two or more dimensions; the
loss is the output of that name, or the first output if that is one number.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxaccel.errors import OptionError
from fxaccel.structure import Structure

METRICS = ("change", "kl", "loss", "size")
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
FORM = re.compile(rf"\s*([a-z]+)\s*<=\s*({NUMBER})\s*(%?)\s*")


@dataclass(frozen=True)
class Measured:
    """A metric over calls: its value, and the standard error of that mean (0 for one call or a maximum)."""

    value: float
    error: float = 0.0

    @property
    def bound(self) -> float:
        """What the value would be with bad luck: two standard errors up. A budget is kept if this is."""
        return self.value + 2 * self.error

    def __str__(self) -> str:
        return f"{self.value:.3g}" + (f" +- {self.error:.1g}" if self.error else "")


@dataclass(frozen=True)
class Budget:
    """A limit on how much worse a model may become.

    metric      one of METRICS, or a name of your own for `function`
    limit       the most that the metric may be
    function    (old, new) -> how much worse `new` is, both results of the model for one call; the mean over
                calls counts
    relative    of a loss: whether the limit is a share of the old loss
    """

    metric: str
    limit: float
    function: Callable[[Any, Any], float] | None = None
    relative: bool = False

    def __post_init__(self) -> None:
        if self.function is None and self.metric not in METRICS:
            raise OptionError(
                f"a budget is on {self.metric!r}, expected one of {', '.join(METRICS)}",
                "give a function of your own as Budget(name, limit, function)",
            )
        if not self.limit >= 0:
            raise OptionError(f"a budget's limit is {self.limit}, expected a number of at least 0")

    @classmethod
    def of(cls, given: str | float | Budget) -> Budget:
        """A budget as a pass is given it: "kl<=0.02", a number (of change), or a Budget."""
        if isinstance(given, Budget):
            return given
        if isinstance(given, (int, float)):
            return cls("change", float(given))
        form = FORM.fullmatch(given)
        if form is None:
            raise OptionError(
                f"the budget is {given!r}, expected a metric and its limit",
                "write change<=0.01, kl<=0.02, loss<=+1% or size<=0.5",
            )
        metric, number, percent = form.groups()
        limit = float(number) / (100 if percent else 1)
        return cls(metric, limit, relative=metric == "loss" and bool(percent))

    @property
    def of_size(self) -> bool:
        """Whether it limits the model's size, and not what becomes of its results."""
        return self.metric == "size" and self.function is None

    @property
    def of_change(self) -> bool:
        """Whether what is measured is how far outputs move: of a budget of size too."""
        return self.metric in ("change", "size") and self.function is None

    def __str__(self) -> str:
        return f"{self.metric}<={f'{self.limit:.3%}' if self.relative else f'{self.limit:g}'}"

    def measure(self, spec: Structure, old: Sequence[Any], new: Sequence[Any]) -> float | tuple[float, float]:
        """What one call adds: a number, or for a relative loss the old and the new one."""
        if self.function is not None:
            return float(self.function(result(spec, old), result(spec, new)))
        if self.metric == "kl":
            at = _logits(spec, old)
            return divergence(old[at], new[at])
        if self.metric == "loss":
            at = _loss(spec, old)
            return float(old[at]), float(new[at])
        pairs = zip(old, new, strict=True)
        tensors = ((a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))
        return max(
            (relative(a.double(), b.double()) for a, b in tensors if a.is_floating_point()), default=0.0
        )

    def together(self, calls: Sequence[Any]) -> Measured:
        """The metric over calls, of what `measure` said of each."""
        if self.metric == "loss" and self.function is None:
            olds, rises = [a for a, _ in calls], [b - a for a, b in calls]
            scale = abs(_mean(olds)) if self.relative else 1.0
            rise = _measured(rises)
            return Measured(rise.value / scale, rise.error / scale) if scale else rise
        if self.of_change:
            return Measured(max(calls, default=0.0))
        return _measured(calls)


def result(spec: Structure, leaves: Sequence[Any]) -> Any:
    """The model's result from its flat outputs; objects that were passed in are left out."""
    return spec.unflatten(leaves, defaultdict(lambda: None))[0]


def divergence(old: Tensor, new: Tensor) -> float:
    """Mean over positions of KL(softmax(old) || softmax(new)) over the last dimension, in nats."""
    p, q = old.double().log_softmax(-1), new.double().log_softmax(-1)
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
    value = float(terms.sum(-1).mean())
    return math.inf if math.isnan(value) else max(value, 0.0)


def relative(old: Tensor, new: Tensor) -> float:
    """|new - old| / |old| where either is finite; infinite where only one of them is."""
    same = (old == new) | (old.isnan() & new.isnan())
    away = float((new - old).masked_fill(same, 0.0).norm())
    size = float(old.masked_fill(~old.isfinite(), 0.0).norm())
    if math.isnan(away):
        return math.inf
    return away / size if size else float(away > 0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _measured(values: Sequence[float]) -> Measured:
    mean, n = _mean(values), len(values)
    if n < 2 or not math.isfinite(mean):
        return Measured(math.inf if math.isnan(mean) else mean)
    return Measured(mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n))


def _named(spec: Structure, count: int, name: str) -> int | None:
    """The place among the flat outputs of the one with this name."""
    whole = result(spec, range(count))
    found = whole.get(name) if isinstance(whole, Mapping) else getattr(whole, name, None)
    return found if isinstance(found, int) else None


def _logits(spec: Structure, leaves: Sequence[Any]) -> int:
    named = _named(spec, len(leaves), "logits")
    if named is not None:
        return named
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1:
            return i
    raise OptionError(
        "a budget on kl needs logits, and the model returns no floating-point tensor of two dimensions",
        "give a function of your own as Budget(name, limit, function)",
    )


def _loss(spec: Structure, leaves: Sequence[Any]) -> int:
    named = _named(spec, len(leaves), "loss")
    at = 0 if named is None else named
    leaf = leaves[at] if leaves else None
    if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() == 1:
        return at
    raise OptionError(
        "a budget on loss needs a model that returns one, and this one's first output is not one number",
        "pass labels, or give a function of your own as Budget(name, limit, function)",
    )
