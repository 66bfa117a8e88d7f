"""Every architecture of the zoo, in eval and in train mode: captured, accelerated, and still what it was.

`accelerate` itself compares outputs, gradients and buffers with the model, by a tolerance from float64;
here that check must have been made, and no pass may have been dropped by it.
"""

import gc
import logging
import random
import warnings

import numpy
import pytest
import torch

import fxaccel
from fxaccel.pieces import Pieces
from tests.zoo.torchvision_shim import importable

with importable():
    transformers_zoo = pytest.importorskip("tests.zoo.transformers_zoo")

MODES = ("eval", "train")
QUICK = (  # the others, and these in the other mode, are slow
    ("gpt2", "train"), ("mixtral", "eval"), ("vit", "eval"), ("timm_resnet18", "train"), ("timm_vit", "eval"),
)  # fmt: skip
AUDIO = ("wav2vec2", "hubert", "wavlm", "sew", "sew_d", "unispeech", "data2vec_audio", "wav2vec2_conformer")
_LAYERDROP = "layers are skipped by a random number that Python compares"
_LABELS = "labels.max() >= vocab_size is a branch on values"
# By "name" or "name mode": what is no one graph, and why; it runs, in pieces.
IN_PIECES = {
    "longformer": "is_global_attn is a branch on values of the mask",
    "led": "is_global_attn is a branch on values of the mask",
    "prophetnet": "it asserts on values of input_ids",
    "encodec": "it branches on a length computed as a tensor",
    "vilt": "it interpolates to sizes computed from pixel_mask",
    "qwen2_vl": "it splits by lengths that are values of image_grid_thw",
    "switch_transformers": "the router casts its own classifier at each call",
    "yoso train": "its autograd.Function has a backward of its own, which export loses; the check sees it",
    "m2m_100 train": _LAYERDROP,
    "time_series train": _LAYERDROP,
    "timm_convit": "a buffer gets its shape at the first call",
    "detr train": "isfinite(hidden_states).all() is a branch on values",
    **{name: _LABELS for name in AUDIO},
}
# By "name" or "name mode": what cannot be accelerated, and why.
EXCEPTIONS = {
    "nystromformer": "with a mask it adds [B, 1, S, S] to [B, H, L, L]: a defect of the model",
    "paligemma": "without a mask it attends to other keys, in sdpa beside eager attention as well as traced",
}


def transformers_entries():
    return {e.name: e for e in transformers_zoo.entries()}


def timm_entries():
    try:
        with importable():
            import timm  # noqa: F401
        from tests.zoo import timm_zoo
    except (ImportError, RuntimeError):
        return {}
    return {e.name: e for e in timm_zoo.entries()}


ENTRIES = transformers_entries() | timm_entries()


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    gc.collect()
    torch._dynamo.reset()


def seed():
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


def accelerated(entry, mode):
    """The accelerated module after one call, or the exception that the call raised."""
    with importable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed()
        model = entry.build().train(mode == "train")
        inputs = entry.inputs()
        seed()
        fast = fxaccel.accelerate(model)
        fast(**inputs)
    return fast


def inspect(fast, name, mode):
    """The report's verdict on the one capture, and whether it is one graph."""
    (one,) = fast.__dict__["_fxaccel"].all
    assert "checked against the model" in one.report.check, one.report.check
    dropped = [p.error for p in one.report.passes if "dropped" in p.error or "failed its proof" in p.error]
    assert not dropped, dropped
    known = name in IN_PIECES or f"{name} {mode}" in IN_PIECES
    assert isinstance(one, Pieces) is known, one.report.notes


def cases(names):
    return [pytest.param(n, m, id=f"{n}-{m}") for n in names for m in MODES]


@pytest.mark.parametrize(("name", "mode"), [case for case in QUICK if case[0] in ENTRIES])
def test_a_few_architectures_are_captured_as_one_graph_and_checked(name, mode):
    inspect(accelerated(ENTRIES[name], mode), name, mode)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), cases(ENTRIES))
def test_every_architecture_is_accelerated_or_known_not_to_be(name, mode, request):
    why = EXCEPTIONS.get(name) or EXCEPTIONS.get(f"{name} {mode}")
    if why:
        request.applymarker(pytest.mark.xfail(reason=why, strict=False))
    inspect(accelerated(ENTRIES[name], mode), name, mode)


def test_the_zoo_is_large_enough():
    transformers = [n for n in ENTRIES if not n.startswith("timm_")]
    assert len(transformers) >= 60
    assert len(ENTRIES) - len(transformers) in range(45, 200) or not timm_entries()


def test_exceptions_name_entries_and_reasons():
    for key, why in {**EXCEPTIONS, **IN_PIECES}.items():
        assert key.split()[0] in ENTRIES or key.startswith("timm_")
        assert len(why) > 10
