"""A rank that a scheduler has started: its environment, and how its failure is reported."""

import os
import socket
import traceback
from collections.abc import Callable

from longctx.errors import UserError
from longctx.files import path_errors
from longctx.launch.job_environment import RankOfJob
from longctx.launch.rank import below
from longctx.launch.terminal import echo, echo_error
from longctx.parallel.rank_errors import RankError


def run_as_rank(job: RankOfJob, call: Callable[[], int], advice: str) -> int:
    """Run `call` as a rank of a job; return its exit status.

    The cause of a failure, and `advice`, are what the rank prints last: its log, or that of the whole job, is read from
    the end. Raises UserError if `call` does.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    os.environ.update(job.variables())
    if job.rank == 0:
        echo(job.describe())
    handler = get_error_handler()
    handler.initialize()
    try:
        with path_errors():
            return call()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - printed, with its traceback, and the rank's exit status
        # torchrun reads the first traceback from here.
        handler.record_exception(error)
        if isinstance(error, RankError):
            echo_error(str(error))
            return 1
        error = error.with_traceback(below(run_as_rank, error.__traceback__))
        echo("".join(traceback.format_exception(error)).rstrip("\n"))
        echo_error(f"rank {job.rank} on {socket.gethostname()} failed with the error above. {advice}".rstrip())
        return 1


def refuse_nproc(nproc: int | None, job: RankOfJob) -> None:
    """Raise UserError if a rank of a job is asked to start ranks (`--nproc`)."""
    if nproc is not None:
        raise UserError(
            f"--nproc {nproc}: this process is already one rank of {job.size} ({job.found}); omit --nproc, or "
            "start one task per node"
        )
