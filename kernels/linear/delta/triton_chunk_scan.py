"""Triton kernels of the delta rule that walk a segment chunk by chunk: forward with the state, back with its gradient.

A program has all of K and a block of V, in float32 registers. With the inverse M and the scores P of
`longctx.kernels.linear.delta.triton_prepare`:

    forward     U = M diag(b) (V - (reads K) S)            O  = P U + (reads Q) S
                S' = keeps S + (writes K)^T U
    back        dR = M^T (P^T dO + (writes K) dS')
                dS = keeps dS' + (reads Q)^T dO - (reads K)^T diag(b) dR

The transition of a segment is walked as K more channels of V, in further programs: they begin with the identity, are
written nothing and read nothing.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.delta.triton_prepare import chunk_place, document_decays, load_numbers
from longctx.kernels.linear.triton_chunk import (
    chunk_decays,
    load_constant_decay,
    load_decay,
    load_tile,
    locate,
    product,
    store_tile,
    token_at,
)


@triton.jit
def _identity(column, BK: tl.constexpr, BV: tl.constexpr):
    """Columns `column` on of the identity, `[BK, BV]`; zeros where they are negative."""
    return tl.where(tl.arange(0, BK)[:, None] == column + tl.arange(0, BV)[None, :], 1.0, 0.0)


@triton.jit
def _load_keys(
    k_at,
    k_stride,
    constant,
    gate_at,
    gate_stride,
    asking,
    writing,
    keeps_in,
    at,
    ids,
    begin,
    start,
    size,
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The keys of a chunk as they ask and as they write, `[C, BK]`, what is left to do of reads and writes (nothing,
    `[1, 1]`, where the decay is a vector), and keeps."""
    if KIND == "vector":
        asks = load_tile(asking + at * C * K, K, C, 0, C, BK, K)
        writes_in = load_tile(writing + at * C * K, K, C, 0, C, BK, K)
        channels = tl.arange(0, BK)
        keeps = tl.load(keeps_in + at * K + channels, mask=channels < K, other=0.0)
        reads = tl.full([1, 1], 1.0, tl.float32)
        writes = reads
    else:
        asks = load_tile(k_at, k_stride, size, 0, C, BK, K)
        writes_in = asks
        decay = load_decay(constant, gate_at, gate_stride, size, 0, KIND, C, BK, K)
        reads, writes, total = chunk_decays(decay, size, KIND, C, PRECISION)
        seen = tl.full([1, 1], True, tl.int1)
        reads, writes, keeps, _ = document_decays(reads, writes, tl.exp(total), seen, ids, begin, start, size, C)
    return asks, writes_in, reads, writes, keeps


@triton.jit
def _load_queries(
    q,
    q_strides,
    reading,
    at,
    sequence,
    start,
    size,
    head,
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    K: tl.constexpr,
):
    """The queries of a chunk `[C, BK]`, as they read where the decay is a vector."""
    if KIND == "vector":
        queries = load_tile(reading + at * C * K, K, C, 0, C, BK, K)
    else:
        queries = load_tile(token_at(q, q_strides, sequence, start, head), q_strides[1], size, 0, C, BK, K)
    return queries


@triton.jit
def _read(x, factor, state, KIND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """`(factor * x) state`, `[C, BV]` float32."""
    result = product(x, state, DOT, PRECISION)
    if KIND != "vector":
        result *= factor
    return result


@triton.jit
def _add(x, factor, y, KIND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """`(factor * x)^T y`, `[BK, BV]` float32."""
    if KIND != "vector":
        x = (x * factor).to(DOT)
    return product(tl.trans(x.to(DOT)), y, DOT, PRECISION)


@triton.jit
def forward_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
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
    keeps_in,
    states,
    out,
    out_strides,
    ends,
    transition,
    chunk_states,
    writes_out,
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
    """A segment in the order of its tokens, from `states` or, where these are not given, from zero.

    What is given is written: `ends`, the states behind the segments; `transition`, which takes programs of its own; out
    (then q and scores are read); and for each chunk the state before it in `chunk_states` `[places, K, V]` and U in
    `writes_out` `[places, C, V]`, for the backward pass.
    """
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    ALL_BLOCKS: tl.constexpr = V_BLOCKS + ((K + BV - 1) // BV if transition is not None else 0)
    head, sequence, segment, block, begin, end = locate(bounds, heads, batch, ALL_BLOCKS)
    column = block * BV
    place = ((segment * batch + sequence) * heads + head).to(tl.int64)
    if states is not None:
        state = load_tile(states + place * K * V, V, K, column, BK, BV, V)
    else:
        state = _identity(column - V_BLOCKS * BV, BK, BV)
    constant = load_constant_decay(gate, gate_strides, head // GATE_SHARE, KIND)
    for step in range((end - begin + C - 1) // C):
        start = begin + step * C
        size = tl.minimum(end - start, C)
        at = chunk_place(segment, step, sequence, head, heads, batch, chunks)
        v_at = token_at(v, v_strides, sequence, start, head // V_SHARE)
        values = load_tile(v_at, v_strides[1], tl.where(block < V_BLOCKS, size, 0), column, C, BV, V)
        beta_at = token_at(beta, beta_strides, sequence, start, head // BETA_SHARE)
        share = load_numbers(beta_at, beta_strides[1], size, C)
        gate_at = token_at(gate, gate_strides, sequence, start, head // GATE_SHARE)
        k_at = token_at(k, k_strides, sequence, start, head // K_SHARE)
        asks, writes_in, reads, writes, keeps = _load_keys(
            k_at, k_strides[1], constant, gate_at, gate_strides[1], asking, writing, keeps_in,
            at, ids, begin, start, size, KIND, C, BK, K, PRECISION,
        )  # fmt: skip
        left = values.to(tl.float32) - _read(asks, reads, state, KIND, DOT, PRECISION)
        solve = load_tile(inverse + at * C * C, C, C, 0, C, C, C)
        u = product(solve, left * share[:, None], DOT, PRECISION)
        if chunk_states is not None:
            store_tile(chunk_states + at * K * V, V, K, column, state, BK, BV, V)
            store_tile(writes_out + at * C * V, V, C, column, u, C, BV, V)
        if out is not None:
            for reader in range(READERS):
                query = head * READERS + reader
                queries = _load_queries(
                    q,
                    q_strides,
                    reading,
                    at * READERS + reader,
                    sequence,
                    start,
                    size,
                    query // Q_SHARE,
                    KIND,
                    C,
                    BK,
                    K,
                )
                weights = load_tile(scores + (at * READERS + reader) * C * C, C, C, 0, C, C, C)
                result = _read(queries, reads, state, KIND, DOT, PRECISION)
                result += product(weights, u, DOT, PRECISION)
                out_at = token_at(out, out_strides, sequence, start, query)
                store_tile(out_at, out_strides[1], size, column, result, C, BV, V)
        state = state * keeps[:, None] + _add(writes_in, writes, u, KIND, DOT, PRECISION)
    if ends is not None:
        store_tile(ends + place * K * V, V, tl.where(block < V_BLOCKS, K, 0), column, state, BK, BV, V)
    if transition is not None:
        rows = tl.where(block < V_BLOCKS, 0, K)
        store_tile(transition + place * K * K, K, rows, column - V_BLOCKS * BV, state, BK, BV, K)


@triton.jit
def backward_kernel(
    q,
    q_strides,
    k,
    k_strides,
    dout,
    dout_strides,
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
    keeps_in,
    dends,
    dstates,
    transition,
    chunk_dstates,
    dright_out,
    dv,
    dv_strides,
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
    """A segment against the order of its tokens, from `dends` or, where these are not given, from zero.

    Writes `dstates`, the gradients of the states before the segments, and, where given, `transition`, which takes
    programs of its own, or for each chunk the gradient of the state behind it in `chunk_dstates` `[places, K, V]`, dR
    in `dright_out` `[places, C, V]`, and dv, of the H heads of the states.
    """
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    ALL_BLOCKS: tl.constexpr = V_BLOCKS + ((K + BV - 1) // BV if transition is not None else 0)
    head, sequence, segment, block, begin, end = locate(bounds, heads, batch, ALL_BLOCKS)
    column = block * BV
    place = ((segment * batch + sequence) * heads + head).to(tl.int64)
    if dends is not None:
        dstate = load_tile(dends + place * K * V, V, K, column, BK, BV, V)
    else:
        dstate = _identity(column - V_BLOCKS * BV, BK, BV)
    constant = load_constant_decay(gate, gate_strides, head // GATE_SHARE, KIND)
    steps = (end - begin + C - 1) // C
    for done in range(steps):
        step = steps - 1 - done
        start = begin + step * C
        size = tl.minimum(end - start, C)
        at = chunk_place(segment, step, sequence, head, heads, batch, chunks)
        beta_at = token_at(beta, beta_strides, sequence, start, head // BETA_SHARE)
        share = load_numbers(beta_at, beta_strides[1], size, C)
        gate_at = token_at(gate, gate_strides, sequence, start, head // GATE_SHARE)
        k_at = token_at(k, k_strides, sequence, start, head // K_SHARE)
        asks, writes_in, reads, writes, keeps = _load_keys(
            k_at, k_strides[1], constant, gate_at, gate_strides[1], asking, writing, keeps_in,
            at, ids, begin, start, size, KIND, C, BK, K, PRECISION,
        )  # fmt: skip
        if chunk_dstates is not None:
            store_tile(chunk_dstates + at * K * V, V, K, column, dstate, BK, BV, V)
        du = _read(writes_in, writes, dstate, KIND, DOT, PRECISION)
        dstate *= keeps[:, None]
        for reader in range(READERS):
            query = head * READERS + reader
            queries = _load_queries(
                q, q_strides, reading, at * READERS + reader, sequence, start, size, query // Q_SHARE, KIND, C, BK, K
            )
            do_at = token_at(dout, dout_strides, sequence, start, query)
            grads = load_tile(do_at, dout_strides[1], tl.where(block < V_BLOCKS, size, 0), column, C, BV, V)
            weights = load_tile(scores + (at * READERS + reader) * C * C, C, C, 0, C, C, C)
            du += product(tl.trans(weights), grads, DOT, PRECISION)
            dstate += _add(queries, reads, grads, KIND, DOT, PRECISION)
        solve = load_tile(inverse + at * C * C, C, C, 0, C, C, C)
        dright = product(tl.trans(solve), du, DOT, PRECISION)
        dvalues = dright * share[:, None]
        if dv is not None:
            store_tile(dright_out + at * C * V, V, C, column, dright, C, BV, V)
            dv_at = token_at(dv, dv_strides, sequence, start, head)
            store_tile(dv_at, dv_strides[1], size, column, dvalues, C, BV, V)
        dstate -= _add(asks, reads, dvalues, KIND, DOT, PRECISION)
    store_tile(dstates + place * K * V, V, tl.where(block < V_BLOCKS, K, 0), column, dstate, BK, BV, V)
    if transition is not None:
        rows = tl.where(block < V_BLOCKS, 0, K)
        store_tile(transition + place * K * K, K, rows, column - V_BLOCKS * BV, dstate, BK, BV, K)
