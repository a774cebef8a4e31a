"""Triton's interpreter, faster: `triton.language` is patched once per kernel, not for each function that it calls.

The interpreter looks through all members of `triton.language` at each call of a device function, though the call of the
kernel around it has replaced them already; that was two fifths of the kernels' tests.
"""

from typing import Any

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
