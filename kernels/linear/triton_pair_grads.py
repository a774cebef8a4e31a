"""Triton functions for vector decays: gradients of the scores of `longctx.kernels.linear.triton_pairs`.

Tiles are `[C / 16, BK, 16]`, "by channel": tokens are columns. Sums over tokens then are products whose first factor is
what a warp has computed before, in registers, and whose second is a mask or a matrix of 16 x 16 tokens.

The gradient A of scores is read mirrored, A + A^T without its diagonal twice. With x x^T the scores of a level, its
product with x is the gradient of all rows of x at once: of q in a block's second half, of k in its first.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton_chunk import clamp_decay, halvings, load_tile
from longctx.kernels.linear.triton_pairs import (
    LEVELS,
    LOG2_E,
    SUB_BLOCK,
    block_factor_pointers,
    block_mask,
    by_sub_block,
    everywhere,
    in_second_half,
    matmul,
    near_indices,
    parts,
)


@triton.jit
def by_channel(tile, C: tl.constexpr, BK: tl.constexpr):
    """Turn `[C, BK]` into float32 `[C / 16, BK, 16]`."""
    return tl.permute(by_sub_block(tile, C, BK), (0, 2, 1)).to(tl.float32)


@triton.jit
def by_token(tile, C: tl.constexpr, BK: tl.constexpr):
    """Turn `[C / 16, BK, 16]` into `[C, BK]`."""
    return tl.reshape(tl.permute(tile, (0, 2, 1)), [C, BK])


@triton.jit
def load_channels(at, stride, size, channel, C: tl.constexpr, BK: tl.constexpr, K: tl.constexpr):
    """Load a tile by channel, in float32; arguments as in `load_tile`."""
    return by_channel(load_tile(at, stride, size, channel, C, BK, K), C, BK)


@triton.jit
def load_log2_decay_by_channel(at, stride, size, channel, C: tl.constexpr, BK: tl.constexpr, K: tl.constexpr):
    """Load a chunk's vector log-decays by channel, in base 2, 0 from row `size` on."""
    return clamp_decay(load_channels(at, stride, size, channel, C, BK, K)) * LOG2_E


@triton.jit
def _sums(x, mask, DOT: tl.constexpr):
    """Compute the sum of three `parts` by channel times a mask `[B, 16, 16]`, in float32."""
    if tl.bfloat16 == DOT:
        ones = mask.to(tl.float32).to(tl.bfloat16)
        sums = tl.dot(x[2], ones, tl.dot(x[1], ones, tl.dot(x[0], ones)))
    else:
        sums = tl.dot(x[0], mask.to(tl.float32), input_precision="tf32x3")
    return sums


@triton.jit
def _sum_terms(terms, mask, sums, DOT: tl.constexpr):
    """Add terms of gradients by channel times a mask `[B, 16, 16]` to sums, to 16 bits where products are bf16."""
    if tl.bfloat16 == DOT:
        ones = mask.to(tl.float32).to(tl.bfloat16)
        high, low, _ = parts(terms, DOT)
        sums = tl.dot(low, ones, tl.dot(high, ones, sums))
    else:
        sums = tl.dot(terms, mask.to(tl.float32), sums, input_precision="tf32x3")
    return sums


@triton.jit
def prefix_by_channel(decay_parts, C: tl.constexpr, DOT: tl.constexpr):
    """As `triton_pairs.prefix`."""
    i, j = near_indices()
    return tl.exp2(_sums(decay_parts, everywhere(i <= j, C), DOT))


@triton.jit
def suffix_by_channel(decay_parts, C: tl.constexpr, DOT: tl.constexpr):
    """As `triton_pairs.suffix`."""
    i, j = near_indices()
    return tl.exp2(_sums(decay_parts, everywhere(i > j, C), DOT))


@triton.jit
def _load_block_factor(at, kind: tl.constexpr, channel, C: tl.constexpr, BK: tl.constexpr, K: tl.constexpr):
    """Load one kind of a chunk's block factors by channel, `[C / 16, BK, 1]`."""
    pointers, mask = block_factor_pointers(at, kind, channel, C, BK, K)
    return tl.load(pointers, mask=mask, other=0.0)[:, :, None]


@triton.jit
def _sum_blocks(kind: tl.constexpr, terms, C: tl.constexpr):
    """Sum terms by channel over the sub-blocks whose block factors of a kind have each sub-block in them, `[B, BK]`."""
    mask = block_mask(kind, C)
    return tl.sum(tl.where(mask[:, :, None], tl.sum(terms, 2)[:, None, :], 0.0), 0)


@triton.jit
def mirror(lower, upper, C: tl.constexpr):
    """Return `lower` `[C, C]` on and below the diagonal, and `upper`, its transpose, above."""
    row = tl.arange(0, C)
    return tl.where(row[:, None] >= row[None, :], lower, upper)


@triton.jit
def load_near_grads(at, C: tl.constexpr):
    """Load the gradients of near scores, `[C / 16, 16, 16]`, from mirrored ones `[C, C]`."""
    i, j = near_indices()
    first = tl.arange(0, C // SUB_BLOCK)[:, None, None] * SUB_BLOCK
    return tl.load(at + (first + i) * C + first + j)


@triton.jit
def near_grads(
    grads,
    x,
    y,
    decay_parts,
    dx,
    dy,
    dgates,
    WITH_GATE: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to dx, dy and dgates, float32 by channel, what comes from the near scores of x and y.

    `grads` is their gradient, of `load_near_grads`.
    """
    i, j = near_indices()
    diagonal = tl.sum(tl.where(i == j, grads.to(tl.float32), 0.0), 1)[:, None, :]
    dx += diagonal * y
    dy += diagonal * x
    for level in range(LEVELS):
        second = ((j >> level) & 1) == 1
        same_half = (i ^ j) < (1 << level)
        factor = tl.exp2(_sums(decay_parts, everywhere(same_half & ((i <= j) == second), C), DOT))
        z = tl.where(second, x, y)
        level_grads = tl.where((i ^ j) >> level == 1, grads, 0.0)
        dz = factor * matmul(z * factor, level_grads, DOT, PRECISION)
        dx += tl.where(second, dz, 0.0)
        dy += tl.where(second, 0.0, dz)
        if WITH_GATE:
            # A decay acts on the pairs of every token for which it is between the token and the middle.
            acts_on = everywhere(same_half & ((j <= i) == second), C)
            dgates = _sum_terms(dz * z, acts_on, dgates, DOT)
    return dx, dy, dgates


@triton.jit
def _far_grads(
    grads,
    x,
    y,
    factors_at,
    channel,
    dx,
    dtotals,
    WITH_GATE: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return dy, and dx and dtotals `[C / 16, BK]` with what comes from the scores of `far_scores` added, float32.

    `grads` is their mirrored gradient, `[C, C]`. x, y, dx and dy are those with factors `prefix` and `suffix`.
    """
    dy = tl.zeros_like(y)
    row = tl.arange(0, C)
    i, j = row[:, None] >> LEVELS, row[None, :] >> LEVELS
    for level in tl.static_range(halvings(C) - LEVELS):
        second = in_second_half(level, C)
        z = tl.where(second, x, y)
        level_grads = tl.where((j >> level) == ((i >> level) ^ 1), grads, 0.0)
        if level > 0:
            factor = _load_block_factor(factors_at, level + 1, channel, C, BK, K)
            z *= factor
        dz = by_channel(matmul(level_grads, by_token(z.to(DOT), C, BK), DOT, PRECISION), C, BK)
        if level > 0:
            if WITH_GATE:
                dtotals += _sum_blocks(level + 1, dz * z, C)
            dz *= factor
        dx += tl.where(second, dz, 0.0)
        dy += tl.where(second, 0.0, dz)
    return dx, dy, dtotals


@triton.jit
def _state_grads(
    x,
    dx,
    factors_at,
    kind: tl.constexpr,
    channel,
    dtotals,
    WITH_GATE: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    K: tl.constexpr,
):
    """Return the gradient of x for tokens that read (kind 0) or write a state (1), and dtotals with theirs added.

    What they read or write with is x (by channel, with `prefix` or `suffix`) times a block factor; dx is its gradient.
    """
    dx *= _load_block_factor(factors_at, kind, channel, C, BK, K)
    if WITH_GATE:
        dtotals += _sum_blocks(kind, x * dx, C)
    return dx, dtotals


@triton.jit
def write_grads(
    y,
    to_end,
    factors_at,
    channel,
    dy,
    dgates,
    dtotals,
    WITH_GATE: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    K: tl.constexpr,
    DOT: tl.constexpr,
):
    """Return the gradient of keys y that write to the state, and the gradients of decays with theirs added.

    dy is the gradient of what they write, 0 for tokens that do not; other arguments as in `far_grads`.
    """
    far_y = y * to_end
    dy, dtotals = _state_grads(far_y, dy, factors_at, 1, channel, dtotals, WITH_GATE, C, BK, K)
    if WITH_GATE:
        i, j = near_indices()
        dgates = _sum_terms(far_y * dy, everywhere(i < j, C), dgates, DOT)
    return dy * to_end, dgates, dtotals


@triton.jit
def far_grads(
    grads_at,
    x,
    y,
    from_start,
    to_end,
    factors_at,
    channel,
    dx_state,
    dx,
    dy,
    dgates,
    dtotals,
    WITH_GATE: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to dx, dy, dgates and dtotals what comes from the far scores of x and y, and from x reading the state.

    All by channel, float32, but dtotals, the gradients of sub-blocks' total log-decays, `[C / 16, BK]`. `grads_at`
    points to the mirrored gradient of the scores, `[C, C]`, factors_at to the chunk's block factors; dx_state is the
    gradient of what reads the state, 0 for tokens that do not. from_start and to_end are `prefix_by_channel` and
    `suffix_by_channel`. dgates and dtotals are as they were without WITH_GATE.
    """
    far_x, far_y = x * from_start, y * to_end
    far_dx, dtotals = _state_grads(far_x, dx_state, factors_at, 0, channel, dtotals, WITH_GATE, C, BK, K)
    grads = load_tile(grads_at, C, C, 0, C, C, C)
    far_dx, far_dy, dtotals = _far_grads(
        grads, far_x, far_y, factors_at, channel, far_dx, dtotals, WITH_GATE, C, BK, K, DOT, PRECISION
    )
    if WITH_GATE:
        i, j = near_indices()
        dgates = _sum_terms(far_x * far_dx, everywhere(j <= i, C), dgates, DOT)
        dgates = _sum_terms(far_y * far_dy, everywhere(i < j, C), dgates, DOT)
    return dx + far_dx * from_start, dy + far_dy * to_end, dgates, dtotals
