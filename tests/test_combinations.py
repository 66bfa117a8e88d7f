"""Passes together: any legal choice of them, in any order, on any model and in any mode, is the model still.

A combination is drawn from its number, so a failure names all there is to run it again.
"""

import copy
import random
import warnings

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel import discover, manager
from fxaccel.errors import OptionError
from tests.helpers import session, thinned
from tests.passes.checkpoint_models import loss_of, made

QUICK = ("gpt2", "bert", "llama", "t5", "unet")  # timm's are in the slow runs alone
SLOW = (*QUICK, "vit", "resnet")
EXACT = (
    "fuse-attention", "fuse-norm", "fuse-rope", "fuse-glu", "fuse-linear-loss{least=1KiB}",
    "layer-norm-to-rms-norm{even_if_slower=true}", "merge-linears{even_if_slower=true}",
    "merge-linears{even_if_slower=true,fold=true}", "fuse-activation", "fuse-activation{even_if_slower=true}",
    "use-channels-last",
)  # fmt: skip
MODES = {
    "eval": (*EXACT, "fold-batch-norm", "pack-weights", "fuse-convolution"),
    "train": (*EXACT, "split-attention", "checkpoint{budget=0.7}", "partition{stages=2}"),
}
LOSSY = {
    "eval": ("quantize{weights=int8,even_if_slower=true}", "fuse-quantize", "smooth-inputs"),
    "train": ("quantize{train=learned,weights=int8,even_if_slower=true}",),
}
LOST = 2**-5  # of the largest result: what 8 bits a weight may lose in a few layers, amply


def drawn(number, names):
    """The model, the mode and the passes of a combination, in the order in which they are asked for."""
    draw = random.Random(number)
    name, mode = draw.choice(names), draw.choice(list(MODES))
    passes = draw.sample(MODES[mode], draw.randint(2, 6))
    if draw.random() < 0.3:
        passes += draw.sample(LOSSY[mode], draw.randint(1, len(LOSSY[mode])))
    draw.shuffle(passes)
    return name, mode, passes


def refusal(passes):
    """What the manager says where it would not order them; nothing where it would."""
    try:
        manager.order(discover.resolve(passes))
    except OptionError as error:
        return str(error)
    return ""


def without_dropout(model):
    """The same model, that draws no random numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def numbers(model, batch, train):
    """The loss or result of a call, and the gradients of the parameters by name."""
    if not train:
        with torch.no_grad():
            out = model(**batch)
        return {"result": out.logits if hasattr(out, "logits") else out}
    loss = loss_of(model(**batch))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {"loss": loss.detach(), **{n: g for n, g in zip(named, grads, strict=True) if g is not None}}


def wide(batch):
    return {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}


def check(number, names):
    together(*drawn(number, names))


def together(name, mode, passes):
    model, batch = made(name)
    model = without_dropout(model).train(mode == "train")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    refused = refusal(passes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a pass that finds nothing
        if refused:
            with pytest.raises(OptionError) as told:
                fxaccel.accelerate(model, passes, example_inputs=batch, allow="lower_precision")
            assert str(told.value) == refused
        else:
            plain = copy.deepcopy(model)
            reference = numbers(copy.deepcopy(model).double(), wide(batch), mode == "train")
            fast = fxaccel.accelerate(copy.deepcopy(model), passes, allow="lower_precision")
            got = numbers(fast, batch, mode == "train")
            agrees(fast, got, numbers(plain, batch, mode == "train"), reference, passes)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def agrees(fast, got, plain, reference, passes):
    """Exact passes: each may be two bits worse than the original, as a proof allows; together, too."""
    (one,) = session(fast).all
    errors = [p.error for p in one.report.passes if p.error]
    assert not errors, (passes, errors)
    lossy = any(p.split("{")[0] in {q.split("{")[0] for m in LOSSY.values() for q in m} for p in passes)
    assert set(got) & set(reference), passes
    sizes = {n: float(t.abs().max()) for n, t in reference.items()}
    for name in set(got) & set(reference):
        ref, size = reference[name], max(sizes.values()) if lossy else sizes[name]
        error, theirs = (float((t[name].double() - ref).abs().max()) for t in (got, plain))
        eps = torch.finfo(torch.float32).eps
        allowed = LOST * size if lossy else 4 * theirs + 4 * eps * size
        assert error <= allowed, f"{passes}: {name} is off by {error:.3g}, allowed {allowed:.3g}"


def test_attention_whose_bias_is_learned_is_computed_again_on_the_way_it_was_computed():
    together("t5", "train", ["fuse-attention", "checkpoint{budget=0.7}"])


@thinned(2, number=range(5))
def test_a_few_combinations(number):
    check(number, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(100, 140))
def test_forty_combinations(number):
    check(number, SLOW)


def test_both_modes_and_illegal_ones_are_among_them():
    several = [drawn(n, SLOW) for n in range(100, 140)]
    assert {name for name, _, _ in several} == set(SLOW)
    assert {mode for _, mode, _ in several} == set(MODES)
    refused = [why for *_, passes in several if (why := refusal(passes))]
    assert 0 < len(refused) < 10
