"""Triton's interpreter, faster: `triton.language` is patched once per kernel, not for each function that it calls.

The interpreter looks through all members of `triton.language` at each call of a device function, though the call of the
kernel around it has replaced them already; that was two fifths of the kernels' tests. Types are computed once.

And right in bf16: numpy has no such type, so that the interpreter keeps the bits as integers, and multiplies those.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import triton
from triton import language as tl
from triton.runtime import interpreter


def patch_once_per_kernel() -> None:
    """Skip what is patched already. Without effect where this version of Triton does it otherwise."""
    patch_lang = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if patch_lang is None or scope is None:
        return

    def is_patched(language: Any) -> bool:
        return not tl.core.is_builtin(language.load)

    def patch(function: Any) -> Any:
        used = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if is_patched(tl) and all(map(is_patched, used)) and not tl.core.is_builtin(tl.core.tensor.__add__):
            return scope()
        return patch_lang(function)

    interpreter._patch_lang = patch


def compute_types_once() -> None:
    """Compute the types of tuples where they are asked for, and types and shapes of blocks once.

    Every value in a kernel had a type and a shape of its own, tuples of constants that have types: two fifths of the
    kernels' tests. What is replaced is that of Triton 3.7; without effect with another one.
    """
    if not triton.__version__.startswith("3.7."):
        return
    core = tl.core
    numpy_type, make_block = cache(interpreter._get_np_dtype), core.block_type.__init__
    blocks: dict[object, dict[str, Any]] = {}

    def get_numpy_type(dtype: Any) -> Any:
        return np.dtype(np.uint64) if dtype.scalar.is_ptr() else numpy_type(dtype.scalar)

    def make_tuple(self: Any, args: Any, type: Any = None) -> None:  # noqa: A002 - Triton's name
        self.values = list(args)
        self.type = type if type is None or isinstance(type, core.tuple_type) else core.tuple_type(type)

    def get_tuple_type(self: Any) -> Any:
        if self._type is None:
            self._type = core._type_for_tuple_values(self.values)
        return self._type

    def make_block_once(self: Any, element: Any, shape: Any) -> None:
        sizes = tuple(core._unwrap_if_constexpr(size) for size in getattr(shape, "values", shape))
        # Types of pointers are not hashable.
        key = str(element), element.address_space if element.is_ptr() else None, sizes
        if key not in blocks:
            make_block(self, element, list(sizes))
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    @cache
    def constants(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def make_tensor(self: Any, handle: Any, dtype: Any) -> None:
        self.handle, self.type, self.dtype = handle, dtype, dtype.scalar
        self.shape, self.numel = constants(tuple(dtype.shape) if dtype.is_block() else ())

    interpreter._get_np_dtype = get_numpy_type
    core.tuple.__init__ = make_tuple
    core.tuple.type = property(get_tuple_type, lambda self, dtype: setattr(self, "_type", dtype))
    core.block_type.__init__ = make_block_once
    core.tensor.__init__ = make_tensor


def multiply_bfloat16() -> None:
    """Make the interpreter's matrix products of bf16 tiles multiply their values, in float32."""
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    builder.create_dot = dot
