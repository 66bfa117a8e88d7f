"""out = attention(q, k, v, bias, causal, scale) = softmax(scale * q @ k^T + bias) @ v.

Shapes     q: [B, H, S, D]; k: [B, G, T, D]; v: [B, G, T, E]; H a multiple of G, and query head h reads head
           h // (H // G). bias: None, or broadcasts to [B, H, S, T]: added if float, True = attend if bool.
           `causal` is aligned at the top left: query s sees keys 0 .. s. Returns out: [B, H, S, E], stored
           as [B, S, H, E], so that joining the heads copies nothing.
Numerics   softmax in fp32 (fp64 for fp64), one rounding at the end. A row that sees no key (all False or
           all -inf) is 0 and has gradient 0; a row of finfo.min is the mean of v, as written.
Cost       2 * B * H * S * T * (D + E) flop forward, 2 * B * H * S * T * (3 * D + 2 * E) backward; no tensor
           of size S * T, except on the CPU for the gradient of a bias.
Limits     D, E <= MAX_D. float64 on a GPU runs `reference`. No dropout. No second derivative: it raises.
Source     Vaswani et al. 2017, arXiv:1706.03762; Dao 2023, arXiv:2307.08691; Ainslie et al. 2023,
           arXiv:2305.13245.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxaccel.kernels import _flash, _operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_D = 256

aten = torch.ops.aten


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """The meaning of this op: what every test compares with."""
    f = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).to(f) for x in (k, v))
    s = q.to(f) @ k.mT * scale
    if bias is not None:
        s = s.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else s + bias.to(f)
    if causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    p = s.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return _joined((p @ v).to(q.dtype))


def _joined(out: Tensor) -> Tensor:
    """[B, H, S, E] stored as [B, S, H, E], copied only if it is not."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    if q.dtype not in DTYPES:
        yield f"dtype {q.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if not q.dtype == k.dtype == v.dtype:
        yield f"dtypes differ: q is {q.dtype}, k {k.dtype}, v {v.dtype}"
    if not q.ndim == k.ndim == v.ndim == 4:
        yield f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} dimensions; the kernel takes 4 each"
        return
    yield from _unsupported_sizes(q, k, v)
    if bias is not None:
        yield from _unsupported_bias(q, k, bias)


def _unsupported_sizes(q: Tensor, k: Tensor, v: Tensor) -> Iterator[str]:
    differ = _operator.differ
    if differ(q.shape[3], k.shape[3]):
        yield f"q is {list(q.shape)} and k {list(k.shape)}: D differs"
    if differ(q.shape[0], k.shape[0]):
        yield f"q is {list(q.shape)} and k {list(k.shape)}: B differs"
    if any(map(differ, k.shape[:3], v.shape[:3])):
        yield f"k is {list(k.shape)} and v {list(v.shape)}: B, heads or T differ"
    for name, size in (("D", q.shape[3]), ("E", v.shape[3])):
        if not isinstance(size, int):
            yield f"{name} = {size} is not a number, and so not known to be at most {MAX_D}"
        elif not 0 < size <= MAX_D:
            yield f"{name} = {size} is not within 1 .. {MAX_D}"
    yield from _unsupported_heads(q.shape[1], k.shape[1])


def _unsupported_heads(h: int | torch.SymInt, g: int | torch.SymInt) -> Iterator[str]:
    if isinstance(h, int) and isinstance(g, int):
        if not g or h % g:
            yield f"{h} query heads are not a multiple of {g} key heads"
    elif str(h) != str(g):
        yield f"{h} query heads are not known to be a multiple of {g} key heads"


def _unsupported_bias(q: Tensor, k: Tensor, bias: Tensor) -> Iterator[str]:
    if bias.dtype not in (torch.bool, torch.float32, q.dtype):
        yield f"the bias is {bias.dtype}; the kernel takes bool, float32 or {q.dtype}"
    scores = (*q.shape[:3], k.shape[2])
    pairs = zip(reversed(bias.shape), reversed(scores), strict=False)
    known = all(not _operator.differ(a, b) or (isinstance(a, int) and a == 1) for a, b in pairs)
    if bias.ndim > 4 or not known:
        yield f"the bias, {list(bias.shape)}, does not broadcast to {list(scores)}"


def _mask(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """The bias as PyTorch's CPU kernel takes it: of 2 or 4 dimensions, added."""
    if bias is None:
        return None
    if bias.dtype == torch.bool:
        bias = q.new_zeros(bias.shape).masked_fill_(~bias, -torch.inf)
    return bias[(None,) * (4 - bias.ndim)]


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """q and scale with scale > 0, and the factor taken into q.

    PyTorch's CPU kernel scales after it masks: -inf times 0 or a negative number lets masked keys in.
    """
    if scale > 0:
        return q, scale, 1.0
    return (-q, -scale, -1.0) if scale else (torch.zeros_like(q), 1.0, 0.0)


def _fitted(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """q, k, v of one head size and unit last stride, which the CPU kernel assumes and does not check."""
    width = max(q.shape[3], v.shape[3])
    padded = (x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
    return tuple(x if x.stride(3) == 1 else x.contiguous() for x in padded)


def compose(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """The CPU kernel."""
    return _compose_save(q, k, v, bias, causal, scale)[0]


def _compose_save(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out and lse, to the base e."""
    if not (q.numel() and k.numel() and v.numel()):  # PyTorch's kernel divides by a size of 0
        (b, h, s, _), e = q.shape, v.shape[3]
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_zeros(b, s, h, e).transpose(1, 2), q.new_full((b, h, s), torch.inf, dtype=kind)
    e = v.shape[3]
    q, scale, _ = _positive(q, scale)
    q, k, v = _fitted(q, k, v)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=_mask(bias, q), scale=scale
    )
    return _joined(out[..., :e]), lse.contiguous()


def _compose_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    bias_grad: bool,
) -> tuple[Any, ...]:
    """dq, dk, dv, and dbias in lse's dtype."""
    if not (q.numel() and k.numel() and v.numel()):
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        return *grads, lse.new_zeros(bias.shape if bias_grad else (0,))
    d, e = q.shape[3], v.shape[3]
    dbias = lse.new_empty(0)
    if bias_grad:
        dbias = _bias_gradient(dout, q, k, v, bias, out, lse, causal, scale)
    q, scale, factor = _positive(q, scale)
    q, k, v = _fitted(q, k, v)
    dout, out, _ = _fitted(dout, out, v)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=_mask(bias, q), scale=scale
    )
    if factor != 1.0:
        dq = dq * factor
    return *(x[..., :w].contiguous() for x, w in ((dq, d), (dk, d), (dv, e))), dbias


def _bias_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> Tensor:
    """dS, summed over what the bias broadcasts over."""
    f = lse.dtype
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).to(f) for x in (k, v))
    s = (q.to(f) @ k.mT).mul_(scale).add_(bias)
    if causal:
        s.masked_fill_(torch.ones_like(s, dtype=torch.bool).triu_(1), -torch.inf)
    p = s.sub_(lse.unsqueeze(-1)).exp_()
    p.masked_fill_(p.isnan(), 0.0)  # a row that sees no key, where PyTorch's lse of it is -inf
    dout = dout.to(f)
    delta = (dout * out).sum(-1, keepdim=True)
    return p.mul_((dout @ v.mT).sub_(delta)).sum_to_size(bias.shape)


def launch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Run the Triton kernel. No checks: the caller has asked `unsupported`."""
    return _flash.launch_forward(q, k, v, bias, causal, scale)[0]


def _save_cuda(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Any, ...]:
    return _flash.launch_forward(q, k, v, bias, causal, scale, save=True)


def _backward_cuda(*args: Any) -> tuple[Any, ...]:
    *grads, dbias = _flash.launch_backward(*args)
    return *grads, args[6].new_empty(0) if dbias is None else dbias


def _fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    b, h, s, _ = q.shape
    return q.new_empty(b, s, h, v.shape[3]).transpose(1, 2)


def _save_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _fake(q, k, v, bias, causal, scale), q.new_empty(q.shape[:3], dtype=kind)


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    bias_grad: bool,
) -> tuple[Any, ...]:
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return *grads, lse.new_empty(bias.shape if bias_grad else (0,))


def _double_or(launch_kernel):
    """The GPU's kernel: `launch_kernel`, and `reference` for float64, which Triton's kernel leaves out."""

    def kernel(q: Tensor, *args: Any) -> Tensor:
        return (reference if q.dtype == torch.float64 else launch_kernel)(q, *args)

    return kernel


op = _operator.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, bool causal, float scale) -> Tensor",
    cpu=compose,
    cuda=_double_or(launch),
    fake=_fake,
)
save_op = _operator.define(
    "attention_save(Tensor q, Tensor k, Tensor v, Tensor? bias, bool causal, float scale)"
    " -> (Tensor out, Tensor lse)",
    cpu=_compose_save,
    cuda=_save_cuda,
    fake=_save_fake,
)
backward_op = _operator.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse,"
    " bool causal, float scale, bool bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    cpu=_compose_backward,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


class Attention(torch.autograd.Function):
    """The derivative, from lse: no probabilities are stored."""

    @staticmethod
    def forward(ctx, q, k, v, bias, causal, scale):
        """Run attention and keep what its gradient reads."""
        out, lse = save_op(q, k, v, bias, causal, scale)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @_operator.once_differentiable
    def backward(ctx, dout):
        """Gradients of q, k, v and bias."""
        q, k, v, bias, out, lse = ctx.saved_tensors
        bias_grad = ctx.needs_input_grad[3]
        dq, dk, dv, dbias = backward_op(dout, q, k, v, bias, out, lse, ctx.causal, ctx.scale, bias_grad)
        return dq, dk, dv, dbias.to(bias.dtype) if bias_grad else None, None, None


def _derivative(q: Tensor, *args: Any) -> Tensor:
    double = q.dtype == torch.float64 and q.device.type == "cuda"
    return reference(q, *args) if double else Attention.apply(q, *args)


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


def direct(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """The op on CPU tensors, past the dispatcher where torch's own operator means the same."""
    if scale <= 0 or (bias is not None and bias.dtype not in (torch.bool, q.dtype)):
        return op(q, k, v, bias, causal, scale)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, bias, 0.0, causal, scale=scale, enable_gqa=grouped)
