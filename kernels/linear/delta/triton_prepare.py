"""The Triton kernel of the delta rule that comes before all others: what concerns a chunk's tokens alone.

Each chunk, side by side with all others, gets the inverse of its triangular system and its scores (`longctx.kernels.
delta` has the equations), so that the kernels that walk from chunk to chunk only multiply:

    inverse  (I + diag(b) pairs(K, K) below the diagonal)^-1      [C, C], unit lower triangular
    scores   pairs(Q, K)                                          [C, C] for each query head
    asking, writing, reading, keeps      reads K, writes K, reads Q, keeps, where a decay is a vector

The inverse is exact to float32's rounding: blocks of 16 by forward substitution, all at once, then pairs of neighbours
by `[[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]`. A power series of the system would need fewer steps and
lose every digit where keys resemble each other.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton_chunk import (
    chunk_decays,
    halvings,
    load_constant_decay,
    load_decay,
    load_documents,
    load_tile,
    store_tile,
    token_at,
    weighted_scores,
)

SUBSTITUTED = tl.constexpr(16)
"""Rows of the blocks that are inverted row by row."""


@triton.jit
def locate_chunk(bounds, heads, batch, chunks, BLOCKS: tl.constexpr, C: tl.constexpr):
    """This program's part of the work: block, head, batch, segment, where that begins, the chunk's first token and how
    many tokens it has (0 or less behind the segment's end), and its place among the chunks of all segments and heads.

    A segment has room for `chunks` chunks, as many as the longest one has.
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
    place = (program // BLOCKS).to(tl.int64)
    return block, head, sequence, begin, start, tl.minimum(end - start, C), place


@triton.jit
def chunk_place(segment, step, sequence, head, heads, batch, chunks):
    """The place of a segment's chunk, as `locate_chunk` counts them."""
    return ((segment * chunks + step).to(tl.int64) * batch + sequence) * heads + head


@triton.jit
def load_numbers(at, stride, size, C: tl.constexpr):
    """`[C]` float32, a number for each of a chunk's tokens, 0 behind row `size`."""
    row = tl.arange(0, C)
    return tl.load(at + row * stride, mask=row < size, other=0.0).to(tl.float32)


@triton.jit
def invert(system, C: tl.constexpr, PRECISION: tl.constexpr):
    """`(I + system)^-1` for a strictly lower triangular `system`, `[C, C]` float32, C a power of two from 16 on."""
    row = tl.arange(0, C)
    i, j = row[:, None], row[None, :]
    together = i // SUBSTITUTED == j // SUBSTITUTED
    # Row n of every block at once: minus its entries times the rows of the inverse above it.
    columns = tl.trans(tl.where(together, system, 0.0))
    inverse = tl.where(i == j, 1.0, 0.0)
    for n in range(1, SUBSTITUTED):
        entries = tl.sum(tl.where(j % SUBSTITUTED == n, columns, 0.0), 1)
        solved = tl.sum(entries[:, None] * inverse, 0)
        inverse -= tl.where(together & (i % SUBSTITUTED == n), solved[None, :], 0.0)
    for level in tl.static_range(halvings(C) - halvings(SUBSTITUTED)):
        half = SUBSTITUTED << level
        beside = (i // (2 * half) == j // (2 * half)) & (i // half > j // half)
        below = tl.dot(tl.where(beside, system, 0.0), inverse, input_precision=PRECISION)
        inverse -= tl.dot(inverse, below, input_precision=PRECISION)
    return inverse


@triton.jit
def document_decays(reads, writes, keeps, seen, ids, begin, start, size, C: tl.constexpr):
    """Decays that a document's start ends, and which tokens `[C, C]` are seen: unchanged where ids is None."""
    if ids is not None:
        own, before, last = load_documents(ids, begin, start, size, C)
        reads = tl.where((own == before)[:, None], reads, 0.0)
        writes = tl.where((own == last)[:, None], writes, 0.0)
        keeps = tl.where(before == last, keeps, 0.0)
        seen = seen & (own[:, None] == own[None, :])
    return reads, writes, keeps, seen


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
    asking,
    writing,
    reading,
    keeps_out,
    chunks,
    heads,
    batch,
    K: tl.constexpr,
    V: tl.constexpr,
    Q_SHARE: tl.constexpr,
    K_SHARE: tl.constexpr,
    BETA_SHARE: tl.constexpr,
    GATE_SHARE: tl.constexpr,
    READERS: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What is given is written, in the dtype of products: inverse `[places, C, C]`, scores `[places, READERS, C, C]`,
    asking and writing `[places, C, K]`, reading `[places, READERS, C, K]`; and keeps_out `[places, K]`, float32.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    _, head, sequence, begin, start, size, place = locate_chunk(bounds, heads, batch, chunks, 1, C)
    if size <= 0:
        return
    row = tl.arange(0, C)
    causal = row[:, None] >= row[None, :]
    constant = load_constant_decay(gate, gate_strides, head // GATE_SHARE, KIND)
    k_at = token_at(k, k_strides, sequence, start, head // K_SHARE)
    decay_at = token_at(gate, gate_strides, sequence, start, head // GATE_SHARE)
    answers = tl.zeros([C, C], tl.float32)
    for block in range(BLOCKS):
        channel = block * BK
        keys = load_tile(k_at, k_strides[1], size, channel, C, BK, K)
        decay = load_decay(constant, decay_at, gate_strides[1], size, channel, KIND, C, BK, K)
        reads, writes, total = chunk_decays(decay, size, KIND, C, PRECISION)
        reads, writes, keeps, seen = document_decays(reads, writes, tl.exp(total), causal, ids, begin, start, size, C)
        answers += weighted_scores(keys, keys, decay, seen, False, KIND, C, DOT, PRECISION)
        if asking is not None:
            store_tile(asking + place * C * K, K, C, channel, keys * reads, C, BK, K)
            store_tile(writing + place * C * K, K, C, channel, keys * writes, C, BK, K)
            channels = channel + tl.arange(0, BK)
            tl.store(keeps_out + place * K + channels, keeps, mask=channels < K)
    share = load_numbers(token_at(beta, beta_strides, sequence, start, head // BETA_SHARE), beta_strides[1], size, C)
    system = tl.where(row[:, None] > row[None, :], share[:, None] * answers, 0.0)
    store_tile(inverse + place * C * C, C, C, 0, invert(system, C, PRECISION), C, C, C)
    if scores is not None:
        for reader in range(READERS):
            q_at = token_at(q, q_strides, sequence, start, (head * READERS + reader) // Q_SHARE)
            at = place * READERS + reader
            result = tl.zeros([C, C], tl.float32)
            for block in range(BLOCKS):
                channel = block * BK
                keys = load_tile(k_at, k_strides[1], size, channel, C, BK, K)
                queries = load_tile(q_at, q_strides[1], size, channel, C, BK, K)
                decay = load_decay(constant, decay_at, gate_strides[1], size, channel, KIND, C, BK, K)
                reads, writes, total = chunk_decays(decay, size, KIND, C, PRECISION)
                reads, writes, keeps, seen = document_decays(
                    reads, writes, tl.exp(total), causal, ids, begin, start, size, C
                )
                result += weighted_scores(queries, keys, decay, seen, False, KIND, C, DOT, PRECISION)
                if reading is not None:
                    store_tile(reading + at * C * K, K, C, channel, queries * reads, C, BK, K)
            store_tile(scores + at * C * C, C, C, 0, result, C, C, C)
