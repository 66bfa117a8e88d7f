"""Finds the fastest blocks for one attention on the present GPU and keeps them for every later process.

    tune(q, k, v, mask="k <= q", scale=0.125)    {"forward": Config(m=128, n=128, warps=8, stages=3), ...}

Nothing calls this but a user. What it finds goes to the file of `_flash_blocks.path()`, under the GPU's name,
Triton's version, kernel, dtype, head size up to 64, 128 or 256, and features; lengths and heads are not told
apart. The blocks decide the order of sums: other blocks give other last bits, each the same on every run.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels import _flash, _flash_blocks
from fxaccel.kernels._flash_blocks import Config
from fxaccel.kernels._triton import triton

Timer = Callable[[Callable[[], Any]], float]


def candidates(kernel: str) -> list[Config]:
    """The blocks that are tried: what fits no registers is slow, what fits no memory is skipped."""
    tall = (32, 64, 128) if kernel == "keys" else (64, 128)
    made = itertools.product(tall, (32, 64, 128), (4, 8), (1, 2, 3, 4))
    return [Config(*c) for c in made if c[0] * c[1] <= 128 * 128 and c[0] * c[1] >= 32 * 32 * c[2] // 4]


def measured(run: Callable[[], Any]) -> float:
    """The median time of a call on the GPU, in ms."""
    return float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"))


def tune(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tables: Sequence[Tensor] = (),
    mask: str = "",
    bias: str = "",
    scale: float = 1.0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    backward: bool = True,
    timer: Timer = measured,
) -> dict[str, Config]:
    """The fastest blocks for this attention, by kernel. They are kept and used from now on."""
    seed = torch.zeros(1, dtype=torch.int64, device=q.device) if dropout else None
    given = (q, k, v, list(tables), mask, bias)
    features = (scale, softcap, sinks, dropout, seed)
    p = _flash.Problem(*given, *features)
    out, lse = _flash.launch_forward(*given, *features, save=True)
    runs: dict[str, Callable[[Config], Any]] = {"forward": lambda c: _flash.forward(p, out, lse, c)}
    if backward:
        assert lse is not None, "it was to be saved"
        arguments = p.arguments() | _flash.score_arguments(p, torch.randn_like(out), out, lse)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        runs["keys"] = lambda c: _flash.key_gradient(p, arguments, dk, dv, c)
        runs["queries"] = lambda c: _flash.query_gradient(p, arguments, dq, c)
    best = {name: fastest(run, [p.config(name), *candidates(name)], timer) for name, run in runs.items()}
    width = max(p.d, p.e)
    keep({_flash_blocks.key(name, q.dtype, width, p.features, q.device): c for name, c in best.items()})
    return best


def fastest(run: Callable[[Config], Any], choices: list[Config], timer: Timer) -> Config:
    """The choice with the least time; the first of several, and none that does not fit the GPU."""
    times = {}
    for choice in dict.fromkeys(choices):
        try:
            times[choice] = timer(partial(run, choice))
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            continue
    return min(times, key=lambda choice: times[choice])


def keep(found: dict[str, Config]) -> None:
    """Add to the file of tuned blocks, whole or not at all: other processes may be reading it."""
    file = _flash_blocks.path()
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = {line: list(config) for line, config in (_flash_blocks.tuned() | found).items()}
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".json")
    with os.fdopen(handle, "w") as out:
        json.dump(lines, out, indent=1, sort_keys=True)
    os.replace(name, file)
