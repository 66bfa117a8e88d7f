"""y = linear_activation(x, w, b, activation) = activation(x w^T + b), in inference.

Shapes     x: [..., K]; w: [N, K]; b: [N] or None; of one dtype; activation: gelu_tanh.
           Returns y: [..., N], contiguous.
Numerics   those of torch's two operators; on the CPU, from LEAST multiply-adds on, those of oneDNN's product,
           which sums in another order than MKL's, and of its tanh, which is good to a few eps.
Cost       2 M N K flop and 9 for each result. torch takes 2.2 to 2.9 ns on one thread for a gelu with a tanh,
           oneDNN behind its product a third to a half of that; the product itself may take longer.
Limits     oneDNN for float32 and a contiguous w alone. Under deterministic algorithms, on a GPU, and where a
           derivative or a mode watches, these are torch's two operators.
Source     oneDNN's "eltwise" post-operations; torch's own use of them, `torch/_inductor/mkldnn_lowerings.py`.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels import _activations, _operator
from fxaccel.kernels._operator import watched
from fxaccel.kernels.packed_linear import linear

ACTIVATIONS = {"gelu_tanh": ("gelu", "tanh")}
"""As oneDNN is given them. Of the others it has, models gain nothing: `bench/bias_activation.py`."""
LEAST = 2**25  # multiply-adds below which oneDNN's product loses more than its tanh gains

product: Any = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


def reference(x: Tensor, w: Tensor, b: Tensor | None, activation: str) -> Tensor:
    """The meaning of this op, its kernel on every device, and what every test compares with."""
    return _activations.ACTIVATIONS[activation](linear(x, w, b))


def unsupported(x: Tensor, w: Tensor, b: Tensor | None, activation: str) -> Iterator[str]:
    """Why these would be torch's two operators. Reads devices, ranks, dtypes and static sizes."""
    if product is None:
        yield "this torch was built without oneDNN, whose product this is"
    if x.device.type != "cpu":
        yield f"x is on {x.device}; the product is the CPU's"
    dtypes = {t.dtype for t in (x, w, b) if t is not None}
    if dtypes != {torch.float32}:
        yield f"dtype {', '.join(sorted(map(str, dtypes)))}; the product is of torch.float32"
    if w.ndim != 2 or (b is not None and b.ndim != 1):
        ranks = f"w has {w.ndim} dimensions" + ("" if b is None else f" and b {b.ndim}")
        yield f"{ranks}; the kernel takes 2 and 1"
    elif (size := _operator.known(prod(x.shape[:-1]) * prod(w.shape))) is not None and size < LEAST:
        yield f"the product has {size:,} multiply-adds; below {LEAST:,} nothing is gained"
    if activation not in ACTIVATIONS:
        yield f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"


def _fake(x: Tensor, w: Tensor, b: Tensor | None, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


op = _operator.define(
    "linear_activation(Tensor x, Tensor w, Tensor? b, str activation) -> Tensor",
    cpu=reference,
    cuda=reference,
    fake=_fake,
)
_operator.differentiate(op, reference)
_operator.autocast(op, "cpu", lambda: torch.get_autocast_dtype("cpu"))
_operator.autocast(op, "cuda", lambda: torch.get_autocast_dtype("cuda"))


def _flops(x: Any, w: Any, b: Any, activation: str, **_: Any) -> int:
    return (2 * x[-1] + _activations.FORWARD[activation]) * prod(x[:-1]) * int(w[0])


_operator.count_flops(op, _flops)


def direct(x: Tensor, w: Tensor, b: Tensor | None, activation: str) -> Tensor:
    """The op on CPU tensors, past the dispatcher."""
    small = x.numel() * w.shape[0] < LEAST
    if small or x.dtype != torch.float32 or torch.compiler.is_compiling() or watched(x):
        return reference(x, w, b, activation)
    if not w.is_contiguous() or w.dtype != x.dtype:
        return reference(x, w, b, activation)
    kind, how = ACTIVATIONS[activation]
    y: Tensor = product(x.contiguous(), w, b, kind, [], how)
    return y
