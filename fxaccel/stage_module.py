"""One stage of a model that is cut, as a module: its function over its own parameters and buffers alone.

They are the very parameters of the accelerated model, under their names there, so that the `state_dict`s of
all stages together are the model's. What stages send is told before anything runs: the step is run on fake
tensors, which have sizes and no data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxaccel.capture import Call
from fxaccel.emit import Code, Tables
from fxaccel.errors import OptionError
from fxaccel.ir import Program, is_tensor
from fxaccel.module import AcceleratedModule
from fxaccel.session import Capture
from fxaccel.staged import name_of
from fxaccel.stages import Part, parts
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


class StageModule(nn.Module):
    """What one stage computes: takes the tensors that `receives` tells of, returns those of `sends`.

    number, count    which stage it is, and of how many; the first takes the tensors of a call of the model,
                     the last returns those of its result, in their order
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
        sent = _sent(self.__dict__["_run"](*received))
        return sent[0] if self.number == self.count - 1 and len(sent) == 1 else sent


def _sent(made: Any) -> tuple[Tensor, ...]:
    """The tensors among what a stage returns: contiguous, as other processes take them."""
    return tuple(t.contiguous() for t in made if isinstance(t, Tensor))


def stage_modules(model: AcceleratedModule, *args: Any, **kwargs: Any) -> list[StageModule]:
    """The stages of a model that `partition` has cut, told what they send for such a call.

    The call is one with a microbatch, and has to fit the capture that was cut.
    """
    example = Call(args, kwargs)
    one = _cut(model, example)
    program: Program = one.program
    found: list[Part] = program.facts(parts)
    state, names = _state(model), _names(model, found)
    made = [StageModule(i, len(found), {n: state[n] for n in own}) for i, own in enumerate(names)]
    flow = _flow(one, found, state, example.tensors)
    for stage, receives, sends in zip(made, flow[:-1], flow[1:], strict=True):
        stage.bind(one.code)
        stage.__dict__.update(receives=receives, sends=sends)
    return made


def _cut(model: AcceleratedModule, example: Call) -> Capture:
    """The capture that the call fits."""
    session = model.__dict__["_fxaccel"]
    if session.replacements:
        raise OptionError(
            "a pass has replaced parameters, and such a model is not taken apart into stages yet"
        )
    cut = [c for c in session.all if isinstance(c, Capture) and c.program.stages is not None]
    for one in cut:
        if one.program.in_spec == example.spec and one.accepts(*example.tensors):
            return one
    if cut:
        raise OptionError(
            "the call fits no capture that is cut", "call the model once as the stages are to be"
        )
    raise OptionError("nothing of the model is cut", "accelerate it with the pass partition and call it once")


def _state(model: nn.Module) -> dict[str, Any]:
    """Every parameter of a tree by name; a buffer with whether the `state_dict` has it."""
    found: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    for path, owner in model.named_modules(remove_duplicate=False):
        for key, buffer in owner._buffers.items():
            if buffer is not None:
                found[f"{path}.{key}".lstrip(".")] = buffer, key not in owner._non_persistent_buffers_set
    return found


def _names(model: nn.Module, found: list[Part]) -> list[list[str]]:
    """Names of what each stage holds: what it reads, by all of its names; the first also what none reads."""
    alike = {name: group for group in ties(model) for name in group}
    read = []
    for part in found:
        names = [slot.name for slot in part.program.state.values() if slot.kind != "constant"]
        read.append(list(dict.fromkeys(m for n in names for m in alike.get(n, (n,)))))
    known = {n for names in read for n in names}
    read[0] += [n for n in _state(model) if n not in known]
    return read


def _flow(
    one: Capture, found: list[Part], state: dict[str, Any], given: tuple[Tensor, ...]
) -> list[tuple[TensorMeta, ...]]:
    """What the first stage takes, and what each stage returns, by a run on fake tensors."""
    fakes, copies = FakeTensorMode(allow_non_fake_inputs=True), dict[int, Tensor]()

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return copies.setdefault(id(value), fakes.from_tensor(value))

    code = replace(one.code, constants={k: fake(v) for k, v in one.code.constants.items()})
    whole = Tables({n: fake(v[0] if isinstance(v, tuple) else v) for n, v in state.items()})
    values: Any = [fake(t) for t in given]
    told, functions = [_told(found[0].receives, values)], code.bind(whole, "<fxaccel stages>")
    with fakes, torch.enable_grad():
        for i, part in enumerate(found):
            values = _sent(functions[name_of(i)](*values))
            outputs = part.sends or _tensor_outputs(one.program)
            told.append(_told(outputs, values))
    return told


def _tensor_outputs(program: Program) -> tuple[fx.Node, ...]:
    shown: Any = program.graph.output_node().args[0]
    return tuple(n for n in shown if isinstance(n, fx.Node) and is_tensor(n.meta["val"]))


def _told(nodes: tuple[fx.Node, ...], values: Any) -> tuple[TensorMeta, ...]:
    return tuple(
        TensorMeta(n.name, tuple(t.shape), t.dtype, t.device, t.requires_grad)
        for n, t in zip(nodes, values, strict=True)
    )
