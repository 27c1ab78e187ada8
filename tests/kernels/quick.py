"""Triton's interpreter with less work around each operation, for the tests.

It checks and names the shape of every tensor anew, and looks for overflow by interpreting five more
operations. Here a shape is checked once, and NumPy looks for overflow; the values are the same.
"""

import functools
import math

import numpy as np
import pytest
from triton.language import core, semantic
from triton.runtime import interpreter

_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_make_block_type = core.block_type.__init__
_get_np_dtype = interpreter._get_np_dtype


def apply(patch: pytest.MonkeyPatch) -> None:
    """Make the replacements, which `patch` undoes."""
    patch.setattr(interpreter.InterpretedFunction, "__call__", _patching_once())
    patch.setattr(interpreter, "_get_np_dtype", _np_dtype)
    patch.setattr(core.block_type, "__init__", _init_block_type)
    patch.setattr(core.tensor, "__init__", _init_tensor)
    patch.setattr(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", _require_no_overflow)


def _patching_once():
    """`InterpretedFunction.__call__` that patches the language once a function, not at each call."""
    patched = set()
    original = interpreter.InterpretedFunction.__call__

    def call(function, *args, **kwargs):
        if function.fn not in patched:
            patched.add(function.fn)
            return original(function, *args, **kwargs)
        return function.rewrite()(*args, **kwargs)

    return call


@functools.cache
def _scalar_np_dtype(kind):
    return _get_np_dtype(kind)


def _np_dtype(kind):
    scalar = kind.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _scalar_np_dtype(scalar)


@functools.cache
def _facts_of_block_type(name, *shape):
    """What a block type holds besides the type of its elements, which is known by its name."""
    made = object.__new__(core.block_type)
    _make_block_type(made, name, list(shape))
    del made.element_ty
    return vars(made) | {"sizes_and_numel": _sizes_and_numel(shape)}


def _init_block_type(self, element_ty, shape):
    shape = map(core._unwrap_if_constexpr, shape)
    vars(self).update(_facts_of_block_type(element_ty.name, *shape), element_ty=element_ty)


def _sizes_and_numel(shape):
    """What a tensor says of its shape."""
    return core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))


_SCALAR = _sizes_and_numel(())


def _init_tensor(self, handle, type):
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = type.sizes_and_numel if type.is_block() else _SCALAR


def _require_no_overflow(self, lhs, rhs, binary_op):
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64:
        return
    exact = _EXACT[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    low, high = kind.get_int_min_value(), kind.get_int_max_value()
    assert low <= exact.min() and exact.max() <= high, f"{kind} overflow in {binary_op.__name__}"
