"""Limits: those of this process, and bad ones."""

import resource
from dataclasses import replace

import torch

from longctx.doctor.findings import Finding
from longctx.doctor.limits import UNLIMITED, ProcessLimits, check_limits, read_limits

GOOD = ProcessLimits(
    open_files=65536,
    most_open_files=UNLIMITED,
    locked_memory=UNLIMITED,
    shared_memory=2**36,
    free_shared_memory=2**36,
    cores=64,
    threads=8,
)


def check(limits: ProcessLimits, ranks: int = 64, has_fabric: bool = True, kind: str = "cuda") -> list[Finding]:
    """What is not ok, of a node with 8 ranks."""
    found = check_limits(limits, ranks=ranks, local_ranks=8, kind=kind, has_fabric=has_fabric)
    assert [one.name for one in found] == ["open files", "locked memory", "/dev/shm", "threads"]
    return [one for one in found if one.status != "ok"]


def test_the_limits_are_those_of_this_process() -> None:
    found = read_limits()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert (found.open_files, found.most_open_files) == (soft, hard)
    assert found.threads == torch.get_num_threads()
    assert 0 <= found.free_shared_memory <= found.shared_memory


def test_good_limits_are_ok() -> None:
    assert check(GOOD) == []
    assert check(replace(GOOD, open_files=UNLIMITED)) == []


def test_few_open_files_can_be_raised_by_the_user_or_by_the_administrator() -> None:
    (found,) = check(replace(GOOD, open_files=1024), ranks=64)
    assert (found.value, found.status) == ("1,024; 64 ranks may need 1,536", "warning")
    assert found.remedy == "ulimit -n 1536 in the job's script"
    (found,) = check(replace(GOOD, open_files=1024, most_open_files=1024), ranks=512)
    assert found.status == "wrong"
    assert "the hard limit is 1,024" in found.remedy


def test_little_locked_memory_is_wrong_where_an_adapter_needs_it() -> None:
    low = replace(GOOD, locked_memory=8 * 2**20)
    (found,) = check(low)
    assert (found.value, found.status) == ("8 MiB", "wrong")
    assert "ulimit -l unlimited" in found.remedy
    assert check(low, has_fabric=False) == []


def test_a_tiny_shared_memory_is_wrong_for_nccl() -> None:
    tiny = replace(GOOD, shared_memory=64 * 2**20, free_shared_memory=64 * 2**20)
    (found,) = check(tiny)
    assert (found.name, found.value, found.status) == ("/dev/shm", "64 MiB free of 64 MiB", "wrong")
    assert "--shm-size=8g" in found.remedy
    assert check(tiny, kind="cpu") == [], "gloo does not use it"


def test_more_threads_than_cores_are_named() -> None:
    (found,) = check(replace(GOOD, threads=64))
    assert (found.value, found.status) == ("64 per rank, 8 ranks on 64 cores", "warning")
    assert found.remedy.endswith("set it to 8")
