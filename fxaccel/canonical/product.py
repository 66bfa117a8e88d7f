"""Steps on products: `linear` where a 2-d weight is on the right, `matmul` on n-d values everywhere else."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxaccel.canonical.editor import Editor, aten, on
from fxaccel.canonical.shape import broadcast_shape, narrower
from fxaccel.canonical.values import dtype, is_dense, is_float, is_tensor, power_of_two, rank

_VIEWS = (aten.permute.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dims,
          aten.expand.default)  # fmt: skip


@on(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.inner.default, autocast=True)
def plain_product(e: Editor, node: fx.Node) -> fx.Node | None:
    """mm, bmm, mv and dot are `matmul`."""
    if node.target is aten.inner.default and any(rank(a) != 1 for a in node.args):
        return None
    return e.call(node, aten.matmul.default, *node.args, val=node.meta["val"])


@on(aten.addmm.default, aten.baddbmm.default, aten.addmv.default, aten.addbmm.default, autocast=True)
def product_and_sum(e: Editor, node: fx.Node) -> fx.Node | None:
    """addmm and its kin are a product and an add, with alpha and beta written out."""
    bias, a, b = node.args[:3]
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    val = node.meta["val"]
    if dtype(bias) != val.dtype or (beta == 0 and not e.grad_free(bias)):
        return None  # under autocast a written-out sum would be promoted; a gradient of 0 would be lost
    product = e.call(node, aten.matmul.default, a, b, val=None if rank(a) > val.dim() else val)
    if product.meta["val"].dtype != val.dtype:
        e.erase(product)
        return None
    if rank(product) > val.dim():
        product = e.call(node, aten.sum.dim_IntList, product, [0], val=val)
    if alpha != 1:
        product = e.call(node, aten.mul.Tensor, product, alpha, val=val)
    if beta == 0:
        return product
    if beta != 1:
        bias = e.call(node, aten.mul.Tensor, bias, beta, val=e.like(bias))
    return e.call(node, aten.add.Tensor, product, bias, val=val)


@on(aten.matmul.default, autocast=True)
def product_with_weight(e: Editor, node: fx.Node) -> fx.Node | None:
    """A product with a 2-d weight on its right is `linear`, as is one of an n-d value and any matrix."""
    x, w = node.args
    if rank(w) != 2 or not (rank(x) > 2 or (e.from_state(w) and not e.from_state(x))):
        return None
    return e.call(node, aten.linear.default, x, _transposed(e, node, w), val=node.meta["val"])


def _transposed(e: Editor, node: fx.Node, w: fx.Node) -> fx.Node:
    if e.at(w, aten.permute.default):
        return w.args[0]
    return e.call(node, aten.permute.default, w, [1, 0])


@on(aten.linear.default, autocast=True)
def product_with_value(e: Editor, node: fx.Node) -> fx.Node | None:
    """`linear` of two computed matrices is a `matmul`."""
    x, w, *bias = node.args
    if rank(w) != 2 or rank(x) > 2 or (e.from_state(w) and not e.from_state(x)) or any(bias):
        return None
    return e.call(node, aten.matmul.default, x, _transposed(e, node, w), val=node.meta["val"])


@on(aten.add.Tensor)
def bias(e: Editor, node: fx.Node) -> fx.Node | None:
    """A 1-d bias added to a `linear` without one is its third argument."""
    if node.kwargs:
        return None
    for x, b in (node.args, node.args[::-1]):
        if (
            e.once(x, aten.linear.default)
            and len(x.args) == 2
            and is_tensor(b)
            and e.shape(b) == e.shape(x)[-1:]
            and dtype(b) == dtype(x)
            and (e.from_state(b) or e.from_state(x.args[1]))
        ):
            return e.call(node, aten.linear.default, *x.args, b, val=node.meta["val"])
    return None


# -- batches ---------------------------------------------------------------------------------------


@on(aten.matmul.default)
def batched(e: Editor, node: fx.Node) -> fx.Node | None:
    """A batch that was flattened for a product is flattened after it."""
    a, b = node.args
    if not (e.at(a, aten.reshape.default) and e.at(b, aten.reshape.default)):
        return None
    x, y = a.args[0], b.args[0]
    if rank(x) < 2 or rank(y) < 2 or rank(a) < 3 or rank(a) != rank(b):
        return None
    lead, other = e.shape(x)[:-2], e.shape(y)[:-2]
    kept = e.shape(x)[-2:] == e.shape(a)[-2:] and e.shape(y)[-2:] == e.shape(b)[-2:]
    sizes = e.sizes(e.shape(node))
    if not kept or lead != other or sizes is None:
        return None
    shape = (*lead, e.shape(x)[-2], e.shape(y)[-1])
    known = (u.meta.get("val") for u in node.users)
    val = next((v for v in known if isinstance(v, Tensor) and e.shape_of(v) == shape
                and v.dtype == dtype(node) and is_dense(v)), None)  # fmt: skip
    inner = e.call(node, aten.matmul.default, x, y, val=val)
    return e.call(node, aten.reshape.default, inner, sizes, val=node.meta["val"])


@on(aten.matmul.default, autocast=True)
def broadcast_batch(e: Editor, node: fx.Node) -> fx.Node | None:
    """A batch dimension that was expanded for a product is left to its broadcasting."""
    for i, arg in enumerate(node.args):
        other = e.shape(node.args[1 - i])
        for x in narrower(e, arg) if rank(arg) > 2 and len(other) > 2 else ():
            small = e.shape(x)
            if len(small) < 2 or small[-2:] != e.shape(arg)[-2:]:
                continue
            if broadcast_shape([small[:-2], other[:-2]]) == e.shape(node)[:-2]:
                node.update_arg(i, x)
                e.erase(arg)
                return node
    return None


# -- scales ----------------------------------------------------------------------------------------


def scale_of(e: Editor, node: Any) -> tuple[float, fx.Node] | None:
    """The number that a `mul` or `div` scales by, and what it scales."""
    if not e.at(node, aten.mul.Tensor, aten.div.Tensor) or node.kwargs:
        return None
    x, c = node.args
    if isinstance(c, bool) or not isinstance(c, (int, float)) or not is_tensor(x) or not is_float(x):
        return None
    if dtype(x) != dtype(node) or (node.target is aten.div.Tensor and c == 0):
        return None
    return (float(c) if node.target is aten.mul.Tensor else 1.0 / c), x


@on(aten.matmul.default)
def operand_scale(e: Editor, node: fx.Node) -> fx.Node | None:
    """A scale on an operand of a product is a scale of the product (in fp16 only one of 1 or more)."""
    for operand in node.args:
        while e.once(operand, *_VIEWS):
            operand = operand.args[0]
        scale = scale_of(e, operand)
        if scale is None or len(operand.users) > 1:
            continue
        number, x = scale
        if not math.isfinite(number) or (dtype(node) is torch.float16 and abs(number) < 1):
            continue
        e.storage.unite(operand, x)
        e.replace(operand, x)
        val = node.meta["val"]
        product = e.call(node, aten.matmul.default, *node.args, val=val)
        return e.call(node, aten.mul.Tensor, product, number, val=val)
    return None


def is_product(e: Editor, node: Any) -> bool:
    """Whether the value is a product, perhaps reshaped or scaled."""
    while e.at(node, *_VIEWS) or scale_of(e, node):
        node = node.args[0]
    return e.at(node, aten.matmul.default, aten.linear.default)


@on(aten.mul.Tensor, aten.div.Tensor)
def scale(e: Editor, node: fx.Node) -> fx.Node | None:
    """Scales of a product, and scales by powers of two, are `mul`; two of them are one."""
    found = scale_of(e, node)
    if found is None:
        return None
    number, x = found
    inner = scale_of(e, x) if len(x.users) == 1 and x.target is aten.mul.Tensor else None
    product = is_product(e, x)
    if not math.isfinite(number) or number == 0 or not (power_of_two(node.args[1]) or product):
        return None
    if inner is not None and math.isfinite(inner[0] * number):
        number, x = inner[0] * number, inner[1]
    if (node.target, node.args) == (aten.mul.Tensor, (x, number)):
        return None
    return e.call(node, aten.mul.Tensor, x, number, val=node.meta["val"])


def round_scales(e: Editor) -> int:
    """Scales of products keep 15 digits, so that 8 ** -0.5 and 1 / sqrt(8) are one; how many changed."""
    changed = 0
    for node in e.graph.nodes:
        if node.target is not aten.mul.Tensor or not isinstance(node.args[1], float):
            continue
        e.regions = node.meta["regions"]
        number = float(f"{node.args[1]:.15g}")
        if number != node.args[1] and e.at(node) and is_product(e, node.args[0]):
            node.update_arg(1, number)
            changed += 1
    return changed


# -- einsum ----------------------------------------------------------------------------------------


@on(aten.einsum.default)
def einsum(e: Editor, node: fx.Node) -> fx.Node | None:
    """An einsum of one or two operands is permutes, reshapes and one product."""
    equation, operands = node.args[:2]
    terms = _letters(equation.replace(" ", ""), [rank(o) for o in operands], rank(node))
    if terms is None or len(operands) > 2 or any(len(set(t)) != len(t) for t in terms[0]):
        return None
    inputs, out = terms
    size: dict[str, sympy.Expr] = {}
    for term, operand in zip(inputs, operands, strict=True):
        for c, s in zip(term, e.shape(operand), strict=True):
            if size.setdefault(c, s) != s:
                return None  # a size of 1 that broadcasts
    values: list[fx.Node] = []
    for i, (term, operand) in enumerate(zip(inputs, operands, strict=True)):
        others = set(out).union(*(inputs[:i] + inputs[i + 1 :]))
        lost = [d for d, c in enumerate(term) if c not in others]
        if lost:
            operand = e.call(node, aten.sum.dim_IntList, operand, lost)
        inputs[i] = [c for c in term if c in others]
        values.append(operand)
    if len(values) == 1:
        return _permuted(e, node, values[0], inputs[0], out)
    if _turned(e, values, inputs, out):
        values.reverse()
        inputs.reverse()
    return _contract(e, node, values, inputs, out, size)


def _turned(e: Editor, values: list[fx.Node], inputs: list[list[str]], out: list[str]) -> bool:
    """Whether the operands change places: a weight stands right, else the order of the result counts."""
    a, b = inputs
    first_weight, second_weight = (e.from_state(v) for v in values)
    if first_weight != second_weight:
        return first_weight
    rows, columns = ([out.index(c) for c in t if c in out and c not in u] for t, u in ((a, b), (b, a)))
    return bool(rows and columns) and min(columns) < min(rows)


def _letters(equation: str, ranks: list[int], out_rank: int) -> tuple[list[list[str]], list[str]] | None:
    """The terms of an equation, its ellipses spelled out in Greek letters."""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        right = "..." * ("..." in left) + "".join(sorted(c for c in letters if letters.count(c) == 1))
    wide = max((r - len(t) + 3 for t, r in zip(terms, ranks, strict=True) if "..." in t), default=0)

    def spell(term: str, count: int) -> list[str]:
        before, dots, after = term.partition("...")
        return [*before, *([chr(0x391 + i) for i in range(wide - count, wide)] if dots else []), *after]

    inputs = [spell(t, r - len(t) + 3) for t, r in zip(terms, ranks, strict=True)]
    out = spell(right, wide)
    if len(out) != out_rank or any(len(t) != r for t, r in zip(inputs, ranks, strict=True)):
        return None
    return inputs, out


def _permuted(e: Editor, node: fx.Node, x: fx.Node, have: list[str], want: list[str]) -> fx.Node:
    if have == want:
        return x
    return e.call(node, aten.permute.default, x, [have.index(c) for c in want])


def _contract(
    e: Editor, node: fx.Node, values: list[fx.Node], inputs: list[list[str]], out: list[str],
    size: dict[str, sympy.Expr],
) -> fx.Node | None:  # fmt: skip
    a, b = inputs
    batch = [c for c in out if c in a and c in b]
    summed = [c for c in a if c in b and c not in out]
    rows = [c for c in a if c not in b]
    columns = [c for c in b if c not in a]
    if not summed:
        return _outer(e, node, values, inputs, out)
    flat = len(rows) != 1 and bool(batch or not rows)
    plan = (
        (values[0], a, [batch, rows, summed], [False, flat, True]),
        (values[1], b, [batch, summed, columns], [False, True, True]),
    )
    sides = []
    for x, have, groups, merged in plan:
        turned = _permuted(e, node, x, have, [c for g in groups for c in g])
        side = _grouped(e, node, turned, groups, merged, size)
        if side is None:
            return None
        sides.append(side)
    product = e.call(node, aten.matmul.default, *sides)
    have = [*batch, *rows, *columns]
    if flat or len(columns) != 1:
        sizes = e.sizes([size[c] for c in have])
        if sizes is None:
            return None
        product = e.call(node, aten.reshape.default, product, sizes)
    return _permuted(e, node, product, have, out)


def _grouped(
    e: Editor, node: fx.Node, x: fx.Node, groups: list[list[str]], merged: list[bool],
    size: dict[str, sympy.Expr],
) -> fx.Node | None:  # fmt: skip
    """`x` with the letters of each group that is to be merged made one dimension."""
    shape: list[sympy.Expr] = []
    for group, one in zip(groups, merged, strict=True):
        shape += [sympy.Mul(*(size[c] for c in group))] if one else [size[c] for c in group]
    if tuple(shape) == e.shape(x):
        return x
    sizes = e.sizes(shape)
    return None if sizes is None else e.call(node, aten.reshape.default, x, sizes)


def _outer(
    e: Editor, node: fx.Node, values: list[fx.Node], inputs: list[list[str]], out: list[str]
) -> fx.Node:
    """Nothing is summed: a product elementwise, each operand unsqueezed where it lacks a dimension."""
    sides = []
    for x, have in zip(values, inputs, strict=True):
        x = _permuted(e, node, x, have, [c for c in out if c in have])
        for d, c in enumerate(out):
            if c not in have:
                x = e.call(node, aten.unsqueeze.default, x, d)
        sides.append(x)
    return e.call(node, aten.mul.Tensor, *sides, val=node.meta["val"])
