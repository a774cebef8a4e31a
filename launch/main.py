"""Command line of `longctx`.

Commands import their dependencies when they run, so that `longctx --help` is fast.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import longctx
from longctx.errors import UserError
from longctx.files import path_errors
from longctx.launch.arguments import OverridesArgument, RecipeArgument, TinyOption, at_least
from longctx.launch.commands import bench, checkpoint, convert, data, launch, recipes
from longctx.launch.distribution import foreign_distribution
from longctx.launch.early_stop import hold_early_stop, note_early_stop
from longctx.launch.rank_settings import exec_with_settings
from longctx.launch.terminal import echo_error

_EXAMPLES = """Examples:
  longctx data prepare texts/ --out data/mine       text files to tokens
  longctx recipes                                   recipes to start from
  longctx train my.toml --nproc 8 --check           what would run
  longctx train my.toml --nproc 8 train.steps=100   8 ranks, a key overridden
  longctx generate runs/mine --prompt "import "     continue a prompt"""
_TRAIN_EXAMPLES = """Examples:
  longctx train quickstart                          as many ranks as it needs
  longctx train my.toml parallel.cp=4 --nproc 8     8 ranks on this machine
  longctx train my.toml train.init=runs/first       from another run's weights
  srun longctx train my.toml --out /shared/run      one rank per task"""


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
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, commands in (
    ("recipes", recipes),
    ("launch", launch),
    ("data", data),
    ("bench", bench),
    ("convert", convert),
    ("checkpoint", checkpoint),
):
    app.add_typer(commands.app, name=name)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longctx {longctx.__version__}")
        raise typer.Exit


@app.callback(help=longctx.__doc__, epilog=_EXAMPLES)
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Define the options before the command."""


@app.command("train", epilog=_TRAIN_EXAMPLES)
def _train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    tiny: TinyOption = False,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            show_default="one per GPU, or what the recipe's axes need",
            help="Number of ranks on this machine.",
        ),
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
    stage: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default="all that are left", help="Train only this stage of a curriculum."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Check the recipe, its data and what it starts from for this number of ranks, print what would run, "
            "and stop.",
        ),
    ] = False,
) -> None:
    """Train a model from a recipe.

    Starts one process per rank on this machine. Under torchrun, srun, mpirun, or with RANK, WORLD_SIZE and
    MASTER_ADDR set, the process runs as one rank of that job. Ctrl-C and SIGTERM save a checkpoint before exiting.
    """
    from longctx.launch.train import train

    status = train(
        recipe,
        overrides or (),
        tiny=tiny,
        nproc=nproc,
        resume=resume,
        out=out,
        only_stage=stage,
        only_check=check,
    )
    raise typer.Exit(status)


@app.command("doctor")
def _doctor(
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", show_default="one per GPU, or 2 on a CPU", help="Number of ranks on this machine."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of runs, whose disk is measured.")] = Path("runs"),
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Time limit per collective.")] = 120.0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the hardware profile as JSON.")] = None,
) -> None:
    """Check the machines before a run, and measure them.

    Reports versions, devices, limits, networks, clocks, rates of compute, links between ranks and the disk, and names
    slow ranks. Starts one process per rank on this machine; under torchrun, srun or mpirun it is one rank of that job.
    Exit status 1 if something is wrong; what to do about it is printed.
    """
    from longctx.launch.doctor import doctor

    raise typer.Exit(doctor(nproc=nproc, out=out, timeout=timeout, json_file=json))


@app.command("verify")
def _verify(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    tiny: TinyOption = False,
    stage: Annotated[
        str | None, typer.Option(metavar="NAME", show_default="the last", help="Stage of a curriculum to verify.")
    ] = None,
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

    raise typer.Exit(
        run(recipe, overrides or (), tiny=tiny, stage_name=stage, shrunk=shrink, ranks=ranks, timeout=timeout)
    )


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
    stdout, up to the end-of-document token. On a CPU a model of up to 268M parameters decodes on one thread, a larger
    one on all cores, unless OMP_NUM_THREADS is set.
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


def main() -> None:
    """Run the console script. Exit status: 1 for a failure, 2 for a user error, 128 + the signal that stopped a run."""
    arguments = sys.argv[1:]
    hold_early_stop(arguments)
    other = foreign_distribution()
    if other is not None:
        echo_error(other)
        sys.exit(2)
    if arguments[:1] in (["train"], ["doctor"]):
        exec_with_settings(arguments)
    note_early_stop(arguments)
    try:
        app(prog_name="longctx")
    except SystemExit as end:
        if "RANK" not in os.environ or not isinstance(end.code, int):
            raise
        from longctx.launch.rank import exit_rank

        exit_rank(end.code)
