"""Our own operators, one a file: `import fxaccel.kernels.rms_norm` registers `fxaccel::rms_norm`.

Every operator file holds, top to bottom: what it computes, `reference` (the meaning, in plain torch),
`unsupported` (why the kernel cannot take given arguments), the kernels, and the registration. Files that
start with an underscore are helpers. The operators work without triton, on the CPU.
"""

import importlib
from types import ModuleType


def kernel(name: str) -> ModuleType:
    """The module of an operator, imported where it is needed: Triton takes its time to read kernels."""
    return importlib.import_module(f"fxaccel.kernels.{name}")
