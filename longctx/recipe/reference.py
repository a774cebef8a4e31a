"""Every key of a recipe, as a page of documentation made from the classes themselves."""

import inspect
import types
import typing

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from longctx.config import Duration, Integer
from longctx.recipe.schema import Recipe

_HEAD = """\
# Recipes

A recipe is a TOML file that holds all that decides what a run computes. `extends = "other.toml"` (or the name of a
recipe that is shipped) takes another one as the start: tables are merged, and this file wins. On the command line
`key.sub=value` overrides: `longctx train quickstart train.steps=50 data.sequence_length=16Ki`. An unknown key, a wrong
type, or an option that a chosen part does not support is an error. The whole resolved recipe is written beside the
checkpoints, as `recipe.toml`.

Integers may have units: `"4Ki"` is 4096, `"4k"` is 4000, `"1Mi"` is 1,048,576; durations too: `"90s"`, `"10m"`, `"1h"`.

This page is made from the code by `make docs`.
"""


def _type(annotation: object) -> str:
    if annotation == Integer:
        return "integer"
    if annotation == Duration:
        return "duration"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(a) for a in arguments if a is not type(None))
    if origin is typing.Literal:
        return " or ".join(f'`"{a}"`' if isinstance(a, str) else f"`{a}`" for a in arguments)
    if origin is dict:
        return f"a table of {_type(arguments[1])}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_type(arguments[0])}"
    if origin is tuple:
        return "[" + ", ".join(_type(a) for a in arguments) + "]"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}.get(typing.cast(type, annotation), "")


def _table_of(field: FieldInfo) -> type[BaseModel] | None:
    candidates = [field.annotation, *typing.get_args(field.annotation)]
    return next((c for c in candidates if inspect.isclass(c) and issubclass(c, BaseModel)), None)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**needed**"
    if field.default is None:
        return "absent"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, tuple):
        return f"`{list(field.default)}`"
    return f'`"{field.default}"`' if isinstance(field.default, str) else f"`{field.default}`"


def _sections(name: str, table: type[BaseModel]) -> list[str]:
    words = " ".join((inspect.getdoc(table) or "").split())
    title = f"## `[{name}]`" if name else "## Above the first table"
    _, _, said = words.partition(": ") if words.startswith("`[") else ("", "", words)
    lines = [title, "", *([said[0].upper() + said[1:], ""] if said else [])]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    below: list[str] = []
    for key, field in table.model_fields.items():
        inner = _table_of(field)
        if inner is not None:
            below += _sections(f"{name}.{key}" if name else key, inner)
            continue
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        kind = _type(field.annotation)
        lines.append(f"| `{key}` | {kind} | {_default(field)} | {meaning} |")
    return [*lines, "", *below]


def reference() -> str:
    """The page, as Markdown."""
    return "\n".join([_HEAD, *_sections("", Recipe)]).rstrip() + "\n"
