"""Triton kernels of the additive recurrence, backward: one sweep over a segment for dq, one back for dk, dv and dg.

With A = dO V^T over pairs i >= j in one document, and P, pairs, reads, writes, keeps as forward:

    dQ = pairs * A on K + reads * dO S^T            S as forward, from the state that the segment received
    dK = pairs * A^T on Q + writes * V dS'^T
    dV = (P * pairs)^T dO + (writes * K) dS'
    dS = keeps * dS' + (reads * Q)^T dO

The gradient of the logarithm of a decay (Yang et al. 2024, Gated Linear Attention) needs q * dq and k * dk
alone: with G_i = g_0 + .. + g_i, everything depends on G through exp(G_i) q_i, exp(-G_j) k_j and the state that leaves
the segment, so

    dg_t = sum_(i >= t) (q_i * dq_i - k_i * dk_i) + sum_v S' * dS'      over t's document, within the segment

S' and dS' are those of the segment's end, and belong to its last document alone. A document's first decay acts on
nothing, and its gradient is 0.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton_chunk import (
    chunk_decays,
    half_decays,
    halvings,
    load_constant_decay,
    load_decay,
    load_documents,
    load_tile,
    locate,
    outer,
    pair_decays,
    product,
    read_state,
    store_tile,
    sum_tokens,
    token_at,
    weighted_scores,
)


@triton.jit
def _weighted_grads(
    grads,
    own,
    x,
    decay,
    KIND: tl.constexpr,
    FLIP: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`sum_j A_ij pairs_ij x_j`, `[C, BK]` float32, or with FLIP the sum over i, `sum_i A_ij pairs_ij x_i`.

    grads is A, 0 where a token is not seen (and already times pairs, where they are a number); own its diagonal.
    """
    if KIND == "vector":
        result = own[:, None] * x.to(tl.float32)
        for level in tl.static_range(halvings(C)):
            factor, met, _ = half_decays(decay, level, C, PRECISION)
            chosen = tl.where(met, grads, 0.0)
            if FLIP:
                chosen = tl.trans(chosen)
            result += factor * product(chosen, x * factor, DOT, PRECISION)
    else:
        if FLIP:
            grads = tl.trans(grads)
        result = product(grads, x, DOT, PRECISION)
    return result


@triton.jit
def _seen_grads(
    values,
    dout,
    decay,
    seen,
    KIND: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A, `[C, C]`, 0 where not seen and times pairs where they are a number, and the diagonal of dO V^T, `[C]`."""
    grads = product(dout, tl.trans(values), DOT, PRECISION)
    if KIND == "vector":
        grads = tl.where(seen, grads, 0.0)
    else:
        grads *= pair_decays(decay, seen, KIND, C)
    return grads, tl.sum(values.to(tl.float32) * dout.to(tl.float32), 1)


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
    terms_out,
    terms_strides,
    edges,
    heads,
    batch,
    K: tl.constexpr,
    V: tl.constexpr,
    Q_SHARE: tl.constexpr,
    K_SHARE: tl.constexpr,
    V_SHARE: tl.constexpr,
    GATE_SHARE: tl.constexpr,
    READERS: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a segment, in order of its tokens. A program has a block of K, and all of V.

    Where `terms_out` is given, also what `dk_dv_kernel` turns into dg: `q * dq` of each token, and `S' * dS'` of the
    segment's end in `edges`. Where the decay is a number, both are summed over the program's block of K.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    head, sequence, segment, block, begin, end = locate(bounds, heads, batch, BLOCKS)
    channel = block * BK
    place = ((segment * batch + sequence) * heads + head).to(tl.int64)
    state = load_tile(states + (place * K + channel) * V, V, K - channel, 0, BK, BV, V)
    row = tl.arange(0, C)
    constant = load_constant_decay(gate, gate_strides, head // GATE_SHARE, KIND)
    for step in range((end - begin + C - 1) // C):
        start = begin + step * C
        size = tl.minimum(end - start, C)
        k_at = token_at(k, k_strides, sequence, start, head // K_SHARE)
        keys = load_tile(k_at, k_strides[1], size, channel, C, BK, K)
        values = load_tile(token_at(v, v_strides, sequence, start, head // V_SHARE), v_strides[1], size, 0, C, BV, V)
        decay_at = token_at(gate, gate_strides, sequence, start, head // GATE_SHARE)
        decay = load_decay(constant, decay_at, gate_strides[1], size, channel, KIND, C, BK, K)
        reads, writes, total = chunk_decays(decay, size, KIND, C, PRECISION)
        keeps = tl.exp(total)
        seen = row[:, None] >= row[None, :]
        if ids is not None:
            own, before, last = load_documents(ids, begin, start, size, C)
            seen = seen & (own[:, None] == own[None, :])
            reads = tl.where((own == before)[:, None], reads, 0.0)
            writes = tl.where((own == last)[:, None], writes, 0.0)
            keeps = tl.where(before == last, keeps, 0.0)
        share = tl.zeros([C, BK], tl.float32)
        for reader in range(READERS):
            query = head * READERS + reader
            do_at = token_at(dout, dout_strides, sequence, start, query)
            grads_out = load_tile(do_at, dout_strides[1], size, 0, C, BV, V)
            grads, diagonal = _seen_grads(values, grads_out, decay, seen, KIND, C, DOT, PRECISION)
            result = _weighted_grads(grads, diagonal, keys, decay, KIND, False, C, DOT, PRECISION)
            result += reads * product(grads_out, tl.trans(state.to(DOT)), DOT, PRECISION)
            dq_at = token_at(dq, dq_strides, sequence, start, query)
            store_tile(dq_at, dq_strides[1], size, channel, result, C, BK, K)
            if terms_out is not None:
                q_at = token_at(q, q_strides, sequence, start, query // Q_SHARE)
                share += result * load_tile(q_at, q_strides[1], size, channel, C, BK, K).to(tl.float32)
        if terms_out is not None:
            if KIND == "vector":
                terms_at = token_at(terms_out, terms_strides, sequence, start, head)
                store_tile(terms_at, terms_strides[1], size, channel, share, C, BK, K)
            else:
                terms_at = token_at(terms_out, terms_strides, block * batch + sequence, start, head)
                tl.store(terms_at + row * terms_strides[1], tl.sum(share, 1), mask=row < size)
        state = state * keeps[:, None] + outer(keys, writes, values, DOT, PRECISION)
    if terms_out is not None:
        dstate = load_tile(dends + (place * K + channel) * V, V, K - channel, 0, BK, BV, V)
        edge = tl.sum(state * dstate, 1)
        if KIND == "vector":
            channels = channel + tl.arange(0, BK)
            tl.store(edges + place * K + channels, edge, mask=channels < K)
        else:
            tl.store(edges + place * BLOCKS + block, tl.sum(edge, 0))


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
    terms_in,
    terms_strides,
    dgate,
    dgate_strides,
    edges,
    dstates,
    heads,
    batch,
    K: tl.constexpr,
    V: tl.constexpr,
    Q_SHARE: tl.constexpr,
    K_SHARE: tl.constexpr,
    V_SHARE: tl.constexpr,
    GATE_SHARE: tl.constexpr,
    READERS: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk, dv and dg of a segment, against the order of its tokens, and the gradient of the state that it received.

    What is given is written: dk and dv together where a program can hold all of K and V; else dk, dg and dstates by
    blocks of K with all of V, and dv by blocks of V with all of K. dk and dv belong to the H heads of the states.
    """
    K_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    head, sequence, segment, block, begin, end = locate(bounds, heads, batch, K_BLOCKS * V_BLOCKS)
    channel, column = (block // V_BLOCKS) * BK, (block % V_BLOCKS) * BV
    place = ((segment * batch + sequence) * heads + head).to(tl.int64)
    dstate = load_tile(dends + (place * K + channel) * V, V, K - channel, column, BK, BV, V)
    row = tl.arange(0, C)
    if dgate is not None:
        if KIND == "vector":
            channels = channel + tl.arange(0, BK)
            carried = tl.load(edges + place * K + channels, mask=channels < K, other=0.0)
        else:
            # The terms of dq and those of the segment's end are there once, for all blocks of K.
            carried = tl.load(edges + place + tl.arange(0, 1), mask=(tl.arange(0, 1) == block), other=0.0)
    constant = load_constant_decay(gate, gate_strides, head // GATE_SHARE, KIND)
    chunks = (end - begin + C - 1) // C
    for step in range(chunks):
        start = begin + (chunks - 1 - step) * C
        size = tl.minimum(end - start, C)
        k_at = token_at(k, k_strides, sequence, start, head // K_SHARE)
        keys = load_tile(k_at, k_strides[1], size, channel, C, BK, K)
        v_at = token_at(v, v_strides, sequence, start, head // V_SHARE)
        values = load_tile(v_at, v_strides[1], size, column, C, BV, V)
        decay_at = token_at(gate, gate_strides, sequence, start, head // GATE_SHARE)
        decay = load_decay(constant, decay_at, gate_strides[1], size, channel, KIND, C, BK, K)
        reads, writes, total = chunk_decays(decay, size, KIND, C, PRECISION)
        keeps = tl.exp(total)
        seen = row[:, None] >= row[None, :]
        if ids is not None:
            own, before, last = load_documents(ids, begin, start, size, C)
            seen = seen & (own[:, None] == own[None, :])
            reads = tl.where((own == before)[:, None], reads, 0.0)
            writes = tl.where((own == last)[:, None], writes, 0.0)
            keeps = tl.where(before == last, keeps, 0.0)
        if dk is not None:
            dkeys = writes * product(values, tl.trans(dstate.to(DOT)), DOT, PRECISION)
        if dv is not None:
            dvalues = read_state(keys, writes, dstate, KIND, DOT, PRECISION)
        dstate *= keeps[:, None]
        for reader in range(READERS):
            query = head * READERS + reader
            q_at = token_at(q, q_strides, sequence, start, query // Q_SHARE)
            queries = load_tile(q_at, q_strides[1], size, channel, C, BK, K)
            do_at = token_at(dout, dout_strides, sequence, start, query)
            grads_out = load_tile(do_at, dout_strides[1], size, column, C, BV, V)
            if dk is not None:
                grads, diagonal = _seen_grads(values, grads_out, decay, seen, KIND, C, DOT, PRECISION)
                dkeys += _weighted_grads(grads, diagonal, queries, decay, KIND, True, C, DOT, PRECISION)
            if dv is not None:
                scores = weighted_scores(queries, keys, decay, seen, True, KIND, C, DOT, PRECISION)
                dvalues += product(tl.trans(scores.to(DOT)), grads_out, DOT, PRECISION)
            dstate += outer(queries, reads, grads_out, DOT, PRECISION)
        if dk is not None:
            dk_at = token_at(dk, dk_strides, sequence, start, head)
            store_tile(dk_at, dk_strides[1], size, channel, dkeys, C, BK, K)
        if dv is not None:
            dv_at = token_at(dv, dv_strides, sequence, start, head)
            store_tile(dv_at, dv_strides[1], size, column, dvalues, C, BV, V)
        if dgate is not None:
            later = row[:, None] <= row[None, :]
            if ids is not None:
                later = later & (own[:, None] == own[None, :])
            if KIND == "vector":
                terms_at = token_at(terms_in, terms_strides, sequence, start, head)
                terms = load_tile(terms_at, terms_strides[1], size, channel, C, BK, K)
                terms -= keys.to(tl.float32) * dkeys
                sums = sum_tokens(later, terms, PRECISION)
                beyond = carried[None, :]
                if ids is not None:
                    beyond = tl.where((own == last)[:, None], beyond, 0.0)
                    # A document that begins here reads nothing that its first decay acts on.
                    ahead = tl.load(ids + start + row - 1, mask=(start + row > begin) & (row < size), other=0)
                    sums = tl.where((own == ahead)[:, None], sums + beyond, 0.0)
                    carried = tl.where(before == last, carried, 0.0)
                    carried += tl.sum(tl.where((own == before)[:, None], terms, 0.0), 0)
                else:
                    sums += beyond
                    carried += tl.sum(terms, 0)
                # dgate may be the memory of the terms, and a thread's part of them another's of the sums.
                tl.debug_barrier()
                dgate_at = token_at(dgate, dgate_strides, sequence, start, head)
                store_tile(dgate_at, dgate_strides[1], size, channel, sums, C, BK, K)
            else:
                terms_at = token_at(terms_in, terms_strides, sequence, start, head)
                terms_at += row * terms_strides[1]
                terms = tl.load(terms_at, mask=row < tl.where(block == 0, size, 0), other=0.0)
                terms -= tl.sum(keys.to(tl.float32) * dkeys, 1)
                sums = tl.sum(tl.where(later, terms[None, :], 0.0), 1)
                if ids is not None:
                    beyond = tl.where(own == last, carried, 0.0)
                    ahead = tl.load(ids + start + row - 1, mask=(start + row > begin) & (row < size), other=0)
                    sums = tl.where(own == ahead, sums + beyond, 0.0)
                    carried = tl.where(before == last, carried, 0.0)
                    carried += tl.sum(tl.where(own == before, terms, 0.0), 0)
                else:
                    sums += carried
                    carried += tl.sum(terms, 0)
                dgate_at = token_at(dgate, dgate_strides, block * batch + sequence, start, head)
                tl.store(dgate_at + row * dgate_strides[1], sums, mask=row < size)
    if dk is not None:
        store_tile(dstates + (place * K + channel) * V, V, K - channel, column, dstate, BK, BV, V)
