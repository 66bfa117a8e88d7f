"""The code of a program that is cut: one function a stage, which forward calls in turn.

    def stage_0(x):                              def forward(x):
        linear = linear(x, fc['weight'])             linear, = stage_0(x)
        return [linear]                              return stage_1(linear)

    def stage_1(linear):
        ...
        return [y]

A stage can be taken out as a module that holds its own parameters and buffers alone (`stage_module`).
"""

from __future__ import annotations

from torch import fx

from fxaccel import emit
from fxaccel.errors import RuleError
from fxaccel.ir import Program
from fxaccel.stages import parts


class Emitter(emit.Emitter):
    """Writes the functions of a program that is cut."""

    def __init__(self, program: Program, outer: emit.Emitter | None = None) -> None:
        super().__init__(program, outer)
        if program.schedule is not None or not program.grad:
            raise RuleError("only a training step without a schedule can be cut into stages")
        self.parts = program.facts(parts)
        self.stages = [self.title(name_of(number)) for number in range(len(self.parts))]

    def body(self, body: list[fx.Node], output: fx.Node) -> list[str]:
        lines = list[str]()
        for name, part in zip(self.stages, self.parts, strict=True):
            self.functions += emit.emitter(part.program, self).function(name)
            call = f"{name}({', '.join(self.names[n] for n in part.receives)})"
            self.names.update((n, self.local(n.name)) for n in part.sends if n not in self.names)
            sent = "".join(f"{self.names[n]}, " for n in part.sends)
            last = part is self.parts[-1]
            lines.append(f"return {call}" if last else f"{sent.rstrip()} = {call}" if sent else call)
        return lines


def name_of(number: int) -> str:
    """The name of a stage's function."""
    return f"stage_{number}"
