"""Tensors that are made first and filled part by part afterwards are the concatenation of the parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from fxaccel.canonical.editor import Editor, aten
from fxaccel.canonical.effects import any_layout, take_over
from fxaccel.canonical.values import dtype, is_tensor, same_strides
from fxaccel.ir import arguments, expr, is_call

_MADE = {"empty", "zeros", "ones", "full"}  # what is in it does not matter: every element is written to
_TAKEN = {aten.slice.Tensor, aten.narrow.default, aten.select.int}


@dataclass(frozen=True)
class _Part:
    """`view = base[start : start + length]` along `dim`, and the `copy_` of `source` into it."""

    view: fx.Node
    write: fx.Node
    source: fx.Node
    dim: int
    start: sympy.Expr
    length: sympy.Expr


def put_together(e: Editor) -> int:
    """A new tensor whose parts along one dimension are all copied in is `cat` of the parts; how many."""
    if not e.storage.last_write:
        return 0
    roots = {e.storage.root(n) for n in e.storage.last_write}
    made = [n for n in e.graph.nodes if _is_made(n) and len(n.users) > 2 and e.storage.root(n) in roots]
    return sum(_join(e, base) for base in made)


def _is_made(node: fx.Node) -> bool:
    name = getattr(node.target, "_opname", "") if is_call(node) else ""
    if node.kwargs.get("pin_memory"):
        return False
    return name.removeprefix("new_").removesuffix("_like").removesuffix("_strided") in _MADE


def _join(e: Editor, base: fx.Node) -> bool:
    """Replace `base` by the concatenation of what is copied into it; whether it is one."""
    parts = _parts(e, base)
    if parts is None:
        return False
    last = max(p.write for p in parts)
    pieces = [_piece(e, last, p) for p in parts]
    known = [p for p in pieces if p is not None]
    new = e.call(last, aten.cat.default, known, parts[0].dim) if len(known) == len(pieces) else None
    old = base.meta["val"]
    if new is None or not (same_strides(new.meta["val"], old) or any_layout(e, last, base, new.meta["val"])):
        for made in known if new is None else (new,):
            _drop(e, made, parts)
        return False
    e.storage.unite(new, base)
    take_over(last, base, new)
    for p in parts:
        e.graph.erase_node(p.write)
        e.graph.erase_node(p.view)
    e.erase(base)
    return True


def _drop(e: Editor, node: fx.Node, parts: list[_Part]) -> None:
    """Erase what was made for nothing."""
    if node not in {p.source for p in parts}:
        e.erase(node)


def _parts(e: Editor, base: fx.Node) -> list[_Part] | None:
    """The parts in order, None where they are not the whole of `base` or anything but them is read before."""
    found: dict[sympy.Expr, _Part] = {}
    readers = []
    for user in base.users:
        part = _part(e, user, base)
        if part is None:
            readers.append(user)
        elif found.setdefault(part.start, part) is not part:
            return None
    if len(found) < 2:
        return None
    last = max(p.write for p in found.values())
    if any(not last < r for r in readers):
        return None
    where = {(p.dim, p.write.meta.get("regions", ())) for p in found.values()}
    if len(where) > 1 or any(_changes(e, p, base, last) for p in found.values()):
        return None
    size, at = e.shape(base)[next(iter(where))[0]], sympy.Integer(0)
    ordered = []
    while at in found:
        part = found.pop(at)
        ordered.append(part)
        at = at + part.length
    return ordered if not found and at == size else None


def _part(e: Editor, view: fx.Node, base: fx.Node) -> _Part | None:
    """The part of `base` that `view` is, if all that happens to it is that it is copied to as a whole."""
    if view.target not in _TAKEN or len(view.users) != 1:
        return None
    (write,) = view.users
    if write.target is not aten.copy_.default or write.users or write.args[0] is not view:
        return None
    source = write.args[1]
    if not is_tensor(source) or source.meta["val"].device != view.meta["val"].device:
        return None
    bound = arguments(view)
    dim = bound["dim"] % base.meta["val"].dim()
    size = e.shape(base)[dim]
    start = bound["index"] if view.target is aten.select.int else bound["start"]
    start = _value(0 if start is None else start)
    if start is None or bound.get("step", 1) != 1:
        return None
    length = sympy.Integer(1) if view.target is aten.select.int else e.shape(view)[dim]
    return _Part(view, write, source, dim, start + size if start.is_negative else start, length)


def _value(size: Any) -> sympy.Expr | None:
    """An argument that is a number or the node of a size."""
    value = size.meta.get("val") if isinstance(size, fx.Node) else size
    return None if hasattr(value, "shape") or value is None else expr(value)


def _changes(e: Editor, part: _Part, base: fx.Node, last: fx.Node) -> bool:
    """Whether `source` is, or could be, something else at `last` than where it is copied."""
    root = e.storage.root(part.source)
    write = e.storage.last_write.get(root)
    return root is e.storage.root(base) or (write is not None and not write < part.write)


def _piece(e: Editor, like: fx.Node, part: _Part) -> fx.Node | None:
    """What `view` holds after the copy, as a value of its own; None where its sizes are nowhere."""
    piece, wanted = part.source, dtype(part.view)
    if dtype(piece) is not wanted:
        if dtype(piece).is_complex or wanted.is_complex:
            return None
        piece = e.call(like, aten.to.dtype, piece, wanted)
    old, new = e.shape(piece), e.shape(part.view)
    if old != new:
        if len(old) > len(new):
            return None
        kept = [None] * (len(new) - len(old)) + list(old)
        changed = [b for a, b in zip(kept, new, strict=True) if a != b]
        if any(not b.is_Integer and not (b.is_Symbol and str(b) in e.program.sizes) for b in changed):
            return None
        sizes = [
            -1 if a == b else int(b) if b.is_Integer else e.size(b) for a, b in zip(kept, new, strict=True)
        ]
        if None in sizes:
            return None
        piece = e.call(like, aten.expand.default, piece, sizes)
    if part.view.target is aten.select.int:
        piece = e.call(like, aten.unsqueeze.default, piece, part.dim)
    return piece
