"""Arguments of `longctx launch`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from longctx.launch.arguments import OverridesArgument, RecipeArgument

_DEFAULT = "run"


class _Launch(TyperGroup):
    """A group whose command `run` needs no name: `longctx launch RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Launch,
    no_args_is_help=True,
    help="Submit a recipe as a job of a cluster: longctx launch RECIPE --profile NAME.",
)
ProfileOption = Annotated[
    str, typer.Option(metavar="NAME", help="Profile of the cluster: a table of clusters.toml, or local.")
]
ProfilesOption = Annotated[
    Path | None, typer.Option(metavar="FILE", show_default="clusters.toml", help="File of the profile.")
]
OutOption = Annotated[Path | None, typer.Option(metavar="DIR", show_default="runs/<name>", help="Run directory.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the job instead of submitting it.")]
PlaceOption = Annotated[
    str | None, typer.Option("--profile", metavar="NAME", help="Profile in whose directory the run is.")
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the run, or its directory.")]


@app.command(_DEFAULT)
def _run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    profile: ProfileOption = "local",
    profiles: ProfilesOption = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Run once per value, as an array of jobs (Slurm). Repeatable."),
    ] = None,
    out: OutOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Submit a recipe as a job; `longctx launch RECIPE` is the same.

    KEY=VALUE overrides a key of the recipe and, as cluster.KEY=VALUE, one of the profile, such as cluster.nodes=2. The
    job resumes from the run's latest checkpoint, if there is one.
    """
    from longctx.launch.cluster.submit import launch

    status = launch(
        recipe,
        overrides or (),
        profile=profile,
        profiles=profiles,
        sweep=sweep or (),
        out=out,
        dry_run=dry_run,
    )
    raise typer.Exit(status)


@app.command("doctor")
def _doctor(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="cluster.KEY=VALUE", help="Override a key of the profile.")
    ] = None,
    profile: ProfileOption = "local",
    profiles: ProfilesOption = None,
    out: OutOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Check and measure the nodes of a profile: longctx doctor as a job, whose table is in rank 0's log."""
    from longctx.launch.cluster.submit import launch_doctor

    raise typer.Exit(launch_doctor(overrides or (), profile=profile, profiles=profiles, out=out, dry_run=dry_run))


@app.command("status")
def _status(name: NameArgument, profile: PlaceOption = None, profiles: ProfilesOption = None) -> None:
    """Show the state of a job and how far its run is."""
    from longctx.launch.cluster.follow import print_status

    raise typer.Exit(print_status(name, _directory(profile, profiles)))


@app.command("logs")
def _logs(
    name: NameArgument,
    rank: Annotated[int, typer.Option(min=0, metavar="N", help="Rank; on Kubernetes, node.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for it, and print it as it grows.")] = False,
    profile: PlaceOption = None,
    profiles: ProfilesOption = None,
) -> None:
    """Print the log of a rank of a job."""
    from longctx.launch.cluster.follow import print_logs

    raise typer.Exit(print_logs(name, _directory(profile, profiles), rank=rank, follow=follow))


@app.command("cancel")
def _cancel(
    name: NameArgument,
    now: Annotated[bool, typer.Option("--now", help="Without saving a checkpoint first.")] = False,
    profile: PlaceOption = None,
    profiles: ProfilesOption = None,
) -> None:
    """End a job after its ranks have saved a checkpoint."""
    from longctx.launch.cluster.follow import cancel

    raise typer.Exit(cancel(name, _directory(profile, profiles), now=now))


def _directory(profile: str | None, profiles: Path | None) -> str | None:
    """Return the working directory of a profile's jobs; None: this one."""
    from longctx.launch.cluster.profile import load_profile

    return None if profile is None else load_profile(profile, profiles).directory
