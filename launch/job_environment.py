"""Environment of a job: how this process learns that a scheduler started it, and as which of the job's ranks or nodes.

Read are, in this order: torchrun's variables, which wrapper scripts set too; PET_*, torchrun's own arguments as
Kubeflow Trainer and `longctx launch` set them, once per node; Slurm's of a step (srun); Open MPI's; those of PMI, which
MPICH and Intel MPI set; and the index of a Kubernetes indexed job. A job of one task is none: its process starts ranks
itself.

Imports no torch: what is found is set before torch is imported.
"""

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from longctx.errors import UserError

_MAX_PORT = 2**16 - 1
_FIRST_PORT, _PORTS = 15_000, 15_000
"""Ports for rank 0 where the scheduler names none: below those that Linux gives to connections (from 32,768)."""
_OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
"""Variables of rank, size, local rank and local size."""
_SLURM_STEP = "Slurm step"


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a job meet: rank 0's machine and port."""

    address: str
    port: int


@dataclass(frozen=True)
class RankOfJob:
    """This process is one rank of a job."""

    found: str
    """What says so, for messages: `Slurm step 12.0`."""
    rank: int
    size: int
    """Ranks of the job."""
    local_rank: int | None
    """Number of the rank on its node, and of its GPU; None: nothing says."""
    local_size: int
    """Ranks of its node."""
    meeting: Meeting

    @property
    def is_slurm_task(self) -> bool:
        """Whether srun has started it."""
        return self.found.startswith(_SLURM_STEP)

    def variables(self) -> dict[str, str]:
        """Return torchrun's variables of this rank."""
        local = {} if self.local_rank is None else {"LOCAL_RANK": str(self.local_rank)}
        return local | {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.meeting.address,
            "MASTER_PORT": str(self.meeting.port),
        }

    def describe(self) -> str:
        """Return one line that says what was found."""
        nodes = "" if self.local_size == self.size else f", {self.local_size} on this node"
        return (
            f"{self.found}: {counted(self.size, 'rank')}{nodes}; rank 0 at {self.meeting.address}:{self.meeting.port}"
        )


@dataclass(frozen=True)
class NodeOfJob:
    """This process starts the ranks of one of a job's nodes."""

    found: str
    node: int
    nodes: int
    meeting: Meeting
    ranks: int | None = None
    """Ranks per node, if the job says."""

    def describe(self) -> str:
        """Return one line that says what was found."""
        return (
            f"{self.found}: this is node {self.node} of {self.nodes}; rank 0 at {self.meeting.address}:"
            f"{self.meeting.port}"
        )


def find_job(nproc: int | None = None, environment: Mapping[str, str] = os.environ) -> RankOfJob | NodeOfJob | None:
    """Return what this process is in its job; None if it is in none.

    `nproc`: ranks that this process is asked to start (`--nproc`); with it, a job with one task per node is a job of
    nodes. Raises UserError, naming the variables, where they are incomplete, contradict each other or are no numbers.
    """
    variables = _Variables(environment)
    if "PET_NNODES" in environment and "LOCAL_RANK" not in environment:
        return _kubeflow(variables)
    if "RANK" in environment:
        return _torchrun(variables)
    if "SLURM_STEP_ID" in environment:
        return _slurm_step(variables, nproc)
    if "SLURM_JOB_ID" in environment and nproc is None and variables.number("SLURM_JOB_NUM_NODES", 1) > 1:
        raise UserError(
            f"this is the batch script of a Slurm job with {environment['SLURM_JOB_NUM_NODES']} nodes "
            "(SLURM_JOB_NUM_NODES), not one of its tasks: start it with srun, or give --nproc to use this node alone"
        )
    if "OMPI_COMM_WORLD_RANK" in environment:
        return _mpi(variables, "Open MPI", _OPEN_MPI)
    if "PMI_RANK" in environment:
        return _mpi(variables, "PMI", _PMI)
    if "WORLD_SIZE" in environment:
        return _indexed(variables)
    return None


def counted(number: int, noun: str) -> str:
    """Return `1 rank`, `2 ranks`, …"""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class _Variables:
    """Environment variables, read with errors that name them."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def __contains__(self, name: str) -> bool:
        return name in self._environment

    def text(self, name: str, by: str) -> str:
        """Return a variable that must be set where `by` are."""
        if name not in self._environment:
            raise UserError(
                f"{by} set, but {name} is not: set {name} too, or unset {by.removesuffix(' is').removesuffix(' are')} "
                "to launch ranks on this machine"
            )
        return self._environment[name]

    def get(self, name: str) -> str | None:
        return self._environment.get(name)

    def number(self, name: str, default: int | None = None, by: str = "") -> int:
        value = self._environment.get(name, "" if default is None else str(default)) or self.text(name, by)
        if not (value.isascii() and value.isdecimal()):
            raise UserError(f"{name} {value!r}: expected a number; torchrun and clusters set this environment variable")
        return int(value)

    def port(self, name: str, by: str) -> int:
        number = self.number(name, by=by)
        if number > _MAX_PORT:
            raise UserError(f"{name} {number}: expected at most {_MAX_PORT}, the port of rank 0")
        return number


def _torchrun(variables: _Variables) -> RankOfJob:
    by = "RANK is"
    variables.text("WORLD_SIZE", by)
    by = "RANK and WORLD_SIZE are"
    address = variables.text("MASTER_ADDR", by)
    variables.text("MASTER_PORT", by)
    rank, size = variables.number("RANK", by=by), variables.number("WORLD_SIZE", by=by)
    port = variables.port("MASTER_PORT", by)
    if rank >= size:
        raise UserError(f"RANK {rank}: expected less than WORLD_SIZE, {size}; each rank needs its own")
    is_torchrun = "TORCHELASTIC_RUN_ID" in variables
    tasks = variables.number("SLURM_STEP_NUM_TASKS", 0)
    if tasks == size > 1 and not is_torchrun and variables.number("SLURM_PROCID", rank) != rank:
        raise UserError(
            f"RANK is {rank} and SLURM_PROCID is {variables.get('SLURM_PROCID')}, in a Slurm step with as many tasks "
            "as WORLD_SIZE: unset RANK, WORLD_SIZE and LOCAL_RANK, which srun took over from the shell"
        )
    local_size = variables.number("LOCAL_WORLD_SIZE", 1)
    found = "torchrun" if is_torchrun else "RANK and WORLD_SIZE"
    local_rank = variables.number("LOCAL_RANK") if "LOCAL_RANK" in variables else None
    return RankOfJob(found, rank, size, local_rank, local_size, Meeting(address, port))


def _kubeflow(variables: _Variables) -> NodeOfJob | None:
    by = "PET_NNODES is"
    count = variables.text("PET_NNODES", by)
    if ":" in count:
        raise UserError(
            f"PET_NNODES {count!r}: an elastic number of nodes needs torchrun (torchrun -m longctx train …), which "
            "reads PET_* itself"
        )
    nodes = variables.number("PET_NNODES")
    per_node = variables.get("PET_NPROC_PER_NODE") or "auto"
    ranks = variables.number("PET_NPROC_PER_NODE") if per_node not in ("auto", "gpu", "cpu") else None
    if nodes == 1:
        return NodeOfJob("PET_NNODES", 0, 1, Meeting("localhost", 0), ranks)
    node = variables.number("PET_NODE_RANK", by=by)
    if node >= nodes:
        raise UserError(f"PET_NODE_RANK {node}: expected less than PET_NNODES, {nodes}; each node needs its own")
    endpoint = variables.get("PET_RDZV_ENDPOINT")
    if "PET_MASTER_ADDR" not in variables and endpoint is not None:
        address, _, port = endpoint.rpartition(":")
        read = _Variables({"the port of PET_RDZV_ENDPOINT": port})
        meeting = Meeting(address, read.port("the port of PET_RDZV_ENDPOINT", by))
    else:
        meeting = Meeting(variables.text("PET_MASTER_ADDR", by), variables.port("PET_MASTER_PORT", by))
    return NodeOfJob("PET_NNODES", node, nodes, meeting, ranks)


def _slurm_step(variables: _Variables, nproc: int | None) -> RankOfJob | NodeOfJob | None:
    by = "SLURM_STEP_ID is"
    size = variables.number("SLURM_STEP_NUM_TASKS", by=by)
    if size == 1:
        return None
    nodes = variables.number("SLURM_STEP_NUM_NODES", by=by)
    step = f"{variables.text('SLURM_JOB_ID', by)}.{variables.text('SLURM_STEP_ID', by)}"
    found = f"{_SLURM_STEP} {step}"
    node = variables.number("SLURM_NODEID", by=by)
    address = variables.get("MASTER_ADDR") or _first_host(variables, nodes)
    port = variables.port("MASTER_PORT", by) if "MASTER_PORT" in variables else _derived_port(f"slurm {step}")
    meeting = Meeting(address, port)
    if nproc is not None and size == nodes:
        return NodeOfJob(found, node, nodes, meeting)
    local_size = _tasks_of_node(variables.text("SLURM_STEP_TASKS_PER_NODE", by), node)
    rank, local_rank = variables.number("SLURM_PROCID", by=by), variables.number("SLURM_LOCALID", by=by)
    return RankOfJob(found, rank, size, local_rank, local_size, meeting)


def _first_host(variables: _Variables, nodes: int) -> str:
    """Return the address of the step's first node, on which rank 0 runs."""
    if nodes == 1:
        return "localhost"
    name = first_of_hostlist(variables.text("SLURM_STEP_NODELIST", "SLURM_STEP_ID is"))
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        # The address of the node that runs the batch script, the job's first one. Names of nodes are Slurm's own.
        address = variables.get("SLURM_LAUNCH_NODE_IPADDR")
        if address is None:
            raise UserError(
                f"the step's first node, {name!r} (SLURM_STEP_NODELIST), has no address here ({error.strerror}): set "
                "MASTER_ADDR to its name or IP address"
            ) from None
        return address
    return name


def first_of_hostlist(text: str) -> str:
    """Return the first name of a Slurm host list, such as `a01` of `a[01-03,7],b2`."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", text)
    assert match is not None  # every part may be empty
    return "".join(part or "" for part in match.groups())


def _tasks_of_node(text: str, node: int) -> int:
    """Return the tasks of node `node` in Slurm's notation of tasks per node, such as `8(x3),4`."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE {text!r}: expected numbers such as 8(x3),4")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise UserError(f"SLURM_NODEID {node}: SLURM_STEP_TASKS_PER_NODE {text!r} has {len(counts)} nodes")
    return counts[node]


def _mpi(variables: _Variables, found: str, names: tuple[str, ...]) -> RankOfJob | None:
    rank_name, size_name, local_rank_name, local_size_name = names
    by = f"{rank_name} is"
    rank, size = variables.number(rank_name), variables.number(size_name, by=by)
    if size == 1:
        return None
    local_rank, local_size = variables.number(local_rank_name, by=by), variables.number(local_size_name, by=by)
    if "MASTER_ADDR" in variables:
        address = variables.text("MASTER_ADDR", by)
    elif local_size == size:
        address = "localhost"
    else:
        raise UserError(
            f"{found}'s job has {size} ranks ({size_name}) on several nodes, and MASTER_ADDR is not set: give all of "
            "them the address of rank 0's node and a free port (Open MPI: mpirun -x MASTER_ADDR=… -x MASTER_PORT=…)"
        )
    namespace = variables.get("PMIX_NAMESPACE")
    if "MASTER_PORT" in variables or namespace is None:
        port = variables.port("MASTER_PORT", by)
    else:
        port = _derived_port(namespace)
    return RankOfJob(found, rank, size, local_rank, local_size, Meeting(address, port))


def _indexed(variables: _Variables) -> RankOfJob:
    by = "WORLD_SIZE is"
    if "JOB_COMPLETION_INDEX" not in variables:
        variables.text("RANK", by)
    size, rank = variables.number("WORLD_SIZE"), variables.number("JOB_COMPLETION_INDEX")
    if rank >= size:
        raise UserError(f"JOB_COMPLETION_INDEX {rank}: expected less than WORLD_SIZE, {size}")
    meeting = Meeting(variables.text("MASTER_ADDR", by), variables.port("MASTER_PORT", by))
    return RankOfJob("JOB_COMPLETION_INDEX and WORLD_SIZE", rank, size, 0, 1, meeting)


def _derived_port(job: str) -> int:
    """Return a port that all tasks of a job derive alike, and other jobs of a node hardly ever."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
