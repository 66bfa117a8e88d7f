"""Let the channels of a place lie side by side in memory from one convolution to the next.

    y = conv2d(x, w, b, ..)   =>   y = conv2d(contiguous(x, memory_format=channels_last), w, b, ..)

Fires on   convolutions of two and three dimensions in float32, bfloat16 and float16. What they give is
           channels last then, and so is what pooling, norms, concatenations and elementwise operators make of
           it: a value is laid out anew only where one comes that is not, and where the caller or a reader of
           strides sees it. Not beside a batch norm that trains on the CPU.
Saves      what oneDNN and cuDNN spend on laying out what a convolution reads and gives, at each of them.
           On one thread of a CPU most networks gain and some lose (`bench/convolution.py`).
Exact      the same numbers at other places; a convolution agrees within its own rounding. A batch norm of the
           batch's own statistics would not: of 4 x 96 x 96 places torch's loses 40 times as much that way.
Source     Ma 2019, "Channels Last Memory Format in PyTorch", pytorch.org's tutorials.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxaccel.canonical.values import same_strides
from fxaccel.ir import Program, arguments, call, is_call
from fxaccel.layout import layouts, settle
from fxaccel.rule import Pass, Refusal, joined, register

aten = torch.ops.aten
FORMATS = {
    aten.conv2d.default: torch.channels_last, aten.conv2d.padding: torch.channels_last,
    aten.conv3d.default: torch.channels_last_3d, aten.conv3d.padding: torch.channels_last_3d,
}  # fmt: skip
OTHERS = (
    aten.conv1d.default, aten.conv1d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plan:
    """The convolutions that are to read channels last, and those that stay as they are, with the reason."""

    convolutions: tuple[fx.Node, ...]
    refused: tuple[tuple[fx.Node, str], ...]

    def __str__(self) -> str:
        return f"{len(self.convolutions)} convolutions read channels last"


@register
class UseChannelsLast(Pass):
    """Between convolutions, values are laid out with the channels of a place side by side."""

    name = "use-channels-last"
    step = "lower"

    def plan(self, program: Program) -> Plan:
        """Every convolution that has such a layout."""
        found = [n for n in program.graph.nodes if is_call(n, *FORMATS, *OTHERS) and self.covers(n)]
        trained = [n for n in program.graph.nodes if is_call(n, aten.batch_norm.default) and n.args[5]]
        why = {n: joined(_refuse(n, trained)) for n in found}
        refused = tuple((n, reason) for n, reason in why.items() if reason)
        return Plan(tuple(n for n in found if not why[n]), refused)

    def apply(self, program: Program, plan: Plan, driver: Any) -> None:
        """Lay out what each of them reads; then leave out what is laid out so already."""
        for node, why in plan.refused:
            driver.refused(node, why)
        before, copies = layouts(program), list[fx.Node]()
        for node in plan.convolutions:
            format = FORMATS[node.target]
            x, *rest = node.args
            with program.graph.inserting_before(node):
                copies.append(driver.call(node, aten.contiguous.default, x, memory_format=format))
                new = call(
                    program.graph, node, node.target, (copies[-1], *rest), by=self.name, val=node.meta["val"]
                )
            proof = driver.prove(type(self).__name__, [node], [copies[-1], new], [node], [new])
            driver.applied(node, proof=proof.key)
            driver.exchange(node, new)
        settle(program, driver, before, copies)
        for copy in copies:
            if same_strides(copy.args[0].meta["val"], copy.meta["val"]):
                copy.replace_all_uses_with(copy.args[0], propagate_meta=False)
                program.graph.erase_node(copy)


def _refuse(node: fx.Node, trained: Sequence[fx.Node]) -> Iterator[str]:
    """Why a convolution stays, in a graph with such batch norms of the batch's own statistics."""
    x = arguments(node)["input"].meta["val"]
    if trained and x.device.type == "cpu":
        yield Refusal(
            f"%{trained[0].name} takes statistics of the batch, "
            "which torch sums less exactly on the CPU where channels are last",
            "model.eval()",
        )
    if node.target in OTHERS:
        yield "convolutions of one dimension and transposed ones take what they are given"
    elif x.dim() != arguments(node)["weight"].meta["val"].dim():
        yield Refusal(
            f"its input has {x.dim()} dimensions, without a batch there is no such layout", "a batch of one"
        )
    if x.dtype not in DTYPES:
        yield Refusal(f"dtype {x.dtype} is not one of {', '.join(map(str, DTYPES))}", "one of them")
