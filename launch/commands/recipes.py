"""Arguments of `longctx recipes`."""

from pathlib import Path
from typing import Annotated

import typer

from longctx.launch.arguments import OverridesArgument, RecipeArgument, TinyOption
from longctx.launch.completion import complete_shipped

_EXAMPLES = """Examples:
  longctx recipes                                    the bundled recipes
  longctx recipes copy linear-llama3-1b my.toml      a file of your own to edit
  longctx recipes show my.toml --tiny                all keys of its tiny variant"""

app = typer.Typer(help="List the bundled recipes, show or copy one.", epilog=_EXAMPLES)


@app.callback(invoke_without_command=True)
def _recipes(context: typer.Context) -> None:
    """List the bundled recipes: size, sequence lengths of the stages, ranks they are laid out for, what they train."""
    if context.invoked_subcommand is not None:
        return
    from longctx.launch.recipes import list_recipes

    list_recipes()


@app.command("show")
def _show(recipe: RecipeArgument, overrides: OverridesArgument = None, tiny: TinyOption = False) -> None:
    """Print a recipe with everything resolved: what it extends, overrides, defaults."""
    from longctx.launch.recipes import show_recipe

    show_recipe(recipe, overrides or (), tiny=tiny)


@app.command("copy")
def _copy(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of a bundled recipe.", autocompletion=complete_shipped)
    ],
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", show_default="NAME.toml", help="File to write; must not exist.")
    ] = None,
) -> None:
    """Write a bundled recipe, with its comments, to a file of your own to edit."""
    from longctx.launch.recipes import copy_recipe

    copy_recipe(name, file)
