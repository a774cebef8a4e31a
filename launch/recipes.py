"""`longctx recipes`: the recipes that ship with longctx, and the text of one."""

import re

import typer

from longctx.launch.job_environment import counted
from longctx.launch.verify import BYTE_VOCABULARY
from longctx.model.decoder import count_parameters
from longctx.recipe import load
from longctx.recipe.sources import shipped_folder, shipped_recipe
from longctx.train.display import human_count, human_position


def list_recipes() -> None:
    """Print each shipped recipe: its name, size and a sentence of its head comment."""
    files = sorted(shipped_folder().glob("*.toml"))
    width = max(len(file.stem) for file in files)
    for file in files:
        recipe = load(file)
        parameters = count_parameters(recipe.model, recipe.model.vocabulary_rows(BYTE_VOCABULARY))
        typer.echo(
            f"{file.stem:{width}}  {human_count(parameters)} parameters, sequences of "
            f"{human_position(recipe.data.sequence_length)} tokens, {counted(recipe.parallel.fewest_ranks, 'rank')}"
        )
        typer.echo(f"{'':{width}}  {description(file.read_text(encoding='utf-8'))}")
    typer.echo(
        "\nParameters are those with the vocabulary of bytes, unless the recipe has model.vocab_size.\n"
        'Print a recipe: longctx recipes NAME. Build on it: extends = "NAME" in a recipe of your own.'
    )


def show_recipe(name: str) -> None:
    """Print the text of a shipped recipe. Raises UserError if there is none of that name."""
    typer.echo(shipped_recipe(name).read_text(encoding="utf-8"), nl=False)


def description(text: str) -> str:
    """Return the first sentence of a recipe's head comment; empty without one."""
    comment = " ".join(line.removeprefix("#").strip() for line in _head(text))
    return re.split(r"(?<=\.)\s", comment, maxsplit=1)[0]


def _head(text: str) -> list[str]:
    """Return the lines of the comment's first paragraph."""
    lines = text.splitlines()
    end = next((n for n, line in enumerate(lines) if not line.startswith("# ")), len(lines))
    return lines[:end]
