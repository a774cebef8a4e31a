"""Sharded checkpoint storage: torch.distributed.checkpoint folders, each with a JSON listing of its files.

The listing is written last and has the size and the checksum of every other file, so that truncated, missing and
changed files are reported before a tensor is read. Callers write a folder under a temporary name and rename it when it
is complete.
"""

import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, SavePlanner
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from longctx.checkpoint.checksums import seal
from longctx.checkpoint.restricted import METADATA, RestrictedPlanner, read_metadata
from longctx.errors import UserError
from longctx.files import sync

SINGLE_PROCESS_WARNING = "torch.distributed is disabled, unavailable or uninitialized"
"""Start of torch's warning when one process reads or writes, which is intended here."""


class Writer(dcp.FileSystemWriter):
    """Raises the OSError behind torch's RuntimeError: for a full disk, torch reports `unexpected pos 704 vs 598`."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def describe_failures(error: CheckpointException) -> str:
    """Return the errors of all failed ranks as text."""
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))


def content_of(folder: Path) -> list[str]:
    """Return the names of a folder's files: all but hidden ones, and torch's metadata."""
    # `.metadata` is the only hidden file that belongs to the content; another one is the writer's lock.
    names = [file.name for file in folder.glob("[!.]*")]
    return sorted([*names, METADATA] if (folder / METADATA).is_file() else names)


def write_listing(folder: Path, name: str, content: Mapping[str, Any], checksums: Mapping[str, str]) -> None:
    """Write `content`, the sizes of all other files and their checksums into `name`, with its own, synced to disk."""
    files = [folder / other for other in content_of(folder) if other != name]
    listing = {"files": {file.name: file.stat().st_size for file in files}, "checksums": dict(checksums)}
    for file in files:
        if file.suffix != ".distcp":  # these are synced by the ranks that write them
            sync(file)
    (folder / name).write_text(seal({**content, **listing}), encoding="utf-8")
    sync(folder / name)
    sync(folder)


def find_damage(folder: Path, files: Mapping[str, int]) -> str | None:
    """Describe the first file that is missing or differs in size from the listing; None if all are intact."""
    for name, size in files.items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes"
            return f"{name} {state}, expected {size} bytes"
    return None


class Reader(dcp.FileSystemReader):  # noqa: TID251 - made safe here
    """A FileSystemReader that runs nothing that the folder names, and caches its metadata across reads."""

    refusal: UserError | None = None
    """Why the metadata cannot be read: torch 2.11 reports only that there is none."""

    @cached_property
    def _metadata(self) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        try:
            return self._metadata
        except UserError as error:
            self.refusal = error
            raise


class RegionPlanner(RestrictedPlanner):
    """Load planner for regions of stored tensors, with offsets `begin` in the first dims and 0 in the others."""

    def __init__(self, *begin: int) -> None:
        super().__init__()
        self._begin = begin

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, tensor in self.state_dict.items():
            offsets = torch.Size([*self._begin, *[0] * (tensor.dim() - len(self._begin))])
            chunk = ChunkStorageMetadata(offsets=offsets, sizes=tensor.shape)
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]


def read_tensors(
    path: Path,
    tensors: dict[str, Any],
    reader: Reader | None = None,
    planner: RestrictedPlanner | None = None,
    *,
    no_dist: bool = False,
) -> None:
    """Read tensors of `path` into `tensors`, in place, from any number of ranks to any other.

    A collective call, or a call of one process if there is no process group or `no_dist` is set. Nothing that the
    files name is run (`longctx.checkpoint.restricted`). Raises UserError with the reason if they cannot be read.
    """
    no_dist = no_dist or not dist.is_initialized()
    source, planner = reader or Reader(path), planner or RestrictedPlanner()
    try:
        with warnings.catch_warnings():
            if no_dist:
                warnings.filterwarnings("ignore", message=SINGLE_PROCESS_WARNING)
            dcp.load(tensors, storage_reader=source, planner=planner, no_dist=no_dist)  # noqa: TID251 - by Reader
    except CheckpointException as error:
        reason = describe_failures(error)
        if source.refusal is not None and str(source.refusal) not in reason:
            reason = f"{reason}: {source.refusal}"
        raise UserError(f"{path} cannot be read: {reason}") from error
