"""Replace dense linears by structured ones that are cheaper, within a quality budget.

    y = linear(x, W, b)  =>  y = monarch(x, right, left, b)          W ~ dense(right, left)
                             y = linear(linear(x, down), up, b)      W ~ up @ down

Fires on   linears whose weight is a parameter of its own; those after an attention, those whose result is an
           output, and embeddings where `also` asks for them. What does not pay in time stays, and the report
           has the figures.
Saves      FLOPs and parameters: a monarch of b blocks takes 2/b of a square matrix, rank r takes 2 r / n.
Exact      no. What a choice does to the model is measured on calibration calls and held to the budget. The
           structured linear is proved to compute what a dense one of its weight does.
Source     Dao et al. 2022, "Monarch", arXiv:2204.00595; Dao et al. 2019, "Learning Fast Algorithms for Linear
           Transforms Using Butterfly Factorizations", arXiv:1903.05895; Chen et al. 2021, "Pixelated
           Butterfly", arXiv:2112.00029; Wang et al. 2024, "SVD-LLM", arXiv:2403.07378.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxaccel.errors import OptionError
from fxaccel.ir import Program
from fxaccel.passes._linear_fits import Candidate, Fits, Way
from fxaccel.passes._linear_form import LinearForm
from fxaccel.passes._linear_replacement import PAYS, Chosen, LinearReplacement, Plan
from fxaccel.passes._linear_sites import LinearSite
from fxaccel.passes.structured import KINDS, Monarch, StructuredMatrix
from fxaccel.quality import Budget
from fxaccel.rule import register

SHARES = (0.5, 0.25, 0.125, 0.0625)  # of the dense parameters, that a plan chooses among
STRUCTURES: dict[str, type[StructuredMatrix]] = {
    **KINDS, "butterfly": Monarch, "radix-2-butterfly": KINDS["butterfly"],
}  # fmt: skip
"""By the names that users give; a butterfly without more is the one in two factors."""


@register
class ReplaceLinear(LinearReplacement):
    """Dense linears become structured ones (monarch, low-rank, ...) within a quality budget.

    structure         kinds that compete, joined by "|": butterfly (in two factors: monarch), monarch,
                      radix-2-butterfly, low-rank, block-diagonal-low-rank
    budget            how much worse the model may become: "change<=0.01", "kl<=0.02", "loss<=+1%",
                      "size<=0.5", or a fxaccel.Budget with a function of your own
    share             parameters of a structured matrix, of the dense one's; 0 lets the plan choose
    also              what is else left alone, joined by "|": attention-outputs, heads, embeddings
    init              "weights" projects the weights; "random" draws factors to train from, in the variance of
                      the weights, of the first kind, without a budget
    aware             project by the error of the outputs on the calibration calls, not of the weights
    steps             of layer-wise distillation that follow the projection
    seed              of what is drawn
    even_if_slower    count FLOPs where time is measured otherwise, and refuse nothing for its time
    """

    name = "replace-linear"
    numerics = "approximate"

    structure: str = "butterfly|low-rank"
    budget: str | float | Budget = "change<=0.01"
    share: float = 0.0
    init: str = "weights"
    steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        Budget.of(self.budget)
        self.known("structure", self.kinds, list(STRUCTURES))
        if self.init not in ("weights", "random"):
            raise OptionError(f"init is {self.init!r}, expected 'weights' or 'random'")
        if not 0 <= self.share < 1:
            raise OptionError(f"share is {self.share}, expected a number from 0 to 1, 0 for any")

    @property
    def kinds(self) -> list[str]:
        """Kinds of structure that compete."""
        return self.structure.split("|")

    def forms(self, site: LinearSite, program: Program, fits: Fits) -> list[LinearForm]:
        """Each kind in each share of the parameters."""
        return self.sized(site, self.kinds, [self.share] if self.share else SHARES)

    def allowed(self, fits: Fits, open_to: Mapping[LinearSite, list[Candidate]]) -> Budget:
        return Budget.of(self.budget)

    def sized(self, site: LinearSite, kinds: Sequence[str], shares: Sequence[float]) -> list[LinearForm]:
        """The members of these kinds of at most these shares, each once."""
        found = [STRUCTURES[k].sized(*site.shape, share) for share in shares for k in kinds]
        return list(dict.fromkeys(m for m in found if m is not None))

    def chosen(self, fits: Fits, found: list[LinearSite], refused: list[tuple[fx.Node, str]]) -> Plan:
        """As every such pass; or factors of random numbers, whose product has the variance of the weight."""
        if self.init == "weights":
            return super().chosen(fits, found, refused)
        chosen = []
        for site in found:
            forms = self.sized(site, self.kinds[:1], [self.share or SHARES[0]])
            paying, why = fits.paying(site, forms, PAYS)
            if not paying:
                refused.append((site.readers[0], why))
            for one in paying:
                weight, form = fits.weight(site), one.form
                assert isinstance(form, StructuredMatrix)
                generator = torch.Generator().manual_seed(self.seed + zlib.crc32(site.name.encode()))
                variance = float(weight.double().var(correction=0))
                factors = form.random(variance, generator, weight.dtype)
                on_device = tuple(f.to(weight.device) for f in factors)
                told = f"{form}: {one.figures}, to train from"
                chosen.append(Chosen(site, Way(form, site.flipped), on_device, told))
        return Plan(tuple(chosen), tuple(refused), "to be trained from scratch")
