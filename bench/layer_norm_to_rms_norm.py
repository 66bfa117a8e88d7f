"""Which LayerNorms of real architectures become RMSNorms exactly, which do not and why.

Small models of transformers' own classes (two layers, random weights), for inference and for training; the
outputs in float64 are compared, and 20 steps of AdamW with the original's in float64.
"""

import copy
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from harness import save
from torch.utils import _pytree as pytree

import fxaccel
from fxaccel.passes import LayerNormToRMSNorm

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.zoo.transformers_zoo import entries

MODELS = (
    "gpt2", "opt", "gpt_neox", "vit", "deit", "whisper", "bert", "bloom", "falcon", "phi", "gptj", "mpt",
    "starcoder2", "beit", "dinov2", "vit_mae", "clip", "swin", "convnext", "bart", "albert",
)  # fmt: skip


def wide(tree):
    """Floating tensors in float64."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)


def seed():
    """Every run draws the same numbers."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def outputs(model, inputs):
    """The tensors that a call returns."""
    seed()
    return [t for t in pytree.tree_leaves(dict(model(**inputs))) if isinstance(t, torch.Tensor)]


def losses(model, inputs, steps=20):
    """The loss at each step of training."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(steps):
        learned = [t for t in outputs(model, inputs) if t.requires_grad]
        loss = sum(t.square().mean() for t in learned)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    return found


def converted(entry, train):
    """The row of one model in one mode."""
    model, inputs = entry.build().double().train(train), wide(entry.inputs())
    fast = fxaccel.accelerate(copy.deepcopy(model), passes=[LayerNormToRMSNorm(even_if_slower=True)])
    with torch.set_grad_enabled(train):
        news, olds = outputs(fast, inputs), outputs(copy.deepcopy(model), inputs)
    pairs = [(a, b) for a, b in zip(news, olds, strict=True) if b.is_floating_point()]
    report, reasons = fast.report(), {}
    record = report["layer-norm-to-rms-norm"]
    for site in record.refused:
        reasons[site.why] = reasons.get(site.why, 0) + 1
    row = {
        "converted": len(record.applied),
        "of": len(record.applied) + len(record.refused),
        "plan": record.plan,
        "error": record.error,
        "relative_error_float64": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
        "refused": reasons,
        "notes": report.captures[0].notes,
    }
    if train:
        a, b = losses(model, inputs), losses(fast, inputs)
        row["losses_first_last"] = [a[0], a[-1]]
        row["largest_difference_of_losses"] = max(abs(x / y - 1) for x, y in zip(a, b, strict=True))
    return row


def main():
    """Print and save the table."""
    warnings.simplefilter("ignore")
    table = {}
    for entry in entries():
        if entry.name in MODELS:
            table[entry.name] = {
                mode: converted(entry, mode == "training") for mode in ("inference", "training")
            }
            for mode, row in table[entry.name].items():
                print(f"{entry.name:<12}{mode:<10}{row['converted']:>3} of {row['of']:<3}", end="")
                print(f"{row['relative_error_float64']:.1e}  {row.get('largest_difference_of_losses')}")
    save("layer_norm_to_rms_norm", table)


if __name__ == "__main__":
    main()
