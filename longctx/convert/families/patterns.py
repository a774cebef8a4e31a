"""Helpers for hybrid families, with linear and full-attention layers."""

from collections.abc import Mapping

from longctx.convert.families.base import Keys
from longctx.convert.row_table import RowRange

LINEAR, FULL = "linear_attention", "full_attention"
"""Values of `layer_types`."""


def read_pattern(keys: Keys, letters: Mapping[str, str], default: list[str]) -> str:
    """Return the letters of all layers from `layer_types`, or from the family's `default` if the key is missing."""
    kinds = keys.raw("layer_types") or default
    depth = len(default)
    if not isinstance(kinds, list) or len(kinds) != depth or not all(str(kind) in letters for kind in kinds):
        keys.problems.append(f"layer_types: {kinds!r} is not a list of {depth} of {', '.join(letters)}")
        return letters[FULL] * depth
    return "".join(letters[kind] for kind in kinds)


def ranges_by_part(name: str, heads: int, parts: Mapping[str, int]) -> dict[str, list[RowRange]]:
    """Return the row ranges of each part of a matrix whose rows are grouped by head, then by part (`parts`: rows per
    head)."""
    head_rows, begin, ranges = sum(parts.values()), 0, {}
    for key, rows in parts.items():
        ranges[key] = [RowRange(name, head * head_rows + begin, rows) for head in range(heads)]
        begin += rows
    return ranges
