"""Loading of recipes and cluster profiles: from TOML to a validated configuration, or one error with every mistake."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from longctx.errors import UserError
from longctx.recipe.explain import explain_validation_error
from longctx.recipe.lines import Key
from longctx.recipe.sources import COMMAND_LINE, MergedConfig, Mistake, read_merged
from longctx.recipe.stages import override_recipe
from longctx.recipe.tiny import split_tiny

Root = TypeVar("Root", bound=BaseModel)


def read_recipe(source: str | os.PathLike[str], overrides: Sequence[str], *, tiny: bool = False) -> MergedConfig:
    """Read a recipe, its table `[tiny]` if `tiny`, and the `key=value` overrides; see `longctx.recipe.load`.

    Malformed overrides are among the result's `mistakes`, to be reported with the others.
    """
    merged = split_tiny(read_merged(source), tiny=tiny)
    for text in overrides:
        override_recipe(merged, text)
    return merged


def load_as(root: type[Root], source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Root:
    """Read `source` and the `key=value` overrides as a `root`, such as one of a recipe's tables; see `validated`."""
    return validated(root, read_recipe(source, overrides), "recipe")


def validated(root: type[Root], merged: MergedConfig, noun: str, others: Sequence[Mistake] = ()) -> Root:
    """Validate what was read as a `root`. `noun`: what it is, for messages; `others`: mistakes found already.

    Values are validated as JSON: an array may become a tuple and an integer a float, and nothing else is converted
    (`"3"` is not a number and `true` is not an integer). Raises UserError that lists every mistake with its file and
    line.
    """
    result, mistakes = parse(root, merged, noun)
    lines = report(merged, [*mistakes, *others])
    if result is None or lines:
        raise user_error(lines, noun)
    return result


def parse(root: type[Root], merged: MergedConfig, noun: str) -> tuple[Root | None, list[Mistake]]:
    """Validate what was read as a `root`, as `validated` does; return it, None if it is none, and its mistakes."""
    mistakes = [
        Mistake(key, f"a {noun} cannot have dates or times; use quotes if it is text")
        for key in _non_json_keys(merged.data, ())
    ]
    try:
        return root.model_validate_json(json.dumps(merged.data, default=str)), mistakes
    except ValidationError as error:
        return None, mistakes + explain_validation_error(error, root, merged.data)


def _non_json_keys(value: Any, key: Key) -> Iterator[Key]:
    """Yield the keys of values that TOML has and JSON does not (dates and times)."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _non_json_keys(inner, (*key, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _non_json_keys(inner, (*key, index))
    elif not isinstance(value, str | int | float):
        yield key


def valid_tables(root: type[BaseModel], data: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `root` that are valid on their own, even if others are not."""
    tables = {}
    for name, field in root.model_fields.items():
        if name in data:
            annotation: Any = field.annotation
            text = json.dumps(data[name], default=str)
            # Mistakes within a table are already reported; the other tables are still checked.
            with contextlib.suppress(ValidationError):
                tables[name] = TypeAdapter[Any](annotation).validate_json(text)
        elif not field.is_required():
            tables[name] = field.get_default(call_default_factory=True)
    return tables


def report(source: MergedConfig, mistakes: Sequence[Mistake]) -> list[str]:
    """Return a line per mistake, those of a file in its order, then the malformed overrides."""

    def place(mistake: Mistake) -> tuple[bool, str, int]:
        origin = source.origin(mistake.key)
        return origin == COMMAND_LINE, origin.place, origin.line or 0

    return [source.describe(mistake) for mistake in sorted(mistakes, key=place)] + source.mistakes


def user_error(lines: Sequence[str], noun: str) -> UserError:
    """Return the error of these mistakes, at least one, in a `noun`."""
    if len(lines) == 1:
        return UserError(lines[0])
    return UserError(f"{len(lines)} mistakes in the {noun}:\n" + "\n".join(f"  {line}" for line in lines))
