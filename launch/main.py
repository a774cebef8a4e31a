"""Command line of `longctx`.

Commands import their dependencies when they run, so that `longctx --help` is fast.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import longctx
from longctx.errors import UserError
from longctx.files import path_errors
from longctx.launch.arguments import at_least, integer, link_speed, two_lengths
from longctx.launch.terminal import echo, echo_error


class _Commands(TyperGroup):
    """Runs a command; a UserError becomes its message and exit status 2, Ctrl-C becomes exit status 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with path_errors():
                return super().invoke(ctx)
        except UserError as error:
            # In a job every rank raises it. One message per machine, not per job: the problem may be only on this
            # machine.
            if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
                echo_error(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    name="longctx",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare and inspect training data.")
app.add_typer(data_app, name="data")
bench_app = typer.Typer(no_args_is_help=True, help="Benchmark kernels and sequence-parallel layers.")
app.add_typer(bench_app, name="bench")
convert_app = typer.Typer(no_args_is_help=True, help="Convert weights between models and formats.")
app.add_typer(convert_app, name="convert")
checkpoint_app = typer.Typer(no_args_is_help=True, help="Check checkpoints.")
app.add_typer(checkpoint_app, name="checkpoint")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longctx {longctx.__version__}")
        raise typer.Exit


@app.callback(help=longctx.__doc__)
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Define the options before the command."""


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Path of a .toml recipe, or name of a bundled one, e.g. quickstart.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Override a recipe key, e.g. train.steps=100.")
]


@app.command("train")
def _train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", show_default="one per GPU, or 1", help="Number of ranks on this machine."),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: from the run's latest checkpoint, if any; never: from step 0, an error if the run has "
            "checkpoints; PATH: from this checkpoint.",
        ),
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", show_default="runs/<name>", help="Run directory: checkpoints, metrics, plots, logs."
        ),
    ] = None,
) -> None:
    """Train a model from a recipe.

    Starts one process per rank on this machine. Under torchrun, or if a cluster sets RANK, WORLD_SIZE and
    MASTER_ADDR, the process runs as one rank of that job. Ctrl-C and SIGTERM save a checkpoint before exiting.
    """
    from longctx.launch.train import train

    raise typer.Exit(train(recipe, overrides or (), nproc=nproc, resume=resume, out=out))


@app.command("verify")
def _verify(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Use a narrow model with the same layer types and a short sequence.")
    ] = False,
    ranks: Annotated[int, typer.Option(min=2, metavar="N", help="Maximum number of ranks, on this machine.")] = 4,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Time limit per step.")] = 600.0,
) -> None:
    """Verify that a recipe computes the same on N ranks as on one.

    Compares loss, logits and every parameter's gradient in each parallel configuration with those on a single rank, and
    these with the equations of the model.
    Exit status 1 if a difference is out of bounds.
    """
    from longctx.launch.verify import run

    raise typer.Exit(run(recipe, overrides or (), shrunk=shrink, ranks=ranks, timeout=timeout))


@app.command("generate")
def _generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, e.g. runs/quickstart.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Override checkpoint.verify, data.path, train.device or train.precision."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Read the prompt from a file.")] = None,
    tokens: Annotated[str, typer.Option(metavar="N", help="Maximum number of tokens to generate.")] = "256",
    temperature: Annotated[float, typer.Option(metavar="X", help="Sampling temperature; 0 is greedy.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", show_default="all", help="Sample from the N most probable tokens.")
    ] = None,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Nucleus sampling: cumulative probability of the kept tokens.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed of sampling.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="PATH", show_default="latest of the run", help="Checkpoint to load.")
    ] = None,
) -> None:
    """Generate text from a trained model.

    Continues a prompt from the run's latest checkpoint, in one process, on a GPU if there is one. Streams the text to
    stdout, up to the end-of-document token.
    """
    from longctx.generate import Sampling
    from longctx.launch.generate import run as generate

    sampling = Sampling(temperature, top_k, top_p, seed)
    count = at_least(1, "--tokens", tokens)
    raise typer.Exit(
        generate(
            run,
            overrides or (),
            prompt=prompt,
            prompt_file=prompt_file,
            count=count,
            sampling=sampling,
            checkpoint=checkpoint,
        )
    )


@data_app.command("prepare")
def _data_prepare(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="Text, .jsonl or .parquet files, or folders of them.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Output directory; must not exist, except with --overwrite.")
    ],
    tokenizer: Annotated[
        str, typer.Option(metavar="bytes|FILE", help="Byte-level, or the path of a tokenizer.json.")
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


@data_app.command("inspect")
def _data_inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Corpus written by longctx data prepare.")],
    verify: Annotated[bool, typer.Option("--verify", help="Verify the checksum of every shard.")] = False,
) -> None:
    """Show a corpus: document counts, lengths, sources, a sample."""
    from rich.console import Console

    from longctx.data.inspect import inspect

    Console().print(inspect(directory, verify=verify))


@bench_app.command("kernels")
def _bench_kernels(
    tokens: Annotated[str, typer.Option(metavar="N", help="Sequence length in tokens.")] = "64Ki",
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Number of heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, metavar="N", help="Head dimension.")] = 128,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Dtype of the inputs.")] = "float32",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", show_default="torch's default", help="CPU threads.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Maximum timed runs; the median is reported.")] = 5,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Measure only this kernel, e.g. lightning. Repeatable.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="Also measure peer libraries, on the same inputs.")] = True,
    peer_seconds: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Skip a peer whose run takes longer than this.")
    ] = 180.0,
    scaling: Annotated[
        str, typer.Option(metavar="N,N|none", help="Compare throughput at these two sequence lengths.")
    ] = "16Ki,1Mi",
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all results as JSON.")] = None,
) -> None:
    """Benchmark kernels against peer libraries and the machine's limits.

    Reports time, tokens per second, FLOP/s and peak memory, forward and forward+backward. Takes minutes per kernel at
    the default size. Exit status 1 if a peer's results differ.
    """
    from longctx.bench.run import KernelOptions
    from longctx.launch.bench import bench_kernels, select_kernels

    options = KernelOptions(
        tokens=at_least(1, "--tokens", tokens),
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        threads=threads,
        repeats=repeats,
        kernels=select_kernels(only or ()),
        peers=peers,
        peer_seconds=peer_seconds,
        scaling=two_lengths("--scaling", scaling),
    )
    raise typer.Exit(bench_kernels(options, json))


@bench_app.command("parallel")
def _bench_parallel(
    ranks: Annotated[int, typer.Option(min=2, metavar="N", help="Number of ranks, on this machine.")] = 4,
    lengths: Annotated[str, typer.Option(metavar="N,...", help="Sequence lengths in tokens.")] = "4Ki,16Ki,64Ki",
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Measure only this method, e.g. lasp2. Repeatable.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Query heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(min=1, metavar="N", help="Key/value heads of softmax layers.")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, metavar="N", help="Head dimension.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Timed runs; the median is reported.")] = 3,
    softmax_tokens: Annotated[
        str, typer.Option(metavar="N", help="Maximum sequence length for softmax layers.")
    ] = "64Ki",
    gbit: Annotated[
        str, typer.Option(metavar="X|none", help="Emulate a network with links of X Gbit/s (Linux, root).")
    ] = "1",
    delay: Annotated[float, typer.Option(min=0, metavar="MS", help="One-way latency of the emulated links.")] = 0.0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all results as JSON.")] = None,
) -> None:
    """Benchmark a sequence-parallel layer: time, communication wait, bytes received.

    By default each rank runs in its own network namespace, joined by a bridge, which emulates a network of hosts. With
    --gbit none, ranks communicate through shared memory, or through NCCL if there is a GPU for each.
    """
    from longctx.launch.bench_parallel import ParallelOptions, bench_parallel, select_methods

    options = ParallelOptions(
        ranks=ranks,
        lengths=tuple(at_least(1, "--lengths", part) for part in lengths.split(",")),
        methods=select_methods(only or ()),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        repeats=repeats,
        softmax_tokens=at_least(0, "--softmax-tokens", softmax_tokens),
        gbit=link_speed(gbit),
        delay=delay,
    )
    raise typer.Exit(bench_parallel(options, json))


@convert_app.command("upcycle")
def _convert_upcycle(
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


@convert_app.command("from-huggingface")
def _convert_from_huggingface(
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


@convert_app.command("to-huggingface")
def _convert_to_huggingface(
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


@convert_app.command("from-megatron")
def _convert_from_megatron(
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


@convert_app.command("to-megatron")
def _convert_to_megatron(
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


@checkpoint_app.command("verify")
def _checkpoint_verify(
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


def main() -> None:
    """Run the console script. Exit status: 1 for a failure, 2 for a user error, 128 + the signal that stopped a run."""
    try:
        app(prog_name="longctx")
    except SystemExit as end:
        if "RANK" not in os.environ or not isinstance(end.code, int):
            raise
        from longctx.launch.rank import exit_rank

        exit_rank(end.code)
