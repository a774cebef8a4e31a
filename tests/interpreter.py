"""Triton's interpreter, faster: `triton.language` is patched once per kernel, not for each function that it calls.

The interpreter looks through all members of `triton.language` at each call of a device function, though the call of the
kernel around it has replaced them already; that was two fifths of the kernels' tests.

And right in bf16: numpy has no such type, so that the interpreter keeps the bits as integers, and multiplies those.
"""

from typing import Any

import numpy as np
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
