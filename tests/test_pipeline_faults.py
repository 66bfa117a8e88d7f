"""What becomes of a pipeline one of whose processes fails: all end, with an error that names the stage."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

import fxaccel
from fxaccel.errors import OptionError, StageError
from tests.pipeline_runs import loss_of, made, saved

SIZE, MICROBATCHES, BATCH = 3, 4, 8
TIMEOUT = 1.0


def broken(kind):
    """What a stage does in the place of its forward."""
    if kind == "raises":
        raise ValueError("broken")
    if kind == "sleeps":
        time.sleep(1000)
    if kind == "spins":
        while True:
            time.monotonic()
    os._exit(3)  # kind is "dies"


def spawned(folder, work):
    """Run `work(rank, folder)` in processes that nothing ends but themselves; what each has said."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=entered, args=(r, folder, work)) for r in range(SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert not any(p.is_alive() for p in processes)
    files = [folder / f"said{rank}.json" for rank in range(SIZE)]
    return [json.loads(f.read_text()) if f.exists() else None for f in files], processes


def entered(rank, folder, work):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=SIZE)
    (folder / f"said{rank}.json").write_text(json.dumps(work(rank, folder)))
    os._exit(0)  # connections of the others may be gone


def failing(rank, folder):
    """What this process sees of each kind of failure, and in how many seconds."""
    _, args, target = made("tied", 3, BATCH)
    found = {}
    for kind in ("raises", "sleeps", "spins", "dies"):
        fast = fxaccel.load(folder / "tied3.fxa").train()
        mine = fast.schedule("1f1b", MICROBATCHES, loss=loss_of, timeout=TIMEOUT)
        mine.step(**args, target=target)
        if kind == "raises":
            torch.save(mine.state_dict(), folder / f"checkpoint{rank}.pt")
        if rank == 1:
            mine.stages[0].register_forward_pre_hook(lambda *_, kind=kind: broken(kind))
        start = time.monotonic()
        with pytest.raises(StageError) as caught:
            mine.step(**args, target=target)
        found[kind] = str(caught.value), time.monotonic() - start
        with pytest.raises(StageError, match="the pipeline has ended: stage 1"):
            mine.step(**args, target=target)
        (folder / f"said{rank}.json").write_text(json.dumps(found))
    return found


def test_every_process_ends_and_names_the_stage(tmp_path):
    model, args, _ = made("tied", 3, BATCH)
    saved(model, args, tmp_path / "tied3.fxa", SIZE)
    said, processes = spawned(tmp_path, failing)
    messages = {
        "raises": "stage 1 (rank 1) raised ValueError in the forward of microbatch 0: broken",
        "sleeps": f"stage 1 (rank 1) has not ended the forward of microbatch 0 within {TIMEOUT:g} s",
        "spins": f"stage 1 (rank 1) has not ended the forward of microbatch 0 within {TIMEOUT:g} s",
        "dies": "stage 1 (rank 1) does not answer any more: ",
    }
    for rank in range(SIZE):
        for kind, message in messages.items():
            if (rank, kind) != (1, "dies"):
                text, seconds = said[rank][kind]
                assert text.startswith(message)
                assert seconds < 3 * TIMEOUT + 10
    assert [p.exitcode for p in processes] == [0, 3, 0]
    state = {}
    for rank in range(SIZE):  # written before the first failure
        state |= torch.load(tmp_path / f"checkpoint{rank}.pt")
    fxaccel.accelerate(model).load_state_dict(state)


def misfits(rank, folder):
    """What each process says where they do not fit together."""
    _, args, target = made("tied", 3, BATCH)
    found = []

    def refused(file, schedule="1f1b", microbatches=MICROBATCHES):
        with pytest.raises(OptionError) as caught:
            fxaccel.load(folder / file).train().schedule(schedule, microbatches, loss=loss_of, timeout=60)
        found.append(caught.value.message)

    refused("other.fxa" if rank == 1 else "tied3.fxa")
    refused("tied2.fxa" if rank == 1 else "tied3.fxa")
    refused("tied3.fxa", "gpipe" if rank == 2 else "1f1b")
    refused("tied3.fxa", "1f1b", 2)
    mine = fxaccel.load(folder / "tied3.fxa").train().schedule("1f1b", MICROBATCHES, loss=loss_of)
    for given in ({**args, "ids": args["ids"][:, :3]}, {k: v[:6] for k, v in args.items()}):
        with pytest.raises(StageError) as caught:
            mine.step(**given, target=target)
        found.append(caught.value.message)
    return found


def test_processes_that_do_not_fit_together_are_refused_in_each(tmp_path):
    model, args, _ = made("tied", 3, BATCH)
    for stages in (2, 3):
        saved(model, args, tmp_path / f"tied{stages}.fxa", stages)
    other, args, _ = made("tied", 4, BATCH)
    saved(other, args, tmp_path / "other.fxa", 3)
    said, _ = spawned(tmp_path, misfits)
    for rank, one in enumerate(said):
        assert "the processes have cut different models, or cut them differently" in one[0]
        assert one[1].removeprefix("rank 1: ").startswith("the model is cut into 2 stages, expected as many")
        assert one[1].startswith("rank 1: ") == (rank != 1)
        assert one[2].startswith("rank 2 asks for ['gpipe', 4] and rank 0 for ['1f1b', 4]")
        assert "expected at least 3 microbatches for 1F1B on 3 ranks, came 2" in one[3]
        assert one[4].startswith("stage 0 (rank 0): the call fits no capture that is cut: expected ")
        assert one[5].startswith("the pipeline has ended: stage 0 (rank 0)")
