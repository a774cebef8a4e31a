"""Completion of command lines: names of shipped recipes and keys of recipes.

Shells call the command at each Tab: nothing here imports torch or the schema (4 seconds). The keys are in a file that
`make docs` generates.
"""

import importlib.resources
from pathlib import Path

_RECIPES = importlib.resources.files("longctx.recipes")
KEYS = "keys.txt"


def complete_recipe(incomplete: str) -> list[str]:
    """Return shipped recipes, and recipes in the working directory, whose names begin so.

    Without one, as for a path in another directory, shells complete the names of files.
    """
    shipped = [entry.name.removesuffix(".toml") for entry in _RECIPES.iterdir() if entry.name.endswith(".toml")]
    here = [path.name for path in Path().glob("*.toml")]
    return sorted(name for name in (*shipped, *here) if name.startswith(incomplete))


def complete_shipped(incomplete: str) -> list[str]:
    """Return shipped recipes whose names begin so."""
    return [name for name in complete_recipe(incomplete) if not name.endswith(".toml")]


def complete_override(incomplete: str) -> list[tuple[str, str]]:
    """Return `key=` for the keys of a recipe that begin so, each with the first sentence of its explanation."""
    lines = (_RECIPES / KEYS).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("\t") for line in lines)
    return [(f"{key}=", text) for key, text in pairs if f"{key}=".startswith(incomplete)]
