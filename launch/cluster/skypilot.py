"""SkyPilot: a task whose nodes each start their ranks, and the command sky."""

import shlex
from pathlib import Path

from longctx.launch.cluster.job import MEETING_PORT, ClusterJob, Record, Submission, prologue, refuse_now
from longctx.launch.cluster.profile import SkyPilotProfile
from longctx.launch.cluster.tools import run_tool, to_yaml

SCRIPT = "job.yaml"
MANAGED, CLUSTER = "managed", "cluster"
"""Kinds of a submitted task, in its identity."""


class SkyPilot:
    """Tasks of SkyPilot."""

    def __init__(self, profile: SkyPilotProfile) -> None:
        self._profile = profile

    def prepare(self, job: ClusterJob) -> Submission:
        """Return the task and the command that launches it: see Executor."""
        job.check_single("skypilot")
        script = job.folder_here / SCRIPT
        text = "# Written by longctx launch.\n" + to_yaml(self._task(job))
        name = shlex.quote(job.name)
        managed = ("sky", "jobs", "launch", "--name", name, "--detach-run", "--yes", str(script))
        cluster = ("sky", "launch", "--cluster", name, "--detach-run", "--yes", str(script))
        return Submission({script: text}, script, managed if self._profile.managed else cluster)

    def submit(self, job: ClusterJob, submission: Submission) -> Record:
        """Submit it: see Executor."""
        run_tool(submission.command)
        identity = f"{MANAGED if self._profile.managed else CLUSTER}/{job.name}"
        return Record(job.name, "skypilot", identity, is_examination=not job.recipes)

    def _task(self, job: ClusterJob) -> dict[str, object]:
        profile = self._profile
        recipe = f"/tmp/{job.name}.toml"  # on the task's own machine
        change = [f"cd {shlex.quote(profile.directory)}"] if profile.directory else []
        lines = [
            *change,
            *prologue(profile),
            "export PET_NNODES=$SKYPILOT_NUM_NODES PET_NODE_RANK=$SKYPILOT_NODE_RANK",
            f'export PET_MASTER_ADDR=$(head -n1 <<< "$SKYPILOT_NODE_IPS") PET_MASTER_PORT={MEETING_PORT}',
            *job.write_recipe(recipe),
            f"exec {job.command(profile, recipe, shlex.quote(str(job.out)))} --nproc {job.ranks}",
        ]
        return {
            "name": job.name,
            "num_nodes": job.nodes,
            "resources": {
                "infra": profile.infra,
                "accelerators": f"{profile.accelerator}:{profile.gpus}" if profile.gpus else None,
                "use_spot": True if profile.spot else None,
                "image_id": profile.image,
                "disk_size": profile.disk,
            },
            "file_mounts": profile.mounts,
            "run": "\n".join(lines) + "\n",
        }


def status(record: Record) -> str:
    """Return what sky says of a task."""
    kind, _, name = record.identity.partition("/")
    if kind == CLUSTER:
        return run_tool(("sky", "status", name)).rstrip("\n")
    lines = run_tool(("sky", "jobs", "queue", "--all")).splitlines()
    return "\n".join(line for line in lines if name in line.split() or line.startswith("ID"))


def cancel(record: Record, *, now: bool) -> str:
    """End a task: see Follower."""
    refuse_now(record, now=now)
    kind, _, name = record.identity.partition("/")
    managed, cluster = ("sky", "jobs", "cancel", "--name", name, "--yes"), ("sky", "cancel", name, "--all", "--yes")
    return run_tool(managed if kind == MANAGED else cluster).rstrip("\n")


def log_command(record: Record, folder: Path, rank: int, *, follow: bool) -> tuple[str, ...]:
    """Return the command that prints the log of a task, that of all its nodes: see Follower."""
    kind, _, name = record.identity.partition("/")
    end = () if follow else ("--no-follow",)
    return ("sky", "jobs", "logs", "--name", name, *end) if kind == MANAGED else ("sky", "logs", name, *end)
