"""The stages of a model that is cut, one in each process, for the schedules of torch.distributed.pipelining.

    fast = fxaccel.load("model.fxa")                    # cut by the pass partition, the same in each process
    mine = RankStage(fast, *microbatch)                 # the stage of this rank, told what a microbatch is
    optimizer = torch.optim.SGD(mine.module.parameters(), 0.1)
    schedule = Schedule1F1B(mine.stage, n_microbatches=4, loss_fn=loss)
    schedule.step(...)
    mine.sum_gradients()                                # of parameters that several stages read
    optimizer.step()

What goes from stage to stage is said beforehand: torch would otherwise run each stage on memory that nothing
was written to, which spoils statistics of batch norms and fails on indices.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from fxaccel.errors import OptionError
from fxaccel.module import AcceleratedModule
from fxaccel.stage_module import StageModule, stage_modules


class RankStage:
    """The stage of this process: `module`, and `stage`, which a schedule of torch takes.

    Made in all processes of the group at once, of models that are cut alike; the group has a process for each
    stage. Parameters that several stages read are those of the first of these processes.
    """

    def __init__(
        self, model: AcceleratedModule, *args: Any, group: dist.ProcessGroup | None = None, **kwargs: Any
    ) -> None:
        stages = stage_modules(model, *args, **kwargs)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if size != len(stages):
            raise OptionError(
                f"the model is cut into {len(stages)} stages, expected as many processes, came {size}",
                "cut it with stages= the count of processes",
            )
        self.module = stages[rank]
        _agree(self.module, group)
        self.stage = PipelineStage(
            self.module, rank, size, _device(self.module),
            input_args=tuple(t.empty() for t in self.module.receives),
            output_args=tuple(t.empty() for t in self.module.sends), group=group,
        )  # fmt: skip
        self._shared = _shared(stages, rank, group)
        for parameter, ranks, holders in self._shared:
            dist.broadcast(parameter.detach(), ranks[0], group=holders)

    def sum_gradients(self) -> None:
        """Sum the gradients of each parameter that several stages read, once a step, after its backward."""
        for parameter, _, holders in self._shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=holders)


def _agree(module: StageModule, group: dist.ProcessGroup | None) -> None:
    """Raise in every process where what one stage sends is not what the next one expects."""
    found: list[Any] = [None] * dist.get_world_size(group)
    ours = [", ".join(map(_said, side)) for side in (module.receives, module.sends)]
    dist.all_gather_object(found, ours, group)
    for number, (one, after) in enumerate(pairwise(found)):
        if one[1] != after[0]:
            raise OptionError(
                f"stage {number} sends {one[1]} and stage {number + 1} expects {after[0]}: the processes "
                "have cut different models, or cut them differently",
                "cut and save the model in one process, and load the file in each",
            )


def _said(tensor: Any) -> str:
    return f"{tensor.name} {tensor.dtype}{list(tensor.shape)}"


def _device(module: StageModule) -> torch.device:
    devices = {t.device for t in (*module.receives, *module.sends)}
    if len(devices) != 1:
        raise OptionError(f"stage {module.number} takes and sends tensors on {devices}, expected one device")
    return devices.pop()


def _shared(
    stages: list[StageModule], rank: int, group: dist.ProcessGroup | None
) -> list[tuple[nn.Parameter, list[int], dist.ProcessGroup]]:
    """Parameters of this rank that others read, with the global ranks that do, and a group of these."""
    readers: dict[nn.Parameter, list[int]] = {}
    for stage in stages:
        for parameter in stage.parameters():
            readers.setdefault(parameter, []).append(stage.number)
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    found = []
    for parameter, numbers in readers.items():
        if len(numbers) == 1 or not parameter.requires_grad:
            continue
        ranks = [n if group is None else dist.get_global_rank(group, n) for n in numbers]
        if tuple(ranks) not in groups:  # every process makes every group, in one order
            groups[tuple(ranks)] = dist.new_group(ranks)
        if rank in numbers:
            found.append((parameter, ranks, groups[tuple(ranks)]))
    return found
