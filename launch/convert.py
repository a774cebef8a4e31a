"""`longctx convert`: upcycling, and import and export of weights."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from longctx.convert.upcycle import upcycle
from longctx.errors import UserError
from longctx.launch.terminal import echo
from longctx.recipe import load

_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=.*", re.DOTALL)


def split_arguments(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Split arguments into paths and `key=value` overrides; a path that contains `=` needs a `/` before it."""
    overrides = [argument for argument in arguments if _OVERRIDE.fullmatch(argument)]
    return [Path(argument) for argument in arguments if argument not in overrides], overrides


def run_upcycle(arguments: Sequence[str], recipe: str, out: Path) -> int:
    """Upcycle dense sources to a recipe's model; return the exit status. Raises UserError for user errors."""
    sources, overrides = split_arguments(arguments)
    done = upcycle(sources, load(recipe, overrides), out)
    echo(f"{out}: {done.parameters:,} parameters, upcycled from {', '.join(map(str, done.sources))}")
    for note in done.notes:
        echo(note)
    echo(f"To start a run from it: train.init={out}")
    return 0


def run_from_huggingface(arguments: Sequence[str], out: Path) -> int:
    """Import a transformers model; return the exit status. Raises UserError for user errors."""
    from longctx.convert.huggingface import RECIPE, from_huggingface

    sources, overrides = split_arguments(arguments)
    if len(sources) != 1:
        raise UserError(f"give one SOURCE, the folder of a model, not {len(sources)}")
    source = sources[0]
    done = from_huggingface(source, out, overrides)
    echo(f"{out}: {done.parameters:,} parameters of a {done.model_type} model, from {_files(done.files)} in {source}")
    echo(f'To start a run from it: extends = "{out / RECIPE}" in a recipe, and train.init={out}')
    tokenizer = source / "tokenizer.json"
    if tokenizer.is_file():
        echo(f"To prepare text with its tokenizer: longctx data prepare INPUT --tokenizer {tokenizer} --out DIR")
    return 0


def run_to_huggingface(source: Path, out: Path, dtype: Literal["fp32", "bf16"], shard_size: int) -> int:
    """Export a model to transformers; return the exit status. Raises UserError for user errors."""
    from longctx.convert.huggingface import to_huggingface

    done = to_huggingface(source, out, dtype, shard_size)
    echo(
        f"{out}: {done.parameters:,} parameters of {done.source}, as a {done.model_type} model in {_files(done.files)}"
    )
    return 0


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def run_from_megatron(arguments: Sequence[str], recipe: str | None, out: Path) -> int:
    """Import a Megatron-Core checkpoint; return the exit status. Raises UserError for user errors."""
    from longctx.convert.megatron import from_megatron

    sources, overrides = split_arguments(arguments)
    if len(sources) != 1:
        raise UserError("give one SOURCE: a Megatron-Core checkpoint")
    if overrides and recipe is None:
        raise UserError(f"{overrides[0]} overrides a recipe: give one with --to RECIPE")
    done = from_megatron(sources[0], None if recipe is None else load(recipe, overrides).model, out)
    echo(f"{out}: {done.parameters:,} parameters of {done.source}")
    echo(f"To start a run from it: train.init={out}")
    return 0


def run_to_megatron(source: Path, out: Path) -> int:
    """Export weights to a Megatron-Core checkpoint; return the exit status. Raises UserError for user errors."""
    from longctx.convert.megatron import to_megatron
    from longctx.convert.megatron_script import SPEC, script_arguments, script_spec

    done = to_megatron(source, out)
    echo(f"{out}: {done.parameters:,} parameters of {done.source}")
    echo(f"To start Megatron's training script from it: --load {out} --finetune {script_arguments(done.model)}")
    echo(f"with --spec my_specs {SPEC}, where my_specs.py is")
    echo("".join(f"\n    {line}" for line in script_spec(done.model).splitlines()) + "\n")
    return 0
