"""Steps on how a call is written: one name, positional arguments, no calls that do nothing."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from fxaccel.canonical.editor import Editor, aten, on
from fxaccel.canonical.values import dtype, is_dense, is_tensor, rank, same_strides

# Other names of one operator, all with the same arguments.
RENAMED = {
    aten.multiply.Tensor: aten.mul.Tensor, aten.multiply.Scalar: aten.mul.Tensor,
    aten.mul.Scalar: aten.mul.Tensor, aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor, aten.subtract.Tensor: aten.sub.Tensor,
    aten.subtract.Scalar: aten.sub.Tensor, aten.div.Scalar: aten.div.Tensor,
    aten.divide.Tensor: aten.div.Tensor, aten.divide.Scalar: aten.div.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor, aten.true_divide.Scalar: aten.div.Tensor,
    aten.negative.default: aten.neg.default, aten.absolute.default: aten.abs.default,
    aten.greater.Tensor: aten.gt.Tensor, aten.greater.Scalar: aten.gt.Scalar,
    aten.greater_equal.Tensor: aten.ge.Tensor, aten.greater_equal.Scalar: aten.ge.Scalar,
    aten.less.Tensor: aten.lt.Tensor, aten.less.Scalar: aten.lt.Scalar,
    aten.less_equal.Tensor: aten.le.Tensor, aten.less_equal.Scalar: aten.le.Scalar,
    aten.not_equal.Tensor: aten.ne.Tensor, aten.not_equal.Scalar: aten.ne.Scalar,
    aten.concat.default: aten.cat.default, aten.concatenate.default: aten.cat.default,
    aten.special_expit.default: aten.sigmoid.default, aten.special_erf.default: aten.erf.default,
    aten.special_softmax.default: aten.softmax.int, aten.special_log_softmax.default: aten.log_softmax.int,
    aten.special_logsumexp.default: aten.logsumexp.default, aten.special_exp2.default: aten.exp2.default,
    aten.special_expm1.default: aten.expm1.default, aten.special_log1p.default: aten.log1p.default,
    aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__and__.Scalar: aten.bitwise_and.Scalar, aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor, aten.maximum.default: aten.maximum.default,
    aten.max.other: aten.maximum.default, aten.min.other: aten.minimum.default,
    aten.clamp_min.default: aten.clamp.default, aten.clip.default: aten.clamp.default,
    aten.clamp_max.default: aten.clamp.default,
}  # fmt: skip
RENAMED = {old: new for old, new in RENAMED.items() if old is not new}


@on(*RENAMED, autocast=True)
def rename(e: Editor, node: fx.Node) -> fx.Node | None:
    """One name for each operator."""
    args = node.args
    if node.target is aten.clamp_max.default:
        args = (args[0], None, args[1])
    kwargs = dict(node.kwargs)
    if len(args) == 3 and node.target in (aten.add.Scalar, aten.sub.Scalar):
        *args, kwargs["alpha"] = args
    return e.call(node, RENAMED[node.target], *args, val=node.meta["val"], **kwargs)


_LOGICAL = {
    aten.logical_and.default: aten.bitwise_and.Tensor, aten.logical_or.default: aten.bitwise_or.Tensor,
    aten.logical_not.default: aten.bitwise_not.default, aten.logical_xor.default: aten.bitwise_xor.Tensor,
}  # fmt: skip


@on(*_LOGICAL, autocast=True)
def logical(e: Editor, node: fx.Node) -> fx.Node | None:
    """Logic of booleans is written bitwise."""
    if any(dtype(n) is not torch.bool for n in node.all_input_nodes):
        return None
    return e.call(node, _LOGICAL[node.target], *node.args, val=node.meta["val"])


# -- the normal form of an argument list -----------------------------------------------------------

_DIM_NAMES = {"dim", "dims", "dim0", "dim1", "axis", "start_dim", "end_dim", "source", "destination"}
_ONE_MORE = {aten.unsqueeze.default, aten.stack.default}
_NOISE = {"pin_memory": (False,), "layout": (torch.strided,), "cudnn_enable": (True, False),
          "memory_format": (torch.preserve_format,), "non_blocking": (False, True)}  # fmt: skip


@functools.cache
def _signature(target: Any) -> tuple[tuple[str, bool, Any, bool], ...]:
    """Name, whether keyword-only, default and whether it counts dimensions, for each argument."""
    return tuple(
        (a.name, a.kwarg_only, a.default_value if a.has_default_value() else _MISSING, _is_dim(a))
        for a in target._schema.arguments
    )


_MISSING = object()


def _is_dim(argument: Any) -> bool:
    return argument.name in _DIM_NAMES and "int" in str(argument.type)


def normal_arguments(e: Editor, node: fx.Node) -> bool:
    """Positional as far as the schema allows, no trailing defaults, dimensions counted from the front."""
    if node in e.done or not isinstance(node.target, torch._ops.OpOverload):
        return False
    e.done.add(node)
    given: list[Any] = []
    kwargs: dict[str, Any] = {}
    last = 0
    for i, (name, kwarg_only, default, is_dim) in enumerate(_signature(node.target)):
        positional = i < len(node.args) and not kwarg_only
        value = node.args[i] if positional else node.kwargs.get(name, default)
        if value is _MISSING:
            return False
        if is_dim:
            value = _positive(node, value)
        if name in _NOISE and value in _NOISE[name]:
            value = default
        same = type(value) is type(default) and value == default
        if not kwarg_only:
            given.append(value)
            last = last if same else len(given)
        elif not same:
            kwargs[name] = value
    args = tuple(given[:last])
    if repr((args, kwargs)) == repr((node.args, dict(node.kwargs))):
        return False
    node.args, node.kwargs = args, kwargs
    return True


def _positive(node: fx.Node, value: Any) -> Any:
    first = node.args[0] if node.args else None
    first = first[0] if isinstance(first, (list, tuple)) and first else first
    if not is_tensor(first):
        return value
    n = max(rank(first) + (node.target in _ONE_MORE), 1)
    if isinstance(value, int):
        return value % n if -n <= value < n else value
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return [v % n for v in value]
    return value


# -- operators that do nothing ---------------------------------------------------------------------


@on(aten._assert_tensor_metadata.default, autocast=True)
def metadata_assertion(e: Editor, node: fx.Node) -> fx.Node | None:
    """What the capture already states about dtype and device needs no assertion."""
    return node.args[0] if is_tensor(node.args[0]) else None


_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default,
          aten.type_as.default)  # fmt: skip


@on(*_CASTS, autocast=True)
def cast(e: Editor, node: fx.Node) -> fx.Node | None:
    """Casts are `to.dtype`, those to the same type are gone, and widening casts are seen through."""
    x = node.args[0]
    if not is_tensor(x) or _changes_format(node):
        return None
    old, new = x.meta["val"], node.meta["val"]
    if old.device != new.device or old.layout != new.layout:
        return None
    while e.at(x, aten.to.dtype) and len(x.args) == 2 and _holds(x.args[1], dtype(x.args[0])):
        x = x.args[0]
    if dtype(x) == new.dtype:
        copies = x is not node.args[0] or True in node.args
        return None if copies and e.exposed(node) else e.forward(node, x)
    if node.target is aten.to.dtype and node.args == (x, new.dtype) and not node.kwargs:
        return None
    return e.call(node, aten.to.dtype, x, new.dtype, val=new)


def _changes_format(node: fx.Node) -> bool:
    format = node.kwargs.get("memory_format")
    return format not in (None, torch.preserve_format)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of the narrow dtype is one of the wide dtype, with its own gradient."""
    pairs = {torch.float64: (torch.float32, torch.float16, torch.bfloat16),
             torch.float32: (torch.float16, torch.bfloat16)}  # fmt: skip
    return narrow in pairs.get(wide, ())


_DROPOUTS = (aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout,
             aten.dropout_, aten.feature_dropout_, aten.alpha_dropout_,
             aten.feature_alpha_dropout_)  # fmt: skip


@on(*(packet.default for packet in _DROPOUTS), autocast=True)
def idle_dropout(e: Editor, node: fx.Node) -> fx.Node | None:
    """Dropout that drops nothing is gone."""
    x, p, train = node.args
    return e.forward(node, x) if not train or p == 0 else None


@on(aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.resolve_conj.default,
    aten.resolve_neg.default, autocast=True)  # fmt: skip
def plain_alias(e: Editor, node: fx.Node) -> fx.Node | None:
    """Aliases, and copies of constants that nothing writes to, are gone."""
    x = node.args[0]
    if node.target in (aten.resolve_conj.default, aten.resolve_neg.default) and dtype(x).is_complex:
        return None
    return e.forward(node, x)


@on(aten.detach.default, aten.detach_.default, autocast=True)
def idle_detach(e: Editor, node: fx.Node) -> fx.Node | None:
    """Detaching what no gradient can reach is gone."""
    x = node.args[0]
    free = not (dtype(x).is_floating_point or dtype(x).is_complex) or e.grad_free(x)
    return e.forward(node, x) if free or not e.grad_on(node) else None


# Readers that give the same result, in the same layout, however their operand is laid out.
LAYOUT_FREE = {
    aten.matmul.default, aten.bmm.default, aten.mm.default, aten.linear.default, aten.addmm.default,
    aten.baddbmm.default, aten.layer_norm.default, aten.rms_norm.default, aten.embedding.default,
    aten.einsum.default, aten.sym_size.int,
}  # fmt: skip


@on(aten.contiguous.default, aten.clone.default, autocast=True)
def idle_copy(e: Editor, node: fx.Node) -> fx.Node | None:
    """A copy that changes no layout, or whose layout nothing notices, is gone."""
    x = node.args[0]
    if not is_tensor(x):
        return None
    unnoticed = node.users and all(u.target in LAYOUT_FREE for u in node.users)
    if unnoticed or same_strides(x.meta["val"], node.meta["val"]):
        return e.forward(node, x)
    return None


# -- creation --------------------------------------------------------------------------------------

_FILLED = {
    aten.zeros.default: 0, aten.ones.default: 1, aten.new_zeros.default: 0, aten.new_ones.default: 1,
    aten.zeros_like.default: 0, aten.ones_like.default: 1, aten.full_like.default: None,
    aten.new_full.default: None, aten.scalar_tensor.default: None, aten.full.default: None,
}  # fmt: skip


@on(*_FILLED, autocast=True)
def filled(e: Editor, node: fx.Node) -> fx.Node | None:
    """Tensors of one number are `full`, with dtype and device written."""
    val = node.meta["val"]
    if _changes_format(node) or val.layout is not torch.strided or not is_dense(val):
        return None
    number = _FILLED[node.target]
    if number is None:
        number = node.args[0] if node.target is aten.scalar_tensor.default else node.args[1]
    sizes = e.sizes(e.shape(node), infer=False)
    if isinstance(number, fx.Node) or sizes is None:
        return None
    kind = bool if val.dtype is torch.bool else float if val.dtype.is_floating_point else int
    if val.dtype.is_complex:
        return None
    args, kwargs = (sizes, kind(number)), {"dtype": val.dtype, "device": val.device}
    if node.target is aten.full.default and repr((node.args, node.kwargs)) == repr((args, kwargs)):
        return None
    return e.call(node, aten.full.default, *args, val=val, **kwargs)


@on(aten.arange.default, aten.arange.start, aten.arange.start_step, autocast=True)
def counting(e: Editor, node: fx.Node) -> fx.Node | None:
    """`arange` has as few arguments as say the same: no start of 0, no step of 1, no dtype of int64."""
    args = list(node.args)
    start, end, step = {1: [0, *args, 1], 2: [*args, 1], 3: args}[len(args)]
    kwargs = dict(node.kwargs)
    if kwargs.get("dtype") is torch.int64 and not any(isinstance(a, float) for a in args):
        del kwargs["dtype"]
    plain_start = type(start) is int and start == 0
    plain_step = type(step) is int and step == 1
    if plain_step and plain_start:
        target, new = aten.arange.default, [end]
    elif plain_step:
        target, new = aten.arange.start, [start, end]
    else:
        target, new = aten.arange.start_step, [start, end, step]
    if target is node.target and args == new and kwargs == node.kwargs:
        return None
    return e.call(node, target, *new, val=node.meta["val"], **kwargs)
