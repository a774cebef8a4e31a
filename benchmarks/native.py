"""Native CPU kernels against the torch operators that they replace, in one process, on the same inputs.

    MALLOC_MMAP_MAX_=0 python -m benchmarks.native [--tokens 32768] [--threads 2] [--repeats 5]

Eight heads of 128 channels; forward, and forward and backward (with the gradient of a scalar decay), alternating,
medians. `MALLOC_MMAP_MAX_=0` keeps freed memory, as the launcher of training does.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median
from types import ModuleType

import torch

from longctx.kernels.linear.additive import chunked, native
from longctx.kernels.linear.recurrence import Inputs, Segment

HEADS, DIM = 8, 128


def draw(tokens: int, kind: str, dtype: torch.dtype) -> tuple[Inputs, torch.Tensor]:
    """Return inputs with a constant or scalar decay, and the gradient of the outputs."""
    q, k, v, do = (torch.randn(1, tokens, HEADS, DIM, dtype=dtype) for _ in range(4))
    gate = -0.1 * (torch.rand(HEADS) if kind == "constant" else torch.rand(1, tokens, HEADS))
    return Inputs(q / DIM**0.5, k / DIM**0.5, v, (gate,)), do


def measure(module: ModuleType, inputs: Inputs, do: torch.Tensor) -> tuple[float, float]:
    """Return the seconds of forward, and of forward and backward."""
    segments, zero = [Segment(0, inputs.k.shape[1])], inputs.empty_state()[None]
    began = time.perf_counter()
    module.apply(inputs, segments, zero)
    forward = time.perf_counter() - began
    module.apply_grad(inputs, segments, do, zero, zero, inputs.gates[0].dim() > 1)
    return forward, time.perf_counter() - began


def compare(tokens: int, kind: str, dtype: torch.dtype, repeats: int) -> tuple[Sequence[float], Sequence[float]]:
    """Return the medians of both times, native and torch."""
    inputs, do = draw(tokens, kind, dtype)
    times: dict[ModuleType, list[tuple[float, float]]] = {native: [], chunked: []}
    for _ in range(repeats):
        for module, found in times.items():
            found.append(measure(module, inputs, do))
    of_native, of_torch = ([median(each) for each in zip(*found, strict=True)] for found in times.values())
    return of_native, of_torch


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.native", description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sys.stdout.write("| decay | dtype | pass | native, ms | torch, ms | ratio |\n|---|---|---|---|---|---|\n")
    for kind in ("constant", "scalar"):
        for dtype in (torch.float32, torch.bfloat16):
            of_native, of_torch = compare(arguments.tokens, kind, dtype, arguments.repeats)
            for name, fast, slow in zip(("forward", "forward + backward"), of_native, of_torch, strict=True):
                row = (kind, str(dtype).removeprefix("torch."), name, f"{fast * 1e3:.0f}", f"{slow * 1e3:.0f}")
                sys.stdout.write(f"| {' | '.join(row)} | {slow / fast:.2f} |\n")


if __name__ == "__main__":
    main()
