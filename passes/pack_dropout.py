"""Let dropout on the CPU keep a byte an element for the gradient.

    y = dropout(x, p)   =>   y = fxaccel.dropout(x, p)

Fires on   dropout in training on the CPU, where torch keeps for each element the number that it was
           multiplied by; on a GPU it keeps bytes itself.
Saves      of float32 three of four bytes an element until backward, for about a tenth more time of dropout,
           most of which are its random numbers.
Exact      bit for bit: the same random numbers, the same products.
Source     torch, aten/src/ATen/native/Dropout.cpp, `_dropout_impl`.
"""

from fxaccel.kernels import dropout as kernel
from fxaccel.rule import Match, Ops, Refusals, Rule, register


@register
class PackDropout(Rule):
    """Dropout on the CPU keeps a byte an element for the gradient, not a number."""

    name = "pack-dropout"
    step = "lower"
    numerics = "bitwise"
    serves = ("training",)
    redraws = True
    at_most = 1.2  # for the bytes

    def pattern(self, op: Ops, x, p):
        return op.aten.dropout.default(x, p, True)

    def refuse(self, m: Match) -> Refusals:
        x = m.val("x")
        if x.device.type != "cpu":
            yield f"on {x.device.type} torch's dropout keeps bytes itself"
        yield from kernel.unsupported(x, m.p)

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.dropout.default(m.x, m.p)
