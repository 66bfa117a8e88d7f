"""Norms in every spelling are raised to one kernel each; what only looks like one stays, and says why."""

import pytest

import fxaccel
from fxaccel.listing import listing
from tests.helpers import thinned
from tests.passes.norm_look_alikes import LOOK_ALIKES
from tests.passes.norm_programs import PROGRAMS, B, Model, S, inputs
from tests.passes.test_attention_programs import assert_as_near_to_fp64


def accelerated(model, given, **options):
    return fxaccel.accelerate(model, passes=["fuse-norm"], example_inputs=given, **options)


def calls(fast):
    """Every line of the listing, the operator and its arguments."""
    (one,) = fast.__dict__["_fxaccel"].all
    lines = [line.split("#")[0].split(" = ")[-1].strip() for line in listing(one.program).splitlines()]
    return [line for line in lines if line]


@thinned(3, program=PROGRAMS)
def test_a_spelling_of_a_norm_becomes_one_kernel(program):
    model, given = Model(program.function, program.dtype, program.weights), inputs(program.dtype)
    fast = accelerated(model, given, expect={"fuse-norm": 1})
    found = calls(fast)
    assert [c for c in found if c.startswith("fxaccel.")] == [program.line]
    assert not [c for c in found if c.startswith(("aten.rsqrt", "aten.rms_norm", "aten.layer_norm"))]
    (one,) = fast.report().captures
    assert "checked against the model" in one.check or "in every bit" in one.check, one.check
    assert not one.passes[0].refused
    assert not one.passes[0].near_misses
    for sizes in ((B, S), (B + 1, S + 4)):
        assert_as_near_to_fp64(model, fast, inputs(program.dtype, *sizes, seed=1))
    assert len(fast.report().captures) == 1


def test_the_zoo_is_as_large_as_promised():
    assert len(PROGRAMS) >= 30
    assert len(LOOK_ALIKES) >= 20


@pytest.mark.filterwarnings("ignore:pass")
@thinned(2, name=LOOK_ALIKES)
def test_a_look_alike_keeps_its_meaning_and_its_reason_is_told(name):
    function, why, dtype, weights = LOOK_ALIKES[name]
    model = Model(function, dtype, weights)
    fast = accelerated(model, inputs(dtype))
    record = fast.report()["fuse-norm"]
    assert not record.error
    said = [s.why for s in (*record.refused, *record.near_misses)]
    if why == "":
        assert len(record.applied) == 1, said
    else:
        assert any(why in s for s in said), said
        assert not [c for c in calls(fast) if c.startswith("fxaccel.")]
    for seed in (0, 1):
        assert_as_near_to_fp64(model, fast, inputs(dtype, seed=seed))
