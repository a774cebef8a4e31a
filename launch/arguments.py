"""Command-line arguments that several commands take, and numbers and files that typer's types do not cover."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from longctx.errors import UserError
from longctx.launch.completion import complete_override, complete_recipe

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Path of a .toml recipe, or name of a bundled one, e.g. quickstart.",
        autocompletion=complete_recipe,
    ),
]
TinyOption = Annotated[bool, typer.Option("--tiny", help="The recipe's tiny variant, its table [tiny].")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Override a recipe key, e.g. train.steps=100.", autocompletion=complete_override
    ),
]


def link_speed(text: str) -> float | None:
    """Return the Gbit/s of `--gbit`; None for `none`. Raises UserError for other text."""
    if text == "none":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise UserError(f"--gbit {text}: expected a speed in Gbit/s, or none")
    return speed


def two_lengths(option: str, text: str) -> tuple[int, int] | None:
    """Return two lengths in increasing order; None for `none`. Raises UserError for other text."""
    if text == "none":
        return None
    lengths = [at_least(1, option, part) for part in text.split(",")]
    if len(lengths) != 2 or lengths[0] >= lengths[1]:
        raise UserError(f"{option} {text}: expected two lengths, the shorter first, such as 16Ki,1Mi, or none")
    return lengths[0], lengths[1]


def at_least(least: int, option: str, text: str) -> int:
    """Return an integer of at least `least`. Raises UserError for other text."""
    number = integer(option, text)
    if number < least:
        raise UserError(f"{option} {text}: expected at least {least}")
    return number


def integer(option: str, text: str) -> int:
    """Return an integer, such as of `64Ki`. Raises UserError for other text."""
    from longctx.config import parse_integer

    try:
        return int(str(parse_integer(text)))
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def check_json_file(file: Path | None) -> None:
    """Raise UserError if `--json FILE` cannot be written, before anything is measured."""
    if file is None:
        return
    if not file.parent.is_dir():
        raise UserError(f"--json {file}: there is no directory {file.parent}; create it first")
    if file.is_dir():
        raise UserError(f"--json {file}: it is a directory; give the name of a file")


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Write the results to `--json FILE`, if it is given."""
    if file is not None:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
