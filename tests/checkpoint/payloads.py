"""Crafted checkpoints: payloads in the pickles of a torch.distributed.checkpoint folder."""

import json
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from longctx.checkpoint.checksums import checksum
from longctx.checkpoint.read import TRAINER
from longctx.checkpoint.restricted import METADATA
from longctx.checkpoint.storage import content_of, write_listing


class Payload:
    """Creates the file `mark` if it is unpickled without restriction."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.mark), "w"))


def spoil(folder: Path, mark: Path, where: str) -> None:
    """Put a payload into `.metadata`, into a file `*.pt`, or in place of the entries whose names begin with `where`,
    tensors too; the folder's listing, where there is one, becomes that of the new files."""
    if where == METADATA:
        metadata = _metadata(folder)
        metadata.planner_data = Payload(mark)
        (folder / METADATA).write_bytes(pickle.dumps(metadata))
    elif where.endswith(".pt"):
        torch.save(Payload(mark), folder / where)
    else:
        _replace_entries(folder, mark, where)
    if (folder / TRAINER).exists():
        state = json.loads((folder / TRAINER).read_text())["state"]
        sums = {name: checksum(folder / name) for name in content_of(folder) if name != TRAINER}
        write_listing(folder, TRAINER, {"state": state}, sums)


def _metadata(folder: Path) -> Metadata:
    metadata: Metadata = pickle.loads((folder / METADATA).read_bytes())
    return metadata


def _replace_entries(folder: Path, mark: Path, where: str) -> None:
    torch.save(Payload(mark), folder / "payload.distcp")
    payload = _StorageInfo("payload.distcp", 0, (folder / "payload.distcp").stat().st_size)
    metadata = _metadata(folder)
    stored = {index: info for index, info in metadata.storage_data.items() if not index.fqn.startswith(where)}
    for name in metadata.state_dict_metadata:
        if name.startswith(where):
            metadata.state_dict_metadata[name] = BytesStorageMetadata()
            stored[MetadataIndex(name)] = payload
    metadata.storage_data = stored
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
