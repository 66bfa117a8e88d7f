"""What pack-weights buys: python bench/pack_weights.py [linears] [models]

linears    the 16 linears of a GPT-2 of 4 layers one after the other, so that each weight comes from a cache
           that the others have used: packed, beside torch's linear of a weight as nn.Linear holds it [N, K]
           and as GPT-2 does [K, N]; of widths 256 and 512, 4 to 256 rows
models     X1 of the targets: BERT, GPT-2 and Llama of 4 layers and widths 256 and 512, on 2 x 128 and 1 x 16
           tokens: as written, by the default passes, by those and pack-weights, through torch.compile, and
           through torch.compile with freezing

Times are CPU time of 1 thread, minimum of interleaved rounds.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import interleaved, save
from quantize import zoo

import fxaccel
from fxaccel.discover import available
from fxaccel.kernels import packed_linear

CALLS = ((2, 128), (1, 16))
WARM = packed_linear.CALLS + 2


def timed(candidates: dict[str, Callable[[], Any]], rounds: int, repeat: int) -> dict[str, float]:
    """Milliseconds of each, after as many calls as it takes to pack."""
    with torch.no_grad():
        for call in candidates.values():
            for _ in range(WARM):
                call()
        return {k: 1e3 * v["min"] for k, v in interleaved(candidates, rounds=rounds, repeat=repeat).items()}


def linears(width: int) -> dict[str, Any]:
    """By rows: milliseconds, and times as fast as either plain weight."""
    torch.manual_seed(0)
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * 4
    weights = [torch.randn(n, k) / k**0.5 for n, k in shapes]
    found: dict[str, Any] = {}
    for rows in (4, 8, 16, 32, 64, 128, 256):
        plain = packed_linear.Form(rows, None)
        forms = {
            "[N, K]": [(w, plain) for w in weights],
            "[K, N]": [(w.t().contiguous().t(), plain) for w in weights],
            "packed": [(w, packed_linear.packed(w, rows)) for w in weights],
        }
        calls = [(torch.randn(rows, k), torch.randn(n)) for n, k in shapes]
        times = timed({name: partial(_all, calls, form) for name, form in forms.items()}, 25, 1)
        gain = {n: times[n] / times["packed"] for n in ("[N, K]", "[K, N]")}
        found[f"{width}, {rows} rows"] = {"ms": times, "packed is times as fast": gain}
        print(width, rows, {n: round(g, 2) for n, g in gain.items()}, flush=True)
    return found


def _all(calls: list[Any], forms: list[Any]) -> None:
    for (x, b), (w, form) in zip(calls, forms, strict=True):
        if form.packed is None:
            F.linear(x, w, b)
        else:
            packed_linear.multiply(x, w, b, form)


def models(width: int) -> dict[str, Any]:
    """By model and shape of the call: milliseconds and times as fast as written."""
    found: dict[str, Any] = {}
    default = [n for n, p in available().items() if p.default]
    for name, model in zoo(width).items():
        options = {"use_cache": False} if name != "BERT" else {}
        for batch, length in CALLS:
            torch._dynamo.reset()
            ids = torch.randint(1000, (batch, length))
            made = {
                "eager": model,
                "default passes": fxaccel.accelerate(model),
                "with pack-weights": fxaccel.accelerate(model, [*default, "pack-weights"]),
                "torch.compile": torch.compile(model, dynamic=False),
                "with freezing": torch.compile(model, dynamic=False, options={"freezing": True}),
            }
            calls = {n: partial(f, input_ids=ids, **options) for n, f in made.items()}
            times = timed(calls, 21, 1 if length > 16 else 5)
            faster = {n: times["eager"] / t for n, t in times.items()}
            found[f"{name} {width}, {batch} x {length}"] = {"ms": times, "times as fast": faster}
            print(name, width, batch, length, {n: round(v, 2) for n, v in faster.items()}, flush=True)
    return found


if __name__ == "__main__":
    parts: dict[str, Any] = {"linears": linears, "models": models}
    figures: dict[str, Any] = {name: {} for name in sys.argv[1:] or parts}
    for name in figures:
        for width in (256, 512):
            figures[name] |= parts[name](width)
            save("pack_weights_cpu", figures)
