"""Read weights as they were laid out for the processor, once, where inference runs on the CPU.

    y = linear(x, w, b)   =>   y = fxaccel.packed_linear(x, w, b)

Fires on   inference alone: float32 linears on the CPU whose weight is a parameter, or is what passes made of
           parameters, and is large enough.
Saves      the part of a product that lays its weight out: linears run 1.02 to 1.4 times as fast, whole models
           0.91 to 1.19 times (`bench/pack_weights.py`). A weight takes its memory twice from the fifth call
           with as many rows on, until it changes.
Exact      agrees with the original within its own rounding: MKL may sum in another order.
Source     torch's own `freezing`, `torch/_inductor/fx_passes/mkldnn_fusion.py`.
"""

from collections.abc import Sequence

import torch
from torch import fx

from fxaccel.derived import derived, standing
from fxaccel.ir import Program, arguments, incremental, is_call
from fxaccel.kernels import kernel
from fxaccel.rule import Match, Ops, Refusals, Rule, register


@incremental(lambda program, found, made: None)  # this pass leaves weights what they are
def ready(program: Program) -> set[fx.Node]:
    """Parameters and buffers that no call writes to, and what is computed from them ahead (an analysis)."""
    ahead = set(derived(program)[0])
    return {n for n in program.facts(standing) if n.op == "placeholder" or n in ahead}


def _mebibytes(w: torch.Tensor) -> float:
    return w.numel() * w.element_size() / 2**20


def _more(program: Program, found: dict[fx.Node, float], made: Sequence[fx.Node]) -> None:
    weights = [arguments(n)["w"] for n in made if is_call(n, torch.ops.fxaccel.packed_linear.default)]
    found |= {w: _mebibytes(w.meta["val"]) for w in weights}


@incremental(_more)
def packed(program: Program) -> dict[fx.Node, float]:
    """MiB of each weight that a packed linear reads (an analysis)."""
    found: dict[fx.Node, float] = {}
    _more(program, found, list(program.graph.nodes))
    return found


@register
class PackWeights(Rule):
    """In inference on the CPU, linears read weights that were laid out for it beforehand.

    mebibytes    of weights that are kept twice, at most; the last of the model are the first
    """

    name = "pack-weights"
    step = "lower"
    serves = ("inference",)

    mebibytes: float = 1024

    def pattern(self, op: Ops, x, w, b):
        return op.aten.linear.default(x, w, b)

    def refuse(self, m: Match) -> Refusals:
        x, w, b = m.val("x", "w", "b")
        made = m.root.meta["val"].dtype
        if m.w not in m.facts(ready):
            yield f"%{m.w.name} is no parameter or buffer that stays as it is, and none that a pass made"
        if made != x.dtype:
            yield f"the result is {made}: autocast rounds what is multiplied"
        if why := list(kernel("packed_linear").unsupported(x, w, b)):
            yield from why
            return
        known, size = m.facts(packed), _mebibytes(w)
        total = sum(known.values())
        if m.w not in known and total + size > self.mebibytes:
            yield (
                f"the weight has {size:.3g} MiB and those kept twice {total:.3g}; "
                f"mebibytes={self.mebibytes:g} is the most"
            )

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.packed_linear.default(m.x, m.w, m.b)
