"""What the operators of quantized linears share: formats, nibbles, scales, and exact products of int8.

Shapes     x: [..., K]; w: [N, K], of 4 bits [N, G * group / 2] with G = ceil(K / group); scale, zero: [N, G].
           Byte j of a row of 4-bit codes holds column 2 j in its low nibble and 2 j + 1 in its high one.
Numerics   fp32 (fp64 for fp64). int8 products are exact: oneDNN's where the processor multiplies bytes into
           32-bit sums (VNNI, AMX), which is tried out once, as without such an instruction it saturates sums
           of two products at 16 bits; else products of floats, EXACT columns at a time.
Source     NF4: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels import _operator
from fxaccel.kernels._norm import DTYPES

TOP = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what the largest of a row becomes
LEAST = 1e-30  # an absolute maximum below this counts as this: a row of zeros has a scale too
EXACT = 1024  # products of two int8 whose sum fp32 holds: 2**14 each, and integers up to 2**24
MOST = 133_000  # products whose sum int32 holds
FORMATS = {
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
    "int4": torch.uint8,
    "nf4": torch.uint8,
}
GROUPED = ("int4", "nf4")  # two codes a byte
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes [N, C] of 0 to 15 as [N, ceil(C / 2)] bytes; of an odd C the last high nibble is 0."""
    codes = codes.to(torch.uint8)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_nibbles(w: Tensor) -> Tensor:
    """The codes [N, 2 C] in bytes [N, C]."""
    return torch.stack([w & 15, w >> 4], -1).flatten(1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on `dtype` is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache
def constant(value: float | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that is made once: to make one of a number costs as much as an operator on a short row."""
    return torch.tensor(value, dtype=dtype, device=device)


def dequantized(
    w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The weight [N, columns] that is stored as w, in `dtype`."""
    kind = wide(dtype)
    scale = scale.to(kind)
    if format not in GROUPED:
        value = w[:, :columns].to(kind)
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(group, 1)[:, :columns]
        return value.mul_(scale).to(dtype)
    codes = unpack_nibbles(w)
    nf4 = format == "nf4"
    value = constant(NF4, kind, w.device)[codes.int()] if nf4 else codes.to(kind).sub_(8)
    value = value.unflatten(1, (-1, group)).mul_(scale.unsqueeze(-1))
    if zero is not None:
        value.add_(zero.to(kind).unsqueeze(-1))
    return value.flatten(1)[:, :columns].to(dtype).contiguous()


def groups(columns: int, group: int) -> int:
    """G, the groups of a row of `columns`."""
    return -(-columns // group)


def odd(
    w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, columns: int
) -> Iterator[str]:
    """Why these are not a stored weight of `columns` columns."""
    if format not in FORMATS:
        yield f"format {format!r} is not one of {', '.join(FORMATS)}"
        return
    if w.dtype != FORMATS[format]:
        yield f"w is {w.dtype}; {format} is stored as {FORMATS[format]}"
    if group < 1 or (group % 2 and format in GROUPED):
        yield f"a group has {group} columns; the kernel takes at least 1, and an even number of 4 bits"
        return
    if zero is not None and format != "int4":
        yield f"{format} has no zero"
    for name, t in (("w", w), ("scale", scale), ("zero", zero)):
        if t is not None and t.ndim != 2:
            yield f"{name} has {t.ndim} dimensions; the kernel takes 2"
            return
    for name, t in (("scale", scale), ("zero", zero)):
        if t is not None and t.dtype not in SCALES:
            yield f"{name} is {t.dtype}, not one of {', '.join(map(str, SCALES))}"
    yield from _sizes(w, scale, zero, format, group, columns)


def _sizes(
    w: Tensor, scale: Tensor, zero: Tensor | None, format: str, group: int, columns: int
) -> Iterator[str]:
    """Why the sizes of a stored weight do not go together."""
    each = groups(columns, group)
    stored = each * group // 2 if format in GROUPED else columns
    if _operator.differ(w.shape[1], stored):
        yield f"w has {w.shape[1]} columns; {columns} of {format} in groups of {group} are stored as {stored}"
    for name, t in (("scale", scale), ("zero", zero)):
        if t is None:
            continue
        whole = _operator.known(t.shape[0]) == _operator.known(t.shape[1]) == 1
        if not whole and (_operator.differ(t.shape[0], w.shape[0]) or _operator.differ(t.shape[1], each)):
            yield f"{name} is {list(t.shape)}; w has {w.shape[0]} rows of {each} groups"


def unfit(x: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES, name: str = "x") -> Iterator[str]:
    """Why x is not what an operator over the last dimension takes."""
    if x.dtype not in dtypes:
        yield f"{name} is {x.dtype}, not one of {', '.join(map(str, dtypes))}"
    if x.ndim == 0:
        yield f"{name} has no last dimension"


@lru_cache
def exact() -> bool:
    """Whether oneDNN multiplies bytes here, exactly: the processor can, and sums come out right.

    The second is tried, as a user may have told oneDNN to leave instructions out. Sums of 127 * 127 are what
    saturates first.
    """
    has = torch.cpu.get_capabilities()
    if not any(has.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return False
    a = torch.full((64, 64), 127, dtype=torch.int8)
    u = a.view(torch.uint8) ^ 128
    none = torch.zeros(64, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(a, None)
    y = torch.ops.onednn.qlinear_pointwise(
        u, 1.0, 128, packed, torch.ones(64), none, None, 1.0, 0, torch.float32, "none", [], ""
    )
    want = 64 * 127 * 127
    return bool((torch._int_mm(a, a) == want).all() and (torch._int_mm(a[:1], a) == want).all()) and bool(
        (y == want).all()
    )


def floats(q: Tensor, w: Tensor) -> Tensor:
    """The int32 product of int8 q [M, K] with w [N, K], int8 or the same in fp32, by products of floats."""
    total = torch.zeros(len(q), len(w), dtype=torch.int32, device=q.device)
    for start in range(0, q.shape[1], EXACT):
        piece = slice(start, start + EXACT)
        total += torch.mm(q[:, piece].float(), w[:, piece].float().t()).to(torch.int32)
    return total


def integers(q: Tensor, w: Tensor) -> Tensor:
    """The int32 product of int8 q [M, K] with w [N, K] on the CPU."""
    if not (q.numel() and w.numel()):
        return torch.zeros(len(q), len(w), dtype=torch.int32, device=q.device)
    return torch._int_mm(_by_rows(q), _by_rows(w).t()) if exact() else floats(q, w)


def _by_rows(t: Tensor) -> Tensor:
    """t [M, K] with rows K apart: `_int_mm` believes the stride of a dimension of one element."""
    t = t.contiguous()
    return t if t.stride() == (t.shape[1], 1) else t.as_strided(t.shape, (t.shape[1], 1))


class _NoDerivative(torch.autograd.Function):
    """An operator whose derivative raises."""

    @staticmethod
    def forward(ctx: Any, op: _operator.Op, *args: Any) -> Any:
        ctx.name = op._opname
        results = op(*args)
        several = results if isinstance(results, tuple) else (results,)
        ctx.mark_non_differentiable(*(t for t in several if t.dtype in TOP))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"fxaccel::{ctx.name} has no derivative\nhint: weight_only_linear has one; quantize for inference"
        )


def no_derivative(op: _operator.Op) -> None:
    """Let `op` raise where a gradient through it is asked for, and not before."""
    _operator.differentiate(op, lambda *args: _NoDerivative.apply(op, *args))


def shape_of(value: Any) -> Any:
    """A tensor, or what stands for it in a graph: of its shape and dtype."""
    return getattr(value, "meta", {}).get("val", value)


def on_gpu(launch: Callable[..., Any], composition: Callable[..., Any], place: int) -> Callable[..., Any]:
    """The GPU's kernel: `launch`, and the composition where the argument at `place` is or has float64."""

    def kernel(*args: Any) -> Any:
        told = args[place]
        double = (told.dtype if isinstance(told, Tensor) else told) == torch.float64
        return (composition if double else launch)(*args)

    return kernel
