"""What fuse-attention shows in a page: the masks of its calls, evaluated on the indices of queries and keys.

What a mask reads from a tensor is data, which no graph knows: both answers are tried for each comparison
that reads any, so a key is seen, hidden, or left to data (`bounded`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from torch import fx

from fxaccel import svg
from fxaccel.ir import Program, number, path
from fxaccel.kernels import _score
from fxaccel.picture import Picture

MOST = 64  # rows and columns of a picture
DATA = frozenset(_score.TABLES)
TRUE, FALSE = "(0 == 0)", "(0 != 0)"


def pictures(program: Program) -> Iterator[Picture]:
    """One for each kind of mask and sizes."""
    groups: dict[tuple[str, int, int], list[fx.Node]] = {}
    for node in program.graph.nodes:
        name = str(node.target) if node.op == "call_function" else ""
        if name == "fxaccel.attention.default" and node.args[4]:
            q, k = (node.args[i].meta["val"].shape[-2] for i in (0, 1))
            key = node.args[4], number(q, program.hints), number(k, program.hints)
            groups.setdefault(key, []).append(node)
    for (mask, S, T), nodes in groups.items():
        where = dict.fromkeys(path(n) or "(root)" for n in nodes)
        yield picture(mask, S, T, list(where))


def picture(mask: str, S: int, T: int, where: Sequence[str]) -> Picture:
    """A mask over S queries and T keys; where: modules that have it."""
    q, k = range(0, S, -(-S // MOST)), range(0, T, -(-T // MOST))
    every = "" if q.step == k.step == 1 else f", every {_th(q.step)} query and {_th(k.step)} key"
    lines = [
        f"A row for each of {S} queries, a column for each of {T} keys{every}.",
        "Blue is seen, grey is hidden" + (", amber is left to data." if _score.names(mask) & DATA else "."),
        f"In {', '.join(where[:3])}" + (f" and {len(where) - 3} more." if len(where) > 3 else "."),
    ]
    return Picture(f"Mask {mask}", svg.mask(cells(mask, S, T, q, k)), lines)


def _th(number: int) -> str:
    return {1: "", 2: "second", 3: "third"}.get(number, f"{number}th")


def cells(mask: str, S: int, T: int, q: range, k: range) -> list[str]:
    """A row of # (seen), ? (left to data) and . (hidden) for each query, of the first batch and head."""
    tree = _score.parse(mask)
    least, most = (ast.unparse(bounded(tree, truth)) for truth in (False, True))

    def row(text: str, i: int) -> list[bool]:
        found = _score.evaluate(text, (), 1, 1, S, T, q=range(i, i + 1))
        return found.expand(1, 1, 1, T)[0, 0, 0, :: k.step].tolist()

    both = ((row(least, i), row(most, i)) for i in q)
    return ["".join("#" if s else "?" if p else "." for s, p in zip(*pair, strict=True)) for pair in both]


def bounded(node: ast.expr, most: bool) -> ast.expr:
    """The condition with each part that reads a table at what makes the whole true most, or least, often."""
    match node:
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr() as op, left=left, right=right):
            return ast.BinOp(bounded(left, most), op, bounded(right, most))
        case ast.UnaryOp(op=ast.Invert() as op, operand=operand):
            return ast.UnaryOp(op, bounded(operand, not most))
    if _score.names(ast.unparse(node)) & DATA:
        return _score.parse(TRUE if most else FALSE)
    return node
