"""What attention's rows that keep no key give, beyond the 0 that the kernels leave there.

Such a row is one of lse +inf. "mean" and "fill" weigh all keys alike, by 1 / T, and differ in whether
gradients reach the scores. In closed form as far as that goes: with dropout, or where the gradients of
"mean" pass a softcap or go to tables, the kernels run once more over these rows alone, and skip the blocks
that have none.

Cost       O((S + T) * D * E) in closed form; else what the kernels take for the blocks with such rows.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxaccel.kernels import _score

NANS = ("nan", "nan_fill")
ROWS = f"{_score.OWN}[b, h, q]"


class Call(NamedTuple):
    """What an attention was asked for, without sinks, and the kernels that do it."""

    kernels: ModuleType
    q: Tensor
    k: Tensor
    v: Tensor
    tables: Sequence[Tensor]
    bias: str
    scale: float
    softcap: float
    dropout: float
    seed: Tensor
    empty: str


def settled(empty: str, sinks: Tensor | None, mask: str, bias: str, s: int, t: int) -> bool:
    """Whether rows that keep no key are as the kernels leave them: it is "zero", or there are none."""
    if empty == "zero" or sinks is not None or not s or not t:
        return True
    return not bias and _score.keeps_every_row(mask, s, t)


def settle(call: Call, out: Tensor, lse: Tensor) -> Tensor:
    """out with its rows that keep no key."""
    none = lse == torch.inf
    if out.device.type == "cpu" and not none.any():
        return out
    if call.empty in NANS:
        return out.masked_fill_(none.unsqueeze(-1), torch.nan)
    if call.dropout:
        q, k, v, *_ = call[1:]
        mean, _ = call.kernels.launch_forward(
            q, k, v, _with(none, call.tables), ROWS, "", 1.0, 0.0, None, call.dropout, call.seed, flat=True
        )
    else:
        mean = _heads(call.v.to(lse.dtype).mean(2, keepdim=True).to(out.dtype), out)
    return out.copy_(torch.where(none.unsqueeze(-1), mean, out))


def settle_gradients(
    call: Call, grads: tuple[Any, ...], dout: Tensor, out: Tensor, lse: Tensor, wanted: Sequence[bool]
) -> tuple[Any, ...]:
    """dq, dk, dv, dsinks and dtables with what rows that keep no key add to them."""
    none = lse == torch.inf
    if dout.device.type == "cpu" and not none.any():
        return grads
    if call.empty in NANS:
        return _nan_gradients(call, grads, none)
    through = call.empty == "mean" and (call.softcap or any(wanted))
    if call.dropout or through:
        return _flat_gradients(call, grads, dout, out, none, wanted)
    return _closed_gradients(call, grads, dout, out, none)


def _heads(x: Tensor, like: Tensor) -> Tensor:
    """[B, G, ...] as [B, H, ...]: each key head for the query heads that read it."""
    return x.repeat_interleave(like.shape[1] // x.shape[1], 1)


def _with(none: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """The tables, and `none` where ROWS reads it; it fills the places between."""
    return [*tables, *[none] * (len(_score.TABLES) - len(tables))]


def _flat_gradients(
    call: Call, grads: tuple[Any, ...], dout: Tensor, out: Tensor, none: Tensor, wanted: Sequence[bool]
) -> tuple[Any, ...]:
    """By the kernels, over these rows alone, with scores of 0 for the weights: P = exp(0 - log T)."""
    dq, dk, dv, dsinks, dtables = grads
    _, q, k, v, tables, bias, scale, softcap, dropout, seed, empty = call
    f = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full(none.shape, torch.inf, dtype=f, device=none.device)
    lse.masked_fill_(none, call.kernels.log(k.shape[2]))
    fill = empty == "fill"
    asked = [w and not fill for w in wanted] + [False] * (len(_score.TABLES) + 1 - len(wanted))
    more = call.kernels.launch_backward(
        dout, q, k, v, _with(none, tables), ROWS, bias, out, lse, scale, 0.0 if fill else softcap, None,
        dropout, seed, asked, flat=True,
    )  # fmt: skip
    dv = dv + more[2]
    if not fill:
        dq, dk = dq + more[0], dk + more[1]
        pairs = zip(dtables, more[4], strict=False)
        dtables = [x if x is None or y is None else x + y for x, y in pairs]
    return dq, dk, dv, dsinks, dtables


def _closed_gradients(
    call: Call, grads: tuple[Any, ...], dout: Tensor, out: Tensor, none: Tensor
) -> tuple[Any, ...]:
    dq, dk, dv, dsinks, dtables = grads
    q, k, v, scale = call.q, call.k, call.v, call.scale
    f = torch.float64 if q.dtype == torch.float64 else torch.float32
    n, t = q.shape[1] // k.shape[1], k.shape[2]
    rows = torch.where(none.unsqueeze(-1), dout.to(f), 0.0)
    group = lambda x: x.unflatten(1, (-1, n)).sum(2)  # noqa: E731
    dv = (dv + group(rows.sum(2, keepdim=True)) / t).to(v.dtype)
    if call.empty == "fill":
        return dq, dk, dv, dsinks, dtables
    k, v = k.to(f), v.to(f)
    delta = (rows * out).sum(-1, keepdim=True)
    products = rows @ _heads(v.mT @ k, q) - delta * _heads(k.sum(2, keepdim=True), q)
    dq = (dq + products * (scale / t)).to(q.dtype)
    moments = v @ group(rows.mT @ q.to(f)) - group((delta * q).sum(2, keepdim=True))
    dk = (dk + moments * (scale / t)).to(q.dtype)
    return dq, dk, dv, dsinks, dtables


def _nan_gradients(call: Call, grads: tuple[Any, ...], none: Tensor) -> tuple[Any, ...]:
    dq, dk, dv, dsinks, dtables = grads
    group = none.any(2).unflatten(1, (dk.shape[1], -1)).any(2)[..., None, None]
    dv = dv.masked_fill(group, torch.nan)
    if call.empty == "nan":
        _spread_nan(none, dtables, call.bias, dk.shape[2])
        dq, dk = dq.masked_fill(none.unsqueeze(-1), torch.nan), dk.masked_fill(group, torch.nan)
    return dq, dk, dv, dsinks, dtables


def _spread_nan(none: Tensor, dtables: Sequence[Tensor | None], bias: str, t: int) -> None:
    """NaN at the entries that a row without keys reads, for whichever key."""
    for number, dtable in enumerate(dtables):
        if dtable is not None:
            for form in _score.gradient_forms(bias, number):
                hit = _hit(none, form, t)
                read = tuple(slice(t if x == "k" else n) for x, n in zip(form, hit.shape, strict=True))
                dtable[read].masked_fill_(hit, torch.nan)  # a table may be larger than what is read


def _hit(none: Tensor, form: tuple[str, ...], t: int) -> Tensor:
    """Whether a row of `none` reads an entry of a table of that form; broadcasts to the table."""
    names, s = ["b", "h", "q"], none.shape[2]
    if "relative" in form:
        before = F.pad(none.int().cumsum(2), (1, 0))  # of the rows up to each
        first = s - 1 - torch.arange(s + t - 1, device=none.device)  # the row that reads it for key 0
        names[2], none = "relative", before[..., (first + t).clamp(0, s)] > before[..., first.clamp(0, s)]
    over = [i for i, name in enumerate(names) if name not in form]
    none = none.sum(over) > 0 if over else none
    left = [name for name in names if name in form]
    none = none.permute([left.index(name) for name in form if name in left])
    return none[tuple(slice(None) if name in left else None for name in form)]
