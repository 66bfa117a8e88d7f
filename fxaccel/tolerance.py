"""How far apart two results may be: from rounding alone, and not from another formula.

The yardstick is the original in float64, and once more with every operator off by 2**-30 (`Unsteady`).
fxaccel.proof says what is allowed and why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxaccel.evaluate import UNSTEADY, widen

_SHRINK = 2.0**-12  # errors are made at 2**-30, to be seen clearly, and scaled down to 2**-42
LOST = 2.0**2  # two bits
DRAWS = 8  # of random errors, where the first says that a result is too far away


def share_of_tolerance(
    ref: Tensor, old: Tensor, new: Tensor, moved: Sequence[Tensor] = (), own: Sequence[Tensor] = (),
    *, exact: bool = False,
) -> float:  # fmt: skip
    """Distance of `new` from `ref` as a share of what rounding allows.

    ref     the original in float64; old, new: the original and the replacement in their own dtype
    moved   the original in float64 under Unsteady, each time that it was run;  own: the same in its own dtype
    """
    if exact or not (new.dtype.is_floating_point or new.dtype.is_complex):
        return 0.0 if torch.equal(_nan_free(old), _nan_free(new)) else math.inf
    if (torch.isfinite(ref) & torch.isfinite(old) & ~torch.isfinite(new)).any():
        return math.inf
    eps = torch.finfo(new.dtype).eps
    largest = (
        float(torch.nan_to_num(ref.detach(), posinf=0.0, neginf=0.0).abs().max()) if ref.numel() else 0.0
    )
    condition = max((distance(ref, m) for m in moved), default=0.0) / UNSTEADY
    errors = eps * condition
    if new.dtype is not torch.float64:  # whose own steps would be those of `moved`
        errors = max(errors, *(distance(ref, o) for o in own), 0.0)
    seen = distance(ref, old) or errors  # 0: the original is in float64, and its error cannot be seen
    allowed = LOST * (seen + errors) + 2 * eps * largest
    found = distance(ref, new)
    return found / allowed if allowed else (0.0 if found == 0 else math.inf)


def distance(ref: Tensor, value: Tensor) -> float:
    """Largest absolute difference where both are finite; 0 for empty tensors."""
    if not ref.numel():
        return 0.0
    difference = (widen(value) - ref).detach().abs()
    return float(torch.nan_to_num(difference, nan=0.0, posinf=0.0).max())


def algebra_differs(reference: Any, algebra: Any, moved: Any) -> str:
    """The first output or gradient that is another formula's, all in float64; "" if there is none."""
    for kind, refs, news, others in zip(("output", "gradient"), reference, algebra, moved, strict=True):
        if len(refs) != len(news):
            return f"the original has {len(refs)} {kind}s and the replacement {len(news)}"
        for i, (ref, new, other) in enumerate(zip(refs, news, others, strict=True)):
            if (ref is None) != (new is None):
                return f"{kind} {i} is {'missing' if new is None else 'new'} in the replacement"
            if not isinstance(ref, Tensor) or not isinstance(new, Tensor):
                if ref != new:
                    return f"{kind} {i} is {new} where the original has {ref}"
                continue
            if ref.shape != new.shape:
                return f"{kind} {i} has shape {list(new.shape)} where the original has {list(ref.shape)}"
            if not torch.equal(torch.isfinite(ref), torch.isfinite(new)):
                return f"{kind} {i} is not finite in other places than the original"
            scale = float(torch.nan_to_num(ref.detach()).abs().max()) if ref.numel() else 0.0
            allowed = _SHRINK * distance(ref, other) + 64 * torch.finfo(torch.float64).eps * scale
            found = distance(ref, new)
            if found > allowed:
                return (
                    f"{kind} {i} differs by {found:.3g} in float64 on values up to {scale:.3g} "
                    f"(tolerance {allowed:.3g})"
                )
    return ""


def same_kind(old: Any, new: Any) -> str:
    """How two results differ in kind, dtype, device or shape; "" if they do not."""
    if (old is None) != (new is None):
        return "is missing in one of the two"
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        if old.dtype != new.dtype or old.device != new.device:
            return f"is {new.dtype} on {new.device}, the original {old.dtype} on {old.device}"
        if old.shape != new.shape:
            return f"has shape {list(new.shape)}, the original {list(old.shape)}"
    elif type(old) is not type(new):
        return f"is a {type(new).__name__}, the original a {type(old).__name__}"
    return ""


def _nan_free(value: Tensor) -> Tensor:
    return torch.nan_to_num(value) if value.dtype.is_floating_point else value
