"""Limits of a process: open files, locked memory, shared memory, and threads against cores."""

import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from longctx.doctor.findings import Finding
from longctx.doctor.units import size

UNLIMITED = -1
SHARED_MEMORY = Path("/dev/shm")
_FILES, _FILES_PER_RANK = 512, 16
"""Open files of a rank, and sockets per other rank: one per process group, of which a run has up to about ten."""
_LOCKED = 2**30
_SHARED_PER_RANK = 128 * 2**20


@dataclass(frozen=True)
class ProcessLimits:
    """Limits of this process, and the threads that its node has for it."""

    open_files: int
    """Soft limit; UNLIMITED: none."""
    most_open_files: int
    """Hard limit, up to which a user may raise the soft one."""
    locked_memory: int
    """Soft limit in bytes; UNLIMITED: none."""
    shared_memory: int
    """Bytes of /dev/shm; 0: there is none."""
    free_shared_memory: int
    cores: int
    """CPU cores that this process may use."""
    threads: int
    """Threads that torch computes with."""


def read_limits() -> ProcessLimits:
    """Read the limits of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shared = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    return ProcessLimits(
        open_files=_limit(soft),
        most_open_files=_limit(hard),
        locked_memory=_limit(locked),
        shared_memory=shared.total if shared else 0,
        free_shared_memory=shared.free if shared else 0,
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
    )


def _limit(number: int) -> int:
    return UNLIMITED if number == resource.RLIM_INFINITY else number


def check_limits(limits: ProcessLimits, *, ranks: int, local_ranks: int, kind: str, has_fabric: bool) -> list[Finding]:
    """Check the limits of a rank in a job of `ranks`, of which `local_ranks` are on its node.

    `kind`: type of the devices, `cpu` or `cuda`. `has_fabric`: whether the node has InfiniBand or EFA.
    """
    return [
        _open_files(limits, ranks),
        _locked_memory(limits.locked_memory, has_fabric),
        _shared_memory(limits, local_ranks, kind),
        _threads(limits, local_ranks),
    ]


def _open_files(limits: ProcessLimits, ranks: int) -> Finding:
    needed = _FILES + _FILES_PER_RANK * ranks
    value = "unlimited" if limits.open_files == UNLIMITED else f"{limits.open_files:,}"
    if limits.open_files == UNLIMITED or limits.open_files >= needed:
        return Finding("open files", value)
    if limits.most_open_files == UNLIMITED or limits.most_open_files >= needed:
        how = f"ulimit -n {needed} in the job's script"
    else:
        how = (
            f"the hard limit is {limits.most_open_files:,}: raise it in /etc/security/limits.conf (nofile), in "
            "slurmd's LimitNOFILE, or with docker run --ulimit nofile=65536"
        )
    few_even_for_sockets = limits.open_files < needed // 2
    return Finding(
        "open files", f"{value}; {ranks} ranks may need {needed:,}", "wrong" if few_even_for_sockets else "warning", how
    )


def _locked_memory(limit: int, has_fabric: bool) -> Finding:
    value = "unlimited" if limit == UNLIMITED else size(limit)
    if not has_fabric or limit == UNLIMITED or limit >= _LOCKED:
        return Finding("locked memory", value)
    return Finding(
        "locked memory",
        value,
        "wrong",
        "InfiniBand and EFA register locked memory, and NCCL fails without: ulimit -l unlimited, in limits.conf "
        "(memlock), slurmd's LimitMEMLOCK, or docker run --ulimit memlock=-1",
    )


def _shared_memory(limits: ProcessLimits, local_ranks: int, kind: str) -> Finding:
    value = f"{size(limits.free_shared_memory)} free of {size(limits.shared_memory)}"
    needed = _SHARED_PER_RANK * local_ranks
    if kind != "cuda" or local_ranks == 1 or limits.free_shared_memory >= needed:
        return Finding("/dev/shm", value)
    return Finding(
        "/dev/shm",
        value,
        "wrong",
        f"NCCL's ranks of one node may communicate through it ({size(needed)} for {local_ranks}): docker run "
        "--shm-size=8g or --ipc=host; on Kubernetes an emptyDir with medium Memory at /dev/shm; or remove old files",
    )


def _threads(limits: ProcessLimits, local_ranks: int) -> Finding:
    value = (
        f"{limits.threads} per rank, {local_ranks} {'rank' if local_ranks == 1 else 'ranks'} on {limits.cores} cores"
    )
    fair = max(1, limits.cores // local_ranks)
    if limits.threads <= fair:
        return Finding("threads", value)
    return Finding(
        "threads", value, "warning", f"ranks wait for each other's threads: unset OMP_NUM_THREADS, or set it to {fair}"
    )
