"""out = attention(q, k, v, tables, mask, bias, scale, softcap, sinks, dropout, empty): softmax(scores) @ v.

    s = scale * q @ k^T;  s = softcap * tanh(s / softcap);  s = s + bias(b, h, q, k);  s = -inf where not mask
    p = softmax(s, -1), with sinks[h] as one more logit;  p = dropout(p);  out = p @ v

Shapes     q: [B, H, S, D]; k: [B, G, T, D]; v: [B, G, T, E]; H a multiple of G, and query head h reads head
           h // (H // G). sinks: [H]. Returns out: [B, H, S, E], stored as [B, S, H, E], so that joining the
           heads copies nothing.
Scores     mask and bias are texts over b, h, q, k, S, T and the tables t0 .. t3, or "": "k <= q", "t0[b, k]";
           _score has the language.
Numerics   softmax in fp32 (fp64 for fp64), one rounding at the end. dropout draws one int64 from the device's
           generator, and every weight follows from it: forward and backward drop the same ones.
Empty      a row that keeps no key gives 0 and no gradients ("zero"); NaN, as if -inf were added to all its
           scores ("nan") or put in their place ("nan_fill": NaN reaches v alone); or the mean of v, as if a
           huge negative number were added to all its scores ("mean") or put in their place ("fill"). With
           sinks it gives 0: the sink has all the weight.
Cost       2 * B * H * S * T * (D + E) flop forward, 2 * B * H * S * T * (3 * D + 2 * E) backward, less what
           the mask cuts off; no tensor of size S * T. Rows without keys, unless "zero": _attention_rows.
Limits     D, E <= MAX_D. Gradients of q, k, v, sinks, and of tables that the bias adds as they are, which
           _score.gradient_forms knows. float64 on a GPU runs `reference`. No second derivative: it raises.
Source     Vaswani et al. 2017, arXiv:1706.03762; Dao 2023, arXiv:2307.08691; Ainslie et al. 2023,
           arXiv:2305.13245; Dong et al. 2024, arXiv:2412.05496 (masks and scores as functions of indices).
"""

from collections.abc import Iterator, Sequence
from math import prod
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxaccel.kernels import _attention_cpu, _attention_rows, _attention_torch, _flash, _operator, _score
from fxaccel.kernels._fastest import Fastest

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_D, MAX_TABLES = 256, 4
EMPTY = ("zero", "nan", "nan_fill", "mean", "fill")

known = _operator.known


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    mask: str,
    bias: str,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    empty: str = "zero",
) -> Tensor:
    """The meaning of this op: what every test compares with."""
    f = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).to(f) for x in (k, v))
    sizes = (*q.shape[:3], k.shape[2])
    raw = s = q.to(f) @ k.mT * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    whole = s
    if bias:
        added = _score.evaluate(bias, tables, *sizes, dtype=f, device=q.device)
        s, whole = s + added, s + added.masked_fill(added == -torch.inf, 0.0)
    if mask:
        s = s.masked_fill(~_score.evaluate(mask, tables, *sizes, dtype=f, device=q.device), -torch.inf)
    none = (s == -torch.inf).all(-1, keepdim=True)
    if sinks is not None:
        s = torch.cat([s, sinks.to(f)[:, None, None].expand(*s.shape[:3], 1)], -1)
        p = s.softmax(-1)[..., :-1]
    elif empty == "nan":
        p = torch.where(none, raw - torch.inf, s).softmax(-1)
    elif empty == "nan_fill":
        p = s.softmax(-1)
    elif empty == "mean":
        p = torch.where(none, whole - whole.detach(), s).softmax(-1)
    else:
        p = s.masked_fill(none, 0.0).softmax(-1)
        p = p if empty == "fill" else p.masked_fill(none, 0.0)
    out = F.dropout(p, dropout) @ v
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor] = (),
    mask: str = "",
    bias: str = "",
    scale: float = 1.0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    empty: str = "zero",
) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and known sizes."""
    if q.dtype not in DTYPES:
        yield f"dtype {q.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if not q.dtype == k.dtype == v.dtype:
        yield f"dtypes differ: q is {q.dtype}, k {k.dtype}, v {v.dtype}"
    if not q.ndim == k.ndim == v.ndim == 4:
        yield f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} dimensions; the kernel takes 4 each"
        return
    yield from _unsupported_sizes(q, k, v)
    yield from _unsupported_tables(q, k, tables, mask, bias)
    if sinks is not None and (sinks.ndim != 1 or _operator.differ(sinks.shape[0], q.shape[1])):
        yield f"the sinks are {list(sinks.shape)}; the kernel takes one for each of {q.shape[1]} query heads"
    if sinks is not None and not sinks.is_floating_point():
        yield f"the sinks are {sinks.dtype}; the kernel takes floats"
    if not 0 <= dropout < 1:
        yield f"it drops weights with probability {dropout}, which is not within 0 .. 1"
    if empty not in EMPTY:
        yield f"empty is {empty!r}, none of {', '.join(EMPTY)}"


def _unsupported_sizes(q: Tensor, k: Tensor, v: Tensor) -> Iterator[str]:
    differ = _operator.differ
    if differ(q.shape[3], k.shape[3]):
        yield f"q is {list(q.shape)} and k {list(k.shape)}: D differs"
    if differ(q.shape[0], k.shape[0]):
        yield f"q is {list(q.shape)} and k {list(k.shape)}: B differs"
    if any(map(differ, k.shape[:3], v.shape[:3])):
        yield f"k is {list(k.shape)} and v {list(v.shape)}: B, heads or T differ"
    for name, size in (("D", q.shape[3]), ("E", v.shape[3])):
        number = known(size)
        if number is None:
            yield f"{name} = {size} is not a number, and so not known to be at most {MAX_D}"
        elif not 0 < number <= MAX_D:
            yield f"{name} = {number} is not within 1 .. {MAX_D}"
    h, g = known(q.shape[1]), known(k.shape[1])
    if h is not None and g is not None:
        if not g or h % g:
            yield f"{h} query heads are not a multiple of {g} key heads"
    elif str(q.shape[1]) != str(k.shape[1]):
        yield f"{q.shape[1]} query heads are not known to be a multiple of {k.shape[1]} key heads"


def _unsupported_tables(
    q: Tensor, k: Tensor, tables: Sequence[Tensor], mask: str, bias: str
) -> Iterator[str]:
    if len(tables) > MAX_TABLES:
        yield f"it reads {len(tables)} tables; the kernel takes up to {MAX_TABLES}"
    for i, table in enumerate(tables):
        if table.is_complex():
            yield f"t{i} is {table.dtype}; the kernel takes bool, integer or floating tables"
        if table.device != q.device:
            yield f"t{i} is on {table.device}, q on {q.device}"
    sizes = dict(zip(_score.INDICES, (*q.shape[:3], k.shape[2]), strict=True))
    for what, text, kinds in (("mask", mask, ("bool",)), ("bias", bias, ("int", "float"))):
        if text:
            reasons = list(_score.problems(what, text, tables, kinds))
            yield from reasons or _unsupported_reads(text, tables, sizes)


def _unsupported_reads(text: str, tables: Sequence[Tensor], sizes: dict[str, Any]) -> Iterator[str]:
    for name, dim, index in _score.plain_reads(text):
        size, bound = known(tables[_score.TABLES.index(name)].shape[dim]), known(sizes[index])
        if size is not None and bound is not None and size < bound:
            yield f"{name} has {size} entries in dimension {dim}, which {index} reads up to {bound}"


# the operators


def _kernels(q: Tensor) -> ModuleType:
    return _attention_cpu if q.device.type == "cpu" else _flash


def _seed(q: Tensor, dropout: float) -> Tensor:
    """One int64 from the generator of q's device; none is drawn without dropout."""
    seed = torch.empty(int(dropout > 0), dtype=torch.int64, device=q.device)
    return seed.random_() if dropout else seed


def _forward(
    save: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    mask: str,
    bias: str,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    empty: str = "zero",
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse (each device's own, +inf for rows that keep no key) and the seed."""
    seed = _seed(q, dropout)
    settled = _attention_rows.settled(empty, sinks, mask, bias, q.shape[2], k.shape[2])
    out, lse = _kernels(q).launch_forward(
        q, k, v, tables, mask, bias, scale, softcap, sinks, dropout, seed, save=save or not settled
    )
    if not settled:
        call = _attention_rows.Call(_kernels(q), q, k, v, tables, bias, scale, softcap, dropout, seed, empty)
        out = _attention_rows.settle(call, out, lse)
    return out, lse, seed


def _save(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(True, *args)


def compute(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    """Attention by the kernel of q's device. No checks: the caller has asked `unsupported`."""
    if q.dtype == torch.float64 and q.device.type == "cuda":
        return reference(q, k, v, *args)
    return _forward(False, q, k, v, *args)[0]


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    mask: str,
    bias: str,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    dropout: float,
    empty: str,
    wanted: Sequence[bool],
) -> tuple[Any, ...]:
    """dq, dk, dv, dsinks, dtables: those that are not wanted are of no size."""
    settled = _attention_rows.settled(empty, sinks, mask, bias, q.shape[2], k.shape[2])
    kept = (
        out
        if settled or empty not in _attention_rows.NANS
        else out.masked_fill((lse == torch.inf).unsqueeze(-1), 0.0)
    )
    grads = _kernels(q).launch_backward(
        dout, q, k, v, tables, mask, bias, kept, lse, scale, softcap, sinks, dropout, seed, list(wanted)
    )
    if not settled:
        call = _attention_rows.Call(_kernels(q), q, k, v, tables, bias, scale, softcap, dropout, seed, empty)
        grads = _attention_rows.settle_gradients(call, grads, dout, kept, lse, wanted[:-1])
    dq, dk, dv, dsinks, dtables = grads
    given = zip((dsinks, *dtables), (sinks, *tables), strict=True)
    some = [
        q.new_empty(0) if x is None or like is None else x.to(like.dtype).contiguous() for x, like in given
    ]
    return dq, dk, dv, some[0], some[1:]


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    b, h, s, _ = q.shape
    return q.new_empty(b, s, h, v.shape[3]).transpose(1, 2)


def _save_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    dropout = args[6] if len(args) > 6 else 0.0
    seed = q.new_empty(int(dropout > 0), dtype=torch.int64)
    return _fake(q, k, v), q.new_empty(q.shape[:3], dtype=kind), seed


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, tables: Any, *args: Any) -> tuple[Any, ...]:
    sinks, wanted = args[7], args[10]
    given = zip((*tables, sinks), wanted, strict=True)
    some = [x.new_empty(x.shape) if w else q.new_empty(0) for x, w in given]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return *grads, some[-1], some[:-1]


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor[] tables, str mask, str bias, float scale, float softcap=0.0,"
    ' Tensor? sinks=None, float dropout=0.0, str empty="zero"'
)
op = _operator.define(
    f"attention({_ARGUMENTS}) -> Tensor", cpu=compute, cuda=compute, fake=_fake, random=True
)
save_op = _operator.define(
    f"attention_save({_ARGUMENTS}) -> (Tensor out, Tensor lse, Tensor seed)",
    cpu=_save,
    cuda=_save,
    fake=_save_fake,
    random=True,
)
backward_op = _operator.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor[] tables, str mask, str bias,"
    " Tensor out, Tensor lse, Tensor seed, float scale, float softcap, Tensor? sinks, float dropout,"
    " str empty, bool[] wanted) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor[] dtables)",
    cpu=_backward,
    cuda=_backward,
    fake=_backward_fake,
)


class Attention(torch.autograd.Function):
    """The derivative, from lse: no probabilities are stored."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, options, *tables):
        """Run attention and keep what its gradient reads."""
        mask, bias, scale, softcap, dropout, empty = ctx.options = options
        out, lse, seed = save_op(q, k, v, tables, mask, bias, scale, softcap, sinks, dropout, empty)
        ctx.save_for_backward(q, k, v, sinks, out, lse, seed, *tables)
        return out

    @staticmethod
    @_operator.once_differentiable
    def backward(ctx, dout):
        """Gradients of q, k, v, of the sinks, and of the tables that the bias adds."""
        q, k, v, sinks, out, lse, seed, *tables = ctx.saved_tensors
        mask, bias, scale, softcap, dropout, empty = ctx.options
        wanted = [*ctx.needs_input_grad[5:], ctx.needs_input_grad[3]]
        for number, needed in enumerate(wanted[:-1]):
            if needed:
                _score.gradient_forms(bias, number)  # raises where it has none
        dq, dk, dv, dsinks, dtables = backward_op(
            dout, q, k, v, tables, mask, bias, out, lse, seed, scale, softcap, sinks, dropout, empty, wanted
        )
        some = [x if needed else None for x, needed in zip((*dtables, dsinks), wanted, strict=True)]
        return dq, dk, dv, some[-1], None, *some[:-1]


def _derivative(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    mask: str,
    bias: str,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    dropout: float,
    empty: str,
) -> Tensor:
    if q.dtype == torch.float64 and q.device.type == "cuda":
        return reference(q, k, v, tables, mask, bias, scale, softcap, sinks, dropout, empty)
    return Attention.apply(q, k, v, sinks, (mask, bias, scale, softcap, dropout, empty), *tables)


def _flops(q, k, v, *args, **kwargs) -> int:
    return 2 * prod(q[:3]) * k[2] * (q[3] + v[3])


_operator.differentiate(op, _derivative)
_operator.autocast(op, "cpu", lambda: torch.get_autocast_dtype("cpu"))
_operator.autocast(op, "cuda", lambda: torch.get_autocast_dtype("cuda"))
_operator.count_flops(op, _flops)
_operator.count_flops(save_op, _flops)
_operator.count_flops(
    backward_op,
    lambda dout, q, k, v, *args, **kwargs: 2 * prod(q[:3]) * k[2] * (3 * q[3] + 2 * v[3]),
)


def direct(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    mask: str,
    bias: str,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    empty: str = "zero",
    shared: Tensor | None = None,
) -> Tensor:
    """The op on CPU tensors, past the dispatcher where torch's own operator means the same.

    shared   the mask of `_attention_torch.small` for this call
    """
    extras = bias or softcap or dropout or sinks is not None or (mask and mask != _attention_torch.CAUSAL)
    causal = mask != "" and shared is None
    if shared is not None:
        lost = q.dtype.itemsize < 4 and shared.dtype == torch.bool and torch.is_grad_enabled()
    else:
        lost = bool(extras) or scale <= 0 or (causal and q.shape[2] > _attention_cpu.TRIANGLE)
    if lost:
        return op(q, k, v, tables, mask, bias, scale, softcap, sinks, dropout, empty)
    grouped = q.shape[1] != k.shape[1]
    if grouped and not causal and q.shape[2] == 1:
        return _one_query(q, k, v, shared, scale)
    out = F.scaled_dot_product_attention(q, k, v, shared, 0.0, causal, scale=scale, enable_gqa=grouped)
    joined = out.transpose(1, 2)  # the heads; torch's kernels lie so, what it computes in parts does not
    return out if joined.is_contiguous() else joined.contiguous().transpose(1, 2)


def _one_query(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float) -> Tensor:
    """Several heads of one query to a key: several queries of one head, where torch would copy the key."""
    b, h, _, d = q.shape
    if added is not None and added.shape[1] != 1:
        added = added.expand(b, h, 1, k.shape[2]).reshape(b, k.shape[1], -1, k.shape[2])
    rows = q.reshape(b, k.shape[1], -1, d)
    out = F.scaled_dot_product_attention(rows, k, v, added, scale=scale)
    return out.reshape(b, 1, h, -1).transpose(1, 2)


shared = _operator.Shared(
    _attention_torch.small, ("q", "k"), ("tables", "mask", "bias"), _attention_torch.worth
)


def fastest() -> Fastest:
    """The op on a GPU, or torch's attention where that measures faster."""
    return Fastest(
        "attention", {"fxaccel": op, "SDPA": _attention_torch.attention}, {"SDPA": _attention_torch.fits}
    )
