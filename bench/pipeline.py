"""Training steps in two processes, ours beside torch's pipeline(): python bench/pipeline.py [model ...]

Each model of tests/pipeline_runs.py is cut into two stages, one a process over gloo, and takes steps under
each schedule; losses and all gradients of all steps are held beside those of one process, in float64. With
names of models, those alone are run, and nothing is kept.

fxaccel             a file saved by one process, loaded in each;  fast.schedule(...).step(...)
torch               pipeline(model, (), microbatch, {path: SplitPoint.BEGINNING}).build_stage(...) in torch's
                    schedule, cut at the middle layer, with the settings of `settings`
torch, summed       the same, and after each step the user sums the gradients of the copies that torch makes
                    of a parameter of several stages, which it lists in pipe.replicated_params

The error of a gradient is that of its worst element, relative to the parameter's largest element; where that
is zero but for rounding (the bias of a key), relative to the largest of all gradients of the step.
"""

import importlib.metadata
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import save
from torch import Tensor, nn
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.distributed.pipelining.schedules import get_schedule_class

sys.path.insert(0, str(Path(__file__).parents[1]))

import fxaccel
from tests import pipeline_runs
from tests.pipeline_runs import OWN_LOSS, learned, loss_of, made, one_process, saved

LAYERS, BATCH, MICROBATCHES, STEPS, SECONDS = 4, 8, 4, 2, 12
EQUAL = 1e-9
MODELS = sys.argv[1:] or pipeline_runs.MODELS
SCHEDULES = ("GPipe", "1F1B", "InterleavedZeroBubble")
MIDDLE = {
    "tied": "layers.2", "unet": "middle", "gpt2": "transformer.h.2", "bert": "bert.encoder.layer.2",
    "t5": "decoder.block.0", "llama": "model.layers.2",
}  # fmt: skip
TIED = ("tied", "gpt2", "bert", "t5")
Cell = tuple[str, str, str, str]
"""Tool, model, schedule, setting."""


def settings(name: str) -> Iterator[str]:
    """What torch is tried with: the model as it is, and what its documentation offers."""
    yield "loss in the model" if name in OWN_LOSS else "as it is"
    if name in OWN_LOSS:
        yield "loss outside"
        yield "loss outside, eager attention"
    if name == "llama":
        yield "by position"


def cells() -> dict[str, list[Cell]]:
    """Of each tool."""
    ours = [("fxaccel", name, schedule, "as it is") for name in MODELS for schedule in SCHEDULES]
    theirs = [
        (tool, name, schedule, setting)
        for name in MODELS
        for setting in settings(name)
        for schedule in SCHEDULES
        for tool in ("torch", "torch, summed")
        if tool == "torch" or (name in TIED and setting == [*settings(name)][-1])
    ]
    return {"fxaccel": ours, "torch": theirs}


# -- a cell in one process ------------------------------------------------------------------------


def ours(cell: Cell, rank: int, group: dist.ProcessGroup, folder: Path) -> dict[str, Any]:
    """What fxaccel learns here."""
    _, name, schedule, _ = cell
    _, args, target = made(name, LAYERS, BATCH)
    fast = fxaccel.load(folder / f"{name}.fxa").train()
    loss = None if target is None else loss_of
    mine = fast.schedule(schedule, MICROBATCHES, loss=loss, group=group, timeout=SECONDS)
    found = learned(mine.named_parameters(), lambda: mine.step(**args, target=target), STEPS)
    mine.close()
    return {"learned": found}


def theirs(cell: Cell, rank: int, group: dist.ProcessGroup, folder: Path) -> dict[str, Any]:
    """What torch learns here, and what it leaves of the model."""
    tool, name, schedule, setting = cell
    model, args, target = made(name, LAYERS, BATCH)
    if "outside" in setting and target is None:
        target = args.pop("labels")
    if "eager" in setting:
        model.set_attn_implementation("eager")
    given, named = (tuple(args.values()), {}) if "position" in setting else ((), args)
    before = state(model)
    example = [t[: BATCH // MICROBATCHES] for t in given]
    example_named = {n: t[: BATCH // MICROBATCHES] for n, t in named.items()}
    try:
        pipe = pipeline(model, tuple(example), example_named, {MIDDLE[name]: SplitPoint.BEGINNING})
    finally:
        changed = {"changed": changes(before, state(model))}
    device = torch.device("cpu")
    stage: Any = pipe.build_stage(rank, device, group)
    kind: Any = get_schedule_class(schedule)
    what = [stage] if "Interleaved" in schedule else stage
    runner = kind(what, MICROBATCHES, loss_fn=lambda made, wanted: loss_made(made, wanted, target is None))

    def step() -> Tensor | None:
        losses = list[Tensor]()
        wanted = torch.zeros(BATCH) if target is None else target  # torch calls no loss without a target
        if rank == 0:
            runner.step(*given, **named, return_outputs=False)
        else:
            runner.step(target=wanted, losses=losses, return_outputs=False)
        if tool == "torch, summed":
            for copies in pipe.replicated_params:
                dist.all_reduce(stage.submod.get_parameter(copies[f"submod_pp_{rank}"]).grad, group=group)
        return torch.stack(losses).mean().detach() if losses else None

    copied = [sorted({*copies.values()}) for copies in pipe.replicated_params]
    return {"learned": learned(stage.submod.named_parameters(), step, STEPS), "copied": copied, **changed}


def loss_made(made: Any, target: Any, own: bool) -> Tensor:
    """Torch's last stage gives the values of the model's result in a tuple: loss or logits are the first."""
    first: Tensor = made if isinstance(made, Tensor) else made[0]
    return first if own else loss_of(first, target)


def state(model: nn.Module) -> dict[str, Any]:
    """What a user could find changed about a model."""
    modules = {n: (type(m), m.training, {*vars(m)}) for n, m in model.named_modules(remove_duplicate=False)}
    tensors = {
        n: (id(p), type(p), p.requires_grad, p.detach().clone())
        for n, p in model.named_parameters(remove_duplicate=False)
    }
    return {"modules": modules, "tensors": tensors}


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """In words."""
    found = []
    for name in sorted({*before["modules"], *after["modules"]}):
        old, new = before["modules"].get(name), after["modules"].get(name)
        if old is None or new is None or old[:2] != new[:2]:
            found.append(f"module {name} was {old}, is {new}")
        elif old[2] != new[2]:
            found.append(f"module {name} has {', '.join(sorted(old[2] ^ new[2]))} set on it")
    for name in sorted({*before["tensors"], *after["tensors"]}):
        old, new = before["tensors"].get(name), after["tensors"].get(name)
        if old is None or new is None or old[:3] != new[:3] or not torch.equal(old[3], new[3]):
            found.append(f"parameter {name} is another, or has other values")
    return found


def worker(rank: int, folder: Path, tool: str) -> None:
    """All cells of a tool, each in a group of its own that a failure of one process ends for both."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(str(folder / f"meet {tool}"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    run: Callable[..., dict[str, Any]] = ours if tool == "fxaccel" else theirs
    found = {}
    for number, cell in enumerate(cells()[tool]):
        group: Any = dist.new_group([0, 1], timeout=timedelta(seconds=SECONDS))
        try:
            found[cell] = run(cell, rank, group, folder)
        except Exception as error:
            found[cell] = {"raised": (time.time(), *said(error))}
        dist.destroy_process_group(group)
        dist.distributed_c10d._get_default_store().set(f"{number} of {rank}", "done")
        dist.distributed_c10d._get_default_store().wait([f"{number} of {1 - rank}"])
        print(rank, *cell, found[cell].get("raised", ("", "ran"))[1:], sep=" | ", flush=True)
    torch.save(found, folder / f"found {tool} {rank}.pt")
    dist.destroy_process_group()


def said(error: BaseException) -> tuple[str, str, str]:
    """The class and the first line of an error, of the one that began it, and the function that raised it."""
    while error.__cause__ is not None and str(error.__cause__):
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return type(error).__name__, lines[0].strip(), f"{Path(where.filename).name}: {where.name}"


# -- what came of it ------------------------------------------------------------------------------


def verdict(cell: Cell, ranks: list[dict[str, Any]], want: list[Any], same: dict[str, str]) -> dict[str, Any]:
    """Equal, wrong, raises or hangs."""
    tool, name, schedule, setting = cell
    one: dict[str, Any] = {"tool": tool, "model": name, "schedule": schedule, "setting": setting}
    one |= {k: ranks[0][k] for k in ("changed", "copied") if k in ranks[0]}
    raised = sorted((r["raised"] for r in ranks if "raised" in r), key=lambda r: r[0])
    if raised:
        _, kind, line, where = raised[0]
        result = "hangs" if "Timed out" in line else "raises"
        return one | {"result": result, "error": kind, "line": line, "in": where}
    errors, missing = differences([r["learned"] for r in ranks], want, same)
    worst = max(errors, key=lambda n: errors[n])
    wrong = sorted(n for n, e in errors.items() if not e <= EQUAL)
    return one | {
        "result": "wrong" if wrong or missing else "equal", "largest error": errors[worst], "of": worst,
        "wrong": wrong, "missing": missing,
    }  # fmt: skip


def differences(
    ranks: list[Any], want: list[Any], same: dict[str, str]
) -> tuple[dict[str, float], list[str]]:
    """The largest error of the losses and of each gradient in any step, and parameters without a gradient."""
    errors, missing = {"loss": 0.0}, set[str]()
    for step, (loss, gradients) in enumerate(want):
        largest = max(g.abs().max().item() for g in gradients.values())
        (got,) = (steps[step][0] for steps in ranks if steps[step][0] is not None)
        errors["loss"] = max(errors["loss"], (abs(got - loss) / abs(loss)).item())
        found = [pair for steps in ranks for pair in steps[step][1].items()]
        for name, gradient in found:
            own = gradients[name].abs().max().item()
            scale = own if own > 1e-12 * largest else largest
            error = (gradient - gradients[name]).abs().max().item() / scale
            errors[name] = max(errors.get(name, 0.0), error)
        missing |= {same[n] for n in gradients} - {same[n] for n, _ in found}
    return errors, sorted(missing)


def measured(folder: Path) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """All cells, and what capturing and saving changed of the models."""
    wants, changed, same = {}, {}, {}
    for name in MODELS:
        model, args, target = made(name, LAYERS, BATCH)
        before = state(model)
        saved(model, args, folder / f"{name}.fxa", 2)
        changed[name] = changes(before, state(model))
        first = {p: n for n, p in model.named_parameters()}
        same[name] = {n: first[p] for n, p in model.named_parameters(remove_duplicate=False)}
        wants[name] = one_process(model, args, target, STEPS)
    rows = []
    for tool, all_cells in cells().items():
        mp.start_processes(worker, (folder, tool), nprocs=2, start_method="spawn")
        found = [torch.load(folder / f"found {tool} {rank}.pt") for rank in range(2)]
        for cell in all_cells:
            rows.append(verdict(cell, [one[cell] for one in found], wants[cell[1]], same[cell[1]]))
    return rows, changed


def main() -> None:
    """The table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        rows, changed = measured(Path(folder))
    for row in rows:
        print({k: v for k, v in row.items() if k != "wrong"}, flush=True)
    if sys.argv[1:]:
        return
    save(
        "pipeline",
        {
            "transformers": importlib.metadata.version("transformers"), "backend": "gloo", "processes": 2,
            "dtype": "float64", "layers": LAYERS, "batch": BATCH, "length": 7, "width": 8,
            "microbatches": MICROBATCHES, "steps": STEPS, "equal": EQUAL,
            "hangs": f"no answer for {SECONDS} s", "split of torch": MIDDLE,
            "changed by fxaccel": changed, "rows": rows,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
