"""Versions of what computes, and whether all ranks have the same."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from longctx.doctor.findings import Finding, Status
from longctx.kernels.native import library
from longctx.train.agreement import differences, versions

_NATIVE = "native kernels"
_ALWAYS = ("longctx", "Python", "torch")


def read_versions() -> dict[str, str]:
    """Return this process's versions by name, and the state of the C++ kernels; what is not there is left out."""
    found = {name: version for name, version in versions().items() if version is not None}
    return found | {_NATIVE: library.describe(), "backends": ", ".join(_backends())}


def _backends() -> list[str]:
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return [name for name, is_there in available.items() if is_there]


def check_versions(ranks: Sequence[Mapping[str, str]], kind: str) -> list[Finding]:
    """Check the versions of all ranks, in rank order. `kind`: the devices' type, `cpu` or `cuda`."""
    first = ranks[0]
    found = [Finding(name, first[name]) for name in _ALWAYS]
    others = [f"{name} {version}" for name, version in first.items() if name not in (*_ALWAYS, _NATIVE)]
    found.append(Finding("other versions", ", ".join(others).replace("backends ", "backends: ")))
    found.append(_native(first[_NATIVE], kind))
    refused = "longctx train refuses such a job"
    found += _differences([{name: one[name] for name in one if name != _NATIVE} for one in ranks], "wrong", refused)
    found += _differences([{_NATIVE: one[_NATIVE]} for one in ranks], "warning", "the slowest rank sets the pace")
    needed = "nccl" if kind == "cuda" else "gloo"
    if needed not in first["backends"]:
        found.append(
            Finding(
                "backend",
                f"torch {torch.__version__} has no {needed}",
                "wrong",
                f"install a build of torch with {needed}",
            )
        )
    return found


def _differences(ranks: Sequence[Mapping[str, str]], status: Status, effect: str) -> list[Finding]:
    remedy = f"install the same on every node (one container image, or one shared environment): {effect}"
    return [Finding("versions differ", difference, status, remedy) for difference in differences(ranks)]


def _native(text: str, kind: str) -> Finding:
    if kind == "cuda" or "torch operators" not in text:
        return Finding(_NATIVE, text)
    return Finding(
        _NATIVE,
        text,
        "warning",
        "install a C++ compiler (g++): without, a CPU takes two to nine times as long",
    )
