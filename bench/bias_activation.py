"""Bias and activation on the CPU, in inference: python bench/bias_activation.py

What fuse-activation writes ("ours") against torch's operators: on sums that are written out, alone, and
behind a linear, whose product adds the bias; there it is oneDNN's product of gelu_tanh, the activation alone
of those of several operators, and nothing else. What was tried there besides: the activation over the
linear's result ("over"), product, sum and activation as three ("apart"), and oneDNN's linear with the
activation behind it ("onednn"), where it has one. "without" leaves the activation out: the most that can be
gained. Then a GPT of 4 layers. Above 1, the candidate is faster than torch's operators, which run twice;
"noise" is how far these two are apart, which is what other figures may be off by.
"""

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import interleaved, save
from norm import keep_memory
from torch import Tensor, nn

from fxaccel.kernels import _activations, linear_activation
from fxaccel.kernels import bias_activation as kernel

LINEARS = ((256, 1024), (768, 3072))
ROWS = (16, 128, 1024)
ONEDNN = {
    "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", ""),
    "tanh": ("tanh", ""), "sigmoid": ("sigmoid", ""),
}  # fmt: skip


def onednn(x: Tensor, w: Tensor, b: Tensor, activation: str) -> Tensor:
    """A linear with the activation behind it, as torch's own compiler calls it."""
    kind, how = ONEDNN[activation]
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, b, kind, [], how)
    return made


def written(activation: str) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """What the pass makes of a linear and the activation behind it, None where it leaves them."""
    if activation in linear_activation.ACTIVATIONS:
        return lambda x, w, b: linear_activation.direct(x, w, b, activation)
    if activation in kernel.SEVERAL:
        return lambda x, w, b: kernel.direct(F.linear(x, w, b), None, activation)
    return None


def ratios(candidates: dict[str, Callable[[], Any]], repeat: int, rounds: int = 21) -> dict[str, float]:
    """Of the time of "torch" to that of each."""
    first, *others = candidates
    twice = {first: candidates[first], "again": candidates[first]} | {k: candidates[k] for k in others}
    with torch.no_grad():
        times = {k: t["min"] for k, t in interleaved(twice, rounds=rounds, repeat=repeat).items()}
    same = sorted((times.pop(first), times.pop("again")))
    noise = {"seconds": same[0], "noise": round(same[1] / same[0], 3)}
    return noise | {k: round(same[0] / t, 3) for k, t in times.items()}


def elementwise(rows: int, columns: int, dtype: torch.dtype, activation: str) -> dict[str, dict[str, float]]:
    """A sum that is written out, and the activation alone where it is several operators."""
    x, b = torch.randn(rows, columns).to(dtype), torch.randn(columns).to(dtype)
    found = {}
    for what, bias in (("sum", b), ("alone", None)):
        if bias is not None or activation in kernel.SEVERAL:
            ways: dict[str, Callable[[], Any]] = {
                "torch": partial(kernel.reference, x, bias, activation),
                "ours": partial(kernel.direct, x, bias, activation),
            }
            found[what] = ratios(ways, max(1, min(100, 1_000_000 // x.numel())))
    return found


def behind_linear(rows: int, inner: int, outer: int, activation: str) -> dict[str, float]:
    """The candidates behind a product that adds the bias, in float32."""
    x, w, b = torch.randn(rows, inner), torch.randn(outer, inner) / inner**0.5, torch.randn(outer)
    plain, over = _activations.ACTIVATIONS[activation], _activations.OVER[activation]
    ways: dict[str, Callable[[], Any]] = {
        "torch": lambda: plain(F.linear(x, w, b)),
        "over": lambda: over(F.linear(x, w, b)),
        "apart": lambda: over(F.linear(x, w).add_(b)),
        "without": lambda: F.linear(x, w, b),
    }
    if activation in ONEDNN:
        ways["onednn"] = lambda: onednn(x, w, b, activation)
    if (ours := written(activation)) is not None:
        ways["ours"] = partial(ours, x, w, b)
    return ratios(ways, max(1, min(50, 200_000_000 // (rows * inner * outer))))


class Block(nn.Module):
    """A pre-norm block of a GPT, whose linear and activation are `way`."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, way: Callable[[Tensor, nn.Linear], Tensor]) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, c // 64, 64).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(way(self.norms[1](x), self.up))


def whole(width: int, shape: tuple[int, int], activation: str) -> dict[str, float]:
    """Four blocks."""
    torch.manual_seed(0)
    blocks, x = [Block(width) for _ in range(4)], torch.randn(*shape, width)
    plain, over = _activations.ACTIVATIONS[activation], _activations.OVER[activation]
    linears: dict[str, Callable[[Tensor, nn.Linear], Tensor]] = {
        "torch": lambda x, up: plain(up(x)),
        "over": lambda x, up: over(up(x)),
        "without": lambda x, up: up(x),
    }
    if activation in ONEDNN:
        linears["onednn"] = lambda x, up: onednn(x, up.weight, up.bias, activation)
    ours = written(activation)
    if ours is not None:
        linears["ours"] = lambda x, up: ours(x, up.weight, up.bias)

    def step(way: Callable[[Tensor, nn.Linear], Tensor]) -> None:
        y = x
        for block in blocks:
            y = block(y, way)

    repeat = max(1, 30_000_000 // (shape[0] * shape[1] * width * width))
    return ratios({k: (lambda way=way: step(way)) for k, way in linears.items()}, repeat)


def told(case: str, found: list[dict[str, float]]) -> None:
    """Least, most and median of every candidate."""
    parts = []
    for n in ("noise", "ours"):
        r = [f[n] for f in found]
        parts.append(f"{n} {min(r):.2f} to {max(r):.2f}, {statistics.median(r):.2f}")
    print(f"{case:34}", "; ".join(parts), flush=True)


def main() -> None:
    """Every size and activation, then models."""
    keep_memory()
    torch.manual_seed(0)
    figures: dict[str, Any] = {}
    for dtype, columns, rows in itertools.product((torch.float32, torch.bfloat16), (1024, 3072), ROWS):
        case = f"{str(dtype)[6:]} [{rows}, {columns}]"
        for activation in kernel.ACTIVATIONS:
            for what, found in elementwise(rows, columns, dtype, activation).items():
                figures[f"{what} {case} {activation}"] = found
        for what in ("sum", "alone"):
            told(f"{what} {case}", [v for k, v in figures.items() if k.startswith(f"{what} {case}")])
    for (inner, outer), rows in itertools.product(LINEARS, ROWS):
        for activation in kernel.ACTIVATIONS:
            found = figures[f"linear {inner} to {outer}, {rows} rows, {activation}"] = behind_linear(
                rows, inner, outer, activation
            )
            print(f"linear {inner} to {outer}, {rows} rows, {activation}", found, flush=True)
    for width, shape, activation in itertools.product(
        (256, 768), ((1, 16), (2, 128)), ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "relu_squared")
    ):
        found = figures[f"GPT {width} on {list(shape)}, {activation}"] = whole(width, shape, activation)
        print(f"GPT {width} on {list(shape)}, {activation}", found, flush=True)
    save("bias_activation_cpu", figures)


if __name__ == "__main__":
    main()
