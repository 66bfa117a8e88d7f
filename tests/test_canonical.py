"""The canonical form: spellings collapse to one listing and near spellings do not."""

from __future__ import annotations

import pytest
import torch

from fxaccel.ir import Program
from fxaccel.listing import lines, listing
from tests import spellings_attention  # noqa: F401  (adds to the table)
from tests.canonical_checks import check, inputs_of, text
from tests.spellings import IDIOMS, Function, Idiom, Written

FORMS: dict[str, str] = {}


def canonical(idiom: Idiom, function: Function) -> Program:
    torch.manual_seed(0)
    return check(Written(function, idiom.state), inputs_of(idiom.inputs))


def form(idiom: Idiom) -> str:
    """The canonical form of the first spelling."""
    if idiom.name not in FORMS:
        FORMS[idiom.name] = text(canonical(idiom, idiom.same[0]))
    return FORMS[idiom.name]


def cases(kind: str):
    """Every other one of an idiom; the rest is slow."""
    return [
        pytest.param(i, f, id=f"{i.name}-{n}", marks=[pytest.mark.slow] * (n % 2))
        for i in IDIOMS
        for n, f in enumerate(getattr(i, kind))
    ]


@pytest.mark.parametrize(("idiom", "function"), cases("same"))
def test_spellings_collapse(idiom: Idiom, function: Function):
    program = canonical(idiom, function)
    assert text(program) == form(idiom)
    found = [line.op for _, line in lines(program)]
    for op in idiom.ops:
        assert any(op == f.split(".")[1] for f in found), f"no {op} in\n{listing(program)}"


@pytest.mark.parametrize(("idiom", "function"), cases("other"))
def test_near_spellings_stay_apart(idiom: Idiom, function: Function):
    assert text(canonical(idiom, function)) != form(idiom)


def test_enough_spellings():
    assert len(IDIOMS) >= 14
    assert sum(len(i.same) for i in IDIOMS) >= 80
    assert sum(len(i.other) for i in IDIOMS) >= 40
