"""`longctx`: the command line.

Commands import what they need when they run, so that `longctx --help` is there at once.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import longctx
from longctx.errors import UserError
from longctx.launch.terminal import echo, echo_error


class _Commands(TyperGroup):
    """Runs a command; a UserError becomes its message and exit status 2, Ctrl-C exit status 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            # In a job every rank raises it; one message for each machine is enough, and this one may be the only
            # machine where something is missing.
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
data_app = typer.Typer(no_args_is_help=True, help="Prepare text for training, and look at what was prepared.")
app.add_typer(data_app, name="data")
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed and memory on this machine.")
app.add_typer(bench_app, name="bench")
convert_app = typer.Typer(no_args_is_help=True, help="Make the weights of one model of those of others.")
app.add_typer(convert_app, name="convert")


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
    """The options that stand before a command."""


@app.command("train")
def _train(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A file that ends in .toml, or the name of a recipe that is shipped."),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as train.steps=100.")] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", show_default="one for each GPU, or 1", help="Ranks on this machine."),
    ] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="Continue from the newest, from no, or from this checkpoint.")
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", show_default="runs/<name>", help="The run's directory.")
    ] = None,
) -> None:
    """Train a recipe.

    Starts its ranks itself; inside torchrun, or where a cluster has set RANK, WORLD_SIZE and MASTER_ADDR, it is one of
    them. Ctrl-C or SIGTERM saves a checkpoint first.
    """
    from longctx.launch.train import train

    raise typer.Exit(train(recipe, overrides or (), nproc=nproc, resume=resume, out=out))


@app.command("verify")
def _verify(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="As for train.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As for train.")] = None,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="A narrow model, one pattern deep, on a short sequence: seconds.")
    ] = False,
    ranks: Annotated[int, typer.Option(min=2, metavar="N", help="The most ranks on this machine.")] = 4,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long one step may take.")] = 600.0,
) -> None:
    """Show that a recipe computes the same on N ranks as on one.

    Loss, logits and every parameter's gradient on each layout that fits, against one rank; exit status 1 where a
    difference is out of bounds.
    """
    from longctx.launch.verify import run

    raise typer.Exit(run(recipe, overrides or (), shrunk=shrink, ranks=ranks, timeout=timeout))


@app.command("generate")
def _generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, such as runs/quickstart.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as data.path=DIR or train.device=cpu.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What the text begins with.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The same, from a file.")] = None,
    tokens: Annotated[str, typer.Option(metavar="N", help="The most tokens to generate.")] = "256",
    temperature: Annotated[float, typer.Option(metavar="X", help="0: the most probable token each time.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", show_default="all", help="Draw from the N most probable tokens.")
    ] = None,
    top_p: Annotated[float, typer.Option(metavar="X", help="Draw from the most probable tokens of this share.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same text.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="PATH", show_default="the newest of the run", help="A checkpoint.")
    ] = None,
) -> None:
    """Let a trained model go on from a prompt.

    In one process, on a GPU where there is one. Text comes as it is generated, up to the model's end of the document.
    """
    from longctx.generate import Sampling
    from longctx.launch.generate import run as generate

    sampling = Sampling(temperature, top_k, top_p, seed)
    count = _at_least(1, "--tokens", tokens)
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
        list[str], typer.Argument(metavar="INPUT", help="Text files, .jsonl, .parquet, or folders of them.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The corpus to write; it must not exist yet.")],
    tokenizer: Annotated[str, typer.Option(metavar="bytes|FILE", help="Bytes, or a tokenizer.json.")] = "bytes",
    eos: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="The tokenizer's end of document, where it cannot be found.")
    ] = None,
    join: Annotated[
        Literal["none", "folder"], typer.Option(help="folder: one document of each input that is a folder.")
    ] = "none",
    on_error: Annotated[Literal["stop", "skip"], typer.Option(help="What a bad file, line or row does.")] = "stop",
    column: Annotated[str, typer.Option(metavar="NAME", help="Where JSON lines and Parquet have the text.")] = "text",
    suffix: Annotated[
        list[str] | None, typer.Option(metavar=".EXT", help="Take these files of a folder alone. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave out what has this name in a folder. Repeatable.")
    ] = None,
    heldout: Annotated[float, typer.Option(metavar="SHARE", help="The share of documents kept for evaluation.")] = 0.02,
    shard_tokens: Annotated[str, typer.Option(metavar="N", help="Tokens in a shard.")] = "128Mi",
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", show_default="one for each core", help="Tokenising processes; bytes need one."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a corpus that is there.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Tokenise text into a corpus that recipes can train on."""
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
        shard_tokens=_integer("--shard-tokens", shard_tokens),
        workers=workers,
        overwrite=overwrite,
        progress=progress,
    )
    splits = ", ".join(
        f"{name} {split.documents:,} documents of {split.tokens:,} tokens" for name, split in manifest.splits.items()
    )
    if manifest.errors:
        skipped = ", ".join(f"{count:,} {kind}" for kind, count in manifest.errors.items())
        echo(f"Skipped: {skipped}; {out / ERRORS_FILE} names each.")
    echo(f"{out}: {splits}. To look at it: longctx data inspect {out}")


@data_app.command("inspect")
def _data_inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `longctx data prepare` wrote.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every shard with its checksum.")] = False,
) -> None:
    """Show what a corpus holds: counts, lengths, sources, a sample."""
    from rich.console import Console

    from longctx.data.inspect import inspect

    Console().print(inspect(directory, verify=verify))


@bench_app.command("kernels")
def _bench_kernels(
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens of the sequence.")] = "64Ki",
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Heads of queries, keys and values.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, metavar="N", help="Channels of a head.")] = 128,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of queries, keys and values.")] = "float32",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to measure.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", show_default="torch's choice", help="Threads on the CPU.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="The most runs of which the median is taken.")] = 5,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Measure this kernel. Repeatable.")] = None,
    peers: Annotated[bool, typer.Option(help="Measure what others offer, on the same inputs.")] = True,
    peer_seconds: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Leave out a peer that takes longer for one run.")
    ] = 180.0,
    scaling: Annotated[
        str, typer.Option(metavar="N,N|none", help="The lengths between which tokens per second are compared.")
    ] = "16Ki,1Mi",
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything that was measured.")] = None,
) -> None:
    """Measure the kernels beside their peers and beside what the machine can do.

    Forward, and forward and backward: seconds, tokens per second, necessary FLOPs a second, peak memory. Minutes for
    each kernel at the default size. Exit status 1 where a peer does not compute the same.
    """
    from longctx.bench.run import Options
    from longctx.launch.bench import bench_kernels, chosen

    options = Options(
        tokens=_at_least(1, "--tokens", tokens),
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        threads=threads,
        repeats=repeats,
        kernels=chosen(only or ()),
        peers=peers,
        peer_seconds=peer_seconds,
        scaling=_two_lengths("--scaling", scaling),
    )
    raise typer.Exit(bench_kernels(options, json))


@bench_app.command("parallel")
def _bench_parallel(
    ranks: Annotated[int, typer.Option(min=2, metavar="N", help="Ranks, as processes of this machine.")] = 4,
    lengths: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens of the sequence, one after the other.")
    ] = "4Ki,16Ki,64Ki",
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Measure this method. Repeatable.")] = None,
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Query heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(min=1, metavar="N", help="Key/value heads of softmax layers.")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, metavar="N", help="Channels of a head.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Runs of which the median is taken.")] = 3,
    softmax_tokens: Annotated[
        str, typer.Option(metavar="N", help="The longest sequence that softmax layers are measured on.")
    ] = "64Ki",
    gbit: Annotated[
        str, typer.Option(metavar="X|none", help="Give each rank a host with a link of so many Gbit/s (Linux, root).")
    ] = "1",
    delay: Annotated[float, typer.Option(min=0, metavar="MS", help="Milliseconds that a packet takes.")] = 0.0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything that was measured.")] = None,
) -> None:
    """Measure one layer over several ranks: time, waiting, bytes beside the formula's.

    The ranks are hosts in network namespaces, joined by a bridge over links of a given speed; with --gbit none they
    reach each other through memory or, where there is a GPU for each of them, by NCCL.
    """
    from longctx.launch.bench_parallel import Options, bench_parallel, chosen

    options = Options(
        ranks=ranks,
        lengths=tuple(_at_least(1, "--lengths", part) for part in lengths.split(",")),
        methods=chosen(only or ()),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        repeats=repeats,
        softmax_tokens=_at_least(0, "--softmax-tokens", softmax_tokens),
        gbit=_link_speed(gbit),
        delay=delay,
    )
    raise typer.Exit(bench_parallel(options, json))


@convert_app.command("upcycle")
def _convert_upcycle(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE|KEY=VALUE",
            help="Dense models of one shape: checkpoints, or runs' directories, whose newest ones are taken. "
            "KEY=VALUE as for train.",
        ),
    ],
    to: Annotated[str, typer.Option(metavar="RECIPE", help="The recipe whose model is made, as for train.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The directory to write; it must not exist yet.")],
) -> None:
    """Make a mixture of experts of trained dense models.

    Expert e is the feed-forward of source e mod N; routers are drawn; all else is the sources' mean.
    A run begins with it by train.init=DIR.
    """
    from longctx.launch.convert import run_upcycle

    raise typer.Exit(run_upcycle(arguments, to, out))


@convert_app.command("from-huggingface")
def _convert_from_huggingface(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE|KEY=VALUE",
            help="A folder with config.json and safetensors files, sharded or not. KEY=VALUE for how experts are "
            "trained: model.moe.balance, z, jitter, capacity.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The directory to write; it must not exist yet.")],
) -> None:
    """Make the built-in model of a model of transformers.

    Writes its weights, and model.toml for a recipe to extend; a run begins with them by train.init=DIR.
    """
    from longctx.launch.convert import run_from_huggingface

    raise typer.Exit(run_from_huggingface(arguments, out))


@convert_app.command("to-huggingface")
def _convert_to_huggingface(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A checkpoint, a run's directory, whose newest one is taken, or converted weights."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The directory to write; it must not exist yet.")],
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="What weights are stored in.")] = "fp32",
    shard_size: Annotated[
        str, typer.Option(metavar="BYTES", help="The most bytes in a file, such as 5GB or 500MiB.")
    ] = "5GB",
) -> None:
    """Write a model that transformers loads, as safetensors."""
    from longctx.launch.convert import run_to_huggingface

    most = _at_least(1, "--shard-size", shard_size.strip().removesuffix("B"))
    raise typer.Exit(run_to_huggingface(source, out, dtype, most))


@convert_app.command("from-megatron")
def _convert_from_megatron(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE [KEY=VALUE ...]",
            help="A checkpoint of Megatron-Core's in the format torch_dist, the directory of its script's checkpoints, "
            "or a run of engine = 'megatron'. KEY=VALUE as for train.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The directory to write; it must not exist yet.")],
    to: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="The recipe whose model it is; a run of engine = 'megatron' needs none."),
    ] = None,
) -> None:
    """Make the built-in model of a checkpoint of Megatron-Core's.

    A run begins with it by train.init=DIR.
    """
    from longctx.launch.convert import run_from_megatron

    raise typer.Exit(run_from_megatron(arguments, to, out))


@convert_app.command("to-megatron")
def _convert_to_megatron(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A checkpoint, a run's directory, whose newest one is taken, or converted weights."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The directory to write; it must not exist yet.")],
) -> None:
    """Write weights that Megatron-Core's script begins with, by --load DIR --finetune.

    Softmax layers become Megatron's own attention, others those of longctx.adapters.megatron.specs.
    """
    from longctx.launch.convert import run_to_megatron

    raise typer.Exit(run_to_megatron(source, out))


def _link_speed(text: str) -> float | None:
    if text == "none":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise UserError(f"--gbit {text}: expected a speed in Gbit/s, or none")
    return speed


def _two_lengths(option: str, text: str) -> tuple[int, int] | None:
    if text == "none":
        return None
    lengths = [_at_least(1, option, part) for part in text.split(",")]
    if len(lengths) != 2 or lengths[0] >= lengths[1]:
        raise UserError(f"{option} {text}: expected two lengths, the short one first, such as 16Ki,1Mi, or none")
    return lengths[0], lengths[1]


def _at_least(least: int, option: str, text: str) -> int:
    number = _integer(option, text)
    if number < least:
        raise UserError(f"{option} {text}: expected at least {least}")
    return number


def _integer(option: str, text: str) -> int:
    from longctx.config import parse_integer

    try:
        return int(str(parse_integer(text)))
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def main() -> None:
    """The console script. Exit status: 1 for a failure, 2 for a user's mistake, 128 + the signal that stopped a run."""
    try:
        app(prog_name="longctx")
    except SystemExit as end:
        if "RANK" not in os.environ or not isinstance(end.code, int):
            raise
        from longctx.launch.rank import leave

        leave(end.code)
