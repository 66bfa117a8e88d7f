"""ys = rope(xs, cos, sin, pairs, shared, inverse): rotary position embedding; queries and keys in one launch.

    y1 = x1 * cos1 - x2 * sin1         where x1, x2 are the halves of x, or with `pairs` its even and odd
    y2 = x2 * cos2 + x1 * sin2         columns, and cos1, cos2 those of cos

Shapes     each x: [..., D], of 2 to 4 dimensions, and y as x, laid out as x is; cos, sin: [..., R]
           broadcast against the leading dimensions of each x. R columns of x are turned, 2 R where the
           two of a pair have one angle (`shared`); the others, the last, are copied. `inverse` turns with the
           transposed matrix, which is the derivative.
Numerics   computed in the wider dtype of x and cos, low precision on a GPU in fp32, and rounded to x.dtype
           once; on the CPU each operator rounds.
Cost       x is read once and y written once, cos and sin come from the cache. On the CPU three passes instead
           of the five of the model as written. Autograd keeps cos and sin alone.
Limits     on a GPU float64 runs the composition; where cos or sin wants a gradient the reference runs.
Source     Su et al. 2021, "RoFormer", arXiv:2104.09864; halves: Black et al. 2022, "GPT-NeoX-20B",
           arXiv:2204.06745, section 2.1.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels import _operator
from fxaccel.kernels._triton import next_power_of_2, tl, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALL = 16_384  # elements of x below which on the CPU a call costs more than a pass over the data
TILE = 1_024  # pairs that one program turns


def _parts(x: Tensor, pairs: bool) -> Sequence[Tensor]:
    """The two of each pair, as views."""
    return (x[..., 0::2], x[..., 1::2]) if pairs else x.chunk(2, -1)


def _joined(y1: Tensor, y2: Tensor, pairs: bool) -> Tensor:
    return torch.stack([y1, y2], -1).flatten(-2) if pairs else torch.cat([y1, y2], -1)


def reference(
    xs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    pairs: bool = False,
    shared: bool = False,
    inverse: bool = False,
) -> list[Tensor]:
    """The meaning of this op: what every test compares with."""
    if shared:
        cos, sin = _joined(cos, cos, pairs), _joined(sin, sin, pairs)
    width, ys = cos.shape[-1], []
    for x in xs:
        part = x if width == x.shape[-1] else x[..., :width]
        if inverse:
            t1, t2 = _parts(part * sin, pairs)
            y = part * cos + _joined(t2, -t1, pairs)
        else:
            x1, x2 = _parts(part, pairs)
            y = part * cos + _joined(-x2, x1, pairs) * sin
        y = y.to(x.dtype)
        ys.append(y if part is x else torch.cat([y, x[..., width:]], -1))
    return ys


def unsupported(x: Tensor, cos: Tensor, sin: Tensor, shared: bool = False) -> Iterator[str]:
    """Why this op cannot take these arguments, if it cannot. Reads ranks, dtypes and static sizes."""
    for name, t in (("x", x), ("cos", cos)):
        if t.dtype not in DTYPES:
            yield f"dtype {t.dtype} of {name} is not one of {', '.join(map(str, DTYPES))}"
    if not 2 <= x.ndim <= 4:
        yield f"x has {x.ndim} dimensions; the kernel takes 2 to 4"
    yield from _operator.unlike("cos", cos, "sin", sin)
    width, columns = _operator.known(cos.shape[-1]), _operator.known(x.shape[-1])
    if width is None or columns is None:
        yield f"the columns to turn are {cos.shape[-1]} of {x.shape[-1]}; the kernel needs numbers"
    elif (2 * width if shared else width) > columns or (width % 2 and not shared):
        yield f"cos has {width} columns and x {columns}; they do not turn in pairs"
    lead = zip(reversed(cos.shape[:-1]), reversed(x.shape[:-1]), strict=False)
    if cos.ndim > x.ndim or any(_operator.differ(a, 1) and _operator.differ(a, b) for a, b in lead):
        yield f"cos is {list(cos.shape)} and x {list(x.shape)}; cos has to broadcast against x"


@triton.jit
def _turned(
    x_ptr, y_ptr, cos_ptr, sin_ptr, row, N, B, C, x0, x1, x2, y0, y1, y2, c0, c1, c2, s0, s1, s2,
    HALF: tl.constexpr, REST: tl.constexpr, PAIRS: tl.constexpr, SHARED: tl.constexpr,
    INVERSE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Turns rows of one tensor [A, B, C, D] by the angles of each, and copies the columns that stay."""
    a, b, c = row // (B * C), row // C % B, row % C
    live = row < N
    x_at = (a * x0 + b * x1 + c * x2)[:, None]
    y_at = (a * y0 + b * y1 + c * y2)[:, None]
    cos_at = (a * c0 + b * c1 + c * c2)[:, None]
    sin_at = (a * s0 + b * s1 + c * s2)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (i < HALF)
    first = 2 * i if PAIRS else i
    second = first + 1 if PAIRS else first + HALF
    u = tl.load(x_ptr + x_at + first, mask, other=0.0).to(tl.float32)
    v = tl.load(x_ptr + x_at + second, mask, other=0.0).to(tl.float32)
    if SHARED:
        cos_1 = tl.load(cos_ptr + cos_at + i, mask, other=0.0).to(tl.float32)
        sin_1 = tl.load(sin_ptr + sin_at + i, mask, other=0.0).to(tl.float32)
        cos_2, sin_2 = cos_1, sin_1
    else:
        cos_1 = tl.load(cos_ptr + cos_at + first, mask, other=0.0).to(tl.float32)
        sin_1 = tl.load(sin_ptr + sin_at + first, mask, other=0.0).to(tl.float32)
        cos_2 = tl.load(cos_ptr + cos_at + second, mask, other=0.0).to(tl.float32)
        sin_2 = tl.load(sin_ptr + sin_at + second, mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin_1, sin_2 = -sin_2, -sin_1
    tl.store(y_ptr + y_at + first, (u * cos_1 - v * sin_1).to(y_ptr.dtype.element_ty), mask)
    tl.store(y_ptr + y_at + second, (v * cos_2 + u * sin_2).to(y_ptr.dtype.element_ty), mask)
    if REST > 0:
        j = tl.arange(0, BLOCK_REST)[None, :]
        inside = live[:, None] & (j < REST)
        tl.store(y_ptr + y_at + 2 * HALF + j, tl.load(x_ptr + x_at + 2 * HALF + j, inside), inside)


@triton.jit
def rotation_kernel(
    q_ptr, k_ptr, p_ptr, r_ptr, cos_ptr, sin_ptr,
    NQ, BQ, CQ, q0, q1, q2, p0, p1, p2, cq0, cq1, cq2, sq0, sq1, sq2,
    NK, BK, CK, k0, k1, k2, r0, r1, r2, ck0, ck1, ck2, sk0, sk1, sk2, FIRST,
    HALF: tl.constexpr, REST: tl.constexpr, REST_K: tl.constexpr, PAIRS: tl.constexpr, SHARED: tl.constexpr,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """p = q and r = k, turned: ROWS rows a program, the FIRST programs those of q."""
    at = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    if at < FIRST:
        _turned(
            q_ptr, p_ptr, cos_ptr, sin_ptr, at.to(tl.int64) * ROWS + rows, NQ, BQ, CQ, q0, q1, q2, p0, p1, p2,
            cq0, cq1, cq2, sq0, sq1, sq2, HALF, REST, PAIRS, SHARED, INVERSE, BLOCK, BLOCK_REST,
        )  # fmt: skip
    else:
        _turned(
            k_ptr, r_ptr, cos_ptr, sin_ptr, (at - FIRST).to(tl.int64) * ROWS + rows, NK, BK, CK, k0, k1, k2,
            r0, r1, r2, ck0, ck1, ck2, sk0, sk1, sk2, HALF, REST_K, PAIRS, SHARED, INVERSE, BLOCK, BLOCK_REST,
        )  # fmt: skip


def rows(half: int, rest: int) -> int:
    """How many rows a program turns, of `half` pairs and `rest` columns that stay."""
    return max(1, TILE // max(next_power_of_2(half), next_power_of_2(rest) // 2))


def _addresses(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> list[int]:
    """N, B, C of x as [A, B, C, D], and the strides of the leading dimensions of all four."""
    lead = x.shape[:-1]
    full = (*[1] * (3 - len(lead)), *lead)
    tables = (t.expand(*lead, t.shape[-1]) for t in (cos, sin))
    strides = [(*[0] * (3 - len(lead)), *t.stride()[:-1]) for t in (x, y, *tables)]
    return [lead.numel(), *full[1:], *(s for one in strides for s in one)]


def launch(
    xs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    pairs: bool = False,
    shared: bool = False,
    inverse: bool = False,
) -> list[Tensor]:
    """Run the Triton kernel, on two tensors at once. No checks: the caller has asked `unsupported`."""
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    half = cos.shape[-1] if shared else cos.shape[-1] // 2
    given, xs = xs, [x if x.stride(-1) == 1 else x.contiguous() for x in xs]
    ys = [torch.empty_like(x) for x in xs]
    for at in range(0, len(xs), 2):
        q, k = xs[at], xs[min(at + 1, len(xs) - 1)]
        p, r = ys[at], ys[min(at + 1, len(xs) - 1)]
        rest, rest_k = q.shape[-1] - 2 * half, k.shape[-1] - 2 * half
        count = rows(half, max(rest, rest_k))
        places = [_addresses(q, p, cos, sin), _addresses(k, r, cos, sin)]
        first, second = (-(-one[0] // count) for one in places)
        programs = first if k is q else first + second
        if programs:
            rotation_kernel[(programs,)](
                q, k, p, r, cos, sin, *places[0], *places[1], first, HALF=half, REST=rest, REST_K=rest_k,
                PAIRS=pairs, SHARED=shared, INVERSE=inverse, ROWS=count, BLOCK=next_power_of_2(half),
                BLOCK_REST=next_power_of_2(max(rest, rest_k)), num_warps=4,
            )  # fmt: skip
    return [y if x.stride(-1) == 1 else torch.empty_like(x).copy_(y) for x, y in zip(given, ys, strict=True)]


def _large(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool, shared: bool, inverse: bool) -> Tensor:
    """In three passes; x is of the dtype to compute in."""
    y = torch.empty_like(x)
    width = (2 if shared else 1) * cos.shape[-1]
    whole, turned = x, y
    if width != x.shape[-1]:
        y[..., width:] = x[..., width:]
        whole, turned = x[..., :width], y[..., :width]
    (x1, x2), (y1, y2) = _parts(whole, pairs), _parts(turned, pairs)
    if shared:
        torch.mul(x1, cos, out=y1)
        torch.mul(x2, cos, out=y2)
    else:
        torch.mul(whole, cos, out=turned)
    sin1, sin2 = (sin, sin) if shared else _parts(sin, pairs)
    if inverse:
        sin1, sin2 = sin2, sin1
    y1.addcmul_(x2, sin1, value=1 if inverse else -1)
    y2.addcmul_(x1, sin2, value=-1 if inverse else 1)
    return y


def _small(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool, inverse: bool) -> Tensor:
    """All columns, in as few calls as there can be; autograd can follow them."""
    if inverse:
        t1, t2 = _parts(x * sin, pairs)
        y = (x * cos).add_(_joined(t2, t1.neg(), pairs))
    else:
        x1, x2 = _parts(x, pairs)
        y = torch.addcmul(x * cos, _joined(x2.neg(), x1, pairs), sin)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def compose(
    xs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    pairs: bool = False,
    shared: bool = False,
    inverse: bool = False,
) -> list[Tensor]:
    """The CPU kernel."""
    columns, dtype, ys = cos.shape[-1], cos.dtype, []
    for x in xs:
        if not shared and x.shape[-1] == columns and x.numel() < SMALL:
            y = _small(x, cos, sin, pairs, inverse)
        elif x.dtype == dtype:
            y = _large(x, cos, sin, pairs, shared, inverse)
        else:
            wide = torch.promote_types(x.dtype, cos.dtype)
            y = _large(x.to(wide), cos.to(wide), sin.to(wide), pairs, shared, inverse).to(x.dtype)
        ys.append(y)
    return ys


def _cuda(xs: Sequence[Tensor], cos: Tensor, *rest: Any) -> list[Tensor]:
    double = any(t.dtype == torch.float64 for t in (*xs, cos))
    return (compose if double else launch)(xs, cos, *rest)


def _fake(xs: Sequence[Tensor], cos: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in xs]


op = _operator.define(
    "rope(Tensor[] xs, Tensor cos, Tensor sin, bool pairs=False, bool shared=False, bool inverse=False)"
    " -> Tensor[]",
    cpu=compose,
    cuda=_cuda,
    fake=_fake,
)


class Rope(torch.autograd.Function):
    """The derivative of a rotation is the rotation back, which has one of its own."""

    @staticmethod
    def forward(
        ctx: Any, cos: Tensor, sin: Tensor, pairs: bool, shared: bool, inverse: bool, *xs: Tensor
    ) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.how = pairs, shared, inverse
        return tuple(op(xs, cos, sin, pairs, shared, inverse))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        pairs, shared, inverse = ctx.how
        return None, None, None, None, None, *op(dys, cos, sin, pairs, shared, not inverse)


def _derivative(
    xs: Sequence[Tensor], cos: Tensor, sin: Tensor, pairs: bool, shared: bool, inverse: bool
) -> list[Tensor]:
    if torch._C._any_requires_grad(cos, sin):
        return reference(xs, cos, sin, pairs, shared, inverse)
    return list(Rope.apply(cos, sin, pairs, shared, inverse, *xs))


_operator.differentiate(op, _derivative)


def direct(
    xs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    pairs: bool = False,
    shared: bool = False,
    inverse: bool = False,
) -> list[Tensor]:
    """The op on CPU tensors, past the dispatcher where no gradient is wanted or its call would cost most."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*xs, cos, sin):
        if not shared and all([x.numel() < SMALL and x.shape[-1] == cos.shape[-1] for x in xs]):
            return [_small(x, cos, sin, pairs, inverse) for x in xs]
        return _derivative(xs, cos, sin, pairs, shared, inverse)
    return compose(xs, cos, sin, pairs, shared, inverse)
