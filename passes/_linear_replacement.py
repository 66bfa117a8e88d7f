"""What passes share that hold the weights of linears in another form: sites, plan, budget, edits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxaccel.calibration import Calibration
from fxaccel.cost import parameter_bytes
from fxaccel.errors import OptionError
from fxaccel.ir import Program, Replacement
from fxaccel.passes._linear_fits import Candidate, Fits, Fitted, Way, put
from fxaccel.passes._linear_form import LinearForm, Parts
from fxaccel.passes._linear_sites import ROLES, LinearSite, sites
from fxaccel.planner import Outcome, Place, choose
from fxaccel.quality import Budget
from fxaccel.rule import Pass, Refusal

PAYS = 1.05  # times as fast as the dense linear another form must be


@dataclass(frozen=True)
class Chosen:
    """A form in the place of a weight."""

    site: LinearSite
    way: Way
    parts: Parts | None
    remark: str


@dataclass(frozen=True)
class Plan:
    """What each linear becomes, which stay and why, and what the choice rests on."""

    chosen: tuple[Chosen, ...]
    refused: tuple[tuple[fx.Node, str], ...]
    basis: str

    def __str__(self) -> str:
        rows = [f"{c.site.name}: {c.remark}" for c in self.chosen]
        return "\n".join([f"{len(self.chosen)} weights change, {self.basis}", *rows])


@dataclass(frozen=True, kw_only=True)
class WeightReplacement(Pass):
    """Calls whose weights are held in another form: a subclass says which by `sites`, and how by `forms`.

    even_if_slower    count FLOPs where time is measured otherwise, and refuse nothing for its time
    """

    step = "plan"
    open_roles: ClassVar[tuple[str, ...]] = ()
    """Roles of linears that need no asking for."""

    even_if_slower: bool = False

    @staticmethod
    def known(option: str, given: Sequence[str], known: Sequence[str]) -> None:
        """Raises OptionError where a word of an option is not known."""
        for word in given:
            if word not in known:
                raise OptionError(f"{option} names {word!r}, expected some of {', '.join(known)}")

    @property
    def others(self) -> list[str]:
        """Roles that are replaced too."""
        return []

    @property
    def by_outputs(self) -> bool:
        """Whether fits go by the error of the outputs on the calibration calls, not of the weights."""
        return False

    def sites(self, program: Program) -> Iterator[LinearSite | tuple[fx.Node, str]]:
        """Each weight that may be open; where one cannot be replaced, a call that reads it and the reason."""
        raise NotImplementedError

    def allowed(self, fits: Fits, open_to: Mapping[LinearSite, list[Candidate]]) -> Budget | None:
        """How much worse the model may become; None to take the first form that pays, whatever it does."""
        raise NotImplementedError

    def limit(self) -> Budget | None:
        """None: the plan itself keeps the budget, on calls that did not decide."""
        return None

    def forms(self, site: LinearSite, program: Program, fits: Fits) -> list[LinearForm]:
        """The forms that compete for a site, those that are liked best first."""
        raise NotImplementedError

    # -- plan -------------------------------------------------------------------------------------

    def plan(self, program: Program) -> Plan:
        """Choose; or do again what an earlier capture has in place."""
        mine = [r for r in program.adopted if r.by == self.name]
        adopted = {name: r for r in mine for name in (*r.old, *r.aliases)}
        found, refused = self.open_sites(program, set(adopted))
        if adopted:
            return self.again(program, adopted, found, refused)
        calibration: Calibration | None = program.calibration
        if calibration is None:
            raise OptionError("there is no call to measure on", "call accelerate, which captures one")
        return self.chosen(Fits(self, program, calibration), found, refused)

    def chosen(self, fits: Fits, found: list[LinearSite], refused: list[tuple[fx.Node, str]]) -> Plan:
        """The plan of a first capture."""
        open_to = dict[LinearSite, list[Candidate]]()
        for site in found:
            paying, why = fits.paying(site, self.forms(site, fits.program, fits), PAYS)
            if paying:
                open_to[site] = paying
            else:
                refused.append((site.readers[0], why))
        budget = self.allowed(fits, open_to)
        if budget is None:
            return self.without_budget(fits, open_to, refused)
        return self.within_budget(budget, fits, open_to, refused)

    def open_sites(
        self, program: Program, adopted: set[str]
    ) -> tuple[list[LinearSite], list[tuple[fx.Node, str]]]:
        """The sites that may be replaced, and the linears that may not with the reason.

        adopted    names of weights that are replaced already, whatever the options say
        """
        found, refused = list[LinearSite](), list[tuple[fx.Node, str]]()
        for one in self.sites(program):
            node = one[0] if isinstance(one, tuple) else one.readers[0]
            kept = not isinstance(one, tuple) and one.name in adopted
            if not (self.covers(node) or kept):
                continue
            if isinstance(one, tuple):
                refused.append(one)
            elif kept:
                found.append(one)
            elif closed := [r for r in one.roles if r not in (*self.open_roles, *self.others)]:
                told, also = " and ".join(closed), "|".join([*self.others, *closed])
                refused.append((node, Refusal(f"it is one of the {told}", f"also={also}")))
            else:
                found.append(one)
        return found, refused

    def again(
        self, program: Program, adopted: dict[str, Replacement], found: list[LinearSite],
        refused: list[tuple[fx.Node, str]],
    ) -> Plan:  # fmt: skip
        """What is in place since an earlier capture; everything else stays as it is."""
        chosen = []
        for site in found:
            one = adopted.get(site.name)
            if one is None:
                refused.append((site.readers[0], "it stayed in an earlier capture"))
            else:
                assert isinstance(one.forward, Way)
                form = one.forward.form.serving(program.grad)
                way = dataclasses.replace(one.forward, form=form)
                named = dataclasses.replace(site, name=one.old[0], aliases=one.aliases)
                chosen.append(Chosen(named, way, None, f"{form}, as before"))
        return Plan(tuple(chosen), tuple(refused), "as in an earlier capture")

    def without_budget(
        self, fits: Fits, open_to: dict[LinearSite, list[Candidate]], refused: list[tuple[fx.Node, str]]
    ) -> Plan:
        """At each site the first form that pays."""
        places = fits.places({site: candidates[:1] for site, candidates in open_to.items()})
        made: list[Fitted] = [p.alternatives[0].made for p in places]
        chosen = tuple(Chosen(s, m.way, m.parts, m.told) for s, m in zip(open_to, made, strict=True))
        return Plan(chosen, tuple(refused), "without a budget")

    def within_budget(
        self, budget: Budget, fits: Fits, open_to: dict[LinearSite, list[Candidate]],
        refused: list[tuple[fx.Node, str]],
    ) -> Plan:  # fmt: skip
        """What saves most within the budget."""
        calibration = fits.calibration
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
                chosen.append(Chosen(site, fitted.way, fitted.parts, fitted.told))
            else:
                refused.append((site.readers[0], _declined(place, measured, outcome, budget)))
        return Plan(tuple(chosen), tuple(refused), _basis(budget, measured, outcome, calibration))

    # -- apply ------------------------------------------------------------------------------------

    def apply(self, program: Program, plan: Plan, driver: Any) -> None:
        """Put the parts in the place of the weights."""
        for node, why in plan.refused:
            driver.refused(node, why)
        for one in plan.chosen:
            self.put(program, one, driver)

    def put(self, program: Program, one: Chosen, driver: Any) -> None:
        """One weight, at all linears that read it."""
        way = one.way
        held, made = put(program, one.site, way, one.parts, self.name, driver.ops)
        for reader, new in made:
            proof = driver.lemma(
                str(way.form), reader, [*way.reads(reader), *held],
                lambda op, of, reader=reader: way.by_definition(op, reader, held, of),
                lambda op, of, reader=reader: way.written(
                    op, reader, way.form.ready(op, of(tuple(held))), of
                ),
            )  # fmt: skip
            driver.applied(reader, one.remark, proof=proof.key)
            driver.exchange(reader, new)


@dataclass(frozen=True, kw_only=True)
class LinearReplacement(WeightReplacement):
    """Linears whose weights are held in another form.

    also              what is else left alone, joined by "|": attention-outputs, heads, embeddings
    aware             fit by the error of the outputs on the calibration calls, not of the weights
    """

    also: str = ""
    aware: bool = True

    def __post_init__(self) -> None:
        self.known("also", self.others, ROLES)

    @property
    def others(self) -> list[str]:
        return [w for w in self.also.split("|") if w]

    @property
    def by_outputs(self) -> bool:
        return self.aware

    def sites(self, program: Program) -> Iterator[LinearSite | tuple[fx.Node, str]]:
        return sites(program)


def _declined(place: Place, measured: Budget, outcome: Outcome, budget: Budget) -> str:
    probe, seen = outcome.effects[place.name]
    alone = f"{probe.what}, off by {probe.error:.2g}, alone makes {measured.metric} {seen}"
    change = "a smaller size" if budget.of_size else "a larger budget"
    return Refusal(f"the budget {budget} is better spent elsewhere: {alone}", change)


def _basis(budget: Budget, measured: Budget, outcome: Outcome, calibration: Calibration) -> str:
    metric = measured.metric
    if not calibration.given:
        return f"{budget}: {metric} is {outcome.decided} on the captured call, the only one there was"
    told = f"{budget}: {metric} is {outcome.decided} on the {len(calibration.deciding)} calls that decided"
    if outcome.held_out is None:
        return f"{told}; with so few none was held out, and nothing says that it holds elsewhere"
    return f"{told}, {outcome.held_out} on {len(calibration.held_out)} held out"
