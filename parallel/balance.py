"""Giving out pieces of a packed sequence so that every rank has as many tokens and nearly as much causal work.

A token of a document reads all earlier ones of it, so that a rank which holds the ends of long documents works longest;
zigzag order balances one document that is as long as the sequence, and no other packing. Cut into more pieces, a
sequence can be given out evenly: every rank has equally many pieces, hence tokens, so that linear layers stay balanced,
and the pieces with the most work are given out first, each to the rank with the least so far (Graham 1969, LPT).

The price: a linear layer sends a state for each piece, so that `m` pieces a rank cost `m / 2` times the bytes of
zigzag order in its one all-gather, and softmax layers send as much as before in more parts.
"""

import heapq
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

TOLERANCE = 0.05
"""How much more work than the mean a rank may have."""
PIECES = (2, 4, 8, 16)
"""Pieces a rank that are tried, in this order."""


def causal_work(cu_seqlens: Sequence[int], edges: Sequence[int]) -> list[int]:
    """Query-key pairs of the queries between each two of `edges`, which ascend, under the causal document mask."""
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
    """The most work of a rank, by the mean, less 1."""
    loads = [0] * size
    for each, rank in zip(work, owners, strict=True):
        loads[rank] += each
    return max(loads) * size / max(sum(loads), 1) - 1


def _given_out(work: Sequence[int], size: int, each: int) -> tuple[int, ...]:
    """The owner of each piece: the largest first, to the rank with the least work that has not `each` pieces yet."""
    owners = [0] * len(work)
    ranks = [(0, 0, rank) for rank in range(size)]
    for piece in sorted(range(len(work)), key=lambda n: (-work[n], n)):
        load, count, rank = heapq.heappop(ranks)
        owners[piece] = rank
        if count + 1 < each:
            heapq.heappush(ranks, (load + work[piece], count + 1, rank))
    return tuple(owners)


@lru_cache(maxsize=16)
def balanced_owners(cu_seqlens: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The rank of each piece of a packed sequence over `size` ranks, in sequence order.

    With as few pieces a rank as bring the imbalance within TOLERANCE, else with those of PIECES that do best; the same
    on every rank. Zigzag order wherever that is enough.
    """
    length, best = cu_seqlens[-1], None
    zigzag = (*range(size), *reversed(range(size)))
    for each in PIECES:
        count = each * size
        step = -(-length // count)
        work = causal_work(cu_seqlens, [min(n * step, length) for n in range(count + 1)])
        for owners in ([zigzag] if each == 2 else []) + [_given_out(work, size, each)]:
            found = imbalance(work, owners, size)
            if best is None or found < best[0]:
                best = found, owners
            if found <= TOLERANCE:
                return owners
    assert best is not None
    return best[1]
