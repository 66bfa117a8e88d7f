"""Move scales from the inputs of linears into their weights, so that both can be rounded to few bits.

    h = norm(x, w, b)            h = norm(x, w / s, b / s)
    y = linear(h, W, c)    =>    y = linear(h, W * s, c)

    u = linear(x, U, d)          u = linear(x, U / s[:, None], d / s)
    y = linear(u * v, W, c) =>   y = linear(u * v, W * s, c)

    y = linear(x, W, c)     =>   y = linear(x / s, W * s, c)

Fires on   linears with weights of their own. Inputs that come from a LayerNorm or RMSNorm with weights of its
           own, or from a linear, also through relu or a product with other values, and that linears alone
           read, are divided there; others by a call of its own.
Saves      nothing by itself. Columns of inputs with outliers are divided by more, so that a row's scale fits
           its other columns too; or, for weights of 4 bits, columns of weights that matter are multiplied.
Exact      algebraically; the parameters are rounded once more. What it changes is measured.
Source     Xiao et al. 2022, "SmoothQuant", arXiv:2211.10438; Lin et al. 2023, "AWQ", arXiv:2306.00978.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxaccel.calibration import Calibration, Moments
from fxaccel.errors import OptionError
from fxaccel.ir import Program, Replacement, arguments, is_call, source, target_name
from fxaccel.passes._advice import OWN
from fxaccel.passes._linear_sites import LINEAR, parameter
from fxaccel.passes.quantized import Grid, awq, smooth, smoothest
from fxaccel.progress import tracked
from fxaccel.rule import Ops, Pass, Refusal, register

aten = torch.ops.aten
METHODS = ("smoothquant", "awq")
NO_FACTORS = "no factors lessen the error on rows of its inputs"
ROWS = 32  # of each calibration call, by which a strength is chosen
NORMS = {"layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"}
PRODUCTS = {aten.mul.Tensor}
PASSES = {aten.relu.default, aten.dropout.default}  # a positive factor goes through


@dataclass(frozen=True)
class Smoothing:
    """The parameters of a group as its factors change them, and back.

    weights   names of the parameters that are multiplied
    dims      of each parameter: the dimension that the factors run along
    powers    of each parameter: 1 where it is multiplied, -1 where it is divided
    offset    what is added to the first one where it is used: it is divided with it
    """

    weights: tuple[str, ...]
    factors: Tensor
    dims: tuple[int, ...]
    powers: tuple[int, ...]
    offset: float

    def __call__(self, *old: Tensor) -> tuple[Tensor, ...]:
        return (*self.scaled(old, self.factors, 1), self.factors)

    def inverse(self, *new: Tensor) -> tuple[Tensor, ...]:
        """The original parameters."""
        return self.scaled(new[:-1], new[-1], -1)

    def scaled(self, given: Sequence[Tensor], factors: Tensor, sign: int) -> tuple[Tensor, ...]:
        """Each parameter times the factors, or with sign -1 by them."""
        made = []
        for i, (t, dim, power) in enumerate(zip(given, self.dims, self.powers, strict=True)):
            by = factors.double() ** (sign * power)
            shift = self.offset if i == 0 else 0.0
            wide = (t.double() + shift) * by.reshape([-1 if d == dim else 1 for d in range(t.dim())])
            made.append((wide - shift).to(t.dtype))
        return tuple(made)


@dataclass(frozen=True)
class Group:
    """A value, what makes it, and the linears that read it.

    way       the norm or linear that it is divided in, and what follows up to the value; () where the value
              is divided by a call of its own, for the reason `why`
    owners    parameters of the maker, which are divided along their first dimension
    weights   parameters of the linears, which are multiplied
    offset    what a norm adds to its weight
    """

    value: fx.Node
    way: tuple[fx.Node, ...]
    owners: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    linears: tuple[fx.Node, ...]
    offset: float
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """Which groups are scaled by what, and the linears whose inputs are not."""

    chosen: tuple[tuple[Group, Tensor], ...]
    refused: tuple[tuple[fx.Node, str], ...]

    def __str__(self) -> str:
        spans = [f"{g.value.name}: from {float(s.min()):.2g} to {float(s.max()):.2g}" for g, s in self.chosen]
        return "\n".join(
            [f"the inputs of {len(self.chosen)} groups of linears are divided by factors", *spans]
        )


class Seen:
    """Moments of a value, and some of its rows: ROWS of each call."""

    def __init__(self) -> None:
        self.moments, self.rows = Moments(), list[Tensor]()

    def add(self, value: Tensor) -> None:
        """One more value [..., C]."""
        self.moments.add(value)
        rows = value.reshape(-1, value.shape[-1])
        self.rows.append(rows[:: max(1, len(rows) // ROWS)][:ROWS].clone())


@register
class SmoothInputs(Pass):
    """Outliers of inputs move into the weights that read them, for quantize to follow.

    method      smoothquant: inputs and weights are made equally hard to round; awq: weights of large inputs
                are made easier to round to `weights`
    strength    of smoothquant, from 0 to 1: how much is moved; 0 takes for each group what leaves the least
                error on rows of the calibration calls
    weights     the format that awq makes ready for: int4 or nf4, in groups of `group`
    group       columns that will share a scale
    zeros       whether groups of int4 will have a zero
    insert      divide inputs by a call of its own where no parameter before them can take the factors
    """

    name = "smooth-inputs"
    step = "plan"
    numerics = "lower_precision"
    serves = ("inference",)

    method: str = "smoothquant"
    strength: float = 0.0
    weights: str = "int4"
    group: int = 64
    zeros: bool = True
    insert: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")
        if not 0 <= self.strength <= 1:
            raise OptionError(f"strength is {self.strength}, expected a number from 0 to 1")
        self.grid()

    def grid(self) -> Grid:
        """What the weights will be rounded to."""
        return Grid(self.weights, self.group, zeros=self.zeros and self.weights == "int4")

    def plan(self, program: Program) -> Plan:
        """The groups, and factors for each by the calibration calls."""
        found = [
            g
            for g in groups(program, self.insert)
            if self.covers(g.linears[0] if isinstance(g, Group) else g[0])
        ]
        sound = [g for g in found if isinstance(g, Group)]
        refused = tuple(g for g in found if not isinstance(g, Group))
        ways = [r.forward for r in program.adopted if r.by == self.name]
        adopted = {w.weights: w for w in ways if isinstance(w, Smoothing)}
        if adopted:
            before = {g: adopted.get(_names(program, g.weights)) for g in sound}
            late = [(g.linears[0], "it stayed in an earlier capture") for g, w in before.items() if w is None]
            kept = [(g, w.factors) for g, w in before.items() if w is not None]
            return Plan(tuple(kept), (*refused, *late))
        calibration: Calibration | None = program.calibration
        if calibration is None:
            raise OptionError("there is no call to measure on", "call accelerate, which captures one")
        tensors, chosen = calibration.state(program), []
        by_value = {g.value: g for g in sound}
        watched = calibration.watched(program, list(by_value), Seen, Moments.nbytes)
        for value, seen in tracked(watched, "smoothing inputs", len(sound)):
            one = by_value[value]
            held = [tensors[w.name].detach() for w in one.weights]
            factors = self.factors(seen, held)
            if factors is None:
                refused = (*refused, (one.linears[0], Refusal(NO_FACTORS, "strength=0.5")))
            else:
                chosen.append((one, factors.to(held[0])))
        return Plan(tuple(chosen), refused)

    def factors(self, seen: Seen, weights: Sequence[Tensor]) -> Tensor | None:
        """What the inputs of these weights are divided by, None where that does not help."""
        if self.method == "awq":
            return awq(self.grid(), torch.cat(list(weights)), seen.moments.gram)[1]
        if self.strength:
            return smooth(seen.moments.largest, weights, self.strength)
        found, strength = smoothest(seen.moments.largest, weights, torch.cat(seen.rows))
        return None if strength is None else found

    def apply(self, program: Program, plan: Plan, driver: Any) -> None:
        """Put the scaled parameters in the place of the others."""
        for node, why in plan.refused:
            driver.refused(node, why)
        for planned, factors in plan.chosen:
            group = _group(program, planned.value, self.insert)  # an owner may be a weight of a group before
            assert isinstance(group, Group), group
            self.put(program, group, factors, driver)

    def put(self, program: Program, group: Group, factors: Tensor, driver: Any) -> None:
        """One group."""
        proof = driver.lemma(
            self.name, group.linears[0], _read(group), lambda op, of: _written(op, of, group, False),
            lambda op, of: _written(op, of, group, True),
        )  # fmt: skip
        old = [*group.owners, *group.weights]
        names = _names(program, old)
        divided, multiplied = len(group.owners), len(group.weights)
        way = Smoothing(
            _names(program, group.weights), factors, (0,) * divided + (1,) * multiplied,
            (-1,) * divided + (1,) * multiplied, group.offset,
        )  # fmt: skip
        new = (*(f"{n}_smooth" for n in names), f"{names[0]}_factors")
        val = old[0].meta["val"]
        with val.fake_mode:
            fakes = [*(torch.empty_like(n.meta["val"]) for n in old), val.new_empty(len(factors))]
        made = program.replace_parameters(
            Replacement(self.name, names, new, way, way.inverse, frozen=True), fakes
        )
        for node, by in zip(old, made, strict=False):
            node.replace_all_uses_with(by, propagate_meta=False)
        where = f"in %{group.way[0].name}" if group.way else f"by themselves: {group.why}"
        if not group.way:
            first = min(group.linears)
            with program.graph.inserting_before(first):
                divided = driver.call(first, aten.div.Tensor, group.value, made[-1])
            for linear in group.linears:
                linear.replace_input_with(group.value, divided)
        for linear in group.linears:
            driver.applied(linear, f"its inputs are divided {where}", proof=proof.key)


def groups(program: Program, insert: bool) -> Iterator[Group | tuple[fx.Node, str]]:
    """Each value that linears read, as a group; or the first of the linears and why it is none."""
    seen = set[fx.Node]()
    for node in program.graph.nodes:
        if is_call(node, LINEAR) and node.args[0] not in seen:
            seen.add(node.args[0])
            found = _group(program, node.args[0], insert)
            yield (node, found) if isinstance(found, str) else found


def _group(program: Program, value: fx.Node, insert: bool) -> Group | str:
    linears = tuple(u for u in value.users if is_call(u, LINEAR) and u.args[0] is value)
    weights = []
    for linear in linears:
        weight, transposed = parameter(program, arguments(linear)["weight"])
        if weight is None or transposed or not _own(program, weight):
            return Refusal("a weight that reads its input is computed, tied or read elsewhere", OWN)
        weights.append(weight)
    found = _divided(program, value, linears)
    if not isinstance(found, str):
        return Group(value, found[0], found[1], tuple(weights), linears, found[2])
    if insert:
        return Group(value, (), (), tuple(weights), linears, 0.0, found)
    return Refusal(found, "insert=true")


def _divided(
    program: Program, value: fx.Node, linears: Sequence[fx.Node]
) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...], float] | str:
    """The way to a value, the parameters that can be divided at its start and its offset; or why not."""
    other = next((u for u in value.users if u not in linears), None)
    if other is not None:
        at = source(other) if other.op != "output" else ""
        what = "the output" if other.op == "output" else target_name(other.target)
        return f"its input is also read by {what}{f' at {at}' if at else ''}"
    way = _maker(value)
    if isinstance(way, str):
        return way
    owners, offset = _owners(program, way[0])
    return owners if isinstance(owners, str) else (way, owners, offset)


def _maker(value: fx.Node) -> tuple[fx.Node, ...] | str:
    """The norm or linear that a value comes from, and what is computed on the way to the value."""
    x: Any = value
    way = list[fx.Node]()
    while isinstance(x, fx.Node) and x.op == "call_function":
        name = getattr(x.target, "_opname", getattr(x.target, "__name__", ""))
        if len(x.users) > 1 and x is not value and name not in NORMS:
            return f"%{x.name}, which its input is made of, has other readers"
        way.append(x)
        if name in NORMS or is_call(x, LINEAR):
            return tuple(reversed(way))
        if x.target in PASSES or (name == "getitem" and x.args[1] == 0):
            x = x.args[0]
        elif x.target in PRODUCTS:
            x = next((a for a in reversed(x.args[:2]) if is_call(a, LINEAR) and len(a.users) == 1), None)
        else:
            break
    made = target_name(x.target) if isinstance(x, fx.Node) and x.op == "call_function" else "no linear"
    return f"its input comes from {made}, through which factors do not pass"


def _owners(program: Program, maker: fx.Node) -> tuple[tuple[fx.Node, ...] | str, float]:
    """The parameters that the maker's results are proportional to; what is added to the first."""
    bound, norm = arguments(maker), not is_call(maker, LINEAR)
    given = [bound.get(n) for names in (("weight", "w"), ("bias", "b")) for n in names if n in bound]
    if given[0] is None:
        return "its input comes from a norm without weights", 0.0
    found = []
    for one in given:
        if one is None:
            continue
        owner, transposed = parameter(program, one)
        if owner is None or transposed or not _own(program, owner):
            return "a parameter that makes its input is computed, tied or read elsewhere", 0.0
        found.append(owner)
    if norm and any(n.meta["val"].dim() != 1 for n in found):
        return "its input comes from a norm over several dimensions", 0.0
    return tuple(found), float(bound.get("offset", 0.0) or 0.0)


def _own(program: Program, node: fx.Node) -> bool:
    """Whether a parameter has one reader and no other name."""
    name = program.state[node.name].name
    return len(node.users) == 1 and not any(name in group for group in program.ties)


def _names(program: Program, nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    return tuple(program.state[n.name].name for n in nodes)


def _read(group: Group) -> list[fx.Node]:
    """What the lemma is about: all that is read on the way and by the linears, parameters among it."""
    inside = (*group.way, *group.linears)
    nodes = [a for n in inside for a in n.all_input_nodes if a not in group.way]
    return list(dict.fromkeys(nodes))


def _written(op: Ops, of: Any, group: Group, scaled: bool) -> Any:
    """The sum of all that the linears make; with the parameters scaled, by numbers made of one of them."""
    first, axis = (group.owners[0], 1) if group.owners else (group.weights[0], 0)
    row = of(first) if first.meta["val"].dim() == 1 else op.aten.select.int(of(first), axis, 0)
    factors = op.aten.add.Scalar(op.aten.abs.default(row), 1.0)
    held = {n: of(n) for n in _read(group)}
    if scaled:
        if not group.way:
            held[group.value] = op.aten.div.Tensor(held[group.value], factors)
        for i, owner in enumerate(group.owners):
            by = factors if owner.meta["val"].dim() == 1 else op.aten.unsqueeze.default(factors, 1)
            shift = 0.0 if i else group.offset
            wide = op.aten.add.Scalar(held[owner], shift) if shift else held[owner]
            divided = op.aten.div.Tensor(wide, by)
            held[owner] = op.aten.sub.Scalar(divided, shift) if shift else divided
        for weight in group.weights:
            held[weight] = op.aten.mul.Tensor(held[weight], factors)
    for node in group.way:
        held[node] = op(node.target, *fx.map_arg(node.args, held.__getitem__))
    total = None
    for linear in group.linears:
        y = op.aten.sum.dim_IntList(op(LINEAR, *fx.map_arg(linear.args, held.__getitem__)), [-1])
        total = y if total is None else op.aten.add.Tensor(total, y)
    return total
