"""Lazy tensors: written to a torch.distributed.checkpoint folder one by one, each materialised as it is written."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from longctx.checkpoint.storage import SINGLE_PROCESS_WARNING, Writer


@dataclass(frozen=True)
class LazyTensor:
    """A float32 tensor that is materialised when it is written."""

    shape: torch.Size
    make: Callable[[int, int], Tensor]
    """Returns rows [begin, end) on the CPU."""
    rows: int | None = None
    """Rows per call of `make`; all of them if None."""


class _LazyPlanner(DefaultSavePlanner):
    """Materialises the tensors of a save plan as they are written: one shard, in its own file, per call of `make`."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        # The names are final.
        super().__init__(flatten_state_dict=False)
        self._tensors = tensors

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[shard for item in plan.items for shard in self._shards(item)])
        return self.plan

    def _shards(self, item: WriteItem) -> list[WriteItem]:
        lazy = self._tensors.get(item.index.fqn)
        if lazy is None or lazy.rows is None or lazy.rows >= lazy.shape[0]:
            return [item]
        assert item.tensor_data is not None
        shards = []
        for begin in range(0, lazy.shape[0], lazy.rows):
            offsets = torch.Size([begin, *[0] * (len(lazy.shape) - 1)])
            sizes = torch.Size([min(lazy.rows, lazy.shape[0] - begin), *lazy.shape[1:]])
            data = replace(item.tensor_data, chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes))
            index = MetadataIndex(item.index.fqn, offsets)
            shards.append(replace(item, index=index, type=WriteItemType.SHARD, tensor_data=data))
        return shards

    def lookup_object(self, index: MetadataIndex) -> Any:
        lazy = self._tensors.get(index.fqn)
        if lazy is None:
            return self.state_dict[index.fqn]
        rows = lazy.shape[0] if lazy.shape else 1
        begin = index.offset[0] if index.offset else 0
        end = min(rows, begin + (lazy.rows or rows))
        tensor = lazy.make(begin, end)
        assert tensor.dtype == torch.float32, index
        assert tensor.shape == (lazy.shape and torch.Size([end - begin, *lazy.shape[1:]])), index
        return tensor


def write_lazy(folder: Path, tensors: Mapping[str, LazyTensor], objects: Mapping[str, Any] | None = None) -> None:
    """Write named tensors, one after the other, and other objects into a folder, from one process.

    An error in materialising or writing a tensor is raised unchanged.
    """
    state = {name: torch.empty(lazy.shape, device="meta") for name, lazy in tensors.items()} | dict(objects or {})
    writer = Writer(folder, single_file_per_rank=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=SINGLE_PROCESS_WARNING)
            dcp.save(state, storage_writer=writer, planner=_LazyPlanner(tensors), no_dist=True)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
