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

from fxaccel.kernels import kernel
from fxaccel.passes._advice import autocast
from fxaccel.passes._packed import changes, crowds
from fxaccel.rule import Match, Ops, Refusals, Rule, register


@register
class PackWeights(Rule):
    """In inference on the CPU, linears read weights that were laid out for it beforehand.

    mebibytes    of weights that are kept twice, at most; the last of the model are the first
    """

    name = "pack-weights"
    step = "lower"
    serves = ("inference",)
    together = True  # other weights take a packed one's place in the cache: the more, the smaller the gain
    at_most = 0.95  # for the memory that weights take twice

    mebibytes: float = 1024

    def pattern(self, op: Ops, x, w, b):
        return op.aten.linear.default(x, w, b)

    def refuse(self, m: Match) -> Refusals:
        x, w, b = m.val("x", "w", "b")
        made = m.root.meta["val"].dtype
        yield from changes(m)
        if made != x.dtype:
            yield autocast(made, "multiplied")
        if why := list(kernel("packed_linear").unsupported(x, w, b)):
            yield from why
            return
        yield from crowds(m, self.mebibytes)

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.packed_linear.default(m.x, m.w, m.b)
