"""Rendezvous of a run: how its ranks find each other, and what to check where they do not."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from longctx.errors import UserError
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
    Raises UserError if these do not come together within `timeout` seconds.
    """
    if STORE in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        init_local_group(backend, os.environ[STORE], rank, size, timeout)
        return
    try:
        limit = timedelta(seconds=timeout)
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        # torchrun gives the ranks that it starts again the store of those before them, with the addresses of the dead.
        store = dist.PrefixStore(f"longctx/start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except RuntimeError as error:
        is_from_gloo = "gloo" in str(error).lower()
        if not is_from_gloo and not isinstance(error, dist.DistError):
            raise
        raise UserError(_explain(error, is_from_gloo, timeout)) from error


def _explain(error: RuntimeError, is_from_gloo: bool, timeout: float) -> str:
    """Say what to check after ranks did not come together."""
    rank, host, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    size, at = os.environ["WORLD_SIZE"], f"MASTER_ADDR:MASTER_PORT {host}:{port}"
    same = f"Start every rank with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE ({size}), each with its own RANK"
    reason = str(error).partition("\n")[0].rstrip(".")
    if is_from_gloo:
        return (
            f"rank {rank} has met the others at {at}, but cannot connect to one of them ({reason}). See whether it "
            "has failed; if not, let all machines reach each other on any port, through the network interface that "
            "GLOO_SOCKET_IFNAME names"
        )
    try:
        socket.getaddrinfo(host, None)
    except OSError as failure:
        return (
            f"rank {rank} cannot find MASTER_ADDR {host!r} ({failure.strerror}): give the name or the IP address of "
            f"rank 0's machine as this machine knows it. {same}"
        )
    if isinstance(error, dist.DistStoreError):
        return (
            f"rank {rank} waited {timeout:g} s (parallel.timeout) at {at}, and not all ranks joined ({reason}). "
            f"{same}, and let no firewall block the port"
        )
    return (
        f"rank {rank} cannot join at {at} within {timeout:g} s (parallel.timeout): {reason}. See whether rank 0 "
        f"runs on that machine, and whether a firewall blocks the port or another program has it. {same}"
    )
