"""A job: the recipes and the run directory of what a cluster is to run, and the shell text that all executors share."""

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from longctx.errors import UserError
from longctx.launch.cluster.profile import Profile
from longctx.recipe import Recipe, check, dump, load

PREVIOUS = "PREVIOUS"
"""In a command, the identity of the job before."""
FOLDER = "job"
"""Folder, in the run directory, of the job's files."""
RECIPE = "recipe.toml"
RECORD = "job.json"
"""File in this folder: the record of the job."""
HARDWARE = "hardware.json"
"""File of the hardware profile, in the run directory of an examination."""
CANCELLED = "cancelled"
"""File in this folder: the job is to end, and not to be queued again."""
MEETING_PORT = 29500
_FAILED = """failed() { echo "error: line $1 of this script, which is of the profile's setup, failed" >&2; exit 2; }"""
_EXAMINATION = 600.0
"""Time in seconds within which an examination ends."""


@dataclass(frozen=True)
class ClusterJob:
    """What is to run: one run, a sweep of several into numbered subdirectories, or an examination of the nodes."""

    name: str
    """Name of the job: that of the recipe."""
    recipes: tuple[Recipe, ...]
    """One, those of a sweep, or none: `longctx doctor` examines the nodes."""
    out: Path
    """Run directory, relative to `directory` or absolute."""
    directory: Path
    """Working directory, on the nodes."""
    nodes: int
    ranks: int
    """Ranks per node."""

    @property
    def is_sweep(self) -> bool:
        """Whether it has several runs."""
        return len(self.recipes) > 1

    @property
    def runs(self) -> list[Path]:
        """Run directories, relative to `directory` or absolute, one per recipe."""
        return [self.out / str(number) for number in range(len(self.recipes))] if self.is_sweep else [self.out]

    @property
    def stages(self) -> list[str]:
        """Names of the stages of a curriculum, one job each; none for a sweep, whose jobs are runs."""
        return [] if self.is_sweep or not self.recipes else [stage.name for stage in self.recipes[0].stage]

    @property
    def folder(self) -> Path:
        """Folder of the files that its nodes read, absolute."""
        return self.directory / self.out / FOLDER

    @property
    def folder_here(self) -> Path:
        """Folder of the files that a command reads here."""
        return self.out / FOLDER

    @property
    def stop_seconds(self) -> float:
        """Time within which a step and then a save end, or the run fails: the recipe's parallel.timeout."""
        return max((recipe.parallel.timeout for recipe in self.recipes), default=_EXAMINATION)

    def command(self, profile: Profile, recipe: str, run: str) -> str:
        """Return the command of a rank or node in a script; `recipe` and `run` are shell words of their paths."""
        arguments = f"train {recipe} --out {run}" if self.recipes else f"doctor --out {run} --json {run}/{HARDWARE}"
        return f"{shlex.quote(profile.program)} {arguments}"

    def write_recipe(self, path: str) -> list[str]:
        """Return the lines of a script that write the recipe, the keys that differ from their defaults."""
        if not self.recipes:
            return []
        text = dump(self.recipes[0], defaults=False).rstrip("\n").splitlines()
        return [f"cat > {path} <<'RECIPE'", *text, "RECIPE"]

    def check_single(self, executor: str) -> None:
        """Raise UserError if it is a sweep, which only arrays of Slurm run."""
        if self.is_sweep:
            raise UserError(f"--sweep: needs an executor with arrays of jobs, slurm, not {executor}")

    def recipe_files(self) -> dict[Path, str]:
        """Return the resolved recipe of each run by its absolute path: what the job runs is what was checked."""
        return {
            self.directory / run / FOLDER / RECIPE: dump(recipe)
            for run, recipe in zip(self.runs, self.recipes, strict=bool(self.recipes))
        }


@dataclass(frozen=True)
class Submission:
    """What an executor is given: files, and the command that submits them."""

    files: dict[Path, str]
    """Contents by path."""
    script: Path
    """The one of `files` that a person reads."""
    command: tuple[str, ...]
    then: tuple[tuple[str, ...], ...] = ()
    """Commands that submit jobs which wait for the one before, whose identity takes the place of `PREVIOUS`."""


@dataclass(frozen=True)
class Record:
    """A submitted job, as its folder keeps it (RECORD)."""

    name: str
    executor: str
    identity: str
    """What the executor calls it: Slurm's job id, a resource's name."""
    namespace: str = ""
    """Of the identity, where the executor has such."""
    is_examination: bool = False
    """Whether it examines the nodes and has no run."""


class Executor(Protocol):
    """What submits jobs."""

    def prepare(self, job: ClusterJob) -> Submission:
        """Return what submits a job. Raises UserError if it cannot be run so."""

    def submit(self, job: ClusterJob, submission: Submission) -> Record | int:
        """Submit it, its files written: return its record, or the exit status of a job that ran to its end."""


def plan_job(
    source: str, overrides: Sequence[str], sweep: Sequence[str], profile: Profile, out: Path | None
) -> ClusterJob:
    """Read and check the recipes of a job. `sweep`: `key=value,value` for each key that varies.

    Raises UserError if a recipe is invalid, or cannot run on the profile's ranks.
    """
    choices = [_choices(text) for text in sweep]
    recipes = tuple(load(source, [*overrides, *chosen]) for chosen in itertools.product(*choices))
    for recipe in recipes:
        check(recipe, profile.node_count * profile.ranks_per_node)
    return _job(recipes[0].name, recipes, profile, out)


def plan_examination(profile: Profile, out: Path | None) -> ClusterJob:
    """Return the job that examines the profile's nodes."""
    return _job("doctor", (), profile, out)


def _job(name: str, recipes: tuple[Recipe, ...], profile: Profile, out: Path | None) -> ClusterJob:
    directory = Path(profile.directory).expanduser() if profile.directory else Path.cwd()
    if not directory.is_absolute():
        raise UserError(f"directory: {profile.directory}: give an absolute path")
    return ClusterJob(name, recipes, out or Path("runs") / name, directory, profile.node_count, profile.ranks_per_node)


def _choices(text: str) -> list[str]:
    """Return `key=value` for each value of `key=value,value`; commas within brackets and quotes do not part them."""
    key, equals, values = text.partition("=")
    found = re.findall(r"""((?:[^,\[\]{}"']|\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*')+)""", values)
    if not equals or not key or len(found) < 2:
        raise UserError(f"--sweep {text}: expected a key and several values, such as optimizer.lr=1e-3,3e-4")
    return [f"{key}={value}" for value in found]


def refuse_now(record: Record, *, now: bool) -> None:
    """Raise UserError for `now` (`--now`) where an executor has one way to end a job."""
    if now:
        raise UserError(f"--now: {record.executor} has one way to end a job; omit --now")


def rank_log(folder: Path, rank: int) -> Path:
    """Return the log of a rank, in a run directory on a file system that its nodes share."""
    return folder / "logs" / f"rank-{rank}.log"


def prologue(profile: Profile) -> list[str]:
    """Return the lines of a script before longctx starts: the profile's setup and environment."""
    lines = [f"{line} || failed $LINENO" for line in profile.setup]
    lines = [_FAILED, *lines] if lines else []
    lines += [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    return [*lines, ""] if lines else []
