"""Slurm: the script of a batch job whose tasks are the ranks, and sbatch, scontrol, squeue and scancel.

`srun` starts one task per rank, and each finds its place by Slurm's variables (`longctx.launch.job_environment`). A run
that a signal has stopped, before its time limit or by a preemption, has saved, if it has come to a step, and left the
file `stopped`; the script then queues the job again, and it resumes from that checkpoint. A run that failed leaves
none: it is not started again. A curriculum is one job per stage, each of which waits for the end of the one before.
"""

import shlex
import time
from pathlib import Path

from longctx.errors import UserError
from longctx.launch.cluster.job import (
    CANCELLED,
    FOLDER,
    PREVIOUS,
    RECIPE,
    ClusterJob,
    Record,
    Submission,
    prologue,
    rank_log,
)
from longctx.launch.cluster.profile import SlurmProfile
from longctx.launch.cluster.tools import run_tool
from longctx.launch.job_environment import counted
from longctx.launch.terminal import echo
from longctx.train.outcome import STOPPED

SCRIPT = "job.sbatch"
_POLL = 2.0
"""Seconds between looks at a job whose log is waited for."""
_REASONS = {
    "Resources": " (enough of its nodes are not free yet)",
    "Priority": " (jobs before it in the queue wait too)",
    "BeginTime": " (it starts again in a moment)",
    "Dependency": " (it waits for another job)",
    "QOSMaxJobsPerUserLimit": " (you have as many jobs as the QOS allows)",
    "AssocGrpGRES": " (your account has as many GPUs as it may)",
    "PartitionTimeLimit": " (longer than the partition allows: shorten cluster.time)",
    "PartitionNodeLimit": " (more nodes than the partition allows: see cluster.nodes)",
    "ReqNodeNotAvail": " (its nodes are down, or reserved)",
}
"""What Slurm's usual reasons mean."""


class Slurm:
    """Batch jobs of Slurm."""

    def __init__(self, profile: SlurmProfile) -> None:
        self._profile = profile

    def prepare(self, job: ClusterJob) -> Submission:
        """Return the script and the command that submits it: see Executor."""
        script = job.folder / SCRIPT
        files = {script: "\n".join([*self._directives(job), "", *self._body(job)]) + "\n"} | job.recipe_files()
        command = ("sbatch", "--parsable")
        if not job.stages:
            return Submission(files, script, (*command, str(script)))
        after = (f"--dependency=afterok:{PREVIOUS}", "--kill-on-invalid-dep=yes")
        first, *others = ((f"--job-name={job.name}-{stage}", str(script), stage) for stage in job.stages)
        return Submission(files, script, (*command, *first), tuple((*command, *after, *other) for other in others))

    def submit(self, job: ClusterJob, submission: Submission) -> Record:
        """Submit it: see Executor."""
        for run in job.runs:
            (job.directory / run / "logs").mkdir(parents=True, exist_ok=True)
            (job.directory / run / FOLDER / CANCELLED).unlink(missing_ok=True)
        identities: list[str] = []
        for command in (submission.command, *submission.then):
            words = [word.replace(PREVIOUS, identities[-1]) if identities else word for word in command]
            identities.append(run_tool(tuple(words)).strip().partition(";")[0])
        return Record(job.name, "slurm", ",".join(identities), is_examination=not job.recipes)

    def _directives(self, job: ClusterJob) -> list[str]:
        profile = self._profile
        run, name = (job.out / "%a", "job-%A_%a") if job.is_sweep else (job.out, "job-%j")
        named = {
            "job-name": job.name,
            "chdir": str(job.directory),
            "output": str(run / "logs" / f"{name}.log"),
            "open-mode": "append",
            "array": f"0-{len(job.recipes) - 1}" if job.is_sweep else None,
            "account": profile.account,
            "partition": profile.partition,
            "qos": profile.qos,
            "constraint": profile.constraint,
            "reservation": profile.reservation,
            "nodes": str(job.nodes),
            "ntasks-per-node": str(job.ranks),
            "gpus-per-node": str(profile.gpus) if profile.gpus else None,
            "cpus-per-task": None if profile.cpus is None else str(profile.cpus),
            "mem": profile.memory,
            "time": None if profile.time is None else time_limit(profile.time),
            "signal": None if profile.time is None else f"TERM@{self._stop_seconds(job, profile.time)}",
        }
        options = [f"--{option}={value}" for option, value in named.items() if value is not None]
        options += ["--exclusive"] if profile.exclusive else []
        options += ["--requeue" if profile.requeue else "--no-requeue", *profile.options]
        return ["#!/bin/bash", *(f"#SBATCH {option}" for option in options)]

    def _stop_seconds(self, job: ClusterJob, limit: float) -> int:
        return round(self._profile.stop_before or min(job.stop_seconds, limit / 2))

    def _body(self, job: ClusterJob) -> list[str]:
        profile = self._profile
        run = f"{shlex.quote(str(job.out))}/$SLURM_ARRAY_TASK_ID" if job.is_sweep else shlex.quote(str(job.out))
        srun = ['srun --kill-on-bad-exit=1 --open-mode=append --output="$run/logs/rank-%t.log"']
        if profile.cpus is not None:
            # From Slurm 22.05 on srun does not take over that of sbatch.
            srun.append(f"--cpus-per-task={profile.cpus}")
        if profile.container is not None:
            mounts = ",".join([f"{job.directory}:{job.directory}", *profile.mounts])
            srun.append(f"--container-image={shlex.quote(profile.container)}")
            srun.append(
                f"--container-mounts={shlex.quote(mounts)} --container-workdir={shlex.quote(str(job.directory))}"
            )
        stage = ' --stage "$1"' if job.stages else ""
        srun.append(job.command(profile, f'"$run/{FOLDER}/{RECIPE}"', '"$run"') + stage)
        lines = [*prologue(profile), f"run={run}", f'rm -f "$run/{STOPPED}"', " \\\n    ".join(srun), "status=$?", ""]
        if profile.requeue:
            lines += [
                "# A signal stopped the run, and what it has done is saved: it resumes when this job starts again.",
                f'if [ -e "$run/{STOPPED}" ] && [ ! -e "$run/{FOLDER}/{CANCELLED}" ]; then',
                '    scontrol requeue "$SLURM_JOB_ID"',
                "fi",
            ]
        return [*lines, "exit $status"]


def time_limit(seconds: float) -> str:
    """Return a duration as Slurm writes it, `1-12:00:00`; rounded up to seconds."""
    minutes, rest = divmod(-int(-seconds // 1), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days}-' if days else ''}{hours:02}:{minutes:02}:{rest:02}"


def status(record: Record) -> str:
    """Return the state of a job, with its reason or node list."""
    return "\n".join(_status(identity) for identity in record.identity.split(","))


def _status(identity: str) -> str:
    try:
        output = run_tool(("scontrol", "--oneliner", "show", "job", identity))
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        return f"Slurm job {identity}: not known to Slurm any more"
    states = [_fields(line) for line in output.splitlines() if line.strip()]
    return "\n".join(_described(fields) for fields in states)


def is_active(record: Record) -> bool:
    """Return whether a job waits or runs: it has not ended, and is not about to."""
    try:
        states = run_tool(("squeue", "--noheader", "--format=%T", f"--jobs={record.identity}")).split()
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        return False
    return bool({*states} - {"COMPLETING"})


def _fields(line: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


def _described(fields: dict[str, str]) -> str:
    number, state = fields["JobId"], fields["JobState"]
    if fields.get("ArrayTaskId"):
        number = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"
    parts = [f"Slurm job {number}: {state.lower()}"]
    reason = fields.get("Reason", "None")
    if reason != "None" and state == "PENDING":
        parts.append(f"because of {reason}{_REASONS.get(reason, '')}")
    if state == "PENDING" and fields.get("StartTime", "Unknown") != "Unknown":
        parts.append(f"expected to start at {fields['StartTime'].replace('T', ' ')}")
    if fields.get("NodeList", "(null)") not in ("(null)", ""):
        parts.append(f"on {fields['NodeList']}")
    if fields.get("Restarts", "0") != "0":
        parts.append(f"after {counted(int(fields['Restarts']), 'restart')}")
    if state == "RUNNING":
        parts.append(f"for {fields['RunTime']} of {fields['TimeLimit']}")
    if state == "FAILED":
        parts.append(f"exit status {fields['ExitCode'].partition(':')[0]}: see {fields['StdOut']}")
    return ", ".join(parts)


def log_command(record: Record, folder: Path, rank: int, *, follow: bool) -> tuple[str, ...]:
    """Return the command that prints a rank's log: see Follower. `follow` waits for the log of a job that waits."""
    file, told = rank_log(folder, rank), ""
    while not file.is_file():
        state = status(record)
        if not (follow and is_active(record)):
            logs = ", ".join(map(str, sorted(folder.glob("logs/*.log")))) or "none"
            raise UserError(f"{file}: there is no such log (there are: {logs}). {state}")
        if state != told:
            echo(f"Waiting for {file}. {state}")
        told = state
        time.sleep(_POLL)
    return ("tail", "--lines=+1", *(["--follow=name"] if follow else []), str(file))


def cancel(record: Record, *, now: bool) -> str:
    """End a job: see Follower."""
    identities = record.identity.split(",")
    if now:
        run_tool(("scancel", *identities))
        return f"Slurm job {record.identity} is cancelled."
    if not is_active(record):
        return f"{status(record)}: there is nothing to cancel"
    states = run_tool(("squeue", "--noheader", "--format=%T", f"--jobs={record.identity}")).split()
    done = []
    if "PENDING" in states:
        run_tool(("scancel", "--state=PENDING", *identities))
        done.append("it does not start")
    if "RUNNING" in states:
        run_tool(("scancel", "--signal=TERM", *identities))
        done.append(f"its ranks save and end; follow it with longctx launch status {record.name}")
    return f"Slurm job {record.identity}: {'; '.join(done)}"
