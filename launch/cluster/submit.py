"""`longctx launch`: submits a recipe as a job by a profile, or prints what it would submit; status, logs and cancel."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from longctx.checkpoint.read import list_checkpoints
from longctx.engines.metrics import FILE_NAME
from longctx.errors import UserError
from longctx.files import writing
from longctx.launch.cluster import kubernetes, skypilot, slurm
from longctx.launch.cluster.job import (
    CANCELLED,
    FOLDER,
    ClusterJob,
    Executor,
    Record,
    Submission,
    plan_examination,
    plan_job,
)
from longctx.launch.cluster.kubernetes import Kubernetes
from longctx.launch.cluster.profile import (
    AnyProfile,
    KubernetesProfile,
    LocalProfile,
    SkyPilotProfile,
    SlurmProfile,
    SshProfile,
    load_profile,
)
from longctx.launch.cluster.skypilot import SkyPilot
from longctx.launch.cluster.slurm import Slurm
from longctx.launch.cluster.ssh import Ssh
from longctx.launch.job_environment import counted
from longctx.launch.terminal import echo
from longctx.launch.train import train
from longctx.recipe import load

RECORD = "job.json"
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
    executor = _executor(profile)
    submission = executor.prepare(job)
    if dry_run:
        sys.stdout.write(submission.files[submission.script])
        others = [str(path) for path in submission.files if path != submission.script]
        echo(
            "".join(f"# also written: {path}\n" for path in others)
            + f"# submitted by: {shlex.join(submission.command)}"
        )
        return 0
    for path, text in submission.files.items():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return _submit(executor, job, submission, profile)


def _run_here(source: str, overrides: Sequence[str], out: Path | None, profile: LocalProfile, dry_run: bool) -> int:
    """Train as `longctx train` does, which checks the recipe for the ranks that it takes."""
    ranks = profile.ranks or profile.gpus or None
    out = out or Path("runs") / load(source, overrides).name
    if dry_run:
        count = [] if ranks is None else ["--nproc", str(ranks)]
        sys.stdout.write(f"{shlex.join(['longctx', 'train', source, *overrides, '--out', str(out), *count])}\n")
        return 0
    return train(source, overrides, nproc=ranks, out=out)


def _executor(profile: AnyProfile) -> Executor:
    match profile:
        case SlurmProfile():
            return Slurm(profile)
        case SshProfile():
            return Ssh(profile)
        case KubernetesProfile():
            return Kubernetes(profile)
        case SkyPilotProfile():
            return SkyPilot(profile)
    raise AssertionError(profile)


def _submit(executor: Executor, job: ClusterJob, submission: Submission, profile: AnyProfile) -> int:
    ranks, nodes = counted(job.nodes * job.ranks, "rank"), counted(job.nodes, "node")
    echo(f"Submitting {job.name}, {ranks} on {nodes}: {submission.script}")
    result = executor.submit(job, submission)
    if isinstance(result, int):
        return result
    namespace = profile.namespace if isinstance(profile, KubernetesProfile) else ""
    record = Record(job.name, profile.executor, result, namespace)
    path = submission.script.with_name(RECORD)
    path.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    echo(f"Submitted as {result}. To follow it:")
    echo(f"  longctx launch status {job.out}\n  longctx launch logs {job.out} --follow")
    return 0


def read_record(name: str) -> tuple[Path, Record]:
    """Return the run directory and the record of the job `name`: a directory, or the name of one in `runs`.

    Raises UserError if there is none.
    """
    for folder in (Path(name), Path("runs") / name):
        path = folder / FOLDER / RECORD
        if path.is_file():
            return folder, Record(**json.loads(path.read_text(encoding="utf-8")))
    raise UserError(f"{name}: no job was launched from here under this name ({Path('runs') / name / FOLDER / RECORD})")


def print_status(name: str) -> int:
    """Print the state of a job and the progress of its runs; return the exit status."""
    folder, record = read_record(name)
    state = {"slurm": slurm.status, "kubernetes": kubernetes.status, "skypilot": skypilot.status}[record.executor]
    sys.stdout.write(f"{state(record)}\n")
    for run in _runs(folder):
        sys.stdout.write(f"{run}: {_progress(run)}\n")
    return 0


def _runs(folder: Path) -> list[Path]:
    """Return the run directories of a job: its own, or the numbered ones of a sweep."""
    numbered = [path.parent for path in folder.glob(f"[0-9]*/{FOLDER}")]
    return sorted(numbered, key=lambda path: int(path.name)) or [folder]


def _progress(run: Path) -> str:
    metrics = run / FILE_NAME
    if not metrics.is_file():
        return "no metrics here yet"
    steps = [line for line in metrics.read_text(encoding="utf-8").splitlines() if '"grad_norm"' in line]
    if not steps:
        return "before its first step"
    last = json.loads(steps[-1])
    checkpoints = list_checkpoints(run / "checkpoints")
    saved = f", latest checkpoint {checkpoints[-1].name}" if checkpoints else ""
    return f"step {last['step']}, loss {last['loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s{saved}"


def print_logs(name: str, *, rank: int, follow: bool) -> int:
    """Print the log of a rank (of its node, where the cluster keeps one per node); return the exit status."""
    folder, record = read_record(name)
    if record.executor == "kubernetes":
        command = kubernetes.follow_command(record, rank, follow=follow)
    elif record.executor == "skypilot":
        command = skypilot.follow_command(record, follow=follow)
    else:
        file = folder / "logs" / f"rank-{rank}.log"
        if not file.is_file():
            jobs = ", ".join(map(str, sorted(folder.glob("logs/*.log")))) or "none"
            raise UserError(f"{file}: there is no such log yet (there are: {jobs})")
        command = ("tail", "--lines=+1", *(["--follow=name"] if follow else []), str(file))
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 130


def cancel(name: str, *, now: bool) -> int:
    """End a job after its ranks have saved, or `now`; return the exit status."""
    folder, record = read_record(name)
    for run in _runs(folder):
        (run / FOLDER / CANCELLED).touch()
    if record.executor == "slurm":
        echo(slurm.cancel(record, now=now))
    else:
        if now:
            raise UserError(f"--now: {record.executor} has one way to end a job; omit --now")
        echo(kubernetes.cancel(record) if record.executor == "kubernetes" else skypilot.cancel(record))
    return 0
