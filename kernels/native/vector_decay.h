// Decay per channel, head and token: the decay factors of a chunk, as in longctx/kernels/linear/decay.py, and gradients.
//
// Pairs of tokens in different sub-blocks of 16 are products. Token i in the right half of a block and j in its left
// half decay from the middle and to it, by exponentials of sums of log-decays, at most 1: nothing overflows, however
// strong the decay. One such product is of the chunk's halves, two are of the halves' halves. Their rows stand together:
// `far` row r is token `reader_of(r)` of the right half, decayed from the middle, or `writer_of(r)` of the left, decayed
// to it; rows 0..31 are of the chunk, 32..47 of its first half, 48..63 of its second. Pairs of tokens in one sub-block
// decay token by token. All of it is in float32, of bfloat16 inputs too: the pairs of a sub-block are most of the work.
#pragma once
#include "recurrence.h"

template <typename F> class VectorDecay {
    static constexpr long SUB = 16, SUBS = CHUNK / SUB;
    static_assert(CHUNK == 4 * SUB, "three products of halves");
    struct Product {
        long first, size, row, column;  // far rows, and where their pairs are in the chunk
    };
    static constexpr Product PRODUCTS[3] = {{0, 32, 32, 0}, {32, 16, 16, 0}, {48, 16, 48, 32}};
    static long reader_of(long r) { return r < 2 * SUB ? r + 2 * SUB : r < 3 * SUB ? r - SUB : r; }
    static long writer_of(long r) { return r < 2 * SUB ? r : r < 3 * SUB ? r - 2 * SUB : r - SUB; }

    const long width;  // of keys
    int32_t documents[CHUNK];
    double *kept;                          // [K]
    float *gates, *decays;                 // [CHUNK, K]: log-decays, their exponentials
    float *reads, *writes;                 // [CHUNK, K]
    float *from_middle, *to_middle;        // [CHUNK, K], of far rows
    const float *keys;
    float *far_keys, *far_keys_turned;     // [CHUNK, K], [K, CHUNK]
    mutable float *far_rows;               // [CHUNK, K]
    float *far_dkeys, *far_dots;           // [CHUNK, K]: gradients of far_keys; far rows times their gradients
    float *far_result;                     // [CHUNK, K]
    float *read_dots, *written_dots;       // [CHUNK, K]: what reads and writes the state, times its gradient
    float *near_grads, *kept_grads;        // [CHUNK, K], [K]: of log-decays, from pairs in a sub-block, from the state
    bool wants_grad = false;

public:
    bool restarts = false;

    VectorDecay(Scratch &scratch, long key_width) : width(key_width) {
        kept = scratch.take<double>(width), kept_grads = scratch.take(width);
        for (float **x : {&gates, &decays, &reads, &writes, &from_middle, &to_middle, &far_keys, &far_keys_turned,
                          &far_rows, &far_dkeys, &far_dots, &far_result, &read_dots, &written_dots, &near_grads})
            *x = scratch.take(CHUNK * width);
    }

    void begin() {}

    // The factors of a chunk, whose keys are given.
    void find(const Tensor &gate, long row, long head, const Range &chunk, long key_dim, const Tile<F> &of_keys) {
        keys = of_keys.exact;
        load_tile(gate, row, head, chunk, key_dim, gates, width);
        restarts = chunk.count > 0;
        chunk.number_documents(documents);
        for (long d = 0; d < width; d += LANES) find_channels(d);
        for (long i = 0; i < CHUNK; i++) {
            if (i >= chunk.tokens || documents[i] != 0) std::memset(reads + i * width, 0, width * sizeof(float));
            if (i >= chunk.tokens || documents[i] != documents[CHUNK - 1]) std::memset(writes + i * width, 0, width * sizeof(float));
        }
        for (long r = 0; r < CHUNK; r++)
            multiply(keys + writer_of(r) * width, to_middle + r * width, far_keys + r * width);
        transpose(far_keys, CHUNK, width, far_keys_turned);
    }

    double keeps(long channel) const { return kept[channel]; }

    // Decays from the chunk's start to tokens, and from them to its end; of channels from d on.
    struct Decays {
        const float *factors;
        long width;
        Vec at(long token, long d) const { return load(factors + token * width + d); }
    };
    Decays read_decays() const { return {reads, width}; }
    Decays write_decays() const { return {writes, width}; }

    // pairs(x, keys) times a factor in `to` [CHUNK, CHUNK].
    void pairs(const Tile<F> &of_x, float *to, float factor) const {
        const float *x = of_x.exact;
        find_far_rows(x);
        std::memset(to, 0, CHUNK * CHUNK * sizeof(float));
        for (const Product &p : PRODUCTS)
            product(p.size, p.size, width, rows_of(far_rows + p.first * width, width), far_keys_turned + p.first, CHUNK,
                    to + p.row * CHUNK + p.column, CHUNK, false);
        for (long first = 0; first < CHUNK; first += SUB) find_near_pairs(x, first, to);
        apply_mask(to, factor);
    }

    // Gradients of a chunk begin with those of what it writes, by the keys, and of the state that it keeps.
    void start_grads(bool wants, const float *dwritten, const float *state, const State &dstate) {
        wants_grad = wants;
        std::memset(far_dkeys, 0, CHUNK * width * sizeof(float));
        if (!wants) return;
        for (float *x : {far_dots, read_dots, near_grads}) std::memset(x, 0, CHUNK * width * sizeof(float));
        for (long i = 0; i < CHUNK * width; i += LANES) store(written_dots + i, load(keys + i) * load(dwritten + i));
        for (long i = 0; i < width; i++)
            kept_grads[i] = restarts ? 0.0f : float(kept[i]) * dstate.dot_row(i, state);
    }

    // Rows x that read the state before the chunk have the gradient dx from there.
    void add_read_grads(const float *x, const float *dx) {
        if (wants_grad) add_products(x, dx, read_dots);
    }

    // Add gradients to dx and dkeys, for the gradient `d` of pairs(x, keys) times a factor. Overwrites d.
    void add_pair_grads(const Tile<F> &of_d, const float *, float factor, const Tile<F> &of_x, float *dx,
                        float *dkeys) {
        float *d = of_d.exact;
        const float *x = of_x.exact;
        apply_mask(d, factor);
        find_far_rows(x);
        for (const Product &p : PRODUCTS) {
            const float *of_block = d + p.row * CHUNK + p.column;
            const long at = p.first * width;
            product(p.size, width, p.size, rows_of(of_block, CHUNK), far_keys + at, width, far_result + at, width,
                    false);
            product(p.size, width, p.size, columns_of(of_block, CHUNK), far_rows + at, width, far_dkeys + at, width,
                    true);
        }
        if (wants_grad) add_products(far_rows, far_result, far_dots);
        for (long r = 0; r < CHUNK; r++)
            multiply_add(far_result + r * width, from_middle + r * width, dx + reader_of(r) * width);
        for (long first = 0; first < CHUNK; first += SUB)
            for (long channel = 0; channel < width; channel += LANES) add_near_grads(d, first, channel, x, dx, dkeys);
    }

    // Add what is left of the gradient of keys.
    void finish_keys(float *dkeys) const {
        for (long r = 0; r < CHUNK; r++)
            multiply_add(far_dkeys + r * width, to_middle + r * width, dkeys + writer_of(r) * width);
    }

    // The log-decay at t acts on reads of the state from t on, on writes before t, on what is kept, and on pairs around t:
    // of halves, those that are read from t on, in the right one, or are written before t, in the left one.
    void store_grads(const Tensor &dgate, long row, long head, const Range &chunk, long key_dim) {
        for (long channel = 0; channel < width; channel += LANES) {
            Vec before = load(kept_grads + channel), after{};
            for (long t = 0; t < CHUNK; t++) {
                float *at = near_grads + t * width + channel;
                store(at, load(at) + before);
                before += load(written_dots + t * width + channel);
            }
            for (long t = CHUNK - 1; t >= 0; t--) {
                float *at = near_grads + t * width + channel;
                after += load(read_dots + t * width + channel);
                store(at, load(at) + after);
            }
            for (const Product &p : PRODUCTS) {
                before = after = Vec{};
                for (long r = p.first; r < p.first + p.size; r++) {
                    float *at = near_grads + writer_of(r) * width + channel;
                    store(at, load(at) + before);
                    before += load(far_keys + r * width + channel) * load(far_dkeys + r * width + channel);
                }
                for (long r = p.first + p.size - 1; r >= p.first; r--) {
                    float *at = near_grads + reader_of(r) * width + channel;
                    after += load(far_dots + r * width + channel);
                    store(at, load(at) + after);
                }
            }
        }
        store_tile(dgate, row, head, chunk, key_dim, near_grads, width);
    }

private:
    void multiply(const float *x, const float *y, float *to) const {
        for (long d = 0; d < width; d += LANES) store(to + d, load(x + d) * load(y + d));
    }
    void multiply_add(const float *x, const float *y, float *to) const {
        for (long d = 0; d < width; d += LANES) store(to + d, load(to + d) + load(x + d) * load(y + d));
    }
    void add_products(const float *x, const float *y, float *to) const {
        for (long i = 0; i < CHUNK; i++) multiply_add(x + i * width, y + i * width, to + i * width);
    }

    void find_far_rows(const float *x) const {
        for (long r = 0; r < CHUNK; r++)
            multiply(x + reader_of(r) * width, from_middle + r * width, far_rows + r * width);
    }

    // All factors of a vector of channels. Sums are of log-decays of one sub-block, by additions only; further factors
    // multiply, which loses nothing that is not 0 anyway.
    void find_channels(long channel) {
        Vec to_token[CHUNK], to_end[CHUNK], totals[SUBS];
        WideVec total{};
        for (long first = 0; first < CHUNK; first += SUB) {
            Vec sum{};
            for (long i = first; i < first + SUB; i++) {
                float *at = gates + i * width + channel;
                const Vec lowest = Vec{} + float(MIN_LOG_DECAY), g = load(at) < lowest ? lowest : load(at);
                store(at, g);
                store(decays + i * width + channel, exp_of_negative(g));
                total += __builtin_convertvector(g, WideVec);
                sum += g;
                to_token[i] = exp_of_negative(sum);
            }
            totals[first / SUB] = to_token[first + SUB - 1];
            sum = Vec{};
            for (long i = first + SUB - 1; i >= first; i--) {
                to_end[i] = exp_of_negative(sum);
                sum += load(gates + i * width + channel);
            }
        }
        for (int lane = 0; lane < LANES; lane++) kept[channel + lane] = restarts ? 0.0 : std::exp(total[lane]);
        for (long r = 0; r < CHUNK; r++) {
            const long reader = reader_of(r), writer = writer_of(r);
            const bool over_three = r < 2 * SUB && reader >= 3 * SUB, over_one = r < SUB;
            store(from_middle + r * width + channel, over_three ? to_token[reader] * totals[2] : to_token[reader]);
            store(to_middle + r * width + channel, over_one ? to_end[writer] * totals[1] : to_end[writer]);
        }
        Vec before = Vec{} + 1.0f, after = Vec{} + 1.0f;
        for (long sub = 0; sub < SUBS; sub++) {
            for (long i = sub * SUB; i < (sub + 1) * SUB; i++) store(reads + i * width + channel, to_token[i] * before);
            before = before * totals[sub];
        }
        for (long sub = SUBS - 1; sub >= 0; sub--) {
            for (long i = sub * SUB; i < (sub + 1) * SUB; i++) store(writes + i * width + channel, to_end[i] * after);
            after = after * totals[sub];
        }
    }

    // Pairs of tokens in a sub-block. A key decays token by token; the sums of a key's pairs are added up together.
    void find_near_pairs(const float *x, long first, float *to) const {
        for (long j = 0; j < SUB; j++) {
            Vec sums[SUB] = {};
            for (long d = first * width; d < (first + 1) * width; d += LANES) {
                Vec key = load(keys + j * width + d);
                sums[j] += key * load(x + j * width + d);
                for (long i = j + 1; i < SUB; i++) {
                    key *= load(decays + i * width + d);
                    sums[i] += key * load(x + i * width + d);
                }
            }
            for (long i = j; i < SUB; i++) to[(first + i) * CHUNK + first + j] = sum(sums[i]);
        }
    }

    // The gradients of such pairs: in row i, `key` is the sum of the keys before a token, decayed to it, each times the
    // gradient of its pair, and `to_row` the decay from that token on.
    void add_near_grads(const float *d, long first, long channel, const float *x, float *dx, float *dkeys) {
        const long start = first * width + channel;
        Vec of_keys[SUB], of_decays[SUB], key_grads[SUB], gate_grads[SUB] = {};
        for (long i = 0; i < SUB; i++) {
            of_keys[i] = load(keys + start + i * width), of_decays[i] = load(decays + start + i * width);
            key_grads[i] = load(dkeys + start + i * width);
        }
        for (long i = 0; i < SUB; i++) {
            const float *of_row = d + (first + i) * CHUNK + first;
            const Vec row = load(x + start + i * width);
            Vec to_row[SUB + 1], key{};
            to_row[i] = Vec{} + 1.0f;
            for (long t = i; t > 0; t--) to_row[t - 1] = to_row[t] * of_decays[t];
            for (long j = 0; j < i; j++) {
                key_grads[j] += row * of_row[j] * to_row[j];
                key = (key + of_keys[j] * of_row[j]) * of_decays[j + 1];
                gate_grads[j + 1] += row * key * to_row[j + 1];
            }
            key_grads[i] += row * of_row[i];
            float *at = dx + start + i * width;
            store(at, load(at) + key + of_keys[i] * of_row[i]);
        }
        for (long i = 0; i < SUB; i++) {
            store(dkeys + start + i * width, key_grads[i]);
            float *at = near_grads + start + i * width;
            if (wants_grad) store(at, load(at) + gate_grads[i]);
        }
    }

    // Vectors above the diagonal have what products left there.
    void apply_mask(float *x, float factor) const {
        for (long i = 0; i < CHUNK; i++)
            for (long j = 0; j < CHUNK; j += LANES)
                store(x + i * CHUNK + j, visible(load(x + i * CHUNK + j) * factor, documents, i, j));
    }
};
