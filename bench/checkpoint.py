"""What checkpoint keeps and computes again: python bench/checkpoint.py [budgets] [peers] [optimum] [time]

budgets    C1 of the targets: seven models, ten budgets each from 0.95 of the activation memory down to the
           smallest: the peak that was predicted, the peak of a real step, whether every gradient is bit for
           bit what it is without the pass, FLOPs that are computed again
peers      C2: torch's partitioner with its activation_memory_budget of 0.1 to 0.9, and torch.utils.checkpoint
           around every block and every group of sqrt(n) blocks: bytes of a real step, FLOPs that torch counts
           in it beyond those of a plain step; ours within the bytes of each of them, alone (behind SPLIT,
           planned for the fewest FLOPs) and behind the default passes (planned for the least time)
optimum    C4: steps of at most 60 calls, ours beside the exact optimum (passes/_checkpoint_exact.py)
time       C4: seconds of one thread for profile, plan, schedule and code of 24 and 96 layers of GPT-2

Bytes are those of storages that operators make, by fxaccel.memory.Meter: parameters were there before, what a
kernel takes for itself is not seen. FLOPs are torch's own count, of products alone, in forward and backward.
The partitioner runs as torch.compile's does, without a code generator behind it.
"""

import copy
import gc
import importlib
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from harness import save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

import fxaccel
import fxaccel.kernels.attention  # registers the operators that are counted
from fxaccel.discover import available
from fxaccel.emit import emit
from fxaccel.memory import Meter
from fxaccel.passes._checkpoint_exact import solved
from fxaccel.passes._checkpoint_plan import Planner
from fxaccel.passes.checkpoint import TrainingStep
from fxaccel.profile import Profile
from fxaccel.replay import Draft, replay, write
from fxaccel.roofline import FORWARDS, roofline
from fxaccel.schedule import Schedule

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.passes.checkpoint_models import UNet
from tests.passes.test_checkpoint_optimum import STEPS
from tests.zoo.torchvision_shim import importable

VOCABULARY, B, S, LIMIT = 1000, 8, 128, 30.0  # LIMIT: seconds of the solver for a budget
SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # and the smallest
FIGURES = {"dtype": "float32", "batch": B, "length": S, "threads": 1}
Batch = dict[str, Tensor]


def language(name: str, **options: Any) -> tuple[nn.Module, Batch]:
    """One of transformers' models, and random tokens."""
    transformers = importlib.import_module("transformers")
    model, config, sizes = LANGUAGE[name]
    made = getattr(transformers, config)(vocab_size=VOCABULARY, **{**sizes, **options})
    tokens = torch.randint(0, VOCABULARY, (B, S))
    labels = torch.randint(0, 2, (B,)) if name == "bert" else tokens
    return getattr(transformers, model)(made), {"input_ids": tokens, "labels": labels}


LANGUAGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": S, "use_cache": False}),
    "bert": ("BertForSequenceClassification", "BertConfig",
             {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024,
              "num_attention_heads": 4}),
    "llama": ("LlamaForCausalLM", "LlamaConfig",
              {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4,
               "num_key_value_heads": 2, "use_cache": False}),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {"num_layers": 3, "num_decoder_layers": 3, "d_model": 128, "d_kv": 32, "d_ff": 512, "num_heads": 4,
            "use_cache": False, "decoder_start_token_id": 0, "pad_token_id": 0}),
}  # fmt: skip


def made(name: str, **options: Any) -> tuple[nn.Module, Batch]:
    """A model in training, and its batch."""
    torch.manual_seed(0)
    with importable():  # transformers and timm look for torchvision
        if name in LANGUAGE:
            model, batch = language(name, **options)
        elif name == "unet":
            model, batch = UNet((16, 32, 64, 128)), {"x": torch.randn(B, 3, 64, 64)}
        else:
            timm = importlib.import_module("timm")
            kind, options = IMAGES[name]
            model, batch = (
                timm.create_model(kind, num_classes=10, **options),
                {"x": torch.randn(B, 3, 96, 96)},
            )
    return model.train(), batch


IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 96, "depth": 6}), "resnet": ("resnet18", {}),
}  # fmt: skip
MODELS = (*LANGUAGE, *IMAGES, "unet")


def stepped(model: nn.Module, batch: Batch) -> None:
    """Forward and backward, from the same random numbers."""
    model.zero_grad()
    torch.manual_seed(1)
    out = model(**batch)
    loss = out if isinstance(out, Tensor) else out.loss
    (loss if loss.numel() == 1 else loss.square().mean()).backward()


class Counter(Meter):
    """Bytes as a Meter counts them, and FLOPs as torch counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        """What is compiled is not to be left aside for its sake."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        formula = FORMULAS.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        return made


def measured(model: nn.Module, batch: Batch) -> tuple[int, int]:
    """The most bytes that a step takes, and its FLOPs; what has to be compiled is compiled before."""
    for _ in range(2):
        stepped(model, batch)
    model.zero_grad()
    gc.collect()
    with Counter() as counter:
        stepped(model, batch)
    return counter.peak, counter.flops


def products(q: Tensor, k: Tensor, v: Tensor, first: int, second: int) -> int:
    """FLOPs of so many products of attention over the width of queries, and over that of values."""
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (first * q.shape[-1] + second * v.shape[-1])


def forward(*read: Any, **named: Any) -> int:
    """FLOPs of attention."""
    return products(*read[:3], 1, 1)


def backward(*read: Any, **named: Any) -> int:
    """FLOPs of its backward, which makes the scores again."""
    return products(*read[1:4], 3, 2)


FORMULAS: dict[Any, Callable[..., int]] = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    torch.ops.fxaccel.attention: forward,
    torch.ops.fxaccel.attention_save: forward,
    torch.ops.fxaccel.attention_backward: backward,
}
"""torch's, with the attention that it does not know, or counts as nothing on the CPU."""

SPLIT = ["split-attention", "pack-dropout"]  # what torch does to dropout before it partitions
DEFAULT = [name for name, cls in available().items() if cls.default]


class Ours:
    """A model under our pass behind others, at any budget of bytes beside parameters."""

    def __init__(self, model: nn.Module, batch: Batch, passes: Sequence[str] = ()) -> None:
        self.model, self.batch, self.passes = model, batch, passes
        self.plain = fxaccel.accelerate(model, list(passes), check=False)
        self.peak, self.flops = measured(self.plain, batch)
        self.grads = [p.grad for p in model.parameters()]
        self.program = self.plain.__dict__["_fxaccel"].all[-1].program
        self.step = TrainingStep.of(self.program, "none")
        self.planner = self.step.planner(share=False)

    @cached_property
    def by_flops(self) -> Planner:
        """Plans for the fewest FLOPs, and of those for the fewest bytes to move."""
        weights = {i: c.flops + 1e-3 * c.nbytes * (not c.view) for i, c in self.step.profile.calls.items()}
        return Planner(self.step.profile, weights)

    def at(self, nbytes: int, planner: Planner | None = None) -> dict[str, Any] | None:
        """What a plan of so many bytes gives; None where there is none. With a planner, by its plan."""
        found = (planner or self.planner).plan(nbytes)
        if found is None:
            return None
        plan, budget = self.step.planned(found), (nbytes + self.step.fixed) / 1000
        if planner is None:
            asked = [*self.passes, f"checkpoint{{budget={budget:.3f}kB}}"]
            fast = fxaccel.accelerate(self.model, asked, check=False)
        else:
            fast = Scheduled(self, plan.schedule)
        peak, flops = measured(fast.train(), self.batch)
        grads = zip(self.grads, [p.grad for p in self.model.parameters()], strict=True)
        same = all(a is b or torch.equal(a, b) for a, b in grads)
        predicted = plan.peak - self.step.fixed
        return {
            "budget": nbytes, "predicted": predicted, "measured": peak,
            "measured to budget": peak / nbytes, "measured to predicted": peak / predicted,
            "gradients equal": same, "recomputed FLOPs": flops - self.flops,
            "share of FLOPs": (flops - self.flops) / self.flops, "overhead": plan.overhead,
        }  # fmt: skip


class Scheduled(nn.Module):
    """The captured step of a model under a schedule."""

    def __init__(self, ours: Ours, schedule: Schedule) -> None:
        super().__init__()
        self.model, self.names = ours.model, [n for n in ours.program.inputs if n is not None]
        code = emit(replace(ours.program, schedule=schedule, _facts=ours.program._facts))
        self.run = code.bind(ours.plain, "<step>")["forward"]

    def forward(self, **batch: Tensor) -> Tensor:
        """The loss, or what is there."""
        return min(self.run(*(batch[n] for n in self.names)), key=Tensor.numel)


def budgets() -> None:
    """Ten budgets of each model."""
    figures: dict[str, Any] = dict(FIGURES)
    for name in MODELS:
        ours = Ours(*made(name))
        smallest = ours.planner.smallest
        asked = [*(int(s * ours.peak) for s in SHARES if s * ours.peak > smallest), smallest]
        while len(asked) < 10:  # between those that are farthest apart
            gap = max(range(len(asked) - 1), key=lambda i: asked[i] - asked[i + 1])
            asked.insert(gap + 1, (asked[gap] + asked[gap + 1]) // 2)
        rows = [row for b in asked if (row := ours.at(b)) is not None]
        figures[name] = {
            "as it is": {"predicted": ours.step.whole.peak, "measured": ours.peak, "FLOPs": ours.flops},
            "smallest": smallest / ours.peak, "budgets": rows,
            "monotone": all(a["measured"] >= b["measured"] for a, b in itertools.pairwise(rows)),
        }  # fmt: skip
        for row in rows:
            print(name, {k: v if isinstance(v, int) else round(v, 4) for k, v in row.items()}, flush=True)
        save("checkpoint_budgets", figures)


class Group(nn.Module):
    """Blocks in a row that torch.utils.checkpoint computes again."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden: Tensor, *rest: Any, **named: Any) -> Any:
        """As one block."""
        return checkpoint(self.run, hidden, *rest, use_reentrant=False, **named)

    def run(self, hidden: Any, *rest: Any, **named: Any) -> Any:
        """One after the other."""
        for block in self.blocks:
            hidden = block(hidden[0] if isinstance(hidden, tuple) else hidden, *rest, **named)
        return hidden


BLOCKS = {
    "gpt2": ("transformer.h",), "bert": ("bert.encoder.layer",), "llama": ("model.layers",),
    "vit": ("blocks",), "unet": ("down", "up"),
    "resnet": tuple(f"layer{i}" for i in (1, 2, 3, 4)),
}  # fmt: skip
"""Where each model has its blocks."""


def grouped(model: nn.Module, name: str, size: int) -> nn.Module:
    """A copy that computes groups of so many blocks again."""
    other = copy.deepcopy(model)
    for path in BLOCKS[name]:
        found, (parent, _, own) = list(other.get_submodule(path)), path.rpartition(".")
        groups = [Group(found[i : i + size]) for i in range(0, len(found), size)]
        inline = isinstance(other.get_submodule(path), nn.Sequential)
        made = nn.Sequential(*groups) if inline else nn.ModuleList(groups)
        setattr(other.get_submodule(parent), own, made)
    return other


def checkpointed(model: nn.Module, batch: Batch, name: str, size: int) -> tuple[int, int]:
    """Bytes and FLOPs of a step that computes groups of so many blocks again."""
    return measured(grouped(model, name, size), batch)


def partitioned(model: nn.Module, batch: Batch, budget: float) -> tuple[int, int]:
    """Bytes and FLOPs of a step under torch's partitioner."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        return measured(torch.compile(copy.deepcopy(model), backend="aot_eager"), batch)


def steps(model: nn.Module, batch: Batch, name: str) -> Iterator[tuple[str, Callable[[], tuple[int, int]]]]:
    """The peers of a model."""
    for tenths in range(9, 0, -1):
        yield f"torch {tenths / 10}", partial(partitioned, model, batch, tenths / 10)
    if name in BLOCKS:
        many = sum(len(model.get_submodule(path)) for path in BLOCKS[name])
        for what, size in (("every block", 1), ("sqrt(n) groups", math.isqrt(many))):
            yield what, partial(checkpointed, model, batch, name, size)


def beside(run: Callable[[], tuple[int, int]], ours: Ours, default: Ours) -> dict[str, Any]:
    """What a peer takes, and ours within its bytes."""
    try:
        peak, flops = run()
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    return {
        "measured": peak, "of the bytes": peak / ours.peak,
        "recomputed FLOPs": flops - ours.flops, "share of FLOPs": flops / ours.flops - 1,
        "alone": ours.at(peak, ours.by_flops), "default": default.at(peak),
    }  # fmt: skip


def peers() -> None:
    """Ours within the bytes of each peer."""
    figures: dict[str, Any] = dict(FIGURES)
    for name in MODELS:
        model, batch = made(name)
        ours, default = Ours(model, batch, SPLIT), Ours(model, batch, DEFAULT)
        rows = []
        for what, run in steps(model, batch, name):
            row = beside(run, ours, default)
            if row.get("default"):  # beyond those of the model as it is
                row["default"]["recomputed FLOPs"] += default.flops - ours.flops
                row["default"]["share of FLOPs"] = row["default"]["recomputed FLOPs"] / ours.flops
            rows.append({"peer": what, **row})
            print(
                name,
                what,
                {k: v["share of FLOPs"] if isinstance(v, dict) else v for k, v in row.items()},
                flush=True,
            )
        together = {k: counted(rows, k) for k in ("alone", "default")}
        figures[name] = {"measured": ours.peak, "FLOPs": ours.flops, **together, "rows": rows}
        save("checkpoint_peers", figures)


def counted(rows: list[dict[str, Any]], ours: str) -> dict[str, int]:
    """At how many of torch's budgets ours computes at most as much again, and less, within its bytes."""
    asked = [r for r in rows if r["peer"].startswith("torch ") and "measured" in r]
    gaps = [r[ours]["recomputed FLOPs"] - r["recomputed FLOPs"] for r in asked if r[ours] is not None]
    return {
        "budgets": len(asked), "peaks of torch's": len({r["measured"] for r in asked}),
        "at most theirs": sum(g <= 0 for g in gaps), "fewer": sum(g < 0 for g in gaps),
    }  # fmt: skip


def optimum() -> None:
    """Steps made by hand, ours beside the exact optimum."""
    figures: dict[str, Any] = {"shares are of": "forward and backward", "seconds of the solver": LIMIT}
    for name, make in STEPS.items():
        steps, rows = make(), []
        profile, seconds = steps.profile(), steps.seconds
        planner, total = Planner(profile, seconds), FORWARDS * sum(seconds.values())
        for share in (0.8, 0.6, 0.5, 0.4):
            budget = int(share * planner.need)
            found = planner.plan(budget)
            ours = None if found is None else replay(profile, found, seconds).seconds / total
            rows.append({"budget": share, "ours": ours, **best(profile, seconds, budget, total)})
            print(name, rows[-1], flush=True)
            if rows[-1].get("optimum", 0) is None:  # nor can any smaller budget be kept
                break
        figures[name] = {"calls": len(profile.calls), "rows": rows}
        save("checkpoint_optimum", figures)


def best(profile: Profile, seconds: dict[int, float], budget: int, total: float) -> dict[str, Any]:
    """The optimum; None where no draft fits."""
    try:
        found = solved(profile, seconds, budget, LIMIT)
    except TimeoutError as error:
        return {"error": str(error)}
    least, exact = (0.0, True) if found is None else (found.least, found.exact)
    return {"optimum": found and found.seconds / total, "at least": least / total, "exact": exact}


def clock() -> None:
    """Seconds of each part of the pass."""
    figures: dict[str, Any] = {**FIGURES, "width": 64}
    roofline(torch.device("cpu"), torch.float32)  # measured once for a machine
    for layers in (24, 96):
        model, batch = made("gpt2", n_layer=layers, n_embd=64)
        plain = fxaccel.accelerate(model, [], check=False)
        plain(**batch)
        program, row = plain.__dict__["_fxaccel"].all[-1].program, dict[str, float]()
        step = timed(row, "profile", TrainingStep.of, program, "none")
        planner, draft = step.planner(share=True), Draft()
        timed(row, "parts", lambda p=planner: [chain.runs for chain in p.chains])
        for share in (0.8, 0.5, 0.3):
            draft = timed(row, f"plan for {share}", planner.plan, int(share * step.whole.inner))
        schedule = timed(row, "write", write, step.profile, draft)
        timed(row, "emit", emit, replace(program, schedule=schedule))
        figures[f"{layers} layers"] = {"calls": len(step.profile.calls), "seconds": row}
        print(layers, {k: round(v, 2) for k, v in row.items()}, flush=True)
    save("checkpoint_time", figures)


def timed(row: dict[str, float], what: str, call: Callable[..., Any], *args: Any) -> Any:
    """What the call gives; its seconds go into the row."""
    start = time.thread_time()
    found = call(*args)
    row[what] = time.thread_time() - start
    return found


def main() -> None:
    """The tables that are asked for, or all."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tables = {"budgets": budgets, "peers": peers, "optimum": optimum, "time": clock}
    for name in sys.argv[1:] or tables:
        tables[name]()


if __name__ == "__main__":
    main()
