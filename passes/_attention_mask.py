"""What a model does to its scores before the softmax: masks proved, biases named.

Masks arrive as tensors: arange, comparisons, `where(allowed, 0, finfo.min)`, tril. `understand` takes each
as a function of (b, h, q, k) (fxaccel.indexing) and separates what decides whether a key is seen from what is
added to its score. A row without any key keeps the meaning it has as written (see `empty` in
fxaccel.kernels.attention), or the attention is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import sympy
import torch

from fxaccel.indexing import TRUE, Affine, Call, Read, Value, conjunction, negation, reads, rebuilt, symbols
from fxaccel.passes._attention_terms import (
    HUGE,
    MINUS_INFINITY,
    Fill,
    K,
    Mask,
    Problem,
    Q,
    Term,
    as_number,
    band,
    conjuncts,
    is_zero,
    sees_a_key,
    simplified,
)
from fxaccel.passes._attention_text import MAX_TABLES, Spelling, bare
from fxaccel.rule import Refusal

aten = torch.ops.aten


def as_fill(value: Value, whole: Value) -> tuple[Fill, Value] | None:
    """An added value as `where(keep, other, fill)`, a fill and the other value, if that is what it is."""
    if not (isinstance(value, Call) and value.target is aten.where.self):
        return None
    c, a, b = value.args
    if as_number(b) is None or (as_number(a) or 0) < (as_number(b) or 0):
        c, a, b = negation(c), b, a
    fill = as_number(b)
    if fill is None or not fill < 0:
        return None
    inner = as_fill(a, whole)
    if inner is not None and inner[0].value == fill:
        return replace(inner[0], keep=conjunction(c, inner[0].keep)), inner[1]
    return Fill(c, fill, True, whole), a


def understand(
    p: Problem, fills: Sequence[Fill], terms: Sequence[Term], without_key: str, sink: bool = False
) -> Mask:
    """The mask and the bias of scores with these fills and added terms.

    without_key   what a row of -inf gives, as written: "nan" or "zero"
    sink          a sink takes all the weight of a row without keys
    """
    hard, soft, rest = _sorted(p, fills, terms)
    keep, why, empty = simplified(_all((*hard, *soft)), p), list[str](), "zero"
    seen = sees_a_key(keep, p)
    if not seen and soft and not sink:
        empty, why = _without_key(p, hard, soft)
    elif not seen and hard:
        empty, why = _minus_infinity(hard, without_key)
    text = Spelling(p)
    mask = bare(text.spell(keep)) if keep != TRUE else ""
    bias = [text.term(t) for t in rest]
    if len(text.tables) > MAX_TABLES:
        text = Spelling(p)
        mask = bare(text.spell(keep)) if keep != TRUE else ""
        bias = [text.whole(t) for t in rest]
    if (keep != TRUE and not mask) or not all(b for b, _ in bias):
        why.append("what is done to the scores depends on sizes that the kernel has no words for")
    kinds = [*(() if keep == TRUE else _kinds(keep, p)), *(kind for _, kind in bias)]
    return Mask(
        mask, " + ".join(b for b, _ in bias), tuple(text.tables), empty, tuple(kinds), tuple(text.plain),
        seen, tuple(why),
    )  # fmt: skip


def _sorted(
    p: Problem, fills: Sequence[Fill], terms: Sequence[Term]
) -> tuple[list[Fill], list[Fill], list[Term]]:
    """Fills with -inf, fills with huge numbers, and terms that are added."""
    hard, soft, rest = list[Fill](), list[Fill](), list[Term]()
    for fill in fills:
        if not Spelling(p).spell(simplified(fill.keep, p)):
            fill = replace(fill, keep=fill.whole)
        (hard if fill.value == -math.inf else soft).append(fill)
    for term in terms:
        split = _split(p, term)
        if split is None:
            rest.append(term)
            continue
        for fill in split[0]:
            (hard if fill.value == -math.inf else soft).append(fill)
        rest += split[1]
    return hard, soft, rest


def _split(p: Problem, term: Term) -> tuple[list[Fill], list[Term]] | None:
    """A term as fills and summands that can all be spelled, None where it has to stay the tensor it is."""
    fills, left, text = list[Fill](), list[Value](), Spelling(p)
    for part in term.parts():
        found = as_fill(part, term.whole)
        if found is None or found[0].value > HUGE:
            left.append(part)
            continue
        fill, other = found
        if any(r.node in p.learned for r in reads(other)) and not sees_a_key(simplified(fill.keep, p), p):
            return None  # in a row without a key the gradient of `other` is not the kernel's
        if not text.spell(simplified(fill.keep, p)):
            return None
        fills.append(fill)
        left.append(other)
    left = [part for part in left if not is_zero(part)]
    if not all(text.part(part)[0] for part in left):
        return (fills, [term]) if not fills else None
    return fills, [Term(part, term.whole) for part in left]


def _all(fills: Sequence[Fill]) -> Value:
    keep: Value = TRUE
    for fill in fills:
        keep = conjunction(keep, fill.keep)
    return keep


def _minus_infinity(hard: Sequence[Fill], without_key: str) -> tuple[str, list[str]]:
    """What a row of -inf gives."""
    if without_key != "nan" or all(f.added for f in hard):
        return without_key, []
    if any(f.added for f in hard):
        why = "a row may see no key, for it has -inf added in one place and put in another"
        return "zero", [Refusal(why, MINUS_INFINITY)]
    return "nan_fill", []


def _without_key(p: Problem, hard: Sequence[Fill], soft: Sequence[Fill]) -> tuple[str, list[str]]:
    """What a row gives that may see no key, where huge numbers mean "not seen", and why it cannot be had."""
    fill, value = soft[0], min(f.value for f in soft)
    if len(soft) + len(hard) > 1:
        why = (
            f"a row may see no key, and then {len(hard) + len(soft)} masks, one of which fills with "
            f"{value:g}, leave some of its keys and not others"
        )
        return "zero", [Refusal(why, MINUS_INFINITY)]
    if fill.added and (value > -(2.0**100) or p.dtype is torch.float16):
        why = f"a row may see no key, and its scores then differ by what {value:g} does not absorb"
        return "zero", [Refusal(why, MINUS_INFINITY)]
    return "mean" if fill.added else "fill", []


def _kinds(keep: Value, p: Problem) -> Iterator[str]:
    """The words for a mask, a conjunct each."""
    for part in conjuncts(keep):
        yield _kind(part, p)


def _kind(part: Value, p: Problem) -> str:
    names = {str(s) for s in symbols(part)} & set("bhqk")
    if any(r.node is not None and {"q", "k"} <= {str(s) for s in symbols(r)} for r in reads(part)):
        return "a mask tensor"
    bound = band(part)
    if bound is not None:
        return _band_kind(*bound, p)
    if not isinstance(part, Call):
        return "key padding" if "q" not in names else "query padding"
    if list(reads(part)):
        if "q" not in names:
            return "key padding"
        if "k" not in names:
            return "query padding"
        same = part.target._opname == "eq"
        return "documents" if same and _same_but_index(*part.args) else "data of queries and keys"
    if part.target._opname == "bitwise_or":
        return " or ".join(_kind(a, p) for a in part.args)
    if part.target._opname == "eq":
        return "chunks"
    return "prefix" if names == {"k"} else "an index function"


def _band_kind(side: str, c: sympy.Expr, p: Problem) -> str:
    if side == "low":
        return f"window {1 - c}" if not c.free_symbols else f"keys from q - {-c}"
    if c == 0:
        return "causal"
    if sympy.expand(c - (p.t - p.s)) == 0:
        return "causal, bottom right"
    return f"keys up to q + {c}"


def _same_but_index(a: Value, b: Value) -> bool:
    swapped = rebuilt(
        a,
        lambda v: (
            Affine(v.of.subs({Q.of: K.of, K.of: Q.of}, simultaneous=True)) if isinstance(v, Affine) else v
        ),
    )
    if swapped == b:
        return True
    return isinstance(a, Read) and isinstance(b, Read)
