"""SIGTERM to a `longctx train` that starts: held back from the first line on, then noted where somebody asks for it.

The local launcher and the trainer ask, as soon as they listen themselves (`longctx.train.stop_signal`): a job that is
preempted while its ranks import torch is stopped, not failed.
"""

from collections.abc import Sequence

from longctx.errors import UserError
from longctx.launch.job_environment import RankOfJob, find_job
from longctx.train.stop_signal import hold_stop, note_stop, release_stop


def hold_early_stop(arguments: Sequence[str]) -> None:
    """Hold SIGTERM back until `note_early_stop`, after an exec too, if the command line `arguments` trains."""
    if _trains(arguments):
        hold_stop()


def note_early_stop(arguments: Sequence[str]) -> None:
    """Note SIGTERM from now on if this process starts ranks or is Slurm's rank; else let it end the process again.

    torchrun and mpirun send SIGTERM to the ranks that are left when one has failed, and wait for their ends.
    """
    if _trains(arguments):
        (note_stop if _is_asked_to_stop(arguments) else release_stop)()


def _trains(arguments: Sequence[str]) -> bool:
    return arguments[:1] == ["train"] and "--check" not in arguments


def _is_asked_to_stop(arguments: Sequence[str]) -> bool:
    if any(argument.startswith("--nproc") for argument in arguments):
        return True
    try:
        job = find_job()
    except UserError:  # which the command reports
        return False
    return not isinstance(job, RankOfJob) or job.is_slurm_task
