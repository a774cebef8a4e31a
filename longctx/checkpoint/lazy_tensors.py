"""Folders of tensors that are made as they are written, in the format of torch.distributed.checkpoint."""

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

from longctx.checkpoint.storage import ALONE, Writer


@dataclass(frozen=True)
class LazyTensor:
    """A float32 tensor that is made when it is written."""

    shape: torch.Size
    make: Callable[[int, int], Tensor]
    """Its rows from the first number up to the second, on the CPU."""
    rows: int | None = None
    """Those that are made at one time; all where None."""


class _Making(DefaultSavePlanner):
    """Makes the tensors of a plan as they are written, each piece in a file of its own."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        # Names are whole already.
        super().__init__(flatten_state_dict=False)
        self._tensors = tensors

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[piece for item in plan.items for piece in self._pieces(item)])
        return self.plan

    def _pieces(self, item: WriteItem) -> list[WriteItem]:
        made = self._tensors.get(item.index.fqn)
        if made is None or made.rows is None or made.rows >= made.shape[0]:
            return [item]
        assert item.tensor_data is not None
        pieces = []
        for begin in range(0, made.shape[0], made.rows):
            offsets = torch.Size([begin, *[0] * (len(made.shape) - 1)])
            sizes = torch.Size([min(made.rows, made.shape[0] - begin), *made.shape[1:]])
            data = replace(item.tensor_data, chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes))
            index = MetadataIndex(item.index.fqn, offsets)
            pieces.append(replace(item, index=index, type=WriteItemType.SHARD, tensor_data=data))
        return pieces

    def lookup_object(self, index: MetadataIndex) -> Any:
        made = self._tensors.get(index.fqn)
        if made is None:
            return self.state_dict[index.fqn]
        rows = made.shape[0] if made.shape else 1
        begin = index.offset[0] if index.offset else 0
        end = min(rows, begin + (made.rows or rows))
        tensor = made.make(begin, end)
        assert tensor.dtype == torch.float32, index
        assert tensor.shape == (made.shape and torch.Size([end - begin, *made.shape[1:]])), index
        return tensor


def write_lazy(folder: Path, tensors: Mapping[str, LazyTensor], objects: Mapping[str, Any] | None = None) -> None:
    """Write tensors by their names into a folder, in one process, one after the other; and objects that are none.

    What goes wrong in making or writing one is raised as it is.
    """
    given = {name: torch.empty(made.shape, device="meta") for name, made in tensors.items()} | dict(objects or {})
    writer = Writer(folder, single_file_per_rank=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=ALONE)
            dcp.save(given, storage_writer=writer, planner=_Making(tensors), no_dist=True)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
