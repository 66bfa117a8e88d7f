"""Turn LayerNorm into RMSNorm without a proof that its input has a zero mean.

    y = layer_norm(h, [C], w, c, eps)  =>  y = rms_norm(h, [C], w, eps) + c

Fires on   every LayerNorm over one dimension; layer-norm-to-rms-norm converts those where it is exact.
Saves      a reduction a norm, and its saved mean.
Exact      no: y is off by up to |mean(h)| / rms(h). What that does to the model's outputs is measured, and
           above `budget` nothing is changed. A model that is fine-tuned afterwards mostly recovers.
Source     Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467.
"""

from fxaccel.passes._zero_mean import rms_norm, unfit
from fxaccel.rule import ANY, Match, Ops, Refusals, Rule, register


@register
class DropNormMean(Rule):
    """LayerNorm becomes RMSNorm, which is an approximation, within a budget.

    budget            how much an output of the model may change, of its size, on the calibration data
    even_if_slower    convert on the CPU too, where a LayerNorm is the faster of the two
    """

    name = "drop-norm-mean"
    step = "raise"
    numerics = "approximate"
    requires = ("canonical-norms",)

    budget: float = 0.01
    even_if_slower: bool = False

    def pattern(self, op, x, dims, w, b, eps):
        return op.aten.layer_norm.default(x, dims, w, b, eps, ANY)

    def refuse(self, m: Match) -> Refusals:
        yield from unfit(m.root, self.even_if_slower)

    def rewrite(self, op: Ops, m: Match):
        return rms_norm(op, m.root, m.x)
