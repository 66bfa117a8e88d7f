"""What passes say in the same words of sites that they leave, and what would let them be taken."""

from collections.abc import Sequence
from typing import Any

import torch

from fxaccel.rule import Refusal

EVEN_IF_SLOWER = "even_if_slower=true"  # an option of several passes
LAST = "a norm over the last dimension alone"
NO_GRAD = "a call within torch.no_grad()"
ONE_DTYPE = "one dtype for all of them"
OWN = "a weight of its own"
STANDING = "a parameter or buffer in its place that no call writes to"


def autocast(made: torch.dtype, done: str) -> Refusal:
    """That a result is rounded though what it is made of is not; `done`: what is made of it."""
    return Refusal(
        f"the result is {made}: autocast rounds what is {done}", "the call outside of torch.autocast"
    )


def not_last(dims: Sequence[Any], size: Any) -> Refusal:
    """That a norm is over other dimensions than the last, of this size."""
    return Refusal(f"it normalises over {list(dims)}; the kernel takes the last dimension, {size}", LAST)
