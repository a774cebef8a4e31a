"""Gradients of q, k, beta and g of the delta rule in Triton: the last backward kernel, parallel over chunks.

A chunk needs only the state S before it, the gradient dS' of the state after it, U and dR, from
`longctx.kernels.linear.delta.triton_chunk_scan`. With r the gradient that keys get from reading S (before -diag(b)):

    r = reads * dR S^T      w = writes * U dS'^T      dP = dO U^T      dL = -dR U^T below the diagonal
    (x, y), (x', y'): the gradients of the two arguments of L = pairs(diag(b) K, K) for dL, of P = pairs(Q, K) for dP

    dQ = reads * dO S^T + x'      dK = w + diag(b) (x - r) + y + y'      db = rowsum(dR * V + K * (x - r))

The gradient of a log-decay sums the terms that it acts on: pairs around it, reads of S at its token or later, earlier
writes to S', and the part of S kept in S'. No term is the difference of two others, and the gradient at a document's
first token is 0.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.delta.triton_prepare import document_decays, load_per_token, locate_chunk
from longctx.kernels.linear.triton_chunk import (
    chunk_decays,
    half_decays,
    halvings,
    load_constant_decay,
    load_decay,
    load_tile,
    pair_decays,
    product,
    store_tile,
    sum_tokens,
    token_at,
)


@triton.jit
def _pair_grads(
    grads,
    x,
    y,
    decay,
    pairs,
    pair_terms,
    WITH_GATE: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradients of x and y, `[C, BK]` float32, for the gradient `grads` `[C, C]` of `pairs(x, y)`.

    grads is 0 where not visible. With WITH_GATE the decays' terms are added to the returned pair_terms: for vector
    decays their gradient, `[C, BK]`; for scalar ones `grads * pairs(x, y)`, `[C, C]`, for `_sum_pairs_across`. `pairs`
    is the result of `pair_decays`, not read for vector decays.
    """
    if KIND == "vector":
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
    else:
        if WITH_GATE:
            pair_terms += grads * pairs * product(x, tl.trans(y), DOT, PRECISION)
        decayed_grads = grads * pairs
        dx = product(decayed_grads, y, DOT, PRECISION)
        dy = product(tl.trans(decayed_grads), x, DOT, PRECISION)
    return dx, dy, pair_terms


@triton.jit
def _sum_pairs_across(weights, C: tl.constexpr, PRECISION: tl.constexpr):
    """Return, per token t, the sum of weights `[C, C]` over pairs j < t <= i: `[C]`."""
    row = tl.arange(0, C)
    suffix_sums = sum_tokens(row[:, None] <= row[None, :], weights, PRECISION)
    return tl.sum(tl.where(row[None, :] < row[:, None], suffix_sums, 0.0), 1)


@triton.jit
def _by_channel(tile, KIND: tl.constexpr):
    """Return a tile `[C, BK]` for vector decays, else its sum over channels, `[C]`."""
    return tile if KIND == "vector" else tl.sum(tile, 1)


@triton.jit
def _sum_tokens(mask, tile, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """Sum a result of `_by_channel` over the tokens of each row of a mask `[C, C]`."""
    return sum_tokens(mask, tile, PRECISION) if KIND == "vector" else tl.sum(tl.where(mask, tile[None, :], 0.0), 1)


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
    beta,
    beta_strides,
    gate,
    gate_strides,
    ids,
    bounds,
    chunk_states,
    chunk_dstates,
    u_in,
    drhs_in,
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
    V_GROUP: tl.constexpr,
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

    dq is per output head, the others per state head. dbeta and the dgate of a scalar decay are
    `[blocks of K x B, T, H]`, to be summed over the blocks; the dgate of a vector decay is `[B, T, H, K]`.
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
    state_at = chunk_states + (slot * K + channel) * V
    dstate_at = chunk_dstates + (slot * K + channel) * V
    dk_tile = tl.zeros([C, BK], tl.float32)
    read_grad = tl.zeros([C, BK], tl.float32)
    dsystem = tl.zeros([C, C], tl.float32)
    state_dot = tl.zeros([BK], tl.float32)
    dbetas = tl.zeros([C], tl.float32)
    for v_block in range(V_BLOCKS):
        column = v_block * BV
        state = load_tile(state_at, V, K - channel, column, BK, BV, V)
        dstate = load_tile(dstate_at, V, K - channel, column, BK, BV, V)
        u = load_tile(u_in + slot * C * V, V, C, column, C, BV, V)
        drhs = load_tile(drhs_in + slot * C * V, V, C, column, C, BV, V)
        dk_tile += product(u, tl.trans(dstate), DOT, PRECISION)
        read_grad += product(drhs, tl.trans(state), DOT, PRECISION)
        dsystem -= product(drhs, tl.trans(u), DOT, PRECISION)
        if WITH_GATE:
            state_dot += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
        if dbeta is not None:
            v_at = token_at(v, v_strides, sequence, start, head // V_GROUP)
            values = load_tile(v_at, v_strides[1], tl.where(block == 0, size, 0), column, C, BV, V)
            dbetas += tl.sum(drhs.to(tl.float32) * values.to(tl.float32), 1)
    constant = load_constant_decay(gate, gate_strides, head // GATE_GROUP, KIND)
    gate_at = token_at(gate, gate_strides, sequence, start, head // GATE_GROUP)
    decay = load_decay(constant, gate_at, gate_strides[1], size, channel, KIND, C, BK, K)
    reads, writes, total = chunk_decays(decay, size, KIND, C, PRECISION)
    reads, writes, keeps, visible = document_decays(
        reads, writes, tl.exp(total), row[:, None] >= row[None, :], ids, begin, start, size, C
    )
    if KIND == "vector":
        pairs = visible
        pair_terms = tl.zeros([C, BK], tl.float32)
    else:
        pairs = pair_decays(decay, visible, KIND, C)
        pair_terms = tl.zeros([C, C], tl.float32)
    dsystem = tl.where(visible & (row[:, None] > row[None, :]), dsystem, 0.0)
    keys = load_tile(k_at, k_strides[1], size, channel, C, BK, K)
    dk_tile *= writes
    read_grad *= reads
    if WITH_GATE:
        strictly_causal = row[:, None] > row[None, :]
        # Per channel for vector decays, else summed over channels.
        read_terms = _by_channel(-betas * keys.to(tl.float32) * read_grad, KIND)
        dgates = _sum_tokens(strictly_causal, _by_channel(keys.to(tl.float32) * dk_tile, KIND), KIND, PRECISION)
        dgates += state_dot[None, :] * keeps[None, :] if KIND == "vector" else tl.sum(state_dot, 0) * keeps
    # L is pairs(diag(b) K, K): only its rows are scaled by b.
    beta_keys = betas * keys.to(tl.float32)
    dx, dy, pair_terms = _pair_grads(
        dsystem, beta_keys, keys, decay, pairs, pair_terms, WITH_GATE, KIND, C, DOT, PRECISION
    )
    dk_tile += dy + betas * (dx - read_grad)
    if dbeta is not None:
        dbetas += tl.sum(keys.to(tl.float32) * (dx - read_grad), 1)
        dbeta_at = token_at(dbeta, dbeta_strides, block * batch + sequence, start, head)
        tl.store(dbeta_at + row * dbeta_strides[1], dbetas, mask=row < size)
    for reader in range(READERS):
        query = head * READERS + reader
        queries_at = token_at(q, q_strides, sequence, start, query // Q_GROUP)
        queries = load_tile(queries_at, q_strides[1], size, channel, C, BK, K)
        dq_tile = tl.zeros([C, BK], tl.float32)
        dscores = tl.zeros([C, C], tl.float32)
        do_at = token_at(dout, dout_strides, sequence, start, query)
        for v_block in range(V_BLOCKS):
            column = v_block * BV
            state = load_tile(state_at, V, K - channel, column, BK, BV, V)
            u = load_tile(u_in + slot * C * V, V, C, column, C, BV, V)
            do = load_tile(do_at, dout_strides[1], size, column, C, BV, V)
            dq_tile += product(do, tl.trans(state), DOT, PRECISION)
            dscores += product(do, tl.trans(u), DOT, PRECISION)
        dscores = tl.where(visible, dscores, 0.0)
        dq_tile *= reads
        if WITH_GATE:
            read_terms += _by_channel(queries.to(tl.float32) * dq_tile, KIND)
        dx, dy, pair_terms = _pair_grads(
            dscores, queries, keys, decay, pairs, pair_terms, WITH_GATE, KIND, C, DOT, PRECISION
        )
        dk_tile += dy
        dq_at = token_at(dq, dq_strides, sequence, start, query)
        store_tile(dq_at, dq_strides[1], size, channel, dq_tile + dx, C, BK, K)
    dk_at = token_at(dk, dk_strides, sequence, start, head)
    store_tile(dk_at, dk_strides[1], size, channel, dk_tile, C, BK, K)
    if WITH_GATE:
        dgates += _sum_tokens(row[:, None] <= row[None, :], read_terms, KIND, PRECISION)
        if KIND == "vector":
            dgate_at = token_at(dgate, dgate_strides, sequence, start, head)
            store_tile(dgate_at, dgate_strides[1], size, channel, dgates + pair_terms, C, BK, K)
        else:
            dgates += _sum_pairs_across(pair_terms, C, PRECISION)
            dgate_at = token_at(dgate, dgate_strides, block * batch + sequence, start, head)
            tl.store(dgate_at + row * dgate_strides[1], dgates, mask=row < size)
