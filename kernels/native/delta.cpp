// Delta rule on CPUs, with a decay per head and token, per channel too, or none: the passes of
// longctx/kernels/linear/delta/chunked.py, whose docstring has the equations. One task per segment, batch row and head;
// sums and states in float32, over thousands of chunks in float64 (longctx/kernels/linear/running_state.py).
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
template <typename Decay> class Worker : Task<Call> {
    const long key_width, value_width;
    Scratch scratch;
    Decay decay;
    TriangularSystem system;
    ReadState state, dstate;  // the gradients of a summary are in `state`
    alignas(64) float betas[CHUNK];
    float *keys, *queries, *grads;               // [CHUNK, D], as they are
    float *minus_read, *read, *written;          // keys that read, negative; queries that read; keys that write
    float *values, *z, *u;                       // V, then V - (reads K) S; [CHUNK, V], with K more in a summary
    float *pairs, *scores, *dscores;             // [CHUNK, CHUNK]; pairs are -P
    float *result, *dkeys, *dread, *du, *drhs;
    float *state_turned, *u_turned;              // [V, K], [V, CHUNK]
    float *kept = nullptr;                       // of a block's chunks, the states before them and their Z
    std::vector<Range> chunks;
    Ahead ahead;                                 // what the next chunk loads, and this one stores

    long state_size() const { return key_width * value_width; }
    long kept_size() const { return state_size() + CHUNK * value_width; }

    void load_shared(const Tensor &x, const Range &chunk, long dim, float *to) const {
        load_tile(x, row, shared_head(x), chunk, dim, to);
    }
    void load_queries(const Range &chunk, long reader) {
        load_tile(call.q, row, reader_head(call.q, reader), chunk, call.key_dim, queries);
    }
    void load_grads(const Range &chunk, long reader) {
        load_tile(call.dout, row, head * readers + reader, chunk, call.value_dim, grads);
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
        load_shared(call.k, chunk, call.key_dim, keys);
        load_numbers(call.beta, row, shared_head(call.beta), chunk, betas);
        const long gate_head = call.gate.data == nullptr ? 0 : shared_head(call.gate);
        decay.find(call.gate, row, gate_head, chunk, call.key_dim, keys);
        decay.pairs(keys, pairs, -1);
        for (long i = 0; i < CHUNK; i++) pairs[i * CHUNK + i] = 0;
        system.set(pairs, betas);
        decay.read(keys, minus_read, -1);
        decay.write(keys, written);
    }

    // Z and U, of values [CHUNK, width] that are loaded.
    void find_writes(long width, const float *before) {
        product(CHUNK, width, key_width, rows_of(minus_read, key_width), before, width, values, width, true, &ahead);
        system.solve(values, width, z, u);
    }

    // Update the state from before a chunk to after it.
    void write(long width) {
        const Keep keep = state.decay(decay);
        product(key_width, width, CHUNK, columns_of(written, key_width), u, width, state.added, width, keep, &ahead);
        state.read();
    }

    void advance(long number) {
        const Range &chunk = chunks[number];
        ahead.drop();
        ask_for_keys_and_values(number + 1);
        load_keys(chunk);
        load_shared(call.v, chunk, call.value_dim, values);
        find_writes(value_width, state.value);
        write(value_width);
    }


    // Begin a summary with a state of 0 and, where no document starts, the identity; returns the state's width.
    long start_summary(bool whole) {
        const long width = value_width + (whole ? key_width : 0);
        state.width = width;
        state.start(nullptr, 0, 0, whole ? value_width : -1);
        return width;
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
        : Task(call), key_width(padded(call.key_dim)), value_width(padded(call.value_dim)),
          decay(scratch, key_width), system(scratch),
          state(scratch, key_width, value_width + (call.transitions ? key_width : 0)), dstate(scratch, key_width, value_width) {
        const long widest = value_width + (call.transitions ? key_width : 0);
        for (float **x : {&keys, &queries, &minus_read, &read, &written, &dkeys, &dread}) *x = scratch.take(CHUNK * key_width);
        for (float **x : {&values, &z, &u, &du, &drhs}) *x = scratch.take(CHUNK * widest);
        for (float **x : {&grads, &u_turned}) *x = scratch.take(CHUNK * value_width);
        for (float **x : {&pairs, &scores, &dscores}) *x = scratch.take(CHUNK * CHUNK);
        result = scratch.take(CHUNK * std::max(key_width, value_width));
        state_turned = scratch.take(state_size());
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
            load_shared(call.v, chunk, call.value_dim, values);
            find_writes(value_width, state.value);
            for (long reader = 0; reader < readers; reader++) {
                load_queries(chunk, reader);
                decay.pairs(queries, scores, 1);
                decay.read(queries, read, 1);
                product(chunk.tokens, value_width, key_width, rows_of(read, key_width), state.value, value_width,
                        result, value_width, false, &ahead);
                product_of_lower(chunk.tokens, value_width, scores, CHUNK, u, value_width, result, value_width);
                store_tile(call.out, row, head * readers + reader, chunk, call.value_dim, result);
            }
            write(value_width);
        }
        state.end(call.ends + state_at(), call.key_dim, call.value_dim);
    }

    // The state that a segment adds, from its last document's start on, and what it makes of the state before it.
    void summarize() {
        const bool whole = call.segments.bounds[segment].count == 0;
        const long live = call.segments.last_start(segment), width = start_summary(whole);
        for (const Range &chunk : chunks) {
            if (chunk.begin + chunk.tokens <= live) continue;
            load_keys(chunk);
            load_shared(call.v, chunk, call.value_dim, result);
            std::memset(values, 0, CHUNK * width * sizeof(float));
            for (long i = 0; i < CHUNK; i++)
                std::memcpy(values + i * width, result + i * value_width, value_width * sizeof(float));
            find_writes(width, state.value);
            write(width);
        }
        end_summary(whole, call.ends);
    }

    // The same of gradients: that of the start state, which tokens up to the first document's start read.
    void summarize_grad() {
        const bool whole = call.segments.bounds[segment].count == 0;
        const long live = call.segments.first_start(segment), width = start_summary(whole);
        for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); chunk++) {
            if (chunk->begin >= live) continue;
            load_keys(*chunk);
            product(CHUNK, width, key_width, rows_of(written, key_width), state.value, width, du, width, false, &ahead);
            state.apply(state.decay(decay));
            for (long reader = 0; reader < readers; reader++) {
                load_queries(*chunk, reader);
                load_grads(*chunk, reader);
                decay.pairs(queries, scores, 1);
                product_of_lower_transposed(CHUNK, value_width, scores, CHUNK, grads, value_width, du, width);
                add_reads(state, width, true);
            }
            solve_back(state, width);
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
            std::memcpy(checkpoints.data() + block * state_size(), state.value, state_size() * sizeof(float));
            for (long i = block * CHUNKS_PER_BLOCK; block + 1 < blocks && i < (block + 1) * CHUNKS_PER_BLOCK; i++)
                advance(i);
        }
        for (long block = blocks - 1; block >= 0; block--) {
            const long first = block * CHUNKS_PER_BLOCK, last = std::min(count, first + CHUNKS_PER_BLOCK);
            state.start(checkpoints.data() + block * state_size(), key_width, value_width);
            for (long i = first; i < last; i++) {
                float *of_chunk = kept + (i - first) * kept_size();
                std::memcpy(of_chunk, state.value, state_size() * sizeof(float));
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

    // Add a chunk's reads, by queries, to the gradient of the state before it.
    void add_reads(State &to, long width, Keep keep) {
        decay.read(queries, read, 1);
        product(key_width, value_width, CHUNK, columns_of(read, key_width), grads, value_width, to.added, width,
                keep, &ahead);
    }

    // Turn dU into dR, in `drhs`, and dV, in `values`; add the reads by keys to the gradient of the state.
    void solve_back(ReadState &to, long width) {
        system.prepare_back();
        system.solve_back(du, width, drhs, values);
        product(key_width, width, CHUNK, columns_of(minus_read, key_width), values, width, to.added, width, true,
                &ahead);
        to.read();
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
                store(u + d, load(of_writes + d) * betas[i]);
        transpose(u, CHUNK, value_width, u_turned);
        transpose(dstate.value, key_width, value_width, state_turned);
        product(CHUNK, key_width, value_width, rows_of(u, value_width), state_turned, key_width, dkeys, key_width,
                false, &ahead);
        decay.write(dkeys, dkeys);
        decay.start_grads(call.dgate.data != nullptr, dkeys, before, dstate.value, value_width);
        product(CHUNK, value_width, key_width, rows_of(written, key_width), dstate.value, value_width, du,
                value_width, false, &ahead);
        Keep keep = dstate.decay(decay);
        transpose(before, key_width, value_width, state_turned);
        for (long reader = 0; reader < readers; reader++) {
            reader_grad(chunk, reader, keep);
            keep = true;
        }
        solve_back(dstate, value_width);
        store_tile(call.dv, row, head, chunk, call.value_dim, values);
        if (with_gates) {
            for (long i = 0; i < CHUNK; i++)
                betas[i] = dot(drhs + i * value_width, of_writes + i * value_width, value_width);
            store_numbers(call.dbeta, row, head, chunk, betas);
        }
        find_read_grads(values, -1, keys);
        find_score_grads(values);
        for (long i = 0; i < CHUNK; i++) dscores[i * CHUNK + i] = 0;
        decay.add_pair_grads(dscores, pairs, -1, keys, dread, dkeys);
        for (long i = 0; i < CHUNK * key_width; i += LANES) store(dkeys + i, load(dkeys + i) + load(dread + i));
        decay.finish_keys(dkeys);
        if (call.dgate.data != nullptr) decay.store_grads(call.dgate, row, head, chunk, call.key_dim);
        store_tile(call.dk, row, head, chunk, call.key_dim, dkeys);
    }

    void reader_grad(const Range &chunk, long reader, Keep keep) {
        load_queries(chunk, reader);
        load_grads(chunk, reader);
        decay.pairs(queries, scores, 1);
        product_of_lower_transposed(CHUNK, value_width, scores, CHUNK, grads, value_width, du, value_width);
        find_read_grads(grads, 1, queries);
        find_score_grads(grads);
        decay.add_pair_grads(dscores, scores, 1, queries, dread, dkeys);
        store_tile(call.dq, row, head * readers + reader, chunk, call.key_dim, dread);
        add_reads(dstate, value_width, keep);
    }

    // In `dread`, the gradient of rows x that read the state, from the gradient of what they read times a factor.
    void find_read_grads(const float *of_results, float factor, const float *x) {
        product(CHUNK, key_width, value_width, rows_of(of_results, value_width), state_turned, key_width, dread,
                key_width, false, &ahead);
        decay.read(dread, dread, factor);
        decay.add_read_grads(x, dread);
    }

    void find_score_grads(const float *of_results) {
        product_to_lower(CHUNK, value_width, rows_of(of_results, value_width), u_turned, CHUNK, dscores, CHUNK);
    }
};

// Returns 0, or 1 if there was not enough memory.
static int run(const Call &call, void (Worker<ScalarDecay>::*scalar)(), void (Worker<VectorDecay>::*vector)()) {
    return call.by_channel ? on_tasks(call, vector) : on_tasks(call, scalar);
}

typedef Worker<ScalarDecay> Scalar;
typedef Worker<VectorDecay> Vector;

extern "C" {
int delta_summarize(const Call *call) { return run(*call, &Scalar::summarize, &Vector::summarize); }
int delta_apply(const Call *call) { return run(*call, &Scalar::apply, &Vector::apply); }
int delta_summarize_grad(const Call *call) { return run(*call, &Scalar::summarize_grad, &Vector::summarize_grad); }
int delta_apply_grad(const Call *call) { return run(*call, &Scalar::apply_grad, &Vector::apply_grad); }
}
