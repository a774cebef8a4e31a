"""Errors of float32 recurrences at a long sequence, against float64, by recurrence and decay, as a Markdown table.

    python -m benchmarks.long_sequences --tokens 1048576

Each head has one log-decay at all tokens, so that every chunk rounds alike. An error is the largest difference over the
largest number, per head: of outputs and dq in the last 4,096 tokens, of dk, dv and gates in the first 4,096.
"""

import argparse
import time

from tests.kernels.linear.cases import KINDS
from tests.kernels.linear.test_running_state import DECAYS, errors


def main() -> None:
    """Print a row per recurrence: the error of o, and the largest of all gradients, per decay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--dim", type=int, default=8)
    options = parser.parse_args()
    print(f"| recurrence | of | {' | '.join(f'{decay:g}' for decay in DECAYS.tolist())} |")
    print("|---|---|" + "---|" * len(DECAYS))
    for kind in KINDS:
        began = time.perf_counter()
        found = errors(kind, options.tokens, options.dim)
        gradients = [
            max(error[head].item() for name, error in found.items() if name != "o") for head in range(len(DECAYS))
        ]
        for name, row in (("outputs", found["o"].tolist()), ("gradients", gradients)):
            print(f"| {kind} | {name} | {' | '.join(f'{error:.1e}' for error in row)} |", flush=True)
        print(f"<!-- {time.perf_counter() - began:.0f} s -->", flush=True)


if __name__ == "__main__":
    main()
