"""Exclusive scan over segments in Triton, on CUDA: one kernel for any number of segments.

    S_{n+1} = A_n S_n + C_n        A_n a scalar or a diagonal, given by its logarithm, or a matrix

Each carry is read once and each state written once. A program carries a block of a state's elements, or with matrix
transitions a block of its columns, from segment to segment.

Errors would add up over all segments of a sequence: scalar and diagonal transitions are applied in float64, in a kernel
that waits for memory, and products with matrices are exact (IEEE).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.kernels.device import launch_device

BLOCK = 1024
"""Elements of a state per program, for scalar and diagonal transitions."""
COLUMNS, INNER = 16, 32
"""Columns of a state per program, and the rows of it per product, for matrix transitions."""


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
    state = tl.load(initial_state + row * size + offset, mask=mask, other=0.0).to(tl.float64)
    for step in range(count):
        segment = count - 1 - step if REVERSE else step
        index = (segment * rows + row) * size + offset
        tl.store(states + index, state.to(tl.float32), mask=mask)
        if VECTOR:
            keys = size // value_dim
            log_decay = tl.load(transition + (segment * rows + row) * keys + offset // value_dim, mask=mask, other=0.0)
        else:
            log_decay = tl.load(transition + segment * rows + row)
        kept = tl.where(log_decay == float("-inf"), 0.0, state * tl.exp(log_decay.to(tl.float64)))
        state = kept + tl.load(carry_state + index, mask=mask, other=0.0)
    tl.store(end + row * size + offset, state.to(tl.float32), mask=mask)


@triton.jit
def matrix_scan_kernel(
    transition, carry_state, initial_state, states, end,
    count, rows,
    K: tl.constexpr, V: tl.constexpr, KEEP: tl.constexpr, REVERSE: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Scan carries with matrix transitions.

    Shapes: transition `[N, R, K, K]`, carry_state `[N, R, K, V]` or None for zeros, initial_state `[R, K, V]` or None
    for the identity, end `[R, K, V]`; states `[N, R, K, V]` with KEEP, else `[2, R, K, V]` of scratch memory. BK is K,
    rounded up to a power of two.

    A program cannot slice its state in registers: it stores it, which the result needs anyway, and reads it back by
    rows.
    """
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BK)[:, None]
    columns = tl.program_id(1) * BV + tl.arange(0, BV)[None, :]
    offset = channels * V + columns
    mask = (channels < K) & (columns < V)
    if initial_state is not None:
        state = tl.load(initial_state + row * K * V + offset, mask=mask, other=0.0)
    else:
        state = tl.where(channels == columns, 1.0, 0.0)
    for step in range(count):
        segment = count - 1 - step if REVERSE else step
        index = segment * rows + row
        # Of the two slots of scratch memory, a fast warp writes the one that no slow warp still reads: the barrier of
        # this step comes after all reads of the step before.
        states_at = states + (index if KEEP else (step % 2) * rows + row) * K * V
        tl.store(states_at + offset, state, mask=mask)
        tl.debug_barrier()
        if carry_state is not None:
            state = tl.load(carry_state + index * K * V + offset, mask=mask, other=0.0)
        else:
            state = tl.zeros([BK, BV], tl.float32)
        for first in range(0, K, INNER):
            inner = first + tl.arange(0, INNER)
            left = tl.load(
                transition + index * K * K + channels * K + inner[None, :],
                mask=(channels < K) & (inner[None, :] < K),
                other=0.0,
            )
            right = tl.load(
                states_at + inner[:, None] * V + columns, mask=(inner[:, None] < K) & (columns < V), other=0.0
            )
            state += tl.dot(left, right, input_precision="ieee")
    tl.store(end + row * K * V + offset, state, mask=mask)


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
    with launch_device(carry_state.device):
        scan_kernel[grid](
            transition, carry_state, initial_state, states, end,
            count, batch * heads, size, value_dim,
            VECTOR=transition.dim() == 4, REVERSE=reverse, BLOCK=BLOCK,
        )  # fmt: skip
    return states, end


def scan_matrices(
    transition: Tensor, carry_state: Tensor, initial_state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Compute `longctx.kernels.linear.segment_scan.scan_segments` for float32 carries with matrix transitions.

    Shapes: transition `[N, B, H, K, K]`, carry_state `[N, B, H, K, V]`, initial_state `[B, H, K, V]`.
    """
    states = torch.empty_like(carry_state, memory_format=torch.contiguous_format)
    end = _scan_matrices(transition, carry_state, initial_state.contiguous(), states, reverse, keep=True)
    return states, end


def compose_matrices(transition: Tensor, carry_state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return transition `[B, H, K, K]` and state `[B, H, K, V]` of all segments in sequence, without their states.

    Shapes as in `scan_matrices`.
    """
    _, batch, heads, key_dim, value_dim = carry_state.shape
    zeros = carry_state.new_zeros(batch, heads, key_dim, value_dim)
    scratch = zeros.new_empty(2, *zeros.shape)
    state = _scan_matrices(transition, carry_state, zeros, scratch, reverse, keep=False)
    scratch = zeros.new_empty(2, batch, heads, key_dim, key_dim)
    return _scan_matrices(transition, None, None, scratch, reverse, keep=False), state


def _scan_matrices(
    transition: Tensor,
    carry_state: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    reverse: bool,
    *,
    keep: bool,
) -> Tensor:
    """Launch `matrix_scan_kernel`, which with `keep` fills `states`, and return the end state; V is `states`'s."""
    transition = transition.contiguous()
    count, batch, heads, key_dim, _ = transition.shape
    value_dim = states.shape[-1]
    end = states.new_empty(batch, heads, key_dim, value_dim)
    with launch_device(transition.device):
        matrix_scan_kernel[(batch * heads, triton.cdiv(value_dim, COLUMNS))](
            transition, None if carry_state is None else carry_state.contiguous(), initial_state, states, end,
            count, batch * heads,
            K=key_dim, V=value_dim, KEEP=keep, REVERSE=reverse,
            BK=max(INNER, triton.next_power_of_2(key_dim)), BV=COLUMNS, INNER=INNER,
        )  # fmt: skip
    return end
