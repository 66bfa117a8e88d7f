"""Chooses for each of several places of a model one of its cheaper alternatives, within a budget.

What an alternative does to the model is measured for one of each place; for the others of that place it is
taken to grow with the square of the layer's own error, since no metric of a trained model has a slope at its
own weights, and to add up over places. By that the cheapest choice for a total effect is found (a knapsack);
how large a total the budget bears is measured on the model itself, on the calls that decide and on those held
out. Structured linears and quantized ones compete in one search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fxaccel.errors import OptionError
from fxaccel.progress import tracked
from fxaccel.quality import Budget, Measured

BINS = 1000  # into which a budget is cut: how fine effects are told apart
TRIALS = 10  # measurements of the whole choice
PROBE = 0.5  # error of a layer up to which its effect on the model is taken for quadratic


@dataclass(frozen=True)
class Alternative:
    """Something cheaper that a place may become.

    what      what it is, for people
    cost      of a call: milliseconds, or FLOPs where time does not count
    nbytes    of its parameters
    error     of its outputs on the data, of their size
    made      whatever the pass needs to apply it
    """

    what: str
    cost: float
    nbytes: int
    error: float
    made: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Place:
    """A layer of the model as it is, and what it may become."""

    name: str
    cost: float
    nbytes: int
    alternatives: tuple[Alternative, ...]


Choice = Mapping[str, Alternative]
Trial = Callable[[Choice], Measured]


@dataclass(frozen=True)
class Outcome:
    """What was chosen, by place, and what that does to the model.

    decided     the budget's metric on the calls that decided
    held_out    and on those that were held out, None where there are none
    effects     place -> the metric with that place alone changed, to the alternative that was tried
    """

    chosen: dict[str, Alternative]
    decided: Measured
    held_out: Measured | None
    effects: dict[str, tuple[Alternative, Measured]]


def choose(
    places: Sequence[Place], budget: Budget, trial: Trial, held_out: Trial | None,
    total_bytes: int = 0,
) -> Outcome:  # fmt: skip
    """The alternatives that save most time within the budget, or most quality for a budget of size.

    trial          measures a choice by the budget's metric on the calls that decide (for a budget of size by
                   the change of the outputs)
    held_out       the same on other calls
    total_bytes    of all parameters of the model, for a budget of size

    Raises OptionError where the model cannot be made as small as it is to be.
    """
    effects = {
        p.name: (probe, trial({p.name: probe}))
        for p in tracked(places, "sensitivity of layers", len(places))
        if (probe := _probe(p)) is not None
    }
    slopes = {n: _slope(budget, *e) for n, e in effects.items()}
    if budget.of_size:
        chosen = _small(places, slopes, budget, total_bytes)
    else:
        chosen = _cheap(places, slopes, budget, trial, held_out)
    return Outcome(chosen, trial(chosen), None if held_out is None else held_out(chosen), effects)


def _probe(place: Place) -> Alternative | None:
    """The alternative to measure: the coarsest whose effect is still quadratic."""
    fine = [a for a in place.alternatives if a.error <= PROBE]
    if fine:
        return max(fine, key=lambda a: a.error)
    return min(place.alternatives, key=lambda a: a.error, default=None)


def _slope(budget: Budget, probe: Alternative, seen: Measured) -> float:
    """The metric's growth with the square of the layer's error; of a change, that of its square."""
    value = _additive(budget, abs(seen.value))  # a loss that falls by chance could as well have risen
    return value / probe.error**2 if probe.error else 0.0


def _additive(budget: Budget, value: float) -> float:
    """A metric in a form that adds up over places: changes of places are at right angles."""
    return value * value if budget.of_change else value


def _cheap(
    places: Sequence[Place], slopes: Mapping[str, float], budget: Budget, trial: Trial, held_out: Trial | None
) -> dict[str, Alternative]:
    """The cheapest choice found that is within the budget, on the calls that decide and on those held out.

    What is expected of a choice may lie well beside what it does: how much may be expected is bisected.
    """

    def fits(choice: Choice) -> bool:
        held = [] if held_out is None else [held_out]
        return all(one(choice).bound <= budget.limit for one in (trial, *held))

    options = [
        (p.name, p.cost, [(slopes[p.name] * a.error**2, a.cost, a) for a in p.alternatives])
        for p in places
        if math.isfinite(slopes.get(p.name, 0.0))  # else it alone makes the model worthless
    ]
    best, best_cost = dict[str, Alternative](), sum(p.cost for p in places)
    low, high = 0.0, math.inf
    most = sum(max((o[0] for o in of), default=0.0) for _, _, of in options) * (1 + len(options) / BINS)
    expected = min(_additive(budget, budget.limit), most)
    tried = list[dict[str, Alternative]]()
    for _ in tracked(range(TRIALS), "choosing", TRIALS):
        choice = knapsack(options, expected)
        if choice not in tried:
            tried.append(choice)
            good = fits(choice)
        else:
            good = choice == best
        if good:
            low = expected
            cost = sum(choice[p.name].cost if p.name in choice else p.cost for p in places)
            if cost <= best_cost:
                best, best_cost = choice, cost
            if low >= most:
                break
        else:
            high = expected
        expected = min(most, 2 * low) if high == math.inf else (low + high) / 2
    return best


def _small(
    places: Sequence[Place], slopes: Mapping[str, float], budget: Budget, total_bytes: int
) -> dict[str, Alternative]:
    """The choice of least effect after which the parameters take the budget's share of `total_bytes`."""
    saved = sum(p.nbytes - min([p.nbytes, *(a.nbytes for a in p.alternatives)]) for p in places)
    least = total_bytes - saved
    if least > budget.limit * total_bytes:
        raise OptionError(
            f"the layers that pay can bring the model's parameters down to {least / total_bytes:.0%}, "
            f"expected {budget}",
            "widen where= or also=, or allow a larger size",
        )
    options = [
        (p.name, 0.0, [(float(a.nbytes - p.nbytes), slopes[p.name] * a.error**2, a) for a in p.alternatives])
        for p in places
    ]
    return knapsack(options, (budget.limit - 1) * total_bytes)


Options = Sequence[tuple[str, float, Sequence[tuple[float, float, Alternative]]]]
"""Of each place: its name, its value as it is, and (weight, value, alternative) of what it may become."""


def knapsack(options: Options, capacity: float) -> dict[str, Alternative]:
    """The choice of least total value whose weights add up to at most the capacity.

    Weights are relative to the place as it is; they are rounded up to BINS parts of their range, so that the
    result always fits and may miss the optimum by that much. Dynamic programming over the parts.
    """
    lowest = [min([0.0, *(w for w, _, _ in of)]) for _, _, of in options]
    room = capacity - sum(lowest)
    part = room / BINS if room > 0 else 1.0
    table = np.zeros(BINS + 1)
    taken = np.zeros((len(options), BINS + 1), dtype=np.int64)
    moves = list[list[int]]()
    for i, (_, value, of) in enumerate(options):
        weights = [0.0, *(w for w, _, _ in of)]
        moves.append([math.ceil((w - lowest[i]) / part - 1e-9) for w in weights])
        rows = np.full((len(weights), BINS + 1), np.inf)
        for row, move, v in zip(rows, moves[i], [value, *(v for _, v, _ in of)], strict=True):
            if move <= (BINS if room > 0 else 0):
                row[move:] = table[: BINS + 1 - move] + v
        taken[i] = rows.argmin(0)
        table = rows.min(0)
    at, chosen = BINS, dict[str, Alternative]()
    for i in reversed(range(len(options))):
        which = int(taken[i, at])
        at -= moves[i][which]
        if which:
            chosen[options[i][0]] = options[i][2][which - 1][2]
    return dict(reversed(chosen.items()))
