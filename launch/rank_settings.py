"""Settings of a rank's process that must be in its environment when it starts: threads, and memory kept by malloc.

The local launcher starts its ranks with them. Ranks that a scheduler starts have none; they start themselves again,
once, with the settings (`exec_with_settings`).
"""

import os
import sys
from collections.abc import Sequence

import psutil

from longctx.errors import UserError
from longctx.launch.job_environment import RankOfJob, find_job

_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Make glibc keep freed memory instead of returning the pages of each large tensor to the system, which costs CPU ranks
much time (measured: 27 of 101 CPU seconds at 131,072 tokens per step), and ask for huge pages (from glibc 2.35 on): a
head's rows are a token apart, so that each is in a page of its own, whose address takes longer to find than its numbers
take to read."""


def rank_settings(ranks: int) -> dict[str, str]:
    """Return the settings of each of `ranks` processes that share the cores available to this one."""
    return {"OMP_NUM_THREADS": str(threads_per_rank(ranks)), **_MALLOC}


def threads_per_rank(ranks: int) -> int:
    """Return the OMP threads per rank, so that `ranks` processes together use the cores available to this one."""
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or sys.maxsize)
    return max(1, cores // ranks)


def exec_with_settings(arguments: Sequence[str]) -> None:
    """If this process is a rank of a job and lacks a setting, start its program again with it, in the same process.

    `arguments` are those of the command line. What is set already takes precedence. Does nothing where this process
    starts ranks itself (`--nproc`), or where its environment is wrong, which the command reports.
    """
    if any(argument.startswith("--nproc") for argument in arguments):
        return
    try:
        job = find_job()
    except UserError:
        return
    if not isinstance(job, RankOfJob):
        return
    settings = rank_settings(job.local_size)
    if "SLURM_CPUS_PER_TASK" in os.environ:
        settings["OMP_NUM_THREADS"] = os.environ["SLURM_CPUS_PER_TASK"]
    missing = {name: value for name, value in settings.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, sys.orig_argv, os.environ | missing)
