"""Folders of tensors in the format of torch.distributed.checkpoint, each with a listing of its files as JSON.

The listing is written last and holds every other file's size, so that what was cut short or lost is told before a
tensor is read. A folder is written aside and renamed when it is whole, by whoever writes it.
"""

import json
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
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, WriteResult
from torch.futures import Future as TorchFuture

from longctx.errors import UserError
from longctx.files import sync

ALONE = "torch.distributed is disabled, unavailable or uninitialized"
"""How torch's warning begins where one process reads or writes, which is what is meant there."""

_METADATA = ".metadata"


class Writer(dcp.FileSystemWriter):
    """Says why a file could not be written: torch's word for a full disk is `unexpected pos 704 vs 598`."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def causes(error: CheckpointException) -> str:
    """What went wrong, and on which ranks."""
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))


def write_listing(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write `content` and the sizes of all other files into `name`; on the disk when this returns."""
    # The only hidden one that is of the content: another is the lock of whoever writes.
    files = [*sorted(folder.glob("[!.]*")), folder / _METADATA]
    sizes = {file.name: file.stat().st_size for file in files if file.name != name}
    for file in files:
        if file.suffix != ".distcp":  # which every rank has synced that wrote one
            sync(file)
    (folder / name).write_text(json.dumps({**content, "files": sizes}, indent=1), encoding="utf-8")
    sync(folder / name)
    sync(folder)


def damage(folder: Path, files: Mapping[str, int]) -> str | None:
    """What the first file that is missing, or not of the size in the listing, looks like; None where all are there."""
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            told = "is missing" if found is None else f"has {found} bytes"
            return f"{name} {told}, and was written with {size}"
    return None


class Reader(dcp.FileSystemReader):
    """Reads a folder's metadata once, for as many reads of tensors as there are."""

    @cached_property
    def _metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        return self._metadata


class RegionPlanner(DefaultLoadPlanner):
    """Reads tensors that are parts of larger ones: those that begin at `begin`, and at 0 in the dims that follow."""

    def __init__(self, *begin: int) -> None:
        super().__init__()
        self._begin = begin

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, tensor in self.state_dict.items():
            offsets = torch.Size([*self._begin, *[0] * (tensor.dim() - len(self._begin))])
            chunk = ChunkStorageMetadata(offsets=offsets, sizes=tensor.shape)
            there = self.metadata.state_dict_metadata[name]
            assert isinstance(there, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, there, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]


def read_tensors(
    path: Path,
    tensors: dict[str, Any],
    reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    *,
    alone: bool = False,
) -> None:
    """Read `path` into `tensors`, in place, whatever the number of ranks that wrote it; what is not asked for stays.

    On every rank together, or in one process: where there is no process group, or a rank reads `alone`. Raises
    UserError, saying why, where they cannot be read.
    """
    alone = alone or not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            if alone:
                warnings.filterwarnings("ignore", message=ALONE)
            source = reader or dcp.FileSystemReader(path)
            dcp.load(tensors, storage_reader=source, planner=planner, no_dist=alone)
    except CheckpointException as error:
        raise UserError(f"{path} cannot be read: {causes(error)}") from error
