"""y = packed_linear(x, w, b) = x w^T + b, the weight laid out beforehand as the CPU multiplies it.

Shapes     x: [..., K]; w: [N, K]; b: [N] or None; of one dtype.  Returns y: [..., N], contiguous.
Numerics   those of torch's linear; MKL may sum in another order than it does of a plain weight.
Cost       2 M N K flop. A plain product lays w out as it goes. To do so once takes as long as 3 products of
           16 rows, or half of one of 256, and as much memory as w.
Limits     MKL lays out for one number of rows, and for float32; whether that gains is tried (`Kept`). Under
           FEW rows, and of a w of fewer than SMALL elements or NARROW rows, it does not. Under deterministic
           algorithms, on a GPU, and where a derivative or a mode watches, this is torch's linear.
Source     Intel's oneMKL reference, "cblas_?gemm_pack"; torch's own use of it, `torch._inductor`'s freezing.
"""

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxaccel.kernels import _operator, _quantized
from fxaccel.kernels._clock import by_turns
from fxaccel.kernels._operator import watched

linear = torch._C._nn.linear  # torch.nn.functional's
product: Any = torch.ops.mkl._mkl_linear.default if torch.backends.mkl.is_available() else linear

FEW = 4  # rows below which nothing is gained
SMALL = 2**15  # elements of a weight below which a call of MKL's costs more than is saved
NARROW = 128  # rows of a weight below which the same holds
CALLS = 4  # with equal numbers of rows, in which laying out would have paid
MOST = 64  # numbers of rows that are counted at a time
ROUNDS = 3  # in which packed and plain are timed
BETWEEN = 2**22  # bytes of other weights between two calls with one, as there are in a model
GAIN = 1.03  # times as fast as the plain product, for what a form costs in memory


def reference(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The meaning of this op, its kernel on every device, and what every test compares with."""
    return linear(x, w, b)


def unsupported(x: Tensor, w: Tensor, b: Tensor | None) -> Iterator[str]:
    """Why nothing would be laid out for these arguments. Reads devices, ranks, dtypes and static sizes."""
    if not torch.backends.mkl.is_available():
        yield "this torch was built without MKL, which lays weights out"
    if x.device.type != "cpu":
        yield f"x is on {x.device}; weights are laid out for the CPU"
    dtypes = {t.dtype for t in (x, w, b) if t is not None}
    if dtypes != {torch.float32}:
        yield f"dtype {', '.join(sorted(map(str, dtypes)))}; MKL lays out torch.float32"
    if w.ndim != 2 or (b is not None and b.ndim != 1):
        ranks = f"w has {w.ndim} dimensions" + ("" if b is None else f" and b {b.ndim}")
        yield f"{ranks}; the kernel takes 2 and 1"
        return
    if not worth({"x": x, "w": w}):
        yield (
            f"x is {list(x.shape)} and w {list(w.shape)}; with fewer than {FEW} rows of x, {NARROW} rows of "
            f"w or {SMALL:,} weights nothing is gained"
        )


def worth(given: dict[str, Any]) -> bool:
    """Whether a product of these sizes is faster of a weight that was laid out; so is one of unknown rows."""
    x, w = (_quantized.shape_of(given[name]) for name in ("x", "w"))
    rows, wide, deep = map(_operator.known, (prod(x.shape[:-1]), *w.shape))
    if wide is None or deep is None:
        return False
    return (rows is None or rows >= FEW) and wide >= NARROW and wide * deep >= SMALL


def _fake(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


op = _operator.define(
    "packed_linear(Tensor x, Tensor w, Tensor? b) -> Tensor", cpu=reference, cuda=reference, fake=_fake
)
_operator.differentiate(op, reference)
_operator.autocast(op, "cpu", lambda: torch.get_autocast_dtype("cpu"))
_operator.autocast(op, "cuda", lambda: torch.get_autocast_dtype("cuda"))
_operator.count_flops(op, lambda x, w, *args, **kwargs: 2 * prod(x) * w[0])


class Form(NamedTuple):
    """How a weight is multiplied by `rows` rows: `packed` for them by MKL, or plain where that is None."""

    rows: int
    packed: Tensor | None


class Kept:
    """A weight, and its form for the number of rows that most calls come with.

    A form is made when CALLS calls have come with its number of rows, and given up for another number when
    more calls have come with that since. Sizes that change from call to call cost nothing.
    """

    def __init__(self, w: Tensor):
        """No form is made yet: calls say for how many rows."""
        self.w, self.columns = w, w.shape[1]
        self.form = Form(0, None)
        self.hits = 0  # calls with as many rows as the form is for, since it was made
        self.calls: dict[int, int] = {}  # and with others

    def missed(self, x: Tensor, b: Tensor | None, rows: int) -> None:
        """Take note of a call with so many rows, which the form is not for."""
        if rows < FEW:
            return
        self.calls[rows] = count = self.calls.get(rows, 0) + 1
        if count >= CALLS and count > self.hits:
            self.form = fastest(x, self.w, b, rows)
            self.hits, self.calls = 0, {}
        elif len(self.calls) > MOST:
            self.calls = {}


def multiply(x: Tensor, w: Tensor, b: Tensor | None, form: Form) -> Tensor:
    """The linear of x, of as many rows as the form is for."""
    if form.packed is None:
        return linear(x, w, b)
    return product(x, form.packed, w, b, form.rows)


_gains: dict[tuple[Any, ...], bool] = {}
"""Whether a packed weight is GAIN times as fast, by what decides that: tried once in a process."""


def fastest(x: Tensor, w: Tensor, b: Tensor | None, rows: int) -> Form:
    """The form in which w is multiplied by x."""
    key = (rows, *w.shape, *w.stride(), b is None, torch.get_num_threads())
    if key not in _gains:
        _gains[key] = gains(x, w, b, rows)
    return packed(w, rows) if _gains[key] else Form(rows, None)


def packed(w: Tensor, rows: int) -> Form:
    """w as MKL lays it out."""
    return Form(rows, torch.ops.mkl._mkl_reorder_linear_weight(w, rows))


def gains(x: Tensor, w: Tensor, b: Tensor | None, rows: int) -> bool:
    """Whether packed weights are GAIN times as fast, between weights that take their place in the cache."""
    weights = [w, *(w.clone() for _ in range(BETWEEN // max(w.nbytes, 4 * SMALL)))]
    plain, laid = [Form(rows, None) for _ in weights], [packed(v, rows) for v in weights]

    def all_in(forms: list[Form]) -> None:
        for v, form in zip(weights, forms, strict=True):
            multiply(x, v, b, form)

    times = by_turns([partial(all_in, plain), partial(all_in, laid)], x.device, ROUNDS)
    return GAIN * times[1] < times[0]


def direct(x: Tensor, w: Tensor, b: Tensor | None, shared: Kept | None = None) -> Tensor:
    """The op on CPU tensors, past the dispatcher.

    shared   the weight as `Kept` has it
    """
    if shared is None or torch.compiler.is_compiling() or watched(x):
        return linear(x, w, b)
    rows, form = x.numel() // shared.columns, shared.form  # which another thread may exchange
    if rows != form.rows:
        shared.missed(x, b, rows)
        return linear(x, w, b)
    shared.hits += 1
    if form.packed is None:
        return linear(x, w, b)
    return product(x, form.packed, w, b, rows)


shared = _operator.Shared(Kept, (), ("w",), worth, ahead=True)
