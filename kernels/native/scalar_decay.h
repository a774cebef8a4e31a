// Decay per head and token, per head, or none: a chunk's factors, as in longctx/kernels/linear/decay.py, and gradients.
#pragma once
#include "recurrence.h"

// Decay factors of a chunk. Log-decays are [B, T, heads], with a token stride of 0 where they are constant, or null.
struct ScalarFactors {
    double sums[CHUNK];
    alignas(64) float reads[CHUNK], writes[CHUNK];
    float *pairs;  // [CHUNK, CHUNK], zero above the diagonal
    double total_keeps;
    bool restarts;
    bool is_constant = false;  // whether it is the decay of a full chunk without a start, with a constant gate

    void find(const Tensor &gate, long row, long of_head, const Range &chunk) {
        const bool constant = (gate.data == nullptr || gate.token == 0) && chunk.tokens == CHUNK && chunk.count == 0;
        if (constant && is_constant) return;
        is_constant = constant;
        int32_t documents[CHUNK];
        chunk.number_documents(documents);
        sum_gates(gate, row, of_head, chunk);
        const int last = documents[CHUNK - 1];
        const double total = sums[CHUNK - 1];
        restarts = chunk.count > 0;
        total_keeps = restarts ? 0.0 : std::exp(total);
        for (long i = 0; i < CHUNK; i += LANES) {
            const WideVec of_vec = *reinterpret_cast<const LooseWideVec *>(sums + i);
            store(reads + i, exp_of_negative(__builtin_convertvector(of_vec, Vec)));
            store(writes + i, exp_of_negative(__builtin_convertvector(total - of_vec, Vec)));
        }
        for (long i = 0; i < CHUNK; i++) {
            if (i >= chunk.tokens || documents[i] != 0) reads[i] = 0;
            if (i >= chunk.tokens || documents[i] != last) writes[i] = 0;
        }
        find_pairs(gate.data != nullptr, documents);
    }

    double keeps(long) const { return total_keeps; }

private:
    void sum_gates(const Tensor &gate, long row, long of_head, const Range &chunk) {
        float gates[CHUNK] = {};
        if (gate.data != nullptr) load_numbers(gate, row, of_head, chunk, gates);
        double total = 0;
        for (long i = 0; i < CHUNK; i++) sums[i] = total += gates[i] < MIN_LOG_DECAY ? MIN_LOG_DECAY : gates[i];
    }

    void find_pairs(bool decays, const int32_t *documents) {
        for (long i = 0; i < CHUNK; i++) {
            float *pairs_of_row = pairs + i * CHUNK;
            std::memset(pairs_of_row, 0, CHUNK * sizeof(float));
            for (long j = 0; j <= i; j += LANES) {
                Vec x = Vec{} + 1.0f;
                if (decays) {
                    const WideVec distance = sums[i] - *reinterpret_cast<const LooseWideVec *>(sums + j);
                    x = exp_of_negative(__builtin_convertvector(distance, Vec));
                }
                store(pairs_of_row + j, visible(x, documents, i, j));
            }
        }
    }
};

// Add the gradients of log-decays from pairs (i, j), on which that of t acts if j < t <= i. `weights` [CHUNK, CHUNK] are the
// pairs times their gradients; what is above the diagonal does not count.
static void add_pair_gate_grads(const float *weights, long tokens, float *grads) {
    alignas(64) float of_writer[CHUNK] = {};  // per column j, the sum over the rows from t on
    for (long t = tokens - 1; t >= 0; t--) {
        Vec total{};
        for (long j = 0; j <= t; j += LANES) {
            const Vec x = load(of_writer + j) + load(weights + t * CHUNK + j);
            store(of_writer + j, x);
            total += lane_numbers() + int(j) < int(t) ? x : Vec{};
        }
        grads[t] += sum(total);
    }
}

// Decays of a chunk, with the interface of VectorDecay.
template <typename F> class ScalarDecay {
    const long width;  // of keys
    ScalarFactors factors;
    Tile<F> *keys = nullptr;
    float *weights;       // [CHUNK, CHUNK]: scores times their gradients, whose exponents have the log-decays
    alignas(64) float read_grads[CHUNK], write_grads[CHUNK];
    double kept_grad = 0;
    bool wants_grad = false;

public:
    bool restarts = false;

    ScalarDecay(Scratch &scratch, long key_width) : width(key_width), weights(scratch.take(CHUNK * CHUNK)) {
        factors.pairs = scratch.take(CHUNK * CHUNK);
    }

    void begin() { factors.is_constant = false; }

    // The factors of a chunk, whose keys are given.
    void find(const Tensor &gate, long row, long head, const Range &chunk, long, Tile<F> &of_keys) {
        keys = &of_keys;
        keys->round(), keys->turn();
        factors.find(gate, row, head, chunk);
        restarts = factors.restarts;
    }

    double keeps(long) const { return factors.total_keeps; }

    // Decays from the chunk's start to tokens, and from them to its end.
    struct Decays {
        const float *factors;
        Vec at(long token, long) const { return Vec{} + factors[token]; }
    };
    Decays read_decays() const { return {factors.reads}; }
    Decays write_decays() const { return {factors.writes}; }

    // pairs(x, keys) times a factor in `to` [CHUNK, CHUNK].
    void pairs(Tile<F> &x, float *to, float factor) const {
        if (&x != keys) x.round();  // keys have been
        product_to_lower<F>(CHUNK, width / F::PER_WORD, rows_of(x), keys->turned, CHUNK, to, CHUNK);
        apply_mask(to, factor);
    }

    // Gradients of a chunk begin with those of what it writes, by the keys, and of the state that it keeps.
    void start_grads(bool wants, const float *dwritten, const float *state, const State &dstate) {
        keys->stack();
        wants_grad = wants;
        if (!wants) return;
        std::memset(weights, 0, CHUNK * CHUNK * sizeof(float));
        for (long i = 0; i < CHUNK; i++) {
            write_grads[i] = dot(keys->exact + i * width, dwritten + i * width, width);
            read_grads[i] = 0;
        }
        kept_grad = 0;
        if (restarts) return;
        for (long i = 0; i < width; i++) kept_grad += dstate.dot_row(i, state);
        kept_grad *= factors.total_keeps;
    }

    // Rows x that read the state before the chunk have the gradient dx from there.
    void add_read_grads(const float *x, const float *dx) {
        if (!wants_grad) return;
        for (long i = 0; i < CHUNK; i++) read_grads[i] += dot(x + i * width, dx + i * width, width);
    }

    // Add gradients to dx and dkeys, for the gradient `d` of `scores`, which are pairs(x, keys) times a factor. Overwrites d.
    void add_pair_grads(Tile<F> &d, const float *scores, float factor, Tile<F> &x, float *dx, float *dkeys) {
        if (wants_grad)
            for (long i = 0; i < CHUNK; i++)
                for (long j = i * CHUNK; j <= i * CHUNK + i; j += LANES)
                    store(weights + j, load(weights + j) + load(d.exact + j) * load(scores + j));
        apply_mask(d.exact, factor);
        d.round();
        product_of_lower<F>(CHUNK, width, d.rows, CHUNK / F::PER_WORD, keys->stacked, width, dx, width);
        d.stack();
        if (&x != keys) x.stack();  // keys have been
        product_of_lower_transposed<F>(CHUNK, width, d.stacked, CHUNK, x.stacked, width, dkeys, width);
    }

    void finish_keys(float *) const {}

    // The log-decay at t acts on reads of the state from t on, on writes before t, on what is kept, and on the pairs
    // (i, j) with j < t <= i.
    void store_grads(const Tensor &dgate, long row, long head, const Range &chunk, long) {
        float grads[CHUNK];
        double before = kept_grad, after = 0;
        for (long t = 0; t < CHUNK; t++) grads[t] = float(before), before += write_grads[t];
        for (long t = CHUNK - 1; t >= 0; t--) grads[t] += float(after += read_grads[t]);
        add_pair_gate_grads(weights, CHUNK, grads);
        store_numbers(dgate, row, head, chunk, grads);
    }

private:
    // Vectors above the diagonal have what products left there.
    void apply_mask(float *x, float factor) const {
        for (long i = 0; i < CHUNK; i++)
            for (long j = 0; j < CHUNK; j += LANES) {
                float *const at = x + i * CHUNK + j;
                store(at, j <= i ? load(at) * load(factors.pairs + i * CHUNK + j) * factor : Vec{});
            }
    }
};
