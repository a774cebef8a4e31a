"""What a family of models is to a conversion, and how the keys of a `config.json` are read: each one, or refused."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from longctx.config import Config
from longctx.convert.row_table import RowTable
from longctx.model.config import ModelConfig

Value = TypeVar("Value")

_NEEDED: Any = object()
_WITHOUT_MATHEMATICS = (
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
"""Keys of every family that say how a model begins, is stored, is trained or is run."""


class Keys:
    """The keys of a `config.json`. What is wrong with them is collected in `problems`, a line for each."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._seen = set(_WITHOUT_MATHEMATICS)
        self.problems: list[str] = []

    def __contains__(self, name: str) -> bool:
        """Whether it is there, with a value."""
        return self._values.get(name) is not None

    def _read(self, name: str, default: Value, right: Callable[[Any], bool], words: str) -> Value:
        self._seen.add(name)
        value = self._values.get(name)
        if value is None:
            if default is _NEEDED:
                self.problems.append(f"{name}: is missing")
            return default
        if not right(value):
            self.problems.append(f"{name}: {value!r} is not {words}")
            return default
        return value

    def integer(self, name: str, default: int = _NEEDED) -> int:
        """A whole number above 0; 1 where the key is needed and not there, or is no number."""
        value = self._read(name, default, lambda v: type(v) is int and v > 0, "a whole number above 0")
        return 1 if value is _NEEDED else value

    def number(self, name: str, default: float) -> float:
        """A number."""
        return float(self._read(name, default, _is_number, "a number"))

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return self._read(name, default, lambda v: type(v) is bool, "true or false")

    def raw(self, name: str) -> Any:
        """Its value as it is; None where it is not there."""
        self._seen.add(name)
        return self._values.get(name)

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse the key unless it is absent or has one of these values."""
        value = self.raw(name)
        if value is not None and value not in allowed:
            wanted = " or ".join(map(repr, allowed)) or "nothing"
            self.problems.append(f"{name}: {value!r}, where {wanted} can be converted: {why}")

    def pass_over(self, *names: str) -> None:
        """Keys that change nothing that the model computes."""
        self._seen.update(names)

    def refuse_the_rest(self) -> None:
        """Refuse every key that nobody has asked for, unless it has no value."""
        for name in sorted(self._values.keys() - self._seen):
            if self._values[name] is not None and self._values[name] is not False:
                self.problems.append(
                    f"{name}: {self._values[name]!r} is not known here; take it out where it changes nothing that the "
                    "model computes"
                )


Names = TypeVar("Names", str, list[str])


def period(names: Names) -> Names:
    """What a pattern of layers repeats: the shortest beginning that gives it."""
    depth = len(names)
    return next(names[:n] for n in range(1, depth + 1) if (names[:n] * depth)[:depth] == names)


Part = TypeVar("Part", bound=Config)


def part(model: ModelConfig, kind: type[Part]) -> Part:
    """A table of the model, which has it."""
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
    """The mixers that it can have, as in `model.layers`."""
    ffns: ClassVar[tuple[str, ...]]
    """The feed-forwards that it can have."""

    @abstractmethod
    def read(self, keys: Keys) -> dict[str, Any]:
        """The fields of the built-in configuration, all said that have a say in shapes; mistakes go to the keys."""

    @abstractmethod
    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The keys of `config.json` for a model of its letters and feed-forwards; what it has no words for is left out:
        `read` of them is then another model."""

    @abstractmethod
    def table(self, model: ModelConfig, shapes: Mapping[str, torch.Size]) -> RowTable:
        """Where the tensors of the built-in model, of these shapes, lie in the family's."""

    def passed_over(self, name: str) -> bool:
        """Whether a tensor in a file is none that the model is made of, and is rightly there."""
        return name.endswith("rotary_emb.inv_freq")

    def derived(self, model: ModelConfig, values: Mapping[str, Any]) -> dict[str, Callable[[], Tensor]]:
        """Tensors that stand in its files and follow from the configuration, which `values` are: float32. In a source
        they may be missing."""
        del model, values
        return {}
