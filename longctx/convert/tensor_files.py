"""Folders of safetensors files as transformers writes them: one file, or numbered ones with an index."""

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
"""What weights may be stored in, by the format's own words."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as its header says."""

    file: Path
    shape: torch.Size
    dtype: str


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}. It may be cut short: fetch it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises UserError where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object")
    return content


class TensorFolder:
    """The tensors in a folder; headers are read once, numbers when they are asked for, from the file's pages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = lru_cache(maxsize=4)(self._opened)

    def _opened(self, file: Path) -> Any:
        with _naming(file):
            return safe_open(file, framework="pt")

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """All of them, by name. Raises UserError, naming the file, where one is missing or damaged, and where the index
        says something else than the files."""
        if (self.folder / SINGLE).is_file():
            return dict(self._header(self.folder / SINGLE))
        if not (self.folder / INDEX).is_file():
            pickles = sorted(path.name for path in self.folder.glob("*.bin"))
            other = f" {pickles[0]} is a pickle, which may run code when it is read: it is not." if pickles else ""
            raise UserError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}.{other} Let transformers write the model with "
                "save_pretrained"
            )
        places = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise UserError(f"{self.folder / INDEX} has no weight_map")
        found: dict[str, Stored] = {}
        for name in sorted(set(places.values())):
            file = self.folder / name
            if file.parent != self.folder or not file.is_file():
                raise UserError(f"{file}, which {INDEX} names, is missing")
            for tensor, stored in self._header(file):
                if places.get(tensor) != name:
                    raise UserError(f"{file} has {tensor}, which {INDEX} says is in {places.get(tensor, 'no file')}")
                found[tensor] = stored
        lost = [f"{tensor} (in {file})" for tensor, file in places.items() if tensor not in found]
        if lost:
            raise UserError(f"{self.folder / INDEX} names what its files do not have: {', '.join(lost[:20])}")
        return found

    def _header(self, file: Path) -> Iterator[tuple[str, Stored]]:
        handle = self._open(file)
        with _naming(file):
            for name in handle.keys():  # noqa: SIM118 - it is no mapping
                part = handle.get_slice(name)
                yield name, Stored(file, torch.Size(part.get_shape()), part.get_dtype())

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows of one of them in float32, `[end - begin, columns]`; what is of one column is not told from a vector."""
        stored = self.tensors[name]
        handle = self._open(stored.file)
        with _naming(stored.file):
            part = handle.get_slice(name)[begin:end]
        return part.float().flatten(1) if part.dim() > 1 else part.float()


def shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names of tensors in groups whose sizes in bytes sum to at most `most`, or of one that is larger."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


def file_names(count: int) -> list[str]:
    """Those of so many files."""
    return [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def write_file(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file; on the disk when this returns. Raises OSError where it cannot be written."""
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file.name}: {error}") from error
    sync(file)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object; on the disk when this returns."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sync(file)


def write_index(folder: Path, places: Iterable[tuple[str, list[str]]], parameters: int, size: int) -> None:
    """Write which tensors lie in which file."""
    weight_map = {name: file for file, names in places for name in names}
    metadata = {"total_parameters": parameters, "total_size": size}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
