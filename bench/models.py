"""Whole models on the CPU, in inference and in training: python bench/models.py [part of a name ...]

The model as written, under the default passes, in inference with what is on request besides, and by
torch.compile, by itself and (in inference) with `freezing`. Float32, dropout as the model comes, one thread,
interleaved, least of `time.thread_time()`; a model is measured in a process of its own, and `memory` is by
how much two others grow at the most in a step. Results of models that are not named stay in the file.
"""

import json
import multiprocessing
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from harness import RESULTS, grown, interleaved, save
from torch import nn

import fxaccel
from fxaccel.discover import available

ROUNDS = 25
WORDS = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MORE = ["pack-weights"]


def text(batch: int = 2, length: int = 128) -> dict[str, torch.Tensor]:
    """Tokens, which are their own labels."""
    ids = torch.randint(1, WORDS["vocab_size"], (batch, length))
    return {"input_ids": ids, "labels": ids}


def image(batch: int, classes: int = 1000) -> dict[str, torch.Tensor]:
    """Photographs' sizes."""
    return {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": torch.randint(0, classes, (batch,))}


def bert(layers: int, width: int) -> Any:
    """Masked words."""
    sizes = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    return hf.BertForMaskedLM(hf.BertConfig(num_hidden_layers=layers, **sizes, **WORDS)), text()


def gpt2(layers: int, width: int) -> Any:
    """The next word."""
    config = hf.GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, use_cache=False, **WORDS)
    return hf.GPT2LMHeadModel(config), text()


def llama(layers: int, width: int) -> Any:
    """The next word; keys and values for half of the heads."""
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128}
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers}
    return hf.LlamaForCausalLM(hf.LlamaConfig(use_cache=False, **sizes, **heads, **WORDS)), text()


def mixtral() -> Any:
    """Four experts, of which each token takes two."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(use_cache=False, **sizes, **heads, **WORDS)), text()


def t5() -> Any:
    """Encoder and decoder."""
    sizes = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 4}
    config = hf.T5Config(use_cache=False, decoder_start_token_id=0, **sizes, **WORDS)
    given = text()
    given["decoder_input_ids"] = given["input_ids"].roll(1, 1)
    return hf.T5ForConditionalGeneration(config), given


def vit() -> Any:
    """Photographs, one."""
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    config = hf.ViTConfig(num_hidden_layers=4, num_labels=1000, **sizes)
    return hf.ViTForImageClassification(config), image(1)


def resnet() -> Any:
    """Photographs, two: ResNet-50."""
    return hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000)), image(2)


class Encoder(nn.Module):
    """Whisper's encoder and a number to train it by."""

    def __init__(self) -> None:
        super().__init__()
        config = hf.WhisperConfig(
            d_model=256, encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=1024,
            decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=256,
        )  # fmt: skip
        self.encoder = hf.WhisperModel(config).encoder

    def forward(self, x: torch.Tensor) -> Any:
        """The last hidden state, or in training the mean of its squares."""
        made = self.encoder(x).last_hidden_state
        return made.square().mean() if self.training else made


def whisper() -> Any:
    """Half a minute of sound."""
    return Encoder(), {"x": torch.randn(1, 80, 3000)}


MODELS: dict[str, Callable[[], Any]] = {
    "BERT, 4 layers of 256": lambda: bert(4, 256), "BERT, 12 layers of 512": lambda: bert(12, 512),
    "GPT-2, 4 layers of 256": lambda: gpt2(4, 256), "GPT-2, 12 layers of 512": lambda: gpt2(12, 512),
    "Llama, 4 layers of 256": lambda: llama(4, 256), "Llama, 12 layers of 512": lambda: llama(12, 512),
    "T5, 4 + 4 layers of 256": t5, "Mixtral, 4 layers of 256": mixtral, "ViT, 4 layers of 384": vit,
    "ResNet-50": resnet, "Whisper encoder, 4 layers of 256": whisper,
}  # fmt: skip


def built(name: str, train: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model in its mode, with a batch: without labels in inference."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    return model.train(train), {k: v for k, v in batch.items() if train or k != "labels"}


def stepped(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """A call; in training with the gradients of all parameters."""
    if not model.training:
        return lambda: model(**batch)
    learned = [p for p in model.parameters() if p.requires_grad]

    def step() -> Any:
        made = model(**batch)
        loss = made if isinstance(made, torch.Tensor) else made.loss
        return torch.autograd.grad(loss, learned, allow_unused=True)

    return step


def timed(name: str, train: bool) -> dict[str, Any]:
    """Seconds of every candidate, and how many times as fast as the model as written."""
    model, batch = built(name, train)
    ours = {"fxaccel": fxaccel.accelerate(model, example_inputs=batch)}
    if not train:
        default = [n for n, cls in available().items() if cls.default]
        ours["fxaccel, more"] = fxaccel.accelerate(
            model, [*default, *MORE], example_inputs=batch, measure=True
        )
    peers = {"torch.compile": torch.compile(model)}
    if not train:
        peers["freezing"] = torch.compile(model, options={"freezing": True})
    calls = {n: stepped(m, batch) for n, m in {"as written": model, **ours, **peers}.items()}
    seconds = interleaved(calls, rounds=ROUNDS)
    least = seconds["as written"]["min"]
    return {
        "seconds": seconds, "speed": {n: least / t["min"] for n, t in seconds.items()},
        "left out": sorted({
            f"{one}: {site.why}" for n in ours.values() for one in n.report()
            for site in n.report()[one].refused if "as long here" in site.why
        }),
    }  # fmt: skip


def measured(name: str, train: bool, what: str, pipe: Any) -> None:
    """One of `timed`, and the memory of a step as written or under the default passes, in this process."""
    warnings.simplefilter("ignore")
    with torch.set_grad_enabled(train):
        if what == "timed":
            pipe.send(timed(name, train))
            return
        model, batch = built(name, train)
        step = stepped(fxaccel.accelerate(model) if what == "fxaccel" else model, batch)
        step()
        pipe.send(grown(step))


def apart(*given: Any) -> Any:
    """What `measured` finds in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=measured, args=(*given, sender))
    child.start()
    sender.close()
    found = receiver.recv()
    child.join()
    return found


def main() -> None:
    """All models, or those whose names hold one of the arguments."""
    file = RESULTS / "models_cpu.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    figures.pop("environment", None)
    figures.pop("geometric mean", None)
    for name in MODELS:
        if sys.argv[1:] and not any(part in name for part in sys.argv[1:]):
            continue
        for mode, train in (("inference", False), ("training", True)):
            found = apart(name, train, "timed")
            if train:
                memory = {who: apart(name, train, who) for who in ("as written", "fxaccel")}
                found |= {"memory": memory, "share of memory": memory["fxaccel"] / memory["as written"]}
            figures[f"{name}, {mode}"] = found
            speed = "  ".join(f"{n} {r:.2f}" for n, r in found["speed"].items())
            share = f"  memory {found['share of memory']:.2f}" if train else ""
            print(f"{name}, {mode}: {speed}{share}", flush=True)
            save("models_cpu", {**figures, "geometric mean": means(figures)})


def means(figures: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The geometric mean over models of how many times as fast each candidate is, by mode."""
    made: dict[str, dict[str, float]] = {}
    for mode in ("inference", "training"):
        rows = [f["speed"] for n, f in figures.items() if n.endswith(mode)]
        names = dict.fromkeys(n for row in rows for n in row)
        made[mode] = {n: statistics.geometric_mean([r[n] for r in rows if n in r]) for n in names}
    return made


if __name__ == "__main__":
    main()
