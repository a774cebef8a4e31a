"""Crafted checkpoints: payloads in the pickles of a torch.distributed.checkpoint folder."""

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from longctx.checkpoint.restricted import METADATA


class Payload:
    """Creates the file `mark` if it is unpickled without restriction."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.mark), "w"))


def spoil(folder: Path, mark: Path, where: str) -> None:
    """Put a payload into `.metadata`, or into the entries that are not tensors and whose names begin with `where`."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    if where == METADATA:
        metadata.planner_data = Payload(mark)
    else:
        torch.save(Payload(mark), folder / "payload.distcp")
        for index, info in metadata.storage_data.items():
            is_bytes = isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
            if is_bytes and index.fqn.startswith(where):
                info.relative_path, info.offset = "payload.distcp", 0
                info.length = (folder / "payload.distcp").stat().st_size
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
