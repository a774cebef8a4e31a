"""UT transform of the delta rule in Triton: the intra-chunk kernel, which runs before all others.

Parallel over chunks, it inverts each chunk's triangular system and computes its scores, so that the inter-chunk kernels
only multiply. The equations are those of `longctx.kernels.linear.delta.chunked` for Z = U / diag(b), what a token would
write at full strength: U = diag(b) Z, and beta is in the matrices instead.

    inverse      (I + pairs(K, K) diag(b) below the diagonal)^-1      [C, C], unit lower triangular
    scores       pairs(Q, K) diag(b)                                  [C, C] per query head
    factors      reads, diag(b) writes, writes                        [3, C], float32

The inverse is exact to float32's rounding: diagonal blocks of 16 by forward substitution, all in parallel, then pairs
of neighbouring blocks by `[[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]`. A power series of the system would
take fewer steps and lose all digits where keys are similar.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.triton_chunk import (
    chunk_decays,
    halvings,
    load_decay,
    load_documents,
    load_tile,
    locate_chunk,
    pair_decays,
    product,
    store_tile,
    token_at,
)

SUBSTITUTION_ROWS = tl.constexpr(16)
"""Rows per diagonal block, which forward substitution inverts row by row."""
READS, BETA_WRITES, WRITES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Rows of a chunk's factors `[3, C]`: reads, beta times writes, writes."""


@triton.jit
def load_per_token(at, stride, size, C: tl.constexpr):
    """Load a number per token of a chunk, `[C]` float32, 0 from row `size` on."""
    row = tl.arange(0, C)
    return tl.load(at + row * stride, mask=row < size, other=0.0).to(tl.float32)


@triton.jit
def load_factor(factors, slot, FACTOR: tl.constexpr, C: tl.constexpr):
    """Load one of the factors of a chunk's tokens, `[C]`."""
    return tl.load(factors + (slot * 3 + FACTOR) * C + tl.arange(0, C))


@triton.jit
def load_keeps(factors, slot, size, C: tl.constexpr):
    """Load a chunk's keeps, `[1]`: what its last token reads."""
    return tl.load(factors + (slot * 3 + READS) * C + size - 1 + tl.arange(0, 1))


@triton.jit
def invert(system, C: tl.constexpr, PRECISION: tl.constexpr):
    """Invert `I + system` for a strictly lower triangular `system`, `[C, C]` float32, C a power of two from 16 on."""
    ROWS: tl.constexpr = SUBSTITUTION_ROWS
    BLOCKS: tl.constexpr = C // ROWS
    row = tl.arange(0, C)
    i, j = row[:, None], row[None, :]
    # The diagonal blocks, [BLOCKS, ROWS, ROWS].
    block, small = tl.arange(0, BLOCKS), tl.arange(0, ROWS)
    on_diagonal = block[:, None, None, None] == block[None, None, :, None]
    blocks = tl.sum(tl.where(on_diagonal, tl.reshape(system, (BLOCKS, ROWS, BLOCKS, ROWS)), 0.0), 2)
    n_row, n_column = small[None, :, None], small[None, None, :]
    inverses = tl.where(n_row == n_column, 1.0, 0.0) + tl.zeros([BLOCKS, ROWS, ROWS], tl.float32)
    columns = tl.permute(blocks, (0, 2, 1))
    for n in range(1, ROWS):
        # Row n of all blocks at once: minus its entries times the inverse's rows above it.
        entries = tl.sum(tl.where(n_column == n, columns, 0.0), 2)
        row_update = tl.sum(entries[:, :, None] * inverses, 1)
        inverses -= tl.where(n_row == n, row_update[:, None, :], 0.0)
    inverse = tl.reshape(tl.where(on_diagonal, inverses[:, :, None, :], 0.0), (C, C))
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
def _scalar_decay(
    gate, gate_strides, head, sequence, start, size, GATE_GROUP: tl.constexpr, KIND: tl.constexpr, C: tl.constexpr
):
    """Load a chunk's scalar log-decays, `[C]`; zeros where there is no decay."""
    if KIND == "scalar":
        decay_at = token_at(gate, gate_strides, sequence, start, head // GATE_GROUP)
        decay = load_decay(0.0, decay_at, gate_strides[1], size, KIND, C)
    else:
        decay = tl.zeros([C], tl.float32)
    return decay


@triton.jit
def token_pairs(
    gate,
    gate_strides,
    head,
    sequence,
    ids,
    begin,
    start,
    size,
    GATE_GROUP: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
):
    """Return the decays between a chunk's pairs of tokens, and the mask of those visible to each other: `[C, C]`."""
    row = tl.arange(0, C)
    visible = row[:, None] >= row[None, :]
    if ids is not None:
        doc, _, _ = load_documents(ids, begin, start, size, C)
        visible = visible & (doc[:, None] == doc[None, :])
    if KIND == "scalar":
        decay = _scalar_decay(gate, gate_strides, head, sequence, start, size, GATE_GROUP, KIND, C)
        pairs = pair_decays(decay, visible, KIND, C)
    else:
        pairs = tl.where(visible, 1.0, 0.0)
    return pairs, visible


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
    factors,
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
    """Compute a chunk's inverse, scores and factors for decays per token, or none.

    Writes those that are not None: inverse `[slots, C, C]` and scores `[slots, READERS, C, C]` in the dtype of
    products, factors `[slots, 3, C]` float32. The decays of pairs are computed once for the inverse and all scores.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    _, head, sequence, begin, start, size, slot = locate_chunk(bounds, heads, batch, chunks, 1, C)
    if size <= 0:
        return
    row = tl.arange(0, C)
    beta_at = token_at(beta, beta_strides, sequence, start, head // BETA_GROUP)
    betas = load_per_token(beta_at, beta_strides[1], size, C)
    pairs, visible = token_pairs(gate, gate_strides, head, sequence, ids, begin, start, size, GATE_GROUP, KIND, C)
    pairs *= betas[None, :]
    if factors is not None:
        decay = _scalar_decay(gate, gate_strides, head, sequence, start, size, GATE_GROUP, KIND, C)
        reads, writes, _ = chunk_decays(decay, size, "scalar", C)
        reads, writes, _, _ = document_decays(reads, writes, 1.0, visible, ids, begin, start, size, C)
        at = factors + slot * 3 * C + row
        writes = tl.reshape(writes, (C,))
        tl.store(at + READS * C, tl.reshape(reads, (C,)))
        tl.store(at + BETA_WRITES * C, betas * writes)
        tl.store(at + WRITES * C, writes)
    k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
    if inverse is not None:
        kk = tl.zeros([C, C], tl.float32)
        for block in range(BLOCKS):
            keys = load_tile(k_at, k_strides[1], size, block * BK, C, BK, K)
            kk += product(keys, tl.trans(keys), DOT, PRECISION)
        system = tl.where(row[:, None] > row[None, :], pairs * kk, 0.0)
        store_tile(inverse + slot * C * C, C, C, 0, invert(system, C, PRECISION), C, C, C)
    if scores is not None:
        for reader in range(READERS):
            q_at = token_at(q, q_strides, sequence, start, (head * READERS + reader) // Q_GROUP)
            result = tl.zeros([C, C], tl.float32)
            for block in range(BLOCKS):
                keys = load_tile(k_at, k_strides[1], size, block * BK, C, BK, K)
                queries = load_tile(q_at, q_strides[1], size, block * BK, C, BK, K)
                result += product(queries, tl.trans(keys), DOT, PRECISION)
            store_tile(scores + (slot * READERS + reader) * C * C, C, C, 0, result * pairs, C, C, C)
