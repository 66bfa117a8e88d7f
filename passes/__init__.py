"""The rewrites that come with fxaccel, one a file; every module here is found and loaded by name.

`fxaccel.passes.FuseNorm` and its like are looked up in those modules on first use.
"""

import importlib
import pkgutil
from typing import Any


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for module in pkgutil.iter_modules(__path__):
            found = getattr(importlib.import_module(f"{__name__}.{module.name}"), name, None)
            if found is not None and getattr(found, "__module__", "") == f"{__name__}.{module.name}":
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
