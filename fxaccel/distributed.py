"""The stages of a model that is cut, in the processes of a group, under the schedules of torch.

    fast = fxaccel.load("model.fxa")                    # cut by the pass partition, the same in each process
    pipeline = fast.schedule("1f1b", microbatches=8, loss=loss)
    optimizer = torch.optim.AdamW(pipeline.parameters())
    for ids, labels in batches:                         # in the process of the first and of the last stage
        optimizer.zero_grad()
        pipeline.step(ids, target=labels)
        optimizer.step()

What goes from stage to stage is said beforehand: torch would otherwise run each stage on memory that nothing
was written to, which spoils statistics of batch norms and fails on indices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from fxaccel.errors import FxaccelError, OptionError
from fxaccel.faults import Watch
from fxaccel.module import AcceleratedModule
from fxaccel.pipeline.orders import order
from fxaccel.stage_module import Flow, StageModule, Taken, taken
from fxaccel.torch_stage import Stage

Loss = Callable[[Any, Any], Tensor]
"""(result of the model for a microbatch, its target) -> loss."""


class Pipeline:
    """The stages of this process, and the training step that all processes of the group do together.

    schedule        as orders.SCHEDULES names them, in any case: "gpipe", "1f1b", "interleaved1f1b", ...
    microbatches    that each batch is cut into, equal ones, along its first dimension
    loss            of a microbatch's result and target; None where the model returns its own
    reduction       "mean" or "sum" of the microbatches' losses
    device          of the stages, that of the model if None
    stages          modules of this process, as `fast.stage` gives them or wrapped in DDP; made if None
    group           the processes; those of a model cut into n stages are n, n / 2, ...
    timeout         seconds that a step may take: a process whose stage takes longer ends, and all others

    Made in all processes of the world at once, of models that are cut alike. Parameters that several stages
    read are those of the first process that holds them, and their gradients are summed. Gradients add up to
    what is there.
    """

    def __init__(
        self, model: AcceleratedModule, schedule: str, microbatches: int, *, loss: Loss | None = None,
        reduction: str = "mean", device: Any = None, stages: Sequence[nn.Module] | None = None,
        group: dist.ProcessGroup | None = None, timeout: float = 600.0,
    ) -> None:  # fmt: skip
        if reduction not in ("mean", "sum"):
            raise OptionError(f"reduction is {reduction!r}, expected 'mean' or 'sum'")
        if not timeout > 0:
            raise OptionError(f"timeout is {timeout!r}, expected seconds, above 0")
        if not dist.is_initialized():
            raise OptionError(
                "a schedule runs in the processes of torch.distributed, of which there is none",
                "call torch.distributed.init_process_group() in each, under torchrun",
            )
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.rank, self.size, self.ranks = dist.get_rank(group), len(ranks), ranks
        self.loss, self.mean, self.timeout = loss, reduction == "mean", timedelta(seconds=timeout)
        self.groups: list[dist.ProcessGroup] = []
        self.group = self._groups([ranks])[tuple(ranks)]
        self.runners: dict[Flow, tuple[Any, list[Stage]]] = {}
        self.micro: list[tuple[Tensor, ...]] = []
        self.targets: list[Any] | None = None
        self.steps = 0
        prepared: dict[str, Any] = {"asked": [schedule, microbatches]}
        try:
            self._prepare(model, schedule, microbatches, device, stages)
            flow = self.taken.flow(self.taken.captured())
            prepared["flow"] = [[str(t) for t in side] for side in flow]
            self._find_loss(flow)
        except FxaccelError as error:
            prepared["refused"] = error.message, error.hint
        store = self._agree(prepared)
        self.watch = Watch(store, self.rank, [self.order.stages(r) for r in range(self.size)], timeout)
        self.shared = list(self._shared())

    def _groups(self, wanted: Sequence[Sequence[int]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """Groups of these ranks, for this pipeline alone; every process makes those of all, in one order.

        Torch can make them by their members alone, but gives a new one the name, and so the connections, of
        one that has been destroyed.
        """
        ours = [tuple(ranks) for ranks in wanted]
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, ours)
        made = {}
        for ranks in sorted({ranks for one in everyones for ranks in one}):
            group = dist.new_group(list(ranks), timeout=self.timeout)
            if ranks in ours:
                made[ranks] = group
        self.groups += made.values()
        return made

    def _prepare(
        self, model: AcceleratedModule, schedule: str, microbatches: int, device: Any,
        stages: Sequence[nn.Module] | None,
    ) -> None:  # fmt: skip
        """What this process can find out alone."""
        self.taken: Taken = taken(model)
        chunks, rest = divmod(self.taken.count, self.size)
        if rest:
            raise OptionError(
                f"the model is cut into {self.taken.count} stages, expected as many processes or a part of "
                f"that, came {self.size}",
                "cut it with stages= the count of processes, or a multiple of it",
            )
        self.order = order(schedule, self.size, microbatches, chunks)
        self.numbers = self.order.stages(self.rank)
        self.device = self.taken.device if device is None else torch.device(device)
        own = [self.taken.of(n, self.device) for n in self.numbers]
        self.stages = list(own if stages is None else stages)
        if [plain(s) for s in self.stages] != own:
            raise OptionError(
                "stages are not those of this process, expected what fast.stage(n, device) gives for n in "
                f"{self.numbers} on {self.device}, or what wraps that"
            )
        wrapped = any(isinstance(s, DistributedDataParallel) for s in self.stages)
        if wrapped and any(map(self.order.parted, range(self.taken.count))):
            raise OptionError(
                f"{self.order.schedule} does backward in two parts, and DistributedDataParallel sees one",
                "take 1F1B, or shard the stages by torch.distributed.fsdp.fully_shard",
            )

    def _agree(self, prepared: dict[str, Any]) -> Store:
        """The store of this pipeline; OptionError in every process where they do not fit together."""
        default = dist.distributed_c10d._get_default_store()
        name = f"fxaccel/{'-'.join(map(str, self.ranks))}"
        if self.rank == 0:
            prepared["serial"] = default.add(f"{name}/pipelines", 1)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, prepared, self.group)
        for rank, one in enumerate(found):
            if "refused" in one:
                message, hint = one["refused"]
                raise OptionError(message if rank == self.rank else f"rank {rank}: {message}", hint)
            if one["asked"] != found[0]["asked"]:
                raise OptionError(f"rank {rank} asks for {one['asked']} and rank 0 for {found[0]['asked']}")
        for stage, (before, after) in enumerate(pairwise(self.order.placement)):
            sends, expects = found[before]["flow"][stage + 1], found[after]["flow"][stage + 1]
            if sends != expects or len(found[before]["flow"]) != len(found[after]["flow"]):
                raise OptionError(
                    f"stage {stage} sends {', '.join(sends)} and stage {stage + 1} expects "
                    f"{', '.join(expects)}: the processes have cut different models, or cut them differently",
                    "cut and save the model in one process, and load the file in each",
                )
        return PrefixStore(f"{name}/{found[0]['serial']}", default)

    def _shared(self) -> Iterator[tuple[nn.Parameter, dist.ProcessGroup]]:
        """Parameters of this process that others hold as well, with a group of those that do."""
        holders: dict[int, tuple[str, set[int]]] = {}
        for stage, names in enumerate(self.taken.names):
            for name in names:
                tensor = self.taken.state[name]
                if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                    holders.setdefault(id(tensor), (name, set()))[1].add(self.order.placement[stage])
        members = {
            name: tuple(self.ranks[r] for r in sorted(ranks))
            for name, ranks in holders.values()
            if len(ranks) > 1 and self.rank in ranks
        }
        groups = self._groups(sorted(set(members.values())))
        own = {n: p for s in self.stages for n, p in plain(s).named_parameters(remove_duplicate=False)}
        for name, ranks in members.items():
            dist.broadcast(_local(own[name]), ranks[0], group=groups[ranks])
            yield own[name], groups[ranks]

    # -- a step -----------------------------------------------------------------------------------

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor | None:
        """Forward and backward of a batch, and the sum of gradients that several processes have.

        args, kwargs    of a call of the model with the batch, in the process of the first stage; ignored in
                        others
        target          for the loss, in the process of the last stage: tensors with the batch first

        Returns the loss in the process of the last stage, None in others. Raises StageError in every process
        where a stage of any fails, does not answer, or does not end within the time-out.
        """
        with self.watch.step(self.close):
            schedule, stages = self._runner(self._sizes(args, kwargs))
            before = [(p, p.grad) for p, _ in self.shared]
            for parameter, _ in before:
                parameter.grad = None
            last = self.taken.count - 1 in self.numbers
            self.targets = self._split(target) if last and target is not None else None
            losses = list[Tensor]()
            given: dict[str, Any] = {"target": self._counted(), "losses": losses} if last else {}
            schedule.step(*[self._counted()] * (0 in self.numbers), return_outputs=False, **given)
            for stage in stages:
                stage.finish()
            self._sum(before)
            self.micro.clear()
            self.targets = None
        return torch.stack(losses).sum().detach() if losses else None

    def _counted(self) -> Tensor:
        """What torch cuts in the place of a batch: the numbers of the microbatches."""
        return torch.arange(self.order.microbatches)

    def _sizes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
        """What goes between the stages in this step: the first stage's process tells the others the sizes."""
        self.steps += 1
        key = f"step {self.steps}"
        if 0 in self.numbers:
            batch = [t.to(self.device) for t in self.taken.tensors(args, kwargs)]
            self.micro[:] = self.taken.split(batch, self.order.microbatches)
            said = json.dumps([[list(t.shape), t.requires_grad] for t in self.micro[0]])
            self.watch.tell(key, said)
            self.watch.store.delete_key(f"step {self.steps - 2}")
        said = self.watch.ask(key)
        return self.taken.flow(self.taken.like(json.loads(said)))

    def _runner(self, flow: Flow) -> tuple[Any, list[Stage]]:
        """Torch's schedule, and the stages of this process that it runs, made once for each size."""
        if flow not in self.runners:
            stages = [self._stage(s, n, flow) for s, n in zip(self.stages, self.numbers, strict=True)]
            kind: Any = get_schedule_class(self.order.schedule)
            what = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
            options = {"loss_fn": self._loss, "scale_grads": False}
            self.runners[flow] = kind(what, self.order.microbatches, **options), stages
        return self.runners[flow]

    def _stage(self, module: nn.Module, number: int, flow: Flow) -> Stage:
        receives, sends = ([replace(t, device=self.device) for t in flow[number + i]] for i in (0, 1))
        return Stage(
            module, number, self.order, self.device, self.group, receives, sends, self.watch,
            self.micro,
        )  # fmt: skip

    def _split(self, value: Any) -> list[Any]:
        """Equal parts of the target, along the first dimension of its tensors."""
        count = self.order.microbatches
        leaves, spec = pytree.tree_flatten(value)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] % count:
                came = list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise OptionError(
                    f"the target has {came}, expected tensors whose first dimension is cut into {count} "
                    "equal microbatches"
                )
        parts = zip(*(leaf.to(self.device).chunk(count) for leaf in leaves), strict=True)
        return [pytree.tree_unflatten(part, spec) for part in parts]

    def _loss(self, made: Any, number: Tensor) -> Tensor:
        """Of one microbatch, as its share of the step's."""
        tensors = (made,) if isinstance(made, Tensor) else tuple(made)
        if self.loss is None:
            loss = tensors[self.own_loss]
        else:
            target = None if self.targets is None else self.targets[int(number)]
            loss = self.loss(self.taken.result(tensors), target)
        return loss / (self.order.microbatches if self.mean else 1)  # a tensor of its own

    def _find_loss(self, flow: Flow) -> None:
        """Which output is the model's own loss: the first that is one number with a gradient."""
        numbers = [i for i, t in enumerate(flow[-1]) if t.shape == () and t.requires_grad]
        if self.loss is None and not numbers:
            raise OptionError(
                f"the model returns no loss of its own, but {', '.join(map(str, flow[-1]))}",
                "give loss=, a function of a result and a target",
            )
        self.own_loss = numbers[0] if numbers else -1

    def _sum(self, before: list[tuple[nn.Parameter, Tensor | None]]) -> None:
        """Sum the gradients of parameters that several processes hold, and add what was there before."""
        for (parameter, group), (_, grad) in zip(self.shared, before, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(_local(parameter.grad), group=group)
            if grad is not None:
                parameter.grad = grad.add_(parameter.grad)

    # -- state ------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the stages of this process, each once."""
        return iter(dict.fromkeys(p for s in self.stages for p in s.parameters()))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names in the model's `state_dict`; a tied one by its first name here."""
        first = {id(p): (n, p) for s in self.stages for n, p in [*plain(s).named_parameters()][::-1]}
        return iter(first.values())

    def state_dict(self) -> dict[str, Any]:
        """Tensors of the stages of this process, by their names in the model's `state_dict`."""
        return {name: t for s in self.stages for name, t in plain(s).state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what the stages of this process hold from a `state_dict` of the model, or of a part of it.

        It may have more; OptionError where it has less, and nothing is loaded.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise OptionError(f"the state has no {', '.join(missing)}, which the stages here hold")
        for stage in map(plain, self.stages):
            stage.load_state_dict({n: state[n] for n in stage.state_dict()})

    def close(self) -> None:
        """End the connections of this pipeline; the group that it was made for stays."""
        while self.groups:
            group = self.groups.pop()
            if dist.get_backend(group) == "nccl":
                dist.distributed_c10d._abort_process_group(group)
            else:
                dist.destroy_process_group(group)


def plain(stage: nn.Module) -> StageModule:
    """The stage that is wrapped."""
    found: Any = stage.module if isinstance(stage, DistributedDataParallel) else stage
    inner: StageModule = found
    return inner


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is here."""
    found: Any = tensor.detach()
    local: Tensor = found.to_local() if hasattr(found, "to_local") else found
    return local
