"""Take convolutions apart into thinner ones that are cheaper, within a quality budget.

    y = conv2d(x, W, b)  =>  y = conv2d(conv2d(x, down), up, b)              W ~ up down, as a matrix
                             y = conv2d(depthwise(x, depth), up, b)          each input channel by itself
                             y = conv2d(conv2d(conv2d(x, first), core), last, b)

Fires on   convolutions of one to three dimensions and one group whose weight is a parameter of its own. What
           does not pay in time at the captured sizes stays, and the report has the figures.
Saves      FLOPs and parameters: a window of 3 x 3 taken apart by rank or by channels costs what is asked for.
Exact      no. What a choice does to the model is measured on calibration calls and held to the budget. Each
           chain is proved to compute what one convolution of the weight that it stands for does.
Source     passes/_convolution_forms.py has one for each kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from fxaccel.errors import OptionError
from fxaccel.ir import Program, arguments, is_call, number
from fxaccel.passes._advice import OWN
from fxaccel.passes._convolution_forms import KINDS
from fxaccel.passes._convolutions import CONVOLUTIONS, TRANSPOSED, Window, uneven
from fxaccel.passes._linear_fits import Candidate, Fits
from fxaccel.passes._linear_form import EAGER, LinearForm
from fxaccel.passes._linear_replacement import WeightReplacement
from fxaccel.passes._linear_sites import LinearSite, also_read, names, parameter
from fxaccel.quality import Budget
from fxaccel.rule import Refusal, register

SHARES = (0.5, 0.25, 0.125)  # of the dense parameters, that a plan chooses among


@dataclass(frozen=True)
class ConvolutionSite(LinearSite):
    """A parameter and the convolutions that read it as their weight, all by one window.

    shape    output channels, and input channels times the places of the window
    """

    @property
    def window(self) -> Window:
        found = _window(self.readers[0])
        assert found is not None
        return found

    @property
    def shape(self) -> tuple[int, int]:
        sizes = [int(s) for s in self.node.meta["val"].shape]
        return sizes[0], self.node.meta["val"].numel() // sizes[0]

    @property
    def linears(self) -> list[fx.Node]:
        return list(self.readers)

    def rows(self, program: Program) -> int:
        """How many places the convolutions compute in a call of the captured sizes."""
        return sum(_count(r.meta["val"], program) // self.shape[0] for r in self.readers)

    def given(self, program: Program) -> tuple[int, ...]:
        largest = max(self.inputs, key=lambda x: _count(x.meta["val"], program))
        return tuple(number(s, program.hints) for s in largest.meta["val"].shape)

    def called(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made: Tensor = self.window.call(EAGER, x, weight, bias)
        return made


def _count(val: Tensor, program: Program) -> int:
    found = 1
    for size in val.shape:
        found *= number(size, program.hints)
    return found


def _window(convolution: fx.Node) -> Window | None:
    a = arguments(convolution)
    sizes = [int(s) for s in a["weight"].meta["val"].shape[2:]]
    return Window.of(sizes, a["stride"], a["padding"], a["dilation"])


def sites(program: Program) -> Iterator[LinearSite | tuple[fx.Node, str]]:
    """Each weight of convolutions; where one cannot be taken apart, a convolution and the reason."""
    seen = set[fx.Node]()
    for node in program.graph.nodes:
        if is_call(node, *TRANSPOSED):
            yield node, "it is transposed; there is no chain for it"
        if not is_call(node, *CONVOLUTIONS):
            continue
        weight, turned = parameter(program, arguments(node)["weight"])
        if weight is None or turned:
            yield node, "its weight is computed, not a parameter of the model"
        elif weight not in seen:
            seen.add(weight)
            why = next(_obstacles(weight), "")
            name, aliases = names(program, weight)
            site = ConvolutionSite(name, weight, tuple(weight.users), False, (), aliases)
            yield (node, why) if why else site


def _obstacles(weight: fx.Node) -> Iterator[str]:
    """Why the weight stays."""
    val, windows = weight.meta["val"], set[Window | None]()
    if not val.dtype.is_floating_point:
        yield f"its weight is {val.dtype}, expected real numbers"
    for user in weight.users:
        if not is_call(user, *CONVOLUTIONS) or user.args[1] is not weight:
            yield also_read(user)
            return
        bound = arguments(user)
        if bound["groups"] != 1:
            yield f"it has {bound['groups']} groups, which leave little to take apart"
        windows.add(_window(user))
    if None in windows:
        yield uneven(val.shape[2:])
    if len(windows) > 1:
        yield Refusal("its weight is read by convolutions of other strides, paddings or dilations", OWN)


@register
class FactorConvolution(WeightReplacement):
    """Convolutions become two or three thinner ones in a row, within a quality budget.

    structure         kinds that compete, joined by "|": low-rank, separable, depthwise-separable, tucker
    budget            how much worse the model may become: "change<=0.01", "kl<=0.02", "loss<=+1%",
                      "size<=0.5", or a fxaccel.Budget with a function of your own
    share             parameters of the chain, of the convolution's; 0 lets the plan choose
    even_if_slower    count FLOPs where time is measured otherwise, and refuse nothing for its time
    """

    name = "factor-convolution"
    numerics = "approximate"

    structure: str = "low-rank|separable|depthwise-separable|tucker"
    budget: str | float | Budget = "change<=0.01"
    share: float = 0.0

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        self.known("structure", self.kinds, list(KINDS))
        if not 0 <= self.share < 1:
            raise OptionError(f"share is {self.share}, expected a number from 0 to 1, 0 for any")

    @property
    def kinds(self) -> list[str]:
        """Kinds of structure that compete."""
        return self.structure.split("|")

    def sites(self, program: Program) -> Iterator[LinearSite | tuple[fx.Node, str]]:
        return sites(program)

    def forms(self, site: LinearSite, program: Program, fits: Fits) -> list[LinearForm]:
        """Each kind in each share of the parameters."""
        assert isinstance(site, ConvolutionSite)
        shares = [self.share] if self.share else SHARES
        found = [KINDS[k].sized(*site.shape, site.window, share) for share in shares for k in self.kinds]
        return list(dict.fromkeys(f for f in found if f is not None))

    def allowed(self, fits: Fits, open_to: Mapping[LinearSite, list[Candidate]]) -> Budget:
        return Budget.of(self.budget)
