"""y = packed_convolution(x, w, b, other, ...) = act(conv(x, w) + b + other), the weight laid out beforehand.

Shapes     x: [N, C, *spatial] of 1 to 3 spatial dimensions; w: [K, C / groups, *sizes]; b: [K] or None;
           other: like y, or None.  Returns y: [N, K, *spatial], channels last in memory.
Numerics   those of torch's convolution and of `act`, in another order.
Cost       that of the convolution: what is added or `act` is done on its sums before they are stored; `act`
           of what was added to, and the three of which oneDNN makes numbers of NaN, in place after it. A
           plain convolution lays w out at each call, up to twice as long as the product with few places.
           oneDNN takes 40 us a call to begin; where a window is one place, a linear over the channels and
           `act` in place are tried beside it at the first call, and the faster of both stays (`Kept`).
Limits     float32, and bfloat16 and float16 where the processor has them. What is laid out is for the sizes
           of the first call, and serves others. Under deterministic algorithms, on a GPU, and where a
           derivative or a mode watches, these are torch's operators.
Source     torch's own `freezing`, `torch/_inductor/fx_passes/mkldnn_fusion.py`; oneDNN, "Post-ops".
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxaccel.kernels import _operator
from fxaccel.kernels._clock import by_turns
from fxaccel.kernels._operator import watched

_nn: Any = torch._C._nn

CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
ROUNDS = 3  # in which two ways are timed
GAIN = 1.1  # times as fast as oneDNN that a linear must be: in a model, other weights fill the cache


class Act(NamedTuple):
    """An activation: oneDNN's names for it and its algorithm, the function of y and its numbers, in place.

    It has no name where oneDNN makes a number of NaN.
    """

    name: str
    algorithm: str
    function: Callable[..., Tensor]
    in_place: Callable[..., Tensor]


ACTS = {
    "none": Act("none", "", lambda y: y, lambda y: y),
    "relu": Act("", "", F.relu, torch.relu_),
    "hardtanh": Act("", "", F.hardtanh, _nn.hardtanh_),
    "leaky_relu": Act("leaky_relu", "", F.leaky_relu, _nn.leaky_relu_),
    "sigmoid": Act("sigmoid", "", torch.sigmoid, torch.sigmoid_),
    "tanh": Act("tanh", "", torch.tanh, torch.tanh_),
    "silu": Act("swish", "", F.silu, _nn.silu_),
    "hardswish": Act("hardswish", "", F.hardswish, _nn.hardswish_),
    "hardsigmoid": Act("", "", F.hardsigmoid, _nn.hardsigmoid_),
    "gelu": Act("gelu", "none", F.gelu, _nn.gelu_),
    "gelu_tanh": Act(
        "gelu", "tanh", partial(F.gelu, approximate="tanh"), partial(_nn.gelu_, approximate="tanh")
    ),
}
"""By the names that calls give."""


def channels_last(y: Tensor) -> Tensor:
    """y [N, K, *spatial] with the channels of a place side by side in memory."""
    return y.movedim(1, -1).contiguous().movedim(-1, 1)


def reference(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    other: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str = "none",
    numbers: Sequence[float] = (),
) -> Tensor:
    """The meaning of this op, its kernel on every device, and what every test compares with."""
    convolution: Any = CONVOLUTIONS[w.ndim - 3]
    y = convolution(x, w, b, stride, padding, dilation, groups)
    y = y if other is None else y + other
    return channels_last(ACTS[act].function(y, *numbers))


def unsupported(x: Tensor, w: Tensor, b: Tensor | None, other: Tensor | None) -> Iterator[str]:
    """Why nothing would be laid out for these arguments. Reads devices, ranks, dtypes and static sizes."""
    if not torch.backends.mkldnn.is_available():
        yield "this torch was built without oneDNN, which lays weights out"
        return
    if x.device.type != "cpu":
        yield f"x is on {x.device}; weights are laid out for the CPU"
    dtypes, known = {t.dtype for t in (x, w, b, other) if t is not None}, served()
    if len(dtypes) > 1 or not dtypes <= set(known):
        given, allowed = (", ".join(sorted(map(str, d))) for d in (dtypes, known))
        yield f"dtype {given}; oneDNN lays out one of {allowed} on this processor"
    if x.ndim != w.ndim or not 3 <= w.ndim <= 5:
        yield f"x has {x.ndim} dimensions and w {w.ndim}; the kernel takes 3 to 5 of each, the first a batch"
    elif other is not None and (x.ndim != other.ndim or _operator.differ(other.shape[1], w.shape[0])):
        yield f"what is added is {list(other.shape)}; the kernel does not broadcast"


def served() -> list[torch.dtype]:
    """Dtypes that oneDNN convolves on this processor."""
    has = torch.ops.mkldnn
    found = [torch.float32]
    found += [torch.bfloat16] * has._is_mkldnn_bf16_supported()
    return found + [torch.float16] * has._is_mkldnn_fp16_supported()


def _fake(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    other: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str = "none",
    numbers: Sequence[float] = (),
) -> Tensor:
    ways = zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
    spatial = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in ways]
    return x.new_empty((x.shape[0], *spatial, w.shape[0])).movedim(-1, 1)


op = _operator.define(
    "packed_convolution(Tensor x, Tensor w, Tensor? b, Tensor? other, int[] stride, int[] padding, "
    "int[] dilation, int groups, str act='none', float[] numbers=[]) -> Tensor",
    cpu=reference,
    cuda=reference,
    fake=_fake,
)
_operator.differentiate(op, reference)
_operator.autocast(op, "cpu", lambda: torch.get_autocast_dtype("cpu"))
_operator.autocast(op, "cuda", lambda: torch.get_autocast_dtype("cuda"))


def _flops(x: Any, w: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(out_shape[0] * prod(out_shape[2:]) * prod(w))


_operator.count_flops(op, _flops)


class Kept:
    """A weight, and how oneDNN lays it out for the sizes of the first call, or as the rows of a linear."""

    def __init__(
        self, w: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
    ) -> None:
        """Nothing is laid out yet: a call says for which sizes."""
        self.w, self.line = w, w.ndim == 3  # which oneDNN packs as planes of one row
        one, none = [1] * self.line, [0] * self.line
        self.how = none + padding, one + stride, one + dilation, groups
        self.packed: Tensor | None = None
        self.rows: Tensor | None = None
        self.pointwise = all(n == 1 for n in (*w.shape[2:], *stride, groups)) and not any(padding)

    def __call__(
        self, x: Tensor, b: Tensor | None, other: Tensor | None, act: str, numbers: Sequence[float]
    ) -> Tensor:
        """The convolution of x: as it was laid out, or at the first call in the way that is faster."""
        if self.rows is not None:
            return over_channels(x, self.rows, b, other, ACTS[act], numbers)
        if self.packed is None and self.pointwise and self.gains_as_rows(x, b, other, act, numbers):
            self.packed, self.rows = None, self.w.flatten(1)  # what was laid out to be tried may go
            return over_channels(x, self.rows, b, other, ACTS[act], numbers)
        return self.convolve(x, b, other, act, numbers)

    def convolve(
        self, x: Tensor, b: Tensor | None, other: Tensor | None, act: str, numbers: Sequence[float]
    ) -> Tensor:
        if self.line:
            x, other = x.unsqueeze(2), None if other is None else other.unsqueeze(2)
        if self.packed is None:
            w = self.w.unsqueeze(2) if self.line else self.w
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(w, *self.how, list(x.shape))
        y = convolved(x, self.packed, b, other, self.how, ACTS[act], numbers)
        return y.squeeze(2) if self.line else y

    def gains_as_rows(
        self, x: Tensor, b: Tensor | None, other: Tensor | None, act: str, numbers: Sequence[float]
    ) -> bool:
        """Whether the convolution is faster as a linear over the channels; tried once in a process."""
        sizes = (*x.shape, *x.stride(), self.w.shape[0], x.dtype)
        key = (*sizes, b is None, other is None, act, torch.get_num_threads())
        if key not in _gains:
            rows = self.w.flatten(1)
            ways = (
                partial(self.convolve, x, b, other, act, numbers),
                partial(over_channels, x, rows, b, other, ACTS[act], numbers),
            )
            convolved, linear = by_turns(ways, x.device, ROUNDS)
            _gains[key] = GAIN * linear < convolved
        return _gains[key]


_gains: dict[tuple[Any, ...], bool] = {}
"""Whether a linear is faster than oneDNN's convolution, by what decides that."""


plain: Callable[..., Tensor] = torch.ops.mkldnn._convolution_pointwise.default
added: Callable[..., Tensor] = torch.ops.mkldnn._convolution_pointwise.binary


def convolved(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    other: Tensor | None,
    how: tuple[list[int], list[int], list[int], int],
    act: Act,
    numbers: Sequence[float],
) -> Tensor:
    """oneDNN's convolution with a weight that it laid out; it reads b without looking at strides."""
    b = b if b is None else b.contiguous()
    if other is None and act.name:
        return plain(x, w, b, *how, act.name, numbers, act.algorithm)
    if other is None:
        y = plain(x, w, b, *how, "none", (), "")
    else:
        y = added(x, other, w, b, *how, "add", 1.0, None, (), "")
    return act.in_place(y, *numbers)


def over_channels(
    x: Tensor,
    rows: Tensor,
    b: Tensor | None,
    other: Tensor | None,
    act: Act,
    numbers: Sequence[float],
) -> Tensor:
    """The convolution whose window is one place: a linear of each place's channels."""
    y = torch._C._nn.linear(x.movedim(1, -1), rows, b)
    y = y if other is None else y.add_(other.movedim(1, -1))
    return act.in_place(y, *numbers).movedim(-1, 1)


def direct(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    other: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str = "none",
    numbers: Sequence[float] = (),
    shared: Kept | None = None,
) -> Tensor:
    """The op on CPU tensors, past the dispatcher.

    shared   the weight as `Kept` has it
    """
    if shared is None or torch.compiler.is_compiling() or watched(x):
        return reference(x, w, b, other, stride, padding, dilation, groups, act, numbers)
    return shared(x, b, other, act, numbers)


def worth(given: dict[str, Any]) -> bool:
    """Every weight is worth it: the fused call needs a weight that was laid out."""
    return True


shared = _operator.Shared(Kept, (), ("w", "stride", "padding", "dilation", "groups"), worth, ahead=True)
