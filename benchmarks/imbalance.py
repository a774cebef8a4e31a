"""Load imbalance of causal attention on packed documents over ranks, by layout order.

.venv/bin/python benchmarks/imbalance.py [CORPUS]

Documents have log-normal lengths (median 1,340 tokens, sigma 1.4), or come from CORPUS, a corpus of `longctx data
prepare`. Computed from score elements, not timed: maximum over ranks / mean - 1, as median and maximum over 40
sequences, and the pieces per rank, to which the bytes of exchanged recurrent states are proportional.
"""

import random
import statistics
import sys
from collections.abc import Sequence

from longctx.data.blend import train_stream
from longctx.data.config import DataConfig
from longctx.parallel.attention.visibility import score_elements
from longctx.parallel.layout import Layout

SEQUENCES = 40


def random_documents(tokens: int, seed: int) -> tuple[int, ...]:
    """Draw document boundaries with log-normal lengths that fill a sequence."""
    generator, bounds = random.Random(seed), [0]
    while bounds[-1] < tokens:
        bounds.append(min(tokens, bounds[-1] + max(1, int(generator.lognormvariate(7.2, 1.4)))))
    return tuple(bounds)


def table(name: str, packings: Sequence[tuple[int, ...]]) -> None:
    """Print a row per number of ranks."""
    for size in (4, 8, 16):
        cells = []
        for order in ("contiguous", "zigzag", "balanced"):
            layouts = [Layout(bounds, order, size) for bounds in packings]
            imbalances = []
            for layout in layouts:
                work = [score_elements(layout.for_rank(rank)) for rank in range(size)]
                imbalances.append(max(work) * size / sum(work) - 1)
            pieces = statistics.mean(layout.pieces / size for layout in layouts)
            cells.append(f"{statistics.median(imbalances):7.1%} {max(imbalances):7.1%} {pieces:5.1f}")
        print(f"{name:28} {packings[0][-1]:>9,} {size:>3}  |  " + "  |  ".join(cells))


def main(corpus: str | None) -> None:
    """Print the table."""
    head = "  |  ".join(f"{order:>21}" for order in ("contiguous", "zigzag", "balanced"))
    print(f"{'median, max, pieces per rank':28} {'tokens':>9} {'W':>3}  |  {head}")
    for tokens in (2**14, 2**17, 2**20):
        table("log-normal", [random_documents(tokens, seed) for seed in range(SEQUENCES)])
        if corpus is not None:
            stream = train_stream(DataConfig(path=corpus, sequence_length=tokens), seed=0)
            table(corpus, [tuple(map(int, stream[n].cu_seqlens)) for n in range(SEQUENCES)])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
