"""A stage for the schedules of torch: its PipelineStage, mended where stages send more than one chain of values.

Torch takes the batch apart by itself; here the first stage is handed its microbatches. Where a schedule does
backward in two parts, torch's first part detaches the results of the stage in place, which autograd may
still need, and loses gradients of results that hang on no input of the stage (a bias that is made of
parameters alone and sent on). Here results are copies, and those others have their backward with the
second part.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.distributed.pipelining import PipelineStage

from fxaccel.faults import Watch
from fxaccel.pipeline.orders import ONE, Order
from fxaccel.stage_module import TensorMeta

Results = list[tuple[Tensor, Tensor | None]]
"""Results of a stage with their gradients; None stands for the gradient of a loss."""


class Stage(PipelineStage):
    """One stage of an order in this process.

    receives, sends    what goes from stage to stage
    micro              tensors of each microbatch, for the first stage
    """

    def __init__(
        self, module: nn.Module, number: int, order: Order, device: torch.device, group: dist.ProcessGroup,
        receives: Sequence[TensorMeta], sends: Sequence[TensorMeta], watch: Watch,
        micro: list[tuple[Tensor, ...]],
    ) -> None:  # fmt: skip
        super().__init__(
            module, number, len(order.placement), device, group=group,
            input_args=tuple(t.empty() for t in receives), output_args=tuple(t.empty() for t in sends),
        )  # fmt: skip
        self.stage_index_to_group_rank = dict(enumerate(order.placement))
        self.watch, self.micro = watch, micro
        self.parted = order.parted(number)
        self.sends_alone = order.schedule not in ONE
        self.known = dict(order.acknowledged(number))
        self.sending: dict[tuple[str, int], list[Any]] = {}
        self.alone: dict[int, Results] = {}
        self.rooms: dict[int, tuple[torch.Size, torch.dtype]] = {}  # by the id of a receipt

    # -- receipts: torch makes room for those of all microbatches at once, here each has it while it is needed

    def _prepare_forward_infra(self, *args: Any, **options: Any) -> Any:
        made = super()._prepare_forward_infra(*args, **options)
        self._cleared(self.args_recv_info.values())
        return made

    def _prepare_backward_infra(self, *args: Any, **options: Any) -> Any:
        made = super()._prepare_backward_infra(*args, **options)
        self._cleared(self.grad_recv_info.values())
        return made

    def _cleared(self, receipts: Iterable[Iterable[Any]]) -> None:
        for one in (one for several in receipts for one in several):
            if getattr(one, "buffer", None) is not None:
                self.rooms.setdefault(id(one), (one.buffer.shape, one.buffer.dtype))
                one.buffer = None

    def _room(self, receipts: Iterable[Any]) -> None:
        for one in receipts:
            if id(one) in self.rooms and one.buffer is None:
                size, dtype = self.rooms[id(one)]
                one.buffer = torch.empty(size, dtype=dtype, device=self.device)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._room(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self._room(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    # -- sends: torch holds those of all microbatches to the end, here each until it is known to have come

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._sent("F", fwd_chunk_id, super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._sent("B", bwd_chunk_id, super().get_bwd_send_ops(bwd_chunk_id))

    def _sent(self, kind: str, number: int, asked: list[dist.P2POp]) -> list[dist.P2POp]:
        """What is left for torch to send: all in a schedule that waits for its sends itself."""
        if not self.sends_alone:
            return asked
        self.sending[kind, number] = [
            dist.isend(p.tensor, group=p.group, tag=p.tag, group_dst=p.group_peer) for p in asked
        ]
        return []

    def _come(self, kind: str, number: int) -> None:
        """Let go of what has come: this waits for nothing but the word of it."""
        for work in self.sending.pop((kind, number), ()):
            work.wait()

    def finish(self) -> None:
        """Wait for what is still on its way."""
        for kind, number in list(self.sending):
            self._come(kind, number)

    # -- actions ----------------------------------------------------------------------------------

    def forward_one_chunk(self, fwd_chunk_id: int, args: Any, *more: Any, **options: Any) -> Any:
        for number in self.known.get(fwd_chunk_id, ()):
            self._come("B", number)
        given = self.micro[fwd_chunk_id] if self.is_first else args
        with self.watch.computing(self.stage_index, f"the forward of microbatch {fwd_chunk_id}"):
            made = super().forward_one_chunk(fwd_chunk_id, given, *more, **options)
        results, inputs = self.fwd_cache[fwd_chunk_id]
        if self.is_last:
            results = ()  # its loss is all that backward begins at
        elif self.parted:
            results = tuple(t.clone() if t.requires_grad else t for t in results)
        self.fwd_cache[fwd_chunk_id] = results, inputs
        self._cleared([self.args_recv_info[fwd_chunk_id]])
        return made

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self._come("F", bwd_chunk_id)  # as its gradient tells
        with self.watch.computing(self.stage_index, f"the backward of microbatch {bwd_chunk_id}"):
            if full_backward or self.is_first:
                super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
                if loss is not None:
                    loss.detach_()  # torch holds it to the end of the step, and with it what was received
            else:
                self._backward_input(bwd_chunk_id, loss, last_backward)
        self._cleared([self.grad_recv_info.get(bwd_chunk_id, ())])
        grads = self.bwd_cache.get(bwd_chunk_id, ())
        self.bwd_cache[bwd_chunk_id] = tuple(None if g is None else g.contiguous() for g in grads)

    def _backward_input(self, number: int, loss: Any, last_backward: bool) -> None:
        """Gradients of what the stage has received; what those of parameters take is kept for later."""
        results, inputs = self.fwd_cache.pop(number)
        made: Results = [(loss, None)]
        if not self.is_last:
            pairs = zip(results, self._retrieve_recv_grads(number), strict=True)
            made = [(r, g) for r, g in pairs if r.requires_grad]
        leaves = {get_gradient_edge(t).node for t in inputs if isinstance(t, Tensor) and t.requires_grad}
        hanging = [pair for pair in made if _reaches(pair[0], leaves)]
        self.alone[number] = [pair for pair in made if not any(pair is other for other in hanging)]
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        groups: list[dict[str, Any]] = []
        if hanging:
            given = {
                "stage_output": tuple(r for r, _ in hanging),
                "output_grads": None if self.is_last else [g for _, g in hanging],
                "input_values": inputs,
            }
            grads, found = self.backward_maybe_with_nosync("input", given, last_backward=last_backward)
            groups = found or []
        self.backward_state[number] = inputs, groups, (), None
        self.dw_runner[number] = lambda: None
        self.bwd_cache[number] = tuple(grads)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self.watch.computing(self.stage_index, f"the backward of microbatch {bwd_chunk_id}"):
            alone = self.alone.pop(bwd_chunk_id, [])
            if alone:  # what they hang on may be in the rest of the graph, too
                torch.autograd.backward([r for r, _ in alone], [g for _, g in alone], retain_graph=True)
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


def _reaches(result: Tensor, leaves: set[Node]) -> bool:
    """Whether a gradient of the result flows to one of these."""
    waiting, seen = [get_gradient_edge(result).node], set[Node]()
    while waiting:
        node = waiting.pop()
        if node in leaves:
            return True
        if node not in seen:
            seen.add(node)
            waiting += [after for after, _ in node.next_functions if after is not None]
    return False
