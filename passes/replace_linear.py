"""Replace dense linears by structured ones that are cheaper, within a quality budget.

    y = linear(x, W, b)  =>  y = monarch(x, right, left, b)          W ~ dense(right, left)
                             y = linear(linear(x, down), up, b)      W ~ up @ down

Fires on   linears whose weight is a parameter of its own; those after an attention, those whose result is an
           output, and embeddings where `also` asks for them. What does not pay in time stays, and the report
           has the figures.
Saves      FLOPs and parameters: a monarch of b blocks takes 2/b of a square matrix, rank r takes 2 r / n.
Exact      no. What a choice does to the model is measured on calibration calls and held to the budget. The
           structured linear is proved to compute what a dense one of its weight does.
Source     Dao et al. 2022, "Monarch", arXiv:2204.00595; Dao et al. 2019, "Learning Fast Algorithms for Linear
           Transforms Using Butterfly Factorizations", arXiv:1903.05895; Chen et al. 2021, "Pixelated
           Butterfly", arXiv:2112.00029; Wang et al. 2024, "SVD-LLM", arXiv:2403.07378.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxaccel.calibration import Calibration
from fxaccel.cost import parameter_bytes
from fxaccel.errors import OptionError
from fxaccel.ir import Program, Replacement
from fxaccel.passes._linear_fits import STRUCTURES, Candidate, Fits, Structured
from fxaccel.passes._linear_sites import ROLES, LinearSite, sites
from fxaccel.planner import Outcome, Place, choose
from fxaccel.quality import Budget
from fxaccel.rule import Pass, register

PAYS = 1.05  # times as fast as the dense linear a structured one must be
SHARES = (0.5, 0.25, 0.125, 0.0625)  # of the dense parameters, that a plan chooses among


@dataclass(frozen=True)
class Chosen:
    """A structured matrix in the place of a weight."""

    site: LinearSite
    way: Structured
    factors: tuple[Tensor, ...] | None
    remark: str


@dataclass(frozen=True)
class Plan:
    """What each linear becomes, which stay and why, and what the choice rests on."""

    chosen: tuple[Chosen, ...]
    refused: tuple[tuple[fx.Node, str], ...]
    basis: str

    def __str__(self) -> str:
        rows = [f"{c.site.name}: {c.remark}" for c in self.chosen]
        return "\n".join([f"{len(self.chosen)} weights become structured, {self.basis}", *rows])


@register
class ReplaceLinear(Pass):
    """Dense linears become structured ones (monarch, low-rank, ...) within a quality budget.

    structure         kinds that compete, joined by "|": butterfly (in two factors: monarch), monarch,
                      radix-2-butterfly, low-rank, block-diagonal-low-rank
    budget            how much worse the model may become: "change<=0.01", "kl<=0.02", "loss<=+1%",
                      "size<=0.5", or a fxaccel.Budget with a function of your own
    share             parameters of a structured matrix, of the dense one's; 0 lets the plan choose
    also              what is else left alone, joined by "|": attention-outputs, heads, embeddings
    init              "weights" projects the weights; "random" draws factors to train from, in the variance of
                      the weights, of the first kind, without a budget
    aware             project by the error of the outputs on the calibration calls, not of the weights
    steps             of layer-wise distillation that follow the projection
    seed              of what is drawn
    even_if_slower    count FLOPs where time is measured otherwise, and refuse nothing for its time
    """

    name = "replace-linear"
    step = "plan"
    numerics = "approximate"

    structure: str = "butterfly|low-rank"
    budget: str | float | Budget = "change<=0.01"
    share: float = 0.0
    also: str = ""
    init: str = "weights"
    aware: bool = True
    steps: int = 0
    seed: int = 0
    even_if_slower: bool = False

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        for option, given, known in (("structure", self.kinds, STRUCTURES), ("also", self.others, ROLES)):
            for word in given:
                if word not in known:
                    raise OptionError(f"{option} names {word!r}, expected some of {', '.join(known)}")
        if self.init not in ("weights", "random"):
            raise OptionError(f"init is {self.init!r}, expected 'weights' or 'random'")
        if not 0 <= self.share < 1:
            raise OptionError(f"share is {self.share}, expected a number from 0 to 1, 0 for any")

    @property
    def kinds(self) -> list[str]:
        """Kinds of structure that compete."""
        return self.structure.split("|")

    @property
    def others(self) -> list[str]:
        """Roles that are replaced too."""
        return [w for w in self.also.split("|") if w]

    def limit(self) -> Budget | None:
        """None: the plan itself keeps the budget, on calls that did not decide."""
        return None

    # -- plan -------------------------------------------------------------------------------------

    def plan(self, program: Program) -> Plan:
        """Choose; or do again what an earlier capture has in place."""
        found, refused = self.open_sites(program)
        adopted = {r.old[0]: r for r in program.adopted if r.by == self.name}
        if adopted:
            return self.again(adopted, found, refused)
        calibration: Calibration | None = program.calibration
        if calibration is None:
            raise OptionError("there is no call to measure on", "call accelerate, which captures one")
        fits = Fits(self, program, calibration)
        if self.init == "random":
            return self.from_scratch(fits, found, refused)
        return self.within_budget(fits, found, refused)

    def open_sites(self, program: Program) -> tuple[list[LinearSite], list[tuple[fx.Node, str]]]:
        """The sites that may be replaced, and the linears that may not with the reason."""
        found, refused = list[LinearSite](), list[tuple[fx.Node, str]]()
        for one in sites(program):
            node = one[0] if isinstance(one, tuple) else one.readers[0]
            if not self.covers(node):
                continue
            if isinstance(one, tuple):
                refused.append(one)
            elif one.role and one.role not in self.others:
                refused.append((node, f"it is one of the {one.role}; ask with also={one.role!r}"))
            else:
                found.append(one)
        return found, refused

    def again(
        self, adopted: dict[str, Replacement], found: list[LinearSite], refused: list[tuple[fx.Node, str]]
    ) -> Plan:
        """What is in place since an earlier capture; everything else stays as it is."""
        chosen = []
        for site in found:
            one = adopted.get(site.name)
            if one is None:
                refused.append((site.readers[0], "it stayed in an earlier capture"))
            else:
                assert isinstance(one.forward, Structured)
                chosen.append(Chosen(site, one.forward, None, f"{one.forward.matrix}, as before"))
        return Plan(tuple(chosen), tuple(refused), "as in an earlier capture")

    def from_scratch(self, fits: Fits, found: list[LinearSite], refused: list[tuple[fx.Node, str]]) -> Plan:
        """Factors of random numbers, whose product has the variance of the weight."""
        chosen = []
        for site in found:
            paying, why = fits.paying(site, self.kinds[:1], [self.share or SHARES[0]], PAYS)
            if not paying:
                refused.append((site.readers[0], why))
            for one in paying:
                weight = fits.weight(site)
                generator = torch.Generator().manual_seed(self.seed + zlib.crc32(site.name.encode()))
                variance = float(weight.double().var(correction=0))
                factors = one.matrix.random(variance, generator, weight.dtype)
                on_device = tuple(f.to(weight.device) for f in factors)
                told = f"{one.matrix}: {one.figures}, to train from"
                chosen.append(Chosen(site, Structured(one.matrix, site.flipped), on_device, told))
        return Plan(tuple(chosen), tuple(refused), "to be trained from scratch")

    def within_budget(self, fits: Fits, found: list[LinearSite], refused: list[tuple[fx.Node, str]]) -> Plan:
        """What saves most within the budget."""
        open_to = dict[LinearSite, list[Candidate]]()
        for site in found:
            paying, why = fits.paying(site, self.kinds, [self.share] if self.share else SHARES, PAYS)
            if paying:
                open_to[site] = paying
            else:
                refused.append((site.readers[0], why))
        budget, calibration = Budget.of(self.budget), fits.calibration
        measured = Budget("change", math.inf) if budget.of_size else budget
        held = calibration.held_out
        places = fits.places(open_to)
        outcome = choose(
            places, budget,
            lambda c: fits.tried(measured, c, calibration.deciding),
            (lambda c: fits.tried(measured, c, held)) if held else None,
            parameter_bytes(fits.program),
        )  # fmt: skip
        chosen = []
        for site, place in zip(open_to, places, strict=True):
            if site.name in outcome.chosen:
                fitted = outcome.chosen[site.name].made
                chosen.append(Chosen(site, fitted.way, fitted.factors, fitted.told))
            else:
                refused.append((site.readers[0], _declined(place, measured, outcome, budget)))
        return Plan(tuple(chosen), tuple(refused), _basis(budget, measured, outcome, calibration))

    # -- apply ------------------------------------------------------------------------------------

    def apply(self, program: Program, plan: Plan, driver: Any) -> None:
        """Put the factors in the place of the weights."""
        for node, why in plan.refused:
            driver.refused(node, why)
        for one in plan.chosen:
            self.put(program, one, driver)

    def put(self, program: Program, one: Chosen, driver: Any) -> None:
        """One weight, at all linears that read it."""
        site, way, val = one.site, one.way, one.site.node.meta["val"]
        names = tuple(f"{site.name}_{part}" for part in way.matrix.parts)
        made = Replacement(self.name, (site.name,), names, way, way.inverse, one.factors)
        with val.fake_mode:
            fakes = [torch.empty(s, dtype=val.dtype, device=val.device) for s in way.matrix.shapes]
        factors = program.replace_parameters(made, fakes)
        for reader in site.readers:
            with program.graph.inserting_before(reader):
                new = way.written(driver.ops(reader), reader, factors)
            proof = driver.lemma(
                str(way.matrix), reader, [*way.reads(reader), *factors],
                lambda op, of, reader=reader: way.by_definition(op, reader, factors, of),
                lambda op, of, reader=reader: way.written(op, reader, factors, of),
            )  # fmt: skip
            driver.applied(reader, one.remark, proof=proof.key)
            driver.exchange(reader, new)


def _declined(place: Place, measured: Budget, outcome: Outcome, budget: Budget) -> str:
    probe, seen = outcome.effects[place.name]
    alone = f"{probe.what}, off by {probe.error:.2g}, alone makes {measured.metric} {seen}"
    return f"the budget {budget} is better spent elsewhere: {alone}"


def _basis(budget: Budget, measured: Budget, outcome: Outcome, calibration: Calibration) -> str:
    metric = measured.metric
    if not calibration.given:
        return f"{budget}: {metric} is {outcome.decided} on the captured call, the only one there was"
    told = f"{budget}: {metric} is {outcome.decided} on the {len(calibration.deciding)} calls that decided"
    if outcome.held_out is None:
        return f"{told}; with so few none was held out, and nothing says that it holds elsewhere"
    return f"{told}, {outcome.held_out} on {len(calibration.held_out)} held out"
