"""Calls on fake tensors that are worked out once give what they give when they are worked out each time."""

import gc

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxaccel.fakes import OWN, Fakes, signature, worked_out_once
from fxaccel.ir import expr
from fxaccel.memory import Ledger
from fxaccel.profile import profile
from tests.random_graphs import BATCH, LENGTH, WIDTH, Captured, RandomGraph

aten = torch.ops.aten
CALLS = {
    "new": lambda x, y: aten.add.Tensor(x, y),
    "permuted": lambda x, y: aten.relu.default(x.t()),
    "view": lambda x, y: aten.view.default(x, [12]),
    "no view by name": lambda x, y: aten._unsafe_view.default(x, [12]),
    "column": lambda x, y: aten.select.int(x, 1, 2),
    "parts": lambda x, y: aten.split.Tensor(x, 2),
    "several": lambda x, y: aten.native_layer_norm.default(x, [4], None, None, 1e-5),
    "written": lambda x, y: aten.add_.Tensor(x, y),
    "written by itself": lambda x, y: aten.mul_.Tensor(x, x),
    "list": lambda x, y: aten.cat.default([x, y, x], 1),
    "with None": lambda x, y: aten.native_layer_norm_backward.default(
        x, y, [4], torch.ones(3, 1), torch.ones(3, 1), None, None, [True, False, False]
    ),
    "type": lambda x, y: aten._to_copy.default(x, dtype=torch.bfloat16),
    "whole number": lambda x, y: aten.mul.Scalar(aten.arange.default(4), 2),
    "real number": lambda x, y: aten.mul.Scalar(aten.arange.default(4), 2.0),
    "other shape": lambda x, y: aten.unsqueeze_.default(x, 0),
    "other size": lambda x, y: aten.resize_.default(x, [8, 8]),
    "other type of view": lambda x, y: aten.view.dtype(x, torch.int32),
    "other storage": lambda x, y: aten.set_.source_Tensor(x, y),
    "put where there was nothing": lambda x, y: aten.add.out(x, y, out=torch.empty(0)),
    "not permuted": lambda x, y: aten.relu.default(x.view(4, 3)),
    "conjugate": lambda x, y: aten._conj.default(aten.complex.default(x, y)),
    "one wide": lambda x, y: aten.expand.default(aten.select.int(x, 1, 0), [2, 3]),
}


def described(made, given):
    """All that can be said of results."""
    found = []
    for one in made if isinstance(made, (tuple, list)) else [made]:
        if one is not None:
            storage = one.untyped_storage()
            over = [t.untyped_storage()._cdata == storage._cdata for t in given]
            found.append((one.shape, one.stride(), one.storage_offset(), one.dtype, one.device, one.is_conj(),
                          one.is_neg(), storage.nbytes(), over, [t is one for t in given]))  # fmt: skip
        else:
            found.append(None)
    return type(made) if isinstance(made, (tuple, list)) else None, found


def tried(fakes, call):
    with fakes:
        x, y = torch.ones(3, 4), torch.ones(3, 4)
        made = call(x, y)
    return described(made, (x, y)), described((x, y), ())


def test_a_call_gives_a_second_time_what_it_gave_first():
    ledger = Ledger()
    fakes, found = Fakes(ledger), list[object]()
    for _ in range(3):
        found += [(name, tried(fakes, call)) for name, call in CALLS.items()]
    assert found == 3 * [(name, tried(FakeTensorMode(), call)) for name, call in CALLS.items()]
    gc.collect()
    assert ledger.live == 0


def test_calls_are_worked_out_once():
    fakes = Fakes(Ledger())
    for _ in range(3):
        for name in ("new", "view", "no view by name", "several", "written", "list"):
            tried(fakes, CALLS[name])
    assert all(form is not None for form in fakes.forms.known.values())
    made = [key[0] for key in fakes.forms.known]
    assert made.count(aten.add_.Tensor) == made.count(aten.cat.default) == made.count(aten.view.default) == 1


def test_what_could_hold_memory_is_not_remembered():
    with Fakes(Ledger()):
        x, y = torch.ones(4), torch.ones(4)
    given = x, y.untyped_storage(), 0, [4], [1]
    assert signature(aten.set_.source_Storage_storage_offset, given, {}) is None


def test_calls_whose_arguments_share_a_storage_are_others():
    with Fakes(Ledger()) as fakes:
        x, y = torch.ones(4), torch.ones(4)
        for first, second in ((x, x), (x.view(4), x), (x, y), (y, x.detach())):
            assert aten.add_.Tensor(first, second) is first
    forms = [form for key, form in fakes.forms.known.items() if key[0] is aten.add_.Tensor]
    assert len(forms) == 3
    assert {form.results[0].same for form in forms} == {0}
    assert OWN not in {form.results[0].over for form in forms}


def test_the_profile_is_that_of_calls_worked_out_each_time(monkeypatch):
    step = Captured(RandomGraph(100), torch.randn(BATCH, LENGTH, WIDTH))
    monkeypatch.setattr("fxaccel.fakes.signature", lambda *call: None)
    assert profile(step.program) == step.profile


# -- symbolic sizes --------------------------------------------------------------------------------


def symbolic():
    """A mode with symbolic sizes, and two tensors of sizes [s, t]."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    duck = StatelessSymbolicContext([DimDynamic.DUCK] * 2)
    x, y = (
        mode.from_tensor(torch.ones(3, 4), symbolic_context=duck, source=ConstantSource(name))
        for name in ("x", "y")
    )
    assert [str(expr(s)) for s in (*x.shape, *y.shape)] == 2 * [str(expr(s)) for s in x.shape]
    return mode, x, y


def exprs(made, given):
    """All that can be said of results of symbolic sizes."""
    found = []
    for one in made if isinstance(made, (tuple, list)) else [made]:
        if one is not None:
            at = one.untyped_storage()._cdata
            sizes = [expr(s) for s in (*one.shape, *one.stride(), one.storage_offset())]
            over = [t.untyped_storage()._cdata == at for t in given]
            found.append((sizes, one.dtype, one.device, one.is_conj(), over, [t is one for t in given]))
    return found


SYMBOLIC = [n for n in CALLS if n not in ("view", "no view by name", "several", "with None", "other size",
                                          "put where there was nothing", "not permuted")]  # fmt: skip
SYMBOLIC_CALLS = {name: CALLS[name] for name in SYMBOLIC} | {
    "flat": lambda x, y: aten.view.default(x, [x.shape[0] * x.shape[1]]),
    "flat copy": lambda x, y: aten._unsafe_view.default(x, [-1]),
    "norm": lambda x, y: aten.native_layer_norm.default(x, [x.shape[1]], None, None, 1e-5),
    "row": lambda x, y: aten.arange.default(x.shape[1]),
    "half of it": lambda x, y: aten.slice.Tensor(x, 0, 0, x.shape[0] // 2),
}


@pytest.mark.parametrize("name", SYMBOLIC_CALLS)
def test_of_symbolic_sizes_too(name):
    call, found, worked = SYMBOLIC_CALLS[name], [], []
    mode, *inputs = symbolic()
    work = mode.dispatch
    mode.dispatch = lambda func, *a, **k: (worked.append(func), work(func, *a, **k))[1]
    with worked_out_once(mode), mode:
        for _ in range(3):
            x, y = (t.clone() for t in inputs)
            worked.clear()
            found.append((exprs(call(x, y), (x, y)), exprs((x, y), ())))
    guards = [g.expr for g in mode.shape_env.guards]
    mode, *inputs = symbolic()
    with mode:
        x, y = (t.clone() for t in inputs)
        assert found == 3 * [(exprs(call(x, y), (x, y)), exprs((x, y), ()))]
    assert guards == [g.expr for g in mode.shape_env.guards]
    others = {"other shape", "other storage", "other type of view", "conjugate"}
    assert name in others or not [f for f in worked if f.namespace != "prim"]


def test_sizes_that_depend_on_values_are_others_each_time():
    mode, x, _ = symbolic()
    with worked_out_once(mode), mode:
        first, second = (expr(aten.nonzero.default(x.clone()).shape[0]) for _ in range(2))
    assert first != second


def test_a_default_type_is_part_of_a_call():
    mode, x, _ = symbolic()
    with worked_out_once(mode), mode:
        made = []
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            made.append(aten.ones.default([x.shape[0]]).dtype)
    assert made == [torch.float32, torch.float64, torch.float32]


def test_the_mode_is_as_it_was_afterwards():
    mode, *_ = symbolic()
    before, enabled = mode.dispatch, mode.cache_enabled
    with pytest.raises(RuntimeError, match="reduction dim"), worked_out_once(mode), mode:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert (mode.dispatch, mode.cache_enabled) == (before, enabled)
