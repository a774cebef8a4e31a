"""Attention by torch's FlashAttention and by cuDNN on a GPU: times by length, of new shapes too; whether they repeat.

    python -m benchmarks.gpu_attention

A minute on an H100. Prints a JSON object per shape; docs/gpu.md has those that were measured.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import milliseconds, relative
from longctx.kernels.attention.masks import CAUSAL, FULL, PlainMask
from longctx.kernels.attention.vendor import CudaCudnn, CudaFlash, PaddedOperator

SHAPES = (
    (65536, 65536, 4, 128, CAUSAL), (16384, 16384, 4, 128, CAUSAL), (4096, 4096, 4, 128, CAUSAL),
    (1024, 1024, 4, 128, CAUSAL), (16384, 16384, 16, 128, CAUSAL), (16384, 16384, 4, 64, CAUSAL),
    (16384, 16384, 4, 128, FULL), (16384, 4096, 4, 128, FULL), (5000, 5000, 4, 128, CAUSAL),
)  # fmt: skip
"""Queries, keys, key heads, head dim, mask."""
HEADS = 16
AGAIN = 4
"""Further runs whose results are compared with the first."""


def _first(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a first call, and its ms."""
    began = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return result, 1e3 * (time.perf_counter() - began)


def _measure(operator: PaddedOperator, inputs: list[Tensor], mask: PlainMask) -> tuple[dict[str, Any], list[Tensor]]:
    q, k, v, do = inputs
    scale = q.shape[3] ** -0.5
    (out, lse), first_forward = _first(lambda: operator.forward(q, k, v, mask, scale))
    grads, first_backward = _first(lambda: operator.backward(do, q, k, v, out, lse, mask, scale))
    repeats = 6 if q.shape[1] >= 16384 else 20
    row = {
        "first_forward_ms": first_forward,
        "first_backward_ms": first_backward,
        "forward": milliseconds(lambda: operator.forward(q, k, v, mask, scale), q.device, repeats),
        "backward": milliseconds(lambda: operator.backward(do, q, k, v, out, lse, mask, scale), q.device, repeats),
        "forward_repeats": True,
        "backward_repeats": True,
    }
    for _ in range(AGAIN):
        forward = operator.forward(q, k, v, mask, scale)
        backward = operator.backward(do, q, k, v, out, lse, mask, scale)
        row["forward_repeats"] &= all(torch.equal(x, y) for x, y in zip(forward, (out, lse), strict=True))
        row["backward_repeats"] &= all(torch.equal(x, y) for x, y in zip(backward, grads, strict=True))
    return row, [out, lse, *grads]


def main() -> None:
    """Measure both on every shape, with and without deterministic algorithms."""
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        for queries, keys, key_heads, dim, mask in SHAPES:
            generator = torch.Generator("cuda").manual_seed(0)
            sizes = ((queries, HEADS), (keys, key_heads), (keys, key_heads), (queries, HEADS))
            inputs = [torch.randn(1, *size, dim, generator=generator, device="cuda").bfloat16() for size in sizes]
            shape = {"queries": queries, "keys": keys, "key_heads": key_heads, "dim": dim, "mask": mask.value}
            row: dict[str, Any] = shape | {"deterministic": deterministic}
            row["flash"], flash = _measure(CudaFlash(), inputs, mask)
            row["cudnn"], cudnn = _measure(CudaCudnn(), inputs, mask)
            row["differences"] = [relative(x, y) for x, y in zip(cudnn, flash, strict=True)]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
