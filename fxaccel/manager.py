"""Orders the passes, runs each as a transaction, and keeps the record.

A pass works on a copy of the program. What it leaves must lint, keep the types of all outputs and keep
every value that was there; a pass that raises, breaks that, or fails the proof of one site is dropped
whole, the report says why, and the next pass starts from the last good graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from torch import fx

from fxaccel import fence
from fxaccel.canonical import tidy
from fxaccel.driver import Driver, same_type
from fxaccel.effects import eliminate_dead, storage_owner
from fxaccel.errors import FxaccelError, OptionError, RuleError
from fxaccel.ir import (
    Program,
    assumed,
)  # fmt: skip
from fxaccel.layout import layouts, settle
from fxaccel.proof import Manifest
from fxaccel.quality import Budget
from fxaccel.report import CaptureReport, PassReport
from fxaccel.rule import EXACT, NUMERICS, STEPS, Pass, Rules, declared
from fxaccel.stopwatch import Stopwatch

CANONICAL = {"canonical-norms"}  # properties of every graph before the first pass: norms are calls of ATen


# -- order -----------------------------------------------------------------------------------------


def order(passes: Sequence[Pass]) -> list[Pass]:
    """The passes in the order they run, by step, then by what they need, then as given.

    Raises OptionError on a conflict, an unmet requirement, or a circle.
    """
    for p in passes:
        declared(type(p))
    by_name = {p.name: p for p in passes}
    if len(by_name) < len(passes):
        twice = next(p.name for p in passes if sum(q.name == p.name for q in passes) > 1)
        raise OptionError(
            f"pass {twice!r} was given twice, expected each pass once",
            "join module globs with | in where=",
        )
    _refuse_conflicts(by_name)
    graph = nx.DiGraph()
    graph.add_nodes_from(by_name)
    for p in passes:
        graph.add_edges_from((q.name, p.name) for q in passes if _before(q, p))
    position = {p.name: (STEPS.index(p.step), i) for i, p in enumerate(passes)}
    try:
        names = list(nx.lexicographical_topological_sort(graph, key=lambda n: position[n]))
    except nx.NetworkXUnfeasible:
        circle = " -> ".join(edge[0] for edge in nx.find_cycle(graph))
        raise OptionError(f"the passes need each other in a circle: {circle}") from None
    return [by_name[n] for n in names]


def _before(q: Pass, p: Pass) -> bool:
    if q is p:
        return False
    return (
        STEPS.index(q.step) < STEPS.index(p.step)
        or bool(set(q.produces) & set(p.requires))
        or bool(set(q.requires) & set(p.invalidates) and not set(q.requires) & set(p.produces))
    )


def _refuse_conflicts(by_name: dict[str, Pass]) -> None:
    made = CANONICAL | {fact for p in by_name.values() for fact in p.produces}
    for p in by_name.values():
        for other in p.conflicts:
            if other in by_name:
                raise OptionError(
                    f"passes {p.name!r} and {other!r} cannot run together", f"leave out {other!r}"
                )
        for fact in p.requires:
            if fact not in made:
                raise OptionError(
                    f"pass {p.name!r} requires {fact!r}, which no other pass given produces",
                    "add a pass that produces it",
                )


# -- run -------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the passes made of a program."""

    program: Program
    report: CaptureReport
    manifest: Manifest = field(default_factory=Manifest)


def run(
    program: Program, passes: Sequence[Pass], *, allow: str = "reassociated", strict: bool = False,
    stopwatch: Stopwatch | None = None, only: frozenset[str] | None = None,
) -> Run:  # fmt: skip
    """Run `passes` (already ordered) over a canonical program.

    What passes that are not exact change is measured on the program's calibration, if it has one. With a
    `stopwatch`, sites of local rules that are slower than before are refused, or all of a pass `together`.
    `only` has the `site_key` of sites, and names of passes that are no local rules: all others are left as
    they are.
    """
    result = Run(program, CaptureReport(mode(program.training, program.grad)))
    program.guards += assumed(program)
    for one in passes:
        record = PassReport(one.name)
        result.report.passes.append(record)
        started = time.perf_counter()
        why = _unfit(one, program, allow, only)
        if why:
            record.error = why
        else:
            driver = Driver(result.program.copy(), one, record, result.manifest.copy(), stopwatch, only)
            if _transaction(driver, result.program, strict):
                result.program, result.manifest = driver.program, driver.manifest
            _absorb(one, result.program)
        record.seconds = time.perf_counter() - started
    result.report.notes += result.program.notes
    return result


def _absorb(one: Pass, program: Program) -> None:
    """Restrict the capture to the sizes that the pass relied on (it asked a symbolic size for its value)."""
    added = assumed(program)
    if added:
        program.guards += added
        program.notes.append(f"{one.name} decided on sizes: this capture serves {' and '.join(added)} only")


def mode(training: bool, grad: bool) -> str:
    """The mode of a capture, in words."""
    return f"{'training' if training else 'eval'}{'' if grad else ', no gradients'}"


def _unfit(one: Pass, program: Program, allow: str, only: frozenset[str] | None) -> str:
    if NUMERICS.index(one.numerics) > NUMERICS.index(allow):
        return f"it is of class {one.numerics!r} and allow={allow!r}; pass allow={one.numerics!r} to use it"
    use = "training" if program.grad else "inference"
    if use not in one.serves:
        return f"it serves {' and '.join(one.serves)} only, and this capture is for {use}"
    if only is not None and not isinstance(one, Rules) and one.name not in only:
        return "it is left out"
    return ""


def is_exact(one: Pass) -> bool:
    """Whether a pass promises the same function, up to the order of summation."""
    return one.numerics in EXACT


def _transaction(driver: Driver, program: Program, strict: bool) -> bool:
    """Whether what the pass made of the driver's copy of the program is to be kept."""
    work, one, record = driver.program, driver.one, driver.record
    before = layouts(work)  # a copy may name its nodes otherwise
    try:
        with fence.around(one.name):
            plan = one.plan(work)
            record.plan = "" if plan is None else str(plan)
            one.apply(work, plan, driver)
        fence.captured(program, work, one.name)
        fence.calls(work, one.name)
        work.changed()
        eliminate_dead(work.graph)
        if record.applied:
            if driver.relaid:
                settle(work, driver, before)
            tidy(work)
        _check(program, work, one)
        if record.applied and not is_exact(one):
            _measure(driver, program)
        return not driver.slower(program)
    except Exception as error:
        if strict:
            raise
        record.applied.clear()
        record.change = None
        record.error = (
            error.message if isinstance(error, FxaccelError) else f"{type(error).__name__}: {error}"
        )
        return False


def _measure(driver: Driver, before: Program) -> None:
    """Record what the pass changes; raises OptionError if that is more than its `budget`."""
    calibration = before.calibration
    if calibration is None:
        return
    change, budget = Budget("change", math.inf), driver.one.limit()
    found = calibration.quality(change, before, driver.program)
    driver.record.change = found.value
    if budget is None or any(r.by == driver.one.name for r in before.adopted):
        return  # what is in place since an earlier capture was held to the budget there
    if not budget.of_change:
        found = calibration.quality(budget, before, driver.program)
    if not found.bound <= budget.limit:
        raise OptionError(f"{budget.metric} is {found} on {calibration.source}, expected {budget}")


def _check(before: Program, after: Program, one: Pass) -> None:
    """The invariants of a graph that every pass must keep."""
    after.graph.lint()
    old, new = before.graph.output_node().args[0], after.graph.output_node().args[0]
    if len(old) != len(new):
        raise RuleError(f"{one.name} left {len(new)} outputs of {len(old)}")
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        same_type(a, b, f"output {i}", one.name)
    if before.inputs != after.inputs or [n for n in before.inputs if n] != [
        n.name for n in after.graph.find_nodes(op="placeholder") if n.name not in after.state
    ]:
        raise RuleError(f"{one.name} changed the inputs of the graph")
    storage = zip(_storage(before), _storage(after), strict=True)
    for i, (a, b) in enumerate(storage):
        if a != b:
            a, b = a or "nothing", b or "nothing"
            raise RuleError(f"{one.name} changed what output {i} shares storage with from {a} to {b}")
    for node in after.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            raise RuleError(f"{one.name} made %{node.name} without meta['val']; use ir.call")


def _storage(program: Program) -> list[str]:
    """For each output the input, parameter or earlier output that it may share storage with, "" for none."""
    found, owners = [], dict[Any, str]()
    for i, output in enumerate(program.graph.output_node().args[0]):
        owner = storage_owner(output) if isinstance(output, fx.Node) else i
        if isinstance(owner, fx.Node) and owner.op == "placeholder":
            found.append(f"%{owner.name}")
        else:
            found.append(owners.get(owner, ""))
        owners.setdefault(owner, f"output {i}")
    return found
