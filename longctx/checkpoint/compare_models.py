"""Comparison of two models' configurations: the keys that differ, and which of them change no tensor."""

from collections.abc import Iterator, Mapping
from typing import Any

from longctx.model.config import position_keys


def changed_keys(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Iterate over the keys, dotted, in which two models' configurations differ, with both values."""
    for key in sorted({*actual, *expected}):
        one, other = actual.get(key), expected.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from ((f"{key}.{inner}", *values) for inner, *values in changed_keys(one, other))
        elif one != other:
            yield key, one, other


def differences(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Describe each key, dotted, in which two models' configurations differ."""
    return [f"{key}: {one!r}, expected {other!r}" for key, one, other in changed_keys(actual, expected)]


def tensor_differences(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Describe each key in which two models differ such that the weights of one are not those of the other."""
    changes = changed_keys(actual, expected)
    return [f"{key}: {one!r}, expected {other!r}" for key, one, other in changes if not is_position(key)]


def position_changes(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Describe each key of positions or masks in which two models differ, `model.softmax.rope_theta: 1e4 → 1e6`."""
    changes = changed_keys(actual, expected)
    return [f"model.{key}: {_text(one)} → {_text(other)}" for key, one, other in changes if is_position(key)]


def is_position(key: str) -> bool:
    """Return whether a key of `[model]`, dotted, changes no tensor, only positions and masks."""
    return ".".join(key.split(".")[:2]) in position_keys()


def _text(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
