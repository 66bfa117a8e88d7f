"""Weights that torchao holds quantized, as ours, and ours as torchao's: the same codes and scales.

Int8Tensor                  int8, a scale a row or a group; inputs as they are, or int8 by rows as they come
Float8Tensor                float8_e4m3fn, a scale a row or one; inputs as they are, or float8 by rows
IntxUnpackedToInt8Tensor    int4 in groups, with zeros: (q - zero_point) * scale; inputs as they are

Source     pytorch/ao, torchao.quantization, 0.18.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from fxaccel.errors import OptionError
from fxaccel.ir import Replacement
from fxaccel.passes._linear_fits import Way
from fxaccel.passes._linear_form import Parts
from fxaccel.passes.quantized._grid import Grid
from fxaccel.passes.quantized.matrix import QuantizedMatrix

INT4: Any = getattr(torch, "int4")  # noqa: B009  the stubs have no dtypes of less than a byte


def opened(name: str, tensor: Tensor, aliases: tuple[str, ...], by: str) -> Replacement | None:
    """What takes the place of a parameter of torchao's, None of another; OptionError of one that is unknown.

    aliases    other names of the parameter
    """
    kind = type(tensor)
    if not kind.__module__.startswith("torchao."):
        return None
    if kind.__name__ not in _OPENED or tensor.dim() != 2:
        raise OptionError(
            f"{name} is torchao's {kind.__name__} of {tensor.dim()} dimensions, expected a matrix in one of "
            f"{', '.join(_OPENED)}",
            "dequantize it before, or quantize the dense model with the pass quantize",
        )
    grid, inputs, parts = _OPENED[kind.__name__](name, tensor)
    narrow = inputs == "none" and tensor.device.type == "cpu" and tensor.dtype == torch.float32
    rows, columns = tensor.shape
    form = QuantizedMatrix(rows, columns, grid, tensor.dtype, inputs, narrow=narrow, scales=parts[1].dtype)
    way = Way(form, flipped=False)
    names = tuple(f"{name}_{part}" for part in form.parts)
    return Replacement(by, (name,), names, way, way.inverse, parts, frozen=True, aliases=aliases)


def _refuse(name: str, what: str) -> OptionError:
    return OptionError(f"{name} {what}, which has no equal here", "quantize the dense model instead")


def _int8(name: str, tensor: Any) -> tuple[Grid, str, Parts]:
    if tensor.zero_point is not None and bool(tensor.zero_point.any()):
        raise _refuse(name, "is int8 with zero points")
    if tensor.act_pre_scale is not None or tensor.act_quant_scale is not None:
        raise _refuse(name, "divides or rounds its inputs by scales of its own")
    group = _group(name, tensor)
    inputs = "none"
    if tensor.act_quant_kwargs is not None:
        kwargs = tensor.act_quant_kwargs
        if type(kwargs.granularity).__name__ != "PerRow" or kwargs.mapping_type.name != "SYMMETRIC" or group:
            raise _refuse(name, "rounds its inputs in another way than by symmetric rows")
        inputs = "dynamic-int8"
    return Grid("int8", group), inputs, (tensor.qdata, tensor.scale.float())


def _float8(name: str, tensor: Any) -> tuple[Grid, str, Parts]:
    if tensor.qdata.dtype != torch.float8_e4m3fn:
        raise _refuse(name, f"is {tensor.qdata.dtype}")
    whole = tensor.scale.numel() == 1 and tensor.shape[0] > 1
    group = -1 if whole else _group(name, tensor)
    inputs = "none"
    if tensor.act_quant_kwargs is not None:
        if type(tensor.act_quant_kwargs.granularity).__name__ != "PerRow" or group > 0:
            raise _refuse(name, "rounds its inputs in another way than by rows")
        inputs = "dynamic-float8"
    scale = tensor.scale.float()
    return Grid("float8", group), inputs, (tensor.qdata, scale.reshape(1, 1) if whole else scale)


def _int4(name: str, tensor: Any) -> tuple[Grid, str, Parts]:
    if tensor.target_dtype != INT4 or tensor.activation_quantization is not None:
        raise _refuse(name, f"is {tensor.target_dtype}, its inputs {tensor.activation_quantization}")
    grid = Grid("int4", tensor.block_size[1], zeros=True)
    scale = tensor.scale
    packed = grid.pack((tensor.qdata + 8).to(torch.uint8), scale, -tensor.zero_point.to(scale) * scale)
    assert packed.zero is not None, "the grid has zeros"
    return grid, "none", (packed.q, packed.scale, packed.zero)


_OPENED = {"Int8Tensor": _int8, "Float8Tensor": _float8, "IntxUnpackedToInt8Tensor": _int4}


def _group(name: str, tensor: Any) -> int:
    rows, columns = tensor.block_size
    if rows != 1:
        raise _refuse(name, f"has scales of blocks of {rows} x {columns}")
    return 0 if columns == tensor.shape[1] else int(columns)


# -- and back --------------------------------------------------------------------------------------


def state_dict(fast: nn.Module) -> dict[str, Any]:
    """The model's state in the original's names, its quantized weights as torchao's tensors.

    Load it by `original.load_state_dict(state, assign=True)`; the model then runs with torchao alone. Weights
    of int4 with zeros and nf4 have no equal there and are dense, as are those of structures.
    Errors     OptionError where torchao is not installed.
    """
    try:
        ao = importlib.import_module("torchao.quantization")
    except ModuleNotFoundError:
        hint = "pip install torchao"
        raise OptionError("torchao is not installed, expected it for its tensors", hint) from None
    state: dict[str, Any] = dict(fast.state_dict())
    own = dict(fast.named_parameters(remove_duplicate=False))
    for one in fast.__dict__["_fxaccel"].replacements:
        made = _exported(ao, one, own)
        if made is not None:
            state.update(dict.fromkeys((*one.old, *one.aliases), made))
    return state


def _exported(ao: Any, one: Replacement, own: dict[str, nn.Parameter]) -> Tensor | None:
    way = one.forward
    form = way.form if isinstance(way, Way) and not way.flipped else None
    if not isinstance(form, QuantizedMatrix) or not all(n in own for n in one.new):
        return None
    q, scale, *_ = (own[n].detach() for n in one.new)
    width = form.grid.width(form.columns)
    if form.grid.format == "int8" and form.inputs != "static-int8":
        kwargs = None
        if form.inputs == "dynamic-int8":
            workflow = importlib.import_module("torchao.quantization.quantize_.workflows.int8.int8_tensor")
            kwargs = workflow.QuantizeTensorToInt8Kwargs(granularity=ao.PerRow())
        return ao.Int8Tensor(
            q, scale, [1, width], form.dtype, zero_point=torch.zeros_like(scale, dtype=torch.int8),
            act_quant_kwargs=kwargs,
        )  # fmt: skip
    if form.grid.format == "float8":
        block = [form.rows, form.columns] if form.grid.group < 0 else [1, width]
        return ao.Float8Tensor(q, scale, block, dtype=form.dtype)
    if form.grid.format == "int4" and not form.grid.zeros and form.columns % width == 0:
        codes = form.grid.unpack(form.grid.empty(1, 2)._replace(q=q), form.columns).to(torch.int8) - 8
        zero = torch.zeros_like(scale, dtype=torch.int8)
        return ao.IntxUnpackedToInt8Tensor(
            codes, scale.to(form.dtype), zero, INT4, (1, width), form.dtype, None
        )  # fmt: skip
    return None
