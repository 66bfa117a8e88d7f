"""Read weights as they were laid out for the processor, once, where inference runs on the CPU.

    y = linear(x, w, b)   =>   y = fxaccel.packed_linear(x, w, b)

Fires on   inference alone: float32 linears on the CPU whose weight is a parameter, or is made of parameters,
           and is large enough.
Saves      the part of a product that lays its weight out: two fifths of one of 16 rows, a seventh of one of
           256. A weight takes its memory twice from the fifth call with as many rows on, until it changes.
Exact      agrees with the original within its own rounding: MKL may sum in another order.
Source     torch's own `freezing`, `torch/_inductor/fx_passes/mkldnn_fusion.py`.
"""

from fxaccel.derived import derived, standing
from fxaccel.kernels import kernel
from fxaccel.rule import Match, Ops, Refusals, Rule, register


@register
class PackWeights(Rule):
    """In inference on the CPU, linears read weights that were laid out for it beforehand."""

    name = "pack-weights"
    step = "lower"
    serves = ("inference",)
    default = True

    def pattern(self, op: Ops, x, w, b):
        return op.aten.linear.default(x, w, b)

    def refuse(self, m: Match) -> Refusals:
        if m.w not in m.facts(standing):
            yield f"%{m.w.name} is not a parameter or a buffer that stays as it is"
        elif m.w.op == "call_function" and m.w not in m.facts(derived)[0]:
            yield f"%{m.w.name} is computed by the model at each call"
        made = m.root.meta["val"].dtype
        if made != m.val("x").dtype:
            yield f"the result is {made}: autocast rounds what is multiplied"
        yield from kernel("packed_linear").unsupported(*m.val("x", "w", "b"))

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.packed_linear.default(m.x, m.w, m.b)
