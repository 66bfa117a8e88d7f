"""Monarch and butterfly layers on the CPU against the dense layer of the same size: python bench/monarch.py

forward    seconds of the dense linear, of ours (`direct`), of the two products without a permutation, and of
           ours with a permutation after each, as training has it; B5 of the targets asks for 0.8 of the flop
           ratio: B / 2 where each factor has C**2 / B elements.
training   forward and backward of every input.
butterfly  forward and training beside the dense layer; `passes` is the factors one after the other: where the
           two cross is FEW of kernels/butterfly.py.
shuffle    the permutation between the factors as PyTorch's channel shuffle, as a copy of the permuted view,
           and as a transposition of the whole matrix: why kernels/_blocks.py takes the first.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import interleaved, save
from torch import Tensor

from fxaccel.kernels import _blocks, butterfly, monarch

ROUNDS = 11


def factors(n: int, blocks: int, t: int) -> list[Tensor]:
    """right and left of a square monarch with k = l = blocks."""
    return [torch.randn(blocks, t * blocks, n // blocks), torch.randn(blocks, n // blocks, t * blocks)]


def trained(f: Callable[..., Tensor], *given: Tensor) -> Callable[[], Any]:
    """Forward and backward of every input."""
    leaves = [t.clone().requires_grad_() for t in given]
    dy = torch.ones_like(given[0])
    return lambda: torch.autograd.grad(f(*leaves), leaves, dy)


def forward(f: Callable[..., Tensor], *given: Tensor) -> Callable[[], Any]:
    """Forward where no gradient is wanted."""

    def step() -> None:
        with torch.no_grad():
            f(*given)

    return step


def products(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
    """The two products alone, of whatever features."""
    return _blocks.product(_blocks.product(x, right), left)


def monarch_case(n: int, rows: int, blocks: int, t: int) -> dict[str, Any]:
    """Forward and training beside the dense layer."""
    torch.manual_seed(0)
    x, w, (right, left) = torch.randn(rows, n), torch.randn(n, n), factors(n, blocks, t)
    repeat = max(1, int(2e9 / (rows * n * n)))
    ours = lambda x, r, s: monarch.direct(x, r, s, None, n)  # noqa: E731
    calls = {
        "dense": forward(F.linear, x, w),
        "fxaccel": forward(ours, x, right, left),
        "products": forward(products, x, right, left),
        "two shuffles": forward(lambda x, r, s: monarch.save(x, r, s, None, n)[0], x, right, left),
    }
    training = {"dense training": trained(F.linear, x, w), "fxaccel training": trained(ours, x, right, left)}
    times = [interleaved(c, rounds=ROUNDS, repeat=repeat) for c in (calls, training)]
    best = {k: v["min"] for found in times for k, v in found.items()}
    flops = w.numel() / (right.numel() + left.numel())
    return {
        "seconds": best,
        "flop ratio": flops,
        "forward": best["dense"] / best["fxaccel"],
        "products": best["dense"] / best["products"],
        "training": best["dense training"] / best["fxaccel training"],
    }


def butterfly_case(n: int, rows: int) -> dict[str, Any]:
    """Forward, in both ways, and training beside the dense layer."""
    torch.manual_seed(0)
    x, w = torch.randn(rows, n), torch.randn(n, n)
    twiddle = torch.randn(1, n.bit_length() - 1, n // 2, 2, 2) / 2**0.5
    calls = {
        "dense": forward(F.linear, x, w),
        "passes": forward(lambda x, t: butterfly.reference(x, t, None, n), x, twiddle),
        "multiplied out": forward(lambda x, t: butterfly.expanded(x, t, None, n), x, twiddle),
        "dense training": trained(F.linear, x, w),
        "fxaccel training": trained(lambda x, t: butterfly.direct(x, t, None, n), x, twiddle),
    }
    best = {k: v["min"] for k, v in interleaved(calls, rounds=ROUNDS, repeat=2).items()}
    return {
        "seconds": best,
        "passes": best["dense"] / best["passes"],
        "multiplied out": best["dense"] / best["multiplied out"],
        "training": best["dense training"] / best["fxaccel training"],
    }


def shuffle_case(n: int, rows: int, groups: int) -> dict[str, float]:
    """Seconds of three ways to write [N, (g c)] as [N, (c g)]; the last from a product stored transposed."""
    x = torch.randn(rows, n)
    turned = x.t().contiguous()
    calls = {
        "shuffle": lambda: _blocks.shuffle(x, groups),
        "copy": lambda: x.view(rows, groups, -1).mT.reshape(rows, n),
        "transposition": lambda: turned.t().contiguous(),
    }
    return {k: v["min"] for k, v in interleaved(calls, rounds=ROUNDS, repeat=20).items()}


def main() -> None:
    """Every case."""
    figures: dict[str, Any] = {}
    for n in (2048, 4096):
        for rows in (32, 256):
            given = f"float32 [{rows}, {n}]"
            for blocks, t in ((4, n // 16), (8, n // 64), (16, n // 256), ({2048: 32, 4096: 64}[n], 1)):
                found = monarch_case(n, rows, blocks, t)
                figures[f"monarch {given} blocks {blocks} rank {t}"] = found
                told = "  ".join(
                    f"{k} {found[k]:6.2f}x" for k in ("flop ratio", "forward", "products", "training")
                )
                print(f"monarch {given} blocks {blocks:3} rank {t:3}  {told}", flush=True)
            figures[f"shuffle {given} groups 16"] = found = shuffle_case(n, rows, 16)
            print(f"shuffle {given}", {k: f"{1e3 * s:.3f} ms" for k, s in found.items()}, flush=True)
    for n in (1024, 4096):
        for rows in (1, 8, 32, 256):
            figures[f"butterfly float32 [{rows}, {n}]"] = found = butterfly_case(n, rows)
            told = "  ".join(f"{k} {found[k]:6.2f}x" for k in ("passes", "multiplied out", "training"))
            print(f"butterfly float32 [{rows}, {n}]  {told}", flush=True)
    save("monarch_cpu", figures)


if __name__ == "__main__":
    main()
