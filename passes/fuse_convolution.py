"""Let oneDNN do a convolution with what follows it, of a weight that was laid out once, on the CPU.

    y = relu(conv2d(x, w, b, ..) + r)   =>   y = fxaccel.packed_convolution(x, w, b, r, .., "relu")

Fires on   inference alone: convolutions on the CPU whose weight is a parameter, or is what passes made of
           parameters, with the addition and the activation after them that oneDNN knows, or without any.
Saves      the transfers of what is added and of the activation, the part of a convolution that lays its
           weight out, and changes of layout: from one such call to the next, values stay channels last.
           A weight takes its memory twice from the first call on, until it changes.
Exact      agrees with the original within its own rounding: oneDNN may sum in another order. Outputs are
           laid out as they were.
Source     torch's own `freezing`, `torch/_inductor/fx_passes/mkldnn_fusion.py`; oneDNN, "Post-ops".
"""

from typing import Any

from torch import fx

from fxaccel.ir import expr
from fxaccel.kernels import kernel
from fxaccel.passes._advice import autocast
from fxaccel.passes._convolutions import Window, uneven
from fxaccel.passes._packed import changes, crowds
from fxaccel.rule import ANY, Match, Ops, Refusal, Refusals, Rule, register


def _convolution(op: Ops, *given: Any) -> Any:
    """A convolution of the values that its schema names, in this order."""
    aten = op.aten
    return op.either(
        conv1d=aten.conv1d.default(*given),
        conv2d=aten.conv2d.default(*given),
        conv3d=aten.conv3d.default(*given),
        padded1d=aten.conv1d.padding(*given),
        padded2d=aten.conv2d.padding(*given),
        padded3d=aten.conv3d.padding(*given),
    )


def _activation(op: Ops, y: Any, low: Any, high: Any, slope: Any) -> Any:
    """What may become of the sums, by the kernel's names for it; `clamp` and `relu6` are its hardtanh."""
    aten = op.aten
    return op.either(
        relu=aten.relu.default(y),
        hardtanh=aten.hardtanh.default(y, low, high),
        relu6=aten.relu6.default(y),
        clamp=aten.clamp.default(y, low, high),
        leaky_relu=aten.leaky_relu.default(y, slope),
        sigmoid=aten.sigmoid.default(y),
        tanh=aten.tanh.default(y),
        silu=aten.silu.default(y),
        hardswish=aten.hardswish.default(y),
        hardsigmoid=aten.hardsigmoid.default(y),
        gelu=aten.gelu.default(y),
        gelu_tanh=aten.gelu.default(y, approximate="tanh"),
        none=y,
    )


def _act(m: Match) -> tuple[str, list[Any]]:
    """The kernel's name for the activation, and its numbers."""
    if m.chose("relu6"):
        return "hardtanh", [0.0, 6.0]
    if m.chose("hardtanh") or m.chose("clamp"):
        return "hardtanh", [m.low, m.high]
    name = next(name for name in kernel("packed_convolution").ACTS if m.chose(name))
    return name, [m.slope] if name == "leaky_relu" else []


def _how(m: Match) -> Window | None:
    return Window.of(m.val("w").shape[2:], m.stride, m.padding, m.dilation)


@register
class FuseConvolution(Rule):
    """In inference on the CPU, a convolution and what follows it become one call, its weight laid out ahead.

    mebibytes    of weights that are kept twice, at most; the last of the model are the first
    """

    name = "fuse-convolution"
    step = "lower"
    serves = ("inference",)
    default = True
    together = True  # for values stay channels last from one to the next
    at_most = 0.95  # for the memory that weights take twice

    mebibytes: float = 1024

    def pattern(self, op: Ops, x, w, b, stride, padding, dilation, groups, other, low, high, slope):
        y = _convolution(op, x, w, b, stride, padding, dilation, groups)
        y = op.either(added=op.aten.add.Tensor(y, other), alone=y)
        return _activation(op, y, low, high, slope)

    def refuse(self, m: Match) -> Refusals:
        made, (_, numbers) = m.root.meta["val"], _act(m)
        yield from changes(m)
        if made.dtype != m.val("x").dtype:
            yield autocast(made.dtype, "convolved")
        if m.chose("added") and not isinstance(m.other, fx.Node):
            yield f"what is added is the number {m.other}"
            return
        if why := list(kernel("packed_convolution").unsupported(*m.val("x", "w", "b", "other"))):
            yield from why
            return
        if m.chose("added") and list(map(expr, m.val("other").shape)) != list(map(expr, made.shape)):
            yield f"{list(m.val('other').shape)} is added to a result of {list(made.shape)}"
        if not all(isinstance(number, (int, float)) for number in numbers):
            yield Refusal(
                f"it is clamped between {m.low} and {m.high}, which are not two numbers", "two numbers"
            )
        if _how(m) is None:
            yield uneven(m.val("w").shape[2:])
        yield from crowds(m, self.mebibytes)

    def rewrite(self, op: Ops, m: Match):
        (act, numbers), window = _act(m), _how(m)
        assert window is not None
        how = (list(v) for v in (window.stride, window.padding, window.dilation))
        return op.fxaccel.packed_convolution.default(
            m.x, m.w, m.b, m.other, *how, m.groups, act, list(map(float, numbers))
        )

    def apply(self, program, plan, driver):
        driver.rewrite([self, Transposed()])


class Transposed(Rule):
    """Named for its refusal: a transposed convolution is not packed."""

    def pattern(self, op, x, w, b):
        aten, rest = op.aten, (ANY, ANY, ANY, ANY, ANY)
        return op.either(
            of1d=aten.conv_transpose1d.default(x, w, b, *rest),
            of2d=aten.conv_transpose2d.input(x, w, b, *rest),
            of3d=aten.conv_transpose3d.input(x, w, b, *rest),
        )

    def refuse(self, m: Match) -> Refusals:
        yield "a transposed convolution is laid out for one size of its input, which may vary"
