"""Descent to a local optimum, of many starts at once: alternating exact steps, then L-BFGS.

A state is a list of tensors [starts, groups, ...]; groups are independent problems, and so is each start:
`square` maps a state to squared errors [starts, groups].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

SMALL = 2**12  # elements up to which a matrix is swept from many starts, and descended to the end: a second
SWEEPS, FEWEST, WORK = 20, 4, 2**25  # at most; of large matrices so many that sweeps * elements <= WORK, or 4
POLISH = 500  # steps of L-BFGS after the sweeps of a small one, at most
TRIAL, KEPT = 100, 8  # after so many steps the best starts of each group go on
STILL = 1e-8  # a sweep that lowers the squared error by less, relatively, is the last, and CHUNK steps are
ALMOST = 1e-3  # the same of large matrices: what further sweeps gain there is less than what calls differ by
CHUNK = 10
MEMORY = 8  # pairs that L-BFGS keeps
ENOUGH = 1e-4  # of the slope: what a step has to lower the error by (Armijo)
TRIES = 12  # shortenings of a step before its start is given up

State: TypeAlias = list[Tensor]


def starts(elements: int, most: int = 32) -> int:
    """How many random starts a matrix of so many elements is given: none where it is not small."""
    return min(most, 4 * SMALL // elements) if elements <= SMALL else 0


def alternate(
    sweep: Callable[[State], State],
    square: Callable[[State], Tensor],
    state: State,
    elements: int,
    scale: Tensor,
) -> State:
    """The best start of each group, without its dimension, after sweeps until they stand still or a limit.

    A sweep that raises an error is not taken. elements: of the matrix; scale: its square, of each group.
    """

    def best(state: State) -> State:
        order = square(state).argmin(0)
        return [f[order, torch.arange(len(order), device=f.device)][None] for f in state]

    small = elements <= SMALL
    state = state if small else best(state)
    before = square(state)
    floor = torch.finfo(before.dtype).eps ** 2 * scale  # squared errors below are zero
    for _ in range(max(FEWEST, min(SWEEPS, WORK // elements))):
        moved = sweep(state)
        now = square(moved)
        lower = now < before  # rounding can raise what has converged, or make it not finite
        state = [
            torch.where(lower.reshape(*lower.shape, *[1] * (f.ndim - 2)), m, f)
            for m, f in zip(moved, state, strict=True)
        ]
        now = torch.where(lower, now, before)
        if bool((before - now <= (STILL if small else ALMOST) * now + floor).all()):
            break
        before = now
    if small and not bool((before.amin(0) <= floor).all()):
        state = descend(square, state, POLISH)
    return [f[0] for f in best(state)]


@torch.inference_mode(False)
@torch.no_grad()
def descend(
    square: Callable[[State], Tensor],
    state: State,
    steps: int,
    progress: Callable[[int], None] | None = None,
) -> State:
    """At most `steps` of L-BFGS on each start of each group; none ends at a larger error."""
    flat = _Flat(square, state)
    x, memory = flat.first, _Memory()
    value, slope = flat(x)
    mark, going = value, value > 0
    for step in range(1, steps + 1):
        moved, value, after, going = _searched(flat, x, memory.way(slope), value, slope, going)
        memory.add(moved - x, after - slope)
        x, slope = moved, after
        if progress is not None:
            progress(step)
        if step == TRIAL and value.shape[0] > KEPT:
            going = going & (flat.unit * value <= (flat.unit * value).kthvalue(KEPT, 0, keepdim=True).values)
        if step % CHUNK == 0:
            going, mark = going & (mark - value > STILL * value), value
        if not bool(going.any()):
            break
    return flat.state(x)


class _Flat:
    """A state as one real tensor [starts, groups, numbers], errors in units of the first ones."""

    def __init__(self, square: Callable[[State], Tensor], state: State) -> None:
        self.square = square
        self.shapes = [torch.view_as_real(f).shape if f.is_complex() else f.shape for f in state]
        self.complex = [f.is_complex() for f in state]
        real = [torch.view_as_real(f) if f.is_complex() else f for f in state]
        self.first = torch.cat([f.flatten(2) for f in real], -1)
        value = square(state)
        self.unit = torch.where(value > 0, value, 1.0)

    def state(self, x: Tensor) -> State:
        parts = x.split([s[2:].numel() for s in self.shapes], -1)
        parts = tuple(p.reshape(s) for p, s in zip(parts, self.shapes, strict=True))
        return [torch.view_as_complex(p) if c else p for p, c in zip(parts, self.complex, strict=True)]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Errors and their gradients."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self.square(self.state(x)) / self.unit
            (slope,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), slope


class _Memory:
    """What L-BFGS knows of the curvature: steps and changes of the gradient, where they are of use."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.size: Tensor | None = None

    def add(self, s: Tensor, y: Tensor) -> None:
        sy, yy = _inner(s, y), _inner(y, y)
        sound = sy > 1e-10 * (_inner(s, s) * yy).sqrt()
        self.pairs = [*self.pairs, (s, y, torch.where(sound, 1 / sy, 0.0))][-MEMORY:]
        size = torch.where(sound, sy / yy, 0.0 if self.size is None else self.size)
        self.size = size

    def way(self, slope: Tensor) -> Tensor:
        """The direction of a step; the steepest where the curvature that is known gives no descent."""
        steepest = -slope / _inner(slope, slope).sqrt().clamp_min(1)
        if self.size is None:
            return steepest
        q, used = slope, []
        for s, y, rho in reversed(self.pairs):
            used.append(rho * _inner(s, q))
            q = q - used[-1] * y
        q = q * self.size
        for (s, y, rho), a in zip(self.pairs, reversed(used), strict=True):
            q = q + s * (a - rho * _inner(y, q))
        return torch.where(_inner(q, slope) > 0, -q, steepest)


def _searched(
    flat: _Flat, x: Tensor, way: Tensor, value: Tensor, slope: Tensor, going: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The point of sufficient decrease along the way, its error and gradient, and where there is one.

    Elsewhere, and where it is not `going`, x itself.
    """
    fall, sought = _inner(way, slope), going
    length = torch.ones_like(fall)
    moved, lowest, after = x, value, slope
    for _ in range(TRIES):
        trial = x + length * way
        there, gradient = flat(trial)
        good = sought & (there <= value + (ENOUGH * length * fall)[..., 0])
        moved = torch.where(good[..., None], trial, moved)
        after = torch.where(good[..., None], gradient, after)
        lowest, sought = torch.where(good, there, lowest), sought & ~good
        if not bool(sought.any()):
            break
        bend = (there - value)[..., None] - length * fall  # of the parabola through what is known
        vertex = (-fall * length**2 / (2 * bend)).nan_to_num()
        length = vertex.clamp(0.1 * length, 0.5 * length)
    return moved, lowest, after, going & ~sought


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)
