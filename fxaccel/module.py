"""`accelerate(model)`: a module that is the original in everything but how its forward is computed.

The result is an instance of a subclass of the model's own class, over a copy of the module tree that
shares every parameter and buffer. So `state_dict()`, `isinstance`, `config`, `generate`, optimizers built
before, hooks on the root, `.train()`, `.to()`, `load_state_dict()` and DDP work as they did; the model
that was passed in is never written to.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxaccel import weights
from fxaccel.capture import Call
from fxaccel.discover import available, resolve
from fxaccel.errors import OptionError
from fxaccel.report import Report
from fxaccel.rule import NUMERICS, Pass
from fxaccel.session import Session, Settings
from fxaccel.tree import clone_tree

_KEY = "_fxaccel"  # where the session is kept in the module's __dict__


def accelerate(
    model: nn.Module,
    passes: Iterable[str | Pass | type[Pass]] | None = None,
    *,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    allow: str = "reassociated",
    strict: bool = False,
    expect: Mapping[str, int] | None = None,
    check: bool = True,
    backend: str = "python",
    max_captures: int = 16,
    calibration: Iterable[Any] = (),
    measure: bool | None = None,
) -> Any:
    """A module that computes what `model` computes, rewritten by `passes`.

    model            any nn.Module; it is never changed, its parameters and buffers are shared. Weights that
                     torchao has quantized run on our kernels, whatever `allow` says
    passes           names ("fuse-norm", "fuse-norm{where=layers.*}"), Pass classes or instances;
                     None for the default passes: exact ones only
    example_inputs   arguments (a tuple) or keyword arguments (a mapping) to capture now; otherwise the
                     model is captured at its first call, once for each mode and input structure
    allow            loosest numerics class that a pass may have: bitwise, reassociated,
                     lower_precision or approximate
    strict           a pass that fails, or that applied nowhere, raises instead of being reported
    expect           pass name -> number of sites it must have rewritten in every capture
    check            compare each captured graph, outputs and gradients, with the model before using it
    backend          "python", or "inductor" to hand the rewritten graph on to torch.compile
    max_captures     graphs kept for different modes and inputs; the one unused longest is dropped
    calibration      calls, each given as `example_inputs` is, on which passes that are not exact are measured
                     (and held to their `budget`); without them, on the call that is captured
    measure          time every kind of site, as it is and rewritten, at the sizes of the captured call, and
                     refuse what is slower on this machine; None: where `passes` is None and `check` is on,
                     for it runs the original's part. Never while torch.use_deterministic_algorithms is on:
                     two processes may decide differently

    Raises OptionError for wrong options, CaptureError where the model cannot be captured.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}, expected an nn.Module")
    if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise OptionError(
            f"model is a {type(model).__name__}, which has no graph of its own to capture",
            "accelerate the module inside it",
        )
    if hasattr(model, "_orig_mod"):
        raise OptionError(
            "model is the result of torch.compile", "accelerate the model itself, with backend='inductor'"
        )
    if allow not in NUMERICS:
        raise OptionError(f"allow is {allow!r}, expected one of {list(NUMERICS)}")
    if backend not in ("python", "inductor"):
        raise OptionError(f"backend is {backend!r}, expected 'python' or 'inductor'")
    if max_captures < 1:
        raise OptionError(f"max_captures is {max_captures}, expected at least 1")
    if isinstance(model, AcceleratedModule):
        model = model.original()
    tree = clone_tree(model)
    opened = weights.opened(tree, [p.opened for p in available().values()]) if _has_kinds(tree) else []
    if opened:
        passes, allow = _with_openers(passes, allow, {one.by for one in opened})
    settings = Settings.make(
        passes, allow=allow, strict=strict, expect=expect, check=check, backend=backend,
        max_captures=max_captures, measure=measure,
        calibration=tuple(Call(*call_of(c, "a call in calibration")) for c in calibration),
    )  # fmt: skip
    fast = wrap(tree, settings)
    fast.__dict__[_KEY].replacements += opened
    if example_inputs is not None:
        args, kwargs = call_of(example_inputs)
        fast.__dict__[_KEY].capture(fast, args, kwargs)
    return fast


def _has_kinds(tree: nn.Module) -> bool:
    """Whether a parameter is of another kind than PyTorch's own."""
    return any(type(p) not in (nn.Parameter, Tensor) for p in tree.parameters())


def _with_openers(
    passes: Iterable[str | Pass | type[Pass]] | None, allow: str, names: set[str]
) -> tuple[list[Pass], str]:
    """The passes with those that have opened parameters, and a class that lets them run."""
    given = resolve(passes)
    more = [available()[n]() for n in sorted(names.difference(p.name for p in given))]
    loosest = max((NUMERICS.index(p.numerics) for p in [*given, *more] if p.name in names), default=0)
    return [*given, *more], NUMERICS[max(NUMERICS.index(allow), loosest)]


def call_of(example: Any, what: str = "example_inputs") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments of a call as users write it down."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, Tensor):
        return (example,), {}
    raise OptionError(
        f"{what} is a {type(example).__name__}, expected a tuple of arguments or a mapping of keyword "
        "arguments"
    )


def wrap(tree: nn.Module, settings: Settings) -> AcceleratedModule:
    """Make `tree` itself an accelerated module; the caller owns it."""
    cls = type(tree)
    forward = functools.wraps(cls.forward)(_forward)
    made = type(f"Accelerated{cls.__name__}", (AcceleratedModule, cls), {
        "forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__, "_original_class": cls,
    })  # fmt: skip
    fast: Any = made.__new__(made)  # type: ignore[call-overload]
    fast.__dict__.update(tree.__dict__)
    fast.__dict__[_KEY] = Session(settings)
    return fast


def _forward(self: AcceleratedModule, *args: Any, **kwargs: Any) -> Any:
    return self.__dict__[_KEY].call(self, args, kwargs)


class AcceleratedModule(nn.Module):
    """What `accelerate` returns; mixed into a subclass of the model's own class."""

    _original_class: type[nn.Module]

    def original(self) -> nn.Module:
        """The module tree under its original class: eager, with the same parameters and buffers."""
        return self.__dict__[_KEY].restored(self)

    def report(self) -> Report:
        """What was applied, refused and nearly matched, for every capture so far."""
        return self.__dict__[_KEY].report(self)

    def diff(self, *, capture: int = -1, raw: bool = False) -> Any:
        """Before and after the passes, as a Diff that prints as text; `raw`: before canonicalization."""
        return self.__dict__[_KEY].diff(capture, raw)

    @property
    def code(self) -> str:
        """The generated Python of every capture."""
        return self.__dict__[_KEY].code()

    def verify(self, *, steps: int = 0, model: nn.Module | None = None) -> Any:
        """Run every proof again, and compare each captured graph with the model once more.

        steps    also train copies of both for so many steps on one batch, and compare their losses
        model    the model as written, where this module was loaded from a file; it gets a copy's weights

        Raises OptionError where `steps` finds nothing that trains, or `model` is another one.
        """
        return self.__dict__[_KEY].verify(self, steps, model)

    def convert(self) -> Any:
        """Turn what was trained with rounding simulated into the model that is rounded; returns this module.

        What a pass has put in place to train, `quantize{train=learned}`'s float weights and scales, is
        exchanged for what it stands for; that is held fixed in training from here on, and an optimizer made
        before holds parameters that are gone. Raises CaptureError where nothing waits to be converted.
        """
        self.__dict__[_KEY].convert(self)
        return self

    def stage(self, number: int, device: Any = None) -> Any:
        """One stage of a model that the pass `partition` has cut, as a module of its own; counted from 0.

        It holds the parameters that it reads, under their names in the model's `state_dict`: the very ones,
        or copies if `device` is another than the model's. The same module at each call.
        """
        from fxaccel.stage_module import taken

        return taken(self).of(number, None if device is None else torch.device(device))

    def schedule(self, name: str, microbatches: int, **options: Any) -> Any:
        """The stages of this process under a schedule, "1f1b" say: an fxaccel.distributed.Pipeline.

        Called in every process of a group of torch.distributed; see Pipeline for the options.
        """
        from fxaccel.distributed import Pipeline

        return Pipeline(self, name, microbatches, **options)

    def save(self, path: Any) -> None:
        """Write weights, graphs and report to one file that `fxaccel.load` reads without this code."""
        from fxaccel.artifact import save

        save(self, path)

    # -- a module like the original ---------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self._kinds()
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._kinds() != before:  # trainers move a model to where it is
            self.__dict__[_KEY].forget()
        return result

    def _kinds(self) -> list[tuple[Any, ...]]:
        """What captures take for granted of the tree's tensors."""
        tensors = [*self.parameters(), *self.buffers()]
        return [(type(t), t.dtype, t.device, t.shape, t.layout, _strides(t)) for t in tensors]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__[_KEY].forget()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        result = super().state_dict(*args, **kwargs)
        return weights.to_original(result, prefix, self.__dict__[_KEY].replacements)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weights.from_original(state_dict, prefix, self.__dict__[_KEY].replacements)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> AcceleratedModule:
        bare = self._bare()
        fast = wrap(copy.deepcopy(bare, memo), self.__dict__[_KEY].settings)
        fast.__dict__[_KEY] = self.__dict__[_KEY].rebound(fast)
        memo[id(self)] = fast
        return fast

    def __reduce_ex__(self, protocol: Any) -> Any:
        session = self.__dict__[_KEY]
        return _restore, (self._bare(), session.settings, session.replacements)

    def _bare(self) -> nn.Module:
        """This tree as an instance of the original class; tables are shared, the session left out."""
        bare = self._original_class.__new__(self._original_class)
        bare.__dict__.update({k: v for k, v in self.__dict__.items() if k != _KEY})
        return bare

    def __repr__(self) -> str:
        return f"Accelerated({super().__repr__()})"


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout is torch.strided else ()


def _restore(bare: nn.Module, settings: Settings, replacements: list[Any]) -> AcceleratedModule:
    fast = wrap(bare, settings)
    fast.__dict__[_KEY].replacements = replacements
    return fast
