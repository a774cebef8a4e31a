"""Sequences, documents and tokens whose loss is not finite in a step, for the message that ends a run."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from longctx.engines.base import Batch, Engine
from longctx.kernels.finite import checks_on_cuda

NAMED = 3
"""Documents that are named; there may be more."""


class Place(NamedTuple):
    """The first token of a document whose loss is not finite; counted from 0 in the sequence."""

    sequence: int
    document: int
    token: int


def not_finite(engine: Engine, batches: Sequence[Batch]) -> str:
    """Compute a step's losses again, without gradients, and say where they are not finite. Collective.

    Returns "" where all are finite, as when only a gradient is not.
    """
    places: dict[tuple[int, int], int] = {}
    for batch in batches:
        with checks_on_cuda():
            layout, nll = batch.layout, engine.losses(batch).nll[0].cpu()
        tokens = layout.shard(torch.arange(layout.length)[None], fill=-1)[0]
        for token in sorted(tokens[~torch.isfinite(nll) & (tokens >= 0)].tolist(), reverse=True):
            places[layout.sequence, bisect_right(layout.cu_seqlens, token) - 1] = token
    found: list[dict[tuple[int, int], int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, places)
    merged: dict[tuple[int, int], int] = {}
    for of_rank in found:
        for key, token in of_rank.items():
            merged[key] = min(token, merged.get(key, token))
    first = [Place(*key, token) for key, token in sorted(merged.items())][:NAMED]
    if not first:
        return ""
    each = ", ".join(f"sequence {p.sequence}, document {p.document}, token {p.token}" for p in first)
    more = len(merged) - len(first)
    return f"Not finite from there on: {each}{f' and {more} more documents' if more else ''} (counted from 0)"
