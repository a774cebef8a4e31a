// Additive recurrence on CPUs, with a decay per head and token, per head, or none: the passes of
// longctx/kernels/linear/additive/chunked.py, whose docstring has the equations. One task per segment, batch row and
// head; sums and states in float32, over thousands of chunks in float64 (longctx/kernels/linear/running_state.py).
//
// Products of bfloat16 inputs multiply bfloat16 where the CPU can (avx512_bf16), float32 elsewhere. For that, decayed
// scores and their gradients, keys and queries times their decays, and the state where tokens read it are rounded to
// bfloat16; what is added to the state, and its decay, stay in float32.
//
// Called by longctx/kernels/linear/additive/native.py, which mirrors `Call`.
#include "scalar_decay.h"

constexpr long CHUNKS_PER_CHECKPOINT = 16;

struct Call {
    long rows, length, heads, key_dim, value_dim, threads;
    Tensor q, k, v, dout, out, dq, dk, dv;
    Tensor gate;            // log-decays [B, T, heads], token stride 0 where they are constant; null: none
    Tensor dgate;           // [B, T, H], float32
    Segments segments;      // N
    const float *states;    // [N, B, H, K, V], before the segments; null: zero
    float *ends;            // after them
    const float *dends;     // gradients of `ends`; null: zero
    float *dstates;         // of `states`
    double *dgate_sum;      // [N, B, H], of a constant gate
};

// Buffers of a thread and the passes of its tasks.
template <typename F> class Worker : Task<Call> {
    Scratch scratch;
    Factor<F> keys, values, queries, grads, scaled, weights, dweights;  // weights: decayed scores
    StateFactor<F> state, dstate;
    const long key_width, value_width, state_size;
    float *scores, *dscores, *pair_grads;  // [CHUNK, CHUNK]
    float *result, *dkeys, *dvalues;
    float *starts_of_chunks = nullptr;
    ScalarFactors decay;
    Ahead ahead;

    void find_decay(const Range &chunk) {
        decay.find(call.gate, row, call.gate.heads ? head / (call.heads / call.gate.heads) : 0, chunk);
    }
    void load_keys(const Range &chunk) {
        keys.load_rows(call.k, row, shared_head(call.k), chunk.begin, chunk.tokens, call.key_dim);
    }
    void load_values(const Range &chunk) {
        values.load_rows(call.v, row, shared_head(call.v), chunk.begin, chunk.tokens, call.value_dim);
    }
    void load_queries(const Range &chunk, long reader) {
        queries.load_rows(call.q, row, reader_head(call.q, reader), chunk.begin, chunk.tokens, call.key_dim);
    }
    void load_grads(const Range &chunk, long reader) {
        grads.load_rows(call.dout, row, head * readers + reader, chunk.begin, chunk.tokens, call.value_dim);
        grads.stack();
    }

    // Fetch what the next chunk of a pass reads and writes of the state's own heads.
    void fetch(const Range *chunk, std::initializer_list<const Tensor *> tensors) {
        ahead.drop();
        if (chunk == nullptr) return;
        for (const Tensor *x : tensors) {
            const long dim = x == &call.v || x == &call.dv || x == &call.out || x == &call.dout ? call.value_dim : call.key_dim;
            const bool of_state = x == &call.k || x == &call.v || x == &call.dk || x == &call.dv;
            const long of_head = x == &call.dk || x == &call.dv ? head : of_state ? shared_head(*x) : reader_head(*x, 0);
            x->fetch(ahead, row, of_head, chunk->begin, chunk->tokens, dim);
        }
    }

    // Update the state from before a chunk, whose keys and values are loaded, to after it.
    void write(const Range &chunk) {
        scaled.stack_scaled(keys, decay.writes);
        const Keep keep = state.decay(decay);
        multiply_into(chunk, columns_of(scaled), values, state, keep);
    }

    // Add A B to a state that a chunk has decayed, A [rows of the state, tokens], B the stacked rows of a tile.
    void multiply_into(const Range &chunk, OperandOf<F> a, const Factor<F> &b, StateFactor<F> &to, Keep keep) {
        const long words = (chunk.tokens + F::PER_WORD - 1) / F::PER_WORD;
        product<F>(key_width, value_width, words, a, b.stacked, value_width, to.added, value_width, keep, &ahead);
    }

    // P, rounded for products, in `weights`.
    void find_scores(const Range &chunk) {
        product_to_lower<F>(chunk.tokens, key_width / F::PER_WORD, rows_of(queries), keys.turned, CHUNK, scores,
                            CHUNK, &ahead);
        weights.set_product(scores, decay.pairs, chunk.tokens);
    }
    void find_score_grads(const Range &chunk) {
        product_to_lower<F>(chunk.tokens, value_width / F::PER_WORD, rows_of(grads), values.turned, CHUNK, dscores,
                            CHUNK, &ahead);
    }

    const float *first_state(const float *states) const { return states == nullptr ? nullptr : states + state_at(); }

public:
    explicit Worker(const Call &call)
        : Task(call), keys(scratch, CHUNK, call.key_dim, true),
          values(scratch, CHUNK, call.value_dim, true), queries(scratch, CHUNK, call.key_dim, false),
          grads(scratch, CHUNK, call.value_dim, false), scaled(scratch, CHUNK, call.key_dim, false),
          weights(scratch, CHUNK, CHUNK, false), dweights(scratch, CHUNK, CHUNK, false),
          state(scratch, call.key_dim, call.value_dim), dstate(scratch, call.key_dim, call.value_dim),
          key_width(keys.width), value_width(values.width), state_size(key_width * value_width) {
        for (float **x : {&scores, &dscores, &pair_grads, &decay.pairs}) *x = scratch.take(CHUNK * CHUNK);
        for (float **x : {&result, &dkeys, &dvalues}) *x = scratch.take(CHUNK * std::max(key_width, value_width));
    }

    void begin(long task) {
        set(task);
        decay.is_constant = false;
    }

    void apply() {
        state.start(first_state(call.states), call.key_dim, call.value_dim);
        const std::vector<Range> chunks = chunks_of(call.segments, segment);
        for (size_t i = 0; i < chunks.size(); i++) {
            const Range &chunk = chunks[i];
            fetch(i + 1 < chunks.size() ? &chunks[i + 1] : nullptr, {&call.q, &call.k, &call.v, &call.out});
            find_decay(chunk);
            load_keys(chunk), load_values(chunk);
            keys.turn();
            values.stack();
            state.read_stacked();
            for (long reader = 0; reader < readers; reader++) {
                load_queries(chunk, reader);
                find_scores(chunk);
                product<F>(chunk.tokens, value_width, key_width / F::PER_WORD, rows_of(queries), state.factor.stacked,
                           value_width, result, value_width, false, &ahead);
                product_of_lower<F>(chunk.tokens, value_width, weights.rows, CHUNK / F::PER_WORD, values.stacked,
                                    value_width, result, value_width, Keep(decay.reads), &ahead);
                store_tile(call.out, row, head * readers + reader, chunk, call.value_dim, result, value_width);
            }
            write(chunk);
        }
        state.end(call.ends + state_at(), call.key_dim, call.value_dim);
    }

    // The state that a segment adds, from its last document's start on.
    void summarize() {
        state.start(nullptr, 0, 0);
        const long live = call.segments.last_start(segment);
        const std::vector<Range> chunks = chunks_of(call.segments, segment);
        for (size_t i = 0; i < chunks.size(); i++) {
            if (chunks[i].begin + chunks[i].tokens <= live) continue;
            fetch(i + 1 < chunks.size() ? &chunks[i + 1] : nullptr, {&call.k, &call.v});
            advance(chunks[i]);
        }
        state.end(call.ends + state_at(), call.key_dim, call.value_dim);
    }

    // The gradient of a segment's start state, which tokens up to its first document's start read.
    void summarize_grad() {
        dstate.start(nullptr, 0, 0);
        const std::vector<Range> chunks = chunks_of(call.segments, segment);
        const long live = call.segments.first_start(segment);
        for (size_t i = chunks.size(); i-- > 0;) {
            const Range &chunk = chunks[i];
            if (chunk.begin >= live) continue;
            fetch(i > 0 ? &chunks[i - 1] : nullptr, {&call.q, &call.dout});
            find_decay(chunk);
            Keep keep = dstate.decay(decay);
            for (long reader = 0; reader < readers; reader++) {
                load_queries(chunk, reader), load_grads(chunk, reader);
                add_reads(chunk, keep);
                keep = true;
            }
        }
        dstate.end(call.dstates + state_at(), call.key_dim, call.value_dim);
    }

    void query_grad() { query_grad_of(nullptr); }

    void key_value_grad() {
        dstate.start(first_state(call.dends), call.key_dim, call.value_dim);
        const std::vector<Range> chunks = chunks_of(call.segments, segment);
        for (size_t i = chunks.size(); i-- > 0;) {
            fetch(i > 0 ? &chunks[i - 1] : nullptr, {&call.k, &call.v, &call.q, &call.dout, &call.dk, &call.dv});
            key_value_grad_of(chunks[i], nullptr);
        }
        dstate.end(call.dstates + state_at(), call.key_dim, call.value_dim);
    }

    // All gradients, the gate's among them: a forward loop over states computes dq and keeps some states; the reverse
    // loop recomputes those of a block of chunks before it needs them.
    void apply_grad() {
        const std::vector<Range> chunks = chunks_of(call.segments, segment);
        const long count = long(chunks.size()), blocks = (count + CHUNKS_PER_CHECKPOINT - 1) / CHUNKS_PER_CHECKPOINT;
        std::vector<float> checkpoints(blocks * state_size);
        if (starts_of_chunks == nullptr) starts_of_chunks = scratch.take(CHUNKS_PER_CHECKPOINT * state_size);
        query_grad_of(checkpoints.data());
        dstate.start(first_state(call.dends), call.key_dim, call.value_dim);
        for (long block = blocks - 1; block >= 0; block--) {
            const long first = block * CHUNKS_PER_CHECKPOINT, last = std::min(count, first + CHUNKS_PER_CHECKPOINT);
            state.start(checkpoints.data() + block * state_size, key_width, value_width);
            for (long i = first; i < last; i++) {
                state.read(starts_of_chunks + (i - first) * state_size);
                if (i + 1 == last) break;
                fetch(&chunks[i + 1], {&call.k, &call.v});
                advance(chunks[i]);
            }
            for (long i = last - 1; i >= first; i--) {
                fetch(i > 0 ? &chunks[i - 1] : nullptr, {&call.k, &call.v, &call.q, &call.dout, &call.dk, &call.dv});
                key_value_grad_of(chunks[i], starts_of_chunks + (i - first) * state_size);
            }
        }
        dstate.end(call.dstates + state_at(), call.key_dim, call.value_dim);
    }

private:
    // Update the state to after a chunk.
    void advance(const Range &chunk) {
        find_decay(chunk);
        load_keys(chunk), load_values(chunk);
        values.stack();
        write(chunk);
    }

    // Add what a chunk's loaded queries read of a state to its gradient.
    void add_reads(const Range &chunk, Keep keep) {
        scaled.stack_scaled(queries, decay.reads);
        multiply_into(chunk, columns_of(scaled), grads, dstate, keep);
    }

    // dq; with `checkpoints`, the gradient of the gate from what tokens read of the states before their chunks too.
    void query_grad_of(float *checkpoints) {
        const bool with_gate = checkpoints != nullptr;
        state.start(first_state(call.states), call.key_dim, call.value_dim);
        const std::vector<Range> chunks = chunks_of(call.segments, segment);
        for (size_t number = 0; number < chunks.size(); number++) {
            const Range &chunk = chunks[number];
            const Range *next = number + 1 < chunks.size() ? &chunks[number + 1] : nullptr;
            if (with_gate)
                fetch(next, {&call.k, &call.v, &call.dout, &call.dq, &call.q});
            else
                fetch(next, {&call.k, &call.v, &call.dout, &call.dq});
            if (with_gate && number % CHUNKS_PER_CHECKPOINT == 0)
                state.read(checkpoints + number / CHUNKS_PER_CHECKPOINT * state_size);
            state.read_rows(), state.factor.turn();
            find_decay(chunk);
            load_keys(chunk), load_values(chunk);
            keys.stack(), values.stack();
            values.turn();
            float reads_grad[CHUNK] = {};
            for (long reader = 0; reader < readers; reader++) {
                load_grads(chunk, reader);
                find_score_grads(chunk);
                dweights.set_product(dscores, decay.pairs, chunk.tokens);
                product<F>(chunk.tokens, key_width, value_width / F::PER_WORD, rows_of(grads), state.factor.turned, key_width,
                           result, key_width, false, &ahead);
                if (with_gate) {
                    load_queries(chunk, reader);
                    for (long i = 0; i < chunk.tokens; i++)
                        reads_grad[i] += decay.reads[i] * dot(queries.row(i), result + i * key_width, key_width);
                }
                product_of_lower<F>(chunk.tokens, key_width, dweights.rows, CHUNK / F::PER_WORD, keys.stacked, key_width,
                                    result, key_width, Keep(decay.reads), &ahead);
                store_tile(call.dq, row, head * readers + reader, chunk, call.key_dim, result, key_width);
            }
            if (with_gate) add_gate_grad(chunk, reads_grad, true);
            write(chunk);
        }
    }

    // dk and dv of a chunk, and the gradient of the state before it; that of the gate if the state before it is given.
    void key_value_grad_of(const Range &chunk, const float *before) {
        find_decay(chunk);
        load_keys(chunk), load_values(chunk);
        keys.turn(), values.turn();
        dstate.read_rows(), dstate.factor.stack(), dstate.factor.turn();
        product<F>(chunk.tokens, key_width, value_width / F::PER_WORD, rows_of(values), dstate.factor.turned, key_width,
                   dkeys, key_width, false, &ahead);
        product<F>(chunk.tokens, value_width, key_width / F::PER_WORD, rows_of(keys), dstate.factor.stacked, value_width,
                   dvalues, value_width, false, &ahead);
        float gate_grad[CHUNK] = {};
        if (before != nullptr) find_write_grads(chunk, before, gate_grad);
        Keep keep = dstate.decay(decay), written(decay.writes);
        for (long reader = 0; reader < readers; reader++) {
            load_queries(chunk, reader), load_grads(chunk, reader);
            queries.stack();
            add_reads(chunk, keep);
            find_scores(chunk);
            find_score_grads(chunk);
            if (before != nullptr) add_pair_grads(chunk, gate_grad);
            dweights.set_product(dscores, decay.pairs, chunk.tokens);
            weights.stack(), dweights.stack();
            product_of_lower_transposed<F>(chunk.tokens, value_width, weights.stacked, CHUNK, grads.stacked, value_width,
                                           dvalues, value_width, written, &ahead);
            product_of_lower_transposed<F>(chunk.tokens, key_width, dweights.stacked, CHUNK, queries.stacked, key_width,
                                           dkeys, key_width, written, &ahead);
            keep = written = true;
        }
        store_tile(call.dk, row, head, chunk, call.key_dim, dkeys, key_width);
        store_tile(call.dv, row, head, chunk, call.value_dim, dvalues, value_width);
        if (before != nullptr) add_gate_grad(chunk, gate_grad, false);
    }

    // The gate at t acts on what tokens before it write to the end state, and on the part of the start state that is
    // kept in it.
    void find_write_grads(const Range &chunk, const float *before, float *gate_grad) const {
        double kept = 0, sum_before = 0;
        if (!decay.restarts)
            for (long i = 0; i < key_width; i++) kept += dstate.dot_row(i, before);
        kept *= decay.total_keeps;
        for (long t = 0; t < chunk.tokens; t++) {
            gate_grad[t] = float(kept + sum_before);
            sum_before += decay.writes[t] * dot(keys.row(t), dkeys + t * key_width, key_width);
        }
    }

    void add_pair_grads(const Range &chunk, float *gate_grad) {
        for (long i = 0; i < chunk.tokens * CHUNK; i += LANES)
            store(pair_grads + i, load(dscores + i) * load(weights.row(0) + i));
        add_pair_gate_grads(pair_grads, chunk.tokens, gate_grad);
    }

    // Add a chunk's gradient to the gate's; `reads`: it is of reads of the start state, which the gates up to each act on.
    void add_gate_grad(const Range &chunk, const float *gate_grad, bool reads) {
        float total[CHUNK];
        double running = 0;
        for (long t = chunk.tokens - 1; t >= 0; t--) total[t] = reads ? float(running += gate_grad[t]) : gate_grad[t];
        if (call.dgate_sum != nullptr) {
            double *sum = call.dgate_sum + (segment * call.rows + row) * call.heads + head;
            for (long t = 0; t < chunk.tokens; t++) *sum += total[t];
            return;
        }
        float before[CHUNK] = {};
        if (!reads) load_numbers(call.dgate, row, head, chunk, before);
        for (long t = 0; t < chunk.tokens; t++) total[t] += before[t];
        store_numbers(call.dgate, row, head, chunk, total);
    }
};

extern "C" {
int additive_summarize(const Call *call) { return ON_TASKS(Worker, *call, summarize); }
int additive_apply(const Call *call) { return ON_TASKS(Worker, *call, apply); }
int additive_summarize_grad(const Call *call) { return ON_TASKS(Worker, *call, summarize_grad); }
int additive_query_grad(const Call *call) { return ON_TASKS(Worker, *call, query_grad); }
int additive_key_value_grad(const Call *call) { return ON_TASKS(Worker, *call, key_value_grad); }
int additive_apply_grad(const Call *call) { return ON_TASKS(Worker, *call, apply_grad); }
}
