"""Structured matrices: what a dense weight can be replaced by, with the projections onto each kind.

One interface, `StructuredMatrix`; a member holds sizes, its factors are plain tuples of tensors.
"""

from fxaccel.passes._linear_form import EAGER
from fxaccel.passes.structured._base import StructuredMatrix
from fxaccel.passes.structured.block_low_rank import BlockLowRank
from fxaccel.passes.structured.butterfly import Butterfly
from fxaccel.passes.structured.low_rank import LowRank
from fxaccel.passes.structured.monarch import Monarch

KINDS: dict[str, type[StructuredMatrix]] = {
    kind.name: kind for kind in (LowRank, Monarch, Butterfly, BlockLowRank)
}

__all__ = ["EAGER", "KINDS", "BlockLowRank", "Butterfly", "LowRank", "Monarch", "StructuredMatrix"]
