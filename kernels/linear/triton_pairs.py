"""Triton functions for vector decays: decay factors, scores and their gradients in chunks of sub-blocks of 16 tokens.

With log-decays g of a channel, the score of tokens j < i needs exp(g_(j+1) + .. + g_i). Halve the chunk, and its halves
again, down to single tokens: at one level, j is in a block's first half and i in its second, and the factor between
them is that from the middle to i times that from j to the middle. All pairs of a level are one product of tensor cores,
x x^T, in which row i is q_i times its factor and row j is k_j times its. Factors are exponentials of sums of
log-decays, at most 1, and never a quotient or the rounded difference of two long sums: pairs of tokens after a decay of
exp(-1000) are as exact as any other.

    near    levels within sub-blocks of 16 tokens: batches of `[16, 16]` products, one per warp, no data between warps
    far     levels across sub-blocks: `[C, C]` products. Factors are those from the sub-block's start to token i
            (`prefix`), from token j to its end (`suffix`), and of the sub-blocks between (`block_factor`)

Sums over tokens are products with masks of 0 and 1 on tensor cores, where bf16 tiles are multiplied with the log-decays
in three bf16 parts, which together are float32 (24 bits), else tf32x3. Log-decays are in base 2, for exp2.

Tiles are `[C / 16, 16, BK]`, "by sub-block". float32 products that are not tf32 are tf32x3, accurate to about 1e-6.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton_chunk import clamp_decay, halvings, load_tile

SUB_BLOCK = tl.constexpr(16)
LEVELS = tl.constexpr(4)
"""Levels within a sub-block."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def by_sub_block(tile, C: tl.constexpr, BK: tl.constexpr):
    """Reshape `[C, BK]` to `[C / 16, 16, BK]`."""
    return tl.reshape(tile, [C // SUB_BLOCK, SUB_BLOCK, BK])


@triton.jit
def load_sub_blocks(at, stride, size, channel, C: tl.constexpr, BK: tl.constexpr, K: tl.constexpr):
    """Load a tile by sub-block, in float32; arguments as in `load_tile`."""
    return by_sub_block(load_tile(at, stride, size, channel, C, BK, K), C, BK).to(tl.float32)


@triton.jit
def load_log2_decay(at, stride, size, channel, C: tl.constexpr, BK: tl.constexpr, K: tl.constexpr):
    """Load a chunk's vector log-decays by sub-block, in base 2, 0 from row `size` on."""
    return clamp_decay(load_sub_blocks(at, stride, size, channel, C, BK, K)) * LOG2_E


@triton.jit
def matmul(x, y, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Compute `x y` with factors of dtype DOT, accumulated in float32; exact float32 products become tf32x3."""
    INPUT_PRECISION: tl.constexpr = "tf32x3" if PRECISION == "ieee" else PRECISION
    return tl.dot(x.to(DOT), y.to(DOT), input_precision=INPUT_PRECISION)


@triton.jit
def _bf16_part(x):
    """Return x cut to the bits of bf16, in float32."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def parts(x, DOT: tl.constexpr):
    """Return three bf16 tiles whose sum is x, float32; without bf16 products x itself, as all three."""
    if tl.bfloat16 == DOT:
        high = _bf16_part(x)
        rest = x - high
        middle = _bf16_part(rest)
        result = (high.to(tl.bfloat16), middle.to(tl.bfloat16), (rest - middle).to(tl.bfloat16))
    else:
        result = (x, x, x)
    return result


@triton.jit
def _mask_product(mask, x, DOT: tl.constexpr):
    """Compute a mask `[B, 16, 16]` times the sum of three `parts` by sub-block, in float32."""
    if tl.bfloat16 == DOT:
        ones = mask.to(tl.float32).to(tl.bfloat16)
        sums = tl.dot(ones, x[2], tl.dot(ones, x[1], tl.dot(ones, x[0])))
    else:
        sums = tl.dot(mask.to(tl.float32), x[0], input_precision="tf32x3")
    return sums


@triton.jit
def near_indices():
    """Return token numbers within a sub-block, `[1, 16, 1]` and `[1, 1, 16]`."""
    row = tl.arange(0, SUB_BLOCK)
    return row[None, :, None], row[None, None, :]


@triton.jit
def everywhere(mask, C: tl.constexpr):
    """Repeat a mask `[1, 16, 16]` for all sub-blocks."""
    return tl.broadcast_to(mask, [C // SUB_BLOCK, SUB_BLOCK, SUB_BLOCK])


@triton.jit
def prefix(decay_parts, C: tl.constexpr, DOT: tl.constexpr):
    """Return the factors from a sub-block's start to each of its tokens, that token's decay included."""
    i, j = near_indices()
    return tl.exp2(_mask_product(everywhere(j <= i, C), decay_parts, DOT))


@triton.jit
def suffix(decay_parts, C: tl.constexpr, DOT: tl.constexpr):
    """Return the factors from each token of a sub-block to its end, that token's decay not included."""
    i, j = near_indices()
    return tl.exp2(_mask_product(everywhere(j > i, C), decay_parts, DOT))


@triton.jit
def _near_level(decay_parts, level, C: tl.constexpr, DOT: tl.constexpr):
    """Return which tokens are in a second half, `[1, 16, 1]`, and their factors from or to the middle."""
    i, j = near_indices()
    second = ((i >> level) & 1) == 1
    between = ((i ^ j) < (1 << level)) & ((j <= i) == second)
    return second, tl.exp2(_mask_product(everywhere(between, C), decay_parts, DOT))


@triton.jit
def near_scores(x, y, decay_parts, scores, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Add to scores `[C / 16, 16, 16]` those of x and y, float32 by sub-block, on and below the diagonal.

    Above it they are not to be read.
    """
    i, j = near_indices()
    scores += tl.where(i == j, matmul(x, tl.permute(y, (0, 2, 1)), DOT, PRECISION), 0.0)
    for level in range(LEVELS):
        second, factor = _near_level(decay_parts, level, C, DOT)
        z = (tl.where(second, x, y) * factor).to(DOT)
        scores += tl.where((i ^ j) >> level == 1, matmul(z, tl.permute(z, (0, 2, 1)), DOT, PRECISION), 0.0)
    return scores


@triton.jit
def _block_numbers(C: tl.constexpr):
    """Return sub-block numbers, `[C / 16, 1]` and `[1, C / 16]`."""
    block = tl.arange(0, C // SUB_BLOCK)
    return block[:, None], block[None, :]


@triton.jit
def block_mask(kind, C: tl.constexpr):
    """Return which sub-blocks (columns) are between each sub-block (row) and a place: `[C / 16, C / 16]`.

    The chunk's start for kind 0, its end for kind 1, and the middle of far level `kind - 1` for others.
    """
    i, j = _block_numbers(C)
    if kind == 0:
        mask = j < i
    elif kind == 1:
        mask = j > i
    else:
        level = kind - 1
        mask = ((i ^ j) < (1 << level)) & (i != j) & ((j < i) == (((i >> level) & 1) == 1))
    return mask


@triton.jit
def block_factor(totals, kind: tl.constexpr, C: tl.constexpr):
    """Return the decay over the sub-blocks of `block_mask`, `[C / 16, BK]`, from total log-decays `[C / 16, BK]`."""
    return tl.exp2(tl.sum(tl.where(block_mask(kind, C)[:, :, None], totals[None, :, :], 0.0), 1))


@triton.jit
def block_factor_pointers(at, kind: tl.constexpr, channel, C: tl.constexpr, BK: tl.constexpr, K: tl.constexpr):
    """Return where a chunk's block factors are, `[C / 16, BK]`, in memory `[kinds, C / 16, K]`, and a mask."""
    rows = kind * (C // SUB_BLOCK) + tl.arange(0, C // SUB_BLOCK)[:, None]
    channels = channel + tl.arange(0, BK)[None, :]
    return at + rows * K + channels, (rows >= 0) & (channels < K)


@triton.jit
def state_factor(decay, REVERSE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr):
    """Return the decays from each token to the chunk's end, or with REVERSE from its start to each: `[C, BK]`."""
    decay_parts, totals = parts(decay, DOT), tl.sum(decay, 1)
    if REVERSE:
        factor = prefix(decay_parts, C, DOT) * block_factor(totals, 0, C)[:, None, :]
    else:
        factor = suffix(decay_parts, C, DOT) * block_factor(totals, 1, C)[:, None, :]
    return tl.reshape(factor, [C, BK])


@triton.jit
def in_second_half(level, C: tl.constexpr):
    """Return which sub-blocks are in the second half of a block of a far level, `[C / 16, 1, 1]`."""
    block, _ = _block_numbers(C)
    return (((block >> level) & 1) == 1)[:, :, None]


@triton.jit
def far_scores(
    x,
    y,
    totals,
    scores,
    factors_at,
    channel,
    C: tl.constexpr,
    BK: tl.constexpr,
    K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to scores `[C, C]` those of tokens in different sub-blocks, below the diagonal, where they are to be read.

    x and y are those times `prefix` and `suffix`. Where factors_at is not None, stores the factors of far levels there.
    """
    row = tl.arange(0, C)
    i, j = row[:, None] >> LEVELS, row[None, :] >> LEVELS
    for level in tl.static_range(halvings(C) - LEVELS):
        z = tl.where(in_second_half(level, C), x, y)
        if level > 0:
            factor = block_factor(totals, level + 1, C)
            z *= factor[:, None, :]
            if factors_at is not None:
                pointers, mask = block_factor_pointers(factors_at, level + 1, channel, C, BK, K)
                tl.store(pointers, factor, mask=mask)
        z = tl.reshape(z.to(DOT), [C, BK])
        product = matmul(z, tl.trans(z), DOT, PRECISION)
        scores += tl.where((j >> level) == ((i >> level) ^ 1), product, 0.0)
    return scores


@triton.constexpr_function
def factor_kinds(size):
    """Return how many kinds of block factors a chunk has."""
    return max(2, halvings(size) - 3)


@triton.jit
def add_scores(
    x,
    y,
    decay,
    near,
    far,
    factors_at,
    channel,
    C: tl.constexpr,
    BK: tl.constexpr,
    K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a block of channels to the scores of x and y, float32 by sub-block, as `join_scores` takes them.

    Also returns x decayed from the chunk's start and y decayed to its end, `[C, BK]` in the dtype of products, and the
    decay of the whole chunk, `[BK]`. Stores the block factors at factors_at where that is not None.
    """
    decay_parts = parts(decay, DOT)
    near = near_scores(x, y, decay_parts, near, C, DOT, PRECISION)
    x *= prefix(decay_parts, C, DOT)
    y *= suffix(decay_parts, C, DOT)
    totals = tl.sum(decay, 1)
    far = far_scores(x, y, totals, far, factors_at, channel, C, BK, K, DOT, PRECISION)
    reads, writes = block_factor(totals, 0, C), block_factor(totals, 1, C)
    if factors_at is not None:
        pointers, mask = block_factor_pointers(factors_at, 0, channel, C, BK, K)
        tl.store(pointers, reads, mask=mask)
        pointers, mask = block_factor_pointers(factors_at, 1, channel, C, BK, K)
        tl.store(pointers, writes, mask=mask)
    x = tl.reshape((x * reads[:, None, :]).to(DOT), [C, BK])
    y = tl.reshape((y * writes[:, None, :]).to(DOT), [C, BK])
    return near, far, x, y, tl.exp2(tl.sum(totals, 0))


@triton.jit
def join_scores(near, far, C: tl.constexpr):
    """Join near and far scores: `[C, C]`, 0 above the diagonal."""
    BLOCKS: tl.constexpr = C // SUB_BLOCK
    near = tl.reshape(near, [BLOCKS, SUB_BLOCK, 1, SUB_BLOCK])
    near = tl.reshape(tl.broadcast_to(near, [BLOCKS, SUB_BLOCK, BLOCKS, SUB_BLOCK]), [C, C])
    row = tl.arange(0, C)
    i, j = row[:, None], row[None, :]
    return tl.where(j <= i, tl.where((i >> LEVELS) == (j >> LEVELS), near, far), 0.0)
