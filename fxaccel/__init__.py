"""fxaccel: verified rewrites of PyTorch models on FX graphs.

    fast = fxaccel.accelerate(model)

See README.md for the tutorial, `fxaccel.rule` for how a pass is written.
"""

from fxaccel.artifact import load
from fxaccel.bisect import bisect
from fxaccel.errors import (
    ArtifactError,
    CaptureError,
    FxaccelError,
    OptionError,
    ProofError,
    RuleError,
    StageError,
)  # fmt: skip
from fxaccel.module import AcceleratedModule, accelerate
from fxaccel.quality import Budget
from fxaccel.rule import Pass, Rule, Rules, register

__all__ = [
    "AcceleratedModule", "ArtifactError", "Budget", "CaptureError", "FxaccelError", "OptionError", "Pass",
    "ProofError", "Rule", "RuleError", "Rules", "StageError", "accelerate", "bisect", "load", "register",
]  # fmt: skip
__version__ = "0.1.0"
