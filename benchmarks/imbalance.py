"""How unevenly the causal work of packed documents lies over ranks, by the order of the layout.

.venv/bin/python benchmarks/imbalance.py [CORPUS]

Documents of log-normal lengths (median 1,340 tokens, sigma 1.4), and those of a corpus of `longctx data prepare` where
one is named. Counted in score elements, not timed: the most of a rank by the mean, less 1, the median and the worst of
40 sequences, and the pieces a rank, which the bytes of linear layers' states grow with.
"""

import random
import statistics
import sys
from collections.abc import Sequence

from longctx.data.config import DataConfig
from longctx.data.loader import train_stream
from longctx.parallel.attention.visibility import score_elements
from longctx.parallel.layout import Layout

SEQUENCES = 40


def drawn(tokens: int, seed: int) -> tuple[int, ...]:
    """Documents of log-normal lengths that fill a sequence."""
    chance, bounds = random.Random(seed), [0]
    while bounds[-1] < tokens:
        bounds.append(min(tokens, bounds[-1] + max(1, int(chance.lognormvariate(7.2, 1.4)))))
    return tuple(bounds)


def table(name: str, packings: Sequence[tuple[int, ...]]) -> None:
    """Print a row for each number of ranks."""
    for size in (4, 8, 16):
        cells = []
        for order in ("contiguous", "zigzag", "balanced"):
            layouts = [Layout(bounds, order, size) for bounds in packings]
            found = []
            for layout in layouts:
                work = [score_elements(layout.seen_by(rank)) for rank in range(size)]
                found.append(max(work) * size / sum(work) - 1)
            pieces = statistics.mean(layout.pieces / size for layout in layouts)
            cells.append(f"{statistics.median(found):7.1%} {max(found):7.1%} {pieces:5.1f}")
        print(f"{name:28} {packings[0][-1]:>9,} {size:>3}  |  " + "  |  ".join(cells))


def main(corpus: str | None) -> None:
    """Print the table."""
    head = "  |  ".join(f"{order:>21}" for order in ("contiguous", "zigzag", "balanced"))
    print(f"{'median, worst, pieces a rank':28} {'tokens':>9} {'W':>3}  |  {head}")
    for tokens in (2**14, 2**17, 2**20):
        table("log-normal", [drawn(tokens, seed) for seed in range(SEQUENCES)])
        if corpus is not None:
            stream = train_stream(DataConfig(path=corpus, sequence_length=tokens), seed=0)
            table(corpus, [tuple(map(int, stream[n].cu_seqlens)) for n in range(SEQUENCES)])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
