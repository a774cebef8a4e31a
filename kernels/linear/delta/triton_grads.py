"""The Triton kernel of the delta rule that ends the backward pass: the gradients of q, k, b and g, chunk by chunk.

With S the state before a chunk, dS' the gradient of that behind it, U and dR
(`longctx.kernels.linear.delta.triton_chunk_scan`), chunks depend on nothing else and run side by side:

    asked = reads * dR S^T        written = writes * U dS'^T        dP = dO U^T        dL = -dR U^T below the diagonal
    (x, y) the gradients of the two sides of L = pairs(diag(b) K, K), for dL; (x', y') of those of P = pairs(Q, K)

    dQ = reads * dO S^T + x'      dK = written + diag(b) (x - asked) + y + y'      db = rowsum(dR * V + K * (x - asked))

The gradient of a decay adds
up what it acts on: pairs around it, what is read of S at its token or later, what was written into S' before it, and
what of S is kept in S'. No term is the difference of two others, and behind a document's first token nothing is left.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.delta.triton_prepare import document_decays, load_numbers, locate_chunk
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
    crossed,
    WITH_GATE: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of x and y, `[C, BK]` float32, for the gradient `grads` `[C, C]` of `pairs(x, y)`.

    grads is 0 where a token is not seen. crossed is returned with what the decays get, where WITH_GATE: of a vector
    decay the gradient itself, `[C, BK]`; of a scalar one `grads * pairs(x, y)`, `[C, C]`, for `_crossing`. pairs is
    what `pair_decays` gives, and not read where the decay is a vector.
    """
    if KIND == "vector":
        row = tl.arange(0, C)
        own = tl.sum(tl.where(row[:, None] == row[None, :], grads, 0.0), 1)[:, None]
        dx = own * y.to(tl.float32)
        dy = own * x.to(tl.float32)
        for level in range(halvings(C)):
            factor, met, between = half_decays(decay, level, C, PRECISION)
            chosen = tl.where(met, grads, 0.0)
            right = factor * product(chosen, y * factor, DOT, PRECISION)
            left = factor * product(tl.trans(chosen), x * factor, DOT, PRECISION)
            dx += right
            dy += left
            if WITH_GATE:
                # A decay acts on the pairs of every token that has it between itself and the middle.
                crossing = right * x.to(tl.float32) + left * y.to(tl.float32)
                crossed += sum_tokens(tl.trans(between), crossing, PRECISION)
    else:
        if WITH_GATE:
            crossed += grads * pairs * product(x, tl.trans(y), DOT, PRECISION)
        weighted = grads * pairs
        dx = product(weighted, y, DOT, PRECISION)
        dy = product(tl.trans(weighted), x, DOT, PRECISION)
    return dx, dy, crossed


@triton.jit
def _crossing(weights, C: tl.constexpr, PRECISION: tl.constexpr):
    """`[C]`: for each token t the sum of weights `[C, C]` over pairs j < t <= i."""
    row = tl.arange(0, C)
    later = sum_tokens(row[:, None] <= row[None, :], weights, PRECISION)
    return tl.sum(tl.where(row[None, :] < row[:, None], later, 0.0), 1)


@triton.jit
def _by_channel(tile, KIND: tl.constexpr):
    """`[C, BK]` where decays have channels, else its sum over them, `[C]`."""
    return tile if KIND == "vector" else tl.sum(tile, 1)


@triton.jit
def _sum_tokens(chosen, tile, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """For each row the sum of the tokens that it chooses, of what `_by_channel` gives."""
    return sum_tokens(chosen, tile, PRECISION) if KIND == "vector" else tl.sum(tl.where(chosen, tile[None, :], 0.0), 1)


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
    written_u,
    dright_in,
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
    Q_SHARE: tl.constexpr,
    K_SHARE: tl.constexpr,
    V_SHARE: tl.constexpr,
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
    """dq, dk and, where given, dbeta and dgate of a chunk. A program has a block of K, and goes through V in blocks.

    dq belongs to the outputs, the others to the H heads of the states. dbeta and the dgate of a scalar decay are
    `[blocks of K x B, T, H]`, to be summed over the blocks; the dgate of a vector one is `[B, T, H, K]`.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    WITH_GATE: tl.constexpr = dgate is not None
    block, head, sequence, begin, start, size, place = locate_chunk(bounds, heads, batch, chunks, BLOCKS, C)
    if size <= 0:
        return
    channel = block * BK
    row = tl.arange(0, C)
    k_at = token_at(k, k_strides, sequence, start, head // K_SHARE)
    beta_at = token_at(beta, beta_strides, sequence, start, head // BETA_SHARE)
    share = load_numbers(beta_at, beta_strides[1], size, C)[:, None]
    state_at = chunk_states + (place * K + channel) * V
    dstate_at = chunk_dstates + (place * K + channel) * V
    dk_tile = tl.zeros([C, BK], tl.float32)
    asked = tl.zeros([C, BK], tl.float32)
    dsystem = tl.zeros([C, C], tl.float32)
    kept = tl.zeros([BK], tl.float32)
    dshare = tl.zeros([C], tl.float32)
    for part in range(V_BLOCKS):
        column = part * BV
        state = load_tile(state_at, V, K - channel, column, BK, BV, V)
        dstate = load_tile(dstate_at, V, K - channel, column, BK, BV, V)
        u = load_tile(written_u + place * C * V, V, C, column, C, BV, V)
        dright = load_tile(dright_in + place * C * V, V, C, column, C, BV, V)
        dk_tile += product(u, tl.trans(dstate), DOT, PRECISION)
        asked += product(dright, tl.trans(state), DOT, PRECISION)
        dsystem -= product(dright, tl.trans(u), DOT, PRECISION)
        if WITH_GATE:
            kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
        if dbeta is not None:
            v_at = token_at(v, v_strides, sequence, start, head // V_SHARE)
            values = load_tile(v_at, v_strides[1], tl.where(block == 0, size, 0), column, C, BV, V)
            dshare += tl.sum(dright.to(tl.float32) * values.to(tl.float32), 1)
    constant = load_constant_decay(gate, gate_strides, head // GATE_SHARE, KIND)
    gate_at = token_at(gate, gate_strides, sequence, start, head // GATE_SHARE)
    decay = load_decay(constant, gate_at, gate_strides[1], size, channel, KIND, C, BK, K)
    reads, writes, total = chunk_decays(decay, size, KIND, C, PRECISION)
    reads, writes, keeps, seen = document_decays(
        reads, writes, tl.exp(total), row[:, None] >= row[None, :], ids, begin, start, size, C
    )
    if KIND == "vector":
        pairs = seen
        crossed = tl.zeros([C, BK], tl.float32)
    else:
        pairs = pair_decays(decay, seen, KIND, C)
        crossed = tl.zeros([C, C], tl.float32)
    dsystem = tl.where(seen & (row[:, None] > row[None, :]), dsystem, 0.0)
    keys = load_tile(k_at, k_strides[1], size, channel, C, BK, K)
    dk_tile *= writes
    asked *= reads
    if WITH_GATE:
        earlier = row[:, None] > row[None, :]
        # A number for each channel of a vector decay, else their sum.
        read = _by_channel(-share * keys.to(tl.float32) * asked, KIND)
        dgates = _sum_tokens(earlier, _by_channel(keys.to(tl.float32) * dk_tile, KIND), KIND, PRECISION)
        dgates += kept[None, :] * keeps[None, :] if KIND == "vector" else tl.sum(kept, 0) * keeps
    # L is pairs(diag(b) K, K): its rows have b in them, its columns not.
    weighted = share * keys.to(tl.float32)
    x, y, crossed = _pair_grads(dsystem, weighted, keys, decay, pairs, crossed, WITH_GATE, KIND, C, DOT, PRECISION)
    dk_tile += y + share * (x - asked)
    if dbeta is not None:
        dshare += tl.sum(keys.to(tl.float32) * (x - asked), 1)
        dbeta_at = token_at(dbeta, dbeta_strides, block * batch + sequence, start, head)
        tl.store(dbeta_at + row * dbeta_strides[1], dshare, mask=row < size)
    for reader in range(READERS):
        query = head * READERS + reader
        queries_at = token_at(q, q_strides, sequence, start, query // Q_SHARE)
        queries = load_tile(queries_at, q_strides[1], size, channel, C, BK, K)
        dq_tile = tl.zeros([C, BK], tl.float32)
        dscores = tl.zeros([C, C], tl.float32)
        do_at = token_at(dout, dout_strides, sequence, start, query)
        for part in range(V_BLOCKS):
            column = part * BV
            state = load_tile(state_at, V, K - channel, column, BK, BV, V)
            u = load_tile(written_u + place * C * V, V, C, column, C, BV, V)
            grads = load_tile(do_at, dout_strides[1], size, column, C, BV, V)
            dq_tile += product(grads, tl.trans(state), DOT, PRECISION)
            dscores += product(grads, tl.trans(u), DOT, PRECISION)
        dscores = tl.where(seen, dscores, 0.0)
        dq_tile *= reads
        if WITH_GATE:
            read += _by_channel(queries.to(tl.float32) * dq_tile, KIND)
        x, y, crossed = _pair_grads(dscores, queries, keys, decay, pairs, crossed, WITH_GATE, KIND, C, DOT, PRECISION)
        dk_tile += y
        dq_at = token_at(dq, dq_strides, sequence, start, query)
        store_tile(dq_at, dq_strides[1], size, channel, dq_tile + x, C, BK, K)
    dk_at = token_at(dk, dk_strides, sequence, start, head)
    store_tile(dk_at, dk_strides[1], size, channel, dk_tile, C, BK, K)
    if WITH_GATE:
        dgates += _sum_tokens(row[:, None] <= row[None, :], read, KIND, PRECISION)
        if KIND == "vector":
            dgate_at = token_at(dgate, dgate_strides, sequence, start, head)
            store_tile(dgate_at, dgate_strides[1], size, channel, dgates + crossed, C, BK, K)
        else:
            dgates += _crossing(crossed, C, PRECISION)
            dgate_at = token_at(dgate, dgate_strides, block * batch + sequence, start, head)
            tl.store(dgate_at + row * dgate_strides[1], dgates, mask=row < size)
