"""From the text of a recipe to its configuration, or to one error that names everything wrong with it."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from longctx.errors import UserError
from longctx.recipe.checks import judge
from longctx.recipe.explain import explain
from longctx.recipe.lines import Key
from longctx.recipe.sources import COMMAND_LINE, Mistake, Source, read

Root = TypeVar("Root", bound=BaseModel)


def load_as(root: type[Root], source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Root:
    """Read `source` and the `key=value` overrides as a `root`; see `longctx.recipe.load`.

    The values are validated as JSON, where an array may become a tuple and an integer a number, and nothing else is
    converted: `"3"` is no number and `true` no integer.
    """
    merged = read(source, overrides)
    mistakes = [
        Mistake(key, "a recipe holds no dates or times; put it in quotes if it is text")
        for key in _foreign(merged.data, ())
    ]
    result: Root | None = None
    try:
        result = root.model_validate_json(json.dumps(merged.data, default=str))
    except ValidationError as error:
        mistakes += explain(error, root, merged.data)
    mistakes += judge(_tables(root, merged.data), None)
    if result is None or mistakes or merged.mistakes:
        raise UserError(_report(merged, mistakes))
    return result


def _foreign(value: Any, key: Key) -> Iterator[Key]:
    """The keys whose values TOML has and JSON has not."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _foreign(inner, (*key, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _foreign(inner, (*key, index))
    elif not isinstance(value, str | int | float):
        yield key


def _tables(root: type[BaseModel], data: dict[str, Any]) -> dict[str, Any]:
    """Those fields of `root` that are right by themselves, whether or not the whole is."""
    tables = {}
    for name, field in root.model_fields.items():
        if name in data:
            annotation: Any = field.annotation
            text = json.dumps(data[name], default=str)
            # What is wrong in a table has been explained by then; the others are still worth judging.
            with contextlib.suppress(ValidationError):
                tables[name] = TypeAdapter[Any](annotation).validate_json(text)
        elif not field.is_required():
            tables[name] = field.get_default(call_default_factory=True)
    return tables


def _report(source: Source, mistakes: list[Mistake]) -> str:
    def place(mistake: Mistake) -> tuple[bool, str, int]:
        origin = source.origin(mistake.key)
        return origin == COMMAND_LINE, origin.place, origin.line or 0

    lines = [source.describe(mistake) for mistake in sorted(mistakes, key=place)] + source.mistakes
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} mistakes in the recipe:\n" + "\n".join(f"  {line}" for line in lines)
