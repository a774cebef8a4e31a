"""Arguments of `longctx checkpoint`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Check checkpoints.")


@app.command("verify")
def _verify(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="Checkpoint, run directory (all its checkpoints), or the output of longctx convert."
        ),
    ],
) -> None:
    """Compare the content of every file with its checksum.

    Exit status 1 if a file is missing or has changed since it was written, or if there are no checksums.
    """
    from longctx.launch.checkpoint import run_verify

    raise typer.Exit(run_verify(path))
