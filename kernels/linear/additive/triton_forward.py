"""Triton kernels of the additive recurrence, forward: segment carries, and outputs.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

A program loops over the chunks of one segment of one head, with a tile of the state in float32 registers. With the
decay factors of `longctx.kernels.linear.triton_chunk`:

    O  = (P * pairs) V + reads * Q S        P = Q K^T, over pairs in one document
    S' = keeps * S + (writes * K)^T V
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton_chunk import (
    chunk_decays,
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
    token_at,
)
from longctx.kernels.linear.triton_pairs import LOG2_E, load_log2_decay, state_factor


@triton.jit
def summary_kernel(
    x,
    x_strides,
    y,
    y_strides,
    gate,
    gate_strides,
    bounds,
    state_out,
    total_out,
    heads,
    batch,
    K: tl.constexpr,
    V: tl.constexpr,
    X_GROUP: tl.constexpr,
    Y_GROUP: tl.constexpr,
    GATE_GROUP: tl.constexpr,
    READERS: tl.constexpr,
    REVERSE: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute `sum_t (factor_t * x_t)^T y_t` over a segment, and its cumulative log-decay.

    Decayed to the segment's end (x = k, y = v), or with REVERSE to its start (x = q, y = do, summed over the READERS
    query heads of a state). The head of x is `(head * READERS + reader) // X_GROUP`, of y likewise. A program has a
    block of K and one of V.
    """
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    K_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    head, sequence, segment, block, begin, end = locate_program(bounds, heads, batch, K_BLOCKS * V_BLOCKS)
    row, column = (block // V_BLOCKS) * BK, (block % V_BLOCKS) * BV
    state = tl.zeros([BK, BV], tl.float32)
    total = tl.zeros([BK], tl.float32) if KIND == "vector" else tl.zeros([1], tl.float32)
    constant = load_constant_decay(gate, gate_strides, head // GATE_GROUP, KIND)
    chunks = (end - begin + C - 1) // C
    for step in range(chunks):
        start = begin + (chunks - 1 - step) * C if REVERSE else begin + step * C
        size = tl.minimum(end - start, C)
        decay_at = token_at(gate, gate_strides, sequence, start, head // GATE_GROUP)
        if KIND == "vector":
            log2_decay = load_log2_decay(decay_at, gate_strides[1], size, row, C, BK, K)
            factor = state_factor(log2_decay, REVERSE, C, BK, DOT)
            chunk_total = tl.sum(tl.sum(log2_decay, 1), 0) / LOG2_E
        else:
            decay = load_decay(constant, decay_at, gate_strides[1], size, KIND, C)
            reads, writes, chunk_total = chunk_decays(decay, size, KIND, C)
            factor = reads if REVERSE else writes
        state *= tl.exp(chunk_total)[:, None]
        total += chunk_total
        for reader in range(READERS):
            x_at = token_at(x, x_strides, sequence, start, (head * READERS + reader) // X_GROUP)
            y_at = token_at(y, y_strides, sequence, start, (head * READERS + reader) // Y_GROUP)
            x_tile = load_tile(x_at, x_strides[1], size, row, C, BK, K)
            y_tile = load_tile(y_at, y_strides[1], size, column, C, BV, V)
            state += outer(x_tile, factor, y_tile, DOT, PRECISION)
    state_index = ((segment * batch + sequence) * heads + head).to(tl.int64)
    store_tile(state_out + (state_index * K + row) * V, V, K - row, column, state, BK, BV, V)
    if KIND == "vector":
        channels = row + tl.arange(0, BK)
        tl.store(total_out + state_index * K + channels, total, mask=channels < tl.where(column == 0, K, 0))
    else:
        tl.store(total_out + state_index + tl.arange(0, 1), total, mask=tl.arange(0, 1) == block)


@triton.jit
def apply_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    gate,
    gate_strides,
    ids,
    bounds,
    states,
    out,
    out_strides,
    ends,
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
    """Compute a segment's outputs from its start state, and its end state. A program has all of K, a block of V."""
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    head, sequence, segment, block, begin, end = locate_program(bounds, heads, batch, BLOCKS)
    column = block * BV
    state_offset = ((segment * batch + sequence) * heads + head).to(tl.int64) * K * V
    state = load_tile(states + state_offset, V, K, column, BK, BV, V)
    row = tl.arange(0, C)
    constant = load_constant_decay(gate, gate_strides, head // GATE_GROUP, KIND)
    for step in range((end - begin + C - 1) // C):
        start = begin + step * C
        size = tl.minimum(end - start, C)
        keys = load_tile(token_at(k, k_strides, sequence, start, head // K_GROUP), k_strides[1], size, 0, C, BK, K)
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
        # The state moves on before its old values are read.
        start_state = state.to(DOT)
        state = state * keeps[:, None] + outer(keys, writes, values, DOT, PRECISION)
        for reader in range(READERS):
            query = head * READERS + reader
            queries = load_tile(
                token_at(q, q_strides, sequence, start, query // Q_GROUP), q_strides[1], size, 0, C, BK, K
            )
            scores = decayed_scores(queries, keys, decay, visible, KIND, C, DOT, PRECISION)
            result = read_state(queries, reads, start_state, DOT, PRECISION)
            result += product(scores, values, DOT, PRECISION)
            out_at = token_at(out, out_strides, sequence, start, query)
            store_tile(out_at, out_strides[1], size, column, result, C, BV, V)
    store_tile(ends + state_offset, V, K, column, state, BK, BV, V)
