"""Base class of all configurations: strict pydantic models, and numbers with units.

Each configuration class is beside the code that it configures (`LightningConfig` with the lightning mixer, and so on);
`longctx.recipe` composes them.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
# At most 18 digits on each side of the point: longer numbers are mistakes.
_INTEGER = re.compile(r"([+-]?[0-9]{1,3}(?:_?[0-9]){0,17})(\.[0-9]{1,18})?\s*(k|M|G|Ki|Mi|Gi)?")
_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # bytes, on Linux
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#]*@")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|m|h)")


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, values are frozen and never converted silently."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the values of nested tables with their dotted keys."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_integer(value: object) -> object:
    """Parse `"1Mi"`, `"64Ki"`, `"1.5M"`, `"1_000"` as an integer; values that are not strings are returned unchanged.

    Raises ValueError if the text is not a number or not a whole number.
    """
    if not isinstance(value, str):
        return value
    match = _INTEGER.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not an integer; write 4096, '4_096', '4Ki' (4096) or '4k' (4000)")
    whole, fraction, unit = match.groups()
    scale = _UNITS[unit or ""]
    if fraction is None:
        return int(whole) * scale
    digits = len(fraction) - 1
    scaled, remainder = divmod(int(whole + fraction[1:]) * scale, 10**digits)
    if remainder:
        raise ValueError(f"{value!r} is not a whole number")
    return scaled


def parse_duration(value: object) -> object:
    """Parse `"90s"`, `"10m"`, `"1.5h"` as seconds; numbers are seconds already."""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"{value!r} is not a duration; write '90s', '10m' or '1.5h'")
        return float(match.group(1)) * _SECONDS[match.group(2)]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def without_password(text: str) -> str:
    """Return a text with the user and password of each URL in it, `scheme://user:password@host`, as `***`."""
    return _USER.sub(r"\1***@", text)


def parse_path(value: str) -> str:
    """Return the path of a file or folder. Raises ValueError if none can have that name."""
    if not value:
        raise ValueError("is empty: give a path")
    if "\0" in value:
        raise ValueError(f"{value[:_LONGEST_NAME]!r} has a NUL character, which no path has")
    names = os.fsencode(value).split(b"/")
    if len(os.fsencode(value)) > _LONGEST_PATH or max(map(len, names)) > _LONGEST_NAME:
        raise ValueError(
            f"{value[:40]!r}… has {len(value):,} characters: a path has at most {_LONGEST_PATH:,} bytes, each name in "
            f"it {_LONGEST_NAME}"
        )
    return value


Integer = Annotated[int, BeforeValidator(parse_integer)]
"""An integer, in a recipe optionally with a unit: `"1Mi"`."""

Duration = Annotated[float, BeforeValidator(parse_duration)]
"""Seconds, in a recipe optionally with a unit: `"10m"`."""

PathText = Annotated[str, AfterValidator(parse_path)]
"""The path of a file or folder."""
