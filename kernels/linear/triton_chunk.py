"""Pieces of the Triton kernels of decayed linear recurrences: tiles, decays inside a chunk, documents.

A chunk is C tokens, of which the first `size` are there. Decays are logarithms in float32, 0 in the rows that are not
there, of one of three kinds: "constant" `[1]` (the head's, the same for all tokens), "scalar" `[C]` (a number per
token) and "vector" `[C, BK]` (a number per token and channel of K). A chunk acts through

    reads    exp(g_0 + .. + g_i)            how token i sees the state that enters the chunk
    writes   exp(g_(j+1) + .. + g_(C-1))    how the state that leaves it sees token j
    keeps    exp(g_0 + .. + g_(C-1))        how the one sees the other
    pairs    exp(g_(j+1) + .. + g_i)        how token i sees token j <= i

Every exponent is a sum of logarithms, none the rounded difference of two long sums, so that a pair of neighbours behind
a decay of exp(-1000) is as exact as any other, and nothing can overflow.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def halvings(size):
    """How often a chunk can be halved."""
    return size.bit_length() - 1


@triton.jit
def token_at(tensor, strides, batch, token, head):
    """The address of a token's first channel: `tensor [B, T, H, D]` with strides of B, T and H."""
    return tensor + batch.to(tl.int64) * strides[0] + token.to(tl.int64) * strides[1] + head * strides[2]


@triton.jit
def _cells(at, stride, size, channel, ROWS: tl.constexpr, COLS: tl.constexpr, LIMIT: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    cols = channel + tl.arange(0, COLS)[None, :]
    cells = at + rows * stride + cols
    there = rows < size if LIMIT % COLS == 0 else (rows < size) & (cols < LIMIT)
    return cells, there


@triton.jit
def load_tile(at, stride, size, channel, ROWS: tl.constexpr, COLS: tl.constexpr, LIMIT: tl.constexpr):
    """`[ROWS, COLS]` from row `at` and channel `channel` on, 0 behind row `size` and behind channel LIMIT."""
    cells, there = _cells(at, stride, size, channel, ROWS, COLS, LIMIT)
    return tl.load(cells, mask=there, other=0.0)


@triton.jit
def store_tile(at, stride, size, channel, tile, ROWS: tl.constexpr, COLS: tl.constexpr, LIMIT: tl.constexpr):
    """The inverse of `load_tile`, in the dtype of the memory."""
    cells, there = _cells(at, stride, size, channel, ROWS, COLS, LIMIT)
    tl.store(cells, tile.to(at.dtype.element_ty), mask=there)


@triton.jit
def load_constant_decay(gate, strides, head, KIND: tl.constexpr):
    """What a program needs of the decay before its first chunk: the head's logarithm `[1]`, float32, if constant."""
    if KIND == "constant":
        decay = _least(tl.load(gate + head * strides[2] + tl.arange(0, 1)))
    else:
        decay = tl.zeros([1], tl.float32)
    return decay


@triton.jit
def load_decay(
    constant, at, stride, size, channel, KIND: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, K: tl.constexpr
):
    """A chunk's logarithms in float32: `[1]`, `[C]` or `[C, BK]` by the kind of decay, 0 behind row `size`."""
    if KIND == "constant":
        decay = constant
    elif KIND == "scalar":
        row = tl.arange(0, C)
        decay = _least(tl.load(at + row * stride, mask=row < size, other=0.0))
    else:
        decay = _least(load_tile(at, stride, size, channel, C, BK, K))
    return decay


@triton.jit
def _least(decay):
    """exp(-128) is 0 in float32 already: nothing lower makes a difference, and sums stay small."""
    return tl.maximum(decay.to(tl.float32), -128.0)


@triton.jit
def sum_tokens(chosen, tile, PRECISION: tl.constexpr):
    """`[C, C]` bool times `[C, D]` float32: for each row the sum of the tokens that it chooses, to float32's accuracy.

    In two tf32 parts where float32 products go to the tensor cores; 0 and 1 are exact in either.
    """
    SUMS: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32x3"
    return tl.dot(chosen.to(tl.float32), tile, input_precision=SUMS)


@triton.jit
def chunk_decays(decay, size, KIND: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """reads and writes, `[C, 1]` or `[C, BK]`, and the logarithm of keeps, `[1]` or `[BK]`."""
    row = tl.arange(0, C)
    if KIND == "constant":
        reads = (decay * (row + 1))[:, None]
        writes = (decay * tl.maximum(size - 1 - row, 0))[:, None]
        total = decay * size
    elif KIND == "scalar":
        wide = decay.to(tl.float64)
        sums = tl.cumsum(wide, 0)
        all_tokens = tl.sum(wide, 0)
        reads = sums.to(tl.float32)[:, None]
        writes = (all_tokens - sums).to(tl.float32)[:, None]
        total = tl.zeros([1], tl.float32) + all_tokens.to(tl.float32)
    else:
        reads = sum_tokens(row[:, None] >= row[None, :], decay, PRECISION)
        writes = sum_tokens(row[:, None] < row[None, :], decay, PRECISION)
        total = tl.sum(decay, 0)
    return tl.exp(reads), tl.exp(writes), total


@triton.jit
def pair_decays(decay, seen, KIND: tl.constexpr, C: tl.constexpr):
    """pairs `[C, C]` of constant and scalar decays, 0 where token j is not seen.

    The sums of a scalar decay are split into whole numbers, whose differences are exact, and a rest below 1.
    """
    row = tl.arange(0, C)
    if KIND == "constant":
        exponent = decay[:, None] * (row[:, None] - row[None, :])
    else:
        sums = tl.cumsum(decay.to(tl.float64), 0)
        whole = sums.to(tl.int32)
        rest = (sums - whole).to(tl.float32)
        exponent = (whole[:, None] - whole[None, :]).to(tl.float32) + (rest[:, None] - rest[None, :])
    return tl.exp(tl.where(seen, exponent, float("-inf")))


@triton.jit
def half_decays(decay, level, C: tl.constexpr, PRECISION: tl.constexpr):
    """The pairs of a vector decay whose tokens meet in blocks of `2^(level + 1)`: j in the first half of one, i in the
    second.

    The decay between them is a product of two factors of at most 1, that of i back to the second half's first token and
    that of j on to the first half's last. Returns both as one `[C, BK]`, each token's own; which pairs `[C, C]` they
    are for; and which tokens' decays, the columns, lie between a token, the row, and the middle of its block. Levels 0
    to `halvings(C) - 1` together give every pair i > j once.
    """
    row = tl.arange(0, C)
    i, j = row[:, None], row[None, :]
    middle = (i >> (level + 1) << (level + 1)) + (1 << level)
    met = (i >= middle) & (j < middle) & (j >= middle - (1 << level))
    between = ((j >= middle) & (j <= i)) | ((j > i) & (j < middle))
    return tl.exp(sum_tokens(between, decay, PRECISION)), met, between


@triton.jit
def product(x, y, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """`x y` in the dtype DOT, summed in float32."""
    return tl.dot(x.to(DOT), y.to(DOT), input_precision=PRECISION)


@triton.jit
def read_state(x, factor, state, KIND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """`(factor * x) state`: `[C, BK]` times `[BK, BV]`. A factor per token is applied in float32, after the product."""
    if KIND == "vector":
        result = product(x * factor, state, DOT, PRECISION)
    else:
        result = product(x, state, DOT, PRECISION) * factor
    return result


@triton.jit
def outer(x, factor, y, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """`(factor * x)^T y`: what a chunk adds to the state, `[BK, BV]`."""
    return product(tl.trans((x * factor).to(DOT)), y, DOT, PRECISION)


@triton.jit
def _met_scores(q, k, decay, seen, level, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The scores of the pairs that meet at a level of a vector decay, else 0."""
    factor, met, _ = half_decays(decay, level, C, PRECISION)
    return tl.where(met & seen, product(q * factor, tl.trans((k * factor).to(DOT)), DOT, PRECISION), 0.0)


@triton.jit
def weighted_scores(
    q,
    k,
    decay,
    seen,
    UNROLLED: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`q_i . (pairs_ij * k_j)` where `seen`, else 0: `[C, C]` float32.

    UNROLLED: the levels of a vector decay side by side, which takes the registers of all of them: fewer than a loop's
    at 16 tokens, many more from 32 on.
    """
    if KIND == "vector":
        row = tl.arange(0, C)
        own = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        scores = tl.where(row[:, None] == row[None, :], own[:, None], 0.0)
        if UNROLLED:
            for level in tl.static_range(halvings(C)):
                scores += _met_scores(q, k, decay, seen, level, C, DOT, PRECISION)
        else:
            for level in range(halvings(C)):
                scores += _met_scores(q, k, decay, seen, level, C, DOT, PRECISION)
    else:
        scores = product(q, tl.trans(k), DOT, PRECISION) * pair_decays(decay, seen, KIND, C)
    return scores


@triton.jit
def load_documents(ids, begin, start, size, C: tl.constexpr):
    """Of a chunk from token `start` on, in a segment from `begin` on: its tokens' documents, and those of the token
    before it (0 where the segment begins) and of its last token."""
    row = tl.arange(0, C)
    own = tl.load(ids + start + row, mask=row < size, other=-1)
    before = tl.load(ids + start - 1, mask=start > begin, other=0)
    last = tl.load(ids + start + size - 1)
    return own, before, last


@triton.jit
def locate(bounds, heads, batch, BLOCKS: tl.constexpr):
    """This program's part of the work: head, batch, segment, block, and where the segment begins and ends."""
    program = tl.program_id(0)
    block = program % BLOCKS
    rest = program // BLOCKS
    head = rest % heads
    rest = rest // heads
    segment = rest // batch
    begin = tl.load(bounds + 2 * segment)
    end = tl.load(bounds + 2 * segment + 1)
    return head, rest % batch, segment, block, begin, end
