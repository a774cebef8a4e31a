// Additive recurrence on CPUs with a decay per channel, head and token (GLA, HGRN-2): the passes of
// longctx/kernels/linear/additive/chunked.py, whose docstring has the equations. One task per segment, batch row and
// head; sums and states in float32, over thousands of chunks in float64 (longctx/kernels/linear/running_state.py).
//
// Products of bfloat16 inputs multiply bfloat16 where the CPU can, as in additive.cpp, but pairs of tokens and their
// gradients, which are float32 (vector_decay.h).
//
// Called by longctx/kernels/linear/additive/native.py, which mirrors `Call`.
#include "vector_decay.h"

// Chunks whose states are in memory at the same time in the backward pass.
constexpr long CHUNKS_PER_BLOCK = 64;

struct Call {
    long rows, length, heads, key_dim, value_dim, threads;
    Tensor q, k, v, dout, out, dq, dk, dv;
    Tensor gate, dgate;        // log-decays [B, T, heads, K]; float32 [B, T, H, K], null: not wanted
    Segments segments;         // N
    const float *states;       // [N, B, H, K, V], before the segments
    float *ends;               // after them
    const float *dends;        // gradients of `ends`
    float *dstates;            // of `states`
};

// Buffers of a thread and the passes of its tasks.
template <typename F> class Worker : Task<Call> {
    const long key_width, value_width;
    Scratch scratch;
    VectorDecay<F> decay;
    StateFactor<F> state, dstate;
    Tile<F> keys, queries, scores, dscores;
    Factor<F> values, grads, scaled;                                  // scaled: keys or queries times their decays
    float *dkeys, *dread, *dvalues, *result;
    float *kept = nullptr;                                            // states before a block's chunks
    std::vector<Range> chunks;
    Ahead ahead;

    long state_size() const { return key_width * value_width; }

    void load_queries(const Range &chunk, long reader) {
        load_tile(call.q, row, reader_head(call.q, reader), chunk, call.key_dim, queries.exact, key_width);
    }
    void load_grads(const Range &chunk, long reader) {
        grads.load_rows(call.dout, row, head * readers + reader, chunk.begin, chunk.tokens, call.value_dim);
        grads.stack();
    }
    void load_values(const Range &chunk) {
        values.load_rows(call.v, row, shared_head(call.v), chunk.begin, chunk.tokens, call.value_dim);
    }

    // All that a chunk's keys and log-decays decide. Without keys, as a pass over reads alone, they count as 0.
    void load_keys(const Range &chunk) {
        if (call.k.data != nullptr)
            load_tile(call.k, row, shared_head(call.k), chunk, call.key_dim, keys.exact, key_width);
        decay.find(call.gate, row, shared_head(call.gate), chunk, call.key_dim, keys);
    }

    // Fetch what chunk `number` reads of the state's tensors.
    void fetch(long number, bool with_queries) {
        ahead.drop();
        if (number < 0 || number >= long(chunks.size())) return;
        const Range &chunk = chunks[number];
        call.k.fetch(ahead, row, shared_head(call.k), chunk.begin, chunk.tokens, call.key_dim);
        call.v.fetch(ahead, row, shared_head(call.v), chunk.begin, chunk.tokens, call.value_dim);
        call.gate.fetch(ahead, row, shared_head(call.gate), chunk.begin, chunk.tokens, call.key_dim);
        if (with_queries) call.q.fetch(ahead, row, reader_head(call.q, 0), chunk.begin, chunk.tokens, call.key_dim);
    }

    // Add what `scaled` and a tile, both stacked, give together to what a chunk has left of a state.
    void add_to(StateFactor<F> &to, const Factor<F> &b, Keep keep) {
        product<F>(key_width, value_width, CHUNK / F::PER_WORD, columns_of(scaled), b.stacked, value_width, to.added,
                   value_width, keep, &ahead);
    }
    // Update the state from before a chunk, whose keys and stacked values are loaded, to after it.
    void write() {
        set_stacked_rows(scaled, rows_times(keys, decay.write_decays()));
        const Keep keep = state.decay(decay);
        add_to(state, values, keep);
    }
    void advance(long number) {
        fetch(number + 1, false);
        load_keys(chunks[number]);
        load_values(chunks[number]);
        values.stack();
        write();
    }

    // Add a chunk's reads to the gradient of the state before it.
    void add_reads(Keep keep) {
        set_stacked_rows(scaled, rows_times(queries, decay.read_decays()));
        add_to(dstate, grads, keep);
    }

    void find_scores() {
        decay.pairs(queries, scores.exact, 1);
        scores.round();
    }

public:
    explicit Worker(const Call &call)
        : Task(call), key_width(Factor<F>::width_of(call.key_dim)), value_width(Factor<F>::width_of(call.value_dim)),
          decay(scratch, key_width), state(scratch, key_width, value_width), dstate(scratch, key_width, value_width),
          keys(scratch, CHUNK, key_width), queries(scratch, CHUNK, key_width), scores(scratch, CHUNK, CHUNK),
          dscores(scratch, CHUNK, CHUNK), values(scratch, CHUNK, value_width, true),
          grads(scratch, CHUNK, value_width, false), scaled(scratch, CHUNK, key_width, false) {
        for (float **x : {&dkeys, &dread}) *x = scratch.take(CHUNK * key_width);
        for (float **x : {&dvalues, &result}) *x = scratch.take(CHUNK * value_width);
    }

    void begin(long task) {
        set(task);
        chunks = chunks_of(call.segments, segment);
        decay.begin();
    }

    void apply() {
        state.start(call.states + state_at(), call.key_dim, call.value_dim);
        for (long i = 0; i < long(chunks.size()); i++) {
            const Range &chunk = chunks[i];
            fetch(i + 1, true);
            load_keys(chunk);
            load_values(chunk);
            values.stack();
            state.read_stacked();
            for (long reader = 0; reader < readers; reader++) {
                load_queries(chunk, reader);
                find_scores();
                set_rows(scaled, rows_times(queries, decay.read_decays()));
                product<F>(chunk.tokens, value_width, key_width / F::PER_WORD, rows_of(scaled), state.factor.stacked,
                           value_width, result, value_width, false, &ahead);
                product_of_lower<F>(chunk.tokens, value_width, scores.rows, CHUNK / F::PER_WORD, values.stacked,
                                    value_width, result, value_width);
                store_tile(call.out, row, head * readers + reader, chunk, call.value_dim, result, value_width);
            }
            write();
        }
        state.end(call.ends + state_at(), call.key_dim, call.value_dim);
    }

    // The state that a segment adds, from its last document's start on.
    void summarize() {
        const long live = call.segments.last_start(segment);
        state.start(nullptr, 0, 0);
        for (long i = 0; i < long(chunks.size()); i++)
            if (chunks[i].begin + chunks[i].tokens > live) advance(i);
        state.end(call.ends + state_at(), call.key_dim, call.value_dim);
    }

    // The gradient of a segment's start state, which tokens up to its first document's start read.
    void summarize_grad() {
        const long live = call.segments.first_start(segment);
        dstate.start(nullptr, 0, 0);
        for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); chunk++) {
            if (chunk->begin >= live) continue;
            load_keys(*chunk);
            Keep keep = dstate.decay(decay);
            for (long reader = 0; reader < readers; reader++) {
                load_queries(*chunk, reader);
                load_grads(*chunk, reader);
                add_reads(keep);
                keep = true;
            }
        }
        dstate.end(call.dstates + state_at(), call.key_dim, call.value_dim);
    }

    // All gradients. A first loop keeps the states before blocks of chunks; each block, from the last on, has all its states
    // computed again, and then its gradients.
    void apply_grad() {
        const long count = long(chunks.size()), blocks = (count + CHUNKS_PER_BLOCK - 1) / CHUNKS_PER_BLOCK;
        if (kept == nullptr) kept = scratch.take(CHUNKS_PER_BLOCK * state_size());
        std::vector<float> checkpoints(blocks * state_size());
        dstate.start(call.dends + state_at(), call.key_dim, call.value_dim);
        state.start(call.states + state_at(), call.key_dim, call.value_dim);
        for (long block = 0; block < blocks; block++) {
            state.read(checkpoints.data() + block * state_size());
            for (long i = block * CHUNKS_PER_BLOCK; block + 1 < blocks && i < (block + 1) * CHUNKS_PER_BLOCK; i++)
                advance(i);
        }
        for (long block = blocks - 1; block >= 0; block--) {
            const long first = block * CHUNKS_PER_BLOCK, last = std::min(count, first + CHUNKS_PER_BLOCK);
            state.start(checkpoints.data() + block * state_size(), key_width, value_width);
            for (long i = first; i < last; i++) {
                state.read(kept + (i - first) * state_size());
                if (i + 1 < last) advance(i);
            }
            for (long i = last - 1; i >= first; i--) chunk_grad(i, kept + (i - first) * state_size());
        }
        dstate.end(call.dstates + state_at(), call.key_dim, call.value_dim);
    }

private:
    // The gradients of a chunk, and of the state before it.
    void chunk_grad(long number, const float *before) {
        const Range &chunk = chunks[number];
        fetch(number - 1, true);
        load_keys(chunk);
        load_values(chunk);
        values.turn();
        dstate.read_rows(), dstate.factor.stack(), dstate.factor.turn();
        product<F>(CHUNK, key_width, value_width / F::PER_WORD, rows_of(values), dstate.factor.turned, key_width, dkeys,
                   key_width, false, &ahead);
        scale_rows(dkeys, CHUNK, key_width, decay.write_decays());
        decay.start_grads(call.dgate.data != nullptr, dkeys, before, dstate);
        set_rows(scaled, rows_times(keys, decay.write_decays()));
        product<F>(CHUNK, value_width, key_width / F::PER_WORD, rows_of(scaled), dstate.factor.stacked, value_width,
                   dvalues, value_width, false, &ahead);
        Keep keep = dstate.decay(decay);
        state.factor.turn(before);
        for (long reader = 0; reader < readers; reader++) {
            load_queries(chunk, reader);
            load_grads(chunk, reader);
            find_scores();
            scores.stack();
            product_of_lower_transposed<F>(CHUNK, value_width, scores.stacked, CHUNK, grads.stacked, value_width,
                                           dvalues, value_width);
            product<F>(CHUNK, key_width, value_width / F::PER_WORD, rows_of(grads), state.factor.turned, key_width,
                       dread, key_width, false, &ahead);
            scale_rows(dread, CHUNK, key_width, decay.read_decays());
            decay.add_read_grads(queries.exact, dread);
            product_to_lower<F>(CHUNK, value_width / F::PER_WORD, rows_of(grads), values.turned, CHUNK, dscores.exact,
                                CHUNK);
            decay.add_pair_grads(dscores, scores.exact, 1, queries, dread, dkeys);
            store_tile(call.dq, row, head * readers + reader, chunk, call.key_dim, dread, key_width);
            add_reads(keep);
            keep = true;
        }
        decay.finish_keys(dkeys);
        if (call.dgate.data != nullptr) decay.store_grads(call.dgate, row, head, chunk, call.key_dim);
        store_tile(call.dk, row, head, chunk, call.key_dim, dkeys, key_width);
        store_tile(call.dv, row, head, chunk, call.value_dim, dvalues, value_width);
    }
};

extern "C" {
int additive_vector_summarize(const Call *call) { return ON_TASKS(Worker, *call, summarize); }
int additive_vector_apply(const Call *call) { return ON_TASKS(Worker, *call, apply); }
int additive_vector_summarize_grad(const Call *call) { return ON_TASKS(Worker, *call, summarize_grad); }
int additive_vector_apply_grad(const Call *call) { return ON_TASKS(Worker, *call, apply_grad); }
}
