"""The scan over segments on CUDA, in Triton: each state is read once and written once, whatever the number of segments.

One program for each batch row, head and block of a state's elements, which it carries from segment to segment.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a state that a program carries."""


@triton.jit
def scan_kernel(
    transition, added, first, states, end,
    count, rows, size, value_dim,
    VECTOR: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """transition `[N, R]` or `[N, R, K]`, added and states `[N, R, K V]`, first and end `[R, K V]`; R is B x H."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    state = tl.load(first + row * size + at, mask=inside, other=0.0)
    for step in range(count):
        number = count - 1 - step if REVERSE else step
        place = (number * rows + row) * size + at
        tl.store(states + place, state, mask=inside)
        if VECTOR:
            keys = size // value_dim
            log = tl.load(transition + (number * rows + row) * keys + at // value_dim, mask=inside, other=0.0)
        else:
            log = tl.load(transition + number * rows + row)
        state = state * tl.exp(log) + tl.load(added + place, mask=inside, other=0.0)
    tl.store(end + row * size + at, state, mask=inside)


def scan_segments_triton(transition: Tensor, added: Tensor, first: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """`longctx.kernels.linear.segment_scan.scan_segments` for logarithms `[N, B, H]` or `[N, B, H, K]` and float32
    states."""
    transition, added, first = (x.contiguous() for x in (transition, added, first))
    count, batch, heads, key_dim, value_dim = added.shape
    states, end = torch.empty_like(added), torch.empty_like(first)
    size = key_dim * value_dim
    grid = (batch * heads, triton.cdiv(size, BLOCK))
    scan_kernel[grid](
        transition, added, first, states, end,
        count, batch * heads, size, value_dim,
        VECTOR=transition.dim() == 4, REVERSE=reverse, BLOCK=BLOCK,
    )  # fmt: skip
    return states, end
