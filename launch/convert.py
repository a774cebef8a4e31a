"""`longctx convert`: weights of one model from those of others."""

import re
from collections.abc import Sequence
from pathlib import Path

from longctx.convert.upcycle import upcycle
from longctx.launch.terminal import say
from longctx.recipe import load

_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=.*", re.DOTALL)


def split_arguments(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Which arguments are paths and which are `key=value`; a path with an equals sign is told by a `/` before it."""
    overrides = [argument for argument in arguments if _OVERRIDE.fullmatch(argument)]
    return [Path(argument) for argument in arguments if argument not in overrides], overrides


def run_upcycle(arguments: Sequence[str], recipe: str, out: Path) -> int:
    """Make the model of a recipe of dense sources; the exit status. Raises UserError for what the user can mend."""
    sources, overrides = split_arguments(arguments)
    done = upcycle(sources, load(recipe, overrides), out)
    say(f"{out}: {done.parameters:,} parameters, made of {', '.join(map(str, done.sources))}")
    for note in done.notes:
        say(note)
    say(f"To begin a run with it: train.init={out}")
    return 0
