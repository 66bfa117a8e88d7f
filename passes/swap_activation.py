"""Write one activation in the place of another, where the user asks for it.

    y = gelu(x)   =>   y = gelu(x, approximate='tanh')

Fires on   every activation named by `old`, in any spelling, in the modules named by `where`, in training and
           in inference. The sigmoid or relu that is a part of quick_gelu or relu(x)**2 is none of its own.
Saves      what the cheaper of the two saves; a model for another activation is fine-tuned from there.
Exact      no: what a swap does to the model's outputs is measured, and above `budget` nothing is changed.
Source     Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", arXiv:1606.08415, whose approximations
           stand for one another in models; So et al. 2021, "Primer", arXiv:2109.08668.
"""

from __future__ import annotations

from fxaccel.errors import OptionError
from fxaccel.passes._activations import NAMES, activation, spelled, whole, written
from fxaccel.quality import Budget
from fxaccel.rule import Match, Ops, Refusal, Refusals, Rule, register


@register
class SwapActivation(Rule):
    """Activations of one name become those of another, within a budget.

    old       what is swapped, several joined by "|": silu, gelu, gelu_tanh, quick_gelu, relu, relu_squared,
              tanh, sigmoid, mish or hardswish
    new       what takes its place, one of these
    budget    how much worse the model may become: "change<=0.01", "kl<=0.02", "loss<=+1%", or a
              fxaccel.Budget with a function of your own
    """

    name = "swap-activation"
    numerics = "approximate"

    old: str = ""
    new: str = ""
    budget: str | float | Budget = "change<=0.01"

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        for option, given in (("old", self.names), ("new", (self.new,))):
            for name in given:
                if name not in NAMES:
                    known = ", ".join(sorted(NAMES))
                    raise OptionError(
                        f"{option} of swap-activation is {name!r}, expected one of {known}",
                        "write swap-activation{old=gelu,new=gelu_tanh}",
                    )
        if self.new in self.names:
            raise OptionError(f"swap-activation swaps {self.new!r} for itself, expected two different names")

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are swapped."""
        return tuple(self.old.split("|"))

    def pattern(self, op: Ops, x):
        return written(op, x, self.names)

    def refuse(self, m: Match) -> Refusals:
        val = m.val("x")
        if name := whole(m.program, m.root):
            yield Refusal(f"it is a part of {name}", f"old={name}")
        if not val.dtype.is_floating_point:
            yield Refusal(f"it is of {val.dtype}", "a real floating dtype")

    def rewrite(self, op: Ops, m: Match):
        return spelled(op, self.new, m.x)

    def remark(self, m: Match) -> str:
        return f"{activation(m)} became {self.new}"
