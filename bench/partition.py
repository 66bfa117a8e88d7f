"""Stages, schedules and steps of pipelines: python bench/partition.py [balance] [chains] [schedules] [run]

balance      P1 of the targets: GPT-2, BERT, T5 and Swin in 2 to 8 stages: the slowest stage of our cut beside
             the lower bound that holds for any cut, calls being whole, and beside equal numbers of layers
chains       P1: random chains beside the best of all their cuts; seconds of one thread for 1,000 calls
schedules    P3: 100 cells of ranks, microbatches and memory for a GPT-2: the step that is chosen beside those
             of all schedules that torch runs and that fit, over cuts made without a thought of memory
run          P2: steps of 2, 3 and 4 processes over gloo, whose stages sleep, beside the simulator

Seconds of calls are those of the device's roofline, which is in the file; nothing of balance, chains and
schedules runs a model. Steps of `run` are measured from the first process's start to the last one's end.
"""

import importlib
import itertools
import math
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import save

sys.path.insert(0, str(Path(__file__).parents[1]))

import fxaccel
from fxaccel.errors import OptionError
from fxaccel.ir import Program
from fxaccel.passes import Partition
from fxaccel.passes._partition_plan import Step, cut
from fxaccel.passes._partition_study import Asked, Pipeline
from fxaccel.pipeline.balance import Balanced, Node, balance
from fxaccel.pipeline.choice import Tried, candidates, choose
from fxaccel.pipeline.orders import SCHEDULES
from fxaccel.pipeline.simulator import Link
from fxaccel.profile import profile
from fxaccel.roofline import speed
from tests.sleeping import measured, predicted
from tests.zoo.torchvision_shim import importable

B, S = 8, 512
LANGUAGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"use_cache": False}),
    "bert": ("BertForSequenceClassification", "BertConfig", {}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {"use_cache": False, "decoder_start_token_id": 0}),
}  # fmt: skip
"""The sizes that transformers gives by itself: GPT-2 small, BERT base, T5 small."""


def program(name: str, **sizes: Any) -> Program:
    """The training step of a model."""
    torch.manual_seed(0)
    with importable():  # transformers and timm look for torchvision
        if name == "swin":
            timm = importlib.import_module("timm")
            model, batch = timm.create_model("swin_tiny_patch4_window7_224"), (torch.randn(B, 3, 224, 224),)
        else:
            kind, config, options = LANGUAGE[name]
            transformers = importlib.import_module("transformers")
            made = getattr(transformers, config)(**{**options, **sizes})
            ids = torch.randint(0, 1000, (B, S))
            labels = torch.randint(0, 2, (B,)) if name == "bert" else ids
            model, batch = getattr(transformers, kind)(made), {"input_ids": ids, "labels": labels}
    fast = fxaccel.accelerate(model.train(), [], example_inputs=batch, check=False)
    found: Program = fast.__dict__["_fxaccel"].all[0].program
    return found


def layers(name: str) -> list[str]:
    """Where the layers of a model are."""
    if name == "swin":
        return [f"layers.{i}.blocks.{j}" for i, depth in enumerate((2, 2, 6, 2)) for j in range(depth)]
    if name == "t5":
        return [f"{side}.block.{i}" for side, i in itertools.product(("encoder", "decoder"), range(6))]
    return [f"{'transformer.h' if name == 'gpt2' else 'bert.encoder.layer'}.{i}" for i in range(12)]


def equally(name: str, stages: int) -> Partition:
    """Cuts before layers, as many in each stage or one more."""
    places = layers(name)
    return Partition(at=tuple(places[round(len(places) * s / stages)] for s in range(1, stages)))


def balanced() -> None:
    """Our cut beside the bound and equal layers."""
    figures: dict[str, Any] = {"dtype": "float32", "batch": B, "length": S, "image": 224}
    for name in (*LANGUAGE, "swin"):
        one = program(name)
        found = profile(one)
        step, rows = Step(one, found, speed(one).seconds(found)), []
        for stages in range(2, 9):
            asked, equal = Partition(stages=stages), equally(name, stages)
            start = time.thread_time()
            ours = cut(step, asked.terms(), asked.named)
            taken = time.thread_time() - start
            theirs = cut(step, equal.terms(), equal.named)
            rows.append(
                {
                    "stages": stages, "slowest": ours.slowest, "bound": ours.bound,
                    "to bound": ours.slowest / ours.bound, "equal parts": sum(ours.seconds) / stages,
                    "equal layers": theirs.slowest, "equal layers to ours": theirs.slowest / ours.slowest,
                    "seconds of the cut": taken,
                }
            )  # fmt: skip
            print(name, {k: round(v, 5) for k, v in rows[-1].items()}, flush=True)
        figures[name] = {"calls": len(step.calls), "roofline": asdict(speed(one)), "rows": rows}
        save("partition", figures)


def chain(count: int, rng: random.Random) -> list[Node]:
    """Calls of random costs."""
    sizes = [rng.randrange(1, 1000) for _ in range(count)]
    return [Node(rng.random() ** 3, rng.randrange(1000), rng.randrange(1000), n, n) for n in sizes]


def best(nodes: Sequence[Node], stages: int, link: Link, memory: float) -> float:
    """The slowest stage of the best of all cuts; infinite where none fits."""
    count, found = len(nodes), math.inf
    for cuts in itertools.combinations(range(1, count), stages - 1):
        slowest = 0.0
        for i, j in itertools.pairwise((0, *cuts, count)):
            ends = [nodes[e - 1].crossing or 0 for e in (i, j) if 0 < e < count]
            held = sum(n.parameters + n.saved for n in nodes[i:j]) + (nodes[i - 1].crossing or 0 if i else 0)
            taken = sum(n.seconds for n in nodes[i:j]) + sum(2 * link.seconds(e) for e in ends)
            slowest = max(slowest, taken if held <= memory else math.inf)
        found = min(found, slowest)
    return found


def chains() -> None:
    """Random chains beside their optimum, and how long 1,000 calls take."""
    rng, rows, link = random.Random(0), [], Link(1e-3, 1e4)
    for _ in range(200):
        count, stages = rng.randrange(4, 31), rng.randrange(2, 5)
        nodes = chain(count, rng)
        memory = rng.choice((math.inf, 1.3 * sum(n.parameters + n.saved for n in nodes) / stages))
        want = best(nodes, stages, link, memory)
        try:
            ours = balance(nodes, stages, link=link, memory=memory).slowest
        except OptionError:
            ours = math.inf
        rows.append(abs(ours - want) <= 1e-9 * want if want < math.inf else ours == want)
    timed: dict[str, list[float]] = {}
    for stages in (2, 4, 8, 16):
        start = time.thread_time()
        found: Balanced = balance(chain(1000, rng), stages, link=link)
        timed[f"{stages} stages"] = [time.thread_time() - start, found.gap]
    print(f"{sum(rows)} of {len(rows)} are the optimum", timed)
    figures = {"chains": len(rows), "calls": "4 to 30", "optimal": sum(rows)}
    save("partition_chains", {**figures, "1,000 calls: seconds, gap": timed})


def cells(one: Program) -> Iterator[dict[str, Any]]:
    """Each cell of the grid."""
    plain = Partition(stages=2, bandwidth=10e9, optimizer="adamw")
    steps: Any = None
    for ranks, many in itertools.product((2, 3, 4, 6, 8), (8, 12, 16, 24, 32)):
        free = Asked(ranks, many * B, SCHEDULES, (many,), math.inf, Link(1e-5, 10e9), "adamw")
        pipeline = Pipeline(one, plain, free)
        steps = pipeline.step = steps or pipeline.step
        asked = list(candidates(ranks, (many,)))
        known = choose(pipeline, asked, links=free.link).tried
        low, high = (edge(max(t.peaks) for t in known) for edge in (min, max))
        for share in (0.0, 0.1, 0.3, 1.0):
            yield cell(pipeline, known, low + int(share * (high - low)))


def cell(pipeline: Pipeline, known: Sequence[Tried], memory: int) -> dict[str, Any]:
    """What is chosen within some memory, beside what fits of what is known."""
    free = pipeline.asked
    asked = Asked(free.devices, free.batch, SCHEDULES, free.microbatches, memory, free.link, free.optimizer)
    ours = Pipeline(pipeline.program, pipeline.one, asked)
    ours.step, ours.cut = pipeline.step, pipeline.cut
    found = choose(ours, [t.candidate for t in known], memory, free.link)
    theirs = min((t for t in known if max(t.peaks) <= memory), key=lambda t: t.seconds)
    return {
        "ranks": free.devices, "microbatches": free.microbatches[0], "memory": memory,
        "chosen": str(found.candidate), "seconds": found.simulated.seconds,
        "peak": max(found.simulated.peaks), "best of torch's": str(theirs.candidate),
        "its seconds": theirs.seconds, "ratio": found.simulated.seconds / theirs.seconds,
    }  # fmt: skip


def schedules() -> None:
    """100 cells."""
    rows = []
    for row in cells(program("gpt2", n_layer=8)):
        rows.append(row)
        print(row, flush=True)
    ratios = [r["ratio"] for r in rows]
    save(
        "partition_schedules",
        {
            "model": "GPT-2 of 8 layers, width 768", "microbatch": B, "length": S, "dtype": "float32",
            "bytes a second": 10e9, "latency": 1e-5, "optimizer": "adamw",
            "cells": len(rows), "at most the best": sum(r <= 1 for r in ratios),
            "faster": sum(r < 1 for r in ratios), "largest ratio": max(ratios), "smallest ratio": min(ratios),
            "rows": rows,
        },
    )  # fmt: skip


RUNS = (
    ("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 1),
    ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2),
)  # fmt: skip


def run() -> None:
    """Steps of processes beside the simulator."""
    rng, rows = random.Random(0), []
    for ranks in (2, 3, 4):
        cases = [
            (name, 2 * ranks, chunks,
             [tuple(rng.choice((0.02, 0.03, 0.04, 0.06)) for _ in range(3)) for _ in range(chunks * ranks)])
            for name, chunks in RUNS
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            found = measured(ranks, cases, Path(folder), count=5)
        for (name, many, chunks, seconds), taken in zip(cases, found, strict=True):
            want, middle = predicted(name, ranks, many, chunks, seconds), sorted(taken)[len(taken) // 2]
            rows.append(
                {
                    "schedule": name, "ranks": ranks, "stages a rank": chunks, "microbatches": many,
                    "predicted": want, "measured": taken, "median to predicted": middle / want,
                    "seconds of stages (F, I, W)": seconds,
                }
            )  # fmt: skip
            print({k: v for k, v in rows[-1].items() if k[:7] != "seconds"}, flush=True)
    ratios = [r["median to predicted"] for r in rows]
    save("partition_run", {"backend": "gloo", "smallest": min(ratios), "largest": max(ratios), "rows": rows})


def main() -> None:
    """The tables that are asked for, or all."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tables = {"balance": balanced, "chains": chains, "schedules": schedules, "run": run}
    for name in sys.argv[1:] or tables:
        tables[name]()


if __name__ == "__main__":
    main()
