"""Pipelines whose stages sleep for given times, run by torch in processes over gloo: steps to compare with.

The forward of a stage sleeps, and so do its gradients towards its input and towards its weight, each by
itself, so that schedules with a backward in two parts have both. The first stage takes no gradient of its
input. Few cores are enough, since who sleeps computes nothing.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from fxaccel.pipeline.orders import ONE, order
from fxaccel.pipeline.simulator import Stage, simulate

SIZE = 8


class Slow(torch.autograd.Function):
    """Nothing, of which the gradient takes some seconds."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient.contiguous(), None


class Sleeper(nn.Module):
    """A stage that takes these seconds."""

    def __init__(self, forward, inputs, weights):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE))
        self.seconds = forward, inputs, weights

    def forward(self, x):
        time.sleep(self.seconds[0])
        return Slow.apply(x, self.seconds[1]) + Slow.apply(self.weight, self.seconds[2])


def stages(seconds):
    """The same for the simulator."""
    return [Stage(f, i if number else 0.0, w) for number, (f, i, w) in enumerate(seconds)]


def predicted(schedule, ranks, microbatches, chunks, seconds):
    """Seconds of a step."""
    return simulate(order(schedule, ranks, microbatches, chunks), stages(seconds)).seconds


def steps(schedule, rank, ranks, microbatches, chunks, seconds, count):
    """(start, end) on this rank of so many steps of torch's schedule."""
    placement = order(schedule, ranks, microbatches, chunks).placement
    mine = [
        PipelineStage(
            Sleeper(*seconds[i]), i, len(placement), torch.device("cpu"),
            input_args=(torch.zeros(1, SIZE).requires_grad_(i > 0),),
            output_args=(torch.zeros(1, SIZE).requires_grad_(),),
        )
        for i, r in enumerate(placement) if r == rank
    ]  # fmt: skip
    made = get_schedule_class(schedule)(
        mine[0] if schedule in ONE else mine, microbatches, loss_fn=lambda out, _: out.sum()
    )
    given = (torch.zeros(microbatches, SIZE),) if placement[0] == rank else ()
    wanted = {"target": torch.zeros(microbatches, SIZE)} if placement[-1] == rank else {}
    found = []
    for _ in range(count):
        dist.barrier()
        start = time.monotonic()
        made.step(*given, **wanted)
        found.append((start, time.monotonic()))
    return found


def worker(rank, ranks, folder, cases, count):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    found = [steps(name, rank, ranks, m, chunks, times, count) for name, m, chunks, times in cases]
    torch.save(found, folder / f"times{rank}.pt")
    dist.destroy_process_group()


def measured(ranks, cases, folder, count=3):
    """Seconds of each step of (schedule, microbatches, chunks, seconds of each stage), the first left out.

    In a fresh process, which imports torch once for all ranks and has run nothing that a fork would miss.
    """
    command = [sys.executable, "-m", "tests.sleeping", str(ranks), str(folder), str(count + 1)]
    subprocess.run(command, cwd=Path(__file__).parents[1], input=json.dumps(cases), text=True, check=True)
    found = [torch.load(folder / f"times{rank}.pt") for rank in range(ranks)]
    return [
        [max(e for _, e in step) - min(s for s, _ in step) for step in list(zip(*case, strict=True))[1:]]
        for case in zip(*found, strict=True)
    ]


def main(ranks, folder, count):
    cases = json.loads(sys.stdin.read())
    mp.start_processes(
        worker, (int(ranks), Path(folder), cases, int(count)), nprocs=int(ranks), start_method="fork"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
