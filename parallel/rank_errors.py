"""Errors on all ranks at once: if one rank fails, none of them continues into the next collective."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


class RankError(RuntimeError):
    """Another rank failed; its own traceback is in its log."""


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - its own pickle
    except Exception:  # noqa: BLE001 - pickling may fail in any way
        return RankError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Run the block on every rank of the default group; if it fails on one, raise on all.

    A ValueError (a user error) is raised unchanged on every rank; of several, the lowest rank's. Any other error is
    raised unchanged where it happened and as a RankError elsewhere. The block must not contain collectives that a
    failing rank would skip, since the other ranks would wait in them.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 - raised again below, on every rank
        error = caught
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else _picklable(error))
    for rank, other in enumerate(errors):
        if isinstance(other, ValueError):
            raise other
        if other is not None and error is None:
            raise RankError(f"rank {rank} failed: {type(other).__name__}: {other}")
    if error is not None:
        raise error
