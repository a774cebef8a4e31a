"""Safetensors folders in the format of transformers: one file, or numbered files with an index."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longctx.errors import UserError
from longctx.files import sync

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Supported dtypes of weights, by their names in the format."""


@dataclass(frozen=True)
class Stored:
    """A stored tensor, as described by its file's header."""

    file: Path
    shape: torch.Size
    dtype: str


@contextmanager
def _naming_read_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}. It may be truncated: download it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read an object from a JSON file. Raises UserError if that fails."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object")
    return content


class TensorFolder:
    """The tensors of a folder. Headers are read once; tensors are read on access, from memory-mapped files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = lru_cache(maxsize=4)(self._open_file)

    def _open_file(self, file: Path) -> Any:
        with _naming_read_errors(file):
            return safe_open(file, framework="pt")

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """All tensors, by name. Raises UserError, naming the file, if one is missing or damaged, or if the index does
        not match the files."""
        if (self.folder / SINGLE).is_file():
            return dict(self._header(self.folder / SINGLE))
        if not (self.folder / INDEX).is_file():
            pickles = sorted(path.name for path in self.folder.glob("*.bin"))
            note = f" {pickles[0]} is a pickle, which can run code, and is not read." if pickles else ""
            raise UserError(
                f"{self.folder} has neither {SINGLE} nor {INDEX}.{note} Save the model as safetensors with "
                "save_pretrained of transformers"
            )
        places = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise UserError(f"{self.folder / INDEX} has no weight_map")
        tensors: dict[str, Stored] = {}
        for name in sorted(set(places.values())):
            file = self.folder / name
            if file.parent != self.folder or not file.is_file():
                raise UserError(f"{file}, listed in {INDEX}, is missing")
            for tensor, stored in self._header(file):
                if places.get(tensor) != name:
                    raise UserError(f"{file} has {tensor}, but {INDEX} lists it in {places.get(tensor, 'no file')}")
                tensors[tensor] = stored
        missing = [f"{tensor} (in {file})" for tensor, file in places.items() if tensor not in tensors]
        if missing:
            raise UserError(
                f"{self.folder / INDEX} lists tensors that its files do not have: {', '.join(missing[:20])}"
            )
        return tensors

    def _header(self, file: Path) -> Iterator[tuple[str, Stored]]:
        handle = self._open(file)
        with _naming_read_errors(file):
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                part = handle.get_slice(name)
                yield name, Stored(file, torch.Size(part.get_shape()), part.get_dtype())

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Read entries [begin, end) of a tensor's first dimension in float32: `[end - begin, columns]`, all other
        dimensions flattened, or `[end - begin]` for a vector."""
        stored = self.tensors[name]
        handle = self._open(stored.file)
        with _naming_read_errors(stored.file):
            part = handle.get_slice(name)[begin:end]
        return part.float().flatten(1) if part.dim() > 1 else part.float()


def group_by_size(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Group tensor names so that the bytes of each group are at most `limit`; a larger tensor is a group of its own."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def file_names(count: int) -> list[str]:
    """Return the names of `count` safetensors files."""
    return [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def write_file(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file and sync it to disk. Raises OSError if it cannot be written."""
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file.name}: {error}") from error
    sync(file)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object and sync it to disk."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sync(file)


def write_index(folder: Path, places: Iterable[tuple[str, list[str]]], parameters: int, size: int) -> None:
    """Write the index: which file has which tensor."""
    weight_map = {name: file for file, names in places for name in names}
    metadata = {"total_parameters": parameters, "total_size": size}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
