"""Norms on the CPU against the fastest of torch's spellings: python bench/norm.py

Ours is what emitted code calls, `direct`; torch's are its functions and the norm written out, with the
residual add before them where ours has it. Forward alone, and forward and backward of every input. `rms to
layer` is our LayerNorm's time over our RMSNorm's: above 1, RMSNorm is the faster. In bfloat16 torch's
LayerNorm sums the gradients of weights in bfloat16, ours in float32.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import interleaved, save
from torch import Tensor

from fxaccel.kernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm

EPS, ROUNDS = 1e-6, 11
SHAPES = ((1, 512), (16, 512), (128, 512), (512, 1024), (2048, 1024), (4096, 2048))
Norm = Callable[..., Any]


def rms_written(x: Tensor, w: Tensor) -> Tensor:
    """RMSNorm as models write it."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def layer_written(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """LayerNorm as models write it."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS) * w + b


def after_add(norm: Norm) -> Norm:
    """The residual add, then the norm of the sum; both are returned."""

    def both(x: Tensor, r: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        return norm(h, *weights), h

    return both


RMS = {"F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, EPS), "written out": rms_written}
LAYER = {"F.layer_norm": lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS), "written out": layer_written}
CASES: dict[str, tuple[dict[str, Norm], Norm, int, int]] = {  # torch's, ours, tensors, weights
    "rms_norm": (RMS, lambda x, w: rms_norm.direct(x, w, EPS), 1, 1),
    "layer_norm": (LAYER, lambda x, w, b: layer_norm.direct(x, w, b, EPS), 1, 2),
    "add_rms_norm": (
        {name: after_add(f) for name, f in RMS.items()},
        lambda x, r, w: add_rms_norm.direct(x, r, w, EPS), 2, 1,
    ),
    "add_layer_norm": (
        {name: after_add(f) for name, f in LAYER.items()},
        lambda x, r, w, b: add_layer_norm.direct(x, r, w, b, EPS), 2, 2,
    ),
}  # fmt: skip


def forward(f: Norm, args: list[Tensor]) -> Callable[[], Any]:
    """Forward where no gradient is wanted."""

    def step() -> None:
        with torch.no_grad():
            f(*args)

    return step


def training(f: Norm, args: list[Tensor]) -> Callable[[], Any]:
    """Forward, and backward from every output to every input."""
    leaves = [a.clone().requires_grad_() for a in args]
    seed = torch.ones_like(args[0])

    def step() -> None:
        out = f(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(outs, leaves, [seed] * len(outs))

    return step


def measured(shape: tuple[int, int], dtype: torch.dtype, make: Callable[..., Callable[[], Any]]) -> Any:
    """Seconds of every candidate of every case, interleaved, and our ratios to the fastest of torch's."""
    torch.manual_seed(0)
    calls: dict[str, Callable[[], Any]] = {}
    for case, (theirs, ours, tensors, weights) in CASES.items():
        args = [torch.randn(shape).to(dtype) for _ in range(tensors)]
        args += [torch.randn(shape[-1]).to(dtype) for _ in range(weights)]
        for name, f in (theirs | {"fxaccel": ours}).items():
            calls[f"{case}: {name}"] = make(f, args)
    n = shape[0] * shape[1]
    taken: dict[str, float] = dict.fromkeys(calls, float("inf"))
    for order in (list(calls), list(calls)[::-1]):  # a candidate finds in the cache what the one before left
        times = interleaved(
            {k: calls[k] for k in order}, rounds=ROUNDS, repeat=max(3, min(200, 4_000_000 // n))
        )
        taken = {k: min(t, times[k]["min"]) for k, t in taken.items()}
    found: dict[str, Any] = {}
    for case, (theirs, *_) in CASES.items():
        seconds = {name: taken[f"{case}: {name}"] for name in (*theirs, "fxaccel")}
        best = min(theirs, key=seconds.__getitem__)
        found[case] = {"seconds": seconds, "ratio": seconds[best] / seconds["fxaccel"], "to": best}
    layer, rms = (found[case]["seconds"]["fxaccel"] for case in ("layer_norm", "rms_norm"))
    return found | {"rms to layer": layer / rms}


def keep_memory() -> None:
    """Have freed memory stay with the process: fresh pages cost as much as a norm, whoever asks for them."""
    libc = ctypes.CDLL(None)
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(option, 2**31 - 1)


def main() -> None:
    """Every shape, forward and training."""
    keep_memory()
    figures: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for what, make in (("forward", forward), ("training", training)):
                found = measured(shape, dtype, make)
                figures[f"{str(dtype)[6:]} {list(shape)} {what}"] = found
                ratios = [f"{case} {found[case]['ratio']:5.2f}x" for case in CASES]
                told = "  ".join([*ratios, f"rms to layer {found['rms to layer']:.2f}x"])
                print(f"{str(dtype)[6:]:9} {list(shape)!s:14} {what:9} {told}", flush=True)
    save("norm_cpu", figures)


if __name__ == "__main__":
    main()
