"""How many queries and keys a block of attention's kernels takes, by kernel, head size, features and GPU.

    choose("forward", torch.bfloat16, 128, ("causal",), device)      Config(m=128, n=64, warps=8, stages=3)

The tables hold blocks without register spills, which tests/kernels/test_compilation.py states. What
`_flash_tune.tune` has found faster on this GPU stands in a file of the user's cache and goes before them.
"""

import json
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fxaccel.kernels._triton import triton


class Config(NamedTuple):
    """Queries and keys a block, and how a program runs."""

    m: int
    n: int
    warps: int
    stages: int


Row = tuple[Config, Config, Config]
"""Blocks for heads of up to 64, 128 and 256."""

BUSY = frozenset({"rest", "bias", "softcap", "dropout"})  # these need registers of their own
HOPPER: dict[str, Row] = {
    "forward": (Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(64, 32, 8, 2)),
    "forward, window": (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 32, 8, 2)),
    "forward, busy": (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 2)),
    "keys": (Config(32, 128, 8, 2), Config(32, 64, 8, 1), Config(32, 32, 8, 1)),
    "keys, window": (Config(32, 128, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 8, 1)),
    "keys, busy": (Config(32, 64, 8, 1), Config(64, 32, 8, 1), Config(16, 32, 8, 1)),
    "queries": (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 4, 1)),
    "queries, busy": (Config(64, 32, 4, 1), Config(64, 32, 8, 2), Config(32, 32, 8, 1)),
    "bias": (Config(64, 32, 8, 1), Config(32, 16, 4, 1), Config(16, 32, 4, 1)),
    "relative": (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1)),
}
AMPERE = HOPPER | {
    "forward": (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 2)),
    "forward, window": (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 2)),
    "forward, busy": (Config(128, 64, 8, 3), Config(64, 32, 8, 2), Config(64, 32, 8, 1)),
    "keys": (Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(32, 32, 8, 1)),
    "keys, window": (Config(32, 64, 8, 1), Config(32, 32, 8, 2), Config(32, 32, 8, 1)),
}
AMD: dict[str, Row] = {
    "forward": (Config(128, 64, 4, 1), Config(128, 32, 4, 1), Config(64, 32, 4, 1)),
    "keys": (Config(32, 64, 4, 1), Config(32, 64, 4, 1), Config(16, 32, 4, 1)),
    "queries": (Config(64, 64, 4, 1), Config(64, 32, 4, 1), Config(32, 32, 4, 1)),
    "bias": (Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    "relative": (Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
}
TABLES = {"hopper": HOPPER, "ampere": AMPERE, "amd": AMD}
# fp32 products are three TF32 ones on NVIDIA: the tiles, split in two, spill registers above D = 64
FLOAT32: dict[str, Row] = {
    "forward": (Config(32, 32, 4, 1), Config(16, 16, 4, 1), Config(16, 16, 8, 1)),
    "keys": (Config(32, 16, 4, 1), Config(16, 16, 4, 1), Config(16, 16, 8, 1)),
    "queries": (Config(32, 32, 8, 1), Config(16, 16, 4, 1), Config(16, 16, 8, 1)),
    "bias": (Config(32, 16, 4, 1), Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
    "relative": (Config(16, 16, 4, 1), Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
}


@lru_cache
def chip(device: torch.device) -> str:
    """The table of this device; the interpreter, on the CPU, takes the first."""
    if torch.version.hip:
        return "amd"
    newer = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    return "hopper" if newer else "ampere"


@lru_cache
def name(device: torch.device) -> str:
    """What the file of tuned blocks calls this device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def bucket(width: int) -> int:
    """0, 1 or 2 for heads of up to 64, 128 and 256."""
    return (width > 64) + (width > 128)


def key(kernel: str, dtype: torch.dtype, width: int, features: tuple[str, ...], device: torch.device) -> str:
    """The line of the file of tuned blocks that is about this."""
    kind = str(dtype).removeprefix("torch.")
    size = (64, 128, 256)[bucket(width)]
    return f"{name(device)} | triton {triton.__version__} | {kernel} | {kind} | {size} | {'+'.join(features)}"


def choose(
    kernel: str, dtype: torch.dtype, width: int, features: tuple[str, ...], device: torch.device
) -> Config:
    """The blocks of "forward", "keys", "queries", "bias" or "relative"; `width` is the wider of D and E."""
    known = tuned()
    if known:
        found = known.get(key(kernel, dtype, width, features, device))
        if found is not None:
            return found
    return default(kernel, dtype.itemsize, width, features, chip(device))


def default(kernel: str, itemsize: int, width: int, features: tuple[str, ...], chip: str) -> Config:
    """The blocks of the tables."""
    table = FLOAT32 if itemsize == 4 else TABLES[chip]
    kind = "busy" if not BUSY.isdisjoint(features) else "window" if "window" in features else ""
    return table.get(f"{kernel}, {kind}", table[kernel])[bucket(width)]


def path() -> Path:
    """The file of tuned blocks."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "fxaccel" / "attention.json"


def tuned() -> dict[str, Config]:
    """What the file holds: read once for each state that it has been in."""
    try:
        file = path()
        state = file.stat()
    except (OSError, RuntimeError):  # no file, or no home to look in
        return {}
    return _read(str(file), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _read(file: str, _time: int, _size: int) -> dict[str, Config]:
    try:
        held = json.loads(Path(file).read_text())
        return {str(line): _checked(blocks) for line, blocks in held.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{file} is not a file of tuned blocks and is not used: {error}", stacklevel=4)
        return {}


def _checked(blocks: Any) -> Config:
    config = Config(*map(int, blocks))
    powers = all(16 <= x <= 256 and x & (x - 1) == 0 for x in config[:2])
    if not (powers and config.warps in (1, 2, 4, 8, 16) and 1 <= config.stages <= 8):
        raise ValueError(f"{blocks} are no blocks")
    return config
