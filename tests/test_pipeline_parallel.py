"""Pipelines beside what else there is: data parallel processes, checkpoints, the other passes."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxaccel
from fxaccel.errors import OptionError
from fxaccel.memory import Meter
from fxaccel.passes import Checkpoint, Partition
from fxaccel.passes._partition_costs import costs
from fxaccel.passes._partition_plan import Step, cut
from fxaccel.pipeline.orders import order
from fxaccel.pipeline.simulator import simulate
from fxaccel.profile import profile
from fxaccel.roofline import speed
from tests.helpers import session
from tests.pipeline_runs import loss_of, made, one_process, saved

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
BATCH, MICROBATCHES = 16, 4


def entered(rank, size, folder, work, *options):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    work(rank, folder, *options)
    dist.destroy_process_group()
    (folder / "meet").unlink(missing_ok=True)


def processes(size, folder, work, *options):
    mp.start_processes(entered, (size, folder, work, *options), nprocs=size, start_method="spawn")


def close(got, want):
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-10, atol=1e-13, msg=name)


# -- data parallel ---------------------------------------------------------------------------------


def beside(rank, folder, kind):
    """Two pipelines of two stages, each with half of the batch; what this process learns in two steps."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    _, args, target = made("tied", 3, BATCH)
    half = slice(mesh["dp"].get_local_rank(), None, 2)
    fast = fxaccel.load(folder / "tied.fxa").train()
    stage = fast.stage(mesh["pp"].get_local_rank())
    if kind == "ddp":
        stage = DistributedDataParallel(stage, process_group=mesh["dp"].get_group())
    else:
        stage = fully_shard(stage, mesh=mesh["dp"])
    mine = fast.schedule(
        "1f1b", MICROBATCHES, loss=loss_of, stages=[stage], group=mesh["pp"].get_group(), timeout=60
    )
    for _ in range(2):
        for parameter in mine.parameters():
            parameter.grad = None
        mine.step(**{k: v[half] for k, v in args.items()}, target=target[half])
    found = {}
    for name, parameter in mine.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    torch.save(found, folder / f"found{rank}.pt")
    if kind == "ddp":
        with pytest.raises(OptionError, match="does backward in two parts"):
            fast.schedule(
                "interleavedzerobubble", MICROBATCHES, loss=loss_of, stages=[stage],
                group=mesh["pp"].get_group(), timeout=60,
            )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_pipelines_beside_each_other_learn_what_one_process_does(tmp_path, kind):
    model, args, target = made("tied", 3, BATCH)
    saved(model, args, tmp_path / "tied.fxa", 2)
    processes(4, tmp_path, beside, kind)
    (_, want), *_ = one_process(model, args, target, 1)
    for rank in range(4):
        close(torch.load(tmp_path / f"found{rank}.pt"), want)


# -- checkpoints -----------------------------------------------------------------------------------


def state_of(mine, optimizer):
    (stage,) = mine.stages
    return {
        "model": mine.state_dict(),
        "optim": get_optimizer_state_dict(stage, optimizer, options=FLAT),
    }


def trained(rank, folder, stages, before, steps):
    """Steps with momentum from a checkpoint to the next one."""
    _, args, target = made("tied", 3, BATCH)
    fast = fxaccel.load(folder / f"tied{stages}.fxa").train()
    mine = fast.schedule("1f1b", MICROBATCHES, loss=loss_of, timeout=60)
    (stage,) = mine.stages
    optimizer = torch.optim.SGD(stage.parameters(), 0.05, momentum=0.9)
    if before is not None:
        for parameter in stage.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # so that there are states to load into
        state = {
            "model": mine.state_dict(),
            "optim": get_optimizer_state_dict(stage, optimizer, options=FLAT),
        }
        dcp.load(state, checkpoint_id=folder / before)
        mine.load_state_dict(state["model"])
        set_optimizer_state_dict(stage, optimizer, state["optim"], options=FLAT)
    for _ in range(steps):
        optimizer.zero_grad()
        mine.step(**args, target=target)
        optimizer.step()
    dcp.save(state_of(mine, optimizer), checkpoint_id=folder / f"after{stages}")


@pytest.mark.slow
def test_training_goes_on_with_another_number_of_stages_and_in_one_process(tmp_path):
    model, args, target = made("tied", 3, BATCH)
    for stages in (2, 3):
        saved(model, args, tmp_path / f"tied{stages}.fxa", stages)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def step():
        optimizer.zero_grad()
        loss_of(model(**args), target).backward()
        optimizer.step()

    processes(2, tmp_path, trained, 2, None, 2)
    processes(3, tmp_path, trained, 3, "after2", 2)
    again, _, _ = made("tied", 3, BATCH)
    state = {"model": again.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "after3")
    for _ in range(4):
        step()
    close(state["model"], model.state_dict())


# -- other passes ----------------------------------------------------------------------------------


def composed(rank, folder):
    _, args, target = made("gpt2", 4, BATCH)
    fast = fxaccel.load(folder / "gpt2.fxa").train()
    assert "attention" in fast.code
    assert "def again_" in fast.code
    mine = fast.schedule("1f1b", MICROBATCHES, loss=loss_of, timeout=60)
    mine.step(**args, target=target)
    torch.save({n: p.grad for n, p in mine.named_parameters()}, folder / f"found{rank}.pt")


@pytest.mark.slow
def test_all_passes_together_on_two_processes_are_one_process(tmp_path):
    model, args, target = made("gpt2", 4, BATCH)
    passes = ["fuse-attention", "fuse-norm", Checkpoint(budget=0.8)]
    fast = saved(model, args, tmp_path / "gpt2.fxa", 2, passes)
    assert fast.report()["fuse-attention"].applied
    processes(2, tmp_path, composed)
    (_, want), *_ = one_process(model, args, target, 1)
    for rank in range(2):
        close(torch.load(tmp_path / f"found{rank}.pt"), want)


def test_what_a_schedule_cannot_be_made_of_is_refused():
    model, args, _ = made("tied", 2, BATCH)
    fast = fxaccel.accelerate(model, ["partition{stages=2}"], check=False)
    fast(**args)
    with pytest.raises(OptionError, match="of which there is none"):
        fast.schedule("1f1b", 4)
    with pytest.raises(OptionError, match="reduction is 'most'"):
        fast.schedule("1f1b", 4, reduction="most")
    with pytest.raises(OptionError, match="timeout is 0"):
        fast.schedule("1f1b", 4, timeout=0)
    with pytest.raises(OptionError, match="there is no stage 2, the model is cut into 2"):
        fast.stage(2)
    assert fast.stage(1) is fast.stage(1)


def test_a_stage_on_another_device_holds_copies_there():
    model, args, _ = made("tied", 2, BATCH)
    fast = fxaccel.accelerate(model, ["partition{stages=2}"], check=False)
    fast(**args)
    here, there = fast.stage(0), fast.stage(0, "meta")
    assert {t.device.type for t in there.state_dict().values()} == {"meta"}
    assert all(p is fast.get_parameter(n) for n, p in here.named_parameters())
    received = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in here.receives]
    made_there, made_here = there(*received), here(*(t[: len(t)] for t in args.values()))
    for one, other, told in zip(made_there, made_here, there.sends, strict=True):
        assert one.device.type == told.device.type == "meta"
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    last = fast.stage(1, "meta")
    tied = there.get_parameter("embed.weight")
    assert last.get_parameter("head.weight") is tied


# -- memory ----------------------------------------------------------------------------------------


def measured(rank, folder, name, schedule):
    """The most bytes of this process in its second step, beside the parameters."""
    args, target = torch.load(folder / f"{name}.pt")
    fast = fxaccel.load(folder / f"{name}.fxa").train()
    mine = fast.schedule(schedule, MICROBATCHES, loss=loss_of, timeout=120)
    with Meter() as meter:
        mine.step(**args, target=target)
        meter.reset()
        mine.step(**args, target=target)
    state = sum({p: p.numel() * p.element_size() for p in mine.parameters()}.values())
    torch.save(meter.peak + state, folder / f"peak{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [
        ("gpipe", 1), ("1f1b", 1), ("interleaved1f1b", 2), ("interleavedzerobubble", 1),
        ("interleavedzerobubble", 2), ("zbvzerobubble", 2), ("dualpipev", 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_each_process_holds_what_the_plan_says(tmp_path, name, schedule, chunks):
    model, args, target = made(name, 6, 4 * BATCH)
    torch.save((args, target), tmp_path / f"{name}.pt")
    one = Partition(stages=2 * chunks, microbatches=MICROBATCHES, schedule=schedule, chunks=chunks)
    fast = fxaccel.accelerate(model, [one], check=False)
    fast(**args)
    fast.save(tmp_path / f"{name}.fxa")
    program, terms = session(fast).all[0].canonical, one.terms()
    known = profile(program)
    step = Step(program, known, speed(program).seconds(known))
    at = order(schedule, 2, MICROBATCHES, chunks)
    plan = simulate(at, costs(step, terms, cut(step, terms, one.named), at))
    processes(2, tmp_path, measured, name, schedule)
    found = [torch.load(tmp_path / f"peak{rank}.pt") for rank in range(2)]
    assert found == pytest.approx(plan.peaks, rel=0.1)
