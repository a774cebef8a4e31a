"""Native CPU kernels against the torch operators that they replace, in one process, on the same inputs.

    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776
    python -m benchmarks.native [additive attention convolution delta pointwise] [--threads 2] [--repeats 5]

Forward, and forward and backward, alternating, medians. The variables keep freed memory, as the launcher of training
does.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

from longctx.kernels import convolution, pointwise
from longctx.kernels.attention import block as attention
from longctx.kernels.attention.block import CAUSAL, BlockMask, packed_documents
from longctx.kernels.linear.additive import chunked, native
from longctx.kernels.linear.delta import chunked as torch_delta
from longctx.kernels.linear.delta import native as native_delta
from longctx.kernels.linear.recurrence import Inputs, Segment
from longctx.kernels.native import library
from longctx.kernels.native.library import SWITCH

DTYPES = (torch.float32, torch.bfloat16)
Pass = Callable[[], tuple[float, float]]
"""A measurement: the seconds of forward, and of forward and backward."""


@dataclass(frozen=True)
class Case:
    """One call, by the native kernels and by torch."""

    name: str
    native: Pass
    torch: Pass


def timed(forward: Callable[[], object], backward: Callable[[], object]) -> tuple[float, float]:
    """Time a forward pass, and it with the backward pass."""
    began = time.perf_counter()
    forward()
    middle = time.perf_counter() - began
    backward()
    return middle, time.perf_counter() - began


def additive(tokens: int = 32768, heads: int = 8, dim: int = 128) -> Iterator[Case]:
    """Yield the recurrence with a constant, a scalar and a vector decay, with gradients of the last two."""
    for kind, shape in (("constant", (heads,)), ("scalar", (1, tokens, heads)), ("vector", (1, tokens, heads, dim))):
        for dtype in DTYPES:
            q, k, v, do = (torch.randn(1, tokens, heads, dim, dtype=dtype) for _ in range(4))
            gate = -0.1 * torch.rand(shape)
            inputs = Inputs(q / dim**0.5, k / dim**0.5, v, (gate,))
            segments, zero = [Segment(0, tokens)], inputs.empty_state()[None]

            def run(
                module: ModuleType, inputs: Inputs = inputs, zero: Tensor = zero, do: Tensor = do,
                segments: list[Segment] = segments,
            ) -> tuple[float, float]:  # fmt: skip
                gates = inputs.gates[0].dim() > 1
                return timed(
                    lambda: module.apply(inputs, segments, zero),
                    lambda: module.apply_grad(inputs, segments, do, zero, zero, gates),
                )

            name = f"recurrence, {kind} decay, {_name(dtype)}, {tokens:,} tokens, {heads} x {dim}"
            yield Case(name, partial(run, native), partial(run, chunked))


def delta(tokens: int = 32768, heads: int = 8, dim: int = 128) -> Iterator[Case]:
    """Yield the delta rule without a decay, with a scalar one (Gated DeltaNet) and with a vector one (KDA)."""
    for kind, shape in (("no", None), ("scalar", (1, tokens, heads)), ("vector", (1, tokens, heads, dim))):
        for dtype in DTYPES:
            q, k, v, do = (torch.randn(1, tokens, heads, dim).to(dtype) for _ in range(4))
            k = torch.nn.functional.normalize(k.float(), dim=-1).to(dtype)
            beta = torch.rand(1, tokens, heads).to(dtype)
            gates = (beta,) if shape is None else (beta, -0.1 * torch.rand(shape))
            inputs, segments = Inputs(q / dim**0.5, k, v, gates), [Segment(0, tokens)]
            zero = inputs.empty_state()[None]

            def run(
                module: ModuleType, inputs: Inputs = inputs, zero: Tensor = zero, do: Tensor = do,
                segments: list[Segment] = segments,
            ) -> tuple[float, float]:  # fmt: skip
                return timed(
                    lambda: module.apply(inputs, segments, zero),
                    lambda: module.apply_grad(inputs, segments, do, zero, zero, True),
                )

            name = f"delta rule, {kind} decay, {_name(dtype)}, {tokens:,} tokens, {heads} x {dim}"
            yield Case(name, partial(run, native_delta), partial(run, torch_delta))


def attend(tokens: int = 4096) -> Iterator[Case]:
    """Yield causal attention, in two documents of the quickstart's widths, and in one with wider heads."""
    two = packed_documents((0, tokens // 3, tokens))
    for dtype in DTYPES:
        for heads, key_heads, dim, mask, text in (
            (4, 2, 32, two, "two documents"), (4, 4, 64, CAUSAL, "causal"), (4, 4, 128, CAUSAL, "causal"),
        ):  # fmt: skip
            q, k, v, do = (torch.randn(1, tokens, n, dim).to(dtype) for n in (heads, key_heads, key_heads, heads))

            def run(
                backend: str, inputs: tuple[Tensor, ...] = (do, q, k, v), mask: BlockMask = mask
            ) -> tuple[float, float]:
                do, q, k, v = inputs
                scale, found = q.shape[3] ** -0.5, []
                return timed(
                    lambda: found.append(attention.forward(q, k, v, mask, scale, backend)),
                    lambda: attention.backward(do, q, k, v, *found[0], mask, scale, backend),
                )

            name = f"attention, {text}, {_name(dtype)}, {tokens:,} tokens, {heads} on {key_heads} x {dim}"
            yield Case(name, partial(run, "cpu-native"), partial(run, "cpu-flash"))


def convolve(tokens: int = 32768) -> Iterator[Case]:
    """Yield short convolutions of 4 taps with SiLU, of the widths of a small and of a large layer, in two documents."""
    for dtype in DTYPES:
        for channels in (384, 2048):
            x, dy = (torch.randn(1, tokens, channels).to(dtype) for _ in range(2))
            weight, segments = torch.randn(channels, 4), [Segment(0, tokens, (tokens // 3,))]

            def run(
                switch: str, x: Tensor = x, dy: Tensor = dy, weight: Tensor = weight,
                segments: list[Segment] = segments,
            ) -> tuple[float, float]:  # fmt: skip
                arguments = x, weight, None, x.new_zeros(1, 1, 3, x.shape[2]), segments, "silu"
                with patch.dict(os.environ, {SWITCH: switch}):
                    return timed(lambda: convolution.forward(*arguments), lambda: convolution.backward(dy, *arguments))

            name = f"short convolution, {_name(dtype)}, {tokens:,} x {channels}"
            yield Case(name, partial(run, "1"), partial(run, "0"))


def rows(tokens: int = 65536, dim: int = 256) -> Iterator[Case]:
    """Yield RMSNorm, with a gate and without, and SwiGLU."""
    for dtype in DTYPES:
        x, gate = (torch.randn(tokens, dim).to(dtype).requires_grad_() for _ in range(2))
        weight, pair = torch.ones(dim, requires_grad=True), torch.randn(tokens // 2, 5 * dim).to(dtype).requires_grad_()
        functions: dict[str, Callable[[], Tensor]] = {
            "RMSNorm": partial(pointwise.rms_norm, x, weight, 1e-5),
            "gated RMSNorm": partial(pointwise.gated_rms_norm, x, weight, gate, 1e-5, "silu"),
            "SwiGLU": partial(pointwise.swiglu, pair),
        }
        for name, function in functions.items():

            def run(switch: str, function: Callable[[], Tensor] = function) -> tuple[float, float]:
                found: list[Tensor] = []
                with patch.dict(os.environ, {SWITCH: switch}):
                    do = torch.ones_like(function())
                    return timed(lambda: found.append(function()), lambda: found[0].backward(do))

            text = f"{name}, {_name(dtype)}, {tokens:,} x {dim}"
            yield Case(text, partial(run, "1"), partial(run, "0"))


FAMILIES: dict[str, Callable[..., Iterator[Case]]] = {
    "additive": additive,
    "attention": attend,
    "convolution": convolve,
    "delta": delta,
    "pointwise": rows,
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.native", description=__doc__)
    parser.add_argument("family", nargs="*", help=f"{', '.join(FAMILIES)}; all without one")
    parser.add_argument("--tokens", type=int, help="instead of those of the published tables")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if unknown := set(arguments.family) - set(FAMILIES):
        parser.error(f"no family {', '.join(sorted(unknown))}: choose of {', '.join(FAMILIES)}")
    sizes = {} if arguments.tokens is None else {"tokens": arguments.tokens}
    torch.set_num_threads(arguments.threads)
    library.loaded()  # builds what has not been built: not to be timed
    sys.stdout.write("| kernel | pass | native, ms | torch, ms | ratio |\n|---|---|---|---|---|\n")
    for family in arguments.family or FAMILIES:
        for case in FAMILIES[family](**sizes):
            pairs = [(case.native(), case.torch()) for _ in range(arguments.repeats)]
            for number, text in enumerate(("forward", "forward + backward")):
                fast, slow = (1e3 * median(pair[which][number] for pair in pairs) for which in (0, 1))
                sys.stdout.write(f"| {case.name} | {text} | {fast:.0f} | {slow:.0f} | {slow / fast:.2f} |\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
