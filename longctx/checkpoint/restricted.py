"""Reading checkpoints that others wrote: their pickles name no function and no class but those of a checkpoint.

A torch.distributed.checkpoint folder has two kinds of pickles: `.metadata`, and the entries of `.distcp` files that are
not tensors: an optimizer's scalars, in those of other programs and of earlier versions. Unpickling calls what a pickle
names, so a crafted one runs any code. Here `.metadata` may name only what torch's metadata consists of, and the other
entries are read as `torch.load` reads with `weights_only=True`.
"""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner  # noqa: TID251 - made safe here
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import ReadItem

from longctx.errors import UserError

METADATA = ".metadata"

_OF_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_OF_METADATA, name) for name in ("Metadata", "StorageMeta", "MetadataIndex", "TensorProperties")),
    *((_OF_METADATA, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    (_OF_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    # Megatron-Core's checkpoints have the plan by which they were written.
    *(("torch.distributed.checkpoint.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType")),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}
_LAYOUT = ("torch.serialization", "_get_layout")


def _layout(name: str) -> torch.layout:
    """Return the layout of a dense tensor, the only one that is written."""
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"the layout {name!r}")
    return torch.strided


class _Unpickler(pickle.Unpickler):
    """Unpickles `.metadata`; raises UnpicklingError for a name that is not part of one."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle names."""
        if (module, name) == _LAYOUT:
            return _layout
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a checkpoint and was not called")


def read_metadata(folder: Path) -> Metadata:
    """Read the `.metadata` of a torch.distributed.checkpoint folder without running what it names.

    Raises UserError, with the file's name and the reason, if it cannot be read, is not the metadata of a checkpoint, or
    names anything else.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise UserError(f"{METADATA}: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{METADATA}: it is not the metadata of a checkpoint")
    for info in metadata.storage_data.values():
        if not isinstance(info, _StorageInfo) or Path(info.relative_path).name != info.relative_path:
            raise UserError(f"{METADATA}: it refers to a file outside of the checkpoint")
    return metadata


def load_bytes(name: str, value: io.BytesIO) -> Any:
    """Read an entry that is not a tensor: numbers, strings, bytes, containers of them, tensors.

    Raises UserError if it names anything else.
    """
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # the extra state of Transformer Engine's layers
            return torch.load(value, weights_only=True)  # noqa: TID251 - with weights_only
    except pickle.UnpicklingError as error:
        # The rest of torch's message recommends reading without `weights_only`.
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0] or "it is damaged"
        raise UserError(
            f"{name} is neither a number nor a tensor, and nothing that it names was run: {reason}"
        ) from error


class RestrictedPlanner(DefaultLoadPlanner):
    """Load planner that reads entries that are not tensors by `load_bytes`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read an entry and pass it on in a pickle that torch wrote itself, for the base class to place."""
        again = io.BytesIO()
        torch.save(load_bytes(read_item.dest_index.fqn, value), again)
        again.seek(0)
        super().load_bytes(read_item, again)


def check_entries(folder: Path) -> None:
    """Read all in a folder that names anything, for a framework that loads it by itself: `.metadata`, the entries that
    are not tensors, and `*.pt` files.

    Raises UserError as `read_metadata` and `load_bytes` do.
    """
    metadata = read_metadata(folder)
    for file in sorted(folder.glob("*.pt")):
        load_bytes(file.name, io.BytesIO(file.read_bytes()))
    for name, info in _byte_entries(metadata):
        with (folder / info.relative_path).open("rb") as stream:
            stream.seek(info.offset)
            load_bytes(name, io.BytesIO(stream.read(info.length)))


def _byte_entries(metadata: Metadata) -> Iterator[tuple[str, _StorageInfo]]:
    for index, info in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            yield index.fqn, info
