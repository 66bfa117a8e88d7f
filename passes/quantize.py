"""Hold the weights of linears in few bits, and multiply in few where that is faster.

    y = linear(x, W, b)  =>  q, s = quantize_rows(x)                          W ~ scale * codes
                             y = quantized_linear(q, s, codes, scale, b)
    or                   =>  y = weight_only_linear(x, codes, scale, zero, b)

Fires on   linears whose weight is a parameter of its own; those whose result is an output, and embeddings,
           where `also` asks for them. What does not pay in time stays, and the report has the figures.
           fuse-quantize after it lets norms and gated activations round in their own kernel.
Saves      memory: 8 bits a number or 4 and a scale for some; time: of integer products, or of reading less.
Exact      no. With a budget what a choice does to the model is measured on calibration calls and held to
           it; without one the report says what it does. The operators are proved to compute what a dense
           linear of their weight does, on inputs that are rounded in the same way.
Source     passes/quantized names the paper of each method; Dettmers et al. 2022, "LLM.int8()",
           arXiv:2208.07339, and Zafrir et al. 2019, "Q8BERT", arXiv:1910.06188, for rows of inputs rounded
           as they come.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxaccel.cost import parameter_bytes
from fxaccel.errors import OptionError
from fxaccel.ir import Program, Replacement, path
from fxaccel.passes._linear_fits import Candidate, Fits
from fxaccel.passes._linear_form import LinearForm
from fxaccel.passes._linear_replacement import LinearReplacement, Plan
from fxaccel.passes._linear_sites import ATTENTION, LinearSite
from fxaccel.passes.quantized import Grid, Observer, torchao
from fxaccel.passes.quantized._observer import BINS
from fxaccel.passes.quantized.fake import FakeQuantizedMatrix, Trained
from fxaccel.passes.quantized.matrix import INPUTS, METHODS, QuantizedMatrix
from fxaccel.progress import tracked
from fxaccel.quality import Budget
from fxaccel.rule import Refusal, register

FORMATS = ("int8", "int4", "nf4", "float8")
ROUNDED = {"quantize_rows", "quantize_tensor", "fake_quantize_rows"}


@register
class Quantize(LinearReplacement):
    """Weights of linears become int8, int4, nf4 or float8, and inputs too where that is faster.

    weights           formats, joined by "|": several compete within a budget; else the first that pays
    inputs            how inputs are rounded: none, dynamic-int8 (each row by its own scale), static-int8 (by
                      one scale, calibrated), dynamic-float8
    group             columns of a row that share a scale, of int4 and nf4
    zeros             whether groups of int4 have a zero beside their scale
    method            how codes are chosen: nearest, mse (scales clipped to the least error), gptq, hqq (of
                      int4 and nf4, without data); "" takes gptq for 4 bits where there are calibration
                      calls, hqq where there are none, and nearest for 8
    observer          how a scale of static-int8 is calibrated: absmax, percentile, mse
    tensorwise        one scale for a whole weight of float8
    policy            formats by module path, "*.mlp.*:int4 *.attn.*:int8 head:none": the first glob that fits
                      decides, others are as `weights` says
    budget            how much worse the model may become, as replace-linear has it; "" for no limit
    effective_bits    the most bits a number that the weights may take on average, scales included; 0 for any
    also              what is else left alone, joined by "|": heads, embeddings
    aware             fit by the error of the outputs on the calibration calls, not of the weights
    even_if_slower    count bytes where time is measured otherwise, and refuse nothing for its time
    train             "frozen": weights in few bits are held fixed in training. Else they stay floats that are
                      rounded at each call, straight-through, until `fast.convert()`; nothing is refused for
                      its time. "observed": by the scales that each call finds; "learned": by scales that are
                      trained beside them, from those of nearest or, by default of 4 bits, of mse
    """

    name = "quantize"
    numerics = "lower_precision"
    open_roles = (ATTENTION,)

    weights: str = "int8"
    inputs: str = "dynamic-int8"
    group: int = 64
    zeros: bool = True
    method: str = ""
    observer: str = "mse"
    tensorwise: bool = False
    policy: str = ""
    budget: str | float | Budget = ""
    effective_bits: float = 0.0
    train: str = "frozen"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.known("inputs", [self.inputs], list(INPUTS))
        self.known("method", [self.method] * bool(self.method), METHODS)
        self.known("train", [self.train], ("frozen", "observed", "learned"))
        given = [f for formats in [self.weights, *self.policies.values()] for f in formats.split("|")]
        self.known("weights", [f for f in given if f != "none"], FORMATS)
        Observer(self.observer)
        for name in given:
            if name != "none":
                self.trained(self.form(name, 1, 1, torch.float32, method=self.method or "nearest"))
        if self.budget != "":
            Budget.of(self.budget)
        if self.effective_bits and not 1 < self.effective_bits <= 32:
            raise OptionError(f"effective_bits is {self.effective_bits}, expected a number above 1, up to 32")
        if self.effective_bits and self.budget != "":
            raise OptionError("both a budget and effective_bits are given, expected one of them")

    @property
    def policies(self) -> dict[str, str]:
        """Glob of module paths -> formats."""
        found = {}
        for word in self.policy.split():
            glob, mark, formats = word.rpartition(":")
            if not mark or not glob:
                raise OptionError(f"policy says {word!r}, expected a glob of module paths, ':' and a format")
            found[glob] = formats
        return found

    def form(self, name: str, rows: int, columns: int, dtype: torch.dtype, **more: Any) -> QuantizedMatrix:
        """A matrix in a format, as the options have it."""
        small = name in ("int4", "nf4")
        group = self.group if small else -1 if name == "float8" and self.tensorwise else 0
        grid = Grid(name, group, zeros=self.zeros and name == "int4")
        return QuantizedMatrix(rows, columns, grid, dtype, self.inputs, **more)

    def forms(self, site: LinearSite, program: Program, fits: Fits) -> list[LinearForm]:
        """The formats that the policy has for the site's module, or all."""
        formats = self.formats(site)
        val, (rows, columns) = site.node.meta["val"], site.shape
        more = {
            "input_scale": fits.ranges.get(site.name, 0.0),
            "narrow": self.inputs == "none" and val.device.type == "cpu" and val.dtype == torch.float32,
            "trains": program.grad,
        }
        return [
            self.trained(
                self.form(f, rows, columns, val.dtype, method=self.chosen_method(f, site, fits), **more)
            )
            for f in formats
        ]

    def trained(self, form: QuantizedMatrix) -> LinearForm:
        """The form itself, or the float weight that is trained for it."""
        if self.train == "frozen":
            return form
        return FakeQuantizedMatrix(form.rows, form.columns, form, self.train == "learned", form.trains)

    def formats(self, site: LinearSite) -> list[str]:
        """What the site's weight may become, in the order of preference; [] where it is to stay."""
        at = path(site.readers[0])
        chosen = next((f for g, f in self.policies.items() if fnmatch.fnmatchcase(at, g)), self.weights)
        return [f for f in chosen.split("|") if f != "none"]

    def chosen_method(self, format: str, site: LinearSite, fits: Fits) -> str:
        """The method that is asked for, or the best there is data for."""
        seen = self.aware and fits.calibration.given and bool(site.linears)
        if self.method:
            return self.method
        if self.train != "frozen":
            return "mse" if self.train == "learned" and format in ("int4", "nf4") else "nearest"
        return "nearest" if format in ("int8", "float8") else "gptq" if seen else "hqq"

    @classmethod
    def opened(cls, name: str, tensor: Tensor, aliases: tuple[str, ...]) -> Replacement | None:
        """What takes the place of a parameter that torchao has quantized; None of any other."""
        return torchao.opened(name, tensor, aliases, cls.name)

    # -- plan -------------------------------------------------------------------------------------

    def open_sites(
        self, program: Program, adopted: set[str]
    ) -> tuple[list[LinearSite], list[tuple[fx.Node, str]]]:
        found, refused = super().open_sites(program, adopted)
        kept = [s for s in found if not self.formats(s) and s.name not in adopted]
        why = Refusal("the policy has no format for it", "a format for it in policy")
        refused += [(s.readers[0], why) for s in kept]
        return [s for s in found if s not in kept], refused

    def chosen(self, fits: Fits, found: list[LinearSite], refused: list[tuple[fx.Node, str]]) -> Plan:
        if self.inputs == "static-int8":
            fits.ranges = self.ranges(fits, [s for s in found if s.linears])
        if self.train == "frozen":
            return super().chosen(fits, found, refused)
        # it is not to be fast before it is converted, and observed scales leave nothing to fit
        fits.options = dataclasses.replace(
            self, even_if_slower=True, aware=self.aware and self.train == "learned"
        )
        plan = super().chosen(fits, found, refused)
        chosen = tuple(dataclasses.replace(c, way=Trained(c.way.form, c.way.flipped)) for c in plan.chosen)
        return dataclasses.replace(plan, chosen=chosen)

    def ranges(self, fits: Fits, found: list[LinearSite]) -> dict[str, float]:
        """For each site the scale of its inputs, by the calibration calls."""
        values = list(dict.fromkeys(x for s in found for x in s.inputs))
        watched = fits.calibration.watched(
            fits.program, values, lambda: Observer(self.observer), lambda n: 8 * BINS
        )
        seen = dict(tracked(watched, "ranges of inputs", len(values)))
        return {s.name: max(seen[x].scale() for x in s.inputs) for s in found}

    def allowed(self, fits: Fits, open_to: Mapping[LinearSite, list[Candidate]]) -> Budget | None:
        if not self.effective_bits:
            return Budget.of(self.budget) if self.budget != "" else None
        total = parameter_bytes(fits.program)
        weights = [fits.weight(s) for s in open_to]
        saved = sum(w.numel() * (w.element_size() - self.effective_bits / 8) for w in weights)
        return Budget("size", (total - saved) / total)

    # -- apply ------------------------------------------------------------------------------------

    def apply(self, program: Program, plan: Plan, driver: Any) -> None:
        super().apply(program, plan, driver)
        known = dict[Any, fx.Node]()
        for node in list(program.graph.nodes):  # linears of one input share what it is rounded to
            if node.meta.get("by") == self.name and node.target in _once():
                first = known.setdefault((node.target, node.args, node.meta.get("regions", ())), node)
                if first is not node:
                    node.replace_all_uses_with(first, propagate_meta=False)
                    program.graph.erase_node(node)


def _once() -> set[Any]:
    """What is computed once of a value, however many linears read it."""
    ours = [getattr(torch.ops.fxaccel, n).default for n in ROUNDED if hasattr(torch.ops.fxaccel, n)]
    return {operator.getitem, torch.ops.aten.to.dtype, *ours}
