"""Attention by torch's scaled_dot_product_attention, for calls that need no large mask there."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxaccel.kernels import _attention_rows, _score

CAUSAL = "k <= q"
SMALL = 256 * 256  # scores a head, up to which the CPU gains nothing by skipping blocks


class Call(NamedTuple):
    """The arguments of fxaccel::attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: Sequence[Tensor]
    mask: str
    bias: str
    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None
    dropout: float = 0.0
    empty: str = "zero"


def fits(*args: Any, **kwargs: Any) -> bool:
    """Whether it means the same as a Call of these arguments, and needs no mask larger than q, k and v."""
    c = Call(*args, **kwargs)
    s, t = c.q.shape[2], c.k.shape[2]
    settled = _attention_rows.settled(c.empty, c.sinks, c.mask, c.bias, s, t)
    if c.softcap or c.sinks is not None or c.q.dtype == torch.float64 or not settled:
        return False
    if not c.bias and c.mask in ("", CAUSAL):
        return True
    used = _score.names(c.mask) | _score.names(c.bias)
    sizes = zip(_score.INDICES, (*c.q.shape[:3], t), strict=True)
    elements = math.prod(size for name, size in sizes if name in used)
    return elements <= c.q.numel() + c.k.numel() + c.v.numel()


def attention(*args: Any) -> Tensor:
    """fxaccel::attention of a Call that `fits`."""
    c = Call(*args)
    causal = c.mask == CAUSAL and not c.bias
    given, none = (None, None) if causal else _mask(c.q, c.k, c.tables, c.mask, c.bias)
    grouped = c.q.shape[1] != c.k.shape[1]
    out = F.scaled_dot_product_attention(
        c.q, c.k, c.v, given, c.dropout, causal, scale=c.scale, enable_gqa=grouped
    )
    return out if none is None else out.masked_fill(none, 0.0)


def worth(given: dict[str, Any]) -> bool:
    """Whether a call on the CPU may use what `small` makes."""
    plain = not (given["softcap"] or given["dropout"] or given["sinks"] is not None)
    return plain and given["scale"] > 0 and (given["bias"] != "" or given["mask"] not in ("", CAUSAL))


def small(q: Tensor, k: Tensor, tables: Sequence[Tensor], mask: str, bias: str) -> Tensor | None:
    """The mask for torch's attention; None above SMALL scores a head, and where a row keeps no key."""
    if q.shape[2] * k.shape[2] > SMALL:
        return None
    made, none = _mask(q, k, tables, mask, bias)
    return made if none is None or not none.any() else None


def _mask(
    q: Tensor, k: Tensor, tables: Sequence[Tensor], mask: str, bias: str
) -> tuple[Tensor | None, Tensor | None]:
    """The mask, and the rows that keep no key: they keep all here, for back ends differ in what they give."""
    sizes: tuple[Any, ...] = (*q.shape[:3], k.shape[2])
    keep = _score.evaluate(mask, tables, *sizes, device=q.device) if mask else None
    if not bias:
        if keep is None or _score.keeps_every_row(mask, q.shape[2], k.shape[2]):
            return keep, None
        none = ~keep.any(-1, keepdim=True)
        return keep | none, none
    wide = torch.promote_types(q.dtype, torch.float32)
    added = _score.evaluate(bias, tables, *sizes, dtype=wide, device=q.device).to(q.dtype)
    if keep is not None:
        added = torch.where(keep, added, -torch.inf)
    none = (added == -torch.inf).all(-1, keepdim=True)
    return added.masked_fill(none, 0.0), none
