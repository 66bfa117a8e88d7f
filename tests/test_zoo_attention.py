"""Every attention of every layer of the zoo's models is raised by fuse-attention, as the kind that it is.

The kinds are those of `tests/zoo/attention_sites.py`: a decoder's must be proved causal, grouped heads must
stay grouped. How many there are is held to the model, not to the pass: to the softmaxes that it calls, and to
its config. None is left over, refused or a near miss, and `accelerate` itself compares the outputs with the
original's, by a tolerance from float64.
"""

import gc
import logging
import random
import warnings
from collections import Counter

import numpy
import pytest
import torch
from torch.overrides import TorchFunctionMode

import fxaccel
from tests.zoo.torchvision_shim import importable

with importable():
    small = pytest.importorskip("tests.zoo.transformers_small")
    from tests.zoo import attention_sites as table
    from tests.zoo import transformers_perception, transformers_text, transformers_zoo

PASS = "fuse-attention"
TABLES = transformers_text.TABLES + transformers_perception.TABLES
SPECS = {name: spec for _, specs, _ in TABLES for name, spec in specs.items()}
ENTRIES = {e.name: e for e in transformers_zoo.entries()}
DECODERS = [n for n, e in ENTRIES.items() if e.family in ("decoder", "moe", "recurrent") and n in table.SITES]
QUICK = ("llama eager", "bloom eager")
PAIRS = [n for n, kinds in table.SITES.items() if kinds in (table.PAIRED, table.SPOKEN, table.RELATIVE)]
# Decoders that have attention in some of their layers alone.
MIXED = ("lfm2", "recurrent_gemma", "jamba", "zamba2")


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def seed():
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


class Calls(TorchFunctionMode):
    """Counts the attentions that a model calls: softmaxes over keys (a router's have two dimensions)."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), getattr(func, "__name__", "")
        if name == "softmax":
            dim = kwargs["dim"] if "dim" in kwargs else args[1]
            self.count += out.dim() > 2 and dim in (-1, out.dim() - 1)
        self.count += name in ("scaled_dot_product_attention", "multi_head_attention_forward")
        return out


def built(case):
    """The model, in its mode, and its inputs."""
    name, implementation, *form = case.split()
    seed()
    model, inputs = small.build(*SPECS[name], implementation), ENTRIES[name].inputs()
    if "unmasked" in form:
        del inputs["attention_mask"]
    return model.train("train" in form), inputs


def reported(model, inputs, **options):
    """The report of a call with this pass alone."""
    torch._dynamo.reset()
    gc.collect()  # the graphs of the model before
    with importable(), warnings.catch_warnings(), torch.set_grad_enabled(model.training):
        warnings.simplefilter("ignore")
        seed()
        fast = fxaccel.accelerate(model, passes=[PASS], **options)
        fast(**inputs)
    return fast.report()


def raised_whole(model, inputs, kinds):
    """Each attention became one of these kinds, none is left, and the check was made."""
    with importable(), warnings.catch_warnings(), torch.no_grad(), Calls() as calls:
        warnings.simplefilter("ignore")
        model(**inputs)
    assert calls.count == sum(kinds.values())
    report = reported(model, inputs, expect={PASS: sum(kinds.values())})
    done = report[PASS]
    assert not done.error
    assert Counter(s.why for s in done.applied) == kinds
    assert [s.why for s in (*done.refused, *done.near_misses)] == []
    (one,) = report.captures
    assert "checked against the model" in one.check, one.check


def left_for(model, inputs, reason):
    """Something is left, and the report has the reason."""
    done = reported(model, inputs)[PASS]
    reasons = [s.why for s in (*done.refused, *done.near_misses)] + [done.error]
    assert any(reason in why for why in reasons), reasons


@pytest.mark.parametrize("case", QUICK)
def test_a_few_models_are_raised_whole(case):
    raised_whole(*built(case), table.SITES[case.split()[0]])


@pytest.mark.slow
@pytest.mark.parametrize("case", table.cases(table.SITES))
def test_every_attention_of_a_model_is_raised(case):
    raised_whole(*built(case), table.SITES[case.split()[0]])


@pytest.mark.slow
@pytest.mark.parametrize("case", table.cases(table.UNMASKED, "unmasked"))
def test_a_decoder_without_a_mask_is_causal_alone(case):
    raised_whole(*built(case), table.UNMASKED[case.split()[0]])


@pytest.mark.slow
@pytest.mark.parametrize("case", table.TRAINED)
def test_a_model_in_training_is_raised_whole(case):
    raised_whole(*built(case), table.TRAINED[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", table.EXCEPTIONS)
def test_what_is_not_raised_whole_is_left_for_the_reason_in_the_table(case):
    left_for(*built(case), table.EXCEPTIONS[case])


def timm_built(name):
    try:
        with importable():
            import timm  # noqa: F401
    except (ImportError, RuntimeError):
        pytest.skip("timm is not installed")
    from tests.zoo import timm_zoo

    seed()
    (entry,) = [e for e in timm_zoo.entries() if e.name == f"timm_{name}"]
    return entry.build().eval(), entry.inputs()


@pytest.mark.slow
@pytest.mark.parametrize("name", table.TIMM)
def test_every_attention_of_a_vision_transformer_of_timm_is_raised(name):
    raised_whole(*timm_built(name), table.TIMM[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", table.TIMM_EXCEPTIONS)
def test_a_vision_transformer_of_timm_that_is_not_raised_whole_has_its_reason(name):
    left_for(*timm_built(name), table.TIMM_EXCEPTIONS[name])


def test_the_table_is_large_and_names_entries():
    assert len(table.SITES) >= 50
    named = {case.split()[0] for case in (*table.SITES, *table.UNMASKED, *table.EXCEPTIONS, *table.TRAINED)}
    assert named <= set(ENTRIES)
    eager_only = {n for n in named if not getattr(small.transformers, SPECS[n][0])._supports_sdpa}
    assert eager_only == table.EAGER_ONLY


def test_no_case_is_an_exception_and_raised():
    whole = {*table.cases(table.SITES), *table.cases(table.UNMASKED, "unmasked"), *table.TRAINED}
    assert not whole & table.EXCEPTIONS.keys()
    assert not table.TIMM.keys() & table.TIMM_EXCEPTIONS.keys()


def configured(name):
    class_name, options = SPECS[name]
    with importable():
        return small.small(getattr(small.transformers, class_name).config_class, options)


@pytest.mark.parametrize("name", DECODERS)
def test_the_table_has_every_layer_of_a_decoder_as_causal_and_grouped(name):
    """A table made from what a pass says could hold what it missed; this is what the config says."""
    config = configured(name)
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    kinds, bare = table.SITES[name], table.UNMASKED[name]
    if name not in MIXED:
        assert sum(kinds.values()) == config.num_hidden_layers * table.A_LAYER.get(name, 1)
    for kind in (*kinds, *bare):
        assert kind.startswith("causal")
        if groups not in (None, heads) and name not in table.NOT_GROUPED:
            assert f"{heads} query heads on {groups}" in kind
    assert all("key padding" in kind for kind in kinds)
    assert not any("key padding" in kind for kind in bare)


@pytest.mark.parametrize("name", PAIRS)
def test_the_table_has_every_layer_of_an_encoder_and_two_attentions_a_layer_of_its_decoder(name):
    config, kinds = configured(name).to_dict(), table.SITES[name]
    encoder = ("encoder_layers", "encoder_num_hidden_layers", "num_layers")
    decoder = ("decoder_layers", "decoder_num_hidden_layers", "num_decoder_layers")
    n, m = (next(config[field] for field in fields if field in config) for fields in (encoder, decoder))
    assert sum(kinds.values()) == n + 2 * m
    assert sum(count for kind, count in kinds.items() if kind.startswith("causal")) == m
