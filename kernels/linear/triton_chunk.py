"""Triton functions of the chunkwise linear recurrences: tiles, intra-chunk decays, documents.

A chunk is C rows, of which the first `size` are tokens. Log-decays g are float32, 0 in the rows after them: "constant"
`[1]` (one per head) or "scalar" `[C]` (one per token); those of vector decays are in `triton_pairs`. The decay factors
of a chunk, as in `longctx.kernels.linear.decay`:

    reads    exp(g_0 + .. + g_i)            from the chunk's start state to token i
    writes   exp(g_(j+1) + .. + g_(C-1))    from token j to the chunk's end state
    keeps    exp(g_0 + .. + g_(C-1))        from the start state to the end state
    pairs    exp(g_(j+1) + .. + g_i)        from token j to token i >= j

Every exponent is a sum of log-decays, never the rounded difference of two long sums: pairs of tokens after a decay of
exp(-1000) are as exact as any other, and nothing overflows.
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.constexpr_function
def halvings(size):
    """Return how often a chunk of a power-of-two size can be halved."""
    return size.bit_length() - 1


@triton.jit
def token_at(tensor, strides, batch, token, head):
    """Return the pointer to a token's first channel in `tensor [B, T, H, D]`, given the strides of B, T and H.

    All offsets are int64: with heads before tokens in memory, a head's own exceeds an int32 too.
    """
    at = tensor + batch.to(tl.int64) * strides[0] + token.to(tl.int64) * strides[1]
    return at + head.to(tl.int64) * strides[2]


@triton.jit
def _tile_pointers(at, stride, size, channel, ROWS: tl.constexpr, COLS: tl.constexpr, LIMIT: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    cols = channel + tl.arange(0, COLS)[None, :]
    pointers = at + rows * stride + cols
    mask = rows < size if LIMIT % COLS == 0 else (rows < size) & (cols < LIMIT)
    return pointers, mask


@triton.jit
def load_tile(at, stride, size, channel, ROWS: tl.constexpr, COLS: tl.constexpr, LIMIT: tl.constexpr):
    """Load a tile `[ROWS, COLS]` from pointer `at` and column `channel` on; 0 from row `size` and column LIMIT on."""
    pointers, mask = _tile_pointers(at, stride, size, channel, ROWS, COLS, LIMIT)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(at, stride, size, channel, tile, ROWS: tl.constexpr, COLS: tl.constexpr, LIMIT: tl.constexpr):
    """Store a tile, cast to the dtype of the memory; arguments as in `load_tile`."""
    pointers, mask = _tile_pointers(at, stride, size, channel, ROWS, COLS, LIMIT)
    tl.store(pointers, tile.to(at.dtype.element_ty), mask=mask)


@triton.jit
def load_constant_decay(gate, strides, head, KIND: tl.constexpr):
    """Load a head's constant log-decay, `[1]` float32, once per program; 0 for other kinds."""
    if KIND == "constant":
        decay = clamp_decay(tl.load(gate + head.to(tl.int64) * strides[2] + tl.arange(0, 1)))
    else:
        decay = tl.zeros([1], tl.float32)
    return decay


@triton.jit
def load_decay(constant, at, stride, size, KIND: tl.constexpr, C: tl.constexpr):
    """Load a chunk's log-decays in float32: `[1]` or `[C]` by the kind of decay, 0 from row `size` on."""
    if KIND == "constant":
        decay = constant
    else:
        row = tl.arange(0, C)
        decay = clamp_decay(tl.load(at + row * stride, mask=row < size, other=0.0))
    return decay


@triton.jit
def clamp_decay(decay):
    """Clamp log-decays to at least -128: exp(-128) is 0 in float32 already, and sums stay small."""
    return tl.maximum(decay.to(tl.float32), -128.0)


@triton.jit
def sum_tokens(mask, tile, PRECISION: tl.constexpr):
    """Compute `[C, C]` bool times `[C, D]` float32, sums over masked tokens, to float32's accuracy.

    As a product of tf32 parts (tf32x3) where float32 products use tensor cores; 0 and 1 are exact in tf32.
    """
    INPUT_PRECISION: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32x3"
    return tl.dot(mask.to(tl.float32), tile, input_precision=INPUT_PRECISION)


@triton.jit
def chunk_decays(decay, size, KIND: tl.constexpr, C: tl.constexpr):
    """Return reads and writes, `[C, 1]`, and the logarithm of keeps, `[1]`."""
    row = tl.arange(0, C)
    if KIND == "constant":
        reads = tl.exp((decay * (row + 1))[:, None])
        writes = tl.exp((decay * tl.maximum(size - 1 - row, 0))[:, None])
        total = decay * size
    else:
        wide = decay.to(tl.float64)
        sums = tl.cumsum(wide, 0)
        all_tokens = tl.sum(wide, 0)
        # In base 2, as in `decay_pairs`, which shares them.
        reads = tl.exp2((sums * LOG2_E).to(tl.float32)[:, None])
        writes = tl.exp2(((all_tokens - sums) * LOG2_E).to(tl.float32)[:, None])
        total = tl.zeros([1], tl.float32) + all_tokens.to(tl.float32)
    return reads, writes, total


@triton.jit
def _sums_of_decays(decay):
    """Return the cumulative sums of scalar decays in base 2, `[C]`: float32's nearest number, and the rest.

    Differences of both are as accurate as one float32 exponent.
    """
    sums = tl.cumsum(decay.to(tl.float64), 0) * LOG2_E
    high = sums.to(tl.float32)
    return high, (sums - high.to(tl.float64)).to(tl.float32)


@triton.jit
def pair_decays(decay, visible, KIND: tl.constexpr, C: tl.constexpr):
    """Return pairs `[C, C]` of constant and scalar decays, 0 where not `visible`."""
    row = tl.arange(0, C)
    if KIND == "constant":
        exponent = (decay * LOG2_E)[:, None] * (row[:, None] - row[None, :])
    else:
        high, low = _sums_of_decays(decay)
        exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp2(tl.where(visible, exponent, float("-inf")))


@triton.jit
def decay_pairs(scores, decay, visible, KIND: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr):
    """Compute `[C, C]` scores, float32, times pairs of constant and scalar decays, 0 where not `visible`.

    Exponents of scalar decays are accurate to float32, for factors in bf16 to the half of a unit of float32 of the
    chunk's sum of decays: 2^-11 for sums of 8192, where bf16 keeps 2^-9 of a score.
    """
    if KIND == "constant":
        result = scores * pair_decays(decay, visible, KIND, C)
    else:
        # The sum with 0 * scores makes the compiler keep the exponents where the product left its scores. In a layout
        # of its own, the matrix would go through shared memory once per chunk.
        high, low = _sums_of_decays(decay)
        exponent = scores * 0.0 + high[:, None]
        exponent -= high[None, :]
        if DOT == tl.float32:  # noqa: SIM300 - DOT is the argument
            exponent += low[:, None]
            exponent -= low[None, :]
        result = tl.where(visible, scores * tl.exp2(exponent), 0.0)
    return result


@triton.jit
def product(x, y, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Compute `x y` with factors of dtype DOT, accumulated in float32."""
    return tl.dot(x.to(DOT), y.to(DOT), input_precision=PRECISION)


@triton.jit
def read_state(x, factor, state, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Compute `(factor * x) state`, `[C, BK]` times `[BK, BV]`; the factor per token multiplies the float32 product."""
    return product(x, state, DOT, PRECISION) * factor


@triton.jit
def outer(x, factor, y, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Compute `(factor * x)^T y`, `[BK, BV]`: a chunk's update of the state.

    A factor per token, `[C, 1]`, multiplies the smaller of x and y.
    """
    if factor.shape[1] == 1 and x.shape[1] > y.shape[1]:
        result = product(tl.trans(x), y * factor, DOT, PRECISION)
    else:
        result = product(tl.trans((x * factor).to(DOT)), y, DOT, PRECISION)
    return result


@triton.jit
def decayed_scores(
    q, k, decay, visible, KIND: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """Compute the scores `q_i . (pairs_ij * k_j)` where `visible`, else 0: `[C, C]` float32."""
    return decay_pairs(product(q, tl.trans(k), DOT, PRECISION), decay, visible, KIND, C, DOT)


@triton.jit
def load_documents(ids, begin, start, size, C: tl.constexpr):
    """Load document ids of the chunk at token `start`, in the segment at `begin`.

    Returns those of its tokens, of the token before it (0 at the segment's start), and of its last token.
    """
    row = tl.arange(0, C)
    doc = tl.load(ids + start + row, mask=row < size, other=-1)
    doc_before = tl.load(ids + start - 1, mask=start > begin, other=0)
    doc_last = tl.load(ids + start + size - 1)
    return doc, doc_before, doc_last


@triton.jit
def same_document(doc, begin, start, C: tl.constexpr):
    """Return for each token (row) which tokens (columns) up to it are of its document, given `load_documents`'s ids.

    Compares columns with where the row's document begins: the ids of columns need no layout of their own.
    """
    column = tl.arange(0, C)[None, :]
    return column >= (doc - 1 - (start - begin))[:, None]


@triton.jit
def suffix_sums(terms, doc):
    """Compute for each of a chunk's tokens the sum of `terms [C]` from it to its document's end, `[C]`.

    A scan, in place of a masked matrix. `doc` are ids of documents; None where all tokens are of one.
    """
    if doc is None:
        sums = tl.cumsum(terms, 0, reverse=True)
    else:
        sums, _ = tl.associative_scan((terms, doc), 0, _add_in_document, reverse=True)
    return sums


@triton.jit
def _add_in_document(later, later_doc, earlier, earlier_doc):
    return earlier + tl.where(later_doc == earlier_doc, later, 0.0), earlier_doc


@triton.jit
def load_document_masks(ids, begin, start, size, C: tl.constexpr):
    """Return which pairs of a chunk's tokens share a document, `[C, C]`, and what meets the states around it.

    These are tokens that read the state before the chunk and tokens that write to that after it, `[C]`, and whether a
    state is kept.
    """
    doc, doc_before, doc_last = load_documents(ids, begin, start, size, C)
    return doc[:, None] == doc[None, :], doc == doc_before, doc == doc_last, doc_before == doc_last


@triton.jit
def locate_program(bounds, heads, batch, BLOCKS: tl.constexpr):
    """Return this program's head, batch row, segment and block, and the segment's begin and end."""
    program = tl.program_id(0)
    block = program % BLOCKS
    rest = program // BLOCKS
    head = rest % heads
    rest = rest // heads
    segment = rest // batch
    begin = tl.load(bounds + 2 * segment)
    end = tl.load(bounds + 2 * segment + 1)
    return head, rest % batch, segment, block, begin, end


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
