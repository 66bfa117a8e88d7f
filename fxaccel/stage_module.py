"""One stage of a model that is cut, as a module: its function over its own parameters and buffers alone.

They are the very parameters of the accelerated model, under their names there, so that the `state_dict`s of
all stages together are the model's; on another device they are copies. What stages send is told before
anything runs: the step is run on fake tensors, which have sizes and no data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxaccel.capture import Call
from fxaccel.devices import devices, moved
from fxaccel.emit import Code, Tables, emit
from fxaccel.errors import OptionError
from fxaccel.fakes import Fakes
from fxaccel.ir import Program, expr, is_tensor, number
from fxaccel.memory import Ledger
from fxaccel.module import AcceleratedModule
from fxaccel.provenance import locate
from fxaccel.session import Capture
from fxaccel.staged import name_of
from fxaccel.stages import Part, batches, parts
from fxaccel.tree import module_at, ties


@dataclass(frozen=True)
class TensorMeta:
    """A tensor that goes from one stage to the next; `name` is that of its call, or of an input."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def empty(self) -> Tensor:
        """A tensor like it, whose values are anything."""
        made = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return made.requires_grad_(self.requires_grad)

    def __str__(self) -> str:
        return f"{self.name} {_said(self)}"


Flow = tuple[tuple[TensorMeta, ...], ...]
"""What the first stage takes, and what each stage returns, for one size of a call."""


class StageModule(nn.Module):
    """What one stage computes: takes the tensors that `receives` tells of, returns those of `sends`.

    number, count    which stage it is, and of how many; the first takes the tensors of a call of the model,
                     the last returns those of its result, in their order
    receives, sends  as they are for the call that the stage was made for; it takes other sizes as well
    """

    receives: tuple[TensorMeta, ...]
    sends: tuple[TensorMeta, ...]

    def __init__(self, number: int, count: int, state: dict[str, Any]) -> None:
        super().__init__()
        self.number, self.count = number, count
        for name, tensor in state.items():
            path, _, key = name.rpartition(".")
            owner = module_at(self, path)  # tables are written to: names may be attributes of this class
            if isinstance(tensor, nn.Parameter):
                owner._parameters[key] = tensor
            else:
                owner._buffers[key], persistent = tensor
                owner._non_persistent_buffers_set.update([] if persistent else [key])

    def bind(self, code: Code) -> None:
        """Take the function of this stage from the code of the whole model."""
        modules = dict(self.named_modules())
        absent = SimpleNamespace(_parameters={}, _buffers={})
        tree: Any = SimpleNamespace(get_submodule=lambda path: modules.get(path, absent))
        self.__dict__["_run"] = code.bind(tree, f"<fxaccel stage {self.number}>")[name_of(self.number)]

    def forward(self, *received: Tensor) -> tuple[Tensor, ...] | Tensor:
        """What the stage sends; of the last one the result, if that is one tensor."""
        try:
            sent = _sent(self.__dict__["_run"](*received))
        except Exception as error:
            locate(error)
            raise
        return sent[0] if self.number == self.count - 1 and len(sent) == 1 else sent


def _sent(made: Any) -> tuple[Tensor, ...]:
    """The tensors among what a stage returns: contiguous, as other processes take them."""
    return tuple(t.contiguous() for t in made if isinstance(t, Tensor))


def stage_modules(model: AcceleratedModule, *args: Any, **kwargs: Any) -> list[StageModule]:
    """The stages of a model that `partition` has cut, told what they send for such a call.

    The call is one with a microbatch, and has to fit the capture that was cut.
    """
    whole = taken(model)
    tensors = whole.tensors(args, kwargs)
    whole.check(tensors)
    flow = whole.flow(tensors)
    return [whole.stage(i, flow) for i in range(whole.count)]


def taken(model: AcceleratedModule) -> Taken:
    """The model taken apart, once for as long as its captures are what they are."""
    session = model.__dict__["_fxaccel"]
    known = session.taken
    if not isinstance(known, Taken) or not any(known.one is c for c in session.all):
        session.taken = Taken(model)
    found: Taken = session.taken
    return found


class Taken:
    """A model that `partition` has cut, to be taken apart.

    one      the capture that is cut, the only one
    count    of stages
    """

    def __init__(self, model: AcceleratedModule) -> None:
        session = model.__dict__["_fxaccel"]
        if session.replacements:
            raise OptionError(
                "a pass has replaced parameters, and such a model is not taken apart into stages yet"
            )
        cut = [c for c in session.all if isinstance(c, Capture) and c.program.stages is not None]
        if len(cut) != 1:
            raise OptionError(
                f"{len(cut)} captures of the model are cut, expected one"
                if cut
                else "nothing of the model is cut",
                "accelerate it with the pass partition and call it once, as in training",
            )
        self.model, self.one = model, cut[0]
        self.program: Program = self.one.program
        self.parts: list[Part] = self.program.facts(parts)
        self.count = len(self.parts)
        self.inputs = {n.name: n.meta["val"] for n in self.program.input_nodes()}
        self.flows: dict[Any, Flow] = {}
        self.made: dict[tuple[int, torch.device], StageModule] = {}
        self.own: dict[torch.device, Code] = {}
        self.copies: dict[tuple[int, torch.device], Tensor] = {}

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        found = devices(self.program)
        if len(found) != 1:
            raise OptionError(f"the model is on {found}, expected one device", "stages are moved apart later")
        return found[0]

    @cached_property
    def state(self) -> dict[str, Any]:
        """Every parameter by name; a buffer with whether the `state_dict` has it."""
        found: dict[str, Any] = dict(self.model.named_parameters(remove_duplicate=False))
        for path, owner in self.model.named_modules(remove_duplicate=False):
            for key, buffer in owner._buffers.items():
                if buffer is not None:
                    found[f"{path}.{key}".lstrip(".")] = buffer, key not in owner._non_persistent_buffers_set
        return found

    @cached_property
    def names(self) -> list[list[str]]:
        """Names of what each stage holds: what it reads, by all of its names; the first also what none
        reads."""
        alike = {name: group for group in ties(self.model) for name in group}
        read = []
        for part in self.parts:
            names = [slot.name for slot in part.program.state.values() if slot.kind != "constant"]
            read.append(list(dict.fromkeys(m for n in names for m in alike.get(n, (n,)))))
        known = {n for names in read for n in names}
        read[0] += [n for n in self.state if n not in known]
        return read

    # -- calls ------------------------------------------------------------------------------------

    def tensors(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Those of a call, of any size; OptionError where it is not one as the model was captured for."""
        call = Call(tuple(args), kwargs)
        if self.program.in_spec != call.spec or self.program.baked != call.baked:
            raise OptionError(
                "the call fits no capture that is cut: its arguments are others, or in other places"
            )
        return call.tensors

    def split(self, batch: Sequence[Tensor], count: int) -> list[tuple[Tensor, ...]]:
        """The tensors of a call cut into those of equal microbatches.

        Cut are those whose first dimension is the batch, or which have so many times the rows that the model
        was captured for; all microbatches have the others.
        """
        symbols, cut = self.program.facts(batches), list[Sequence[Tensor]]()
        for (name, val), given in zip(self.inputs.items(), batch, strict=True):
            tensor = given.contiguous() if name in self.program.contiguous else given
            rows = expr(val.shape[0]) if val.dim() and tensor.dim() else None
            several = rows is not None and rows.is_Integer and tensor.shape[0] != rows
            if not several and str(rows) not in symbols:
                cut.append([tensor] * count)
                continue
            if tensor.shape[0] % count:
                raise OptionError(
                    f"a batch of {tensor.shape[0]} came, expected one that can be cut into {count} equal "
                    "microbatches"
                )
            cut.append(tensor.chunk(count))
        micro = list(zip(*cut, strict=True))
        self.check(micro[0])
        return micro

    def check(self, tensors: Sequence[Tensor]) -> None:
        """OptionError where the first stage does not take these."""
        if not self.one.accepts(*tensors):
            wanted, came = (", ".join(map(_said, side)) for side in (self.inputs.values(), tensors))
            raise OptionError(
                f"the call fits no capture that is cut: expected {wanted}, came {came}",
                "sizes that are numbers are fixed, since the model was captured with no others",
            )

    def captured(self) -> tuple[Tensor, ...]:
        """Tensors like those of one microbatch of the call that was captured, without data."""
        hints = self.parts[0].program.hints
        return self.like([([number(s, hints) for s in v.shape], False) for v in self.inputs.values()])

    def like(self, sizes: Iterable[tuple[Sequence[int], bool]]) -> tuple[Tensor, ...]:
        """Tensors without data as the inputs have them, of these sizes, and with a gradient or without."""
        return tuple(
            torch.empty(size, dtype=v.dtype, device="meta", requires_grad=grad)
            for v, (size, grad) in zip(self.inputs.values(), sizes, strict=True)
        )

    # -- stages -----------------------------------------------------------------------------------

    def of(self, number: int, device: torch.device | None = None) -> StageModule:
        """One stage, the same at each call; told of the microbatches that the model was cut for."""
        at = self.device if device is None else device
        if (number, at) not in self.made:
            self.made[number, at] = self.stage(number, self.flow(self.captured()), at)
        return self.made[number, at]

    def stage(self, number: int, flow: Flow, device: torch.device | None = None) -> StageModule:
        """One stage, with the parameters on a device."""
        if not 0 <= number < self.count:
            raise OptionError(
                f"there is no stage {number}, the model is cut into {self.count}", "they count from 0"
            )
        at = self.device if device is None else device
        if at not in self.own:
            self.own[at] = self.one.code if at == self.device else emit(moved(self.program, at))
        made = StageModule(number, self.count, {n: self.on(self.state[n], at) for n in self.names[number]})
        made.bind(self.own[at])
        receives, sends = (tuple(replace(t, device=at) for t in flow[number + i]) for i in (0, 1))
        made.__dict__.update(receives=receives, sends=sends)
        return made

    def on(self, tensor: Any, device: torch.device) -> Any:
        """A parameter or buffer on a device: itself, or a copy, one for all its names."""
        if isinstance(tensor, tuple):
            return self.on(tensor[0], device), tensor[1]
        if tensor.device == device:
            return tensor
        key = id(tensor), device
        if key not in self.copies:
            copy = tensor.detach().to(device)
            is_parameter = isinstance(tensor, nn.Parameter)
            self.copies[key] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
        return self.copies[key]

    def flow(self, given: Sequence[Tensor]) -> Flow:
        """What the first stage takes, and what each stage returns; found once for each size."""
        key = tuple((t.shape, t.requires_grad) for t in given)
        if key not in self.flows:
            self.flows[key] = self._flow(given)
        return self.flows[key]

    def _flow(self, given: Sequence[Tensor]) -> Flow:
        """The same, by a run on fake tensors."""
        fakes, copies = Fakes(Ledger()), dict[int, Tensor]()

        def fake(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return copies.setdefault(id(value), fakes.from_tensor(value))

        code = replace(self.one.code, constants={k: fake(v) for k, v in self.one.code.constants.items()})
        state = {n: fake(v[0] if isinstance(v, tuple) else v) for n, v in self.state.items()}
        functions = code.bind(Tables(state), "<fxaccel stages>")
        with fakes, torch.enable_grad():
            values: Any = [
                torch.empty(t.shape, dtype=t.dtype, device=self.device, requires_grad=t.requires_grad)
                for t in given
            ]
            told = [_told(self.parts[0].receives, values)]
            for i, part in enumerate(self.parts):
                values = _sent(functions[name_of(i)](*values))
                told.append(_told(part.sends or self.outputs, values))
        return tuple(told)

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The tensors of the result."""
        shown: Any = self.program.graph.output_node().args[0]
        return tuple(n for n in shown if isinstance(n, fx.Node) and is_tensor(n.meta["val"]))

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """The model's result, of the tensors that the last stage returns."""
        given, shown = iter(tensors), list(self.program.graph.output_node().args[0])
        outputs = set(self.outputs)
        return self.one.result([next(given) if n in outputs else n for n in shown])


def _said(tensor: Any) -> str:
    """Type and sizes, as text."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _told(nodes: tuple[fx.Node, ...], values: Any) -> tuple[TensorMeta, ...]:
    return tuple(
        TensorMeta(n.name, tuple(t.shape), t.dtype, t.device, t.requires_grad)
        for n, t in zip(nodes, values, strict=True)
    )
