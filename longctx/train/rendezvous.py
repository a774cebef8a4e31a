"""Rendezvous of a run: how its ranks find each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from longctx.parallel.local_ranks import init_local_group
from longctx.parallel.one_machine import LOOPBACK, STORE


@contextmanager
def single_rank_environment() -> Iterator[None]:
    """Set torchrun's environment variables of a job of one rank for the block, and the interface that it listens on."""
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    added = rank | {name: os.environ.get(name, value) for name, value in LOOPBACK.items()}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def init_alone(backend: str, timeout: float) -> None:
    """Initialise the default process group of one rank, which is reached by nobody."""
    limit = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)


def init_job(backend: str, timeout: float) -> None:
    """Initialise the default process group with the other ranks of this process's job.

    Ranks that `longctx.launch.local` started find each other through a file, others at MASTER_ADDR and MASTER_PORT.
    """
    if STORE in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        init_local_group(backend, os.environ[STORE], rank, size, timeout)
        return
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
