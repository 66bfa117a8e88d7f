"""What one training step of a program takes, call by call: the facts that a schedule is planned on.

The step is run on fake tensors, which have sizes and no data: forward, then backward from the loss (the
first output that is one number), or from all outputs where there is none. Every byte is seen that an
operator allocates and whatever autograd saves; what a kernel takes for itself while it runs is not.
"""

from __future__ import annotations

import bisect
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from fxaccel import scheduled
from fxaccel.cost import node_flops, parameter_bytes
from fxaccel.effects import has_effect, is_random, mutated_arguments, written
from fxaccel.emit import Tables
from fxaccel.errors import RuleError
from fxaccel.fakes import Fakes
from fxaccel.ir import Program, expr, number, target_name, tensors
from fxaccel.memory import Ledger, key
from fxaccel.recompute import Run, Saved, Timetable
from fxaccel.schedule import HIDDEN, Schedule

Array = npt.NDArray[Any]
W = TypeVar("W", bound="Watch")
FREE = -1  # the value that stands for parameters, buffers, constants and inputs: they are there anyway


@dataclass
class Value:
    """A storage that forward makes.

    name     the node that makes it; with "!" behind it what that call saves besides arguments and results
    nbytes   its size
    made     the step that makes it
    read     the last step of forward that reads it, or a view of it
    needed   steps whose backward reads it
    shown    whether the caller holds it: it is an output
    """

    name: str
    nbytes: int
    made: int
    read: int = -1
    needed: list[int] = field(default_factory=list)
    shown: bool = False


@dataclass
class Call:
    """A call of the graph: one step of forward, and of backward.

    name         of the node
    makes        the values that it makes, without what it hides
    hides        what it saves besides arguments and results, None where nothing
    reads        values of its arguments
    takes        bytes that forward takes while it runs, over what lived before; its results are among them
    rest         bytes besides values when its backward first reads what was saved: gradients of all kinds
    surge        the most of them while its backward runs
    grads        of `rest`, those of parameters
    again        whether it can be computed again
    view         whether its results are its arguments' storages
    flops, nbytes   what computing it costs
    """

    name: str
    makes: list[int] = field(default_factory=list)
    hides: int | None = None
    reads: list[int] = field(default_factory=list)
    takes: int = 0
    rest: int = 0
    surge: int = 0
    grads: int = 0
    again: bool = False
    view: bool = False
    flops: int = 0
    nbytes: int = 0


class Columns(NamedTuple):
    """The facts of a profile as arrays, for what goes through it many times.

    made, last, nbytes    of each value; last: the last step of forward that reads it, where backward does not
    first, shown          of each value; first: the first step whose backward reads it, `size` without one
    takes, rest, surge, grads    of each step, 0 where there is no call
    called                whether there is one
    size                  of the arrays of steps
    """

    made: Array
    last: Array
    nbytes: Array
    first: Array
    shown: Array
    takes: Array
    rest: Array
    surge: Array
    grads: Array
    called: Array
    size: int


@dataclass
class Profile:
    """One training step.

    values     storages that forward makes
    calls      steps in the order of the graph, by their place in it
    roots      node name -> the values that its result lies in
    inputs     node name -> the nodes that it reads when it is computed again
    state      bytes of parameters
    grads      bytes of their gradients
    """

    values: list[Value]
    calls: dict[int, Call]
    roots: dict[str, list[int]]
    inputs: dict[str, list[str]]
    state: int
    grads: int

    @cached_property
    def columns(self) -> Columns:
        """The same in arrays."""
        size = max(self.calls, default=0) + 2
        of = [
            (v.made, max(v.read, v.made), v.nbytes, min(v.needed, default=size), v.shown) for v in self.values
        ]
        each = np.zeros((4, size), np.int64)
        for i, call in self.calls.items():
            each[:, i] = call.takes, call.rest, call.surge, call.grads
        made, last, nbytes, first, shown = np.array(of, np.int64).reshape(-1, 5).T
        takes, rest, surge, grads = each
        called = np.isin(np.arange(size), [*self.calls])
        return Columns(made, last, nbytes, first, shown.astype(bool), takes, rest, surge, grads, called, size)

    def without_gradients(self) -> Profile:
        """The same step, in which the gradients of parameters take nothing."""
        calls = {
            i: replace(c, rest=c.rest - c.grads, surge=c.surge - c.grads, grads=0)
            for i, c in self.calls.items()
        }
        return replace(self, calls=calls)


def profile(program: Program, loss: bool = True) -> Profile:
    """The profile of a training step at the sizes that the program was captured with.

    loss    whether backward begins at the loss alone, where an output is one number

    Raises RuleError where the graph cannot be run without data.
    """
    return watched(program, Watch, loss).profile()


def watched(program: Program, kind: Callable[[Program], W], loss: bool = True) -> W:
    """A watch of this kind that has seen the step."""
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            why = f"%{node.name} is a call of {target_name(node.target)}, which has graphs of its own"
            raise RuleError(f"the step cannot be run without data: {why}")
    watch = kind(program)
    fakes = Fakes(watch.meter)
    with fakes:
        given = {n: _fake(n, program) for n in program.graph.find_nodes(op="placeholder")}
    code = _Emitter(program, watch).code()
    constants = {k: fakes.from_tensor(v) if isinstance(v, Tensor) else v for k, v in code.constants.items()}
    watch.free = {key(t) for t in [*given.values(), *constants.values()] if isinstance(t, Tensor)}
    watch.meter.live = watch.meter.rest = 0
    state = {slot.name: given[n] for n in given if (slot := program.state.get(n.name)) is not None}
    for tensor in state.values():
        if tensor.requires_grad:
            tensor.register_post_accumulate_grad_hook(watch.accumulated)
    functions = replace(code, constants=constants).bind(Tables(state), "<fxaccel profile>")
    inputs = [given[n] for n in program.input_nodes()]
    with fakes, torch.enable_grad():
        try:
            outputs = functions["forward"](*inputs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise RuleError(
                f"the step cannot be run without data: {type(error).__name__}: {error}"
            ) from error
        watch.shown(outputs)
        watch.backward(outputs, loss)
    return watch


def _fake(node: fx.Node, program: Program) -> Tensor:
    val = node.meta["val"]

    def known(stride: Any) -> int:
        """That of the example where sizes do not say it: a part of a larger tensor has any."""
        told = isinstance(stride, int) or all(str(s) in program.hints for s in expr(stride).free_symbols)
        return number(stride, program.hints) if told else int(stride.node.hint)

    size = [number(s, program.hints) for s in val.shape]
    made = torch.empty_strided(size, [known(s) for s in val.stride()], dtype=val.dtype, device=val.device)
    return made.requires_grad_(val.requires_grad)


class _Emitter(scheduled.Emitter):
    """Code that tells a watch of every call and every result."""

    def __init__(self, program: Program, watch: Watch) -> None:
        super().__init__(replace(program, schedule=Schedule(), _facts=program._facts))
        self.start = watch

    def statement(self, node: fx.Node, last_use: dict[fx.Node, list[fx.Node]]) -> str:
        text = super().statement(node, last_use)
        return text if node.users else f"{self.names[node]} = {text}"  # what it saves counts, too

    def after(self, node: fx.Node) -> list[str]:
        made = f"{self.run}.made({self.index[node.name]}, {self.names[node]})"
        return [made] if node.users else [made, f"del {self.names[node]}"]

    def lowered(self, node: fx.Node) -> Any:
        """On a GPU the operator itself: its peers are told apart by measurement, which takes data."""
        device = tensors(node.meta["val"])[0].device.type if tensors(node.meta["val"]) else "cpu"
        return super().lowered(node) if device == "cpu" else None


class _Ledger(Ledger):
    """A ledger that tells the bytes of values and of parameters' gradients from all others."""

    def __init__(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.values: set[int] = set()
        self.rest = 0

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.before()
        made = super().call(func, args, kwargs)
        self.after()
        return made

    def count(self, tensor: Tensor, size: int) -> None:
        live = self.live
        super().count(tensor, size)
        self.rest += self.live - live

    def value(self, at: int) -> None:
        """This storage is a value."""
        if at in self.known and at not in self.values:
            self.values.add(at)
            self.rest -= self.known[at]

    def freed(self, at: int) -> None:
        if at in self.values:
            self.values.remove(at)
        else:
            self.rest -= self.known[at]
        super().freed(at)


class Watch(Run):
    """A run that keeps everything and notes what becomes of it. Called, it is its own run."""

    def __init__(self, program: Program) -> None:
        super().__init__(Timetable({}, {}, ()))
        self.program, self.meter = program, _Ledger(self.enter, self.spent)
        self.nodes = list(program.graph.nodes)
        self.free: set[int] = set()
        self.number: dict[int, int] = {}  # storage -> value
        self.values: list[Value] = []
        self.calls: dict[int, Call] = {}
        self.roots: dict[str, list[int]] = {n.name: [] for n in self.nodes if n.op == "placeholder"}
        self.sequence: list[tuple[int, int]] = []
        self.present = self.grads = self.before = 0
        self.returning = False
        self.opening: set[int] = set()  # calls whose backward has read what was saved

    def __call__(self, table: Timetable) -> Watch:
        return self

    # -- forward ----------------------------------------------------------------------------------

    def at(self, index: int, function: Any = None, *given: Any) -> None:
        super().at(index)
        self.sequence.append((torch._C._autograd._get_sequence_nr(), index))
        self.calls[index] = Call(self.nodes[index].name)
        self.before = self.meter.live
        self.meter.reset()

    def made(self, index: int, value: Any) -> None:
        """A statement has been run."""
        node = self.nodes[index]
        ours = [t for t in value if isinstance(t, Tensor)] if isinstance(value, (list, tuple)) else [value]
        if not ours or not all(isinstance(t, Tensor) for t in ours):
            return
        self.roots[node.name] = []
        if node.target is operator.getitem:
            self.own(index, node.name, value)
            return
        call = self.calls[index]
        call.takes = self.meter.peak - self.before
        if isinstance(value, Tensor):
            self.own(index, node.name, value)
        else:
            for user in node.users:
                if user.target is operator.getitem and isinstance(value[user.args[1]], Tensor):
                    self.own(index, user.name, value[user.args[1]])
            self.roots[node.name] = [self.number[key(t)] for t in value if key(t) in self.number]
        call.makes = [v for v in dict.fromkeys(self.roots[node.name]) if self.values[v].made == index]
        hidden = [
            s for s in self.fresh if key(s.tensor) not in self.number and key(s.tensor) not in self.free
        ]
        storages = dict.fromkeys(key(s.tensor) for s in hidden)
        if storages:
            size = sum(self.meter.known.get(at, 0) for at in storages)
            call.hides = len(self.values)
            self.values.append(Value(node.name + HIDDEN, size, index))
            for saved in hidden:
                self.take(saved.tensor, call.hides)
        for saved in self.fresh:
            number = self.number.get(key(saved.tensor), FREE)
            if number != FREE and index not in self.values[number].needed:
                self.values[number].needed.append(index)
        self.fresh.clear()

    def own(self, index: int, name: str, tensor: Tensor) -> None:
        """A tensor that a node makes: of a value, of a new one, or of what was there."""
        at = key(tensor)
        if at not in self.free and at not in self.number:
            self.take(tensor, len(self.values))
            self.values.append(Value(name, self.meter.known.get(at, 0), index))
        self.roots.setdefault(name, [])
        if at in self.number:
            self.roots[name] = [self.number[at]]

    def take(self, tensor: Tensor, number: int) -> None:
        """This storage is a value."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.number:
            self.number[storage._cdata] = number
            self.meter.value(storage._cdata)
            weakref.finalize(storage, self.number.pop, storage._cdata, None).atexit = False

    def shown(self, outputs: Sequence[Any]) -> None:
        """What the caller is given."""
        for output in outputs:
            if isinstance(output, Tensor) and key(output) in self.number:
                self.values[self.number[key(output)]].shown = True

    # -- backward ---------------------------------------------------------------------------------

    def backward(self, outputs: Sequence[Any], from_loss: bool) -> None:
        """Run backward from the loss, or from all outputs."""
        roots = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
        if not roots:
            raise RuleError("no output of the step has a gradient")
        loss = next((t for t in roots if t.numel() == 1 and from_loss), None)
        chosen = roots if loss is None else [loss]
        self.returning, self.present = True, -1
        torch.autograd.backward(chosen, [torch.ones_like(t) for t in chosen])
        self.returning = False

    def enter(self) -> None:
        """Before an operator: which call's backward it belongs to."""
        node = torch._C._current_autograd_node() if self.returning else None
        if node is None or node.name().endswith("AccumulateGrad"):
            return
        place = bisect.bisect_right(self.sequence, node._sequence_nr(), key=operator.itemgetter(0))
        index = self.sequence[place - 1][1]
        if index != self.present:
            self.present, call = index, self.calls[index]
            call.rest, call.grads, call.surge = self.meter.rest, self.grads, self.meter.rest

    def unpack(self, saved: Saved) -> Tensor:
        if self.returning:  # what is not kept would be computed now, beside gradients that are there already
            self.enter()
            if saved.step.index == self.present and self.present not in self.opening:
                self.opening.add(self.present)
                call = self.calls[self.present]
                call.rest = max(call.rest, self.meter.rest)
        return super().unpack(saved)

    def spent(self) -> None:
        """After an operator."""
        if self.returning and self.present >= 0:
            call = self.calls[self.present]
            call.surge = max(call.surge, self.meter.rest)

    def accumulated(self, parameter: Tensor) -> None:
        """A parameter has its gradient."""
        if parameter.grad is not None:
            self.grads += parameter.grad.untyped_storage().nbytes()

    # -- the result -------------------------------------------------------------------------------

    def profile(self) -> Profile:
        """What has been seen, with what each call reads and costs."""
        writers, costs = self.program.facts(written), dict[str, tuple[int, int]]()
        for index, node in enumerate(self.nodes):
            for arg in node.all_input_nodes:
                for value in self.roots.get(arg.name, ()):
                    self.values[value].read = max(self.values[value].read, index)
            call = self.calls.get(index)
            if call is None:
                continue
            read = scheduled.reads(node)
            call.reads = list(dict.fromkeys(v for a in read for v in self.roots.get(a.name, ())))
            call.view = not call.makes and not mutated_arguments(node)
            call.again = can_again(node, read, writers)
            call.flops, call.nbytes = self.cost(node, costs)
        inputs = {n.name: [a.name for a in scheduled.reads(n)] for n in self.nodes if n.op == "call_function"}
        state = parameter_bytes(self.program)
        return Profile(self.values, self.calls, self.roots, inputs, state, self.grads)

    def cost(self, node: fx.Node, known: dict[str, tuple[int, int]]) -> tuple[int, int]:
        """FLOPs of a call, and bytes of its arguments and results."""
        touched = [t for n in [*node.all_input_nodes, node] for t in tensors(n.meta["val"])]
        signature = f"{node.target} {[(list(t.shape), t.dtype) for t in touched]}"
        if signature not in known:
            sizes = self.program.hints
            nbytes = sum(number(t.numel(), sizes) * t.element_size() for t in touched)
            known[signature] = number(node_flops(node), sizes), nbytes
        return known[signature]


def can_again(node: fx.Node, read: Sequence[fx.Node], writers: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether a call gives the same result a second time, and does nothing else."""
    if not isinstance(node.target, torch._ops.OpOverload) or node in writers:
        return False
    quiet = scheduled.moves_statistics(node) or is_random(node) or not has_effect(node)
    return quiet and writers.keys().isdisjoint(read)
