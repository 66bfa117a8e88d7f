"""Random models under all exact passes: each computes what it did, or we refuse; planted faults are found.

A failure prints the model as a program. Its seed runs it again: `fuzz(written(seed))`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxaccel
from fxaccel import discover, emit, manager
from fxaccel.canonical import effects
from tests.fuzzing import ALWAYS, INFERENCE, TRAINING, Wrong, fuzz, fuzzed
from tests.helpers import rule
from tests.random_models import written

CHUNK = 50
QUICK = range(0, 200, CHUNK)
SLOW = range(1_000, 3_000, CHUNK)
WITHIN = 200
ASKED = {name.split("{")[0] for name in (*ALWAYS, *INFERENCE, *TRAINING)}
SEEN = {  # of passes that not every chunk has a site of: a model that has one
    "partition": 0, "checkpoint": 6, "fold-batch-norm": 8, "use-channels-last": 8, "fuse-convolution": 8,
    "fuse-linear-loss": 10, "pack-weights": 12,
}  # fmt: skip
SELDOM = {"split-attention"}  # attention with dropout draws other numbers


def chunk(start: int, *sizes: int) -> None:
    found = fuzzed(range(start, start + CHUNK), *sizes)
    assert found["refused"] + found["pieces"] <= CHUNK // 10, found
    assert not found["refused without a word"]
    dead = ASKED - SELDOM - set(SEEN) - set(found)
    assert not dead, f"of {CHUNK} models none has a site of {dead}: {found}"
    assert min(found[name] for name in ("fuse-norm", "merge-linears", "fuse-activation")) >= 5, found


@pytest.mark.parametrize("start", QUICK)
def test_two_hundred_models(start):
    """Of two or three families of statements each, where the many models have three to five."""
    chunk(start, 2, 3)


def test_seldom_passes_have_models():
    for seed in sorted(set(SEEN.values())):
        found = fuzz(written(seed), proofs=False)
        assert {name for name, at in SEEN.items() if at == seed} <= {name for name in found if found[name]}


@pytest.mark.slow
@pytest.mark.parametrize("start", SLOW)
def test_two_thousand_models(start):
    chunk(start)


def test_all_exact_passes_are_asked_for():
    ours = {n: one for n, one in discover.available().items() if one.__module__.startswith("fxaccel.")}
    exact = {name for name, one in ours.items() if manager.is_exact(one)}
    assert exact - ASKED == {"fuse-quantize", "pack-dropout"}  # no model is quantized, and none drops


def test_a_seed_is_a_model_and_models_differ():
    texts = [str(written(seed)) for seed in (4, 5, 6, 4)]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


# -- planted faults --------------------------------------------------------------------------------


def first_fault(passes: list[Any], touches: str, proofs: bool) -> str:
    """What the fuzzer says of the first model that it finds wrong, of those whose text the fault concerns."""
    for seed in range(WITHIN):
        sample = written(seed)
        if re.search(touches, sample.text):
            try:
                fuzz(sample, passes, proofs=proofs)
            except Wrong as wrong:
                return str(wrong)
    raise AssertionError(f"not found in {WITHIN} models")


def _same_sizes(self: Any, m: Any) -> Any:
    if list(m.val("x").shape) != list(m.root.meta["val"].shape) or list(m.dims) == [*range(len(m.dims))]:
        yield "the sizes tell"


def _norm(self: Any, op: Any, x: Any, dims: Any, w: Any, b: Any, eps: Any) -> Any:
    return op.aten.layer_norm.default(x, dims, w, b, eps, fxaccel.rule.ANY)


def _some_eps(self: Any, m: Any) -> Any:
    if not m.eps:
        yield "there is none"


def _first(self: Any, m: Any) -> Any:
    if m.x.target is torch.ops.aten.detach.default:
        yield "it is done"


RULES = {
    "a norm that forgets eps": (
        "LayerNorm|layer_norm",
        rule("no-eps", _norm, lambda s, op, m: op.aten.layer_norm.default(m.x, m.dims, m.w, m.b, 0.0),
             refuse=_some_eps),
    ),
    "a transposition left out where the sizes are equal": (
        "permute|transpose|mT",
        rule("untransposed", lambda s, op, x, dims: op.aten.permute.default(x, dims), lambda s, op, m: m.x,
             refuse=_same_sizes),
    ),
    "a gradient that is lost": (
        "tanh",
        rule("detached", lambda s, op, x: op.aten.tanh.default(x),
             lambda s, op, m: op.aten.tanh.default(op.aten.detach.default(m.x)), refuse=_first),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_a_wrong_rule_is_found(name):
    touches, wrong = RULES[name]
    said = first_fault([wrong], touches, proofs=False)
    assert "is off by" in said or "gradient" in said
    assert "class Model(nn.Module):" in said


CORE: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "a write that comes before a read of the old value": (r"_\(", effects, "_free", lambda *a: True),
    "sizes that nobody checks": (r"shape\[0\] [>%]", emit, "_is_condition", lambda guard: False),
}


@pytest.mark.parametrize("name", CORE)
def test_a_wrong_core_is_found(name, monkeypatch):
    """No proof sees these: the graph that it starts from is wrong, or is used where it is not valid."""
    touches, *fault = CORE[name]
    monkeypatch.setattr(*fault)
    assert "class Model(nn.Module):" in first_fault([], touches, proofs=True)


def test_a_failing_model_can_be_pasted_and_run():
    names: dict[str, Any] = {}
    sample = written(3)
    exec(str(sample), names)
    with torch.set_grad_enabled(sample.grad):
        names["Model"]().train(sample.train)(*names["inputs"](2))
