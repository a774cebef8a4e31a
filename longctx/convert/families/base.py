"""Base class of model families, and the reader of `config.json`, which accepts or refuses every key."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from longctx.config import Config
from longctx.convert.row_table import RowTable
from longctx.model.config import ModelConfig

Value = TypeVar("Value")

_REQUIRED: Any = object()
_IGNORED_KEYS = (
    "_name_or_path",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "model_type",
    "output_router_logits",
    "pad_token_id",
    "router_aux_loss_coef",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Keys of every family that concern initialisation, storage, training or serving, not the model's output."""


class Keys:
    """The keys of a `config.json`. Mistakes are collected in `problems`, one line each."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._seen = set(_IGNORED_KEYS)
        self.problems: list[str] = []

    def __contains__(self, name: str) -> bool:
        """Return whether the key exists with a value other than null."""
        return self._values.get(name) is not None

    def _read(self, name: str, default: Value, valid: Callable[[Any], bool], expected: str) -> Value:
        self._seen.add(name)
        value = self._values.get(name)
        if value is None:
            if default is _REQUIRED:
                self.problems.append(f"{name}: missing")
            return default
        if not valid(value):
            self.problems.append(f"{name}: {value!r} is not {expected}")
            return default
        return value

    def integer(self, name: str, default: int = _REQUIRED) -> int:
        """Read a positive integer; returns 1 if a required key is missing or invalid."""
        value = self._read(name, default, lambda v: type(v) is int and v > 0, "a positive integer")
        return 1 if value is _REQUIRED else value

    def number(self, name: str, default: float) -> float:
        """Read a number."""
        return float(self._read(name, default, _is_number, "a number"))

    def flag(self, name: str, default: bool) -> bool:
        """Read a boolean."""
        return self._read(name, default, lambda v: type(v) is bool, "true or false")

    def raw(self, name: str) -> Any:
        """Read a value unchecked; None if the key is missing."""
        self._seen.add(name)
        return self._values.get(name)

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse the key unless it is missing or has one of these values."""
        value = self.raw(name)
        if value is not None and value not in allowed:
            supported = " or ".join(map(repr, allowed)) or "nothing"
            self.problems.append(f"{name}: {value!r} is not supported, only {supported}: {why}")

    def ignore(self, *names: str) -> None:
        """Accept keys that do not change the model's output."""
        self._seen.update(names)

    def refuse_unread(self) -> None:
        """Refuse every key that was not read, unless it is null or false."""
        for name in sorted(self._values.keys() - self._seen):
            if self._values[name] is not None and self._values[name] is not False:
                self.problems.append(
                    f"{name}: {self._values[name]!r} is unknown; remove it if it does not change the model's output"
                )


Names = TypeVar("Names", str, list[str])


def period(names: Names) -> Names:
    """Return the shortest prefix that a pattern of layers repeats."""
    depth = len(names)
    return next(names[:n] for n in range(1, depth + 1) if (names[:n] * depth)[:depth] == names)


Table = TypeVar("Table", bound=Config)


def table_of(model: ModelConfig, kind: type[Table]) -> Table:
    """Return a table of the model's configuration, which must have it."""
    table = getattr(model, kind.name)  # type: ignore[attr-defined]
    assert isinstance(table, kind), kind
    return table


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


class Family(ABC):
    """One `model_type` of transformers."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    letters: ClassVar[str]
    """Supported mixers, by their letters in `model.layers`."""
    ffns: ClassVar[tuple[str, ...]]
    """Supported feed-forwards, by name."""

    @abstractmethod
    def read(self, keys: Keys) -> dict[str, Any]:
        """Return the fields of the built-in configuration, explicitly for all that affect shapes; mistakes are added to
        `keys`."""

    @abstractmethod
    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of `config.json` for a model of supported mixers and feed-forwards. Options that the family
        does not have are omitted; the caller detects them, because `read` then returns another model."""

    @abstractmethod
    def table(self, model: ModelConfig, shapes: Mapping[str, torch.Size]) -> RowTable:
        """Return the row table between the built-in model's tensors, of these shapes, and the family's."""

    def ignores(self, name: str) -> bool:
        """Return whether a tensor in a file is known and not part of the model."""
        return name.endswith("rotary_emb.inv_freq")

    def derived(self, model: ModelConfig, values: Mapping[str, Any]) -> dict[str, Callable[[], Tensor]]:
        """Return tensors of the files, float32, that are computed from the configuration `values`. A source may lack
        them."""
        del model, values
        return {}
