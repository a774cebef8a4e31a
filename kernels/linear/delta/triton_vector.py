"""Kernels of the delta rule for vector decays (KDA), parallel over chunks, in Triton.

As `longctx.kernels.linear.delta.triton_prepare` and `triton_grads`, whose equations hold, with scores and their
gradients by sub-blocks of 16 tokens (`longctx.kernels.linear.triton_pairs`, `triton_pair_grads`).
"""

import triton
import triton.language as tl

from longctx.kernels.linear.delta.triton_prepare import invert, load_per_token
from longctx.kernels.linear.triton_chunk import load_document_masks, load_tile, locate_chunk, store_tile, token_at
from longctx.kernels.linear.triton_pair_grads import (
    by_channel,
    by_token,
    far_grads,
    load_channels,
    load_log2_decay_by_channel,
    load_near_grads,
    mirror,
    near_grads,
    prefix_by_channel,
    suffix_by_channel,
    write_grads,
)
from longctx.kernels.linear.triton_pairs import (
    SUB_BLOCK,
    add_scores,
    factor_kinds,
    join_scores,
    load_log2_decay,
    load_sub_blocks,
    matmul,
    parts,
)


@triton.jit
def prepare_kernel(
    q,
    q_strides,
    k,
    k_strides,
    beta,
    beta_strides,
    gate,
    gate_strides,
    ids,
    bounds,
    inverse,
    scores_out,
    decayed_k,
    written_k,
    decayed_q,
    keeps_out,
    factors_out,
    chunks,
    heads,
    batch,
    K: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    BETA_GROUP: tl.constexpr,
    GATE_GROUP: tl.constexpr,
    READERS: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a chunk's inverse, its decayed keys, written times beta; where not None its scores and decayed queries.

    In the dtype of products: inverse `[slots, C, C]`, scores `[slots, READERS, C, C]`, decayed_k and written_k
    `[slots, C, K]`, decayed_q `[slots, READERS, C, K]`; in float32 keeps_out `[slots, K]`, and where not None
    factors_out, the block factors for `grads_kernel`, `[slots, kinds, C / 16, K]`.
    """
    K_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    BLOCKS: tl.constexpr = C // SUB_BLOCK
    _, head, sequence, begin, start, size, slot = locate_chunk(bounds, heads, batch, chunks, 1, C)
    if size <= 0:
        return
    if ids is not None:
        same_document, reads_state, writes_state, keeps_state = load_document_masks(ids, begin, start, size, C)
    k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
    decay_at = token_at(gate, gate_strides, sequence, start, head // GATE_GROUP)
    factors_at = None
    if factors_out is not None:
        factors_at = factors_out + slot * (factor_kinds(C) * BLOCKS * K)
    betas = load_per_token(token_at(beta, beta_strides, sequence, start, head // BETA_GROUP), beta_strides[1], size, C)
    near = tl.zeros([BLOCKS, SUB_BLOCK, SUB_BLOCK], tl.float32)
    far = tl.zeros([C, C], tl.float32)
    for block in range(K_BLOCKS):
        channel = block * BK
        y = load_sub_blocks(k_at, k_strides[1], size, channel, C, BK, K)
        decay = load_log2_decay(decay_at, gate_strides[1], size, channel, C, BK, K)
        near, far, read, written, keeps = add_scores(
            y, y, decay, near, far, factors_at, channel, C, BK, K, DOT, PRECISION
        )
        if ids is not None:
            read = tl.where(reads_state[:, None], read, 0.0)
            written = tl.where(writes_state[:, None], written, 0.0)
            keeps = tl.where(keeps_state, keeps, 0.0)
        store_tile(decayed_k + slot * C * K, K, C, channel, read, C, BK, K)
        store_tile(written_k + slot * C * K, K, C, channel, betas[:, None] * written, C, BK, K)
        channels = channel + tl.arange(0, BK)
        tl.store(keeps_out + slot * K + channels, keeps, mask=channels < K)
    row = tl.arange(0, C)
    system = tl.where(row[:, None] > row[None, :], betas[None, :] * join_scores(near, far, C), 0.0)
    if ids is not None:
        system = tl.where(same_document, system, 0.0)
    store_tile(inverse + slot * C * C, C, C, 0, invert(system, C, PRECISION), C, C, C)
    if scores_out is not None:
        for reader in range(READERS):
            q_at = token_at(q, q_strides, sequence, start, (head * READERS + reader) // Q_GROUP)
            query_slot = slot * READERS + reader
            near = tl.zeros([BLOCKS, SUB_BLOCK, SUB_BLOCK], tl.float32)
            far = tl.zeros([C, C], tl.float32)
            for block in range(K_BLOCKS):
                channel = block * BK
                x = load_sub_blocks(q_at, q_strides[1], size, channel, C, BK, K)
                y = load_sub_blocks(k_at, k_strides[1], size, channel, C, BK, K)
                decay = load_log2_decay(decay_at, gate_strides[1], size, channel, C, BK, K)
                near, far, read, written, keeps = add_scores(
                    x, y, decay, near, far, None, channel, C, BK, K, DOT, PRECISION
                )
                if ids is not None:
                    read = tl.where(reads_state[:, None], read, 0.0)
                store_tile(decayed_q + query_slot * C * K, K, C, channel, read, C, BK, K)
            scores = betas[None, :] * join_scores(near, far, C)
            if ids is not None:
                scores = tl.where(same_document, scores, 0.0)
            store_tile(scores_out + query_slot * C * C, C, C, 0, scores, C, C, C)


@triton.jit
def score_grads_kernel(
    dv,
    dv_strides,
    dout,
    dout_strides,
    ids,
    bounds,
    z_in,
    score_grads,
    chunks,
    heads,
    batch,
    V: tl.constexpr,
    READERS: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradients of L and of the scores of each query head of a chunk, for `grads_kernel`.

    Mirrored as `far_grads` reads them, in the dtype of products: `[slots, 1 + READERS, C, C]`.
    """
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    _, head, sequence, begin, start, size, slot = locate_chunk(bounds, heads, batch, chunks, 1, C)
    if size <= 0:
        return
    if ids is not None:
        same_document, _, _, _ = load_document_masks(ids, begin, start, size, C)
    row = tl.arange(0, C)
    grads_at = score_grads + slot * (1 + READERS) * C * C
    dv_at = token_at(dv, dv_strides, sequence, start, head)
    lower = tl.zeros([C, C], tl.float32)
    upper = tl.zeros([C, C], tl.float32)
    for block in range(V_BLOCKS):
        z = load_tile(z_in + (slot * V + block * BV) * C, C, V - block * BV, 0, BV, C, C)
        dvalues = load_tile(dv_at, dv_strides[1], size, block * BV, C, BV, V)
        lower -= matmul(dvalues, z, DOT, PRECISION)
        upper -= matmul(tl.trans(z), tl.trans(dvalues), DOT, PRECISION)
    grads = tl.where(row[:, None] == row[None, :], 0.0, mirror(lower, upper, C))
    if ids is not None:
        grads = tl.where(same_document, grads, 0.0)
    store_tile(grads_at, C, C, 0, grads, C, C, C)
    for reader in range(READERS):
        do_at = token_at(dout, dout_strides, sequence, start, head * READERS + reader)
        lower = tl.zeros([C, C], tl.float32)
        upper = tl.zeros([C, C], tl.float32)
        for block in range(V_BLOCKS):
            z = load_tile(z_in + (slot * V + block * BV) * C, C, V - block * BV, 0, BV, C, C)
            do = load_tile(do_at, dout_strides[1], size, block * BV, C, BV, V)
            lower += matmul(do, z, DOT, PRECISION)
            upper += matmul(tl.trans(z), tl.trans(do), DOT, PRECISION)
        grads = mirror(lower, upper, C)
        if ids is not None:
            grads = tl.where(same_document, grads, 0.0)
        store_tile(grads_at + (1 + reader) * C * C, C, C, 0, grads, C, C, C)


@triton.jit
def grads_kernel(
    q,
    q_strides,
    k,
    k_strides,
    dv,
    dv_strides,
    dout,
    dout_strides,
    beta,
    beta_strides,
    gate,
    gate_strides,
    ids,
    bounds,
    score_grads,
    keeps_in,
    factors_in,
    chunk_states,
    chunk_dstates,
    z_in,
    dq,
    dq_strides,
    dk,
    dk_strides,
    dbeta,
    dbeta_strides,
    dgate,
    dgate_strides,
    chunks,
    heads,
    batch,
    K: tl.constexpr,
    V: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    BETA_GROUP: tl.constexpr,
    GATE_GROUP: tl.constexpr,
    READERS: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dq, dk and, where not None, dbeta and dgate of a chunk. A program has a block of K and loops over V.

    dq is per output head, the others per state head. dbeta is `[blocks of K x B, T, H]`, to be summed over the blocks;
    dgate `[B, T, H, K]`.
    """
    K_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    BLOCKS: tl.constexpr = C // SUB_BLOCK
    WITH_GATE: tl.constexpr = dgate is not None
    block, head, sequence, begin, start, size, slot = locate_chunk(bounds, heads, batch, chunks, K_BLOCKS, C)
    if size <= 0:
        return
    channel = block * BK
    row = tl.arange(0, C)
    k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
    beta_at = token_at(beta, beta_strides, sequence, start, head // BETA_GROUP)
    decay_at = token_at(gate, gate_strides, sequence, start, head // GATE_GROUP)
    dv_at = token_at(dv, dv_strides, sequence, start, head)
    grads_at = score_grads + slot * (1 + READERS) * C * C
    factors_at = factors_in + slot * (factor_kinds(C) * BLOCKS * K)
    if ids is not None:
        _, reads_state, writes_state, _ = load_document_masks(ids, begin, start, size, C)
    dgates = tl.zeros([BLOCKS, BK, SUB_BLOCK], tl.float32)
    dtotals = tl.zeros([BLOCKS, BK], tl.float32)
    by_block = tl.reshape(row, [BLOCKS, SUB_BLOCK])
    betas = tl.load(beta_at + by_block * beta_strides[1], mask=by_block < size, other=0.0).to(tl.float32)[:, None, :]
    # In L = pairs(K, diag(b) K) and P = pairs(Q, diag(b) K), y is diag(b) K, which writes the state; dy: its gradient.
    dy = tl.zeros([BLOCKS, BK, SUB_BLOCK], tl.float32)
    for reader in range(READERS):
        query = head * READERS + reader
        q_at = token_at(q, q_strides, sequence, start, query // Q_GROUP)
        query_grads_at = grads_at + (1 + reader) * C * C
        x = load_channels(q_at, q_strides[1], size, channel, C, BK, K)
        decay_parts = parts(load_log2_decay_by_channel(decay_at, gate_strides[1], size, channel, C, BK, K), DOT)
        y = betas * load_channels(k_at, k_strides[1], size, channel, C, BK, K)
        dx, dy, dgates = near_grads(
            load_near_grads(query_grads_at, C), x, y, decay_parts, tl.zeros_like(x), dy, dgates, WITH_GATE, C, DOT,
            PRECISION,
        )  # fmt: skip
        dx_state = tl.zeros([C, BK], tl.float32)
        do_at = token_at(dout, dout_strides, sequence, start, query)
        for v_block in range(V_BLOCKS):
            column = v_block * BV
            do = load_tile(do_at, dout_strides[1], size, column, C, BV, V)
            state = load_tile(chunk_states + (slot * V + column) * K, K, V - column, channel, BV, BK, K)
            dx_state += matmul(do, state, DOT, PRECISION)
        if ids is not None:
            dx_state = tl.where(reads_state[:, None], dx_state, 0.0)
        dx, dy, dgates, dtotals = far_grads(
            query_grads_at, x, y, prefix_by_channel(decay_parts, C, DOT), suffix_by_channel(decay_parts, C, DOT),
            factors_at, channel, by_channel(dx_state, C, BK), dx, dy, dgates, dtotals,
            WITH_GATE, C, BK, K, DOT, PRECISION,
        )  # fmt: skip
        dq_at = token_at(dq, dq_strides, sequence, start, query)
        store_tile(dq_at, dq_strides[1], size, channel, by_token(dx, C, BK), C, BK, K)
    # Loaded again: kept in registers from the queries on, they would make others spill.
    decay_parts = parts(load_log2_decay_by_channel(decay_at, gate_strides[1], size, channel, C, BK, K), DOT)
    to_end = suffix_by_channel(decay_parts, C, DOT)
    x = load_channels(k_at, k_strides[1], size, channel, C, BK, K)
    y = betas * x
    dy_state = tl.zeros([C, BK], tl.float32)
    state_dot = tl.zeros([BK], tl.float32)
    for v_block in range(V_BLOCKS):
        column = v_block * BV
        dstate = load_tile(chunk_dstates + (slot * V + column) * K, K, V - column, channel, BV, BK, K)
        z = load_tile(z_in + (slot * V + column) * C, C, V - column, 0, BV, C, C)
        dy_state += matmul(tl.trans(z), dstate, DOT, PRECISION)
        if WITH_GATE:
            state = load_tile(chunk_states + (slot * V + column) * K, K, V - column, channel, BV, BK, K)
            state_dot += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 0)
    if ids is not None:
        dy_state = tl.where(writes_state[:, None], dy_state, 0.0)
    if WITH_GATE:
        channels = channel + tl.arange(0, BK)
        state_dot *= tl.load(keeps_in + slot * K + channels, mask=channels < K, other=0.0)
        dtotals += state_dot[None, :]
    dy_written, dgates, dtotals = write_grads(
        y, to_end, factors_at, channel, by_channel(dy_state, C, BK), dgates, dtotals, WITH_GATE, C, BK, K, DOT
    )
    dy += dy_written
    dx, dy, dgates = near_grads(
        load_near_grads(grads_at, C), x, y, decay_parts, tl.zeros_like(x), dy, dgates, WITH_GATE, C, DOT, PRECISION
    )
    dx_state = tl.zeros([C, BK], tl.float32)
    for v_block in range(V_BLOCKS):
        column = v_block * BV
        dvalues = load_tile(dv_at, dv_strides[1], size, column, C, BV, V)
        state = load_tile(chunk_states + (slot * V + column) * K, K, V - column, channel, BV, BK, K)
        dx_state -= matmul(dvalues, state, DOT, PRECISION)
    if ids is not None:
        dx_state = tl.where(reads_state[:, None], dx_state, 0.0)
    dx, dy, dgates, dtotals = far_grads(
        grads_at, x, y, prefix_by_channel(decay_parts, C, DOT), to_end, factors_at, channel,
        by_channel(dx_state, C, BK), dx, dy, dgates, dtotals, WITH_GATE, C, BK, K, DOT, PRECISION,
    )  # fmt: skip
    if dbeta is not None:
        dbeta_at = token_at(dbeta, dbeta_strides, block * batch + sequence, start, head)
        tl.store(dbeta_at + row * dbeta_strides[1], tl.reshape(tl.sum(x * dy, 1), [C]), mask=row < size)
    dk_at = token_at(dk, dk_strides, sequence, start, head)
    store_tile(dk_at, dk_strides[1], size, channel, by_token(dx + betas * dy, C, BK), C, BK, K)
    if WITH_GATE:
        dgates += dtotals[:, :, None]
        dgate_at = token_at(dgate, dgate_strides, sequence, start, head)
        store_tile(dgate_at, dgate_strides[1], size, channel, by_token(dgates, C, BK), C, BK, K)
