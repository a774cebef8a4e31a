"""Triton kernels of the additive recurrence, backward: a forward sweep for dq, a reverse sweep for dk, dv and dg.

With A = dO V^T over pairs i >= j in one document, and P, pairs, reads, writes, keeps as forward:

    dQ = pairs * A on K + reads * dO S^T            S as forward, from the segment's start state
    dK = pairs * A^T on Q + writes * V dS'^T
    dV = (P * pairs)^T dO + (writes * K) dS'
    dS = keeps * dS' + (reads * Q)^T dO

The gradient of a log-decay (Yang et al. 2024, Gated Linear Attention) needs only q * dq and k * dk: with the cumulative
log-decay G_i = g_0 + .. + g_i, everything depends on G through exp(G_i) q_i, exp(-G_j) k_j and the end state, so

    dg_t = sum_(i >= t) (q_i * dq_i - k_i * dk_i) + sum_v S' * dS'      over t's document, within the segment

S' and dS' are the segment's end state and its gradient, which belong only to the last document. A document's first
decay acts on nothing, and its gradient is 0.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton_chunk import (
    chunk_decays,
    decay_pairs,
    decayed_scores,
    load_constant_decay,
    load_decay,
    load_documents,
    load_tile,
    locate_program,
    outer,
    product,
    read_state,
    same_document,
    store_tile,
    suffix_sums,
    token_at,
)


@triton.jit
def _score_grads(
    values, dout, decay, visible, KIND: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """Return A times pairs, `[C, C]`, 0 where not visible."""
    return decay_pairs(product(dout, tl.trans(values), DOT, PRECISION), decay, visible, KIND, C, DOT)


@triton.jit
def dq_kernel(
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
    states,
    dends,
    dq,
    dq_strides,
    q_dq_out,
    q_dq_strides,
    end_terms,
    heads,
    batch,
    K: tl.constexpr,
    V: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    GATE_GROUP: tl.constexpr,
    READERS: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dq of a segment, chunk by chunk. A program has a block of K and all of V.

    With `q_dq_out`, also the terms of dg for `dk_dv_kernel`: `q * dq` per token in `q_dq_out`, for constant and scalar
    decays summed over the program's block of K, and `S' * dS'` of the segment's end in `end_terms`, `[K]` each.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    head, sequence, segment, block, begin, end = locate_program(bounds, heads, batch, BLOCKS)
    channel = block * BK
    state_index = ((segment * batch + sequence) * heads + head).to(tl.int64)
    state = load_tile(states + (state_index * K + channel) * V, V, K - channel, 0, BK, BV, V)
    row = tl.arange(0, C)
    constant = load_constant_decay(gate, gate_strides, head // GATE_GROUP, KIND)
    for step in range((end - begin + C - 1) // C):
        start = begin + step * C
        size = tl.minimum(end - start, C)
        k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
        keys = load_tile(k_at, k_strides[1], size, channel, C, BK, K)
        values = load_tile(token_at(v, v_strides, sequence, start, head // V_GROUP), v_strides[1], size, 0, C, BV, V)
        decay_at = token_at(gate, gate_strides, sequence, start, head // GATE_GROUP)
        decay = load_decay(constant, decay_at, gate_strides[1], size, KIND, C)
        reads, writes, total = chunk_decays(decay, size, KIND, C)
        keeps = tl.exp(total)
        visible = row[:, None] >= row[None, :]
        if ids is not None:
            doc, doc_before, doc_last = load_documents(ids, begin, start, size, C)
            visible = visible & same_document(doc, begin, start, C)
            reads = tl.where((doc == doc_before)[:, None], reads, 0.0)
            writes = tl.where((doc == doc_last)[:, None], writes, 0.0)
            keeps = tl.where(doc_before == doc_last, keeps, 0.0)
        # The state moves on before its old values are read.
        start_state = state.to(DOT)
        state = state * keeps[:, None] + outer(keys, writes, values, DOT, PRECISION)
        q_dq = tl.zeros([C, BK], tl.float32)
        for reader in range(READERS):
            query = head * READERS + reader
            do_at = token_at(dout, dout_strides, sequence, start, query)
            do = load_tile(do_at, dout_strides[1], size, 0, C, BV, V)
            grads = _score_grads(values, do, decay, visible, KIND, C, DOT, PRECISION)
            result = product(grads, keys, DOT, PRECISION)
            result += reads * product(do, tl.trans(start_state), DOT, PRECISION)
            dq_at = token_at(dq, dq_strides, sequence, start, query)
            store_tile(dq_at, dq_strides[1], size, channel, result, C, BK, K)
            if q_dq_out is not None:
                q_at = token_at(q, q_strides, sequence, start, query // Q_GROUP)
                q_dq += result * load_tile(q_at, q_strides[1], size, channel, C, BK, K).to(tl.float32)
        if q_dq_out is not None:
            q_dq_at = token_at(q_dq_out, q_dq_strides, block * batch + sequence, start, head)
            tl.store(q_dq_at + row * q_dq_strides[1], tl.sum(q_dq, 1), mask=row < size)
    if q_dq_out is not None:
        dstate = load_tile(dends + (state_index * K + channel) * V, V, K - channel, 0, BK, BV, V)
        end_term = tl.sum(state * dstate, 1)
        channels = channel + tl.arange(0, BK)
        tl.store(end_terms + state_index * K + channels, end_term, mask=channels < K)


@triton.jit
def dk_dv_kernel(
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
    dends,
    dk,
    dk_strides,
    dv,
    dv_strides,
    q_dq_in,
    q_dq_strides,
    dgate,
    dgate_strides,
    end_terms,
    dstates,
    heads,
    batch,
    K: tl.constexpr,
    V: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    GATE_GROUP: tl.constexpr,
    READERS: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dk, dv and dg of a segment, chunk by chunk in reverse, and the gradient of its start state.

    Writes those that are not None: dk and dv together where a program can hold all of K and V; else dk, dg and dstates
    by blocks of K with all of V, and dv by blocks of V with all of K. dk and dv are per state head.
    """
    K_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    head, sequence, segment, block, begin, end = locate_program(bounds, heads, batch, K_BLOCKS * V_BLOCKS)
    channel, column = (block // V_BLOCKS) * BK, (block % V_BLOCKS) * BV
    state_index = ((segment * batch + sequence) * heads + head).to(tl.int64)
    dstate = load_tile(dends + (state_index * K + channel) * V, V, K - channel, column, BK, BV, V)
    row = tl.arange(0, C)
    if dgate is not None:
        # Only the program of the first block of K adds q * dq and the segment's end term.
        suffix_sum = tl.load(end_terms + state_index + tl.arange(0, 1), mask=(tl.arange(0, 1) == block), other=0.0)
    constant = load_constant_decay(gate, gate_strides, head // GATE_GROUP, KIND)
    chunks = (end - begin + C - 1) // C
    for step in range(chunks):
        start = begin + (chunks - 1 - step) * C
        size = tl.minimum(end - start, C)
        k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
        keys = load_tile(k_at, k_strides[1], size, channel, C, BK, K)
        v_at = token_at(v, v_strides, sequence, start, head // V_GROUP)
        values = load_tile(v_at, v_strides[1], size, column, C, BV, V)
        decay_at = token_at(gate, gate_strides, sequence, start, head // GATE_GROUP)
        decay = load_decay(constant, decay_at, gate_strides[1], size, KIND, C)
        reads, writes, total = chunk_decays(decay, size, KIND, C)
        keeps = tl.exp(total)
        visible = row[:, None] >= row[None, :]
        if ids is not None:
            doc, doc_before, doc_last = load_documents(ids, begin, start, size, C)
            visible = visible & same_document(doc, begin, start, C)
            reads = tl.where((doc == doc_before)[:, None], reads, 0.0)
            writes = tl.where((doc == doc_last)[:, None], writes, 0.0)
            keeps = tl.where(doc_before == doc_last, keeps, 0.0)
        end_dstate = dstate.to(DOT)
        if dk is not None:
            dkeys = writes * product(values, tl.trans(end_dstate), DOT, PRECISION)
        if dv is not None:
            dvalues = read_state(keys, writes, end_dstate, DOT, PRECISION)
        dstate *= keeps[:, None]
        for reader in range(READERS):
            query = head * READERS + reader
            q_at = token_at(q, q_strides, sequence, start, query // Q_GROUP)
            queries = load_tile(q_at, q_strides[1], size, channel, C, BK, K)
            do_at = token_at(dout, dout_strides, sequence, start, query)
            do = load_tile(do_at, dout_strides[1], size, column, C, BV, V)
            dstate += outer(queries, reads, do, DOT, PRECISION)
            if dk is not None:
                grads = _score_grads(values, do, decay, visible, KIND, C, DOT, PRECISION)
                dkeys += product(tl.trans(grads), queries, DOT, PRECISION)
            if dv is not None:
                scores = decayed_scores(queries, keys, decay, visible, KIND, C, DOT, PRECISION)
                dvalues += product(tl.trans(scores.to(DOT)), do, DOT, PRECISION)
        if dk is not None:
            dk_at = token_at(dk, dk_strides, sequence, start, head)
            store_tile(dk_at, dk_strides[1], size, channel, dkeys, C, BK, K)
        if dv is not None:
            dv_at = token_at(dv, dv_strides, sequence, start, head)
            store_tile(dv_at, dv_strides[1], size, column, dvalues, C, BV, V)
        if dgate is not None:
            q_dq_at = token_at(q_dq_in, q_dq_strides, sequence, start, head)
            q_dq_at += row * q_dq_strides[1]
            terms = tl.load(q_dq_at, mask=row < tl.where(block == 0, size, 0), other=0.0)
            terms -= tl.sum(keys.to(tl.float32) * dkeys, 1)
            if ids is not None:
                sums = suffix_sums(terms, doc)
                after_chunk = tl.where(doc == doc_last, suffix_sum, 0.0)
                doc_previous = tl.load(ids + start + row - 1, mask=(start + row > begin) & (row < size), other=0)
                sums = tl.where(doc == doc_previous, sums + after_chunk, 0.0)
                suffix_sum = tl.where(doc_before == doc_last, suffix_sum, 0.0)
                suffix_sum += tl.sum(tl.where(doc == doc_before, terms, 0.0), 0)
            else:
                sums = suffix_sums(terms, None) + suffix_sum
                suffix_sum += tl.sum(terms, 0)
            dgate_at = token_at(dgate, dgate_strides, block * batch + sequence, start, head)
            tl.store(dgate_at + row * dgate_strides[1], sums, mask=row < size)
    if dk is not None:
        store_tile(dstates + (state_index * K + channel) * V, V, K - channel, column, dstate, BK, BV, V)
