"""Stages in processes of their own, over gloo: what they learn is what one process learns."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

import fxaccel
from fxaccel.distributed import RankStage
from fxaccel.errors import OptionError
from fxaccel.passes import Partition
from tests.passes.partition_models import Attention, W

STEPS, MICROBATCHES, WORDS = 3, 4, 20
SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


class Language(torch.nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, layers=3):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, W)
        self.layers = torch.nn.ModuleList(Attention() for _ in range(layers))
        self.head = torch.nn.Linear(W, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, keep):
        size = ids.shape[1]
        mask = torch.ones(size, size, dtype=torch.bool, device=ids.device).tril() & keep[:, None].bool()
        x = self.embed(ids)
        first = x
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x + first)  # a skip over all stages


def made():
    torch.manual_seed(0)
    model = Language().double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # masks of microbatches are not those of the batch
    ids = torch.randint(0, WORDS, (2 * MICROBATCHES, 7))
    keep = torch.ones_like(ids)
    keep[::2, 5:] = 0
    return model, (ids, keep), torch.randint(0, WORDS, ids.shape)


def loss_of(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def learned(model, step):
    """Losses and gradients of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = step()
        grads = {n: p.grad.clone() for n, p in model.named_parameters(remove_duplicate=False)}
        found.append((loss, grads))
        optimizer.step()
    return found


def worker(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    found = {}
    for name, kind in SCHEDULES.items():
        fast = fxaccel.load(folder / "model.fxa").train()
        _, args, labels = made()
        mine = RankStage(fast, *(a[:2] for a in args))
        schedule = kind(mine.stage, MICROBATCHES, loss_fn=loss_of)

        def step(mine=mine, schedule=schedule, args=args, labels=labels):
            losses = []
            given = {"target": labels, "losses": losses} if rank == size - 1 else {}
            schedule.step(*(args if rank == 0 else ()), **given)
            mine.sum_gradients()
            return torch.stack(losses).mean().detach() if losses else None

        found[name] = learned(mine.module, step), list(mine.module.state_dict())
    torch.save(found, folder / f"found{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path):
    model, args, labels = made()
    fast = fxaccel.accelerate(model, [Partition(stages=2)], strict=True)
    fast(*args)
    fast.save(tmp_path / "model.fxa")
    mp.start_processes(worker, (2, tmp_path), nprocs=2, start_method="spawn")

    def step():
        loss = loss_of(model(*args), labels)
        loss.backward()
        return loss.detach()

    want, names = learned(model, step), set(model.state_dict())
    ranks = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
    for schedule in SCHEDULES:
        (first, mine), (last, others) = (rank[schedule] for rank in ranks)
        assert {*mine, *others} == names
        assert {*mine} & {*others} == {"embed.weight", "head.weight"}
        for (_, a), (loss, b), (wanted, gradients) in zip(first, last, want, strict=True):
            torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
            for name, gradient in gradients.items():
                for side in (a, b):
                    if name in side:
                        torch.testing.assert_close(side[name], gradient, rtol=1e-11, atol=1e-14)


def refused(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    args = made()[1]
    with pytest.raises(OptionError, match=r"stage 0 sends .* and stage 1 expects .* cut them differently"):
        RankStage(fxaccel.load(folder / f"cut{1 + rank}.fxa"), *args)
    with pytest.raises(OptionError, match="is cut into 3 stages, expected as many processes, came 2"):
        RankStage(fxaccel.load(folder / "cut3.fxa"), *args)
    dist.destroy_process_group()


def test_processes_that_do_not_fit_are_refused_in_each(tmp_path):
    model, args, _ = made()
    for number, at in enumerate((("layers.1",), ("layers.2",), ("layers.1", "layers.2")), 1):
        fast = fxaccel.accelerate(model, [Partition(at=at)], check=False)
        fast(*args)
        fast.save(tmp_path / f"cut{number}.fxa")
    mp.start_processes(refused, (2, tmp_path), nprocs=2, start_method="spawn")
