"""Registers operators in the `fxaccel` namespace, at the least cost a call that PyTorch allows from Python.

`define` declares an operator and its kernels; `differentiate`, `autocast` and `count_flops` add the rest.
A call of `torch.library.custom_op` costs about twice as much as one of these: it checks for aliasing and
walks pytrees on every call, where `opcheck` in the tests can do it once.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("fxaccel", "FRAGMENT")
_AFTER_AUTOGRAD = torch._C._after_autograd_keyset

Op = torch._ops.OpOverload
Kernel = Callable[..., Any]
_KERNELS: dict[Op, dict[DispatchKey, Kernel]] = {}


class Shared(NamedTuple):
    """A part of a kernel's work on the CPU that calls with equal arguments have in common.

    made     function of the arguments `sized` and `read`; `direct` takes what it returns as `shared`
    sized    names of arguments of which only sizes and dtype matter
    read     names of the others
    worth    whether a call with these arguments, by name, uses it
    ahead    whether it is worth it only where all that is read is parameters in inference: made once, and
             again when they change
    """

    made: Kernel
    sized: tuple[str, ...]
    read: tuple[str, ...]
    worth: Callable[[dict[str, Any]], bool]
    ahead: bool = False


def define(schema: str, *, cpu: Kernel, cuda: Kernel, fake: Kernel, random: bool = False) -> Op:
    """Declare `fxaccel::<schema>` with its kernel on each device and its shape function.

    Kernels and shape function repeat the schema's defaults: PyTorch leaves out arguments that equal them.
    `random` says that it may draw from torch's generator.
    """
    name = schema[: schema.index("(")]
    tags = (torch.Tag.nondeterministic_seeded,) if random else ()
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"fxaccel::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fxaccel, name).default
    _KERNELS[op] = {DispatchKey.CPU: cpu, DispatchKey.CUDA: cuda}
    return op


def differentiate(op: Op, derivative: Kernel) -> None:
    """Give `op` a derivative: `derivative`, given every argument, applies a torch.autograd.Function.

    Where no gradient is wanted and nothing watches (no tracing, no fake tensors, no subclass), the device's
    kernel is called here and now: a second trip through the dispatcher would cost as much as the first.
    """
    kernels = _KERNELS[op]
    arguments = op._schema.arguments
    defaults = tuple(a.default_value for a in arguments if a.has_default_value())
    required = len(arguments) - len(defaults)

    def autograd(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return derivative(*args, *defaults[len(args) - required :])
        keys = keys & _AFTER_AUTOGRAD
        kernel = kernels.get(keys.highestPriorityTypeId())
        return op.redispatch(keys, *args) if kernel is None else kernel(*args)

    _LIBRARY.impl(op._opname, autograd, "Autograd", with_keyset=True)


class _Refuse(torch.autograd.Function):
    """The identity in its second argument, with a derivative that raises."""

    @staticmethod
    def forward(ctx: Any, name: str, grad: Tensor, *watched: Tensor | None) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.name} has no second derivative")


def once_differentiable(backward: Kernel) -> Kernel:
    """Make a gradient whose own gradient raises, whichever input that is asked for.

    torch's decorator of this name watches the incoming gradient alone. A penalty on the gradient of a sum,
    whose incoming gradient is a constant, would count as 0 without a word.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        watched = (*grads, *ctx.saved_tensors)
        name = type(ctx).__name__.removesuffix("Backward")
        return tuple(g if g is None else _Refuse.apply(name, g, *watched) for g in results)

    return once


def autocast(
    op: Op, device: str, dtype: Callable[[], torch.dtype], places: tuple[int, ...] | None = None
) -> None:
    """Under autocast on `device`, cast the floating arguments of `op` to `dtype()`, float64 excepted.

    places    of the arguments to cast; None for all
    """
    key = getattr(DispatchKey, "Autocast" + {"cpu": "CPU", "cuda": "CUDA"}[device])
    exclude = torch._C.DispatchKeySet(key)

    def cast(arg: Any, to: torch.dtype) -> Any:
        keep = (
            not isinstance(arg, Tensor)
            or not arg.is_floating_point()
            or arg.dtype == torch.float64
            or arg.device.type != device
        )
        return arg if keep else arg.to(to)

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return op(*(cast(a, dtype()) if places is None or i in places else a for i, a in enumerate(args)))

    op.py_impl(key)(kernel)  # where a graph is traced before dispatch
    _LIBRARY.impl(op._opname, kernel, key.name)


def count_flops(op: Op, formula: Callable[..., int]) -> None:
    """Let FlopCounterMode count `op`; `formula` takes shapes in place of tensors."""
    register_flop_formula(op.overloadpacket)(formula)


def known(size: int | torch.SymInt) -> int | None:
    """The number that a size is, if it is one; never decides, or guards on, a symbolic size."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)  # None of an expression, which a loaded graph has in its place
    return None if node is None else node.maybe_as_int()


def differ(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are known to differ; never decides, or guards on, a symbolic size."""
    x, y = known(a), known(b)
    return x is not None and y is not None and x != y


def unlike(name: str, x: Tensor, other_name: str, other: Tensor) -> Iterator[str]:
    """Why two tensors are not of one shape and dtype."""
    if x.dtype != other.dtype:
        yield f"dtypes differ: {name} is {x.dtype}, {other_name} {other.dtype}"
    sizes = list(zip(x.shape, other.shape, strict=False))
    if x.ndim != other.ndim or any(differ(a, b) for a, b in sizes):
        yield (
            f"{name} is {list(x.shape)} and {other_name} {list(other.shape)}; the kernel does not broadcast"
        )


def watched(x: Tensor) -> bool:
    """Whether x, or something that sees this call, knows torch's operators and not MKL's or oneDNN's."""
    return (
        torch.is_grad_enabled()
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
        or torch.are_deterministic_algorithms_enabled()
    )
