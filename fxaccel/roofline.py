"""How fast a device computes and moves bytes: the constants by which a plan weighs time.

A call takes flops / rate or bytes / bandwidth seconds, whichever is more (Williams et al. 2009, "Roofline").
They are measured once for a device, dtype and version of torch and kept in a file of the user's cache
folder, so that plans are the same in every process; where that cannot be written they are measured again.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fxaccel.ir import Program, tensors
from fxaccel.profile import Profile

BACKWARD = 2  # times as long as forward
FORWARDS = 1 + BACKWARD  # that a step without recomputation takes
ROUNDS = 5
SIZE = 1024  # rows and columns of the product that is timed; the copy is of 16 times its bytes


@dataclass(frozen=True)
class Roofline:
    """The constants of a device.

    rate         FLOPs a second of a large product
    bandwidth    bytes a second that a copy reads and writes
    link         bytes a second to pinned memory of the host or back, whichever is slower; 0 where the
                 device's memory is the host's
    """

    rate: float
    bandwidth: float
    link: float = 0.0

    def seconds(self, profile: Profile) -> dict[int, float]:
        """What each call of a step takes; views take nothing."""
        return {
            i: 0.0 if c.view else max(c.flops / self.rate, c.nbytes / self.bandwidth)
            for i, c in profile.calls.items()
        }


def speed(program: Program) -> Roofline:
    """The constants of the device and the dtype that a program's parameters have."""
    weights = [t for n in program.state for t in tensors(program.placeholder(n).meta["val"])]
    first = next((t for t in weights if t.dtype.is_floating_point), torch.empty(0))
    return roofline(first.device, first.dtype)


def roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """The constants of a device, from the file or measured."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu {torch.get_num_threads()} threads"
    )
    key, file = f"{name} {dtype} torch {torch.__version__}", _file()
    known = _read(file)
    if key in known:
        return Roofline(**known[key])
    found = measure(device, dtype)
    _write(file, {**known, key: asdict(found)})
    return found


def measure(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Time a product and a copy; the best of a few rounds."""
    made = torch.empty(SIZE, SIZE, device=device, dtype=dtype).fill_(0.5)
    large = torch.empty(16 * SIZE * SIZE, device=device, dtype=dtype).fill_(0.5)
    other = torch.empty_like(large)
    product = _best(lambda: torch.mm(made, made), device)
    copy = _best(lambda: other.copy_(large), device)
    link = 0.0
    if device.type == "cuda":
        host = torch.empty(large.shape, dtype=dtype, pin_memory=True)
        there, back = _best(lambda: host.copy_(large), device), _best(lambda: large.copy_(host), device)
        link = large.nbytes / max(there, back)
    return Roofline(2 * SIZE**3 / product, 2 * large.nbytes / copy, link)


def _best(run: Callable[[], object], device: torch.device) -> float:
    def synced() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    best = float("inf")
    with torch.no_grad():
        for _ in range(ROUNDS):
            start = synced()
            run()
            best = min(best, synced() - start)
    return best


def _file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fxaccel" / "roofline.json"


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):  # not there, or not whole: measured anew
        return {}
    sound = isinstance(found, dict) and all(
        isinstance(v, dict)
        and set(v) == {"rate", "bandwidth", "link"}
        and all(isinstance(n, (int, float)) and n >= 0 for n in v.values())
        and v["rate"] > 0 < v["bandwidth"]
        for v in found.values()
    )
    return found if sound else {}


def _write(file: Path, known: Mapping[str, dict[str, float]]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as made:
            json.dump(known, made, indent=1)
        os.replace(made.name, file)  # whole or not at all
    except OSError:  # no such folder for this user
        return
