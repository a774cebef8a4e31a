"""What the pointwise CPU kernels save, beside torch's own: `python benchmarks/cpu_kernels.py [--tokens N]`.

One thread (a rank's share in a two-rank run on two cores), median of repeats.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx.kernels.pointwise import rms_norm, swiglu

DIM = 128
REPEATS = 5


def seconds(run: Callable[[], object]) -> float:
    """Median time of a call, after one that warms up."""
    run()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def backward_of(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    """A forward and backward pass of `function`."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    do = torch.randn_like(function(*leaves).detach())

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        function(*leaves).backward(do)

    return run


def pointwise(tokens: int, dtype: torch.dtype) -> None:
    """RMSNorm and the gated unit, forward and backward, against torch's own operators."""
    x, weight = torch.randn(tokens, DIM, dtype=dtype), torch.ones(DIM, dtype=dtype)
    gates = torch.randn(tokens, 4 * DIM, dtype=dtype)
    ours = seconds(backward_of(lambda a, w: rms_norm(a, w, 1e-5), [x, weight]))
    theirs = seconds(backward_of(lambda a, w: F.rms_norm(a, (DIM,), w, 1e-5), [x, weight]))
    print(f"rms_norm {dtype}: {ours * 1e3:.1f} ms, F.rms_norm {theirs * 1e3:.1f} ms, {theirs / ours:.1f} times")
    ours = seconds(backward_of(swiglu, [gates]))
    theirs = seconds(backward_of(lambda g: F.silu(g[:, : 2 * DIM]) * g[:, 2 * DIM :], [gates]))
    print(f"swiglu {dtype}: {ours * 1e3:.1f} ms, silu and product {theirs * 1e3:.1f} ms, {theirs / ours:.1f} times")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536)
    tokens = parser.parse_args().tokens
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {tokens} tokens")
    for dtype in (torch.float32, torch.bfloat16):
        pointwise(tokens, dtype)


if __name__ == "__main__":
    main()
