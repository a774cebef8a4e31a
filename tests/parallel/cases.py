"""Packed sequences, orders and layouts of the parity tests over ranks."""

import torch.distributed as dist
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from longctx.parallel.layout import Layout

Bounds = tuple[int, ...]

PACKINGS = {
    "one document": (0, 48),
    "ends inside slices": (0, 5, 17, 18, 31, 48),
    "ends on slices": (0, 6, 12, 24, 36, 48),
    "over all ranks but the ends": (0, 1, 47, 48),
    "a token each": tuple(range(49)),
}
"""Packed sequences whose documents begin and end in all kinds of places."""
UNEVEN = {
    "a ragged end": (0, 5, 30, 43),
    "a piece of padding": (0, 7, 33),
    "fewer tokens than ranks": (0, 1, 3),
    "a token": (0, 1),
}
"""Lengths that do not divide over ranks: the last pieces end in padding, or are all padding."""
ORDERS = ("contiguous", "zigzag", "balanced")


@st.composite
def packings(draw: st.DrawFn) -> Bounds:
    """Documents that begin and end anywhere."""
    length = draw(st.integers(1, 70))
    return (0, *sorted(draw(st.sets(st.integers(1, length - 1), max_size=9)) if length > 1 else ()), length)


few_examples = settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
many_examples = settings(few_examples, max_examples=40)


def layout_here(bounds: Bounds, order: str, continued: int = 0, states: str = "all-gather") -> Layout:
    """The layout over all ranks of the default group, as this rank sees it."""
    size = dist.get_world_size()
    group = dist.group.WORLD if size > 1 else None
    return Layout(bounds, order, size, dist.get_rank(), group, continued, states=states)
