"""Explanation of pydantic's validation errors: the key, what is wrong with it, and the closest valid key."""

import difflib
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from longctx.recipe.emit import value_text
from longctx.recipe.lines import Key
from longctx.recipe.sources import Mistake, dotted

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "model_type": "a table",
    "dict_type": "a table",
    "list_type": "a list",
    "tuple_type": "a list",
}


def explain_validation_error(error: ValidationError, root: type[BaseModel], data: Mapping[str, Any]) -> list[Mistake]:
    """Return one mistake per key of `data` that `root` refuses, in the order of pydantic's errors."""
    by_key: dict[Key, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(_key(detail, data), []).append(detail)
    unknown = {
        key: _unknown(key, root, data) for key, details in by_key.items() if details[0]["type"] == "extra_forbidden"
    }
    suggested = {key for suggestions, _ in unknown.values() for key in suggestions}
    mistakes = []
    for key, details in by_key.items():
        if key in unknown:
            mistakes.append(Mistake(key, unknown[key][1]))
        elif details[0]["type"] != "missing":
            mistake = Mistake(key, _wrong_value(details))
            is_table = isinstance(_value_at(data, key), Mapping)
            mistakes += _by_inner_key(mistake, _names_at(root, key, data)) if is_table else [mistake]
        elif key not in suggested:  # a misspelled required key is one mistake, not two
            mistakes.append(Mistake(key, "missing"))
    return mistakes


def _key(detail: ErrorDetails, data: Mapping[str, Any]) -> Key:
    """Return the error's location without the parts that name a union member instead of a key."""
    value: Any = data
    key: Key = ()
    for depth, part in enumerate(detail["loc"], start=1):
        is_last = depth == len(detail["loc"])
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_index or (isinstance(value, Mapping) and part in value):
            key, value = (*key, part), value[part]
        elif is_last and detail["type"] == "missing":
            key = (*key, part)
    return key


def _by_inner_key(mistake: Mistake, names: list[str]) -> list[Mistake]:
    """Split the message of a table's own validator, `key: text; other.key: text`, into one mistake per key."""
    mistakes = []
    for part in re.split(r"; (?=[A-Za-z0-9_.]+: )", mistake.text):
        path, colon, text = part.partition(": ")
        if not colon or path.split(".")[0] not in names:
            return [mistake]
        mistakes.append(Mistake((*mistake.key, *path.split(".")), text))
    return mistakes


def _value_at(data: Mapping[str, Any], key: Key) -> Any:
    value: Any = data
    for part in key:
        value = value[part]
    return value


def _wrong_value(details: list[ErrorDetails]) -> str:
    """Return what a value should be; `details` has several entries if the key accepts several types."""
    expected: list[str] = []
    complaints: list[str] = []
    for detail in details:
        message, context = detail["msg"], detail.get("ctx", {})
        if detail["type"] in _EXPECTED:
            expected.append(_EXPECTED[detail["type"]])
        elif detail["type"] in ("too_long", "too_short"):
            at = "at most" if detail["type"] == "too_long" else "at least"
            limit = context.get("max_length", context.get("min_length"))
            complaints.append(f"should have {at} {limit} items, not {context['actual_length']}")
        elif detail["type"] == "union_tag_not_found":
            complaints.append(f"needs {context['discriminator']}, which selects its kind")
        elif message.startswith("Input should be "):
            expected.append(message.removeprefix("Input should be "))
        else:
            complaints.append(message.removeprefix("Value error, "))
    value = details[0]["input"]
    choices = re.findall(r"'([^']*)'", " ".join(expected))
    near = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) else []
    parts = list(dict.fromkeys(complaints))
    alternatives = " or ".join(dict.fromkeys(expected))
    if expected and not parts:
        parts.append(f"should be {alternatives}, not {_displayed(value)}")
    elif expected and not near:
        parts.append(f"or should be {alternatives}")
    return "; ".join(parts) + (f"; did you mean {near[0]!r}?" if near else "")


def _displayed(value: object) -> str:
    if isinstance(value, Mapping):
        return "a table"
    text = repr(value) if isinstance(value, str) else value_text(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown(key: Key, root: type[BaseModel], data: Mapping[str, Any]) -> tuple[set[Key], str]:
    """Return the valid keys that an unknown `key` may be a misspelling of, and the message."""
    table, name = key[:-1], str(key[-1])
    siblings = _names_at(root, table, data)
    near = difflib.get_close_matches(name, siblings, 1, cutoff=0.7)
    if near:
        return {(*table, near[0])}, f"unknown key; did you mean {near[0]!r}?"
    everywhere = dict(_all_keys(root, ()))
    elsewhere = [path for path, leaf in everywhere.items() if leaf == name]
    if not elsewhere:
        leaves = difflib.get_close_matches(name, set(everywhere.values()), 1, cutoff=0.75)
        elsewhere = [path for path, leaf in everywhere.items() if leaf in leaves]
    if elsewhere:
        return set(elsewhere), f"unknown key; did you mean {_either([repr(dotted(path)) for path in elsewhere])}?"
    # An element of an array of tables is one of those tables.
    shown = table[:-1] if table and isinstance(table[-1], int) else table
    where = f"[{dotted(shown)}]" if table else "a recipe"
    return set(), f"unknown key; {where} has {', '.join(siblings)}" if siblings else "unknown key"


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _names_at(root: type[BaseModel], path: Key, data: Mapping[str, Any]) -> list[str]:
    """Return the keys that the table at `path` may have."""
    annotations: list[Any] = [root]
    for part in path:
        annotations = [inner for annotation in annotations for inner in _step(annotation, part)]
    models = [model for annotation in annotations for model in _models(annotation)]
    tagged = [model for model in models if _has_tags(model, _value_at(data, path))]
    return list(dict.fromkeys(name for model in tagged or models for name in model.model_fields))


def _members(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation allows, unwrapping Annotated and Union."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            yield member


def _step(annotation: Any, part: str | int) -> Iterator[Any]:
    """Yield the annotations of the item `part` of a value with this annotation."""
    for member in _members(annotation):
        arguments = get_args(member)
        if isinstance(member, type) and issubclass(member, BaseModel):
            if part in member.model_fields:
                yield member.model_fields[str(part)].annotation
        elif get_origin(member) is dict:
            yield arguments[1]
        elif get_origin(member) in (list, tuple) and isinstance(part, int):
            is_uniform = get_origin(member) is list or arguments[-1] is Ellipsis
            yield arguments[0 if is_uniform else part]


def _has_tags(model: type[BaseModel], table: Mapping[str, Any]) -> bool:
    """Return whether the literal tags in `table`, which tell union members apart, are those of `model`."""
    literals = {name: field for name, field in model.model_fields.items() if get_origin(field.annotation) is Literal}
    return all(table[name] in get_args(field.annotation) for name, field in literals.items() if name in table)


def _all_keys(model: type[BaseModel], path: Key) -> Iterator[tuple[Key, str]]:
    """Yield every key with a fixed path, with its last name."""
    for name, field in model.model_fields.items():
        yield (*path, name), name
        for inner in _models(field.annotation):
            yield from _all_keys(inner, (*path, name))
