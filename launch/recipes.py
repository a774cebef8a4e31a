"""`longctx recipes`: the bundled recipes in two lines each, what one resolves to, and a copy to edit."""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import typer

from longctx.errors import UserError
from longctx.launch.job_environment import counted
from longctx.launch.verify import BYTE_VOCABULARY
from longctx.model.decoder import count_parameters
from longctx.recipe import Recipe, load
from longctx.recipe.emit import dump
from longctx.recipe.sources import shipped_folder, shipped_recipe
from longctx.train.display import human_count, human_position


def list_recipes() -> None:
    """Print each bundled recipe: its name, size, lengths, ranks and the first sentence of its head comment."""
    files = sorted(shipped_folder().glob("*.toml"), key=lambda file: file.stem)
    width = max(len(file.stem) for file in files)
    for file in files:
        recipe = load(file)
        typer.echo(
            f"{file.stem:{width}}  {human_count(parameters(recipe))} parameters, sequences of {lengths(recipe)} "
            f"tokens, {counted(recipe.fewest_ranks, 'rank')}"
        )
        typer.echo(f"{'':{width}}  {description(file.read_text(encoding='utf-8'))}")
    typer.echo(
        "\nParameters are those with the vocabulary of bytes, unless the recipe has model.vocab_size. Several lengths\n"
        "are those of its stages. Recipes for more than 2 ranks have a small variant for 2 CPU cores:\n"
        "  longctx train NAME --tiny        train it\n"
        "  longctx recipes show NAME        print all its keys, defaults included\n"
        "  longctx recipes copy NAME        write it to NAME.toml, to edit"
    )


def parameters(recipe: Recipe) -> int:
    """Return the number of parameters, with the vocabulary of bytes unless the recipe has `model.vocab_size`."""
    return count_parameters(recipe.model, recipe.model.vocabulary_rows(BYTE_VOCABULARY))


def lengths(recipe: Recipe) -> str:
    """Return the sequence lengths of a recipe's stages: "4Ki, 32Ki and 1Mi"."""
    *others, last = (human_position(stage.recipe.data.sequence_length) for stage in recipe.stages)
    return f"{', '.join(others)} and {last}" if others else last


def show_recipe(source: str, overrides: Sequence[str], *, tiny: bool) -> None:
    """Print a recipe as a run would write it to its directory: what it extends, `[tiny]` if `tiny`, the overrides and
    the defaults resolved. Raises UserError that lists every mistake in it."""
    typer.echo(dump(load(source, overrides, tiny=tiny)), nl=False)


def copy_recipe(name: str, file: Path | None) -> None:
    """Write the text of a bundled recipe, with its comments, to a file (by default NAME.toml in the working directory).

    In a file of another name the copy is called after the file, so that its runs have a directory of their own. Raises
    UserError if there is no such recipe, or if the file exists or cannot be a recipe's.
    """
    text = shipped_recipe(name).read_text(encoding="utf-8")
    file = file or Path(f"{name}.toml")
    if file.suffix != ".toml":
        raise UserError(f"{file}: a recipe's file ends in .toml: {file.with_name(file.name + '.toml')}")
    if not file.parent.is_dir():
        raise UserError(f"{file}: there is no directory {file.parent}; create it first")
    text = text.replace(f'\nname = "{name}"\n', f'\nname = "{file.stem}"\n', 1)
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise UserError(f"{file} exists: name another file, longctx recipes copy {name} FILE.toml") from None
    typer.echo(f"Wrote {file}. Edit it, then: longctx train {file} --check")
    if (base := tomllib.loads(text).get("extends")) is not None:
        typer.echo(f"It extends {base!r}, where the other keys are: longctx recipes show {file} prints all of them.")


def description(text: str) -> str:
    """Return the first sentence of a recipe's head comment; empty without one."""
    comment = " ".join(line.removeprefix("#").strip() for line in _head(text))
    return re.split(r"(?<=\.)\s", comment, maxsplit=1)[0]


def _head(text: str) -> list[str]:
    """Return the lines of the comment's first paragraph."""
    lines = text.splitlines()
    end = next((n for n, line in enumerate(lines) if not line.startswith("# ")), len(lines))
    return lines[:end]
