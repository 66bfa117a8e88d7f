"""Which rewrites make a model fail a check of the user's own: a smallest set of sites, in few runs.

The check is run with every site rewritten, with none, and then with halves, thirds, ... of those that are
left until none can be spared (ddmin: Zeller & Hildebrandt 2002, "Simplifying and Isolating Failure-Inducing
Input"). A pass that needs the whole graph counts as one site.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from fxaccel import repro
from fxaccel.discover import resolve
from fxaccel.driver import site_key
from fxaccel.errors import OptionError
from fxaccel.module import accelerate
from fxaccel.report import Site
from fxaccel.rule import Rules

Check = Callable[[Any], object]


@dataclass(frozen=True)
class Suspect:
    """A site of a pass, or where `site` is None all that the pass does."""

    pass_name: str
    site: Site | None = None

    @property
    def key(self) -> str:
        """What the pass manager is told to rewrite: the same in every run."""
        return self.pass_name if self.site is None else site_key(self.pass_name, self.site)

    def __str__(self) -> str:
        if self.site is None:
            return f"{self.pass_name}: all that it does"
        where = "  ".join(w for w in (self.site.path or "(root)", self.site.source) if w)
        return f"{self.pass_name}: {self.site.rule} at {where}"


@dataclass
class Bisection:
    """What was found; printing it gives a line for each suspect.

    suspects    without any one of these the check holds; empty where it holds with all of them
    runs        how often the check was run
    sites       how many there were to choose from
    """

    suspects: list[Suspect]
    runs: int
    sites: int
    _fast: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        if not self.suspects:
            return f"the check holds with all {self.sites} sites rewritten"
        head = f"the check fails by {len(self.suspects)} of {self.sites} sites, found in {self.runs} runs:"
        return "\n".join([head, *(f"  {s}" for s in self.suspects)])

    def to_json(self) -> str:
        """{"runs", "sites", "suspects": [{"pass_name", "site": {...}}]}."""
        found = [asdict(s) for s in self.suspects]
        return json.dumps({"runs": self.runs, "sites": self.sites, "suspects": found}, indent=2)

    def repro(self, number: int = 0) -> str:
        """A script that runs one suspect by itself, as it was and rewritten, on random inputs."""
        if not self.suspects:
            raise OptionError("the check holds, so there is no site to reproduce")
        site = self.suspects[number].site
        if site is None or not site.proof:
            raise OptionError(f"{self.suspects[number]}, which has no site of its own to reproduce")
        for one in self._fast.__dict__["_fxaccel"].all:
            if site.proof in one.manifest.claims:
                return repro.script(one.program, one.manifest.claims[site.proof], str(self.suspects[number]))
        raise AssertionError("a site rests on a proof of its capture")


def bisect(
    model: nn.Module,
    check: Check,
    passes: Iterable[Any] | None = None,
    *,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    allow: str = "reassociated",
    calibration: Iterable[Any] = (),
) -> Bisection:
    """A smallest set of sites whose rewriting makes `check` fail.

    check             called with an accelerated model; whether what it does is right. To raise is to fail
    passes            as `accelerate` takes them, and so the rest; nothing is timed
    example_inputs    where the check does not call the model itself

    Raises OptionError where the check fails without any rewrite, too.
    """
    trials = _Trials(model, check, resolve(passes), example_inputs, allow, list(calibration))
    full = trials.run(None)
    suspects = trials.suspects()
    if full:
        return Bisection([], trials.runs, len(suspects))
    if not trials.run(frozenset()):
        why = f": it raises {trials.raised}" if trials.raised else ""
        raise OptionError(
            f"the check fails without any rewrite, too{why}",
            "it is the check, the model or its capture; see fast.verify()",
        )
    found = _smallest(suspects, lambda some: not trials.run(frozenset(s.key for s in some)))
    return Bisection(found, trials.runs, len(suspects), trials.failing)


class _Trials:
    """Runs the check with some sites rewritten, each choice of sites once."""

    def __init__(
        self,
        model: nn.Module,
        check: Check,
        passes: list[Any],
        example: Any,
        allow: str,
        calibration: list[Any],
    ) -> None:
        self.model, self.check, self.passes, self.example = model, check, passes, example
        self.options: dict[str, Any] = {"allow": allow, "calibration": calibration}
        self.known: dict[frozenset[str] | None, bool] = {}
        self.full: Any = None
        self.failing: Any = None  # the last that did: with fewer sites than any before
        self.raised = ""

    @property
    def runs(self) -> int:
        return len(self.known)

    def run(self, only: frozenset[str] | None) -> bool:
        """Whether the check holds with these sites rewritten, None for all."""
        if only in self.known:
            return self.known[only]
        fast = accelerate(copy.deepcopy(self.model), self.passes, measure=False, **self.options)
        session = fast.__dict__["_fxaccel"]
        session.settings = replace(session.settings, only=only, requested=())
        self.raised = ""
        try:
            if self.example is not None:
                with_kwargs = isinstance(self.example, Mapping)
                fast(**self.example) if with_kwargs else fast(*self.example)
            holds = bool(self.check(fast))
        except Exception as error:  # of the check or the model it calls: that is what is looked for
            holds, self.raised = False, f"{type(error).__name__}: {error}"
        self.known[only] = holds
        if only is None:
            self.full = fast
        if not holds:
            self.failing = fast
        return holds

    def suspects(self) -> list[Suspect]:
        """All sites of the run in which everything is rewritten."""
        report, found = self.full.report(), list[Suspect]()
        for one in self.passes:
            sites = report[one.name].applied if one.name in report else []
            if isinstance(one, Rules):
                found += [Suspect(one.name, site) for site in sites]
            elif sites:
                found.append(Suspect(one.name))
        return list({s.key: s for s in found}.values())


def _smallest(sites: Sequence[Suspect], fails: Callable[[Sequence[Suspect]], bool]) -> list[Suspect]:
    """A part of the sites that fails, and of which none can be spared."""
    left, parts = list(sites), 2
    while len(left) > 1:
        cuts = [len(left) * i // parts for i in range(parts + 1)]
        pieces = [left[a:b] for a, b in itertools.pairwise(cuts)]
        rests = [[s for s in left if s not in piece] for piece in pieces] if parts > 2 else []
        smaller = next((some for some in (*pieces, *rests) if some and fails(some)), None)
        if smaller is not None:
            parts = 2 if len(smaller) <= -(-len(left) // parts) else max(parts - 1, 2)
            left = smaller
        elif parts < len(left):
            parts = min(2 * parts, len(left))
        else:
            break
    return left
