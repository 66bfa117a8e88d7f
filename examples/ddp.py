"""DistributedDataParallel over an accelerated model, two processes on gloo: each step is the whole batch's.

Run: python examples/ddp.py
"""

import copy
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxaccel

SIZE = 2


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 1))
    return model, torch.randn(5, 8, 8)


def train(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in steps:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE)
    model, steps = build()
    whole = copy.deepcopy(model)
    train(whole, steps)  # what one process learns from all rows
    fast = fxaccel.accelerate(model)
    train(DistributedDataParallel(fast), steps.chunk(SIZE, 1)[rank])
    assert len(fast.report().captures) == 1
    assert fast.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (folder,), nprocs=SIZE)
    print(f"{SIZE} processes learned what one does")
