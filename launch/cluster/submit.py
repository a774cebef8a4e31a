"""`longctx launch`: submits a recipe as a job by a profile, or prints what it would submit."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from longctx.errors import UserError
from longctx.files import writing
from longctx.launch.cluster.executors import EXECUTORS
from longctx.launch.cluster.job import RECORD, ClusterJob, Executor, Record, Submission, plan_examination, plan_job
from longctx.launch.cluster.profile import AnyProfile, LocalProfile, load_profile
from longctx.launch.job_environment import counted
from longctx.launch.terminal import echo
from longctx.launch.train import train
from longctx.recipe import load

_PREFIX = "cluster."


def launch(
    source: str,
    overrides: Sequence[str],
    *,
    profile: str,
    profiles: Path | None,
    sweep: Sequence[str] = (),
    out: Path | None = None,
    dry_run: bool = False,
) -> int:
    """Run the recipe `source` as the profile named `profile` says; return the exit status.

    `overrides` are `key=value` of the recipe and, with `cluster.` before it, of the profile. `profiles`: the file of
    the profile, None: the usual ones. `sweep`: `key=value,value` per key that varies. `out`: the run directory; None:
    `runs/<name>`. `dry_run`: print the job and submit nothing.

    Raises UserError, before anything is submitted, if recipe or profile are invalid or do not fit together.
    """
    own = [text.removeprefix(_PREFIX) for text in overrides if text.startswith(_PREFIX)]
    overrides = [text for text in overrides if not text.startswith(_PREFIX)]
    chosen = load_profile(profile, profiles, own)
    if isinstance(chosen, LocalProfile):
        if sweep or chosen.setup or chosen.environment or chosen.directory:
            raise UserError(
                "the executor local runs longctx train here: it has no sweep, setup, environment or directory"
            )
        return _run_here(source, overrides, out, chosen, dry_run)
    return _print_or_submit(plan_job(source, overrides, sweep, chosen, out), chosen, dry_run)


def launch_doctor(
    overrides: Sequence[str], *, profile: str, profiles: Path | None, out: Path | None = None, dry_run: bool = False
) -> int:
    """Examine the nodes of a profile by `longctx doctor` as a job; return the exit status.

    `overrides` are `cluster.key=value`; the rest as for `launch`. Raises UserError if the profile is invalid, or that
    of this machine.
    """
    foreign = [text for text in overrides if not text.startswith(_PREFIX)]
    if foreign:
        raise UserError(f"{foreign[0]}: an examination has no recipe; keys of the profile begin with {_PREFIX}")
    chosen = load_profile(profile, profiles, [text.removeprefix(_PREFIX) for text in overrides])
    if isinstance(chosen, LocalProfile):
        raise UserError("the executor local is this machine: longctx doctor examines it")
    return _print_or_submit(plan_examination(chosen, out), chosen, dry_run)


def _print_or_submit(job: ClusterJob, profile: AnyProfile, dry_run: bool) -> int:
    executor = EXECUTORS[profile.executor].of_profile(profile)
    submission = executor.prepare(job)
    if dry_run:
        sys.stdout.write(submission.files[submission.script])
        others = [str(path) for path in submission.files if path != submission.script]
        echo(
            "".join(f"# also written: {path}\n" for path in others)
            + "".join(
                f"# {word}: {shlex.join(command)}\n"
                for word, command in [
                    ("submitted by", submission.command),
                    *(("then", each) for each in submission.then),
                ]
            ).rstrip()
        )
        return 0
    _check_place(job, submission)
    for path, text in submission.files.items():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return _submit(executor, job, submission)


def _run_here(source: str, overrides: Sequence[str], out: Path | None, profile: LocalProfile, dry_run: bool) -> int:
    """Train as `longctx train` does, which checks the recipe for the ranks that it takes."""
    ranks = profile.ranks or profile.gpus or None
    out = out or Path("runs") / load(source, overrides).name
    if dry_run:
        count = [] if ranks is None else ["--nproc", str(ranks)]
        sys.stdout.write(f"{shlex.join(['longctx', 'train', source, *overrides, '--out', str(out), *count])}\n")
        return 0
    return train(source, overrides, nproc=ranks, out=out)


def _check_place(job: ClusterJob, submission: Submission) -> None:
    """Raise UserError if the job's files cannot be written where its nodes read them, or an earlier job reads them."""
    if submission.script.is_absolute() and not job.directory.is_dir():
        raise UserError(
            f"directory: {job.directory}: there is no such directory here; give one on a file system that this machine "
            "shares with the nodes"
        )
    path = submission.script.with_name(RECORD)
    if not path.is_file():
        return
    record = Record(**json.loads(path.read_text(encoding="utf-8")))
    is_active = EXECUTORS[record.executor].is_active
    if is_active is not None and is_active(record):
        run = _shown(path.parent.parent)
        raise UserError(
            f"{run}: its job {record.identity} has not ended (longctx launch status {run}), and reads the files that "
            f"this one would replace: wait for its end, end it with longctx launch cancel {run}, or give another --out"
        )


def _shown(run: Path) -> str:
    """Return a run directory as an argument of longctx launch, from here."""
    here = Path.cwd()
    return shlex.quote(str(run.relative_to(here) if run.is_relative_to(here) else run))


def _submit(executor: Executor, job: ClusterJob, submission: Submission) -> int:
    ranks, nodes = counted(job.nodes * job.ranks, "rank"), counted(job.nodes, "node")
    echo(f"Submitting {job.name}, {ranks} on {nodes}: {submission.script}")
    result = executor.submit(job, submission)
    if isinstance(result, int):
        return result
    path = submission.script.with_name(RECORD)
    path.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    run = _shown(path.parent.parent)
    echo(f"Submitted as {result.identity}. To follow it:")
    echo(f"  longctx launch status {run}\n  longctx launch logs {run} --follow")
    return 0
