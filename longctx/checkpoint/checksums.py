"""Checksums of a folder's files: CRC-32 of each, which a bit that flipped on a disk or a file of another save changes.

They guard against accidents, not against somebody who writes both the files and the listing.
"""

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longctx.errors import UserError
from longctx.files import sync

CHECKSUMS = "checksums.json"
"""The file of checksums in a folder whose format has no listing of ours."""
_SEAL, _NO_SEAL = "listing", "00000000"
_BUFFER = 2**22
_SHARD = re.compile(r"__(\d+)_.*")
"""The name of a file of tensors, with the number of the rank that wrote it."""


def checksum(file: Path) -> str:
    """Return the CRC-32 of a file's content, 8 hexadecimal digits. Raises OSError if it cannot be read."""
    value = 0
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(_BUFFER):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def seal(content: Mapping[str, Any]) -> str:
    """Return `content` as JSON that has a checksum of its own text, for `unseal`."""
    text = json.dumps({**content, _SEAL: _NO_SEAL}, indent=1)
    return text.replace(_sealed(_NO_SEAL), _sealed(f"{zlib.crc32(text.encode()):08x}"))


def unseal(text: str) -> dict[str, Any]:
    """Parse JSON that `seal` wrote, or an earlier version of longctx, without any checksum.

    Raises ValueError if it is no object or has changed.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
    if _SEAL not in content and "checksums" not in content:
        return content
    found = content.pop(_SEAL, None)
    if found != f"{zlib.crc32(text.replace(_sealed(found), _sealed(_NO_SEAL)).encode()):08x}":
        raise ValueError("its content has changed since it was written: it does not fit its checksum")
    return content


def _sealed(value: object) -> str:
    return f'"{_SEAL}": {json.dumps(value)}'


def write_checksums(folder: Path, pattern: str) -> None:
    """Write the checksums of a folder's files of that pattern into `CHECKSUMS`, synced to disk."""
    sums = {file.name: checksum(file) for file in sorted(folder.glob(pattern))}
    (folder / CHECKSUMS).write_text(seal({"checksums": sums}), encoding="utf-8")
    sync(folder / CHECKSUMS)


def verify_checksums(folder: Path) -> bool:
    """Compare a folder's files with its `CHECKSUMS`; return whether it has that file.

    Raises UserError if they differ.
    """
    if not (folder / CHECKSUMS).is_file():
        return False
    try:
        checksums = stored_checksums(unseal((folder / CHECKSUMS).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / CHECKSUMS} cannot be read: {error}") from error
    changed = find_changed(folder, checksums)
    if changed is not None:
        other = f"if another program has written the file, remove {CHECKSUMS}"
        raise UserError(f"{folder} is damaged: {changed}. Write it again; {other}")
    return True


def written_by(names: Iterable[str], rank: int, ranks: int) -> list[str]:
    """Return the files that a rank has written, of `ranks`; those that belong to no rank count as rank 0's."""
    owners = {name: _SHARD.fullmatch(name) for name in names}
    return sorted(name for name, match in owners.items() if (int(match[1]) % ranks if match else 0) == rank)


def find_changed(folder: Path, checksums: Mapping[str, str]) -> str | None:
    """Describe the first file whose content differs from its checksum, or cannot be read; None if all are intact.

    A collective call if there is a process group, whose ranks share the files; the result is the same on all of them.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    changed = _first_changed(folder, {name: checksums[name] for name in sorted(checksums)[rank::ranks]})
    found: list[str | None] = [changed]
    if ranks > 1:
        found = [None] * ranks
        dist.all_gather_object(found, changed)
    return next((text for text in found if text is not None), None)


def _first_changed(folder: Path, checksums: Mapping[str, str]) -> str | None:
    for name, expected in checksums.items():
        try:
            actual = checksum(folder / name)
        except OSError as error:
            return f"{name} cannot be read: {error}"
        if actual != expected:
            return f"{name} has the checksum {actual}, expected {expected}: its content has changed since it was saved"
    return None


def stored_checksums(listing: Mapping[str, object]) -> dict[str, str]:
    """Return the checksums of a listing by file name; none where an earlier version of longctx wrote it.

    Raises UserError if they are not names and checksums.
    """
    stored = listing.get("checksums", {})
    if not isinstance(stored, dict) or not all(isinstance(x, str) for pair in stored.items() for x in pair):
        raise UserError("its checksums are not file names with hexadecimal digits")
    if any(Path(name).name != name for name in stored):
        raise UserError("its checksums are of files outside of it")
    return stored
