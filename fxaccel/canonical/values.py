"""Questions about the values that nodes compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxaccel.ir import Region, expr


def is_tensor(arg: Any) -> bool:
    """Whether the argument is a node that computes one tensor."""
    return isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), Tensor)


def is_float(node: fx.Node) -> bool:
    """Whether the value is a real floating tensor."""
    return bool(node.meta["val"].dtype.is_floating_point)


def dtype(node: fx.Node) -> torch.dtype:
    """The dtype of the tensor that `node` computes."""
    return node.meta["val"].dtype


def rank(node: fx.Node) -> int:
    """How many dimensions the tensor that `node` computes has."""
    return int(node.meta["val"].dim())


def close(a: float | None, b: float, node: fx.Node) -> bool:
    """Whether a written-out constant stands for `b` in the precision of the node's dtype."""
    tolerance = 1e-15 if dtype(node) is torch.float64 else 2e-7
    return a is not None and math.isclose(a, b, rel_tol=4 * tolerance)


def describe(arg: Any) -> Any:
    """A hashable that is equal for arguments that a fake run cannot tell apart."""
    if isinstance(arg, fx.Node):
        return describe(arg.meta["val"])
    if isinstance(arg, Tensor):
        strided = arg.layout is torch.strided
        layout = tuple(expr(s) for s in (*arg.shape, *arg.stride())) if strided else id(arg)
        return layout, arg.dtype, arg.device, arg.requires_grad
    if isinstance(arg, (list, tuple)):
        return tuple(describe(a) for a in arg)
    if isinstance(arg, dict):
        return tuple((k, describe(v)) for k, v in sorted(arg.items()))
    return expr(arg) if isinstance(arg, torch.SymInt) else (type(arg), repr(arg))


def power_of_two(x: float | int) -> bool:
    """Whether multiplying by `x` only shifts the exponent."""
    return x != 0 and math.isfinite(x) and abs(math.frexp(x)[0]) == 0.5


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two values of one shape are laid out alike, as far as expressions tell."""
    return all(
        _same(expr(s), expr(t))
        for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True)
        if expr(n) != 1
    )


def _same(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two strides are one; where their forms differ (`Min(6, 6*s0)`), by trying primes for sizes."""
    if a == b:
        return True
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    tries = ([sympy.prime(7 * k + i + 3) for i in range(len(symbols))] for k in (1, 5))
    try:
        return bool(symbols) and all(
            a.subs(at) == b.subs(at) for at in (dict(zip(symbols, t, strict=True)) for t in tries)
        )
    except ZeroDivisionError:  # a size that these primes make 0: not known to be one
        return False


def is_dense(val: Tensor) -> bool:
    """Whether the value is laid out row by row, as far as expressions tell."""
    step: sympy.Expr = sympy.Integer(1)
    for size, stride in zip(reversed(val.shape), reversed(val.stride()), strict=True):
        n = expr(size)
        if n == 1:
            continue
        if not _same(expr(stride), step):
            return False
        step = step * n
    return True


def under_autocast(regions: Sequence[Region]) -> bool:
    """Whether autocast is on in a tuple of regions."""
    inner = [r for r in regions if r.kind == "autocast"]
    return bool(inner) and any(r.args[2] for r in inner)
