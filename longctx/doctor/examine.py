"""Examination of a job's machines: every rank reads and measures, and all ranks get the same report."""

import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from longctx.doctor import clocks, disk, links, node_links, stragglers
from longctx.doctor.devices import Devices, check_devices, read_devices
from longctx.doctor.environment import check_environment, check_same_environment, read_environment
from longctx.doctor.fabric import Fabric, check_fabric, check_use, read_fabric
from longctx.doctor.findings import Finding, merged
from longctx.doctor.limits import ProcessLimits, check_limits, read_limits
from longctx.doctor.network import Network, check_network, read_network
from longctx.doctor.ranks import Places, gather
from longctx.doctor.units import flops, rate
from longctx.doctor.versions import check_versions, read_versions
from longctx.hardware_profile import CollectiveTimes, HardwareProfile, Node, RankRates
from longctx.health.monitor import Monitor, monitored
from longctx.parallel.rank_errors import RankError
from longctx.recipe.tables import TrainConfig
from longctx.train.process_group import device_type, process_group

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int = stragglers.ROUNDS
    most_rounds: int = stragglers.MOST_ROUNDS
    seconds: float = stragglers.SECONDS
    """Per rate and round."""
    file_bytes: int = disk.FILE_BYTES
    sizes: tuple[int, ...] | None = None
    """Bytes that each rank contributes to a collective; None: those of the device type."""


@dataclass(frozen=True)
class DoctorReport:
    """What was found."""

    findings: list[Finding]
    profile: HardwareProfile


@dataclass(frozen=True)
class Facts:
    """What a rank reads of its node and of its own process."""

    machine: str
    """Identifies the node: two machines may have one name, as `localhost`."""
    versions: Mapping[str, str]
    devices: Devices
    limits: ProcessLimits
    network: Network
    fabric: Fabric
    environment: Mapping[str, str]


def examine(
    directory: Path,
    *,
    timeout: float,
    stacks: Path,
    announce: Callable[[str], None],
    finish: Callable[[DoctorReport], None],
    effort: Effort | None = None,
) -> DoctorReport:
    """Examine the machines of this process's job; return the report, the same on every rank. Every rank calls it.

    `directory`: of the run. `timeout`: seconds per collective. `stacks`: folder for the ranks' stacks if they hang.
    `announce` is told on rank 0 what is measured, and `finish` there the report, before any rank ends. Raises UserError
    if the ranks do not find each other, RankError if they lose each other.
    """
    kind = device_type(TrainConfig(steps=1))
    with process_group(kind, timeout), monitored(timeout, stacks) as monitor:
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        report = _Examination(device, timeout, announce, monitor).run(directory, effort or Effort())
        if dist.get_rank() == 0:
            finish(report)
        dist.barrier()
        return report


class _Examination:
    def __init__(self, device: torch.device, timeout: float, announce: Callable[[str], None], monitor: Monitor) -> None:
        self._device, self._timeout, self._monitor = device, timeout, monitor
        self._rank = dist.get_rank()
        self._announce = announce

    @contextmanager
    def _phase(self, name: str) -> Iterator[Callable[[], None]]:
        """Name what the ranks do, for rank 0's terminal, the report of a hang, and errors of communication.

        Yields what is to be called before each measurement: the time in which ranks have to arrive begins anew.
        """
        step = partial(self._monitor.enter, name, name)
        step()
        if self._rank == 0:
            self._announce(name)
        try:
            yield step
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise RankError(
                f"{name}: rank {self._rank} failed: {reason}. If that is a timeout or a closed connection, the "
                "rank that failed first has the cause in its log"
            ) from error

    def run(self, directory: Path, effort: Effort) -> DoctorReport:
        with self._phase("reading versions, limits and networks"):
            local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            facts = gather(read_facts(self._device, local_ranks))
            places = Places.of([one.machine for one in facts])
        with self._phase("measuring clocks"):
            offsets = clocks.measure_offsets(places.leaders)
        with self._phase("measuring matrix products and copies") as step:
            rates = stragglers.measure_rates(self._device, effort.rounds, effort.most_rounds, effort.seconds, step)
        with self._phase("measuring links") as step:
            times = links.measure_links(places, self._device, self._timeout, effort.sizes, step)
            of_nodes = node_links.measure_node_links(places.leaders, self._device, self._timeout, step=step)
        with self._phase(f"measuring the disk of {directory}") as step:
            stored = disk.measure_disk(directory.absolute(), places, self._rank, effort.file_bytes, step=step)
        return DoctorReport(
            findings(facts, places, offsets, rates, times, of_nodes, stored),
            profile(facts, places, offsets, rates, times, stored),
        )


def read_facts(device: torch.device, local_ranks: int) -> Facts:
    """Read what this process, one of `local_ranks` of its node, sees."""
    network = read_network()
    return Facts(
        machine=f"{network.host_name} {_BOOT_ID.read_text(encoding='ascii').strip()}",
        versions=read_versions(),
        devices=read_devices(device, local_ranks),
        limits=read_limits(),
        network=network,
        fabric=read_fabric(),
        environment=read_environment(),
    )


def findings(
    facts: list[Facts],
    places: Places,
    offsets: list[clocks.Offset],
    rates: list[RankRates],
    times: list[CollectiveTimes],
    of_nodes: list[float],
    stored: disk.DiskFacts,
) -> list[Finding]:
    """Return all findings. `facts` and `rates` are in rank order, `offsets` and `of_nodes` in the order of nodes."""
    kind = facts[0].devices.kind
    names = node_names(facts, places)
    of_ranks = [names[places.node_of(rank)] for rank in range(places.size)]
    by_node = {
        name: _check_node(facts[ranks[0]], len(ranks), places) for name, ranks in zip(names, places.nodes, strict=True)
    }
    checked_rates = [
        stragglers.check_rates(f"matmul {dtype}", [one.matmul[dtype] for one in rates], flops, of_ranks, kind)
        for dtype in stragglers.DTYPES
    ] + [stragglers.check_rates("copy", [one.copy_rate for one in rates], rate, of_ranks, kind)]
    memory = sum(one.devices.memory for one in facts) if kind == "cuda" else None
    return [
        *check_versions([one.versions for one in facts], kind),
        *merged(by_node),
        *check_same_environment([one.environment for one in facts]),
        *clocks.check_clocks(offsets, names),
        *checked_rates,
        *links.describe_links(times),
        *node_links.check_node_links(of_nodes, names),
        *_check_adapters(facts, places, times),
        *disk.check_disk(stored, places, of_ranks, memory),
    ]


def node_names(facts: list[Facts], places: Places) -> list[str]:
    """Return a different name for each node: host names, with the lowest rank where two are the same."""
    hosts = [facts[ranks[0]].network.host_name for ranks in places.nodes]
    return [
        host if hosts.count(host) == 1 else f"{host} (rank {ranks[0]})"
        for host, ranks in zip(hosts, places.nodes, strict=True)
    ]


def _check_node(facts: Facts, local_ranks: int, places: Places) -> list[Finding]:
    nodes, has_fabric = len(places.nodes), facts.fabric.is_there
    limits = check_limits(
        facts.limits, ranks=places.size, local_ranks=local_ranks, kind=facts.devices.kind, has_fabric=has_fabric
    )
    return [
        *check_devices(facts.devices, local_ranks),
        *limits,
        *check_network(facts.network, facts.environment, nodes),
        *check_fabric(facts.fabric, nodes),
        *check_environment(facts.environment, has_fabric),
    ]


def _check_adapters(facts: list[Facts], places: Places, times: list[CollectiveTimes]) -> list[Finding]:
    """Compare the measured speed between nodes with that of their adapters, where NCCL communicates."""
    adapters = min(facts[rank].fabric.bandwidth for rank in places.leaders)
    measured = [one.bandwidth for one in times if one.scope == "between" and one.backend == "nccl"]
    if not measured or not adapters:
        return []
    return [check_use(adapters, max(measured) * places.most_per_node)]


def profile(
    facts: list[Facts],
    places: Places,
    offsets: list[clocks.Offset],
    rates: list[RankRates],
    times: list[CollectiveTimes],
    stored: disk.DiskFacts,
) -> HardwareProfile:
    """Return the hardware profile; arguments as for `findings`."""
    nodes = [
        Node(
            name=name,
            ranks=ranks,
            cores=facts[ranks[0]].limits.cores,
            memory=facts[ranks[0]].devices.main_memory,
            device_names=tuple(facts[rank].devices.name for rank in ranks),
            clock_offset=offset.offset,
            clock_uncertainty=offset.uncertainty,
        )
        for name, ranks, offset in zip(node_names(facts, places), places.nodes, offsets, strict=True)
    ]
    first = facts[0].devices
    return HardwareProfile(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=dict(facts[0].versions),
        device="cuda" if first.kind == "cuda" else "cpu",
        device_name=first.name,
        device_memory=min(one.devices.memory for one in facts),
        ranks=places.size,
        ranks_per_node=places.most_per_node,
        nodes=tuple(nodes),
        matmul={dtype: min(one.matmul[dtype] for one in rates) for dtype in stragglers.DTYPES},
        copy_rate=min(one.copy_rate for one in rates),
        rank_rates=tuple(rates),
        links=tuple(times),
        disk=disk.to_profile(stored),
    )
