"""Arguments of `longctx data`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from longctx.launch.arguments import integer
from longctx.launch.terminal import echo

_WIDE = 10_000

app = typer.Typer(no_args_is_help=True, help="Prepare and inspect training data.")


@app.command("prepare")
def _prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="Text, .jsonl or .parquet files, or folders of them; hf://datasets/OWNER/NAME/PATH, s3://….",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Output directory; must not exist, except with --overwrite.")
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="bytes|FILE|OWNER/NAME", help="Byte-level, a tokenizer.json, or one of the Hugging Face Hub."
        ),
    ] = "bytes",
    eos: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="End-of-document token, if it is not detected.")
    ] = None,
    join: Annotated[
        Literal["none", "folder"], typer.Option(help="folder: concatenate each input folder into one document.")
    ] = "none",
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="Stop at an invalid file, line or row, or skip it.")
    ] = "stop",
    column: Annotated[str, typer.Option(metavar="NAME", help="Text field of JSON lines and Parquet.")] = "text",
    suffix: Annotated[
        list[str] | None, typer.Option(metavar=".EXT", help="Read only these files of a folder. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Skip files and subfolders of this name. Repeatable.")
    ] = None,
    heldout: Annotated[
        float, typer.Option(metavar="FRACTION", help="Fraction of documents held out for evaluation.")
    ] = 0.02,
    shard_tokens: Annotated[str, typer.Option(metavar="N", help="Tokens per shard.")] = "128Mi",
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", show_default="one per core; 1 for bytes", help="Tokenisation processes."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing corpus.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Tokenise text into a training corpus."""
    from longctx.data.manifest import ERRORS_FILE
    from longctx.data.prepare import prepare

    manifest = prepare(
        inputs,
        out,
        tokenizer=tokenizer,
        eos=eos,
        join=join,
        on_error=on_error,
        column=column,
        suffixes=suffix or (),
        exclude=exclude or (),
        heldout=heldout,
        shard_tokens=integer("--shard-tokens", shard_tokens),
        workers=workers,
        overwrite=overwrite,
        progress=progress,
    )
    splits = ", ".join(
        f"{name} {split.documents:,} documents ({split.tokens:,} tokens)" for name, split in manifest.splits.items()
    )
    if manifest.errors:
        skipped = ", ".join(f"{count:,} {kind}" for kind, count in manifest.errors.items())
        echo(f"Skipped: {skipped}; listed in {out / ERRORS_FILE}.")
    echo(f"{out}: {splits}. Inspect it with: longctx data inspect {out}")


@app.command("inspect")
def _inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Corpus written by longctx data prepare.")],
    verify: Annotated[bool, typer.Option("--verify", help="Verify the checksum of every shard.")] = False,
) -> None:
    """Show a corpus: document counts, lengths, sources, a sample."""
    from rich.console import Console

    from longctx.data.inspect import inspect

    report, console = inspect(directory, verify=verify), Console()
    if console.is_terminal:
        console.print(report)
    else:  # a line stays one, to be searched and cut; the width is that of tables, which do not wrap softly
        Console(width=_WIDE).print(report, soft_wrap=True)
