"""The code of a program that is cut: one function a stage, which forward calls in turn.

    def stage_0(x):                              def forward(x):
        linear = linear(x, fc['weight'])             linear = stage_0(x)
        return linear                                return stage_1(linear)

    def stage_1(linear):
        ...
        return [y]

A stage can be taken out as a module that holds its own parameters and buffers alone (`taken`).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxaccel import emit
from fxaccel.effects import last_uses
from fxaccel.emit import indented
from fxaccel.errors import RuleError
from fxaccel.ir import Program
from fxaccel.stages import Part, parts


class Emitter(emit.Emitter):
    """Writes the functions of a program that is cut."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        if program.schedule is not None or not program.grad:
            raise RuleError("only a training step without a schedule can be cut into stages")
        self.parts: list[Part] = program.facts(parts)
        self.sizes: dict[fx.Node, tuple[fx.Node, int]] = {}
        for number in range(len(self.parts)):
            self.taken.add(name_of(number))

    def body(self, body: list[fx.Node], output: fx.Node) -> list[str]:
        lines = list[str]()
        for number, part in enumerate(self.parts):
            received, last = ", ".join(self.names[n] for n in part.receives), part is self.parts[-1]
            shown = self.stage(part, list(output.args[0]) if last else tuple(part.sends))
            self.functions.append([f"def {name_of(number)}({received}):", *indented(shown)])
            call, sent = f"{name_of(number)}({received})", "".join(f"{self.names[n]}, " for n in part.sends)
            lines.append(f"return {call}" if last else f"{sent.rstrip()} = {call}" if sent else call)
        return lines

    def stage(self, part: Part, shown: Any) -> list[str]:
        """Statements of one stage; names and what kernels share are its own."""
        self.sizes, self.shared = part.sizes, {}
        nodes, kept = list(part.nodes), [n for n in shown if isinstance(n, fx.Node)]
        lines = self.block(nodes, last_uses(nodes, kept), 0)
        return [*lines, f"return {self.argument(shown)}"]

    def expression(self, node: fx.Node) -> str:
        if node in self.sizes:
            tensor, dim = self.sizes[node]
            return f"{self.names[tensor]}.shape[{dim}]"
        return super().expression(node)


def name_of(number: int) -> str:
    """The name of a stage's function."""
    return f"stage_{number}"
