"""Rotary embeddings of q and k on the CPU against the model as written: python bench/rope.py

Ours is what emitted code calls, `direct`. Forward alone, and forward and backward of q and k.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import interleaved, save
from torch import Tensor

from fxaccel.kernels import rope

SHAPES = ((1, 1, 4, 64), (1, 16, 4, 64), (2, 128, 4, 64), (2, 512, 8, 64), (1, 2048, 8, 128))  # B S H D
ROUNDS, REPEAT = 25, 5


def halves(x: Tensor) -> Tensor:
    """Llama's rotate_half."""
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def columns(x: Tensor) -> Tensor:
    """GPT-J's rotate_every_two."""
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def written(turn: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """As models write it."""
    return lambda q, k, cos, sin: (q * cos + turn(q) * sin, k * cos + turn(k) * sin)


def training(f: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Callable[[], Any]:
    """Forward and backward."""
    leaves = [t.detach().requires_grad_() for t in (q, k)]
    return lambda: torch.autograd.grad(f(*leaves, cos, sin), leaves, [q, k])


def main() -> None:
    """Every case; prints and saves the ratios."""
    figures = {}
    for pairs, turn in ((False, halves), (True, columns)):
        both = {
            "as written": written(turn),
            "ours": lambda q, k, cos, sin, pairs=pairs: rope.direct([q, k], cos, sin, pairs),
        }
        for b, s, h, d in SHAPES:
            torch.manual_seed(0)
            q, k = (torch.randn(b, s, h, d).transpose(1, 2) for _ in range(2))
            at = torch.randn(s, d // 2)
            at = at.repeat_interleave(2, -1) if pairs else torch.cat([at, at], -1)
            args = (q, k, at.cos(), at.sin())
            for step in ("forward", "training"):
                calls = {
                    name: training(f, *args) if step == "training" else (lambda f=f, args=args: f(*args))
                    for name, f in both.items()
                }
                taken = interleaved(calls, rounds=ROUNDS, repeat=REPEAT)
                base, ours = (taken[name]["min"] for name in both)
                case = f"{'pairs' if pairs else 'halves'} {step} fp32 q, k [{b}, {h}, {s}, {d}]"
                figures[case] = {"us": ours * 1e6, "as written": base * 1e6, "ratio": base / ours}
                print(
                    f"{case:55} {base * 1e6:8.0f} us -> {ours * 1e6:8.0f} us  x{base / ours:.2f}", flush=True
                )
    print(save("rope_cpu", {"threads": 1, "figures": figures}))


if __name__ == "__main__":
    main()
