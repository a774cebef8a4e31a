"""Hardware profile: the measured speeds and sizes of a machine or a job, as `longctx doctor --json FILE` writes them.

Below everything that plans with it. Units: bytes, seconds, FLOP/s and bytes per second; never multiples of them.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from longctx.config import Config
from longctx.errors import UserError

FORMAT: Literal[1] = 1
"""Version of the format: raised when a field changes its meaning or is removed."""

Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv"]
Scope = Literal["node", "between", "all"]


class Sample(Config):
    """Time of a collective at one size."""

    bytes: int = Field(gt=0)
    """Bytes that each rank contributes: all of its input."""
    seconds: float = Field(gt=0)
    """Time of one call, including the wait for the result: the median over calls of the slowest rank."""


class CollectiveTimes(Config):
    """Times of one collective over groups of one size."""

    collective: Collective
    """`send_recv`: every rank sends to the next one and receives from the previous one, as ring attention does."""
    scope: Scope
    """`node`: each group is the ranks of one node. `between`: one rank of each node; the ranks of a node are in as many
    groups, which communicate at the same time and share the node's links. `all`: one group of all ranks."""
    backend: Literal["gloo", "nccl"]
    """Library that communicates."""
    ranks: int = Field(ge=2)
    """Ranks of the largest group."""
    samples: tuple[Sample, ...]
    """By ascending size."""
    latency: float
    """Seconds of the smallest sample."""
    bandwidth: float
    """Bytes per second that a rank receives from other ranks, at the largest sample."""


class RankRates(Config):
    """Measured rates of one rank: the best of several rounds in which all ranks computed at the same time."""

    rank: int
    matmul: dict[str, float]
    """FLOP/s of large square matrix products by dtype, `float32` and `bfloat16`."""
    copy_rate: float
    """Bytes per second, reads plus writes, of a copy within the device's memory."""


class Node(Config):
    """One machine of the job."""

    name: str
    """Host name."""
    ranks: tuple[int, ...]
    """Ranks that run on it."""
    cores: int
    """CPU cores that they may use."""
    memory: int
    """Bytes of its main memory."""
    device_names: tuple[str, ...]
    """Model of each rank's GPU or CPU, in the order of `ranks`."""
    clock_offset: float
    """Seconds that its clock is ahead of that of rank 0's node."""
    clock_uncertainty: float
    """The true offset differs from `clock_offset` by at most this many seconds."""


class Disk(Config):
    """Speeds of the directory of a run, with all ranks at work, each on a file of its own."""

    path: str
    free: int
    """Free bytes."""
    file_bytes: int
    """Size of each rank's file in the measurement."""
    write: float
    """Bytes per second, of all ranks together, including fsync."""
    read: float
    """Bytes per second, of all ranks together; each rank reads a file of another node, if there are several."""


class HardwareProfile(Config):
    """Everything that was measured."""

    format: Literal[1] = FORMAT
    """Version of this format."""
    created: str
    """Time of the measurement, ISO 8601 in UTC."""
    versions: dict[str, str]
    """Versions of what computes, by name: longctx, Python, torch, triton, NCCL and so on."""
    device: Literal["cpu", "cuda"]
    """Type of the ranks' devices."""
    device_name: str
    """Model of rank 0's device."""
    device_memory: int
    """Bytes of memory per rank, the smallest of all ranks: of its GPU; on a CPU, of its node divided by its ranks."""
    ranks: int
    """Number of ranks."""
    ranks_per_node: int
    """Ranks of the node with the most."""
    nodes: tuple[Node, ...]
    """The machines, in the order of their lowest ranks."""
    matmul: dict[str, float]
    """FLOP/s per rank by dtype: those of the slowest rank, which all others wait for."""
    copy_rate: float
    """Bytes per second, reads plus writes, of copies on the slowest rank."""
    rank_rates: tuple[RankRates, ...]
    """The rates of each rank."""
    links: tuple[CollectiveTimes, ...]
    """Times of collectives; empty for a single rank."""
    disk: Disk | None
    """None: the directory could not be written, or is not the same on all nodes."""


def save_profile(profile: HardwareProfile, file: Path) -> None:
    """Write a profile as JSON."""
    file.write_text(profile.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_profile(file: Path) -> HardwareProfile:
    """Read a profile. Raises UserError if there is no such file, or it is not a profile of this format."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read: {error.strerror}; longctx doctor --json {file} writes a hardware profile"
        ) from None
    except UnicodeDecodeError:
        text = ""
    try:
        return HardwareProfile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{file}: not a hardware profile of format {FORMAT}: {where}: {first['msg']}; write it anew with longctx "
            f"doctor --json {file}"
        ) from None
