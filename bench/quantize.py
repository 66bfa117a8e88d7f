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
import time
import warnings
from collections.abc import Callable
from typing import Any

import replace_linear as texts
import torch
from harness import interleaved, save
from torch import Tensor, nn

import fxaccel
from fxaccel.passes import Quantize

PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8 dynamic": ("Int8DynamicActivationInt8WeightConfig", {"version": 2}),
    "int8": ("Int8WeightOnlyConfig", {"version": 2}),
    "int4": ("IntxWeightOnlyConfig", {}),
    "float8": ("Float8WeightOnlyConfig", {}),
}
"""torchao's configurations, by what they are here."""


def peer(model: nn.Module, name: str) -> nn.Module | None:
    """The model as torchao quantizes it, None where it is not there or refuses."""
    try:
        quantization = importlib.import_module("torchao.quantization")
    except ModuleNotFoundError:
        return None
    config, options = PEERS[name]
    if config == "IntxWeightOnlyConfig":
        granularity = importlib.import_module("torchao.quantization.granularity")
        options = {"weight_dtype": torch.int4, "granularity": granularity.PerGroup(64)}
    other = copy.deepcopy(model)
    try:
        quantization.quantize_(other, getattr(quantization, config)(**options))
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
        print(f"torchao {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return None
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
        BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
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
                        model, [*fxaccel.default_passes(), Quantize(also="heads|embeddings")],
                        allow="approximate",
                    ),
                }  # fmt: skip
                if (other := peer(model, "int8 dynamic")) is not None:
                    fast |= {"torchao": other, "torchao compiled": _compiled(other)}
                calls |= {
                    n: (lambda f=f, ids=ids, o=options: f(input_ids=ids, **o)) for n, f in fast.items()
                }
                times = timed(calls)
                key = f"{name} {width}, {batch} x {length}"
                found[key] = {"ms": times, "times as fast": {n: times["eager"] / t for n, t in times.items()}}
                print(key, {n: round(v, 2) for n, v in found[key]["times as fast"].items()}, flush=True)
    return found


def _compiled(model: nn.Module) -> Any:
    return torch.compile(model, dynamic=False, options={"freezing": True})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parts = {"linear": linear, "models": models}
    for part in sys.argv[1:] or parts:
        print(save(f"quantize_{part}", parts[part]()))
