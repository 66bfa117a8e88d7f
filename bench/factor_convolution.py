"""Factored convolutions on the CPU against the dense ones: python bench/factor_convolution.py

The 3 x 3 convolutions of ResNet-50's stages at 224 x 224, with a quarter and a half of the parameters in
each kind; forward alone, and forward and backward. Times alone: what it does to a model, calibration says.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import interleaved, save
from torch import Tensor

from fxaccel.passes._convolution_forms import KINDS
from fxaccel.passes._convolutions import Window
from fxaccel.passes._linear_form import EAGER

STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, height and width
BATCHES, SHARES = (1, 8), (0.25, 0.5)
ROUNDS, REPEAT = 7, 1


def training(f: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward."""
    held = [t.detach().requires_grad_() for t in leaves]
    y = f(*held)
    down = torch.ones_like(y)
    return lambda: torch.autograd.grad(f(*held), held, down)


def main() -> None:
    """Every case; prints and saves the ratios."""
    window, figures = Window((3, 3), (1, 1), (1, 1), (1, 1)), {}
    for channels, side in STAGES:
        for batch in BATCHES:
            torch.manual_seed(0)
            x, weight = torch.randn(batch, channels, side, side), torch.randn(channels, channels, 3, 3)
            forms = [k.sized(channels, channels * 9, window, s) for s in SHARES for k in KINDS.values()]
            both: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
                "dense": (lambda x, w: window.call(EAGER, x, w, None), [x, weight])
            }
            for form in filter(None, forms):
                both[str(form)] = (
                    lambda x, *parts, form=form: form.linear(EAGER, x, parts, None),
                    [x, *form.plain(weight)],
                )
            for step in ("forward", "training"):
                calls = {
                    name: training(f, leaves)
                    if step == "training"
                    else torch.no_grad()(lambda f=f, leaves=leaves: f(*leaves))
                    for name, (f, leaves) in both.items()
                }
                taken = interleaved(calls, rounds=ROUNDS, repeat=REPEAT)
                base = taken["dense"]["min"]
                for form in filter(None, forms):
                    case = f"{step} fp32 [{batch}, {channels}, {side}, {side}] {form}"
                    ratio = base / taken[str(form)]["min"]
                    share = form.parameters / weight.numel()
                    figures[case] = {
                        "ms": base / ratio * 1e3,
                        "dense ms": base * 1e3,
                        "ratio": ratio,
                        "share": share,
                    }
                    print(f"{case:60} {base * 1e3:8.2f} ms  {share:.2f} of it  x{ratio:.2f}", flush=True)
    print(save("factor_convolution_cpu", {"threads": 1, "figures": figures}))


if __name__ == "__main__":
    main()
