// Additive recurrence on CPUs, with a decay per head and token, per head, or none: the passes of
// longctx/kernels/linear/additive/chunked.py, whose docstring has the equations. One task per segment, batch row and
// head; sums and states in float32, over thousands of chunks in float64 (longctx/kernels/linear/running_state.py).
//
// Called by longctx/kernels/linear/additive/native.py, which mirrors `Tensor` and `Call`.
#include "threads.h"
#include "tiles.h"

constexpr long CHUNK = 64, CHUNKS_PER_BASE = 16, CHUNKS_PER_CHECKPOINT = 16;
constexpr double MIN_LOG_DECAY = -800, WRITES_PER_THREAD = 1 << 22;

struct Tensor {  // [B, T, heads, D] with D contiguous; strides in elements
    void *data;
    long brain, batch, token, head, heads;
};

struct Call {
    long rows, length, heads, key_dim, value_dim, threads;
    Tensor q, k, v, dout, out, dq, dk, dv;
    const float *gate;  // log-decays [B, T, gate_heads], strides 0 where they are constant; null: none
    long gate_batch, gate_token, gate_head, gate_heads;
    float *dgate;              // [B, T, H]
    double *dgate_sum;         // [N, B, H], of a constant gate
    long segment_count;        // N
    const long *segments;      // begin, end, number of documents that start, index of the first in `starts`
    const long *starts;        // tokens
    const float *states;       // [N, B, H, K, V], before the segments; null: zero
    float *ends;               // after them
    const float *dends;        // gradients of `ends`; null: zero
    float *dstates;            // of `states`
};

struct Range {  // tokens of a chunk, and the documents that start in it
    long begin, tokens;
    const long *starts;
    long count;
};

static std::vector<Range> chunks_of(const Call &call, long segment) {
    const long *of = call.segments + 4 * segment;
    const long *starts = call.starts + of[3], *last = starts + of[2];
    std::vector<Range> chunks;
    for (long begin = of[0]; begin < of[1]; begin += CHUNK) {
        const long tokens = std::min(CHUNK, of[1] - begin);
        const long *next = std::lower_bound(starts, last, begin + tokens);
        chunks.push_back({begin, tokens, starts, next - starts});
        starts = next;
    }
    return chunks;
}

// Decay factors of a chunk, as in longctx/kernels/linear/decay.py.
struct Decay {
    double sums[CHUNK];
    alignas(64) float reads[CHUNK], writes[CHUNK];
    float *pairs;  // [CHUNK, CHUNK], zero above the diagonal in the blocks that products read
    double keeps;
    bool restarts;
    bool is_constant = false;  // whether it is the decay of a full chunk without a start, with a constant gate

    void find(const Call &call, long row, long head, const Range &chunk) {
        const bool constant = (call.gate == nullptr || call.gate_token == 0) && chunk.tokens == CHUNK && chunk.count == 0;
        if (constant && is_constant) return;
        is_constant = constant;
        int documents[CHUNK];
        number_documents(chunk, documents);
        sum_gates(call, row, head, chunk);
        const int last = documents[CHUNK - 1];
        const double total = sums[CHUNK - 1];
        restarts = chunk.count > 0;
        keeps = restarts ? 0.0 : std::exp(total);
        for (long i = 0; i < CHUNK; i++) {
            const bool inside = i < chunk.tokens;
            reads[i] = inside && documents[i] == 0 ? float(std::exp(sums[i])) : 0.0f;
            writes[i] = inside && documents[i] == last ? float(std::exp(total - sums[i])) : 0.0f;
        }
        find_pairs(call.gate != nullptr, documents);
    }

private:
    static void number_documents(const Range &chunk, int *documents) {
        long next = 0;
        for (long i = 0; i < CHUNK; i++) {
            while (next < chunk.count && chunk.starts[next] <= chunk.begin + i) next++;
            documents[i] = int(next);
        }
    }

    void sum_gates(const Call &call, long row, long head, const Range &chunk) {
        double total = 0;
        for (long i = 0; i < CHUNK; i++) {
            if (call.gate != nullptr && i < chunk.tokens) {
                const long shared = head / (call.heads / call.gate_heads);
                const float g = call.gate[row * call.gate_batch + (chunk.begin + i) * call.gate_token + shared * call.gate_head];
                total += g < MIN_LOG_DECAY ? MIN_LOG_DECAY : g;
            }
            sums[i] = total;
        }
    }

    void find_pairs(bool decays, const int *documents) {
        for (long i = 0; i < CHUNK; i++) {
            float *pairs_of_row = pairs + i * CHUNK;
            std::memset(pairs_of_row, 0, CHUNK * sizeof(float));
            for (long j = 0; j <= i; j += LANES) {
                Vec x = Vec{} + 1.0f;
                if (decays) {
                    const WideVec distance = sums[i] - *reinterpret_cast<const LooseWideVec *>(sums + j);
                    x = exp_of_negative(__builtin_convertvector(distance, Vec));
                }
                store(pairs_of_row + j, x);
            }
            for (long j = 0; j < CHUNK; j++)
                if (j > i || documents[j] != documents[i]) pairs_of_row[j] = 0;
        }
    }
};

// A recurrent state [rows, width], kept * base + added, as in longctx/kernels/linear/running_state.py.
class State {
    long rows, width;
    double *wide, kept;
    float *base;
    long chunks;

    void renew() {
        const long size = rows * width;
        for (long i = 0; i < size; i++) base[i] = float(wide[i]);
        std::memset(added, 0, size * sizeof(float));
        kept = 1, chunks = 0;
    }

public:
    float *added, *value;

    State(Scratch &scratch, long rows, long width)
        : rows(rows), width(width), wide(scratch.take<double>(rows * width)), base(scratch.take(rows * width)),
          added(scratch.take(rows * width)), value(scratch.take(rows * width)) {}

    void start(const float *from, long from_rows, long from_width) {
        std::memset(wide, 0, rows * width * sizeof(double));
        if (from != nullptr)
            for (long i = 0; i < from_rows; i++)
                for (long d = 0; d < from_width; d++) wide[i * width + d] = from[i * from_width + d];
        renew();
        read();
    }

    // Multiply by a chunk's decay; what the chunk writes is to be added to `added`.
    void decay(const Decay &by) {
        const long size = rows * width;
        if (by.restarts) {
            std::memset(wide, 0, size * sizeof(double));
            renew();
        } else if (chunks == CHUNKS_PER_BASE) {
            for (long i = 0; i < size; i++) wide[i] = wide[i] * kept + added[i];
            renew();
        } else if (by.keeps != 1.0) {
            const float keeps = float(by.keeps);
            for (long i = 0; i < size; i += LANES) store(added + i, load(added + i) * keeps);
        }
        kept *= by.restarts ? 0.0 : by.keeps;
        chunks++;
    }

    // Compute `value`.
    void read() {
        const float factor = float(kept);
        for (long i = 0; i < rows * width; i += LANES) store(value + i, load(base + i) * factor + load(added + i));
    }

    void end(float *to, long to_rows, long to_width) const {
        for (long i = 0; i < to_rows; i++)
            for (long d = 0; d < to_width; d++) to[i * to_width + d] = value[i * width + d];
    }
};

// Buffers of a thread and the passes of its tasks.
class Worker {
    const Call &call;
    const long key_width, value_width, readers;
    Scratch scratch;
    State state, dstate;
    float *keys, *values, *queries, *grads;         // [CHUNK, D], as they are
    float *written, *read;                          // keys times writes, queries times reads
    float *keys_turned, *values_turned;             // [D, CHUNK]
    float *state_turned;                            // [V, K]
    float *scores, *dscores, *weights, *weights_turned;  // [CHUNK, CHUNK]
    float *result, *dkeys, *dvalues;
    float *starts_of_chunks = nullptr, *checkpoints = nullptr;
    Decay decay;
    long segment = 0, row = 0, head = 0;

    long state_size() const { return key_width * value_width; }

    template <typename Element>
    static void copy_in(const Element *from, long stride, long tokens, long dim, long width, float *to) {
        for (long i = 0; i < tokens; i++)
            for (long d = 0; d < dim; d += LANES) store(to + i * width + d, load_first(from + i * stride + d, dim - d));
        std::memset(to + tokens * width, 0, (CHUNK - tokens) * width * sizeof(float));
    }

    template <typename Element>
    static void copy_out(const float *from, long width, long tokens, long dim, Element *to, long stride) {
        for (long i = 0; i < tokens; i++)
            for (long d = 0; d < dim; d += LANES) store_first(to + i * stride + d, load(from + i * width + d), dim - d);
    }

    void load_tile(const Tensor &x, long of_head, const Range &chunk, long dim, float *to) const {
        const long at = row * x.batch + chunk.begin * x.token + of_head * x.head;
        if (x.brain)
            copy_in(static_cast<const Brain *>(x.data) + at, x.token, chunk.tokens, dim, padded(dim), to);
        else
            copy_in(static_cast<const float *>(x.data) + at, x.token, chunk.tokens, dim, padded(dim), to);
    }

    void store_tile(const Tensor &x, long of_head, const Range &chunk, long dim, const float *from) const {
        const long at = row * x.batch + chunk.begin * x.token + of_head * x.head;
        if (x.brain)
            copy_out(from, padded(dim), chunk.tokens, dim, static_cast<Brain *>(x.data) + at, x.token);
        else
            copy_out(from, padded(dim), chunk.tokens, dim, static_cast<float *>(x.data) + at, x.token);
    }

    // The head of x that this task's state reads, of those that several states share.
    long shared_head(const Tensor &x) const { return head / (call.heads / x.heads); }
    long reader_head(const Tensor &x, long reader) const {
        return x.heads < call.heads ? shared_head(x) : head * readers + reader;
    }

    void load_keys_and_values(const Range &chunk) {
        load_tile(call.k, shared_head(call.k), chunk, call.key_dim, keys);
        load_tile(call.v, shared_head(call.v), chunk, call.value_dim, values);
        decay.find(call, row, head, chunk);
    }

    void scale_keys() {
        std::memcpy(written, keys, CHUNK * key_width * sizeof(float));
        scale_rows(CHUNK, key_width, written, decay.writes);
    }

    // Update the state from before a chunk, whose keys and values are loaded, to after it.
    void write() {
        scale_keys();
        state.decay(decay);
        product(key_width, value_width, CHUNK, columns_of(written, key_width), values, value_width, state.added, value_width, true);
        state.read();
    }

    void find_scores(const Range &chunk) {
        product_to_lower(chunk.tokens, key_width, rows_of(queries, key_width), keys_turned, CHUNK, scores, CHUNK);
        mask(chunk, scores, scores);
    }

    // dP, masked, in `dscores`; times P in `weights` if asked for.
    void find_score_grads(const Range &chunk, bool with_weights) {
        product_to_lower(chunk.tokens, value_width, rows_of(grads, value_width), values_turned, CHUNK, dscores, CHUNK);
        if (with_weights)
            for (long i = 0; i < chunk.tokens * CHUNK; i += LANES) store(weights + i, load(dscores + i) * load(scores + i));
        mask(chunk, dscores, dscores);
    }

    void mask(const Range &chunk, const float *from, float *to) const {
        for (long i = 0; i < chunk.tokens * CHUNK; i += LANES) store(to + i, load(from + i) * load(decay.pairs + i));
    }

    const float *first_state(const float *states) const { return states == nullptr ? nullptr : states + state_at(); }
    long state_at() const { return ((segment * call.rows + row) * call.heads + head) * call.key_dim * call.value_dim; }

    void clear_scores() {
        for (float *x : {scores, dscores, weights, weights_turned}) std::memset(x, 0, CHUNK * CHUNK * sizeof(float));
    }

public:
    explicit Worker(const Call &call)
        : call(call), key_width(padded(call.key_dim)), value_width(padded(call.value_dim)),
          readers(std::max(1L, call.q.heads / call.heads)), state(scratch, key_width, value_width),
          dstate(scratch, key_width, value_width) {
        for (float **x : {&keys, &queries, &written, &read, &keys_turned, &dkeys}) *x = scratch.take(CHUNK * key_width);
        for (float **x : {&values, &grads, &values_turned, &dvalues}) *x = scratch.take(CHUNK * value_width);
        for (float **x : {&scores, &dscores, &weights, &weights_turned, &decay.pairs}) *x = scratch.take(CHUNK * CHUNK);
        result = scratch.take(CHUNK * std::max(key_width, value_width));
        state_turned = scratch.take(state_size());
    }

    void begin(long task) {
        segment = task / (call.rows * call.heads), row = task / call.heads % call.rows, head = task % call.heads;
        decay.is_constant = false;
    }

    void apply() {
        state.start(first_state(call.states), call.key_dim, call.value_dim);
        for (const Range &chunk : chunks_of(call, segment)) {
            load_keys_and_values(chunk);
            transpose(keys, CHUNK, key_width, keys_turned);
            for (long reader = 0; reader < readers; reader++) {
                load_tile(call.q, reader_head(call.q, reader), chunk, call.key_dim, queries);
                find_scores(chunk);
                product(chunk.tokens, value_width, key_width, rows_of(queries, key_width), state.value, value_width, result, value_width, false);
                scale_rows(chunk.tokens, value_width, result, decay.reads);
                product_of_lower(chunk.tokens, value_width, scores, CHUNK, values, value_width, result, value_width);
                store_tile(call.out, head * readers + reader, chunk, call.value_dim, result);
            }
            write();
        }
        state.end(call.ends + state_at(), call.key_dim, call.value_dim);
    }

    // The state that a segment adds, from its last document's start on.
    void summarize() {
        state.start(nullptr, 0, 0);
        const long *of = call.segments + 4 * segment;
        const long live = of[2] > 0 ? call.starts[of[3] + of[2] - 1] : of[0];
        for (const Range &chunk : chunks_of(call, segment)) {
            if (chunk.begin + chunk.tokens <= live) continue;
            load_keys_and_values(chunk);
            write();
        }
        state.end(call.ends + state_at(), call.key_dim, call.value_dim);
    }

    // The gradient of a segment's start state, which tokens up to its first document's start read.
    void summarize_grad() {
        dstate.start(nullptr, 0, 0);
        const std::vector<Range> chunks = chunks_of(call, segment);
        const long *of = call.segments + 4 * segment;
        const long live = of[2] > 0 ? call.starts[of[3]] : of[1];
        for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); chunk++) {
            if (chunk->begin >= live) continue;
            decay.find(call, row, head, *chunk);
            dstate.decay(decay);
            for (long reader = 0; reader < readers; reader++) add_reads(*chunk, reader);
            dstate.read();
        }
        dstate.end(call.dstates + state_at(), call.key_dim, call.value_dim);
    }

    void query_grad() { query_grad_of(false); }

    void key_value_grad() {
        dstate.start(first_state(call.dends), call.key_dim, call.value_dim);
        const std::vector<Range> chunks = chunks_of(call, segment);
        for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); chunk++) key_value_grad_of(*chunk, nullptr);
        dstate.end(call.dstates + state_at(), call.key_dim, call.value_dim);
    }

    // All gradients, the gate's among them: a forward loop over states computes dq and keeps some states; the reverse
    // loop recomputes those of a block of chunks before it needs them.
    void apply_grad() {
        const std::vector<Range> chunks = chunks_of(call, segment);
        const long count = long(chunks.size()), blocks = (count + CHUNKS_PER_CHECKPOINT - 1) / CHUNKS_PER_CHECKPOINT;
        std::vector<float> kept(blocks * state_size());
        checkpoints = kept.data();
        if (starts_of_chunks == nullptr) starts_of_chunks = scratch.take(CHUNKS_PER_CHECKPOINT * state_size());
        query_grad_of(true);
        dstate.start(first_state(call.dends), call.key_dim, call.value_dim);
        for (long block = blocks - 1; block >= 0; block--) {
            const long first = block * CHUNKS_PER_CHECKPOINT, last = std::min(count, first + CHUNKS_PER_CHECKPOINT);
            state.start(checkpoints + block * state_size(), key_width, value_width);
            for (long i = first; i < last; i++) {
                std::memcpy(starts_of_chunks + (i - first) * state_size(), state.value, state_size() * sizeof(float));
                if (i + 1 < last) {
                    load_keys_and_values(chunks[i]);
                    write();
                }
            }
            for (long i = last - 1; i >= first; i--) key_value_grad_of(chunks[i], starts_of_chunks + (i - first) * state_size());
        }
        dstate.end(call.dstates + state_at(), call.key_dim, call.value_dim);
    }

private:
    void add_reads(const Range &chunk, long reader) {
        load_tile(call.q, reader_head(call.q, reader), chunk, call.key_dim, read);
        load_tile(call.dout, head * readers + reader, chunk, call.value_dim, grads);
        scale_rows(CHUNK, key_width, read, decay.reads);
        product(key_width, value_width, CHUNK, columns_of(read, key_width), grads, value_width, dstate.added, value_width, true);
    }

    void query_grad_of(bool with_gate) {
        state.start(first_state(call.states), call.key_dim, call.value_dim);
        long number = 0;
        for (const Range &chunk : chunks_of(call, segment)) {
            if (with_gate && number++ % CHUNKS_PER_CHECKPOINT == 0)
                std::memcpy(checkpoints + (number - 1) / CHUNKS_PER_CHECKPOINT * state_size(), state.value, state_size() * sizeof(float));
            load_keys_and_values(chunk);
            transpose(values, CHUNK, value_width, values_turned);
            transpose(state.value, key_width, value_width, state_turned);
            float reads_grad[CHUNK] = {};
            for (long reader = 0; reader < readers; reader++) {
                load_tile(call.dout, head * readers + reader, chunk, call.value_dim, grads);
                find_score_grads(chunk, false);
                product(chunk.tokens, key_width, value_width, rows_of(grads, value_width), state_turned, key_width, result, key_width, false);
                scale_rows(chunk.tokens, key_width, result, decay.reads);
                if (with_gate) {
                    load_tile(call.q, reader_head(call.q, reader), chunk, call.key_dim, queries);
                    for (long i = 0; i < chunk.tokens; i++) reads_grad[i] += dot(queries + i * key_width, result + i * key_width, key_width);
                }
                product_of_lower(chunk.tokens, key_width, dscores, CHUNK, keys, key_width, result, key_width);
                store_tile(call.dq, head * readers + reader, chunk, call.key_dim, result);
            }
            if (with_gate) add_gate_grad(chunk, reads_grad, true);
            write();
        }
    }

    // dk and dv of a chunk, and the gradient of the state before it; that of the gate if the state before it is given.
    void key_value_grad_of(const Range &chunk, const float *before) {
        load_keys_and_values(chunk);
        scale_keys();
        transpose(keys, CHUNK, key_width, keys_turned);
        transpose(values, CHUNK, value_width, values_turned);
        transpose(dstate.value, key_width, value_width, state_turned);
        product(chunk.tokens, key_width, value_width, rows_of(values, value_width), state_turned, key_width, dkeys, key_width, false);
        scale_rows(chunk.tokens, key_width, dkeys, decay.writes);
        product(chunk.tokens, value_width, key_width, rows_of(written, key_width), dstate.value, value_width, dvalues, value_width, false);
        float gate_grad[CHUNK] = {};
        if (before != nullptr) find_write_grads(chunk, before, gate_grad);
        dstate.decay(decay);
        for (long reader = 0; reader < readers; reader++) {
            add_reads(chunk, reader);
            load_tile(call.q, reader_head(call.q, reader), chunk, call.key_dim, queries);
            find_scores(chunk);
            find_score_grads(chunk, before != nullptr);
            product_of_lower_transposed(chunk.tokens, value_width, scores, CHUNK, grads, value_width, dvalues, value_width);
            product_of_lower_transposed(chunk.tokens, key_width, dscores, CHUNK, queries, key_width, dkeys, key_width);
            if (before != nullptr) add_pair_grads(chunk, gate_grad);
        }
        dstate.read();
        store_tile(call.dk, head, chunk, call.key_dim, dkeys);
        store_tile(call.dv, head, chunk, call.value_dim, dvalues);
        if (before != nullptr) add_gate_grad(chunk, gate_grad, false);
    }

    // The gate at t acts on what tokens before it write to the end state, and on the part of the start state that is
    // kept in it.
    void find_write_grads(const Range &chunk, const float *before, float *gate_grad) const {
        double kept = 0, sum_before = 0;
        if (!decay.restarts)
            for (long i = 0; i < key_width; i++) kept += dot(before + i * value_width, dstate.value + i * value_width, value_width);
        kept *= decay.keeps;
        for (long t = 0; t < chunk.tokens; t++) {
            gate_grad[t] = float(kept + sum_before);
            sum_before += dot(keys + t * key_width, dkeys + t * key_width, key_width);
        }
    }

    // ... and on the pairs (i, j) with j < t <= i.
    void add_pair_grads(const Range &chunk, float *gate_grad) {
        transpose(weights, CHUNK, CHUNK, weights_turned);
        alignas(64) float before[CHUNK] = {};  // per row i, the sum over j < t
        for (long t = 0; t < chunk.tokens; t++) {
            for (long i = t; i < chunk.tokens; i++) gate_grad[t] += before[i];
            for (long i = 0; i < CHUNK; i += LANES) store(before + i, load(before + i) + load(weights_turned + t * CHUNK + i));
        }
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
        for (long t = 0; t < chunk.tokens; t++) {
            float *at = call.dgate + (row * call.length + chunk.begin + t) * call.heads + head;
            *at = reads ? total[t] : *at + total[t];
        }
    }
};

// Returns 0, or 1 if there was not enough memory.
static int run(const Call &call, void (Worker::*pass)()) {
    std::atomic<long> next{0};
    const long tasks = call.segment_count * call.rows * call.heads;
    const double writes = double(call.rows) * call.heads * call.length * call.key_dim * call.value_dim;
    return on_threads(std::min({call.threads, tasks, 1 + long(writes / WRITES_PER_THREAD)}), [&] {
        Worker worker(call);
        for (long task; (task = next.fetch_add(1)) < tasks;) {
            worker.begin(task);
            (worker.*pass)();
        }
    });
}

extern "C" {
int additive_summarize(const Call *call) { return run(*call, &Worker::summarize); }
int additive_apply(const Call *call) { return run(*call, &Worker::apply); }
int additive_summarize_grad(const Call *call) { return run(*call, &Worker::summarize_grad); }
int additive_query_grad(const Call *call) { return run(*call, &Worker::query_grad); }
int additive_key_value_grad(const Call *call) { return run(*call, &Worker::key_value_grad); }
int additive_apply_grad(const Call *call) { return run(*call, &Worker::apply_grad); }
}
