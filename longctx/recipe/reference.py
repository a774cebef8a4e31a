"""Recipe reference: the page of every key and the list that shells complete, from the configuration classes."""

import inspect
import re
import types
import typing
from collections.abc import Mapping

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from longctx.config import Duration, Integer
from longctx.recipe.schema import Recipe

_HEAD = """\
# Recipes

A recipe is a TOML file with everything that determines the result of a run. `extends = "other.toml"` (or the name of
a shipped recipe) inherits from another recipe: tables are merged, and the extending file wins. `key.sub=value` on the
command line overrides a key: `longctx train quickstart train.steps=50 data.sequence_length=16Ki`. Unknown keys, wrong
types, and options that the chosen engine or layer does not support are errors. The resolved recipe is written to the
run's directory as `recipe.toml`. Complete recipes of published models: [model-recipes.md](model-recipes.md).

Integers may have units: `"4Ki"` is 4096, `"4k"` is 4000, `"1Mi"` is 1,048,576. So may durations: `"90s"`, `"10m"`,
`"1h"`.

This page is generated from the code by `make docs`.
"""
_SENTENCE = re.compile(r"(?<=\.) |; |: (?=[a-z`])")


_PLAIN = str.maketrans("", "", '`"')
"""Quotes of code and of strings, which shells would have to escape."""


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
        return "a table" if arguments[1] is typing.Any else f"a table of {_type(arguments[1])}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_type(arguments[0])}s"
    if origin is tuple:
        return "[" + ", ".join(_type(a) for a in arguments) + "]"
    names: dict[type, str] = {int: "integer", float: "number", str: "string", bool: "true or false"}
    return names.get(typing.cast(type, annotation), "")


def _table_of(field: FieldInfo) -> type[BaseModel] | None:
    candidates = [field.annotation, *typing.get_args(field.annotation)]
    return next((c for c in candidates if inspect.isclass(c) and issubclass(c, BaseModel)), None)


def _is_array(field: FieldInfo) -> bool:
    """Return whether a field is an array of tables."""
    return typing.get_origin(field.annotation) is tuple


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "none"
    if field.default is PydanticUndefined:
        return "**required**"
    if field.default is None:
        return "unset"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if field.default in ((), {}):
        return "none"
    if isinstance(field.default, tuple):
        return f"`{list(field.default)}`"
    return f'`"{field.default}"`' if isinstance(field.default, str) else f"`{field.default}`"


def _sections(name: str, table: type[BaseModel]) -> list[str]:
    text = " ".join((inspect.getdoc(table) or "").split())
    title = f"## `[{name}]`" if name else "## Top-level keys"
    _, _, summary = text.partition(": ") if text.startswith("`[") else ("", "", text)
    lines = [title, "", *([summary[0].upper() + summary[1:], ""] if summary else [])]
    sub_tables: list[str] = []
    plain: dict[str, FieldInfo] = {}
    for key, field in table.model_fields.items():
        inner = _table_of(field)
        if inner is None:
            plain[key] = field
        else:
            dotted = f"{name}.{key}" if name else key
            sub_tables += _sections(f"[{dotted}]" if _is_array(field) else dotted, inner)
    lines += key_rows(plain)
    return [*lines, "", *sub_tables]


def key_rows(fields: Mapping[str, FieldInfo]) -> list[str]:
    """Return the lines of a Markdown table of keys: type, default, meaning."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{key}` | {_type(field.annotation)} | {_default(field)} | {meaning} |")
    return lines


def keys(name: str = "", table: type[BaseModel] = Recipe) -> str:
    """Return a line per key for shells to complete: the dotted key, a tab, the first sentence of its explanation.

    In place of an explanation that begins with a value: the values.
    """
    lines = []
    for key, field in table.model_fields.items():
        inner, dotted = _table_of(field), f"{name}.{key}" if name else key
        if inner and _is_array(field):
            continue  # its keys have the name of an element in them
        text = " ".join((field.description or "").split())
        brief = _type(field.annotation) if text.startswith("`") else _SENTENCE.split(text, maxsplit=1)[0]
        lines.append(keys(dotted, inner) if inner else f"{dotted}\t{brief.translate(_PLAIN)}\n")
    return "".join(lines)


def reference() -> str:
    """Return the page as Markdown."""
    return "\n".join([_HEAD, *_sections("", Recipe)]).rstrip() + "\n"
