"""Inter-chunk scan of the delta rule in Triton: forward over states, and in reverse over their gradients.

A program has all of K and a block of V of the state, in float32 registers. With the inverse M and the scores P of
`longctx.kernels.linear.delta.triton_prepare`:

    forward     U = M diag(b) (V - (reads K) S)            O  = P U + (reads Q) S
                S' = keeps S + (writes K)^T U
    backward    dR = M^T (P^T dO + (writes K) dS')
                dS = keeps dS' + (reads Q)^T dO - (reads K)^T diag(b) dR

The transition of a segment is computed as K more value channels, in programs of their own, which start from the
identity, have zero values and write no outputs.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.delta.triton_prepare import chunk_slot, document_decays, load_per_token
from longctx.kernels.linear.triton_chunk import (
    chunk_decays,
    load_constant_decay,
    load_decay,
    load_tile,
    locate_program,
    product,
    store_tile,
    token_at,
)


@triton.jit
def _identity(column, BK: tl.constexpr, BV: tl.constexpr):
    """Return columns of the identity from `column` on, `[BK, BV]`; zeros for negative columns."""
    return tl.where(tl.arange(0, BK)[:, None] == column + tl.arange(0, BV)[None, :], 1.0, 0.0)


@triton.jit
def _load_keys(
    k_at,
    k_stride,
    constant,
    gate_at,
    gate_stride,
    decayed_k,
    written_k,
    keeps_in,
    slot,
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
    """Load a chunk's keys and decays: keys that read and keys that write the state, `[C, BK]`, reads, writes, keeps.

    Keys of vector decays are decayed already, and reads and writes are then ones `[1, 1]`.
    """
    if KIND == "vector":
        read_keys = load_tile(decayed_k + slot * C * K, K, C, 0, C, BK, K)
        write_keys = load_tile(written_k + slot * C * K, K, C, 0, C, BK, K)
        channels = tl.arange(0, BK)
        keeps = tl.load(keeps_in + slot * K + channels, mask=channels < K, other=0.0)
        reads = tl.full([1, 1], 1.0, tl.float32)
        writes = reads
    else:
        read_keys = load_tile(k_at, k_stride, size, 0, C, BK, K)
        write_keys = read_keys
        decay = load_decay(constant, gate_at, gate_stride, size, 0, KIND, C, BK, K)
        reads, writes, total = chunk_decays(decay, size, KIND, C, PRECISION)
        visible = tl.full([1, 1], True, tl.int1)
        reads, writes, keeps, _ = document_decays(reads, writes, tl.exp(total), visible, ids, begin, start, size, C)
    return read_keys, write_keys, reads, writes, keeps


@triton.jit
def _load_queries(
    q,
    q_strides,
    decayed_q,
    slot,
    sequence,
    start,
    size,
    head,
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    K: tl.constexpr,
):
    """Load a chunk's queries, `[C, BK]`; for vector decays those that are decayed already."""
    if KIND == "vector":
        queries = load_tile(decayed_q + slot * C * K, K, C, 0, C, BK, K)
    else:
        queries = load_tile(token_at(q, q_strides, sequence, start, head), q_strides[1], size, 0, C, BK, K)
    return queries


@triton.jit
def _read_state(x, factor, state, KIND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Compute `(factor * x) state`, `[C, BV]` float32; x of vector decays is decayed already."""
    result = product(x, state, DOT, PRECISION)
    if KIND != "vector":
        result *= factor
    return result


@triton.jit
def _outer(x, factor, y, KIND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Compute `(factor * x)^T y`, `[BK, BV]` float32; x of vector decays is decayed already."""
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
    decayed_k,
    written_k,
    decayed_q,
    keeps_in,
    states,
    out,
    out_strides,
    ends,
    transition,
    chunk_states,
    u_out,
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
    """Scan a segment's chunks forward, from `states`, or from zero where these are None.

    Writes those that are not None: `ends`, the end states; `transition`, in programs of its own; `out`, for which it
    reads q and scores; and for the backward pass, per chunk, the state before it in `chunk_states` `[slots, K, V]` and
    U in `u_out` `[slots, C, V]`.
    """
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    ALL_BLOCKS: tl.constexpr = V_BLOCKS + ((K + BV - 1) // BV if transition is not None else 0)
    head, sequence, segment, block, begin, end = locate_program(bounds, heads, batch, ALL_BLOCKS)
    column = block * BV
    state_index = ((segment * batch + sequence) * heads + head).to(tl.int64)
    if states is not None:
        state = load_tile(states + state_index * K * V, V, K, column, BK, BV, V)
    else:
        state = _identity(column - V_BLOCKS * BV, BK, BV)
    constant = load_constant_decay(gate, gate_strides, head // GATE_GROUP, KIND)
    for step in range((end - begin + C - 1) // C):
        start = begin + step * C
        size = tl.minimum(end - start, C)
        slot = chunk_slot(segment, step, sequence, head, heads, batch, chunks)
        v_at = token_at(v, v_strides, sequence, start, head // V_GROUP)
        values = load_tile(v_at, v_strides[1], tl.where(block < V_BLOCKS, size, 0), column, C, BV, V)
        beta_at = token_at(beta, beta_strides, sequence, start, head // BETA_GROUP)
        betas = load_per_token(beta_at, beta_strides[1], size, C)
        gate_at = token_at(gate, gate_strides, sequence, start, head // GATE_GROUP)
        k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
        read_keys, write_keys, reads, writes, keeps = _load_keys(
            k_at, k_strides[1], constant, gate_at, gate_strides[1], decayed_k, written_k, keeps_in,
            slot, ids, begin, start, size, KIND, C, BK, K, PRECISION,
        )  # fmt: skip
        residual = values.to(tl.float32) - _read_state(read_keys, reads, state, KIND, DOT, PRECISION)
        inverse_tile = load_tile(inverse + slot * C * C, C, C, 0, C, C, C)
        u = product(inverse_tile, residual * betas[:, None], DOT, PRECISION)
        if chunk_states is not None:
            store_tile(chunk_states + slot * K * V, V, K, column, state, BK, BV, V)
            store_tile(u_out + slot * C * V, V, C, column, u, C, BV, V)
        if out is not None:
            for reader in range(READERS):
                query = head * READERS + reader
                queries = _load_queries(
                    q,
                    q_strides,
                    decayed_q,
                    slot * READERS + reader,
                    sequence,
                    start,
                    size,
                    query // Q_GROUP,
                    KIND,
                    C,
                    BK,
                    K,
                )
                score_tile = load_tile(scores + (slot * READERS + reader) * C * C, C, C, 0, C, C, C)
                result = _read_state(queries, reads, state, KIND, DOT, PRECISION)
                result += product(score_tile, u, DOT, PRECISION)
                out_at = token_at(out, out_strides, sequence, start, query)
                store_tile(out_at, out_strides[1], size, column, result, C, BV, V)
        state = state * keeps[:, None] + _outer(write_keys, writes, u, KIND, DOT, PRECISION)
    if ends is not None:
        store_tile(ends + state_index * K * V, V, tl.where(block < V_BLOCKS, K, 0), column, state, BK, BV, V)
    if transition is not None:
        rows = tl.where(block < V_BLOCKS, 0, K)
        store_tile(transition + state_index * K * K, K, rows, column - V_BLOCKS * BV, state, BK, BV, K)


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
    decayed_k,
    written_k,
    decayed_q,
    keeps_in,
    dends,
    dstates,
    transition,
    chunk_dstates,
    drhs_out,
    dv,
    dv_strides,
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
    """Scan a segment's chunks in reverse, from `dends`, or from zero where these are None.

    Writes `dstates`, the gradients of the start states. Where not None, also `transition`, in programs of its own, or
    per chunk the gradient of the state after it in `chunk_dstates` `[slots, K, V]`, dR in `drhs_out` `[slots, C, V]`,
    and dv per state head.
    """
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    ALL_BLOCKS: tl.constexpr = V_BLOCKS + ((K + BV - 1) // BV if transition is not None else 0)
    head, sequence, segment, block, begin, end = locate_program(bounds, heads, batch, ALL_BLOCKS)
    column = block * BV
    state_index = ((segment * batch + sequence) * heads + head).to(tl.int64)
    if dends is not None:
        dstate = load_tile(dends + state_index * K * V, V, K, column, BK, BV, V)
    else:
        dstate = _identity(column - V_BLOCKS * BV, BK, BV)
    constant = load_constant_decay(gate, gate_strides, head // GATE_GROUP, KIND)
    steps = (end - begin + C - 1) // C
    for index in range(steps):
        step = steps - 1 - index
        start = begin + step * C
        size = tl.minimum(end - start, C)
        slot = chunk_slot(segment, step, sequence, head, heads, batch, chunks)
        beta_at = token_at(beta, beta_strides, sequence, start, head // BETA_GROUP)
        betas = load_per_token(beta_at, beta_strides[1], size, C)
        gate_at = token_at(gate, gate_strides, sequence, start, head // GATE_GROUP)
        k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
        read_keys, write_keys, reads, writes, keeps = _load_keys(
            k_at, k_strides[1], constant, gate_at, gate_strides[1], decayed_k, written_k, keeps_in,
            slot, ids, begin, start, size, KIND, C, BK, K, PRECISION,
        )  # fmt: skip
        if chunk_dstates is not None:
            store_tile(chunk_dstates + slot * K * V, V, K, column, dstate, BK, BV, V)
        du = _read_state(write_keys, writes, dstate, KIND, DOT, PRECISION)
        dstate *= keeps[:, None]
        for reader in range(READERS):
            query = head * READERS + reader
            queries = _load_queries(
                q,
                q_strides,
                decayed_q,
                slot * READERS + reader,
                sequence,
                start,
                size,
                query // Q_GROUP,
                KIND,
                C,
                BK,
                K,
            )
            do_at = token_at(dout, dout_strides, sequence, start, query)
            do = load_tile(do_at, dout_strides[1], tl.where(block < V_BLOCKS, size, 0), column, C, BV, V)
            score_tile = load_tile(scores + (slot * READERS + reader) * C * C, C, C, 0, C, C, C)
            du += product(tl.trans(score_tile), do, DOT, PRECISION)
            dstate += _outer(queries, reads, do, KIND, DOT, PRECISION)
        inverse_tile = load_tile(inverse + slot * C * C, C, C, 0, C, C, C)
        drhs = product(tl.trans(inverse_tile), du, DOT, PRECISION)
        dvalues = drhs * betas[:, None]
        if dv is not None:
            store_tile(drhs_out + slot * C * V, V, C, column, drhs, C, BV, V)
            dv_at = token_at(dv, dv_strides, sequence, start, head)
            store_tile(dv_at, dv_strides[1], size, column, dvalues, C, BV, V)
        dstate -= _outer(read_keys, reads, dvalues, KIND, DOT, PRECISION)
    store_tile(dstates + state_index * K * V, V, tl.where(block < V_BLOCKS, K, 0), column, dstate, BK, BV, V)
    if transition is not None:
        rows = tl.where(block < V_BLOCKS, 0, K)
        store_tile(transition + state_index * K * K, K, rows, column - V_BLOCKS * BV, dstate, BK, BV, K)
