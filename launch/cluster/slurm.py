"""Slurm: the script of a batch job whose tasks are the ranks, and sbatch, scontrol and scancel.

`srun` starts one task per rank, and each finds its place by Slurm's variables (`longctx.launch.job_environment`). A run
that a signal has stopped, before its time limit or by a preemption, has saved and left the file `stopped`; the script
then queues the job again, and it goes on from that checkpoint. A run that failed leaves none: it is not started again.
"""

import shlex

from longctx.errors import UserError
from longctx.launch.cluster.job import CANCELLED, FOLDER, RECIPE, ClusterJob, Record, Submission, prologue
from longctx.launch.cluster.profile import SlurmProfile
from longctx.launch.cluster.tools import run_tool
from longctx.train.outcome import STOPPED

SCRIPT = "job.sbatch"


class Slurm:
    """Batch jobs of Slurm."""

    def __init__(self, profile: SlurmProfile) -> None:
        self._profile = profile

    def prepare(self, job: ClusterJob) -> Submission:
        """Return the script and the command that submits it: see Executor."""
        script = job.folder / SCRIPT
        files = {script: "\n".join([*self._directives(job), "", *self._body(job)]) + "\n"} | job.recipe_files()
        return Submission(files, script, ("sbatch", "--parsable", str(script)))

    def submit(self, job: ClusterJob, submission: Submission) -> str:
        """Submit it: see Executor."""
        for run in job.runs:
            (job.directory / run / "logs").mkdir(parents=True, exist_ok=True)
            (job.directory / run / FOLDER / CANCELLED).unlink(missing_ok=True)
        return run_tool(submission.command).strip().partition(";")[0]

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
        srun.append(job.command(profile, f'"$run/{FOLDER}/{RECIPE}"', '"$run"'))
        lines = [*prologue(profile), f"run={run}", f'rm -f "$run/{STOPPED}"', " \\\n    ".join(srun), "status=$?", ""]
        if profile.requeue:
            lines += [
                "# A signal stopped the run after a save: it goes on when this job starts again.",
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
    try:
        output = run_tool(("scontrol", "--oneliner", "show", "job", record.identity))
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        return f"Slurm job {record.identity}: not known to Slurm any more"
    states = [_fields(line) for line in output.splitlines() if line.strip()]
    return "\n".join(_described(fields) for fields in states)


def _fields(line: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


def _described(fields: dict[str, str]) -> str:
    number = fields["JobId"]
    if fields.get("ArrayTaskId"):
        number = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"
    parts = [f"Slurm job {number}: {fields['JobState'].lower()}"]
    if fields.get("Reason", "None") != "None":
        parts.append(f"because of {fields['Reason']}")
    if fields.get("NodeList", "(null)") != "(null)":
        parts.append(f"on {fields['NodeList']}")
    if fields.get("Restarts", "0") != "0":
        parts.append(f"after {fields['Restarts']} restarts")
    if fields["JobState"] == "RUNNING":
        parts.append(f"for {fields['RunTime']} of {fields['TimeLimit']}")
    return ", ".join(parts)


def cancel(record: Record, *, now: bool) -> str:
    """End a job: `now`, or after its ranks have saved; return what was done."""
    if now:
        run_tool(("scancel", record.identity))
        return f"Slurm job {record.identity} is cancelled."
    pending = run_tool(("squeue", "--noheader", "--format=%T", f"--jobs={record.identity}")).split()
    if "RUNNING" in pending:
        run_tool(("scancel", "--signal=TERM", record.identity))
    if "PENDING" in pending:
        run_tool(("scancel", "--state=PENDING", record.identity))
    return f"Slurm job {record.identity}: its ranks save and end; follow it with longctx launch status {record.name}"
