"""FSDP2 (`fully_shard`) over accelerated blocks, two processes on gloo: each step is the whole batch's.

A capture reads its parameters where the module has them, so a module that is accelerated is one unit of
sharding: here each block. Run: python examples/fsdp.py
"""

import copy
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import fxaccel

SIZE = 2


def build():
    torch.manual_seed(0)
    blocks = [[nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8)] for _ in range(2)]
    return nn.Sequential(*(nn.Sequential(*block) for block in blocks)), torch.randn(5, 8, 8)


def train(model, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
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
    sharded = nn.Sequential(*(fxaccel.accelerate(block) for block in model))
    for block in sharded:
        fully_shard(block)
    fully_shard(sharded)
    train(sharded, steps.chunk(SIZE, 1)[rank])
    found = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        assert found.keys() == whole.state_dict().keys()
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (folder,), nprocs=SIZE)
    print(f"{SIZE} processes learned what one does")
