"""Combinations of parameters: all of them, those in which every pair occurs, or fewer."""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairs(*rows: Sequence[Any]) -> list[tuple[Any, ...]]:
    """A few combinations of a value per row, in which any two values of two rows meet at least once."""
    everything = list(product(*(range(len(row)) for row in rows)))
    missing = {pair for numbers in everything for pair in combinations(enumerate(numbers), 2)}
    chosen = []
    while missing:
        best = max(everything, key=lambda numbers: len(missing.intersection(combinations(enumerate(numbers), 2))))
        missing.difference_update(combinations(enumerate(best), 2))
        chosen.append(best)
    return [tuple(row[n] for row, n in zip(rows, numbers, strict=True)) for numbers in sorted(chosen)]


def few(*rows: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Fewer than `pairs`: each value of the longest row, and any two values of two of the other rows."""
    longest = max(range(len(rows)), key=lambda number: len(rows[number]))
    rest = [*rows[:longest], *rows[longest + 1 :]]
    others = pairs(*rest) if len(rest) > 1 else everything(*rest)
    count = max(len(rows[longest]), len(others))
    chosen = [(rows[longest][n % len(rows[longest])], others[n % len(others)]) for n in range(count)]
    return [(*other[:longest], value, *other[longest:]) for value, other in chosen]


def everything(*rows: Iterable[Any]) -> list[tuple[Any, ...]]:
    """All combinations of a value per row."""
    return list(product(*rows))


pairs_or_everything = pytest.mark.parametrize(
    "combinations", [pairs, pytest.param(everything, marks=pytest.mark.slow)], ids=["pairs", "everything"]
)


def pairs_first(*rows: Sequence[Any]) -> list[Any]:
    """All combinations as parameters of a test, slow ones those that `pairs` leaves out."""
    chosen = pairs(*rows)
    return [pytest.param(*values, marks=[] if values in chosen else [pytest.mark.slow]) for values in everything(*rows)]


def mostly_slow(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Values as parameters of a test, slow ones all but `kept`."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


def mostly_slow_rows(rows: Iterable[tuple[Any, ...]], kept: Callable[..., bool]) -> list[Any]:
    """The same of several parameters at once; `kept` says of each row whether it is not slow."""
    return [row if kept(*row) else pytest.param(*row, marks=pytest.mark.slow) for row in rows]
