"""Versions: those of this process, differences between ranks, and missing parts."""

import torch
import torch.distributed as dist

import longctx
from longctx.doctor.versions import check_versions, read_versions

GOOD = {
    "longctx": "1",
    "Python": "3.12",
    "torch": "2.13",
    "backends": "gloo, nccl",
    "native kernels": "C++ kernels (a)",
}


def bad(ranks: list[dict[str, str]], kind: str = "cpu") -> list[tuple[str, str, str]]:
    return [(one.name, one.value, one.status) for one in check_versions(ranks, kind) if one.status != "ok"]


def test_the_versions_are_those_of_this_process() -> None:
    found = read_versions()
    assert (found["longctx"], found["torch"]) == (longctx.__version__, torch.__version__)
    assert "megatron-core" not in found or found["megatron-core"]
    assert ("nccl" in found["backends"]) == dist.is_nccl_available()


def test_ranks_that_agree_are_ok() -> None:
    assert bad([GOOD, GOOD]) == []
    assert [one.value for one in check_versions([GOOD], "cpu")][3] == "backends: gloo, nccl"


def test_versions_that_differ_are_wrong() -> None:
    expected = ("versions differ", 'torch: "2.13" on ranks 0-1, "2.12" on rank 2', "wrong")
    assert bad([GOOD, GOOD, GOOD | {"torch": "2.12"}]) == [expected]


def test_other_kernels_are_a_warning() -> None:
    (found,) = bad([GOOD, GOOD | {"native kernels": "C++ kernels (a), g++ 13"}])
    assert (found[0], found[2]) == ("versions differ", "warning")
    assert "on rank 1" in found[1]


def test_a_torch_without_the_backend_is_wrong() -> None:
    cpu_build = GOOD | {"backends": "gloo"}
    assert bad([cpu_build], "cpu") == []
    assert [name for name, _, _ in bad([cpu_build], "cuda")] == ["backend"]


def test_slow_kernels_are_a_warning_on_a_cpu() -> None:
    slow = GOOD | {"native kernels": "torch operators: no C++ compiler"}
    assert bad([slow]) == [("native kernels", "torch operators: no C++ compiler", "warning")]
    assert bad([slow], "cuda") == []
