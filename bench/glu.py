"""Gated activations on the CPU against torch's two operators: python bench/glu.py

`direct` is what emitted code calls, `op` the operator as others call it, which keeps gate and up for backward
and computes the activation again. Forward alone, and forward and backward of both inputs with the bytes that
autograd keeps; gate and up apart, and halves of one tensor ("packed"). Then a Llama of 4 layers with and
without `fuse-glu`. Above 1, ours is the faster.
"""

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from harness import interleaved, save
from merge_linears import models
from norm import keep_memory
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import fxaccel
from fxaccel.kernels import glu

SHAPES = ((16, 688), (256, 688), (256, 2752), (2048, 2752))
WAYS: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "torch": glu.reference, "direct": glu.direct, "op": glu.op,
}  # fmt: skip


def given(shape: tuple[int, int], dtype: torch.dtype, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and the gradient of y."""
    torch.manual_seed(0)
    both = torch.randn(2, *shape).to(dtype)
    gate, up = torch.cat([*both], -1).chunk(2, -1) if packed else both.unbind()
    return gate, up, torch.randn(shape).to(dtype)


def kept(f: Callable[..., Tensor], gate: Tensor, up: Tensor, activation: str) -> int:
    """Bytes that autograd keeps for backward."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.data_ptr()] = t.nbytes
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = f(gate.detach().requires_grad_(), up.detach().requires_grad_(), activation)
    del y
    return sum(found.values())


def measured(shape: tuple[int, int], dtype: torch.dtype, packed: bool, activation: str) -> dict[str, Any]:
    """Ratios of torch's time to ours, forward and training, and bytes kept."""
    gate, up, dy = given(shape, dtype, packed)
    leaves, trained = [gate, up], [t.detach().requires_grad_() for t in (gate, up)]

    def forward(f: Any) -> Callable[[], Any]:
        def step() -> None:
            with torch.no_grad():
                f(*leaves, activation)

        return step

    def training(f: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(f(*trained, activation), trained, dy)

    repeat = max(2, min(100, 1_000_000 // gate.numel()))
    found: dict[str, Any] = {"bytes kept": {k: kept(f, *leaves, activation) for k, f in WAYS.items()}}
    for what, make in (("forward", forward), ("training", training)):
        times = interleaved({k: make(f) for k, f in WAYS.items()}, rounds=11, repeat=repeat)
        seconds = {k: t["min"] for k, t in times.items()}
        found[what] = {"seconds": seconds} | {k: seconds["torch"] / seconds[k] for k in ("direct", "op")}
    return found


def llama() -> dict[str, float]:
    """A whole model: seconds without the pass over seconds with it."""
    model = models(512)["llama"]
    found = {}
    for grad in (False, True):
        passes = ["fuse-attention", "fuse-norm"]
        with torch.set_grad_enabled(grad):
            made = {
                k: fxaccel.accelerate(copy.deepcopy(model), passes + more)
                for k, more in (("without", []), ("with", ["fuse-glu"]))
            }
        for size in ((2, 128), (1, 16)):
            ids = torch.randint(1, 1000, size)

            def step(fast: Any, ids: Tensor = ids, grad: bool = grad) -> None:
                with torch.set_grad_enabled(grad):
                    logits = fast(input_ids=ids)[0]
                    if grad:
                        logits.square().mean().backward()

            calls = {k: (lambda f=f: step(f)) for k, f in made.items()}
            times = interleaved(calls, rounds=15, repeat=3)
            case = f"{list(size)} {'training' if grad else 'inference'}"
            found[case] = times["without"]["min"] / times["with"]["min"]
            print(f"llama 512 {case}: {found[case]:.3f}", flush=True)
    return found


def main() -> None:
    """Every shape and activation, then a model."""
    keep_memory()
    figures: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for packed in (False, True):
                case = f"{str(dtype)[6:]} {list(shape)}{' packed' if packed else ''}"
                for activation in glu.ACTIVATIONS:
                    figures[f"{case} {activation}"] = measured(shape, dtype, packed, activation)
                told = []
                for what in ("forward", "training"):
                    for way in ("direct", "op"):
                        ratios = [figures[f"{case} {a}"][what][way] for a in glu.ACTIVATIONS]
                        least, most, middle = min(ratios), max(ratios), statistics.median(ratios)
                        told.append(f"{what} {way} {least:.2f} to {most:.2f}, {middle:.2f}")
                print(f"{case:30}", "; ".join(told), flush=True)
    save("glu_cpu", figures | {"llama of 4 layers, width 512": llama()})


if __name__ == "__main__":
    main()
