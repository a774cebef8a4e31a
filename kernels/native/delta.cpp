// Delta rule on CPUs, with a decay per head and token, per channel too, or none: the passes of
// longctx/kernels/linear/delta/chunked.py, whose docstring has the equations. One task per segment, batch row and head;
// sums and states in float32, over thousands of chunks in float64 (longctx/kernels/linear/running_state.py).
//
// Products of bfloat16 inputs multiply bfloat16 where the CPU can, as in additive.cpp: the state and its gradient where
// tokens read them, U and dV, decayed keys, queries and scores are rounded, once per product. The triangular system is
// solved in float32, since its inverse may be large; so are pairs of a decay per channel (vector_decay.h).
//
// Here Z = U / diag(b) is what a token would write with a beta of 1, and P = pairs(K, K) below the diagonal:
//
//     (I + P diag(b)) Z = V - (reads K) S        U = diag(b) Z
//     dR = dU - P^T dV        dV = diag(b) dR        db = rowsum(dR * Z)        dP = -dV U^T below the diagonal
//
// Called by longctx/kernels/linear/delta/native.py, which mirrors `Call`.
#include "scalar_decay.h"
#include "triangular.h"
#include "vector_decay.h"

// Chunks whose states and writes are in memory at the same time in the backward pass.
constexpr long CHUNKS_PER_BLOCK = 64;

struct Call {
    long rows, length, heads, key_dim, value_dim, threads;
    Tensor q, k, v, dout, out, dq, dk, dv;
    Tensor beta, gate;         // [B, T, heads]; log-decays [B, T, heads], or [B, T, heads, K] if `by_channel`
    Tensor dbeta, dgate;       // float32, [B, T, H] and as log-decays
    long by_channel;
    Segments segments;         // N
    const float *states;       // [N, B, H, K, V], before the segments
    float *ends;               // after them
    const float *dends;        // gradients of `ends`
    float *dstates;            // of `states`
    float *transitions;        // [N, B, H, K, K]
};

// Buffers of a thread and the passes of its tasks.
template <typename Decay, typename F> class Worker : Task<Call> {
    const long key_width, value_width, widest;   // widest: of a state, in a summary with K columns more
    Scratch scratch;
    Decay decay;
    TriangularSystem system;
    StateFactor<F> state, dstate;                // the gradients of a summary are in `state`
    alignas(64) float betas[CHUNK];
    Tile<F> keys, queries, values, u;            // values: V, then V - (reads K) S; backward dV
    Tile<F> scores, dscores;                     // [CHUNK, CHUNK]
    Factor<F> grads, scaled;                     // scaled: keys or queries times their decays
    float *z, *pairs;                            // pairs are -P
    float *result, *dkeys, *dread, *du, *drhs;
    float *kept = nullptr;                       // of a block's chunks, the states before them and their Z
    std::vector<Range> chunks;
    Ahead ahead;                                 // what the next chunk loads, and this one stores

    long state_size() const { return key_width * value_width; }
    long kept_size() const { return state_size() + CHUNK * value_width; }

    void load(const Tensor &x, long of_head, const Range &chunk, long dim, const Tile<F> &to) const {
        load_tile(x, row, of_head, chunk, dim, to.exact, to.width);
    }
    void load_values(const Range &chunk) { load(call.v, shared_head(call.v), chunk, call.value_dim, values); }
    void load_queries(const Range &chunk, long reader) {
        load(call.q, reader_head(call.q, reader), chunk, call.key_dim, queries);
    }
    void load_grads(const Range &chunk, long reader) {
        grads.load_rows(call.dout, row, head * readers + reader, chunk.begin, chunk.tokens, call.value_dim);
        grads.stack();
    }

    // Ask for rows of tensors of the states' heads, or of the readers', of which only the first's.
    void ask(const Tensor &x, const Range &chunk, long dim) {
        x.fetch(ahead, row, shared_head(x), chunk.begin, chunk.tokens, dim);
    }
    void ask_of_reader(const Tensor &x, const Range &chunk, long dim) {
        x.fetch(ahead, row, reader_head(x, 0), chunk.begin, chunk.tokens, dim);
    }
    void ask_for_keys_and_values(long number) {
        if (number >= long(chunks.size())) return;
        ask(call.k, chunks[number], call.key_dim), ask(call.v, chunks[number], call.value_dim);
    }

    // All that a chunk's keys and gates decide.
    void load_keys(const Range &chunk) {
        load(call.k, shared_head(call.k), chunk, call.key_dim, keys);
        load_numbers(call.beta, row, shared_head(call.beta), chunk, betas);
        const long gate_head = call.gate.data == nullptr ? 0 : shared_head(call.gate);
        decay.find(call.gate, row, gate_head, chunk, call.key_dim, keys);
        decay.pairs(keys, pairs, -1);
        for (long i = 0; i < CHUNK; i++) pairs[i * CHUNK + i] = 0;
        system.set(pairs, betas);
    }

    // C [rows, n] = keep C + A B, A [rows, K] given by its rows, B by those of a factor, stacked.
    void multiply(long rows, const Factor<F> &a, const Factor<F> &b, float *c, Keep keep) {
        product<F>(rows, b.width, a.width / F::PER_WORD, rows_of(a), b.stacked, b.width, c, b.width, keep, &ahead);
    }
    // C [rows, n] = A B^T, B by its rows, turned.
    void multiply_by_turned(long rows, const Factor<F> &a, const Factor<F> &b, float *c) {
        product<F>(rows, b.height, a.width / F::PER_WORD, rows_of(a), b.turned, b.height, c, b.height, false, &ahead);
    }
    // Add A^T B to what a chunk has left of a state, A and B by rows of its tokens, stacked.
    void add_to(State &to, const Factor<F> &a, const Factor<F> &b, Keep keep) {
        product<F>(key_width, b.width, CHUNK / F::PER_WORD, columns_of(a), b.stacked, b.width, to.added, to.width, keep,
                   &ahead);
    }

    // Z and U, of values that are loaded.
    void find_writes() {
        state.read_stacked();
        set_rows(scaled, rows_times(keys, decay.read_decays(), -1));
        multiply(CHUNK, scaled, state.factor, values.exact, true);
        system.solve(values.exact, values.width, z, u.exact);
        u.round_stacked();
    }

    // Update the state from before a chunk to after it.
    void write() {
        const Keep keep = state.decay(decay);
        set_stacked_rows(scaled, rows_times(keys, decay.write_decays()));
        add_to(state, scaled, u, keep);
    }

    void advance(long number) {
        const Range &chunk = chunks[number];
        ahead.drop();
        ask_for_keys_and_values(number + 1);
        load_keys(chunk);
        load_values(chunk);
        find_writes();
        write();
    }

    // Begin a summary with a state of 0 and, where no document starts, the identity.
    void start_summary(bool whole) {
        const long width = whole ? widest : value_width;
        state.set_width(width);
        values.width = u.width = width;
        state.start(nullptr, 0, 0, whole ? value_width : -1);
    }

    void end_summary(bool whole, float *to) const {
        state.end(to + state_at(), call.key_dim, call.value_dim);
        float *transition = call.transitions + state_number() * call.key_dim * call.key_dim;
        if (whole)
            state.end(transition, call.key_dim, call.key_dim, value_width);
        else
            std::memset(transition, 0, call.key_dim * call.key_dim * sizeof(float));
    }

public:
    explicit Worker(const Call &call)
        : Task(call), key_width(Factor<F>::width_of(call.key_dim)), value_width(Factor<F>::width_of(call.value_dim)),
          widest(value_width + (call.transitions ? key_width : 0)), decay(scratch, key_width), system(scratch),
          state(scratch, key_width, widest), dstate(scratch, key_width, value_width),
          keys(scratch, CHUNK, key_width, true), queries(scratch, CHUNK, key_width), values(scratch, CHUNK, widest),
          u(scratch, CHUNK, widest, true), scores(scratch, CHUNK, CHUNK), dscores(scratch, CHUNK, CHUNK),
          grads(scratch, CHUNK, value_width, false), scaled(scratch, CHUNK, key_width, false) {
        for (float **x : {&dkeys, &dread}) *x = scratch.take(CHUNK * key_width);
        for (float **x : {&z, &du, &drhs}) *x = scratch.take(CHUNK * widest);
        pairs = scratch.take(CHUNK * CHUNK);
        result = scratch.take(CHUNK * value_width);
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
            ahead.drop();
            ask_of_reader(call.out, chunk, call.value_dim);
            ask_for_keys_and_values(i + 1);
            if (i + 1 < long(chunks.size())) ask_of_reader(call.q, chunks[i + 1], call.key_dim);
            load_keys(chunk);
            load_values(chunk);
            find_writes();
            for (long reader = 0; reader < readers; reader++) {
                load_queries(chunk, reader);
                find_scores();
                set_rows(scaled, rows_times(queries, decay.read_decays()));
                multiply(chunk.tokens, scaled, state.factor, result, false);
                product_of_lower<F>(chunk.tokens, value_width, scores.rows, CHUNK / F::PER_WORD, u.stacked, value_width,
                                    result, value_width);
                store_tile(call.out, row, head * readers + reader, chunk, call.value_dim, result, value_width);
            }
            write();
        }
        state.end(call.ends + state_at(), call.key_dim, call.value_dim);
    }

    // The state that a segment adds, from its last document's start on, and what it makes of the state before it.
    void summarize() {
        const bool whole = call.segments.bounds[segment].count == 0;
        const long live = call.segments.last_start(segment);
        start_summary(whole);
        for (const Range &chunk : chunks) {
            if (chunk.begin + chunk.tokens <= live) continue;
            load_keys(chunk);
            load_values(chunk);
            find_writes();
            write();
        }
        end_summary(whole, call.ends);
    }

    // The same of gradients: that of the start state, which tokens up to the first document's start read.
    void summarize_grad() {
        const bool whole = call.segments.bounds[segment].count == 0;
        const long live = call.segments.first_start(segment);
        start_summary(whole);
        for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); chunk++) {
            if (chunk->begin >= live) continue;
            load_keys(*chunk);
            state.read_stacked();
            find_write_grads(state);
            state.apply(state.decay(decay));
            for (long reader = 0; reader < readers; reader++) {
                load_queries(*chunk, reader);
                load_grads(*chunk, reader);
                find_scores();
                add_score_grads();
                add_reads(state, true);
            }
            solve_back(state);
        }
        end_summary(whole, call.dstates);
    }

    // All gradients. A first loop keeps the states before blocks of chunks; each block, from the last on, is computed again,
    // with all its states and writes, and then its gradients.
    void apply_grad() {
        const long count = long(chunks.size()), blocks = (count + CHUNKS_PER_BLOCK - 1) / CHUNKS_PER_BLOCK;
        if (kept == nullptr) kept = scratch.take(std::min(longest_segment(), CHUNKS_PER_BLOCK) * kept_size());
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
                float *of_chunk = kept + (i - first) * kept_size();
                state.read(of_chunk);
                advance(i);
                std::memcpy(of_chunk + state_size(), z, CHUNK * value_width * sizeof(float));
            }
            for (long i = last - 1; i >= first; i--) chunk_grad(i, kept + (i - first) * kept_size());
        }
        dstate.end(call.dstates + state_at(), call.key_dim, call.value_dim);
    }

private:
    long longest_segment() const {
        long chunks_of_longest = 0;
        for (long i = 0; i < call.segments.count; i++) {
            const Bounds &of = call.segments.bounds[i];
            chunks_of_longest = std::max(chunks_of_longest, (of.end - of.begin + CHUNK - 1) / CHUNK);
        }
        return chunks_of_longest;
    }

    void find_scores() {
        decay.pairs(queries, scores.exact, 1);
        scores.round();
    }

    // In `du`, the gradient of what a chunk writes into a state whose gradient's rows are stacked.
    void find_write_grads(const StateFactor<F> &of) {
        set_rows(scaled, rows_times(keys, decay.write_decays()));
        multiply(CHUNK, scaled, of.factor, du, false);
    }
    // Add that from the scores.
    void add_score_grads() {
        scores.stack();
        product_of_lower_transposed<F>(CHUNK, value_width, scores.stacked, CHUNK, grads.stacked, value_width, du,
                                       u.width);
    }

    // Add a chunk's reads, by queries, to the gradient of the state before it.
    void add_reads(State &to, Keep keep) {
        set_stacked_rows(scaled, rows_times(queries, decay.read_decays()));
        add_to(to, scaled, grads, keep);
    }

    // Turn dU into dR, in `drhs`, and dV, in `values`; add the reads by keys to the gradient of the state.
    void solve_back(State &to) {
        system.prepare_back();
        system.solve_back(du, values.width, drhs, values.exact);
        values.round(), values.stack();
        set_stacked_rows(scaled, rows_times(keys, decay.read_decays(), -1));
        add_to(to, scaled, values, true);
    }

    void ask_for_grads(long number) {
        ahead.drop();
        ask_of_reader(call.dq, chunks[number], call.key_dim);
        ask(call.dk, chunks[number], call.key_dim), ask(call.dv, chunks[number], call.value_dim);
        if (number == 0) return;
        ask(call.k, chunks[number - 1], call.key_dim);
        ask_of_reader(call.q, chunks[number - 1], call.key_dim), ask_of_reader(call.dout, chunks[number - 1], call.value_dim);
    }

    // The gradients of a chunk, and of the state before it: from what is kept of the chunk.
    void chunk_grad(long number, const float *before) {
        const Range &chunk = chunks[number];
        ask_for_grads(number);
        const float *of_writes = before + state_size();
        const bool with_gates = call.dbeta.data != nullptr;
        load_keys(chunk);
        for (long i = 0; i < CHUNK; i++)
            for (long d = i * value_width; d < (i + 1) * value_width; d += LANES)
                store(u.exact + d, ::load(of_writes + d) * betas[i]);
        u.round(), u.turn();
        dstate.read_rows(), dstate.factor.stack(), dstate.factor.turn();
        multiply_by_turned(CHUNK, u, dstate.factor, dkeys);
        scale_rows(dkeys, CHUNK, key_width, decay.write_decays());
        decay.start_grads(call.dgate.data != nullptr, dkeys, before, dstate);
        find_write_grads(dstate);
        Keep keep = dstate.decay(decay);
        state.factor.turn(before);
        for (long reader = 0; reader < readers; reader++) {
            reader_grad(chunk, reader, keep);
            keep = true;
        }
        solve_back(dstate);
        store_tile(call.dv, row, head, chunk, call.value_dim, values.exact, value_width);
        if (with_gates) {
            for (long i = 0; i < CHUNK; i++)
                betas[i] = dot(drhs + i * value_width, of_writes + i * value_width, value_width);
            store_numbers(call.dbeta, row, head, chunk, betas);
        }
        find_read_grads(values, -1, keys);
        find_score_grads(values);
        for (long i = 0; i < CHUNK; i++) dscores.exact[i * CHUNK + i] = 0;
        decay.add_pair_grads(dscores, pairs, -1, keys, dread, dkeys);
        for (long i = 0; i < CHUNK * key_width; i += LANES) store(dkeys + i, ::load(dkeys + i) + ::load(dread + i));
        decay.finish_keys(dkeys);
        if (call.dgate.data != nullptr) decay.store_grads(call.dgate, row, head, chunk, call.key_dim);
        store_tile(call.dk, row, head, chunk, call.key_dim, dkeys, key_width);
    }

    void reader_grad(const Range &chunk, long reader, Keep keep) {
        load_queries(chunk, reader);
        load_grads(chunk, reader);
        find_scores();
        add_score_grads();
        find_read_grads(grads, 1, queries);
        find_score_grads(grads);
        decay.add_pair_grads(dscores, scores.exact, 1, queries, dread, dkeys);
        store_tile(call.dq, row, head * readers + reader, chunk, call.key_dim, dread, key_width);
        add_reads(dstate, keep);
    }

    // In `dread`, the gradient of rows x that read the state, from the gradient of what they read times a factor.
    void find_read_grads(const Factor<F> &of_results, float factor, const Tile<F> &x) {
        multiply_by_turned(CHUNK, of_results, state.factor, dread);
        scale_rows(dread, CHUNK, key_width, decay.read_decays(), factor);
        decay.add_read_grads(x.exact, dread);
    }

    void find_score_grads(const Factor<F> &of_results) {
        product_to_lower<F>(CHUNK, value_width / F::PER_WORD, rows_of(of_results), u.turned, CHUNK, dscores.exact,
                            CHUNK);
    }
};

template <typename F> using Scalar = Worker<ScalarDecay<F>, F>;
template <typename F> using Vector = Worker<VectorDecay<F>, F>;

#define RUN(pass) (call->by_channel ? ON_TASKS(Vector, *call, pass) : ON_TASKS(Scalar, *call, pass))

extern "C" {
int delta_summarize(const Call *call) { return RUN(summarize); }
int delta_apply(const Call *call) { return RUN(apply); }
int delta_summarize_grad(const Call *call) { return RUN(summarize_grad); }
int delta_apply_grad(const Call *call) { return RUN(apply_grad); }
}
