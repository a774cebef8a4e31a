"""Process group of a run: device selection, initialisation, and errors of collectives."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from ipaddress import ip_address

import torch
import torch.distributed as dist

from longctx.errors import UserError
from longctx.parallel.rank_errors import RankError
from longctx.recipe.tables import TrainConfig
from longctx.train.machines import Machine, gather_machines, name_peers
from longctx.train.rendezvous import init_alone, init_job, single_rank_environment

_PEER = re.compile(r"\[([\da-f.:]+)\]:\d+")
"""Address in an error of gloo's: `Connection closed by peer [10.0.0.7]:41664`."""
_machines: tuple[Machine, ...] = ()
"""Of each rank of the default process group, where that is over several machines; for messages."""


def device_type(config: TrainConfig) -> str:
    """Return the device type of this machine's ranks, `cpu` or `cuda`.

    Raises UserError if CUDA is requested and there are fewer GPUs than local ranks.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cuda" and gpus < local_ranks:
        raise UserError(f"train.device: 'cuda' needs one GPU per local rank ({local_ranks}); there are {gpus}")
    return "cuda" if config.device != "cpu" and gpus >= local_ranks else "cpu"


@contextmanager
def process_group(kind: str, timeout: float) -> Iterator[None]:
    """Initialise the default process group from torchrun's environment variables; without them, one rank.

    Collectives time out after `timeout` seconds. The group is destroyed when the block exits. Raises UserError if the
    ranks do not find each other.
    """
    alone = "RANK" not in os.environ
    with single_rank_environment() if alone else nullcontext():
        if kind == "cuda":
            torch.cuda.set_device(_local_rank())
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        # Not bound to a device (`device_id`): DeviceMesh would then make its groups by split_group, which failed with
        # two backends (pytorch issue 159200), instead of by new_group.
        (init_alone if alone else init_job)(backend, timeout)
        try:
            with _known_machines():
                yield
        finally:
            dist.destroy_process_group()


@contextmanager
def _known_machines() -> Iterator[None]:
    """Know the machines of all ranks in the block. Collective."""
    global _machines  # as the default process group is, whose errors it names
    with collective_errors("at the start"):
        _machines = gather_machines()
    try:
        yield
    finally:
        _machines = ()


def _local_rank() -> int:
    if "LOCAL_RANK" not in os.environ:
        raise UserError("RANK is set, but LOCAL_RANK is not: set it to the number of the rank's GPU on its machine")
    return int(os.environ["LOCAL_RANK"])


@contextmanager
def collective_errors(phase: str) -> Iterator[None]:
    """Turn the failure of a collective inside the block into a RankError that names the `phase` of the run."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise RankError(
                f"{phase}: rank {dist.get_rank()} lost contact with {_peer(error)}, which died or timed out. "
                "--resume auto continues from the last complete checkpoint."
            ) from error
        raise


def _peer(error: RuntimeError) -> str:
    """Return the rank with which contact is lost, by its machine if that is another one and known."""
    match = _PEER.search(str(error))
    if match is None or ip_address(match[1]).is_loopback:
        return "another rank"
    return name_peers(match[1], _machines)
