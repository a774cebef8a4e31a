"""Ranks that agree on an error: what one of them cannot do, none of them begins."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


class RankError(RuntimeError):
    """Another rank failed; its own traceback is in its log."""


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - pickling may fail in any way
        return RankError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def agreement() -> Iterator[None]:
    """Run the block on every rank of the default group; where it fails on one, fail on all with the same error.

    A ValueError (what a user can mend) is raised everywhere as it is, the lowest rank's first; anything else is
    raised as it is where it happened and as a RankError elsewhere. The block must not hold collectives that a rank
    could leave early, since the others would wait in them.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 - raised again below, on every rank
        error = caught
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else _portable(error))
    for rank, other in enumerate(errors):
        if isinstance(other, ValueError):
            raise other
        if other is not None and error is None:
            raise RankError(f"rank {rank} failed: {type(other).__name__}: {other}")
    if error is not None:
        raise error
