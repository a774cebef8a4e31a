"""A layer of softmax attention with a mixture of heads beside the dense one, forward and backward.

.venv/bin/python benchmarks/heads.py [--tokens 16384] [--repeats 3] [--device cpu|cuda] [--dtype float32|bfloat16]

32 query heads of 64 over 8 key/value heads, with all projections; the variants take turns. What a variant could reach
at best is the dense layer's multiplications by its own: keys and values are projected for all tokens.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx.kernels.routed_linear import from_heads, to_heads
from longctx.moe.head_router import learned
from longctx.moe.heads import mixture_of_heads
from longctx.parallel.attention import softmax_attention
from longctx.parallel.layout import Layout

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 64
WIDTH = HEADS * HEAD_DIM
VARIANTS: dict[str, tuple[int, int]] = {
    "dense": (HEADS, 0),
    "75 %: 16 shared, 8 of 16": (16, 8),
    "50 %: 8 shared, 8 of 24": (8, 8),
    "50 %: 16 of 32": (0, 16),
}
"""Shared heads, and active ones of the rest."""


class Layer:
    """The weights, and one run."""

    def __init__(self, tokens: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.layout = Layout((0, tokens))
        rows = 2 * KV_HEADS * HEAD_DIM + WIDTH, HEADS + 2, WIDTH
        self.kvq, self.router, self.out = ((drawn(n, WIDTH) * WIDTH**-0.5).requires_grad_() for n in rows)
        self.x, self.grad = drawn(1, tokens, WIDTH), drawn(1, tokens, WIDTH)

    def forward(self, x: Tensor, shared: int, active: int) -> Tensor:
        """The layer's output."""
        dense = 2 * KV_HEADS + shared
        heads = F.linear(x, self.kvq[: dense * HEAD_DIM]).unflatten(-1, (-1, HEAD_DIM))
        k, v, q = heads.split([KV_HEADS, KV_HEADS, shared], dim=2)
        if not active:
            return F.linear(softmax_attention(q, k, v, self.layout, HEAD_DIM**-0.5).flatten(2), self.out)
        logits = F.linear(x, self.router).split([HEADS - shared, shared, 2], dim=-1)
        routing = learned(*logits, active, self.layout)
        routed = to_heads(x, self.kvq[dense * HEAD_DIM :].unflatten(0, (-1, HEAD_DIM)), routing.chosen)
        out = mixture_of_heads(torch.cat([q, routed], dim=2), k, v, routing, self.layout, HEAD_DIM**-0.5)
        of_shared = F.linear(out[:, :, :shared].flatten(2), self.out[:, : shared * HEAD_DIM])
        weights = self.out[:, shared * HEAD_DIM :].unflatten(1, (-1, HEAD_DIM)).transpose(0, 1)
        return of_shared + from_heads(out[:, :, shared:], weights, routing.chosen)

    def run(self, shared: int, active: int) -> float:
        """Seconds forward and backward."""
        x = self.x.clone().requires_grad_()
        for weight in (self.kvq, self.router, self.out):
            weight.grad = None
        _synchronize(x)
        began = time.perf_counter()
        self.forward(x, shared, active).backward(self.grad)
        _synchronize(x)
        return time.perf_counter() - began


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def limit(tokens: int, heads: float) -> float:
    """The dense layer's multiplications by those with that many heads a token."""
    keys = 3 * WIDTH * 2 * KV_HEADS * HEAD_DIM
    # Of a head and token: two projections, each forward and twice backward; seven products for each key that is seen.
    head = 3 * WIDTH * 2 * HEAD_DIM + 7 * HEAD_DIM * (tokens + 1) / 2
    return (keys + HEADS * head) / (keys + heads * head)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    layer = Layer(options.tokens, options.device, getattr(torch, options.dtype))
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(options.repeats + 1):
        for name, variant in VARIANTS.items():
            times[name].append(layer.run(*variant))
    # The first round warms up.
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    print(f"{options.tokens:,} tokens, {options.device}, {options.dtype}, median of {options.repeats}")
    for name, (shared, active) in VARIANTS.items():
        best = limit(options.tokens, shared + active)
        print(f"{name:26} {medians[name]:8.3f} s  {medians['dense'] / medians[name]:5.2f} times (at best {best:.2f})")


if __name__ == "__main__":
    main()
