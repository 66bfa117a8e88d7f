"""Launches attention's Triton kernels, forward and backward, for `fxaccel::attention`.

Shapes     q: [B, H, S, D]; k: [B, G, T, D]; v: [B, G, T, E]; out, dout: [B, H, S, E]; lse: [B, H, S] in fp32,
           base 2, +inf for a row that keeps no key. Query head h reads head h // (H // G) of k and v.
           `mask` and `bias` are texts in the language of _score.py over `tables`.
Cost       the part of a mask that is a band costs nothing: blocks outside of it are never visited, blocks
           inside run without it. For the rest of a mask, lists of blocks are made first.
Limits     D, E <= 256. Each output has one owner: no atomics, the same bits on every run. fp32 with D above
           64 is right but not fast: its tiles do not fit the registers.
Layout     _flash_forward.py, _flash_backward.py, _flash_bias.py: the kernels. _flash_tiles.py: their parts.
           _flash_source.py: functions made of mask and bias. _flash_spans.py, _flash_lists.py: the
           blocks that a mask keeps.
           _flash_blocks.py, _flash_tune.py: block sizes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels import _flash_bias, _flash_blocks, _flash_source, _flash_spans, _score
from fxaccel.kernels._flash_backward import delta_kernel, key_gradient_kernel, query_gradient_kernel
from fxaccel.kernels._flash_blocks import Config
from fxaccel.kernels._flash_forward import forward_kernel
from fxaccel.kernels._flash_lists import list_kernel
from fxaccel.kernels._triton import next_power_of_2, tl

LOG2E = 1.4426950408889634
log = math.log2  # as lse has it


def _unit(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose last dimension has stride 1: as they are where they allow it."""
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]


def _kind(table: Tensor) -> tuple[str, int]:
    """What a table holds, and its rank."""
    if table.dtype == torch.bool:
        return "bool", table.ndim
    if table.is_floating_point():
        return "float", table.ndim
    return "int64" if table.dtype == torch.int64 else "int32", table.ndim


class Problem:
    """What every launch of one attention passes alike."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: list[Tensor],
        mask: str,
        bias: str,
        scale: float,
        softcap: float,
        sinks: Tensor | None,
        dropout: float,
        seed: Tensor | None,
        flat: bool = False,
    ) -> None:
        (self.b, self.h, self.s, self.d), (self.g, self.t, self.e) = q.shape, v.shape[1:]
        self.q, self.k, self.v = _unit(q, k, v)
        self.kinds = tuple(map(_kind, tables))
        self.tables = tuple(t.view(torch.uint8) if t.dtype == torch.bool else t for t in tables)
        self.strides = tuple(step for t in tables for step in t.stride())
        band = _score.band(mask)
        reach = self.s + self.t  # what is further away is as good as nowhere
        ends = band.limits(self.s, self.t)
        self.low, self.high = (None if x is None else max(-reach, min(x, reach)) for x in ends)
        self.rest, self.bias, self.sinks = band.rest, bias, sinks
        self.scale, self.softcap = scale, softcap or None
        self.dropout, self.seed = dropout, seed if dropout else None
        self.flat = flat

    @property
    def features(self) -> tuple[str, ...]:
        """What a kernel does besides plain attention."""
        has = {
            "causal": self.high is not None and self.low is None,
            "window": self.low is not None,
            "rest": bool(self.rest),
            "bias": bool(self.bias),
            "softcap": self.softcap is not None,
            "dropout": self.seed is not None,
        }
        return tuple(feature for feature, here in has.items() if here)

    def arguments(self) -> dict[str, Any]:
        """Run-time arguments of every kernel but the lists'."""
        names = ("q_ptr", "k_ptr", "v_ptr", "seed_ptr", "tables", "strides", "H", "G", "S", "T", "scale")
        q, k, v = self.q, self.k, self.v
        values = (q, k, v, self.seed, self.tables, self.strides, self.h, self.g, self.s, self.t, self.scale)
        steps = {f"{x}_steps": t.stride()[:3] for x, t in (("q", q), ("k", k), ("v", v))}
        keep_scale = 1.0 / (1.0 - self.dropout) if self.dropout < 1 else 0.0
        given = {"low": self.low, "high": self.high, "softcap": self.softcap}
        return (
            dict(zip(names, values, strict=True))
            | steps
            | given
            | {
                "dropout": self.dropout,
                "keep_scale": keep_scale,
            }
        )

    def options(self, config: Config, below: bool = False) -> dict[str, Any]:
        """Compile-time arguments; tiles may hold keys below 0 if `below`."""
        kind = getattr(tl, str(self.q.dtype).removeprefix("torch."))
        exact = "ieee" if torch.version.hip else "tf32x3"  # on NVIDIA ieee is scalar code
        tf32 = torch.backends.cuda.matmul.allow_tf32 and not torch.version.hip
        change = _flash_source.bias(self.bias, self.kinds, below) if self.bias else None
        return {
            "D": self.d,
            "E": self.e,
            "MASK": _flash_source.keep(self.rest, self.kinds, below) if self.rest else None,
            "BIAS": _flash_source.flat() if self.flat else change,
            "PRECISION": "tf32" if tf32 else exact,
            "DOT": kind if on_gpu(self.q) else tl.float32,  # the interpreter multiplies bfloat16's bits
            "BLOCK_M": config.m,
            "BLOCK_N": config.n,
            "BLOCK_D": max(16, next_power_of_2(self.d)),  # the least that tl.dot takes
            "BLOCK_E": max(16, next_power_of_2(self.e)),
            "num_warps": config.warps,
            "num_stages": config.stages,
        }

    def config(self, kernel: str) -> Config:
        """The blocks of this kernel here."""
        width = max(self.d, self.e)
        return _flash_blocks.choose(kernel, self.q.dtype, width, self.features, self.q.device)

    def lists(self, config: Config, transposed: bool = False) -> dict[str, Any]:
        """Arguments that say which blocks to visit: none where the mask is a band."""
        if not self.rest:
            return {"list_ptr": None, "list_steps": (0, 0, 0)}
        used = _score.names(self.rest)
        batches, heads = self.b if "b" in used else 1, self.h if "h" in used else 1
        sizes = [-(-self.s // config.m), -(-self.t // config.n)]
        outer, inner = sizes[::-1] if transposed else sizes
        made = self.q.new_empty(batches, heads, outer, inner + 2, dtype=torch.int32)
        test, chunk = _flash_spans.blocks(self.rest, self.kinds)
        list_kernel[(batches * heads * outer,)](
            made, self.tables, self.strides, heads, self.s, self.t, self.low, self.high,
            TEST=test, TRANSPOSED=transposed, CHUNK=chunk, BLOCK_M=config.m, BLOCK_N=config.n, num_warps=8,
        )  # fmt: skip
        steps = (made.stride(0) if batches > 1 else 0, made.stride(1) if heads > 1 else 0, inner + 2)
        return {"list_ptr": made, "list_steps": steps}


def on_gpu(x: Tensor) -> bool:
    """Whether kernels on this tensor are compiled, and not interpreted."""
    return x.is_cuda


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    mask: str,
    bias: str,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    save: bool = False,
    flat: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out, laid out as [B, S, H, E], and lse (base 2) if it is to be saved. `flat`: as if scores were 0."""
    p = Problem(q, k, v, tables, mask, bias, scale, softcap, sinks, dropout, seed, flat)
    out = q.new_empty(p.b, p.s, p.h, p.e).transpose(1, 2)
    lse = q.new_empty(p.b, p.h, p.s, dtype=torch.float32) if save else None
    if out.numel():
        forward(p, out, lse, p.config("forward"))
    return out, lse


def forward(p: Problem, out: Tensor, lse: Tensor | None, config: Config) -> None:
    """Fill out, and lse where there is one."""
    sinks = None if p.sinks is None else p.sinks.contiguous()
    forward_kernel[(-(-p.s // config.m) * p.b * p.h,)](
        out_ptr=out, lse_ptr=lse, sinks_ptr=sinks, out_steps=out.stride()[:3],
        **p.arguments(), **p.lists(config), **p.options(config),
    )  # fmt: skip


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    mask: str,
    bias: str,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    wanted: tuple[bool, ...],
    flat: bool = False,
) -> tuple[Any, ...]:
    """dq, dk, dv, dsinks and a list of the tables' gradients; None for what is not wanted."""
    p = Problem(q, k, v, tables, mask, bias, scale, softcap, sinks, dropout, seed, flat)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    if not (out.numel() and k.numel()):
        zeros = (
            t.new_zeros(t.shape, dtype=torch.float32) if w else None
            for t, w in zip(tables, wanted[:-1], strict=True)
        )
        dsinks = lse.new_zeros(p.h) if wanted[-1] else None
        return *(g.zero_() for g in grads), dsinks, [*zeros]
    given = p.arguments() | score_arguments(p, dout, out, lse)
    key_gradient(p, given, grads[1], grads[2], p.config("keys"))
    query_gradient(p, given, grads[0], p.config("queries"))
    dsinks = _sink_gradient(sinks, lse, given["delta_ptr"]) if wanted[-1] else None
    dtables = [_table_gradient(p, given, number) if wanted[number] else None for number in range(len(tables))]
    return *grads, dsinks, dtables


def score_arguments(p: Problem, dout: Tensor, out: Tensor, lse: Tensor) -> dict[str, Any]:
    """What backward kernels read besides the inputs; delta is made here."""
    dout, out = _unit(dout, out)
    delta = torch.empty_like(lse)
    delta_kernel[(-(-p.s // 32) * p.b * p.h,)](
        out, dout, delta, out.stride()[:3], dout.stride()[:3], p.h, p.s, p.e,
        BLOCK_M=32, BLOCK_E=next_power_of_2(p.e),
    )  # fmt: skip
    return {"dout_ptr": dout, "dout_steps": dout.stride()[:3], "lse_ptr": lse, "delta_ptr": delta}


def key_gradient(p: Problem, given: dict[str, Any], dk: Tensor, dv: Tensor, config: Config) -> None:
    """Fill dk and dv."""
    key_gradient_kernel[(-(-p.t // config.n) * p.b * p.g,)](
        dk_ptr=dk, dv_ptr=dv, **given, **p.lists(config, transposed=True), **p.options(config)
    )


def query_gradient(p: Problem, given: dict[str, Any], dq: Tensor, config: Config) -> None:
    """Fill dq."""
    query_gradient_kernel[(-(-p.s // config.m) * p.b * p.h,)](
        dq_ptr=dq, **given, **p.lists(config), **p.options(config)
    )


def _sink_gradient(sinks: Any, lse: Tensor, delta: Tensor) -> Tensor:
    """Of a logit whose weight goes nowhere: dS = -p * delta."""
    weights = torch.exp2(sinks.float()[:, None] * LOG2E - lse)
    return -(weights * delta).sum((0, 2))


def _table_gradient(p: Problem, given: dict[str, Any], number: int) -> Tensor:
    """The sum over the reads of a table."""
    first, *others = _score.gradient_forms(p.bias, number)
    total = _flash_bias.gradient(p, given, p.tables[number], first)
    for form in others:
        total = total + _flash_bias.gradient(p, given, p.tables[number], form)
    return total


def unsupported_gradient(bias: str, shapes: Any, index: int) -> str | None:
    """Why table `index` has no gradient, if it has none; `shapes` are the tables'."""
    return _flash_bias.unsupported(bias, index)
