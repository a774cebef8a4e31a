"""Triton kernels of the additive recurrence with vector decays: chunk by chunk in parallel, and walks over chunks.

With the decay factors of `longctx.kernels.linear.triton_chunk`, P = pairs(Q, K) and A = dO V^T over pairs i >= j in one
document, S the state before a chunk and dS' the gradient of the state after it:

    prepare     P, A, reads Q, writes K, keeps                             parallel over chunks
    forward     O  = P V + (reads Q) S        S' = keeps S + (writes K)^T V          in order
    backward    dV = P^T dO + (writes K) dS'  dS = keeps dS' + (reads Q)^T dO        in reverse
    grads       dQ = pairs * A on K + reads * dO S^T                       parallel over chunks
                dK = pairs * A^T on Q + writes * V dS'^T

The gradient of a log-decay sums the terms that it acts on: pairs around it, reads of S at its token or later, earlier
writes to S', and the part of S kept in S'. No term is the difference of two others, no sum is longer than a chunk, and
the gradient at a document's first token is 0.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton_chunk import (
    chunk_slot,
    load_document_masks,
    load_tile,
    locate_chunk,
    locate_program,
    store_tile,
    token_at,
)
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
    v,
    v_strides,
    dout,
    dout_strides,
    gate,
    gate_strides,
    ids,
    bounds,
    scores_out,
    score_grads,
    decayed_q,
    written_k,
    keeps_out,
    factors_out,
    chunks,
    heads,
    batch,
    K: tl.constexpr,
    V: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    GATE_GROUP: tl.constexpr,
    READERS: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a chunk's scores, decayed queries and keys, and where not None the gradients of its scores.

    In the dtype of products: scores and score_grads, mirrored for `far_grads`, `[slots, READERS, C, C]`, decayed_q
    `[slots, READERS, C, K]`, written_k `[slots, C, K]`; in float32 keeps_out `[slots, K]`, and where not None
    factors_out, the block factors for `grads_kernel`, `[slots, kinds, C / 16, K]`.
    """
    K_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
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
    for reader in range(READERS):
        query = head * READERS + reader
        query_slot = slot * READERS + reader
        q_at = token_at(q, q_strides, sequence, start, query // Q_GROUP)
        near = tl.zeros([BLOCKS, SUB_BLOCK, SUB_BLOCK], tl.float32)
        far = tl.zeros([C, C], tl.float32)
        for block in range(K_BLOCKS):
            channel = block * BK
            x = load_sub_blocks(q_at, q_strides[1], size, channel, C, BK, K)
            y = load_sub_blocks(k_at, k_strides[1], size, channel, C, BK, K)
            decay = load_log2_decay(decay_at, gate_strides[1], size, channel, C, BK, K)
            near, far, x, y, keeps = add_scores(x, y, decay, near, far, factors_at, channel, C, BK, K, DOT, PRECISION)
            if ids is not None:
                x = tl.where(reads_state[:, None], x, 0.0)
                y = tl.where(writes_state[:, None], y, 0.0)
                keeps = tl.where(keeps_state, keeps, 0.0)
            store_tile(decayed_q + query_slot * C * K, K, C, channel, x, C, BK, K)
            if reader == 0:
                store_tile(written_k + slot * C * K, K, C, channel, y, C, BK, K)
                channels = channel + tl.arange(0, BK)
                tl.store(keeps_out + slot * K + channels, keeps, mask=channels < K)
        scores = join_scores(near, far, C)
        if ids is not None:
            scores = tl.where(same_document, scores, 0.0)
        store_tile(scores_out + query_slot * C * C, C, C, 0, scores, C, C, C)
        if score_grads is not None:
            v_at = token_at(v, v_strides, sequence, start, head // V_GROUP)
            do_at = token_at(dout, dout_strides, sequence, start, query)
            grads = tl.zeros([C, C], tl.float32)
            transposed_grads = tl.zeros([C, C], tl.float32)
            for block in range(V_BLOCKS):
                values = load_tile(v_at, v_strides[1], size, block * BV, C, BV, V)
                do = load_tile(do_at, dout_strides[1], size, block * BV, C, BV, V)
                grads += matmul(do, tl.trans(values), DOT, PRECISION)
                transposed_grads += matmul(values, tl.trans(do), DOT, PRECISION)
            grads = mirror(grads, transposed_grads, C)
            if ids is not None:
                grads = tl.where(same_document, grads, 0.0)
            store_tile(score_grads + query_slot * C * C, C, C, 0, grads, C, C, C)


@triton.jit
def forward_kernel(
    v,
    v_strides,
    bounds,
    scores,
    decayed_q,
    written_k,
    keeps_in,
    states,
    out,
    out_strides,
    ends,
    chunk_states,
    chunks,
    heads,
    batch,
    K: tl.constexpr,
    V: tl.constexpr,
    V_GROUP: tl.constexpr,
    READERS: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk a segment's chunks in order, from its start state. A program has all of K and a block of V.

    Writes those that are not None: `out`; `ends`, the end states; for the backward pass, the state before each chunk in
    `chunk_states` `[slots, K, V]`.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    head, sequence, segment, block, begin, end = locate_program(bounds, heads, batch, BLOCKS)
    column = block * BV
    state_offset = ((segment * batch + sequence) * heads + head).to(tl.int64) * K * V
    state = load_tile(states + state_offset, V, K, column, BK, BV, V)
    channels = tl.arange(0, BK)
    for step in range((end - begin + C - 1) // C):
        start = begin + step * C
        size = tl.minimum(end - start, C)
        slot = chunk_slot(segment, step, sequence, head, heads, batch, chunks)
        if chunk_states is not None:
            store_tile(chunk_states + slot * K * V, V, K, column, state, BK, BV, V)
        v_at = token_at(v, v_strides, sequence, start, head // V_GROUP)
        values = load_tile(v_at, v_strides[1], size, column, C, BV, V)
        if out is not None:
            for reader in range(READERS):
                query_slot = slot * READERS + reader
                queries = load_tile(decayed_q + query_slot * C * K, K, C, 0, C, BK, K)
                score_tile = load_tile(scores + query_slot * C * C, C, C, 0, C, C, C)
                result = matmul(queries, state, DOT, PRECISION) + matmul(score_tile, values, DOT, PRECISION)
                out_at = token_at(out, out_strides, sequence, start, head * READERS + reader)
                store_tile(out_at, out_strides[1], size, column, result, C, BV, V)
        keys = load_tile(written_k + slot * C * K, K, C, 0, C, BK, K)
        keeps = tl.load(keeps_in + slot * K + channels, mask=channels < K, other=0.0)
        state = state * keeps[:, None] + matmul(tl.trans(keys), values, DOT, PRECISION)
    if ends is not None:
        store_tile(ends + state_offset, V, K, column, state, BK, BV, V)


@triton.jit
def backward_kernel(
    dout,
    dout_strides,
    bounds,
    scores,
    decayed_q,
    written_k,
    keeps_in,
    dends,
    dv,
    dv_strides,
    chunk_dstates,
    dstates,
    chunks,
    heads,
    batch,
    K: tl.constexpr,
    V: tl.constexpr,
    READERS: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk a segment's chunks in reverse, from the gradient of its end state. A program has all of K and a block of V.

    Writes dv per state head, the gradient of the state after each chunk in `chunk_dstates` `[slots, K, V]`, and that of
    the start state in `dstates`.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    head, sequence, segment, block, begin, end = locate_program(bounds, heads, batch, BLOCKS)
    column = block * BV
    state_offset = ((segment * batch + sequence) * heads + head).to(tl.int64) * K * V
    dstate = load_tile(dends + state_offset, V, K, column, BK, BV, V)
    channels = tl.arange(0, BK)
    steps = (end - begin + C - 1) // C
    for index in range(steps):
        step = steps - 1 - index
        start = begin + step * C
        size = tl.minimum(end - start, C)
        slot = chunk_slot(segment, step, sequence, head, heads, batch, chunks)
        store_tile(chunk_dstates + slot * K * V, V, K, column, dstate, BK, BV, V)
        keys = load_tile(written_k + slot * C * K, K, C, 0, C, BK, K)
        keeps = tl.load(keeps_in + slot * K + channels, mask=channels < K, other=0.0)
        dvalues = matmul(keys, dstate, DOT, PRECISION)
        dstate *= keeps[:, None]
        for reader in range(READERS):
            query_slot = slot * READERS + reader
            queries = load_tile(decayed_q + query_slot * C * K, K, C, 0, C, BK, K)
            score_tile = load_tile(scores + query_slot * C * C, C, C, 0, C, C, C)
            do_at = token_at(dout, dout_strides, sequence, start, head * READERS + reader)
            do = load_tile(do_at, dout_strides[1], size, column, C, BV, V)
            dvalues += matmul(tl.trans(score_tile), do, DOT, PRECISION)
            dstate += matmul(tl.trans(queries), do, DOT, PRECISION)
        dv_at = token_at(dv, dv_strides, sequence, start, head)
        store_tile(dv_at, dv_strides[1], size, column, dvalues, C, BV, V)
    store_tile(dstates + state_offset, V, K, column, dstate, BK, BV, V)


@triton.jit
def grads_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    dout,
    dout_strides,
    gate,
    gate_strides,
    ids,
    bounds,
    score_grads,
    keeps_in,
    factors_in,
    chunk_states,
    chunk_dstates,
    dq,
    dq_strides,
    dk,
    dk_strides,
    dgate,
    dgate_strides,
    chunks,
    heads,
    batch,
    K: tl.constexpr,
    V: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    GATE_GROUP: tl.constexpr,
    READERS: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dq, dk and dgate of a chunk, those that are not None. A program has a block of K and loops over V.

    dq is per output head, dk in the dtype of k and dgate `[B, T, H, K]` in float32 per state head. dq needs
    `chunk_states`, dk needs `chunk_dstates`, dgate both.
    """
    K_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    BLOCKS: tl.constexpr = C // SUB_BLOCK
    WITH_GATE: tl.constexpr = dgate is not None
    block, head, sequence, begin, start, size, slot = locate_chunk(bounds, heads, batch, chunks, K_BLOCKS, C)
    if size <= 0:
        return
    channel = block * BK
    k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
    v_at = token_at(v, v_strides, sequence, start, head // V_GROUP)
    decay_at = token_at(gate, gate_strides, sequence, start, head // GATE_GROUP)
    decay = load_log2_decay_by_channel(decay_at, gate_strides[1], size, channel, C, BK, K)
    decay_parts = parts(decay, DOT)
    factors_at = factors_in + slot * (factor_kinds(C) * BLOCKS * K)
    to_end = suffix_by_channel(decay_parts, C, DOT)
    y = load_channels(k_at, k_strides[1], size, channel, C, BK, K)
    dy = tl.zeros([BLOCKS, BK, SUB_BLOCK], tl.float32)
    dgates = tl.zeros([BLOCKS, BK, SUB_BLOCK], tl.float32)
    dtotals = tl.zeros([BLOCKS, BK], tl.float32)
    if ids is not None:
        _, reads_state, writes_state, _ = load_document_masks(ids, begin, start, size, C)
    if dk is not None:
        dy_state = tl.zeros([C, BK], tl.float32)
        state_dot = tl.zeros([BK], tl.float32)
        for v_block in range(V_BLOCKS):
            column = v_block * BV
            values = load_tile(v_at, v_strides[1], size, column, C, BV, V)
            dstate = load_tile(chunk_dstates + (slot * K + channel) * V, V, K - channel, column, BK, BV, V)
            dy_state += matmul(values, tl.trans(dstate), DOT, PRECISION)
            if WITH_GATE:
                state = load_tile(chunk_states + (slot * K + channel) * V, V, K - channel, column, BK, BV, V)
                state_dot += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
        if ids is not None:
            dy_state = tl.where(writes_state[:, None], dy_state, 0.0)
        dy, dgates, dtotals = write_grads(
            y, to_end, factors_at, channel, by_channel(dy_state, C, BK), dgates, dtotals, WITH_GATE, C, BK, K, DOT
        )
        if WITH_GATE:
            channels = channel + tl.arange(0, BK)
            state_dot *= tl.load(keeps_in + slot * K + channels, mask=channels < K, other=0.0)
            dtotals += state_dot[None, :]
    for reader in range(READERS):
        query = head * READERS + reader
        q_at = token_at(q, q_strides, sequence, start, query // Q_GROUP)
        grads_at = score_grads + (slot * READERS + reader) * C * C
        x = load_channels(q_at, q_strides[1], size, channel, C, BK, K)
        dx = tl.zeros([BLOCKS, BK, SUB_BLOCK], tl.float32)
        dx, dy, dgates = near_grads(
            load_near_grads(grads_at, C), x, y, decay_parts, dx, dy, dgates, WITH_GATE, C, DOT, PRECISION
        )
        dx_state = tl.zeros([C, BK], tl.float32)
        if dq is not None:
            do_at = token_at(dout, dout_strides, sequence, start, query)
            for v_block in range(V_BLOCKS):
                column = v_block * BV
                do = load_tile(do_at, dout_strides[1], size, column, C, BV, V)
                state = load_tile(chunk_states + (slot * K + channel) * V, V, K - channel, column, BK, BV, V)
                dx_state += matmul(do, tl.trans(state), DOT, PRECISION)
            if ids is not None:
                dx_state = tl.where(reads_state[:, None], dx_state, 0.0)
        dx, dy, dgates, dtotals = far_grads(
            grads_at, x, y, prefix_by_channel(decay_parts, C, DOT), to_end, factors_at, channel,
            by_channel(dx_state, C, BK), dx, dy, dgates, dtotals, WITH_GATE, C, BK, K, DOT, PRECISION,
        )  # fmt: skip
        if dq is not None:
            dq_at = token_at(dq, dq_strides, sequence, start, query)
            store_tile(dq_at, dq_strides[1], size, channel, by_token(dx, C, BK), C, BK, K)
    if dk is not None:
        dk_at = token_at(dk, dk_strides, sequence, start, head)
        store_tile(dk_at, dk_strides[1], size, channel, by_token(dy, C, BK), C, BK, K)
    if WITH_GATE:
        dgates += dtotals[:, :, None]
        dgate_at = token_at(dgate, dgate_strides, sequence, start, head)
        store_tile(dgate_at, dgate_strides[1], size, channel, by_token(dgates, C, BK), C, BK, K)
