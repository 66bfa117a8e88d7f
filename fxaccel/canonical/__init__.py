"""The canonical form."""

from __future__ import annotations

from torch import fx

from fxaccel import ir
from fxaccel.canonical import arguments, arithmetic, idiom, motion, parts, product, shape  # noqa: F401
from fxaccel.canonical.arguments import normal_arguments
from fxaccel.canonical.editor import BY, ORDER, STEPS, UNDER_AUTOCAST, Editor, aten, under_autocast
from fxaccel.canonical.effects import functionalise
from fxaccel.canonical.order import lay_out, merge_equal, rename, schedule, sort_operands
from fxaccel.canonical.product import round_scales
from fxaccel.errors import RuleError
from fxaccel.ir import Program

_ROUNDS = 40


def canonicalize(program: Program) -> list[str]:
    """Bring `program` to the canonical form, in place; returns what was done, one line a step."""
    e = Editor(program)
    for _ in range(_ROUNDS):
        if not _round(e):
            break
    else:
        raise RuleError(f"the canonical form was not reached in {_ROUNDS} rounds: {dict(e.counts)}")
    if schedule(program):
        e.counts["schedule"] += 1
    rename(program)
    drop_constants(program)
    program.changed()
    return [f"{name} x {n}" for name, n in e.counts.items() if n]


def drop_constants(program: Program) -> None:
    """Erase constants that nothing reads any more."""
    for node in list(program.graph.nodes):
        slot = program.state.get(node.name) if node.op == "placeholder" else None
        if slot is not None and slot.kind == "constant" and not node.users:
            del program.state[node.name], program.constants[slot.name]
            program.graph.erase_node(node)


def _round(e: Editor) -> bool:
    """One sweep over the graph and one look at it as a whole; whether anything changed."""
    before = e.counts.total()
    e.refresh()
    e.counts["functionalise"] += functionalise(e)
    if e.counts.total() != before:
        e.refresh()
    for node in list(e.graph.nodes):
        if not node._erased and node.op == "call_function":
            _settle(e, node)
    if e.counts.total() == before:
        e.counts["round_scales"] += round_scales(e)
        e.counts["sort_operands"] += sort_operands(e)
        e.counts["lay_out"] += lay_out(e)
    e.counts["eliminate_dead"] += ir.eliminate_dead(e.graph)
    e.refresh()
    e.counts["merge_equal"] += merge_equal(e)
    return e.counts.total() != before


def _settle(e: Editor, node: fx.Node) -> None:
    """Run the steps for one node until none has anything to do."""
    e.regions = node.meta.get("regions", ())
    frozen = e.storage.frozen(node) and node.target is not aten._assert_tensor_metadata.default
    autocast = under_autocast(e.regions)
    if not frozen and normal_arguments(e, node):
        e.counts["normal_arguments"] += 1
    changed = not frozen
    while changed:
        changed = False
        for step in STEPS.get(node.target, ()):
            if autocast and step not in UNDER_AUTOCAST:
                continue
            new = step(e, node)
            if new is None:
                continue
            e.counts[step.__name__] += 1
            if new is not node:
                e.replace(node, new)
            if new._erased or new is not node and new.meta.get("by") != BY:
                return
            node, changed = new, True
            normal_arguments(e, node)
            break


def steps() -> list[tuple[str, str]]:
    """Every step of the form with its sentence, in the order in which they are tried."""
    whole = [functionalise, normal_arguments, *ORDER, merge_equal, round_scales, sort_operands, schedule]
    return [(s.__name__, (s.__doc__ or "").splitlines()[0]) for s in whole]
