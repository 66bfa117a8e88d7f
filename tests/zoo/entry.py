"""What the zoo's tables are made of: a named recipe for one model and for its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Entry:
    """One architecture: `build()` gives the same weights every time, `inputs()` its kwargs."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
