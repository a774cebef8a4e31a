"""Environment variables: those that matter, that slow a run down, and that differ between ranks."""

from longctx.doctor.environment import check_environment, check_same_environment, read_environment
from longctx.health.beat import FOLDER


def test_variables_that_matter_are_read() -> None:
    environment = {"NCCL_DEBUG": "INFO", "FI_PROVIDER": "efa", "HOME": "/", "PYTORCH_ALLOC_CONF": "x", FOLDER: "/tmp/x"}
    assert list(read_environment(environment)) == ["FI_PROVIDER", "NCCL_DEBUG", "PYTORCH_ALLOC_CONF"]
    assert check_environment({}, has_fabric=True)[0].value == "nothing set"
    assert check_environment({"A": "1", "B": "x"}, has_fabric=True)[0].value == "A=1 B=x"


def test_what_slows_a_run_down_is_a_warning() -> None:
    bad = {"CUDA_LAUNCH_BLOCKING": "1", "NCCL_P2P_DISABLE": "0", "NCCL_IB_DISABLE": "1"}
    first, *found = check_environment(bad, has_fabric=True)
    assert first.status == "ok"
    assert [(one.name, one.status) for one in found] == [
        ("CUDA_LAUNCH_BLOCKING", "warning"),
        ("NCCL_IB_DISABLE", "warning"),
    ]
    assert [one.name for one in check_environment(bad, has_fabric=False)[1:]] == ["CUDA_LAUNCH_BLOCKING"]


def test_variables_that_differ_are_named_with_their_ranks() -> None:
    same = {"NCCL_ALGO": "Ring", "CUDA_VISIBLE_DEVICES": "0"}
    assert check_same_environment([same, same | {"CUDA_VISIBLE_DEVICES": "1"}]) == []
    (found,) = check_same_environment([same, same, {"NCCL_ALGO": "Tree"}])
    assert found.value == 'NCCL_ALGO: "Ring" on ranks 0-1, "Tree" on rank 2'
    assert found.status == "warning"
