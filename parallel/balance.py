"""Load balancing of packed sequences: assigns pieces to ranks with equal tokens and nearly equal causal work.

A token attends to all earlier tokens of its document, so the rank that holds the ends of long documents has the most
work. Zigzag order balances one document as long as the sequence, and no other packing. A sequence that is cut into more
pieces can be balanced: every rank gets the same number of pieces, hence of tokens, so linear layers stay balanced, and
pieces are assigned in order of decreasing work, each to the rank with the least work so far (Graham 1969, LPT).

The cost: a linear layer sends one state per piece, so m pieces per rank cost m / 2 times the bytes of zigzag order in
its one all-gather. Softmax layers send as many bytes as before, in more messages.
"""

import heapq
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

TOLERANCE = 0.05
"""Largest accepted imbalance: the work of the busiest rank over the mean, minus 1."""
PIECES = (2, 4, 8, 16)
"""Candidate numbers of pieces per rank, tried in this order."""


def causal_work(cu_seqlens: Sequence[int], edges: Sequence[int]) -> list[int]:
    """Count query-key pairs under the causal document mask for the queries between consecutive, ascending `edges`."""
    totals, done, document = [], 0, 0
    for edge in edges:
        while document < len(cu_seqlens) - 2 and cu_seqlens[document + 1] <= edge:
            size = cu_seqlens[document + 1] - cu_seqlens[document]
            done += size * (size + 1) // 2
            document += 1
        inside = edge - cu_seqlens[document]
        totals.append(done + inside * (inside + 1) // 2)
    return [b - a for a, b in pairwise(totals)]


def imbalance(work: Sequence[int], owners: Sequence[int], size: int) -> float:
    """Return the work of the busiest rank over the mean, minus 1."""
    loads = [0] * size
    for piece_work, rank in zip(work, owners, strict=True):
        loads[rank] += piece_work
    return max(loads) * size / max(sum(loads), 1) - 1


def _assign(work: Sequence[int], size: int, pieces_per_rank: int) -> tuple[int, ...]:
    """Assign each piece to a rank: largest first, to the least loaded rank with fewer than `pieces_per_rank` pieces."""
    owners = [0] * len(work)
    ranks = [(0, 0, rank) for rank in range(size)]
    for piece in sorted(range(len(work)), key=lambda n: (-work[n], n)):
        load, count, rank = heapq.heappop(ranks)
        owners[piece] = rank
        if count + 1 < pieces_per_rank:
            heapq.heappush(ranks, (load + work[piece], count + 1, rank))
    return tuple(owners)


@lru_cache(maxsize=16)
def balanced_owners(cu_seqlens: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Return the rank of each piece of a packed sequence over `size` ranks, in sequence order.

    Takes the smallest of PIECES that brings the imbalance within TOLERANCE, else the one with the least imbalance;
    zigzag order wherever that is balanced enough. The result is the same on every rank.
    """
    length, best = cu_seqlens[-1], None
    zigzag = (*range(size), *reversed(range(size)))
    for pieces_per_rank in PIECES:
        count = pieces_per_rank * size
        step = -(-length // count)
        work = causal_work(cu_seqlens, [min(n * step, length) for n in range(count + 1)])
        for owners in ([zigzag] if pieces_per_rank == 2 else []) + [_assign(work, size, pieces_per_rank)]:
            excess = imbalance(work, owners, size)
            if best is None or excess < best[0]:
                best = excess, owners
            if excess <= TOLERANCE:
                return owners
    assert best is not None
    return best[1]
