"""Agreement of the ranks before anything is built: one recipe, one run directory, the same versions.

Nodes with different recipes can train together to the end, to a model that no recipe describes.
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import longctx
from longctx.config import flattened
from longctx.errors import UserError
from longctx.health.diagnosis import name_ranks
from longctx.recipe import Recipe

_BY_CONTENT = ("train.init",)
"""Keys that may differ from machine to machine, as the paths of corpora may: the trainer compares what is there."""
_NAMED = 8
"""Differences that are named; there may be more."""


def check_agreement(recipe: Recipe, out: Path) -> None:
    """Raise UserError on every rank, naming each difference with its ranks and values, unless all ranks agree.

    Compared are the resolved recipe, the run directory `out` and the versions of what computes. Collective.
    """
    own = described(recipe, out)
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    each: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(each, own)
    found = differences(each)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    raise UserError(f"the ranks of this job were started differently: {'; '.join(found[:_NAMED])}{more}")


def described(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Return what all ranks must have in common, by name."""
    tables = recipe.model_dump(mode="json")
    for data in (tables["data"], *(stage["data"] for stage in tables["stage"])):
        data.pop("path", None)
        for source in data.get("mix", ()):
            del source["path"]
    keys = {key: value for key, value in flattened(tables) if key not in _BY_CONTENT}
    return keys | {f"the version of {name}": value for name, value in versions().items()} | {"--out": str(out)}


def versions() -> dict[str, str | None]:
    """Return the versions of what computes, by name; None for what is not installed."""
    found: dict[str, str | None] = {"longctx": longctx.__version__, "Python": platform.python_version()}
    found["torch"] = torch.__version__
    for package in ("triton", "megatron-core", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        found |= {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def differences(each: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe every name whose values differ between ranks, `name: value on ranks 0-3, value on rank 4`."""
    found = []
    for name in dict.fromkeys(name for one in each for name in one):
        ranks_of: dict[str, list[int]] = {}
        for rank, one in enumerate(each):
            text = json.dumps(one.get(name)) if one.get(name) is not None else "none"
            ranks_of.setdefault(text, []).append(rank)
        if len(ranks_of) > 1:
            found.append(f"{name}: {', '.join(f'{text} on {name_ranks(ranks)}' for text, ranks in ranks_of.items())}")
    return found
