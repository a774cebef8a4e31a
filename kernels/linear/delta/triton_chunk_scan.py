"""Inter-chunk scan of the delta rule in Triton: forward over states, and in reverse over their gradients.

A program has all of K and a block of V of the state, in float32 registers. With the inverse N and the scores P of
`longctx.kernels.linear.delta.triton_prepare`, which contain beta, b:

    forward     Z  = N (V - (reads K) S)                O  = P Z + (reads Q) S
                S' = keeps S + (writes diag(b) K)^T Z
    backward    dV = N^T (P^T dO + (writes diag(b) K) dS')
                dS = keeps dS' + (reads Q)^T dO - (reads K)^T dV

All tiles of V are transposed, `[BV, BK]` and `[BV, C]`: the left factor of a product is then in registers, where the
state and Z are, and the right one as it lies in memory. Factors per token multiply products, not keys and queries,
which so pass from memory to the tensor cores.

The transition of a segment is computed as K more value channels, in programs of their own, which start from the
identity, have zero values and write no outputs.
"""

import triton
import triton.language as tl

from longctx.kernels.linear.delta.triton_prepare import BETA_WRITES, READS, load_factor, load_keeps
from longctx.kernels.linear.triton_chunk import chunk_slot, load_tile, locate_program, product, store_tile, token_at


@triton.jit
def _identity(row, BK: tl.constexpr, BV: tl.constexpr):
    """Return rows of the identity from `row` on, `[BV, BK]`; zeros for negative rows."""
    return tl.where(row + tl.arange(0, BV)[:, None] == tl.arange(0, BK)[None, :], 1.0, 0.0)


@triton.jit
def _walk(walks, segment, begin, end, C: tl.constexpr):
    """Return a segment's chunks to scan, the first one and the one after the last: `walks` `[N, 2]`, or all."""
    first = begin - begin
    last = (end - begin + C - 1) // C
    if walks is not None:
        first = tl.load(walks + 2 * segment)
        last = tl.load(walks + 2 * segment + 1)
    return first, last


@triton.jit
def _load_keys(
    k_at,
    k_stride,
    decayed_k,
    written_k,
    keeps_in,
    factors,
    slot,
    size,
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    K: tl.constexpr,
):
    """Load a chunk's keys that read and that write the state, `[C, BK]`, and keeps; vector decays decay these keys."""
    if KIND == "vector":
        read_keys = load_tile(decayed_k + slot * C * K, K, C, 0, C, BK, K)
        write_keys = load_tile(written_k + slot * C * K, K, C, 0, C, BK, K)
        channels = tl.arange(0, BK)
        keeps = tl.load(keeps_in + slot * K + channels, mask=channels < K, other=0.0)
    else:
        read_keys = load_tile(k_at, k_stride, size, 0, C, BK, K)
        write_keys = read_keys
        keeps = load_keeps(factors, slot, size, C)
    return read_keys, write_keys, keeps


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
def _scaled(tile, factors, slot, FACTOR: tl.constexpr, KIND: tl.constexpr, C: tl.constexpr):
    """Compute a tile `[BV, C]` times READS or BETA_WRITES of its tokens, in float32; the tile itself for vector decays.

    Loads the factors where they are used: a thread holds many of them, and registers are what is scarce.
    """
    if KIND != "vector":
        tile = tile.to(tl.float32) * load_factor(factors, slot, FACTOR, C)[None, :]
    return tile


@triton.jit
def _read(state, queries, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Compute `state queries^T`, `[BV, C]` float32."""
    if PRECISION == "ieee":
        # The other way round than the product with keys: the compiler would keep the state's operand of both.
        result = tl.trans(product(queries, tl.trans(state), DOT, PRECISION))
    else:
        result = product(state, tl.trans(queries), DOT, PRECISION)
    return result


@triton.jit
def forward_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    bounds,
    walks,
    inverse,
    scores,
    factors,
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
    z_out,
    chunks,
    heads,
    batch,
    K: tl.constexpr,
    V: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    READERS: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scan a segment's chunks, or those of `walks`, forward, from `states`, or from zero where these are None.

    Writes those that are not None: `ends`, the end states; `transition`, in programs of its own; `out`, for which it
    reads q and scores; and for the backward pass, per chunk, the state before it in `chunk_states` `[slots, V, K]` and
    Z in `z_out` `[slots, V, C]`.
    """
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    ALL_BLOCKS: tl.constexpr = V_BLOCKS + ((K + BV - 1) // BV if transition is not None else 0)
    head, sequence, segment, block, begin, end = locate_program(bounds, heads, batch, ALL_BLOCKS)
    column = block * BV
    state_index = ((segment * batch + sequence) * heads + head).to(tl.int64)
    if states is not None:
        state = tl.trans(load_tile(states + state_index * K * V, V, K, column, BK, BV, V))
    else:
        state = _identity(column - V_BLOCKS * BV, BK, BV)
    first, last = _walk(walks, segment, begin, end, C)
    for step in range(first, last):
        start = begin + step * C
        size = tl.minimum(end - start, C)
        slot = chunk_slot(segment, step, sequence, head, heads, batch, chunks)
        k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
        read_keys, write_keys, keeps = _load_keys(
            k_at, k_strides[1], decayed_k, written_k, keeps_in, factors, slot, size, KIND, C, BK, K
        )
        rows = size if transition is None else tl.where(block < V_BLOCKS, size, 0)
        v_at = token_at(v, v_strides, sequence, start, head // V_GROUP)
        values = tl.trans(load_tile(v_at, v_strides[1], rows, column, C, BV, V))
        read = _scaled(product(state, tl.trans(read_keys), DOT, PRECISION), factors, slot, READS, KIND, C)
        inverse_tile = load_tile(inverse + slot * C * C, C, C, 0, C, C, C)
        if tl.float32 == DOT:
            z = product(values.to(tl.float32) - read, tl.trans(inverse_tile), DOT, PRECISION)
        else:
            # Two products, so that values go from memory to the tensor cores without passing through registers.
            z = product(values, tl.trans(inverse_tile), DOT, PRECISION)
            z += product(-read, tl.trans(inverse_tile), DOT, PRECISION)
        if chunk_states is not None:
            store_tile(chunk_states + (slot * V + column) * K, K, V - column, 0, state, BV, BK, K)
            store_tile(z_out + (slot * V + column) * C, C, V - column, 0, z, BV, C, C)
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
                result = _scaled(_read(state, queries, DOT, PRECISION), factors, slot, READS, KIND, C)
                result += product(z, tl.trans(score_tile), DOT, PRECISION)
                out_at = token_at(out, out_strides, sequence, start, query)
                store_tile(out_at, out_strides[1], size, column, tl.trans(result), C, BV, V)
        state = state * keeps[None, :] + product(
            _scaled(z, factors, slot, BETA_WRITES, KIND, C), write_keys, DOT, PRECISION
        )
    state = tl.trans(state)
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
    bounds,
    walks,
    inverse,
    scores,
    factors,
    decayed_k,
    written_k,
    decayed_q,
    keeps_in,
    dends,
    dstates,
    transition,
    chunk_dstates,
    dv,
    dv_strides,
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
    """Scan a segment's chunks, or those of `walks`, in reverse, from `dends`, or from zero where these are None.

    Writes `dstates`, the gradients of the start states. Where not None, also `transition`, in programs of its own, or
    per chunk the gradient of the state after it in `chunk_dstates` `[slots, V, K]`, and dv per state head.
    """
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    ALL_BLOCKS: tl.constexpr = V_BLOCKS + ((K + BV - 1) // BV if transition is not None else 0)
    head, sequence, segment, block, begin, end = locate_program(bounds, heads, batch, ALL_BLOCKS)
    column = block * BV
    state_index = ((segment * batch + sequence) * heads + head).to(tl.int64)
    if dends is not None:
        dstate = tl.trans(load_tile(dends + state_index * K * V, V, K, column, BK, BV, V))
    else:
        dstate = _identity(column - V_BLOCKS * BV, BK, BV)
    first, last = _walk(walks, segment, begin, end, C)
    for index in range(last - first):
        step = last - 1 - index
        start = begin + step * C
        size = tl.minimum(end - start, C)
        slot = chunk_slot(segment, step, sequence, head, heads, batch, chunks)
        k_at = token_at(k, k_strides, sequence, start, head // K_GROUP)
        read_keys, write_keys, keeps = _load_keys(
            k_at, k_strides[1], decayed_k, written_k, keeps_in, factors, slot, size, KIND, C, BK, K
        )  # fmt: skip
        if chunk_dstates is not None:
            store_tile(chunk_dstates + (slot * V + column) * K, K, V - column, 0, dstate, BV, BK, K)
        dz = _scaled(product(dstate, tl.trans(write_keys), DOT, PRECISION), factors, slot, BETA_WRITES, KIND, C)
        dstate *= keeps[None, :]
        rows = size if transition is None else tl.where(block < V_BLOCKS, size, 0)
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
            do = tl.trans(load_tile(do_at, dout_strides[1], rows, column, C, BV, V))
            score_tile = load_tile(scores + (slot * READERS + reader) * C * C, C, C, 0, C, C, C)
            dz += product(do, score_tile, DOT, PRECISION)
            dstate += product(_scaled(do, factors, slot, READS, KIND, C), queries, DOT, PRECISION)
        inverse_tile = load_tile(inverse + slot * C * C, C, C, 0, C, C, C)
        dvalues = product(dz, inverse_tile, DOT, PRECISION)
        if dv is not None:
            dv_at = token_at(dv, dv_strides, sequence, start, head)
            store_tile(dv_at, dv_strides[1], size, column, tl.trans(dvalues), C, BV, V)
        dstate += product(-_scaled(dvalues, factors, slot, READS, KIND, C), read_keys, DOT, PRECISION)
    dstate = tl.trans(dstate)
    store_tile(dstates + state_index * K * V, V, tl.where(block < V_BLOCKS, K, 0), column, dstate, BK, BV, V)
    if transition is not None:
        rows = tl.where(block < V_BLOCKS, 0, K)
        store_tile(transition + state_index * K * K, K, rows, column - V_BLOCKS * BV, dstate, BK, BV, K)
