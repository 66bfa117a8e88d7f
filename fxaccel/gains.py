"""What each pass buys a model on this machine: time and memory of a call, or of a step of training.

The model as written, the graph without passes, and the graph after each pass that applied somewhere run by
turns in one process. Time is the least of all rounds, with the 10th and the 90th centile beside it; memory
is the most that operators hold at once beside parameters and inputs; on the CPU without what a kernel takes
for itself while it runs.
"""

from __future__ import annotations

import copy
import importlib
import json
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxaccel import manager
from fxaccel.capture import Call
from fxaccel.discover import resolve
from fxaccel.errors import OptionError
from fxaccel.memory import Meter
from fxaccel.module import accelerate
from fxaccel.report import Report

AS_WRITTEN, CAPTURED = "as written", "no passes"


@dataclass(frozen=True)
class Row:
    """One version of the model.

    name               a pass: the graph after it and all before it; or what there was before the first
    sites              that it rewrote
    ms, low, high      of a call: the least, the 10th and the 90th centile
    nbytes             that it holds at the most
    """

    name: str
    sites: int
    ms: float
    low: float
    high: float
    nbytes: int


@dataclass(frozen=True)
class Gains:
    """The rows in the order in which the passes run; printing it gives a table.

    report    of the last row: which passes applied nowhere, and why
    """

    mode: str
    rows: tuple[Row, ...]
    report: Report

    def __str__(self) -> str:
        first, head = self.rows[0], f"{'':<24}{'sites':>6}{'ms':>9}{'10-90 %':>15}{'speed':>8}{'gain':>7}"
        lines = [f"{self.mode}, by turns on {torch.get_num_threads()} threads", f"{head}{'peak MiB':>10}"]
        before = first
        for row in self.rows:
            spread = f"{row.low:.3g}-{row.high:.3g}"
            speed, gain = first.ms / row.ms, before.ms / row.ms
            lines.append(
                f"{row.name:<24}{row.sites or '':>6}{row.ms:>9.3g}{spread:>15}{speed:>8.2f}{gain:>7.2f}"
                f"{row.nbytes / 2**20:>10.4g}"
            )
            before = row
        idle = [n for n in self.report if not self.report[n].applied]
        return "\n".join([*lines, *([f"applied nowhere: {', '.join(idle)}"] if idle else [])])

    def to_json(self) -> str:
        """The table as JSON: {"mode", "threads", "rows": [{"name", "sites", "ms", ...}], "idle": [name]}."""
        idle = [n for n in self.report if not self.report[n].applied]
        rows = [asdict(r) for r in self.rows]
        threads = torch.get_num_threads()
        return json.dumps({"mode": self.mode, "threads": threads, "rows": rows, "idle": idle}, indent=2)


def gains(
    model: nn.Module, passes: Iterable[Any] | None, example: Call, *,
    allow: str = "reassociated", rounds: int = 15,
) -> Gains:  # fmt: skip
    """Capture `model`, in the mode it is in, after each pass, and time all that came of it.

    passes    as `accelerate` takes them; None for the default ones, whose slower sites are left out
    """
    if rounds < 1:
        raise OptionError(f"rounds is {rounds}, expected at least 1")
    measure, given = passes is None, resolve(passes)
    model, grad = copy.deepcopy(model), model.training  # whose statistics a step of training may move
    with torch.set_grad_enabled(grad):
        last = _made(model, given, example, allow, measure)
        report = last.report()
        useful = [p for p in manager.order(given) if report[p.name].applied]
        versions: dict[str, nn.Module] = {AS_WRITTEN: model}
        versions[CAPTURED] = _made(model, [], example, allow, False)
        for i, one in enumerate(useful[:-1]):
            stopwatch = last.__dict__["_fxaccel"].stopwatch  # what was slower there is slower here
            versions[one.name] = _made(model, useful[: i + 1], example, allow, measure, stopwatch)
        if useful:
            versions[useful[-1].name] = last
        steps = [_step(m, example) for m in versions.values()]
        device = next((t.device for t in example.tensors), torch.device("cpu"))
        clock: Any = importlib.import_module("fxaccel.kernels._clock")
        times = clock.all_of(steps, device, rounds)
        peaks = [_peak(step, device) for step in steps]
    rows = [
        Row(name, len(report[name].applied) if name in report else 0, min(t), *_spread(t), peak)
        for name, t, peak in zip(versions, times, peaks, strict=True)
    ]
    return Gains(manager.mode(model.training, grad), tuple(rows), report)


def _made(
    model: nn.Module, passes: list[Any], example: Call, allow: str, measure: bool, stopwatch: Any = None
) -> Any:
    fast = accelerate(model, passes, allow=allow, measure=measure)
    if stopwatch is not None:
        fast.__dict__["_fxaccel"].stopwatch = stopwatch
    args, kwargs = example.unflatten(example.tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what applied nowhere is named in the end
        fast.__dict__["_fxaccel"].capture(fast, args, kwargs)
    return fast


def _step(model: nn.Module, example: Call) -> Callable[[], Any]:
    """A call; in training with the gradients of all parameters."""
    args, kwargs = example.unflatten(example.tensors)
    if not torch.is_grad_enabled():
        return lambda: model(*args, **kwargs)
    learned = [p for p in model.parameters() if p.requires_grad]

    def step() -> Any:
        made = model(*args, **kwargs)
        loss = getattr(made, "loss", None)
        found = [loss] if loss is not None else pytree.tree_leaves(made)
        found = [t for t in found if isinstance(t, Tensor) and t.requires_grad]
        if not found or not learned:
            return made
        return torch.autograd.grad(found, learned, [torch.ones_like(t) for t in found], allow_unused=True)

    return step


def _spread(times: list[float]) -> tuple[float, float]:
    if len(times) < 2:
        return times[0], times[0]
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def _peak(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a step holds at the most beside what was there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Meter() as meter:
        step()
    return meter.peak
