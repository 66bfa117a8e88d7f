"""How every CPU figure here is measured, and the form in which it is kept.

Candidates run interleaved in one process on one thread; a candidate's time is the minimum of
`time.thread_time()` over the rounds. Machines are noisy: quote ratios of one run, never times of two.
"""

import ctypes
import datetime
import gc
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    candidates: dict[str, Callable[[], Any]], *, rounds: int = 15, repeat: int = 1
) -> dict[str, dict[str, float]]:
    """Seconds a call of each candidate: minimum and median over `rounds` of `repeat` calls each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    try:
        for call in candidates.values():
            call()  # captures, compiles, fills caches
        for _ in range(rounds):
            for name, call in candidates.items():
                start = time.thread_time()
                for _ in range(repeat):
                    call()
                taken[name].append((time.thread_time() - start) / repeat)
    finally:
        torch.set_num_threads(threads)
    return {
        name: {"min": min(times), "median": sorted(times)[len(times) // 2], "max": max(times)}
        for name, times in taken.items()
    }


def grown(step: Callable[[], Any]) -> int:
    """By how many bytes this process grows at the most in a call, on Linux."""

    def resident(line: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (found,) = [one.split() for one in lines if one.startswith(f"{line}:")]
        return int(found[1]) * 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have left is given back
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def environment() -> dict[str, str]:
    """What a figure must carry: hardware, versions, date."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x.partition(":")[2].strip() for x in cpuinfo.read_text().splitlines() if "model name" in x]
        model = f"{names[0]}, {len(names)} cores" if names else model
    found = {"cpu": model, "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"date": datetime.date.today().isoformat()}


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write `bench/results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **figures}, indent=1) + "\n")
    return path
