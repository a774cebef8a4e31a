"""What families with layers of two kinds have alike."""

from collections.abc import Mapping

from longctx.convert.families.base import Keys
from longctx.convert.row_table import Run

LINEAR, FULL = "linear_attention", "full_attention"
"""The words of `layer_types`."""


def read_pattern(keys: Keys, letters: Mapping[str, str], default: list[str]) -> str:
    """The letters of all layers, from `layer_types`, or from what the family has where that is not said."""
    kinds = keys.raw("layer_types") or default
    depth = len(default)
    if not isinstance(kinds, list) or len(kinds) != depth or not all(str(kind) in letters for kind in kinds):
        keys.problems.append(f"layer_types: {kinds!r} is not {depth} times one of {', '.join(letters)}")
        return letters[FULL] * depth
    return "".join(letters[kind] for kind in kinds)


def by_heads(name: str, heads: int, parts: Mapping[str, int]) -> dict[str, list[Run]]:
    """Of a matrix in which every head has rows of each part, one part after the other, the runs of each."""
    whole, begin, found = sum(parts.values()), 0, {}
    for key, rows in parts.items():
        found[key] = [Run(name, head * whole + begin, rows) for head in range(heads)]
        begin += rows
    return found
