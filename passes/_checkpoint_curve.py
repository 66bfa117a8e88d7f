"""What each budget costs: the curve of plans from the smallest peak to keeping everything, and beside it.

Every point is a plan that fxaccel.replay has gone through, byte by byte, and so are the baselines: keeping
everything, keeping the boundaries of the parts alone, and of about sqrt(parts) runs of parts the beginnings
alone (Chen et al. 2016, arXiv:1604.06174). The largest batch that fits is searched over the formulas of the
step (fxaccel.formulas), with a plan for each size that is tried.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from operator import ge
from pathlib import Path
from typing import NamedTuple

import sympy

from fxaccel import stages
from fxaccel.errors import OptionError, RuleError
from fxaccel.formulas import Formulas
from fxaccel.ir import Program, path
from fxaccel.passes._checkpoint_parts import cuts, droppable
from fxaccel.passes._checkpoint_plan import Planner
from fxaccel.passes.checkpoint import Checkpoint, Plan, TrainingStep, read, said
from fxaccel.picture import canvas, drawable, saved
from fxaccel.profile import Profile
from fxaccel.replay import Draft, lazily, replay
from fxaccel.roofline import FORWARDS
from fxaccel.schedule import HIDDEN

BLOCK = 8  # calls in a part of the baselines, at the least: about a block of a model
LARGEST = 2**24  # a batch beyond which no memory is asked for
ROWS = 12  # of a table of modules
SHORT = 160  # letters of a formula that is printed whole


class Point(NamedTuple):
    """A plan on the curve.

    budget        bytes that it was made for: of the whole peak, or of activations where a share was asked for
    peak          bytes of the step: parameters, gradients, the optimizer's state and activations
    activations   bytes of these alone
    overhead      seconds that are computed again, as a share of forward and backward
    flops         that are computed again
    """

    budget: int
    peak: int
    activations: int
    overhead: float
    flops: int


def point(step: TrainingStep, draft: Draft, budget: int) -> Point:
    """A draft, replayed."""
    cost = replay(step.profile, draft, step.seconds)
    whole = FORWARDS * sum(step.seconds.values()) or 1.0
    return Point(budget, step.fixed + cost.peak, cost.inner, cost.seconds / whole, cost.flops)


def curve(step: TrainingStep, planner: Planner, points: int) -> list[Point]:
    """Plans for budgets from the smallest to what is needed, those left out that another one dominates."""
    shares = planner.profile is not step.profile
    fixed = 0 if shares else step.fixed
    low, high = planner.smallest, planner.need
    found = list[Point]()
    for i in range(points):
        budget = low + (high - low) * i // max(points - 1, 1)
        draft = planner.plan(budget)
        if draft is not None:
            found.append(point(step, draft, fixed + budget))
    best = list[Point]()
    for one in sorted(found, key=lambda p: (p.activations if shares else p.peak, p.overhead)):
        if not best or one.overhead < best[-1].overhead:
            best.append(one)
    return best


def baselines(step: TrainingStep, planner: Planner) -> dict[str, Point]:
    """What others would do with this step, by name; their budget is what they take."""
    count = len(cuts(step.profile, BLOCK)) + 1
    drafts = {
        "keep all": Draft(),
        "every part": runs(step.profile, 1),
        "sqrt(n)": runs(step.profile, max(1, round(math.sqrt(count)))),
    }
    found = {name: point(step, draft, 0) for name, draft in drafts.items()}
    shares = planner.profile is not step.profile
    return {n: p._replace(budget=p.activations if shares else p.peak) for n, p in found.items()}


def runs(profile: Profile, length: int) -> Draft:
    """Of each run of so many parts its beginning is kept; all else in it is made again, once."""
    marks = cuts(profile, BLOCK)
    place = {call: bisect.bisect_right(marks, call) // length for call in profile.calls}
    last = {run: call for call, run in sorted(place.items())}
    held = {n: last[place[v.made]] for n, v in enumerate(profile.values)}
    ends = {n for n, until in held.items() if profile.values[n].read > until}
    return lazily(profile, droppable(profile) - ends, held)


def largest_batch(
    program: Program, budget: int, optimizer: str = "none", formulas: Formulas | None = None
) -> tuple[int, Plan] | None:
    """The largest batch for which a plan with a peak of at most `budget` bytes was found, and that plan.

    The batch is the first dimension of the first input, among the sizes that the program takes; None where
    not even the smallest fits. Raises OptionError where the batch is fixed.
    """
    name = batch(program)
    formulas = formulas or Formulas(program)
    symbol = next(s for s, n in formulas.sizes.names.items() if n == name)
    if symbol not in formulas.sizes.free:
        raise OptionError(f"{name} cannot be chosen by itself: the program takes {program.guards}")

    at, hints = formulas.sizes.free.index(symbol), list(formulas.sizes.hints)

    def taken(size: int) -> bool:
        return formulas.sizes.all([*hints[:at], size, *hints[at + 1 :]]) is not None

    def fitting(size: int) -> tuple[TrainingStep, Planner] | None:
        step = TrainingStep.of(program, optimizer, formulas.at({name: size}))
        planner = step.planner(share=False)
        return (step, planner) if planner.fits(budget - step.fixed) else None

    size = next(filter(taken, range(formulas.sizes.low[at], hints[at] + 1)))
    best, too_large = None, size
    while too_large <= LARGEST and taken(too_large) and (found := fitting(too_large)) is not None:
        size, best, too_large = too_large, found, 2 * too_large
    while best is not None:
        middle = (size + too_large) // 2
        near = itertools.chain(range(middle, size, -1), range(middle + 1, too_large))
        tried = next(filter(taken, near), None)
        if tried is None:
            break
        found = fitting(tried)
        size, best, too_large = (size, best, tried) if found is None else (tried, found, too_large)
    if best is None:
        return None
    step, planner = best
    draft = planner.plan(budget - step.fixed)
    assert draft is not None, "it fits"
    return size, step.planned(draft)


def batch(program: Program) -> str:
    """The name of the size that is the batch; OptionError where it is fixed."""
    stages.batch(program)
    return f"{next(n for n in program.inputs if n is not None)}.0"


@dataclass(frozen=True)
class Study:
    """A plan before anything runs, and what else there is to choose from.

    plan             for the budget
    kept, again      module path -> bytes that are kept of it, and that are computed again
    moved            module path -> bytes that are moved to the host
    curve, baselines other budgets, and what others would do
    batch            (name, size, peak) of the largest that fits, None where it was not asked for or none does
    formula          bytes of activations at their peak where everything is kept, as text
    notes            what could not be found, and why
    """

    budget: str
    plan: Plan
    kept: dict[str, int]
    again: dict[str, int]
    moved: dict[str, int]
    curve: list[Point]
    baselines: dict[str, Point]
    batch: tuple[str, int, int] | None
    formula: str
    notes: list[str]

    def to_json(self) -> str:
        """All of it, in bytes and shares."""
        plan = {k: v for k, v in asdict(self.plan).items() if k not in ("schedule", "let_go", "moved")}
        found = {
            "schema": "fxaccel-plan/1", "budget": self.budget, **plan, "kept": self.kept, "again": self.again,
            "moved": self.moved,
            "curve": [p._asdict() for p in self.curve],
            "baselines": {n: p._asdict() for n, p in self.baselines.items()},
            "largest_batch": self.batch and dict(zip(("size", "value", "peak"), self.batch, strict=True)),
            "formula": self.formula, "notes": self.notes,
        }  # fmt: skip
        return json.dumps(found, indent=2)

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        yield f"needs {said(self.plan.need)}, budget {self.budget}"
        yield str(self.plan)
        tables = {"kept": self.kept, "computed again": self.again, "moved to the host": self.moved}
        for word, rows in tables.items():
            if not rows:
                continue
            yield ""
            yield f"{word}: {said(sum(rows.values()))}"
            yield from _table(rows)
        yield ""
        yield f"{'':<12}{'budget':>12}{'peak':>12}{'activations':>13}{'overhead':>10}"
        for name, one in [*(("", p) for p in self.curve), *self.baselines.items()]:
            sizes = f"{said(one.budget):>12}{said(one.peak):>12}{said(one.activations):>13}"
            yield f"{name:<12}{sizes}{100 * one.overhead:>8.1f} %"
        yield ""
        if self.batch is not None:
            name, size, peak = self.batch
            yield f"largest batch that fits: {name} = {size}, {said(peak)} at the peak"
        if self.formula:
            yield f"bytes of activations where everything is kept: {self.formula}"
        yield from (f"note: {note}" for note in self.notes)

    def draw(self, file: Path) -> None:
        """The curve and its baselines as a picture."""
        drawable(file)
        figure, axes = canvas(7, 4.5)
        unit = 2**20 if self.plan.need < 2**30 else 2**30

        def at(points: list[Point]) -> tuple[list[float], list[float]]:
            return [p.peak / unit for p in points], [100 * p.overhead for p in points]

        axes.plot(*at(self.curve), marker="o", drawstyle="steps-post", label="plans")
        for (name, one), marker in zip(self.baselines.items(), "sD^", strict=True):
            axes.plot(*at([one]), marker=marker, linestyle="none", label=name)
        axes.plot([self.plan.peak / unit], [100 * self.plan.overhead], "k*", markersize=12, label="this plan")
        axes.set_xlabel(f"peak of the training step, {'MiB' if unit == 2**20 else 'GiB'}")
        axes.set_ylabel("computed again, % of the step's time")
        axes.grid(alpha=0.3)
        axes.legend()
        saved(figure, file)


def _table(rows: dict[str, int]) -> Iterator[str]:
    """The largest modules, those of one place in a numbered list together."""
    groups: dict[str, list[int]] = {}
    for module, nbytes in rows.items():
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", f".{module}")[1:], []).append(nbytes)
    ordered = sorted(groups.items(), key=lambda item: -sum(item[1]))
    for module, sizes in ordered[:ROWS]:
        count = f" x {len(sizes)}" if len(sizes) > 1 else ""
        yield f"  {said(sum(sizes)):>10}  {module or '(root)'}{count}"
    if len(ordered) > ROWS:
        rest = sum(sum(sizes) for _, sizes in ordered[ROWS:])
        yield f"  {said(rest):>10}  in {len(ordered) - ROWS} more"


def study(program: Program, checkpoint: Checkpoint, points: int) -> Study:
    """What `checkpoint` would do with a program; raises OptionError for a budget that cannot be kept."""
    if points < 2:
        raise OptionError(f"points is {points}, expected at least 2")
    if program.stages is not None:
        raise OptionError("a step in stages has a plan for each of them", "leave partition out of the passes")
    step = TrainingStep.of(program, checkpoint.optimizer)
    plan = checkpoint.for_step(step)
    amount, in_bytes = (0.0, True) if checkpoint.budget is None else read(checkpoint.budget)
    planner = step.planner(share=not in_bytes)
    paths = {n.name: path(n) for n in program.graph.nodes}
    gone, away = set(plan.schedule.dropped), {one.value for one in plan.schedule.moved}
    kept, again, moved = dict[str, int](), dict[str, int](), dict[str, int]()
    for value in step.profile.values:
        if value.needed:
            rows = again if value.name in gone else moved if value.name in away else kept
            module = paths[value.name.removesuffix(HIDDEN)]
            rows[module] = rows.get(module, 0) + value.nbytes
    largest, formula, notes = None, "", list[str]()
    try:
        formulas = Formulas(program)
        formula = written(formulas)
        if amount and in_bytes:
            found = largest_batch(program, int(amount), checkpoint.optimizer, formulas)
            largest = found and (batch(program), found[0], found[1].peak)
    except (RuleError, OptionError) as error:  # the plan itself stands
        notes.append(error.message)
    said_budget = str(checkpoint.budget or f"{checkpoint.max_overhead} of the step's time")
    return Study(
        said_budget, plan, kept, again, moved, curve(step, planner, points), baselines(step, planner),
        largest, formula, notes,
    )  # fmt: skip


def written(formulas: Formulas) -> str:
    """The peak of activations as text: whole where it is short, else the monomials that none exceeds."""
    whole = formulas.inner
    if len(str(whole)) <= SHORT:
        return str(whole)
    example = dict(zip(formulas.symbols.values(), formulas.sizes.hints, strict=True))
    terms = whole.args if isinstance(whole, sympy.Max) else [whole]
    highest = max(terms, key=lambda t: t.xreplace(example))
    monomials = dict(sympy.Poly(highest, *example).terms())
    leading = [e for e in monomials if not any(f != e and all(map(ge, f, e)) for f in monomials)]
    parts = [monomials[e] * sympy.prod([s**i for s, i in zip(example, e, strict=True)]) for e in leading]
    return f"{sympy.Add(*parts)} + ..."
