"""Triton's interpreter without the work whose result it throws away: the same values in half the time.

Most of its time goes not into values but into their types: each operation makes several of them anew.
"""

import dataclasses
import inspect
import math

import triton.language as tl
from triton.runtime import interpreter


def quicken(patch):
    """Patch the interpreter; before Triton's language is patched for it."""
    builder, core = interpreter.interpreter_builder, tl.core
    # A check of overflow costs three operations for each, and without options.debug nothing reads it.
    assert not builder.options.debug
    patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    patch.setattr(interpreter, "_get_np_dtype", _by_name(interpreter._get_np_dtype))
    patch.setattr(interpreter, "_patch_attr", _patch_attr)
    patch.setattr(core.tensor, "__init__", _tensor_init())
    patch.setattr(core.block_type, "__init__", _block_init(core.block_type.__init__))
    patch.setattr(core.block_type, "to_ir", lambda self, builder: self)  # what get_block_ty makes again
    for kind in (core.dtype, core.block_type):
        patch.setattr(kind, "__eq__", _same_or(kind.__eq__))


def _by_name(np_dtype):
    """numpy's dtype of the elements, asked for once for each name."""
    found = {}

    def of(type):
        scalar = type.scalar
        if scalar.name not in found:
            found[scalar.name] = np_dtype(scalar)
        return found[scalar.name]

    return of


def _patch_attr(obj, name, member, builder, scope):
    """The builtin itself, with the interpreter's semantic, instead of its two wrappers."""
    function, semantic = inspect.unwrap(member), interpreter.interpreter_semantic

    def call(*args, _semantic=None, **kwargs):
        return function(*args, _semantic=semantic, **kwargs)

    scope.set_attr(obj, name, call)


def _tensor_init():
    """tensor.__init__, with the shapes in constexprs made once for each."""
    shapes = {(): (tl.core.tuple([]), tl.constexpr(1))}

    def init(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in shapes:
            shapes[key] = tl.core.tuple([tl.constexpr(s) for s in key]), tl.constexpr(math.prod(key))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    return init


def _block_init(made):
    """block_type.__init__, with its checks made once for each shape."""
    shapes = {}

    def init(self, element_ty, shape):
        key = tuple(shape)
        if key not in shapes:
            made(self, element_ty, shape)
            shapes[key] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = shapes[key]
        self.name = f"<{text}, {element_ty}>"

    return init


def _same_or(equal):
    return lambda self, other: self is other or equal(self, other)
