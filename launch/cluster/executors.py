"""Executors by name: what submits the job of a profile, and what follows the job of a record."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from longctx.launch.cluster import kubernetes, skypilot, slurm
from longctx.launch.cluster.job import Executor, Record
from longctx.launch.cluster.kubernetes import Kubernetes
from longctx.launch.cluster.skypilot import SkyPilot
from longctx.launch.cluster.slurm import Slurm
from longctx.launch.cluster.ssh import Ssh


class Follower(Protocol):
    """What follows submitted jobs: a module."""

    def status(self, record: Record) -> str:
        """Return the state of a job, in lines. Raises UserError if the scheduler does not say."""

    def log_command(self, record: Record, folder: Path, rank: int, *, follow: bool) -> tuple[str, ...]:
        """Return the command that prints the log of a rank (or of its node) of the run in `folder`."""

    def cancel(self, record: Record, *, now: bool) -> str:
        """End a job after its ranks have saved, or `now`; return what was done. Raises UserError if it cannot."""


@dataclass(frozen=True)
class Kind:
    """An executor."""

    of_profile: Callable[[Any], Executor]
    """Makes the executor of a profile of its class."""
    follower: Follower | None
    """None: `longctx launch` stays until its jobs end, so that none is left to follow."""
    is_active: Callable[[Record], bool] | None = None
    """Whether a job of a record has not ended; None: nothing is asked before the next one is submitted."""


EXECUTORS = {
    "slurm": Kind(Slurm, slurm, slurm.is_active),
    "ssh": Kind(Ssh, None),
    "kubernetes": Kind(Kubernetes, kubernetes),
    "skypilot": Kind(SkyPilot, skypilot),
}
"""By the `executor` of profiles and records."""


def follower_of(record: Record) -> Follower:
    """Return what follows a job that has left a record."""
    follower = EXECUTORS[record.executor].follower
    assert follower is not None
    return follower
