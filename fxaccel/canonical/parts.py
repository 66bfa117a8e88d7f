"""Steps on taking parts of a value: split, unbind, slice and select."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fxaccel.canonical.editor import Editor, aten, on
from fxaccel.canonical.values import rank

_SPLITS = (aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
           aten.tensor_split.sections, aten.unsafe_chunk.default, aten.unsafe_split.Tensor)  # fmt: skip
_PARTS_LIMIT = 64  # readers of one value beyond which its slices are not looked over for a split


def _dim(node: fx.Node, i: int) -> int:
    """Argument `i`, a dimension that defaults to 0."""
    return node.args[i] if len(node.args) > i else 0


@on(*_SPLITS, autocast=True)
def splitting(e: Editor, node: fx.Node) -> fx.Node | None:
    """Parts all used are `split.Tensor` if equal, else `split_with_sizes`; other parts are slices."""
    x, d = node.args[0], _dim(node, 2)
    widths = [e.shape_of(v)[d] for v in node.meta["val"]]
    used = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    if not all(w.is_Integer for w in widths) or len(used) != len(node.users) or not used:
        return None
    sizes = [int(w) for w in widths]
    if len(used) == len(sizes) > 1:
        target, how = _split_form(sizes)
        want = (x, how, d) if d else (x, how)
        if node.target is target and node.args == want:
            return None
        return e.call(node, target, *want, val=node.meta["val"])
    for i, part in used.items():
        if part.meta["regions"] != node.meta["regions"] or e.storage.frozen(part):
            return None
        start = sum(sizes[:i])
        e.replace(part, e.call(part, aten.slice.Tensor, x, d, start, start + sizes[i], val=part.meta["val"]))
    return node


def _split_form(sizes: list[int]) -> tuple[Any, Any]:
    if len(set(sizes)) == 1:
        return aten.split.Tensor, sizes[0]
    return aten.split_with_sizes.default, sizes


@on(aten.slice.Tensor, aten.narrow.default, autocast=True)
def slicing(e: Editor, node: fx.Node) -> fx.Node | None:
    """Slices count from the front, end at the size at most, and are gone where they take everything."""
    x, d = node.args[0], _dim(node, 1)
    start, end, step = _bounds(node)
    size = e.shape(x)[d]
    if not all(isinstance(b, int) for b in (start, end, step)):
        whole = start == 0 and step == 1 and isinstance(end, fx.Node) and e.shape(node)[d] == size
        if whole or step is None:
            return e.forward(node, x) if whole else None
        args = (x, d, start, end) if step == 1 else (x, d, start, end, step)
        same = node.target is aten.slice.Tensor and node.args == args
        return None if same else e.call(node, aten.slice.Tensor, *args, val=node.meta["val"])
    if size.is_Integer:
        n = int(size)
        start, end = (min(max(b + n if b < 0 else b, 0), n) for b in (start, end))
        everything = (start, step) == (0, 1) and end == n
    else:
        n = None
        everything = (start, step) == (0, 1) and end >= 2**31
    if everything:
        return e.forward(node, x)
    if e.at(x, aten.slice.Tensor) and _dim(x, 1) == d and n is not None and step == 1:
        first, _, inner = _bounds(x)
        if inner == 1 and isinstance(first, int) and first >= 0:
            x, start, end = x.args[0], start + first, end + first
            outer = e.shape(x)[d]
            n = int(outer) if outer.is_Integer else None
    return _slice(e, node, x, (d, start, end, step), n)


def _slice(e: Editor, node: fx.Node, x: fx.Node, where: tuple[int, ...], n: int | None) -> fx.Node | None:
    d, start, end, step = where
    args: list[Any] = [d, start, end, step]
    if step == 1:
        args.pop()
        if end == n or end >= 2**62:
            args.pop()
    if args == [0, 0]:
        args = []
    if node.target is aten.slice.Tensor and list(node.args[1:]) == args and node.args[0] is x:
        return None
    return e.call(node, aten.slice.Tensor, x, *args, val=node.meta["val"])


def _bounds(node: fx.Node) -> tuple[Any, Any, Any]:
    if node.target is aten.narrow.default:
        _, _, start, length = node.args
        if not isinstance(start, int) or not isinstance(length, int):
            return start, length, None
        if start < 0:
            size = node.args[0].meta["val"].shape[node.args[1]]
            return (start + size, start + size + length, 1) if isinstance(size, int) else (None, None, None)
        return start, start + length, 1
    given = [*node.args[2:], None, None, None]
    start = 0 if given[0] is None else given[0]
    end = 2**63 - 1 if given[1] is None else given[1]
    return start, end, 1 if given[2] is None else given[2]


@on(aten.slice.Tensor, autocast=True)
def slices_to_split(e: Editor, node: fx.Node) -> fx.Node | None:
    """Slices that together are a whole dimension are a split."""
    x, d = node.args[0], _dim(node, 1)
    size = e.shape(x)[d]
    if not size.is_Integer or len(x.users) > _PARTS_LIMIT or _bounds(node)[0] != 0:
        return None
    parts: dict[int, fx.Node] = {}
    for user in x.users:
        if e.at(user, aten.slice.Tensor) and user.args[0] is x and _dim(user, 1) == d:
            start, _, step = _bounds(user)
            if step == 1 and isinstance(start, int) and parts.setdefault(start, user) is not user:
                return None
    sizes, end = [], 0
    for start in sorted(parts):
        width = e.shape(parts[start])[d]
        if start != end or not width.is_Integer:
            return None
        sizes.append(int(width))
        end += int(width)
    if end != int(size) or len(sizes) < 2:
        return None
    target, how = _split_form(sizes)
    return _take_apart(e, node, [parts[s] for s in sorted(parts)], target, (x, how, d) if d else (x, how))


def _take_apart(
    e: Editor, node: fx.Node, parts: list[fx.Node], target: Any, args: tuple[Any, ...]
) -> fx.Node:
    """Make one call of several results in the place of `parts`, of which `node` is one."""
    first = min(parts)
    whole = e.call(first, target, *args, val=[p.meta["val"] for p in parts])
    result = None
    for i, part in enumerate(parts):
        piece = e.call(first, operator.getitem, whole, i, val=part.meta["val"])
        if part is node:
            result = piece
        else:
            e.replace(part, piece)
    assert result is not None, "the node is one of the parts"
    return result


@on(aten.unbind.int, autocast=True)
def unbinding(e: Editor, node: fx.Node) -> fx.Node | None:
    """Elements along a dimension are `unbind` where all are used, else `select`."""
    x, d = node.args[0], _dim(node, 1)
    used = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    if len(used) != len(node.users) or not used or len(used) == len(node.meta["val"]) > 1:
        return None
    for i, part in used.items():
        if part.meta["regions"] != node.meta["regions"] or e.storage.frozen(part):
            return None
        e.replace(part, e.call(part, aten.select.int, x, d, i, val=part.meta["val"]))
    return node


@on(aten.select.int, autocast=True)
def selecting(e: Editor, node: fx.Node) -> fx.Node | None:
    """`select` counts from the front; selects of every element are `unbind`."""
    x, d, i = node.args
    size = e.shape(x)[d]
    if not isinstance(i, int) or not size.is_Integer or int(size) == 0:
        return None
    if i < 0:
        return e.call(node, aten.select.int, x, d, i + int(size), val=node.meta["val"])
    if i != 0 or len(x.users) > _PARTS_LIMIT or int(size) < 2:
        return None
    parts: dict[int, fx.Node] = {}
    for user in x.users:
        taken = e.at(user, aten.select.int) and user.args[1] == d and isinstance(user.args[2], int)
        if taken and parts.setdefault(user.args[2] % int(size), user) is not user:
            return None
    if len(parts) != int(size):
        return None
    return _take_apart(e, node, [parts[k] for k in sorted(parts)], aten.unbind.int, (x, d) if d else (x,))


@on(aten.glu.default)
def gated(e: Editor, node: fx.Node) -> fx.Node | None:
    """`glu(x)` is one half of x times the sigmoid of the other."""
    x, d = node.args[0], _dim(node, 1) if len(node.args) > 1 else rank(node.args[0]) - 1
    size = e.shape(x)[d]
    if not size.is_Integer:
        return None
    whole = e.call(node, aten.split.Tensor, x, int(size) // 2, *([d] if d else []))
    first, second = (e.call(node, operator.getitem, whole, i, val=whole.meta["val"][i]) for i in (0, 1))
    gate = e.call(node, aten.sigmoid.default, second, val=node.meta["val"])
    return e.call(node, aten.mul.Tensor, first, gate, val=node.meta["val"])
