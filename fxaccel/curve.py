"""The loss of the rewritten model beside the model's own over a few steps of training, on one batch.

A check of one step sees outputs and gradients; this sees what steps leave behind: buffers that are moved
once too often, what was computed from parameters and not again when they changed. Both start from the same
weights, under AdamW. Their curves drift apart by rounding: how far they may is what an error of one eps in
every operator does to the model's own (fxaccel.check says why), so far as the steps have gone.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxaccel import evaluate
from fxaccel.capture import Call
from fxaccel.check import Runner, emitted_by, inputs, isolated, written_by
from fxaccel.errors import OptionError
from fxaccel.structure import flatten
from fxaccel.tolerance import LOST
from fxaccel.tree import random_kept

if TYPE_CHECKING:
    from fxaccel.session import Capture

RATE = 1e-3  # of AdamW
_DRAWS = 4  # curves with one eps in every operator


@dataclass(frozen=True)
class Curve:
    """The losses before each step: the model's, the rewritten one's, and how far apart they may be."""

    model: tuple[float, ...]
    rewritten: tuple[float, ...]
    allowed: tuple[float, ...]

    @property
    def shares(self) -> list[float]:
        """The distance at each step as a share of the tolerance."""
        return [_share(*at) for at in zip(self.model, self.rewritten, self.allowed, strict=True)]

    @property
    def ok(self) -> bool:
        """Whether the tolerance holds at each step."""
        return all(share <= 1 for share in self.shares)

    def __str__(self) -> str:
        shares = self.shares
        head = f"loss over {len(shares)} steps of AdamW on one batch"
        if self.ok:
            return (
                f"{head}: {self.model[0]:.4g} to {self.model[-1]:.4g}, as the model's, at "
                f"{max(shares):.2f} of the tolerance"
            )
        at = next(i for i, share in enumerate(shares) if not share <= 1)
        return (
            f"{head}: FAILED at step {at}, {self.rewritten[at]:.7g} where the model's is "
            f"{self.model[at]:.7g} (tolerance {self.allowed[at]:.2g})"
        )


def _share(model: float, rewritten: float, allowed: float) -> float:
    if model == rewritten or (math.isnan(model) and math.isnan(rewritten)):
        return 0.0
    away = abs(model - rewritten)
    return away / allowed if allowed and math.isfinite(away) else math.inf


def curve(capture: Capture, original: nn.Module, module: nn.Module, example: Call, steps: int) -> Curve:
    """Train the model and its capture for `steps` steps, and the model with every operator off by an eps.

    original, module    trees with the same weights, which stay as they are: the model's, the rewritten one's
    """
    emitted, eager = emitted_by(capture, example), written_by(example, capture.program.redrawn)
    with random_kept(), torch.enable_grad():
        old = _trained(original, eager, example, steps)
        new = _trained(module, emitted, example, steps)
        draws = [_trained(original, eager, example, steps, seed) for seed in range(1, _DRAWS + 1)]
    wide = old[0].dtype is torch.float64  # where an error is larger, to be seen clearly
    rounding = torch.finfo(torch.float64).eps / evaluate.UNSTEADY if wide else 1.0
    furthest, allowed = 0.0, []
    for at, loss in enumerate(old):
        furthest = max(furthest, *(abs(float(d[at] - loss)) for d in draws))
        allowed.append(LOST * rounding * furthest)
    return Curve(tuple(map(float, old)), tuple(map(float, new)), tuple(allowed))


def _trained(
    model: nn.Module, run: Runner, example: Call, steps: int, seed: int | None = None
) -> list[Tensor]:
    """The loss before each step; with a seed, every operator is off by an eps at random."""
    tree = isolated(model, apart=True)
    parameters = [p for p in tree.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError("steps is for a model that trains, and every parameter of this one is frozen")
    optimizer, losses = torch.optim.AdamW(parameters, RATE), []
    for step in range(steps):
        torch.manual_seed(step)
        with nullcontext() if seed is None else evaluate.Unsteady(seed + _DRAWS * step):
            value, _ = run(tree, inputs(example)[1])
            loss = _loss(value)
            loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _loss(value: Any) -> Tensor:
    """What is made small: the first number of the output, or the mean square of all of it."""
    learned = [v for v in flatten(value)[0] if isinstance(v, Tensor) and v.requires_grad]
    if not learned:
        raise OptionError("steps is for a model that trains, and no output of this one has a gradient")
    number = next((v for v in learned if v.dim() == 0), None)
    return torch.stack([v.abs().square().mean() for v in learned]).sum() if number is None else number
