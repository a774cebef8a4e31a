"""Kernels of the delta rule for vector decays (KDA), parallel over chunks, in Triton.

As `longctx.kernels.linear.delta.triton_prepare` and `triton_grads`, with scores and their gradients by halves of a
chunk (`half_decays`), and keys and queries that are decayed once for the scans:

    decayed_k, written_k, decayed_q, keeps      reads K, writes diag(b) K, reads Q, keeps
"""

import triton
import triton.language as tl

from longctx.kernels.linear.delta.triton_prepare import document_decays, invert, load_per_token
from longctx.kernels.linear.triton_chunk import (
    chunk_decays,
    decayed_scores,
    half_decays,
    halvings,
    load_decay,
    load_tile,
    locate_chunk,
    product,
    store_tile,
    sum_tokens,
    token_at,
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
    scores,
    decayed_k,
    written_k,
    decayed_q,
    keeps_out,
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
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a chunk's inverse, decayed keys and, where not None, scores and decayed queries.

    In the dtype of products: inverse `[slots, C, C]`, scores `[slots, READERS, C, C]`, decayed_k and written_k
    `[slots, C, K]`, decayed_q `[slots, READERS, C, K]`; and keeps_out `[slots, K]`, float32.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    _, head, sequence, begin, start, size, slot = locate_chunk(bounds, heads, batch, chunks, 1, C)
    if size <= 0:
        return
    row = tl.arange(0, C)
    causal = row[:, None] >= row[None, :]
    k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
    decay_at = token_at(gate, gate_strides, sequence, start, head // GATE_GROUP)
    betas = load_per_token(token_at(beta, beta_strides, sequence, start, head // BETA_GROUP), beta_strides[1], size, C)
    kk = tl.zeros([C, C], tl.float32)
    for block in range(BLOCKS):
        channel = block * BK
        keys = load_tile(k_at, k_strides[1], size, channel, C, BK, K)
        decay = load_decay(0.0, decay_at, gate_strides[1], size, channel, "vector", C, BK, K)
        reads, writes, total = chunk_decays(decay, size, "vector", C, PRECISION)
        reads, writes, keeps, visible = document_decays(
            reads, writes, tl.exp(total), causal, ids, begin, start, size, C
        )
        kk += decayed_scores(keys, keys, decay, visible, False, "vector", C, DOT, PRECISION)
        store_tile(decayed_k + slot * C * K, K, C, channel, keys * reads, C, BK, K)
        store_tile(written_k + slot * C * K, K, C, channel, betas[:, None] * keys * writes, C, BK, K)
        channels = channel + tl.arange(0, BK)
        tl.store(keeps_out + slot * K + channels, keeps, mask=channels < K)
    system = tl.where(row[:, None] > row[None, :], betas[None, :] * kk, 0.0)
    store_tile(inverse + slot * C * C, C, C, 0, invert(system, C, PRECISION), C, C, C)
    if scores is not None:
        for reader in range(READERS):
            q_at = token_at(q, q_strides, sequence, start, (head * READERS + reader) // Q_GROUP)
            query_slot = slot * READERS + reader
            result = tl.zeros([C, C], tl.float32)
            for block in range(BLOCKS):
                channel = block * BK
                keys = load_tile(k_at, k_strides[1], size, channel, C, BK, K)
                queries = load_tile(q_at, q_strides[1], size, channel, C, BK, K)
                decay = load_decay(0.0, decay_at, gate_strides[1], size, channel, "vector", C, BK, K)
                reads, writes, total = chunk_decays(decay, size, "vector", C, PRECISION)
                reads, writes, keeps, visible = document_decays(
                    reads, writes, tl.exp(total), causal, ids, begin, start, size, C
                )
                result += decayed_scores(queries, keys, decay, visible, False, "vector", C, DOT, PRECISION)
                store_tile(decayed_q + query_slot * C * K, K, C, channel, queries * reads, C, BK, K)
            store_tile(scores + query_slot * C * C, C, C, 0, result * betas[None, :], C, C, C)


@triton.jit
def _pair_grads(
    grads, x, y, decay, pair_terms, WITH_GATE: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """Compute the gradients of x and y, `[C, BK]` float32, for the gradient `grads` `[C, C]` of `pairs(x, y)`.

    grads is 0 where not visible. With WITH_GATE the decays' gradient is added to the returned pair_terms, `[C, BK]`.
    """
    row = tl.arange(0, C)
    diagonal = tl.sum(tl.where(row[:, None] == row[None, :], grads, 0.0), 1)[:, None]
    dx = diagonal * y.to(tl.float32)
    dy = diagonal * x.to(tl.float32)
    for level in range(halvings(C)):
        factor, meet, between = half_decays(decay, level, C, PRECISION)
        masked = tl.where(meet, grads, 0.0)
        dx_level = factor * product(masked, y * factor, DOT, PRECISION)
        dy_level = factor * product(tl.trans(masked), x * factor, DOT, PRECISION)
        dx += dx_level
        dy += dy_level
        if WITH_GATE:
            # A decay acts on the pairs of every token for which it is between the token and the middle.
            terms = dx_level * x.to(tl.float32) + dy_level * y.to(tl.float32)
            pair_terms += sum_tokens(tl.trans(between), terms, PRECISION)
    return dx, dy, pair_terms


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
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dq, dk and, where not None, dbeta and dgate of a chunk. A program has a block of K and loops over V.

    dq is per output head, the others per state head. dbeta is `[blocks of K x B, T, H]`, to be summed over the blocks;
    dgate is `[B, T, H, K]`.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    WITH_GATE: tl.constexpr = dgate is not None
    block, head, sequence, begin, start, size, slot = locate_chunk(bounds, heads, batch, chunks, BLOCKS, C)
    if size <= 0:
        return
    channel = block * BK
    row = tl.arange(0, C)
    k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
    beta_at = token_at(beta, beta_strides, sequence, start, head // BETA_GROUP)
    betas = load_per_token(beta_at, beta_strides[1], size, C)[:, None]
    dv_at = token_at(dv, dv_strides, sequence, start, head)
    do_at = token_at(dout, dout_strides, sequence, start, head * READERS)
    write_grad = tl.zeros([C, BK], tl.float32)
    read_grad = tl.zeros([C, BK], tl.float32)
    dsystem = tl.zeros([C, C], tl.float32)
    state_dot = tl.zeros([BK], tl.float32)
    dq_tile = tl.zeros([C, BK], tl.float32)
    dscores = tl.zeros([C, C], tl.float32)
    for v_block in range(V_BLOCKS):
        column = v_block * BV
        state = load_tile(chunk_states + (slot * V + column) * K, K, V - column, channel, BV, BK, K)
        dstate = load_tile(chunk_dstates + (slot * V + column) * K, K, V - column, channel, BV, BK, K)
        z = load_tile(z_in + (slot * V + column) * C, C, V - column, 0, BV, C, C)
        dvalues = load_tile(dv_at, dv_strides[1], size, column, C, BV, V)
        do = load_tile(do_at, dout_strides[1], size, column, C, BV, V)
        write_grad += product(tl.trans(z), dstate, DOT, PRECISION)
        read_grad += product(dvalues, state, DOT, PRECISION)
        dsystem -= product(dvalues, z, DOT, PRECISION)
        dq_tile += product(do, state, DOT, PRECISION)
        dscores += product(do, z, DOT, PRECISION)
        if WITH_GATE:
            state_dot += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 0)
    gate_at = token_at(gate, gate_strides, sequence, start, head // GATE_GROUP)
    decay = load_decay(0.0, gate_at, gate_strides[1], size, channel, "vector", C, BK, K)
    reads, writes, total = chunk_decays(decay, size, "vector", C, PRECISION)
    reads, writes, keeps, visible = document_decays(
        reads, writes, tl.exp(total), row[:, None] >= row[None, :], ids, begin, start, size, C
    )
    pair_terms = tl.zeros([C, BK], tl.float32)
    dsystem = tl.where(visible & (row[:, None] > row[None, :]), dsystem, 0.0)
    keys = load_tile(k_at, k_strides[1], size, channel, C, BK, K)
    beta_keys = betas * keys.to(tl.float32)
    write_grad *= writes
    read_grad *= reads
    if WITH_GATE:
        strictly_causal = row[:, None] > row[None, :]
        read_terms = -keys.to(tl.float32) * read_grad
        dgates = sum_tokens(strictly_causal, beta_keys * write_grad, PRECISION) + state_dot[None, :] * keeps[None, :]
    dk_tile, dy, pair_terms = _pair_grads(dsystem, keys, beta_keys, decay, pair_terms, WITH_GATE, C, DOT, PRECISION)
    dk_tile -= read_grad
    write_grad += dy
    for reader in range(READERS):
        query = head * READERS + reader
        queries_at = token_at(q, q_strides, sequence, start, query // Q_GROUP)
        queries = load_tile(queries_at, q_strides[1], size, channel, C, BK, K)
        if reader > 0:
            dq_tile = tl.zeros([C, BK], tl.float32)
            dscores = tl.zeros([C, C], tl.float32)
            do_at = token_at(dout, dout_strides, sequence, start, query)
            for v_block in range(V_BLOCKS):
                column = v_block * BV
                state = load_tile(chunk_states + (slot * V + column) * K, K, V - column, channel, BV, BK, K)
                z = load_tile(z_in + (slot * V + column) * C, C, V - column, 0, BV, C, C)
                do = load_tile(do_at, dout_strides[1], size, column, C, BV, V)
                dq_tile += product(do, state, DOT, PRECISION)
                dscores += product(do, z, DOT, PRECISION)
        dscores = tl.where(visible, dscores, 0.0)
        dq_tile *= reads
        if WITH_GATE:
            read_terms += queries.to(tl.float32) * dq_tile
        dx, dy, pair_terms = _pair_grads(dscores, queries, beta_keys, decay, pair_terms, WITH_GATE, C, DOT, PRECISION)
        write_grad += dy
        dq_at = token_at(dq, dq_strides, sequence, start, query)
        store_tile(dq_at, dq_strides[1], size, channel, dq_tile + dx, C, BK, K)
    dk_tile += betas * write_grad
    if dbeta is not None:
        dbetas = tl.sum(keys.to(tl.float32) * write_grad, 1)
        dbeta_at = token_at(dbeta, dbeta_strides, block * batch + sequence, start, head)
        tl.store(dbeta_at + row * dbeta_strides[1], dbetas, mask=row < size)
    dk_at = token_at(dk, dk_strides, sequence, start, head)
    store_tile(dk_at, dk_strides[1], size, channel, dk_tile, C, BK, K)
    if WITH_GATE:
        dgates += sum_tokens(row[:, None] <= row[None, :], read_terms, PRECISION)
        dgate_at = token_at(dgate, dgate_strides, sequence, start, head)
        store_tile(dgate_at, dgate_strides[1], size, channel, dgates + pair_terms, C, BK, K)
