"""Gradients of q, k, beta and g of the delta rule in Triton, for no decay and scalar decays: the last backward kernels.

Both are parallel over chunks. A chunk needs the state S before it, the gradient dS' of the state after it, Z and dV,
from `longctx.kernels.linear.delta.triton_chunk_scan`. `pair_grads_kernel` has the `[C, C]` gradients of pairs of
tokens, once for all of K, and `grads_kernel` the rest, products of tiles that it only loads:

    AQ = pairs * dO Z^T diag(b)                         AK = -pairs * dV Z^T diag(b) below the diagonal
    dQ = reads * dO S^T + AQ K                          w = writes * Z dS'^T          r = reads * dV S^T
    dK = b w - r + AK K + AK^T K + AQ^T Q               db = rowsum(K * w) + colsum(AQ * Q K^T + AK * K K^T) / b

The last sum is taken before the multiplication by b. The gradient of a log-decay sums the terms that it acts on: pairs
around it, reads of S at its token or later, earlier writes to S', and the part of S kept in S'. No term is the
difference of two others, and the gradient at a document's first token is 0.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.delta.triton_prepare import (
    BETA_WRITES,
    READS,
    WRITES,
    load_factor,
    load_keeps,
    load_per_token,
    locate_chunk,
    token_pairs,
)
from longctx.kernels.linear.triton_chunk import load_tile, product, store_tile, sum_tokens, token_at


@triton.jit
def _sum_pairs_across(weights, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Return, per token t, the sum of weights `[C, C]` over pairs j < t <= i: `[C]`.

    In bf16, where weights are products of factors with 8 bits, they are summed as two parts, with 16 bits.
    """
    row = tl.arange(0, C)
    later = row[:, None] <= row[None, :]
    if tl.bfloat16 == DOT:
        high = weights.to(DOT)
        suffix_sums = tl.dot(later.to(DOT), high) + tl.dot(later.to(DOT), (weights - high.to(tl.float32)).to(DOT))
    else:
        suffix_sums = sum_tokens(later, weights, PRECISION)
    return tl.sum(tl.where(row[None, :] < row[:, None], suffix_sums, 0.0), 1)


@triton.jit
def pair_grads_kernel(
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
    z_in,
    key_pairs,
    query_pairs,
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
    """Compute AK in key_pairs `[slots, C, C]`, AQ in query_pairs `[slots, READERS, C, C]`, and gradients of gates.

    dbeta and dgate, where not None, `[n x B, T, H]` float32, get the terms of pairs in their first B rows.
    """
    K_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    _, head, sequence, begin, start, size, slot = locate_chunk(bounds, heads, batch, chunks, 1, C)
    if size <= 0:
        return
    row = tl.arange(0, C)
    k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
    dv_at = token_at(dv, dv_strides, sequence, start, head)
    kk = tl.zeros([C, C], tl.float32)
    for block in range(K_BLOCKS):
        keys = load_tile(k_at, k_strides[1], size, block * BK, C, BK, K)
        kk += product(keys, tl.trans(keys), DOT, PRECISION)
    dsystem = tl.zeros([C, C], tl.float32)
    for block in range(V_BLOCKS):
        column = block * BV
        z = load_tile(z_in + (slot * V + column) * C, C, V - column, 0, BV, C, C)
        dvalues = load_tile(dv_at, dv_strides[1], size, column, C, BV, V)
        dsystem += product(dvalues, z, DOT, PRECISION)
    pairs, visible = token_pairs(gate, gate_strides, head, sequence, ids, begin, start, size, GATE_GROUP, KIND, C)
    beta_at = token_at(beta, beta_strides, sequence, start, head // BETA_GROUP)
    betas = load_per_token(beta_at, beta_strides[1], size, C)[None, :]
    dsystem = tl.where(visible & (row[:, None] > row[None, :]), -dsystem * pairs, 0.0)
    store_tile(key_pairs + slot * C * C, C, C, 0, dsystem * betas, C, C, C)
    terms = dsystem * kk
    for reader in range(READERS):
        query = head * READERS + reader
        q_at = token_at(q, q_strides, sequence, start, query // Q_GROUP)
        do_at = token_at(dout, dout_strides, sequence, start, query)
        qk = tl.zeros([C, C], tl.float32)
        for block in range(K_BLOCKS):
            keys = load_tile(k_at, k_strides[1], size, block * BK, C, BK, K)
            queries = load_tile(q_at, q_strides[1], size, block * BK, C, BK, K)
            qk += product(queries, tl.trans(keys), DOT, PRECISION)
        dscores = tl.zeros([C, C], tl.float32)
        for block in range(V_BLOCKS):
            column = block * BV
            z = load_tile(z_in + (slot * V + column) * C, C, V - column, 0, BV, C, C)
            do = load_tile(do_at, dout_strides[1], size, column, C, BV, V)
            dscores += product(do, z, DOT, PRECISION)
        dscores = tl.where(visible, dscores * pairs, 0.0)
        store_tile(query_pairs + (slot * READERS + reader) * C * C, C, C, 0, dscores * betas, C, C, C)
        terms += dscores * qk
    if dbeta is not None:
        dbeta_at = token_at(dbeta, dbeta_strides, sequence, start, head)
        tl.store(dbeta_at + row * dbeta_strides[1], tl.sum(terms, 0), mask=row < size)
    if dgate is not None:
        dgate_at = token_at(dgate, dgate_strides, sequence, start, head)
        dgates = _sum_pairs_across(terms * betas, C, DOT, PRECISION)
        tl.store(dgate_at + row * dgate_strides[1], dgates, mask=row < size)


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
    bounds,
    factors,
    chunk_states,
    chunk_dstates,
    z_in,
    key_pairs,
    query_pairs,
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
    READERS: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dq, dk and, where not None, dbeta and dgate of a chunk. A program has a block of K and loops over V.

    dq is per output head, the others per state head. dbeta and dgate are `[(1 + blocks of K) x B, T, H]` float32, to be
    summed; the first B rows are those of `pair_grads_kernel`.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    block, head, sequence, _, start, size, slot = locate_chunk(bounds, heads, batch, chunks, BLOCKS, C)
    if size <= 0:
        return
    channel = block * BK
    row = tl.arange(0, C)
    dv_at = token_at(dv, dv_strides, sequence, start, head)
    write_grad = tl.zeros([C, BK], tl.float32)
    read_grad = tl.zeros([C, BK], tl.float32)
    kept = tl.zeros([BV, BV], tl.float32)
    for v_block in range(V_BLOCKS):
        column = v_block * BV
        state = load_tile(chunk_states + (slot * V + column) * K, K, V - column, channel, BV, BK, K)
        dstate = load_tile(chunk_dstates + (slot * V + column) * K, K, V - column, channel, BV, BK, K)
        z = load_tile(z_in + (slot * V + column) * C, C, V - column, 0, BV, C, C)
        dvalues = load_tile(dv_at, dv_strides[1], size, column, C, BV, V)
        write_grad += product(tl.trans(z), dstate, DOT, PRECISION)
        read_grad += product(dvalues, state, DOT, PRECISION)
        if dgate is not None:
            # Its trace is the sum of S * dS', which tensor cores take with fewer instructions.
            kept += product(state, tl.trans(dstate), DOT, PRECISION)
    k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
    keys = load_tile(k_at, k_strides[1], size, channel, C, BK, K)
    read_grad *= load_factor(factors, slot, READS, C)[:, None]
    write_sums = tl.sum(keys.to(tl.float32) * write_grad, 1)
    read_sums = -tl.sum(keys.to(tl.float32) * read_grad, 1)
    dk_tile = write_grad * load_factor(factors, slot, BETA_WRITES, C)[:, None] - read_grad
    key_pairs_tile = load_tile(key_pairs + slot * C * C, C, C, 0, C, C, C)
    dk_tile += product(key_pairs_tile, keys, DOT, PRECISION)
    dk_tile += product(tl.trans(key_pairs_tile), keys, DOT, PRECISION)
    for reader in range(READERS):
        query = head * READERS + reader
        queries_at = token_at(q, q_strides, sequence, start, query // Q_GROUP)
        queries = load_tile(queries_at, q_strides[1], size, channel, C, BK, K)
        dq_tile = tl.zeros([C, BK], tl.float32)
        do_at = token_at(dout, dout_strides, sequence, start, query)
        for v_block in range(V_BLOCKS):
            column = v_block * BV
            state = load_tile(chunk_states + (slot * V + column) * K, K, V - column, channel, BV, BK, K)
            do = load_tile(do_at, dout_strides[1], size, column, C, BV, V)
            dq_tile += product(do, state, DOT, PRECISION)
        dq_tile *= load_factor(factors, slot, READS, C)[:, None]
        if dgate is not None:
            read_sums += tl.sum(queries.to(tl.float32) * dq_tile, 1)
        query_pairs_tile = load_tile(query_pairs + (slot * READERS + reader) * C * C, C, C, 0, C, C, C)
        dq_tile += product(query_pairs_tile, keys, DOT, PRECISION)
        dk_tile += product(tl.trans(query_pairs_tile), queries, DOT, PRECISION)
        dq_at = token_at(dq, dq_strides, sequence, start, query)
        store_tile(dq_at, dq_strides[1], size, channel, dq_tile, C, BK, K)
    dk_at = token_at(dk, dk_strides, sequence, start, head)
    store_tile(dk_at, dk_strides[1], size, channel, dk_tile, C, BK, K)
    if dbeta is not None:
        dbeta_at = token_at(dbeta, dbeta_strides, (block + 1) * batch + sequence, start, head)
        dbetas = write_sums * load_factor(factors, slot, WRITES, C)
        tl.store(dbeta_at + row * dbeta_strides[1], dbetas, mask=row < size)
    if dgate is not None:
        # A token's decay acts on what it and later tokens read, and on what earlier ones wrote.
        write_sums *= load_factor(factors, slot, BETA_WRITES, C)
        dgates = tl.sum(tl.where(row[None, :] >= row[:, None], read_sums[None, :], write_sums[None, :]), 1)
        trace = tl.where(tl.arange(0, BV)[:, None] == tl.arange(0, BV)[None, :], kept, 0.0)
        dgates += tl.sum(tl.ravel(trace, can_reorder=True), 0) * load_keeps(factors, slot, size, C)
        dgate_at = token_at(dgate, dgate_strides, (block + 1) * batch + sequence, start, head)
        tl.store(dgate_at + row * dgate_strides[1], dgates, mask=row < size)
