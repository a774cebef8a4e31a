"""Exclusive scan over segments in Triton, on CUDA: each state is read once and written once.

One program per batch row, head and block of a state's elements, which it carries from segment to segment.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a state per program."""


@triton.jit
def scan_kernel(
    transition, carry_state, initial_state, states, end,
    count, rows, size, value_dim,
    VECTOR: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scan scalar or diagonal carries.

    Shapes: transition `[N, R]` or `[N, R, K]`, carry_state and states `[N, R, K V]`, initial_state and end `[R, K V]`;
    R is B x H.
    """
    row = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    state = tl.load(initial_state + row * size + offset, mask=mask, other=0.0)
    for step in range(count):
        segment = count - 1 - step if REVERSE else step
        index = (segment * rows + row) * size + offset
        tl.store(states + index, state, mask=mask)
        if VECTOR:
            keys = size // value_dim
            log_decay = tl.load(transition + (segment * rows + row) * keys + offset // value_dim, mask=mask, other=0.0)
        else:
            log_decay = tl.load(transition + segment * rows + row)
        state = state * tl.exp(log_decay) + tl.load(carry_state + index, mask=mask, other=0.0)
    tl.store(end + row * size + offset, state, mask=mask)


def scan_segments_triton(
    transition: Tensor, carry_state: Tensor, initial_state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Compute `longctx.kernels.linear.segment_scan.scan_segments` for float32 scalar or diagonal carries.

    Shapes: transition, the cumulative log-decays, `[N, B, H]` or `[N, B, H, K]`; carry_state `[N, B, H, K, V]`;
    initial_state `[B, H, K, V]`.
    """
    transition, carry_state, initial_state = (x.contiguous() for x in (transition, carry_state, initial_state))
    count, batch, heads, key_dim, value_dim = carry_state.shape
    states, end = torch.empty_like(carry_state), torch.empty_like(initial_state)
    size = key_dim * value_dim
    grid = (batch * heads, triton.cdiv(size, BLOCK))
    scan_kernel[grid](
        transition, carry_state, initial_state, states, end,
        count, batch * heads, size, value_dim,
        VECTOR=transition.dim() == 4, REVERSE=reverse, BLOCK=BLOCK,
    )  # fmt: skip
    return states, end
