"""Turn queries and keys by their positions (RoPE) in one kernel.

    q * cos + cat([-q2, q1], -1) * sin
    k * cos + cat([-k2, k1], -1) * sin     =>   q, k = fxaccel.rope([q, k], cos, sin)

Fires on   halves (Llama) and pairs of columns (GPT-J, Cohere); angles for every column, or one for the two of
           a pair; written as one sum, as two parts that are joined, or as a product of complex numbers; some
           of the columns alone (GPT-NeoX, Phi); in a wider dtype with the cast back. cos and sin are data: of
           any positions, scaled in any way, and may want gradients.
Saves      on a GPU all but one read and one write of q and k, in one launch for both; on the CPU two of five
           passes over them.
Exact      agrees with the original within its own rounding.
Source     Su et al. 2021, "RoFormer", arXiv:2104.09864.
"""

from itertools import zip_longest
from typing import Any

import torch
from torch import fx

from fxaccel.ir import Program, arguments, expr, is_call, value_of
from fxaccel.kernels import rope
from fxaccel.pattern import Pattern
from fxaccel.rule import Finder, Match, Miss, Ops, Refusal, Refusals, Rule, Rules, register

NEAR = 4  # operators of a rotation that have to be there before what differs is told as a near miss


def _turned(
    op: Ops, x: Any, cos: Any, sin: Any, half: Any, end: Any, apart: Any, shape: Any, dim: Any, last: Any
) -> Any:
    """The rotations of x by real angles: in one sum, or in two parts that are joined."""
    aten, ways = op.aten, dict[str, Any]()
    halves, unbound = aten.split.Tensor(x, half, dim), aten.unbind.int(aten.reshape.default(x, apart), last)
    kinds = {
        "halves": (halves[0], halves[1]),
        "columns": (aten.slice.Tensor(x, dim, 0, end, 2), aten.slice.Tensor(x, dim, 1, end, 2)),
        "unbound": (unbound[0], unbound[1]),
    }
    for kind, (x1, x2) in kinds.items():

        def joined(a: Any, b: Any, kind: str = kind) -> Any:
            if kind == "halves":
                return aten.cat.default([a, b], dim)
            return aten.reshape.default(aten.stack.default([a, b], last), shape)

        turned = joined(aten.neg.default(x2), x1)
        first = aten.sub.Tensor(aten.mul.Tensor(x1, cos), aten.mul.Tensor(x2, sin))
        second = aten.add.Tensor(aten.mul.Tensor(x2, cos), aten.mul.Tensor(x1, sin))
        ways[f"sum_{kind}"] = aten.add.Tensor(aten.mul.Tensor(x, cos), aten.mul.Tensor(turned, sin))
        ways[f"joined_{kind}"] = joined(first, second)
    return op.either(**ways)


def _product(op: Ops, x: Any, angles: Any, apart: Any, shape: Any, low: Any) -> Any:
    """The rotation of x by complex numbers."""
    aten = op.aten
    product = aten.mul.Tensor(aten.view_as_complex.default(aten.reshape.default(x, apart)), angles)
    real = aten.view_as_real.default(product)
    return aten.reshape.default(op.either(narrowed=aten.to.dtype(real, low), real=real), shape)


class Rotation(Rule):
    """A rotary embedding in any spelling becomes one kernel."""

    def traced(self):
        pattern = Pattern.trace(self.pattern)

        def find(program: Program, root: fx.Node) -> Match | Miss:
            found = pattern.find(program, root)
            return Miss() if isinstance(found, Miss) and found.depth < NEAR else found

        return Finder(pattern.targets, find)

    def pattern(self, op, x, cos, sin, half, end, apart, shape, dim, last, angles, wide, low, cut):
        aten = op.aten

        def rotated(part: Any) -> Any:
            part = op.either(widened=aten.to.dtype(part, wide), kept=part)
            return op.either(
                real=_turned(op, part, cos, sin, half, end, apart, shape, dim, last),
                product=_product(op, part, angles, apart, shape, low),
            )

        whole = op.either(cast=aten.to.dtype(rotated(x), low), plain=rotated(x))
        parts = [aten.split_with_sizes.default(x, cut, dim), aten.split.Tensor(x, cut, dim)]
        some, even = (aten.cat.default([rotated(p[0]), p[1]], dim) for p in parts)
        return op.either(some=some, even=even, whole=whole)

    def refuse(self, m: Match) -> Refusals:
        x, made = m.val("x"), m.root.meta["val"]
        if m.dim not in (None, x.ndim - 1) or m.last not in (None, x.ndim):
            yield Refusal(
                f"it turns along dimension {m.dim} of {x.ndim}; the kernel along the last",
                "the columns to turn as the last dimension",
            )
            return
        columns = m.cut[0] if m.chose("some") else m.cut if m.chose("even") else x.shape[-1]
        yield from _uneven(m, x, columns)
        if made.dtype != x.dtype:
            yield Refusal(f"the result is {made.dtype}, the input {x.dtype}", f"a result in {x.dtype}")
        elif list(map(expr, made.shape)) != list(map(expr, x.shape)):
            yield f"the result is {list(made.shape)}, the input {list(x.shape)}"
        cos, sin = m.val("cos", "sin") if m.angles is None else (m.val("angles").real, m.val("angles").imag)
        yield from rope.unsupported(x, cos, sin, _shared(m))
        if m.angles is not None and x.device.type == "cpu":
            yield Refusal("on the CPU a product of complex numbers takes one pass already", "a GPU")

    def rewrite(self, op: Ops, m: Match):
        cos, sin = m.cos, m.sin
        if m.angles is not None:
            parts, last = op.aten.view_as_real.default(m.angles), m.val("angles").ndim
            cos, sin = (op.aten.select.int(parts, last, i) for i in (0, 1))
        pairs = not (m.chose("sum_halves") or m.chose("joined_halves"))
        return op.fxaccel.rope.default([m.x], cos, sin, pairs, _shared(m))


def _shared(m: Match) -> bool:
    """Whether the two of a pair have one angle."""
    return not any(tag.startswith("sum_") for tag in m.tags)


def _uneven(m: Match, x: torch.Tensor, columns: int) -> Refusals:
    """Where the columns that are turned do not make pairs as the kernel has them."""
    if m.half is not None and expr(2 * m.half) != expr(columns):
        yield f"it splits {columns} columns at {m.half}, not in two"
    if m.end is not None and expr(m.end) != expr(columns):
        yield f"it takes columns up to {m.end} of {columns}"
    if m.apart is not None:
        wanted = [*x.shape[:-1], columns // 2, 2]
        sizes = [value_of(s) for s in m.apart]
        if not all(s == -1 or expr(s) == expr(w) for s, w in zip_longest(sizes, wanted, fillvalue=0)):
            yield f"it takes {list(x.shape)} apart as {sizes}, not as {wanted}"
    width = (m.val("cos") if m.angles is None else m.val("angles")).shape[-1]
    if expr((2 if _shared(m) else 1) * width) != expr(columns):
        yield f"there are angles for {width} columns, and {columns} to turn"


class Together(Rule):
    """Queries and keys that are turned by the same angles are turned in one launch."""

    def traced(self):
        return Finder(frozenset({rope.op}), _beside)

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.rope.default([m.q, m.k], *m.root.args[1:])


def _beside(program: Program, root: fx.Node) -> Match | Miss:
    """The rotation at `root` with the nearest before it whose result nothing reads before root's input."""
    given = arguments(root)
    (k, *more), cos = given.pop("xs"), given["cos"]
    before = [] if more else [n for n in cos.users if is_call(n, rope.op) and n < root]
    for node in sorted(before, reverse=True):
        other = arguments(node)
        q, *rest = other.pop("xs")
        results = [*node.users, *root.users]
        ready = all(k < reader for result in node.users for reader in result.users)
        if other == given and not rest and len(results) == 2 and ready:
            terms = {n: n for n in (root, node, *results)}
            return Match(program, root, {"q": q, "k": k}, terms, outputs=tuple(results))
    return Miss()


@register
class FuseRope(Rules):
    """Rotary position embeddings of queries and keys become one kernel."""

    name = "fuse-rope"
    step = "raise"
    default = True
    rules = (Rotation, Together)
