"""What a pass that is not exact changes, measured on the user's data with the model's own weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx, nn

from fxaccel import evaluate
from fxaccel.capture import Call
from fxaccel.errors import OptionError
from fxaccel.ir import Program
from fxaccel.quality import Budget, Measured
from fxaccel.tree import random_kept

PARTS = 4  # calls in a round of those that are fitted to, decide, and are held out
AT_ONCE = 2**30  # bytes of moments that are summed in one run over the calls
KEPT = 2**30  # bytes that the outputs of all calls may take to be kept


class Watcher(Protocol):
    """Whatever takes values in."""

    def add(self, value: Tensor) -> None:
        """One more value."""


W = TypeVar("W", bound=Watcher)


class Moments:
    """What the rows x [C] of a value sum up to.

    gram     sum of x x^T, [C, C] in float64
    largest  of each column, the largest |x|, [C]
    peaks    sum over the rows of the square of their largest |x|
    rows     how many there were
    """

    gram: Tensor
    largest: Tensor

    def __init__(self) -> None:
        self.rows, self.peaks = 0, 0.0

    @staticmethod
    def nbytes(value: fx.Node) -> int:
        """Bytes of those of a value [..., C]."""
        return 8 * int(value.meta["val"].shape[-1]) ** 2

    def add(self, value: Tensor) -> None:
        """The rows of one more value [..., C]."""
        rows = value.reshape(-1, value.shape[-1])
        rows = rows.float() if rows.dtype.itemsize < 4 else rows
        gram, sizes = (rows.mT @ rows).double(), rows.abs()
        largest = sizes.amax(0) if len(rows) else sizes.new_zeros(rows.shape[1])
        if self.rows:
            gram, largest = self.gram.add_(gram), torch.maximum(self.largest, largest)
        self.gram, self.largest, self.rows = gram, largest, self.rows + len(rows)
        if rows.numel():
            self.peaks += float(sizes.amax(1).double().square().sum())

    def __add__(self, other: Moments) -> Moments:
        """Of the rows of both."""
        made = Moments()
        made.gram, made.largest = self.gram + other.gram, torch.maximum(self.largest, other.largest)
        made.rows, made.peaks = self.rows + other.rows, self.peaks + other.peaks
        return made


@dataclass(frozen=True)
class Calibration:
    """Calls of a model to run programs on, and the model whose tensors they read.

    given      whether the user gave them; otherwise they are the call that was captured
    current    parameters that earlier captures have put in the place of the model's, by name

    What is fitted to some calls does better on them than elsewhere, and what is chosen by some does too: so
    they are parted, unless there are fewer than PARTS. What is run drops nothing and draws the same random
    numbers each time.
    """

    original: nn.Module
    calls: Sequence[Call]
    given: bool
    current: Mapping[str, Tensor] = field(default_factory=dict)
    _kept: dict[int, tuple[Program, list[Any]]] = field(default_factory=dict, repr=False)

    @property
    def fitted(self) -> list[int]:
        """The calls that weights are fitted to: every second one."""
        return self._every(0, 2)

    @property
    def deciding(self) -> list[int]:
        """The calls that decisions are made on: every fourth."""
        return self._every(1)

    @property
    def held_out(self) -> list[int]:
        """The calls that decisions are tried on: every fourth; none of fewer than PARTS."""
        return self._every(3) if len(self.calls) >= PARTS else []

    def _every(self, *places: int) -> list[int]:
        numbers = range(len(self.calls))
        return [i for i in numbers if i % PARTS in places] if len(numbers) >= PARTS else list(numbers)

    @property
    def source(self) -> str:
        """What the calls are, in words."""
        return "the calibration data" if self.given else "the call that was captured"

    def quality(
        self, budget: Budget, before: Program, after: Program, numbers: Sequence[int] | None = None
    ) -> Measured:
        """The budget's metric of `after` against `before`, over all calls or those of `numbers`."""
        said = []
        for i in range(len(self.calls)) if numbers is None else numbers:
            old, new = self.outputs(before, i), self.run(after, i)
            said.append(budget.measure(before.out_spec, old, new))
        return budget.together(said)

    def outputs(self, program: Program, number: int) -> list[Any]:
        """The outputs of a program for a call; those that are compared with again and again are kept."""
        kept = self._kept.get(number)
        if kept is not None and kept[0] is program:
            return kept[1]
        leaves = self.run(program, number)
        size = sum(t.nbytes for t in leaves if isinstance(t, Tensor))
        if size * len(self.calls) <= KEPT:
            self._kept[number] = program, leaves
        return leaves

    def moments(self, program: Program, values: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, Moments]]:
        """For each value [..., C] what its rows in the fitted calls sum up to."""
        return self.watched(program, values, Moments, Moments.nbytes)

    def watched(
        self, program: Program, values: Sequence[fx.Node], make: Callable[[], W],
        nbytes: Callable[[fx.Node], int],
    ) -> Iterator[tuple[fx.Node, W]]:  # fmt: skip
        """For each value what `make` made, after its `add` has seen the value in all fitted calls.

        nbytes    what it takes: those of AT_ONCE bytes are filled in one run over the calls
        """
        left = list(values)
        while left:
            now, size = list[fx.Node](), 0
            while left and (not now or size + nbytes(left[0]) <= AT_ONCE):
                now.append(left.pop(0))
                size += nbytes(now[-1])
            made = {n.name: make() for n in now}

            def add(node: fx.Node, value: Tensor, made: dict[str, W] = made) -> None:
                made[node.name].add(value.detach())

            for i in self.fitted:
                self.run(program, i, watch=dict.fromkeys(made, add))
            yield from ((n, made[n.name]) for n in now)

    def run(
        self, program: Program, number: int,
        watch: Mapping[str, Callable[[fx.Node, Any], None]] | None = None,
    ) -> list[Any]:  # fmt: skip
        """The outputs of a program for a call, always with the same random numbers and nothing dropped.

        watch     called with a node of this name and its value
        """
        call = self.calls[number]
        hint = "give calls of the structure, dtypes and sizes that the model is captured for"
        if call.spec != program.in_spec:
            raise OptionError(f"calibration call {number} has another structure than the captured one", hint)
        still = program.facts(evaluate.calm)
        try:
            with torch.no_grad(), random_kept():
                torch.manual_seed(0)
                leaves = [x.clone() if isinstance(x, Tensor) else x for x in call.leaves]
                return evaluate.run(still, self.state(still), leaves, watch=watch)
        except (RuntimeError, IndexError) as error:
            why = str(error).splitlines()[0]
            raise OptionError(
                f"calibration call {number} does not run through the captured graph: {why}", hint
            ) from error

    def state(self, program: Program) -> dict[str, Tensor]:
        """The tensors that a program reads, by placeholder; what it writes to is its own."""
        values: dict[str, Tensor] = dict(self.original.named_parameters(remove_duplicate=False))
        values |= {n: b.clone() for n, b in self.original.named_buffers(remove_duplicate=False)}
        for one in program.replacements:
            if all(n in self.current for n in one.new):
                made = tuple(self.current[n] for n in one.new)
            else:
                made = one.made(*(values[n] for n in one.old))
            values.update(zip(one.new, made, strict=True))
        return {
            name: program.constants[slot.name] if slot.kind == "constant" else values[slot.name]
            for name, slot in program.state.items()
        }
