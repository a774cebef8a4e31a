"""Mixture-of-heads benchmark: a softmax attention layer with routed heads against the dense layer.

.venv/bin/python benchmarks/heads.py [--tokens 16384] [--repeats 3] [--device cpu|cuda] [--dtype float32|bfloat16]

Forward and backward with all projections, 32 query heads of 64 over 8 key/value heads; variants are interleaved. The
best possible speedup of a variant is the dense layer's FLOPs divided by its own: keys and values are projected for all
tokens.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from longctx.layers.output import Output
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 64
WIDTH = HEADS * HEAD_DIM
VARIANTS: dict[str, tuple[int, int]] = {
    "dense": (HEADS, 0),
    "75 %: 16 shared, 8 of 16": (16, 8),
    "50 %: 8 shared, 8 of 24": (8, 8),
    "50 %: 16 of 32": (0, 16),
}
"""Numbers of shared heads and of active routed heads."""


class Layer:
    """The model's softmax layer with so many shared and active routed heads."""

    def __init__(self, tokens: int, device: str, dtype: torch.dtype, shared: int, active: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layout = Layout((0, tokens))
        config = SoftmaxConfig(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
        self.mixer = config.build(WIDTH, 0, 1, 1e-5)
        if active:
            self.mixer.add_head_router(
                HeadMixtureConfig(mixers=("softmax",), shared=shared, active=active), WIDTH, HEADS
            )
        initialise(self.mixer, seed=0)
        self.mixer.to(device, dtype)
        self.x, self.grad = (torch.randn(1, tokens, WIDTH, generator=generator).to(device, dtype) for _ in range(2))

    def run(self) -> float:
        """Time one forward and backward pass, in seconds."""
        x = self.x.clone().requires_grad_()
        self.mixer.zero_grad()
        _synchronize(x)
        began = time.perf_counter()
        out, report, _ = Output.of(self.mixer(x, self.layout))
        if report is None:
            out.backward(self.grad)
        else:
            torch.autograd.backward((out, report.loss), (self.grad, torch.ones_like(report.loss)))
        _synchronize(x)
        return time.perf_counter() - began


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def limit(tokens: int, heads: float) -> float:
    """Compute the FLOPs of the dense layer divided by those with `heads` active heads per token."""
    keys = 3 * WIDTH * 2 * KV_HEADS * HEAD_DIM
    # Per head and token: two projections, each forward and twice backward; seven products per visible key.
    head = 3 * WIDTH * 2 * HEAD_DIM + 7 * HEAD_DIM * (tokens + 1) / 2
    return (keys + HEADS * head) / (keys + heads * head)


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    layers = {name: Layer(options.tokens, options.device, dtype, *variant) for name, variant in VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(options.repeats + 1):
        for name, layer in layers.items():
            times[name].append(layer.run())
    # The first round is a warm-up.
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    print(f"{options.tokens:,} tokens, {options.device}, {options.dtype}, median of {options.repeats}")
    for name, (shared, active) in VARIANTS.items():
        best = limit(options.tokens, shared + active)
        print(f"{name:26} {medians[name]:8.3f} s  {medians['dense'] / medians[name]:5.2f}x (at best {best:.2f})")


if __name__ == "__main__":
    main()
