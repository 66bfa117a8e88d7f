"""What happened: for every pass the sites it rewrote, those it refused with the reason, and near misses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxaccel.about import About

KINDS = ("applied", "refused", "near_misses")  # of sites: lists of a PassReport


@dataclass(frozen=True)
class Site:
    """One place in the model that a pass looked at.

    path      module path, "layers.0.attn"
    source    the user's "file.py:12"
    why       the refusal or the first clause that failed; what was done, for an applied site
    rule      name of the rule within the pass
    node      name of the root node in the listing before the pass
    proof     key of the site's proof in the manifest, "" where there is none
    change    what of yours would have to be another way for the pass to take it, "" where `why` says it all
    """

    path: str
    source: str
    why: str
    rule: str
    node: str
    proof: str = ""
    change: str = ""

    def __str__(self) -> str:
        where = "  ".join(w for w in (self.path or "(root)", self.source) if w)
        change = f"; it would be taken with: {self.change}" if self.change else ""
        return f"{where}: {self.why}{change}" if self.why else where


@dataclass
class PassReport:
    """The sites of one pass in one capture.

    error     why the pass changed nothing: it failed and was rolled back, or is not for this capture
    change    of a pass that is not exact: the largest relative change of an output, as measured
    """

    name: str
    applied: list[Site] = field(default_factory=list)
    refused: list[Site] = field(default_factory=list)
    near_misses: list[Site] = field(default_factory=list)
    plan: str = ""
    error: str = ""
    seconds: float = 0.0
    change: float | None = None


@dataclass
class CaptureReport:
    """One captured graph: its mode, its passes in the order they ran, and remarks of the capture."""

    mode: str
    passes: list[PassReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    check: str = ""


@dataclass
class Report:
    """Everything that `accelerate` did to a model; printing it gives a table.

    `report["fuse-norm"]` is the PassReport of a pass over all captures.

    about     the model and its graphs, for `html`; None of a report that was read from JSON
    """

    captures: list[CaptureReport] = field(default_factory=list)
    about: About | None = field(default=None, compare=False, repr=False)

    def __getitem__(self, name: str) -> PassReport:
        merged = PassReport(name)
        found = False
        for one in self._passes():
            if one.name == name:
                found = True
                merged.applied += one.applied
                merged.refused += one.refused
                merged.near_misses += one.near_misses
                merged.seconds += one.seconds
                merged.error = merged.error or one.error
                merged.plan = merged.plan or one.plan
                if one.change is not None:
                    merged.change = max(merged.change or 0.0, one.change)
        if not found:
            raise KeyError(f"{name!r} ran in no capture; there were {sorted(set(self))}")
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(p.name for p in self._passes()))

    def __contains__(self, name: object) -> bool:
        return name in set(self)

    def _passes(self) -> Iterator[PassReport]:
        for capture in self.captures:
            yield from capture.passes

    def within(self, name: str, path: str) -> Report:
        """What one pass did, and did not, in one module and those inside it."""
        captures = []
        for capture in self.captures:
            passes, nothing = [replace(p, plan="") for p in capture.passes if p.name == name], True
            for one in passes:
                for kind in KINDS:
                    inside = [s for s in getattr(one, kind) if f"{s.path}.".startswith(f"{path}.")]
                    setattr(one, kind, inside)
                    nothing &= not inside and not one.error
            notes = [f"{name} found nothing in {path} that its pattern begins with"] * nothing
            captures.append(replace(capture, passes=passes, notes=notes))
        return Report(captures)

    def to_json(self) -> str:
        """The report as JSON: {"captures": [{"mode", "passes": [{"name", "applied": [site, ...]}]}]}."""
        return json.dumps({"captures": [asdict(c) for c in self.captures]}, indent=2)

    def html(self, *, raw: bool = False) -> str:
        """The report as one page that needs no network: sites, proofs, refusals, graphs before and after.

        raw    before is the graph as captured, not its canonical form
        """
        from fxaccel.page import html

        return html(self, raw)

    def __getstate__(self) -> dict[str, Any]:
        return {"captures": self.captures}  # graphs stay where they are

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote."""
        return cls([_capture(c) for c in json.loads(text)["captures"]])

    def __str__(self) -> str:
        if not self.captures:
            return "nothing captured yet: the model is captured at its first call"
        return "\n\n".join(_text(c) for c in self.captures)


def _capture(data: dict[str, Any]) -> CaptureReport:
    passes = []
    for p in data["passes"]:
        sites = {k: [Site(**s) for s in p[k]] for k in KINDS}
        passes.append(PassReport(**{**p, **sites}))
    return CaptureReport(**{**data, "passes": passes})


def _text(capture: CaptureReport) -> str:
    head = f"{'pass':<24}{'applied':>8}{'refused':>8}{'near':>6}{'seconds':>9}"
    rows = [f"captured for {capture.mode}", head]
    for p in capture.passes:
        rows.append(
            f"{p.name:<24}{len(p.applied):>8}{len(p.refused):>8}{len(p.near_misses):>6}{p.seconds:>9.2f}"
        )
    for p in capture.passes:
        if p.error:
            rows.append(f"{p.name} changed nothing: {p.error}")
        elif p.change is not None:
            rows.append(f"{p.name} changes the outputs by {p.change:.2g} of their size")
            rows += [f"{p.name} plan     {line}" for line in p.plan.splitlines()]
        rows += [f"{p.name} refused  {line}" for line in _counted(p.refused)]
        rows += [f"{p.name} near     {line}" for line in _counted(p.near_misses)]
    rows += [f"note: {n}" for n in capture.notes]
    if capture.check:
        rows.append(capture.check)
    return "\n".join(rows)


def _counted(sites: list[Site]) -> Iterator[str]:
    """Sites with one line and one reason shown once, with their number."""
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.source, site.why), []).append(site)
    for same in groups.values():
        yield str(same[0]) + (f"  (and {len(same) - 1} like it)" if len(same) > 1 else "")
