"""UT transform of the delta rule in Triton: the intra-chunk kernel, which runs before all others.

Parallel over chunks, it inverts each chunk's triangular system and computes its scores (equations in
`longctx.kernels.linear.delta.chunked`), so that the inter-chunk kernels only multiply:

    inverse      (I + diag(b) pairs(K, K) below the diagonal)^-1      [C, C], unit lower triangular
    scores       pairs(Q, K)                                          [C, C] per query head
    decayed_k, written_k, decayed_q, keeps      reads K, writes K, reads Q, keeps: only for vector decays

The inverse is exact to float32's rounding: diagonal blocks of 16 by forward substitution, all in parallel, then pairs
of neighbouring blocks by `[[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]`. A power series of the system would
take fewer steps and lose all digits where keys are similar.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton_chunk import (
    chunk_decays,
    decayed_scores,
    halvings,
    load_constant_decay,
    load_decay,
    load_documents,
    load_tile,
    store_tile,
    token_at,
)

SUBSTITUTION_ROWS = tl.constexpr(16)
"""Rows per diagonal block, which forward substitution inverts row by row."""


@triton.jit
def locate_chunk(bounds, heads, batch, chunks, BLOCKS: tl.constexpr, C: tl.constexpr):
    """Return this program's block, head, batch row, segment begin, first token, number of tokens and chunk slot.

    Every segment has `chunks` slots, as many as the longest one has chunks; a slot after the segment's end has 0 or
    fewer tokens. Slots are numbered over all segments, batch rows and heads.
    """
    program = tl.program_id(0)
    block = program % BLOCKS
    rest = program // BLOCKS
    head = rest % heads
    rest = rest // heads
    sequence = rest % batch
    rest = rest // batch
    segment = rest // chunks
    begin = tl.load(bounds + 2 * segment)
    end = tl.load(bounds + 2 * segment + 1)
    start = begin + (rest % chunks) * C
    slot = (program // BLOCKS).to(tl.int64)
    return block, head, sequence, begin, start, tl.minimum(end - start, C), slot


@triton.jit
def chunk_slot(segment, step, sequence, head, heads, batch, chunks):
    """Return the slot of a segment's chunk, numbered as in `locate_chunk`."""
    return ((segment * chunks + step).to(tl.int64) * batch + sequence) * heads + head


@triton.jit
def load_per_token(at, stride, size, C: tl.constexpr):
    """Load a number per token of a chunk, `[C]` float32, 0 from row `size` on."""
    row = tl.arange(0, C)
    return tl.load(at + row * stride, mask=row < size, other=0.0).to(tl.float32)


@triton.jit
def invert(system, C: tl.constexpr, PRECISION: tl.constexpr):
    """Invert `I + system` for a strictly lower triangular `system`, `[C, C]` float32, C a power of two from 16 on."""
    row = tl.arange(0, C)
    i, j = row[:, None], row[None, :]
    same_block = i // SUBSTITUTION_ROWS == j // SUBSTITUTION_ROWS
    # Row n of all blocks at once: minus its entries times the inverse's rows above it.
    columns = tl.trans(tl.where(same_block, system, 0.0))
    inverse = tl.where(i == j, 1.0, 0.0)
    for n in range(1, SUBSTITUTION_ROWS):
        entries = tl.sum(tl.where(j % SUBSTITUTION_ROWS == n, columns, 0.0), 1)
        row_update = tl.sum(entries[:, None] * inverse, 0)
        inverse -= tl.where(same_block & (i % SUBSTITUTION_ROWS == n), row_update[None, :], 0.0)
    for level in tl.static_range(halvings(C) - halvings(SUBSTITUTION_ROWS)):
        half = SUBSTITUTION_ROWS << level
        off_diagonal = (i // (2 * half) == j // (2 * half)) & (i // half > j // half)
        solved = tl.dot(tl.where(off_diagonal, system, 0.0), inverse, input_precision=PRECISION)
        inverse -= tl.dot(inverse, solved, input_precision=PRECISION)
    return inverse


@triton.jit
def document_decays(reads, writes, keeps, visible, ids, begin, start, size, C: tl.constexpr):
    """Apply document starts to the decays and to the mask `visible` `[C, C]`; no change where ids is None."""
    if ids is not None:
        doc, doc_before, doc_last = load_documents(ids, begin, start, size, C)
        reads = tl.where((doc == doc_before)[:, None], reads, 0.0)
        writes = tl.where((doc == doc_last)[:, None], writes, 0.0)
        keeps = tl.where(doc_before == doc_last, keeps, 0.0)
        visible = visible & (doc[:, None] == doc[None, :])
    return reads, writes, keeps, visible


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
    """Compute a chunk's inverse and scores, and for vector decays its decayed keys and queries.

    Writes those that are not None, in the dtype of products: inverse `[slots, C, C]`, scores `[slots, READERS, C, C]`,
    decayed_k and written_k `[slots, C, K]`, decayed_q `[slots, READERS, C, K]`; and keeps_out `[slots, K]`, float32.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    _, head, sequence, begin, start, size, slot = locate_chunk(bounds, heads, batch, chunks, 1, C)
    if size <= 0:
        return
    row = tl.arange(0, C)
    causal = row[:, None] >= row[None, :]
    constant = load_constant_decay(gate, gate_strides, head // GATE_GROUP, KIND)
    k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
    decay_at = token_at(gate, gate_strides, sequence, start, head // GATE_GROUP)
    kk = tl.zeros([C, C], tl.float32)
    for block in range(BLOCKS):
        channel = block * BK
        keys = load_tile(k_at, k_strides[1], size, channel, C, BK, K)
        decay = load_decay(constant, decay_at, gate_strides[1], size, channel, KIND, C, BK, K)
        reads, writes, total = chunk_decays(decay, size, KIND, C, PRECISION)
        reads, writes, keeps, visible = document_decays(
            reads, writes, tl.exp(total), causal, ids, begin, start, size, C
        )
        kk += decayed_scores(keys, keys, decay, visible, False, KIND, C, DOT, PRECISION)
        if decayed_k is not None:
            store_tile(decayed_k + slot * C * K, K, C, channel, keys * reads, C, BK, K)
            store_tile(written_k + slot * C * K, K, C, channel, keys * writes, C, BK, K)
            channels = channel + tl.arange(0, BK)
            tl.store(keeps_out + slot * K + channels, keeps, mask=channels < K)
    betas = load_per_token(token_at(beta, beta_strides, sequence, start, head // BETA_GROUP), beta_strides[1], size, C)
    system = tl.where(row[:, None] > row[None, :], betas[:, None] * kk, 0.0)
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
                decay = load_decay(constant, decay_at, gate_strides[1], size, channel, KIND, C, BK, K)
                reads, writes, total = chunk_decays(decay, size, KIND, C, PRECISION)
                reads, writes, keeps, visible = document_decays(
                    reads, writes, tl.exp(total), causal, ids, begin, start, size, C
                )
                result += decayed_scores(queries, keys, decay, visible, False, KIND, C, DOT, PRECISION)
                if decayed_q is not None:
                    store_tile(decayed_q + query_slot * C * K, K, C, channel, queries * reads, C, BK, K)
            store_tile(scores + query_slot * C * C, C, C, 0, result, C, C, C)
