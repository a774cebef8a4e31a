"""What the parity tests over ranks share."""

import torch.distributed as dist

from longctx.parallel.layout import Layout

PACKINGS = {
    "one document": (0, 48),
    "ends inside slices": (0, 5, 17, 18, 31, 48),
    "ends on slices": (0, 6, 12, 24, 36, 48),
    "over all ranks but the ends": (0, 1, 47, 48),
    "a token each": tuple(range(49)),
}
UNEVEN = {
    "a ragged end": (0, 5, 30, 43),
    "a piece of padding": (0, 7, 33),
    "fewer tokens than ranks": (0, 1, 3),
    "a token": (0, 1),
}
"""Lengths that do not divide over ranks: the last pieces end in padding, or are all padding."""
ORDERS = ("contiguous", "zigzag", "balanced")
"""Packed sequences whose documents begin and end in all kinds of places."""


def layout_here(bounds: tuple[int, ...], order: str, continued: int = 0, states: str = "all-gather") -> Layout:
    """The layout over all ranks of the default group, as this rank sees it."""
    size = dist.get_world_size()
    group = dist.group.WORLD if size > 1 else None
    return Layout(bounds, order, size, dist.get_rank(), group, continued, states=states)
