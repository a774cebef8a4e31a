"""Environment variables that change how ranks communicate and compute."""

import os
from collections.abc import Mapping, Sequence

from longctx.doctor.findings import Finding, few
from longctx.health.beat import FOLDER
from longctx.parallel.one_machine import STORE
from longctx.train.agreement import differences

_PREFIXES = (
    "NCCL_",
    "GLOO_",
    "TORCH_NCCL_",
    "TORCH_DISTRIBUTED_",
    "FI_",
    "UCX_",
    "OMP_",
    "KMP_",
    "MKL_",
    "CUDA_",
    "LONGCTX_",
)
_NAMES = ("TP_SOCKET_IFNAME", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")
_OF_A_RANK = ("CUDA_VISIBLE_DEVICES", "NCCL_IB_HCA", "OMP_NUM_THREADS")
"""Variables that may differ between ranks and nodes."""
_OF_THE_LAUNCHER = (FOLDER, STORE)
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": "the host waits for every kernel",
    "NCCL_P2P_DISABLE": "GPUs of a node do not use NVLink",
    "NCCL_SHM_DISABLE": "GPUs of a node do not use shared memory",
    "NCCL_IB_DISABLE": "NCCL does not use InfiniBand or EFA",
    "TORCH_NCCL_BLOCKING_WAIT": "the host waits in every collective",
}
_OFF = ("", "0", "false")


def read_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that matter here, by name."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name.startswith(_PREFIXES) or name in _NAMES) and name not in _OF_THE_LAUNCHER
    }


def check_environment(variables: Mapping[str, str], has_fabric: bool) -> list[Finding]:
    """Check the variables of a rank. `has_fabric`: whether its node has InfiniBand or EFA."""
    shown = [f"{name}={value}" for name, value in variables.items()]
    found = [Finding("environment", " ".join(shown) or "nothing set")]
    for name, effect in _SLOW.items():
        is_set = variables.get(name, "").lower() not in _OFF
        if is_set and (name != "NCCL_IB_DISABLE" or has_fabric):
            found.append(
                Finding(name, variables[name], "warning", f"{effect}: unset {name}, unless you look for a fault")
            )
    return found


def check_same_environment(ranks: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Check that all ranks, in rank order, have the same variables."""
    common = [{name: value for name, value in one.items() if name not in _OF_A_RANK} for one in ranks]
    found = differences(common)
    if not found:
        return []
    return [
        Finding(
            "environments differ",
            few(found, "; "),
            "warning",
            "ranks that communicate by different rules may hang or be slow: set these variables in the job's script",
        )
    ]
