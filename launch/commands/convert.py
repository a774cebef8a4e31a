"""Arguments of `longctx convert`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from longctx.launch.arguments import at_least

app = typer.Typer(no_args_is_help=True, help="Convert weights between models and formats.")


@app.command("upcycle")
def _upcycle(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE|KEY=VALUE",
            help="Dense models of one shape: checkpoints, or run directories (latest checkpoint). "
            "KEY=VALUE overrides the recipe.",
        ),
    ],
    to: Annotated[str, typer.Option(metavar="RECIPE", help="Recipe of the MoE model.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory; must not exist.")],
) -> None:
    """Upcycle trained dense models to a mixture of experts.

    With N sources, expert e is a copy of the feed-forward of source e mod N. Expert routers are random, head routers
    zero; other parameters are averaged over the sources. Start a run from the result with train.init=DIR.
    """
    from longctx.launch.convert import run_upcycle

    raise typer.Exit(run_upcycle(arguments, to, out))


@app.command("from-huggingface")
def _from_huggingface(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE|KEY=VALUE",
            help="Folder with config.json and safetensors files. KEY=VALUE sets training options of experts, "
            "model.moe.{balance,z,jitter,capacity}, which config.json lacks.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory; must not exist.")],
) -> None:
    """Import a Hugging Face transformers model.

    Writes weights, and model.toml for a recipe to extend. Start a run from them with train.init=DIR.
    """
    from longctx.launch.convert import run_from_huggingface

    raise typer.Exit(run_from_huggingface(arguments, out))


@app.command("to-huggingface")
def _to_huggingface(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="Checkpoint, run directory (latest checkpoint), or converted weights."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory; must not exist.")],
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Dtype of the stored weights.")] = "fp32",
    shard_size: Annotated[str, typer.Option(metavar="BYTES", help="Maximum file size, e.g. 5GB or 500MiB.")] = "5GB",
) -> None:
    """Export a model to Hugging Face transformers (safetensors)."""
    from longctx.launch.convert import run_to_huggingface

    most = at_least(1, "--shard-size", shard_size.strip().removesuffix("B"))
    raise typer.Exit(run_to_huggingface(source, out, dtype, most))


@app.command("from-megatron")
def _from_megatron(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE [KEY=VALUE ...]",
            help="Megatron-Core checkpoint in torch_dist format, the checkpoint directory of its training script, or "
            "the directory of a run with engine = 'megatron'. KEY=VALUE overrides the recipe.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory; must not exist.")],
    to: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Recipe of the model; not needed for a run with engine = 'megatron'."),
    ] = None,
) -> None:
    """Import a Megatron-Core checkpoint.

    Writes weights of the built-in model. Start a run from them with train.init=DIR.
    """
    from longctx.launch.convert import run_from_megatron

    raise typer.Exit(run_from_megatron(arguments, to, out))


@app.command("to-megatron")
def _to_megatron(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="Checkpoint, run directory (latest checkpoint), or converted weights."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory; must not exist.")],
) -> None:
    """Export a model to a Megatron-Core checkpoint.

    Load it into Megatron's training script with --load DIR --finetune. Softmax layers become Megatron's own attention;
    other mixers use longctx.adapters.megatron.specs.
    """
    from longctx.launch.convert import run_to_megatron

    raise typer.Exit(run_to_megatron(source, out))
