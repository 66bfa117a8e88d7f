"""From an `nn.Module` and one example call to a Program, through `torch.export`.

The module is exported in non-strict mode, in its present training flags, gradient mode and autocast
state, with every input dimension of two or more left symbolic. Export traces a throw-away clone of the
module tree that shares the tensors, so nothing the forward assigns to `self` reaches the user's model.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.traceback import annotate, preserve_node_meta
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fxaccel.effects import eliminate_dead
from fxaccel.errors import CaptureError
from fxaccel.fakes import worked_out_once
from fxaccel.inline import INNER, MARK, Inliner, drop_mode_noise, is_user
from fxaccel.interrupts import held_back
from fxaccel.ir import Program, Region, Slot, assumed, expr, source, target_name
from fxaccel.structure import Opened, Structure, flatten, objects
from fxaccel.tree import assignments, belongings, clone_tree, ties, without_root_hooks


class _Result:
    """What the traced forward left behind; export undoes plain assignments to the module."""

    def __init__(self) -> None:
        self.spec: Structure
        self.assigned: list[str] = []
        self.fake: FakeTensorMode | None = None


class _Untraceable(Exception):
    """Carries what the model raised while it was traced, as its cause."""


_CHECKPOINT = inspect.unwrap(checkpoint).__code__


class _Checkpoints(TorchFunctionMode):
    """Marks the nodes of each call of `torch.utils.checkpoint`, which export would write out unmarked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []  # their frames

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame, call = sys._getframe(1), None
        while frame is not None:
            if frame.f_code is _CHECKPOINT and frame.f_locals["use_reentrant"] is False:
                call = frame  # of nested ones the outermost
            frame = frame.f_back  # type: ignore[assignment]
        if call is None:
            return func(*args, **(kwargs or {}))
        if call not in self.calls:
            self.calls.append(call)
        with annotate({MARK: self.calls.index(call) + 1}):
            return func(*args, **(kwargs or {}))


class _FlatCall(nn.Module):
    """The module as a function of its tensor inputs alone; all else of the call is baked in."""

    def __init__(self, model: nn.Module, call: Call, autocast: list[Region], marked: bool) -> None:
        super().__init__()
        self.model = model
        self.call, self.autocast, self.marked = call, autocast, marked
        self.result = _Result()
        self.training = model.training

    def forward(self, *tensors: Tensor) -> list[Any]:
        args, kwargs = self.call.unflatten(tensors)
        fake = self.result.fake = detect_fake_mode(tensors)
        with contextlib.ExitStack() as stack:
            if fake is not None:
                stack.enter_context(worked_out_once(fake))
            stack.enter_context(assignments(self.model, self.result.assigned))
            for region in self.autocast:
                device, dtype, enabled, cache = region.args
                stack.enter_context(torch.autocast(device, dtype, enabled, cache))
            if self.marked:
                stack.enter_context(_Checkpoints())
            given = objects((args, kwargs))
            try:
                result = self.model(*args, **kwargs)
            except RuntimeError as error:  # of those, export prints the partial graph to stderr
                raise _Untraceable from error
        leaves, self.result.spec = flatten(
            (result, [dict(vars(g)) for g in given]), given, belongings(self.model)
        )
        return leaves


class Call:
    """One call of a model, flattened: leaves, their structure, and which of them are tensors."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.leaves, self.spec = flatten((args, kwargs))
        self.objects = objects((args, kwargs)) if self.spec.special else []
        self.tensor_at = tuple(i for i, x in enumerate(self.leaves) if isinstance(x, Tensor))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.leaves[i] for i in self.tensor_at)

    @property
    def baked(self) -> dict[int, Any]:
        return {i: x for i, x in enumerate(self.leaves) if not isinstance(x, Tensor)}

    def unflatten(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments with other tensors; opened objects are made anew."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.tensor_at, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = self.spec.unflatten(leaves)
        return args, kwargs

    def paths(self) -> list[tuple[Any, int, int]]:
        """For each leaf of the arguments' pytree its path, index, and how many flat leaves it stands for."""
        plain = range(self.spec.spec.num_leaves)
        found = pytree.tree_flatten_with_path(pytree.tree_unflatten(plain, self.spec.spec))[0]
        sizes = {i: s.attributes.size if isinstance(s, Opened) else 0 for i, s in self.spec.special.items()}
        return [(keys, i, sizes.get(i, 1)) for keys, i in found]

    def nested(self) -> set[int]:
        """Flat leaves that lie within a container or object: keys and values of a cache, say."""
        at, found = 0, set[int]()
        for keys, i, count in self.paths():
            if i in self.spec.special or len(keys) > 2:
                found.update(range(at, at + count))
            at += count
        return found

    def names(self, signature: inspect.Signature) -> list[str]:
        """A readable identifier for each leaf: `input_ids`, `past_0_1`."""
        parameters = list(signature.parameters)
        names = []
        for keys, i, count in self.paths():
            kind, first, *rest = [re.sub(r"\W+", "_", str(k)).strip("_") for k in keys]
            if kind == "0":  # a positional argument: named by the signature
                at = int(first)
                first = parameters[at] if at < len(parameters) else f"arg{at}"
            name = "_".join([first, *rest])
            names += [f"{name}_{k}" for k in range(count)] if i in self.spec.special else [name]
        return names


def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Export one call of `module` into a Program; raises CaptureError with the user's line."""
    example = Call(args, kwargs)
    attempts = [True, False] if any(_symbolic(example)) else [False]
    failures: list[BaseException] = []
    for dynamic in attempts:
        try:
            wrapper, exported = _traced(module, example, dynamic)
            break
        except CaptureError:
            raise
        except Exception as error:
            failures.append(error)
    else:
        raise explain(failures[-1])
    program = _program(exported, wrapper, example, module)
    for name in dict.fromkeys(wrapper.result.assigned):
        program.notes.append(
            f"the forward assigns a tensor to the attribute {name!r}, which is no buffer: the captured "
            "graph leaves it alone"
        )
    if failures:
        program.notes.append(
            f"the sizes of this call are fixed: with symbolic sizes export said {_first_line(failures[0])!r}"
        )
    return program


def _traced(module: nn.Module, example: Call, dynamic: bool) -> tuple[_FlatCall, ExportedProgram]:
    """The export of a clone; raises what the clone raised."""
    for marked in (torch.is_grad_enabled(), False):
        wrapper = _FlatCall(without_root_hooks(clone_tree(module)), example, ambient_autocast(), marked)
        try:
            return wrapper, _export(wrapper, example, dynamic)
        except Exception as error:
            from torch._dynamo.exc import TorchDynamoException  # slow to import

            cause = error.__cause__ if isinstance(error, _Untraceable) and error.__cause__ else error
            if not marked or not isinstance(cause, TorchDynamoException):  # torch.cond takes no marks
                raise cause  # noqa: B904
    raise AssertionError("the second time raises or returns")


def ambient_autocast() -> list[Region]:
    """The autocast state around the present call, as regions."""
    regions = []
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            args = (device, torch.get_autocast_dtype(device), True, torch.is_autocast_cache_enabled())
            regions.append(Region("autocast", 0, args))
    return regions


def _export(wrapper: _FlatCall, example: Call, dynamic: bool) -> ExportedProgram:
    shapes = [{d: Dim.AUTO for d in sizes} if dynamic else None for sizes in _symbolic(example)]
    tensors = tuple(_plain(t) for t in example.tensors)
    with contextlib.ExitStack() as stack:
        stack.enter_context(held_back())
        stack.enter_context(_quiet())
        stack.callback(_release, wrapper.result)
        stack.enter_context(preserve_node_meta())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        for region in wrapper.autocast:
            stack.enter_context(torch.autocast(region.args[0], enabled=False))
        dynamic_shapes = (tuple(shapes),) if shapes else None
        return torch.export.export(wrapper, tensors, dynamic_shapes=dynamic_shapes, strict=False)


def _release(result: _Result) -> None:
    """Let go of the fake inputs: their sizes, held in C++, hold them, a cycle that is never collected."""
    if result.fake is not None and result.fake.shape_env is not None:
        result.fake.shape_env.tracked_fakes = None
    result.fake = None


def _symbolic(example: Call) -> list[list[int]]:
    """For each tensor of the call its dimensions that are left symbolic."""
    nested = example.nested()
    return [_varying(t, i in nested) for i, t in zip(example.tensor_at, example.tensors, strict=True)]


def _varying(tensor: Tensor, nested: bool) -> list[int]:
    """Dimensions left symbolic: those of two or more; of images and volumes the batch alone.

    `nested`: the tensor is part of another argument, of a key-value cache, say, and no image.

    (Sizes of pixels are fixed for a model more often than not, and with symbolic ones export takes
    minutes.) Parameters, which graph pieces get as arguments, are fixed.
    """
    if isinstance(tensor, nn.Parameter):
        return []
    return [d for d, size in enumerate(tensor.shape) if size > 1 and (d == 0 or nested or tensor.dim() < 4)]


def _plain(tensor: Tensor) -> Tensor:
    """The example input cut off from the graph that it is part of."""
    plain = tensor.detach() if not tensor.is_inference() else tensor.clone()
    plain.requires_grad_(tensor.requires_grad)
    return plain if tensor.is_leaf else plain.clone()  # autograd lets only leaves not be written to


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines of export: what matters of them is in the report."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def explain(error: BaseException) -> CaptureError:
    """The CaptureError for a failed export: what failed, at which of the user's lines."""
    frames = traceback.extract_tb(error.__traceback__)
    where = next((f for f in reversed(frames) if is_user(f.filename)), None)
    at = f" at {Path(where.filename).name}:{where.lineno}: {where.line}" if where else ""
    failure = CaptureError(
        f"expected a model that can be captured as one graph, got {type(error).__name__}{at}: "
        f"{_first_line(error)}",
        "branch on shapes rather than on values, or use torch.cond; keep tensors out of Python state",
    )
    failure.__cause__ = error
    return failure


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# -- from ExportedProgram to Program ---------------------------------------------------------------


def _placeholders(
    exported: ExportedProgram, example: Call, module: nn.Module, graph: fx.Graph
) -> tuple[dict[fx.Node, fx.Node], dict[str, Slot], dict[str, Tensor], list[str]]:
    """Those of the new graph by the exported ones; the state among them, constants, names of the inputs."""
    state, constants, inputs = dict[str, Slot](), dict[str, Tensor](), list[str]()
    env: dict[fx.Node, fx.Node] = {}
    specs = {s.arg.name: s for s in exported.graph_signature.input_specs}
    names = iter([example.names(inspect.signature(module.forward))[i] for i in example.tensor_at])
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            break
        spec = specs[node.name]
        slot = _slot(spec.kind, spec.target)
        if slot is not None:
            new = graph.placeholder(_identifier(slot), default_value=inspect.Signature.empty)
            state[new.name] = slot
            if slot.kind == "constant":
                constants[slot.name] = _constant(exported, spec.target)
        elif spec.kind is InputKind.USER_INPUT:
            new = graph.placeholder(next(names))
            inputs.append(new.name)
        else:
            raise CaptureError(
                f"the model holds a {spec.kind.name.lower().replace('_', ' ')} ({spec.target}), expected "
                "tensors only"
            )
        new.meta = {"val": node.meta["val"], "path": "", "source": "", "regions": ()}
        env[node] = new
    return env, state, constants, inputs


def _program(exported: ExportedProgram, wrapper: _FlatCall, example: Call, module: nn.Module) -> Program:
    signature, graph = exported.graph_signature, fx.Graph()
    env, state, constants, inputs = _placeholders(exported, example, module, graph)
    inliner = Inliner(graph, exported.graph_module)
    result = inliner.inline(exported.graph, exported.graph_module, env, ())
    graph.output(tuple(_outputs(result, signature)))
    eliminate_dead(graph)
    by_leaf: list[str | None] = [None] * len(example.leaves)
    for i, name in zip(example.tensor_at, inputs, strict=True):
        by_leaf[i] = name
    program = Program(
        graph=graph,
        root=exported.graph_module,
        state=state,
        constants=constants,
        ties=ties(module),
        inputs=tuple(by_leaf),
        baked=example.baked,
        in_spec=example.spec,
        out_spec=wrapper.result.spec,
        sizes={},
        guards=(),
        hints={},
        buffers=frozenset(dict(module.named_buffers(remove_duplicate=False))),
        contiguous=frozenset(n for n, t in zip(inputs, example.tensors, strict=True) if t.is_contiguous()),
        training=module.training,
        grad=torch.is_grad_enabled(),
    )
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            program.notes.append(
                f"{target_name(node.target)} at {source(node)}: no pass looks into its bodies"
            )
    _part_with_constants(program)
    _read_symbols(program, exported, example)
    drop_mode_noise(program)
    return program


def _part_with_constants(program: Program) -> None:
    """Let fake values of constants hold no memory: those of export hold the model's own."""
    for name, slot in program.state.items():
        if slot.kind == "constant":
            program.placeholder(name).meta["val"].constant = None


def _slot(kind: InputKind, target: str | None) -> Slot | None:
    if kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
        return None
    assert target is not None, "state has a name"
    kinds = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer"}
    return Slot(kinds.get(kind, "constant"), target.removeprefix(INNER + "."))  # type: ignore[arg-type]


def _identifier(slot: Slot) -> str:
    prefix = {"parameter": "p", "buffer": "b", "constant": "c"}[slot.kind]
    return f"{prefix}_{re.sub(r'[^0-9a-zA-Z_]', '_', slot.name)}"


def _constant(exported: ExportedProgram, target: str) -> Tensor:
    value = exported.constants[target]
    if not isinstance(value, Tensor):
        raise CaptureError(f"the model holds a {type(value).__name__} ({target}), expected tensors only")
    return value


def _outputs(result: list[Any], signature: Any) -> list[Any]:
    """The user's outputs among those of the exported graph."""
    return [
        value
        for value, spec in zip(result, signature.output_specs, strict=True)
        if spec.kind is OutputKind.USER_OUTPUT
    ]


def _read_symbols(program: Program, exported: ExportedProgram, example: Call) -> None:
    """Where each size symbol is read from, its example value, and the conditions on all of them."""
    guards: list[str] = []
    for i, name in enumerate(program.inputs):
        if name is None:
            continue
        for d, size in enumerate(program.placeholder(name).meta["val"].shape):
            symbol = expr(size)
            if symbol.is_Symbol and str(symbol) not in program.sizes:
                program.sizes[str(symbol)] = (i, d)
                program.hints[str(symbol)] = example.leaves[i].shape[d]
    for symbol, bounds in exported.range_constraints.items():
        if str(symbol) in program.sizes:
            guards.append(f"{bounds.lower} <= {symbol}")
            if bounds.upper.is_Integer:
                guards.append(f"{symbol} <= {bounds.upper}")
    program.guards = tuple(dict.fromkeys(guards))
    program.guards += assumed(program)
