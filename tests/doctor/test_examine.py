"""The examination: findings and profile of bad nodes, and of ranks that examine this machine."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longctx.bench import rates as bench_rates
from longctx.doctor import disk
from longctx.doctor.clocks import Offset
from longctx.doctor.examine import DoctorReport, Effort, Facts, _Examination, findings, node_names, profile
from longctx.doctor.fabric import Fabric, Port
from longctx.doctor.findings import Finding, worst
from longctx.doctor.ranks import Places
from longctx.hardware_profile import CollectiveTimes, RankRates, Sample
from longctx.health.monitor import Monitor
from longctx.parallel.local_ranks import LocalRanks
from longctx.parallel.rank_errors import RankError
from tests.doctor.test_devices import H100
from tests.doctor.test_disk import GOOD as DISK
from tests.doctor.test_limits import GOOD as LIMITS
from tests.doctor.test_network import GOOD as NETWORK
from tests.doctor.test_versions import GOOD as VERSIONS

CPU = torch.device("cpu")
QUICK = Effort(rounds=1, most_rounds=1, seconds=0.005, file_bytes=2**20, sizes=(4096,))
PLACES = Places(((0, 1), (2, 3)))
PORTS = tuple(Port(f"mlx5_{number}", "mlx5_core", "ACTIVE", 400.0, "InfiniBand") for number in range(2))


def facts(node: str) -> Facts:
    network = replace(NETWORK, host_name=node)
    return Facts(node, VERSIONS, replace(H100, seen=2, present=2), LIMITS, network, Fabric(PORTS, 0), {})


def links(bandwidth: float) -> list[CollectiveTimes]:
    sample = Sample(bytes=2**20, seconds=1e-3)
    return [
        CollectiveTimes(
            collective="all_gather",
            scope="between",
            backend="nccl",
            ranks=2,
            samples=(sample,),
            latency=1e-3,
            bandwidth=bandwidth,
        )
    ]


def rates(slow: float = 1.0) -> list[RankRates]:
    """Of four ranks, the last one slower."""
    matmul = {"float32": 5e13, "bfloat16": 6e14}
    even = [RankRates(rank=rank, matmul=matmul, copy_rate=2e12) for rank in range(3)]
    return [*even, RankRates(rank=3, matmul=matmul | {"bfloat16": slow * 6e14}, copy_rate=2e12)]


def bad(each: list[Facts], *, offset: float = 0.0, slow: float = 1.0, bandwidth: float = 4e10) -> list[Finding]:
    offsets = [Offset(0.0, 0.0), Offset(offset, 1e-4)]
    found = findings(each, PLACES, offsets, rates(slow), links(bandwidth), [slow * 1e10, 1e10], DISK)
    return [one for one in found if one.status != "ok"]


GOOD = [facts("gpu-1"), facts("gpu-1"), facts("gpu-2"), facts("gpu-2")]


def test_good_nodes_are_ok() -> None:
    assert bad(GOOD) == []


def test_each_fault_is_found_with_its_place() -> None:
    tiny = replace(LIMITS, open_files=64, shared_memory=2**26, free_shared_memory=2**26)
    ill = replace(GOOD[2], limits=tiny, network=replace(GOOD[2].network, resolved=("127.0.1.1",)))
    found = bad([*GOOD[:2], ill, ill], offset=20.0, slow=0.4, bandwidth=1e9)
    assert [(one.name, one.status, one.where) for one in found] == [
        ("open files", "wrong", "gpu-2"),
        ("/dev/shm", "wrong", "gpu-2"),
        ("host name", "wrong", "gpu-2"),
        ("clocks", "warning", "gpu-2"),
        ("matmul bfloat16", "wrong", ""),
        ("link of each node", "warning", ""),
        ("use of adapters", "wrong", ""),
    ]
    assert "rank 3 on gpu-2 60 % under" in found[4].value


def test_ranks_with_other_versions_and_variables_are_named() -> None:
    other = replace(GOOD[3], versions=VERSIONS | {"torch": "2.12"}, environment={"NCCL_ALGO": "Tree"})
    assert [one.name for one in bad([*GOOD[:3], other])] == ["versions differ", "environments differ"]


def test_nodes_of_one_name_are_told_apart() -> None:
    same = [replace(one, network=replace(one.network, host_name="localhost")) for one in GOOD]
    assert node_names(same, PLACES) == ["localhost (rank 0)", "localhost (rank 2)"]


def test_the_profile_has_what_the_slowest_rank_has() -> None:
    smaller = replace(GOOD[1], devices=replace(GOOD[1].devices, memory=2**30))
    found = profile(
        [GOOD[0], smaller, *GOOD[2:]], PLACES, [Offset(0.0, 0.0), Offset(-0.5, 0.1)], rates(0.5), links(1e9), DISK
    )
    assert (found.device, found.ranks, found.ranks_per_node) == ("cuda", 4, 2)
    assert (found.matmul, found.device_memory) == ({"float32": 5e13, "bfloat16": 3e14}, 2**30)
    assert [(node.name, node.ranks, node.clock_offset) for node in found.nodes] == [
        ("gpu-1", (0, 1), 0.0),
        ("gpu-2", (2, 3), -0.5),
    ]
    assert found.disk == disk.to_profile(DISK)
    assert found.links == tuple(links(1e9))


def examined(directory: str) -> tuple[DoctorReport, list[str]]:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_rates, "COPIED", 2**20)
        patch.setitem(os.environ, "LOCAL_WORLD_SIZE", "2")
        monitor = Monitor(None, 30, Path(directory))
        return _Examination(CPU, 30, said.append, monitor).run(Path(directory), QUICK), said


def test_ranks_examine_this_machine_and_agree(ranks: LocalRanks, tmp_path: Path) -> None:
    (first, said), (second, unsaid) = ranks.run(examined, str(tmp_path), size=2)
    assert first.findings == second.findings
    assert len(said) == 5
    assert unsaid == [], "rank 0 speaks"
    assert worst(first.findings) != "wrong", [one for one in first.findings if one.status == "wrong"]
    names = [one.name for one in first.findings]
    assert {"torch", "open files", "host name", "matmul bfloat16", "all_to_all, inside a node", "disk write"} <= {
        *names
    }
    assert (first.profile.ranks, first.profile.ranks_per_node, len(first.profile.links)) == (2, 2, 5)


def phases(directory: str) -> Counter[str]:
    """The phases that the monitor of hangs is told."""
    entered: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "enter", lambda monitor, kind, name: entered.update([name]))
        examined(directory)
    return entered


def test_the_time_for_ranks_to_arrive_begins_anew_with_each_measurement(ranks: LocalRanks, tmp_path: Path) -> None:
    """Else a slow machine's many measurements would be taken for one that hangs."""
    (first, second) = ranks.run(phases, str(tmp_path), size=2)
    assert first == second
    assert first["measuring matrix products and copies"] == 1 + 3
    assert first["measuring links"] == 1 + 5
    assert first[f"measuring the disk of {tmp_path}"] == 1 + 4


def failing(directory: str) -> str:
    def fail(*arguments: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error\nmore")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longctx.doctor.clocks.measure_offsets", fail)
        monitor = Monitor(None, 30, Path(directory))
        with pytest.raises(RankError) as caught:
            _Examination(CPU, 30, lambda text: None, monitor).run(Path(directory), QUICK)
        return str(caught.value)


def test_a_lost_rank_is_an_error_that_says_in_which_measurement(ranks: LocalRanks, tmp_path: Path) -> None:
    for rank, message in enumerate(ranks.run(failing, str(tmp_path), size=2)):
        assert message.startswith(f"measuring clocks: rank {rank} failed: [gloo/transport/tcp/pair.cc:537] Read error.")
