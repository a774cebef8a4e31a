// What linear recurrences share: chunks of segments, decays per token and head, and recurrent states.
#pragma once
#include <vector>

#include "factors.h"

constexpr long CHUNK = 64, CHUNKS_PER_BASE = 16;
constexpr double MIN_LOG_DECAY = -800, WRITES_PER_THREAD = 1 << 22;

struct Segments {
    long count;
    const long *bounds;  // begin, end, number of documents that start, index of the first in `starts`
    const long *starts;  // tokens
};

struct Range {  // tokens of a chunk, and the documents that start in it
    long begin, tokens;
    const long *starts;
    long count;
};

static std::vector<Range> chunks_of(const Segments &segments, long segment) {
    const long *of = segments.bounds + 4 * segment;
    const long *starts = segments.starts + of[3], *last = starts + of[2];
    std::vector<Range> chunks;
    for (long begin = of[0]; begin < of[1]; begin += CHUNK) {
        const long tokens = std::min(CHUNK, of[1] - begin);
        const long *next = std::lower_bound(starts, last, begin + tokens);
        chunks.push_back({begin, tokens, starts, next - starts});
        starts = next;
    }
    return chunks;
}

// Log-decays [B, T, heads], strides in elements, token 0 where they are constant; data is null where nothing decays.
struct Gate {
    const float *data;
    long batch, token, head, heads;
};

// Decay factors of a chunk, as in longctx/kernels/linear/decay.py.
struct Decay {
    double sums[CHUNK];
    alignas(64) float reads[CHUNK], writes[CHUNK];
    float *pairs;  // [CHUNK, CHUNK], zero above the diagonal
    double keeps;
    bool restarts;
    bool is_constant = false;  // whether it is the decay of a full chunk without a start, with a constant gate

    void find(const Gate &gate, long row, long of_head, const Range &chunk) {
        const bool constant = (gate.data == nullptr || gate.token == 0) && chunk.tokens == CHUNK && chunk.count == 0;
        if (constant && is_constant) return;
        is_constant = constant;
        alignas(64) int documents[CHUNK];
        number_documents(chunk, documents);
        sum_gates(gate, row, of_head, chunk);
        const int last = documents[CHUNK - 1];
        const double total = sums[CHUNK - 1];
        restarts = chunk.count > 0;
        keeps = restarts ? 0.0 : std::exp(total);
        for (long i = 0; i < CHUNK; i += LANES) {
            const WideVec of_vec = *reinterpret_cast<const LooseWideVec *>(sums + i);
            store(reads + i, exp_of_negative(__builtin_convertvector(of_vec, Vec)));
            store(writes + i, exp_of_negative(__builtin_convertvector(total - of_vec, Vec)));
        }
        for (long i = 0; i < CHUNK; i++) {
            if (i >= chunk.tokens || documents[i] != 0) reads[i] = 0;
            if (i >= chunk.tokens || documents[i] != last) writes[i] = 0;
        }
        find_pairs(gate.data != nullptr, restarts ? documents : nullptr);
    }

private:
    static void number_documents(const Range &chunk, int *documents) {
        long next = 0;
        for (long i = 0; i < CHUNK; i++) {
            while (next < chunk.count && chunk.starts[next] <= chunk.begin + i) next++;
            documents[i] = int(next);
        }
    }

    void sum_gates(const Gate &gate, long row, long of_head, const Range &chunk) {
        double total = 0;
        for (long i = 0; i < CHUNK; i++) {
            if (gate.data != nullptr && i < chunk.tokens) {
                const float g = gate.data[row * gate.batch + (chunk.begin + i) * gate.token + of_head * gate.head];
                total += g < MIN_LOG_DECAY ? MIN_LOG_DECAY : g;
            }
            sums[i] = total;
        }
    }

    void find_pairs(bool decays, const int *documents) {
        IntVec lanes{};
        for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
        for (long i = 0; i < CHUNK; i++) {
            float *pairs_of_row = pairs + i * CHUNK;
            std::memset(pairs_of_row, 0, CHUNK * sizeof(float));
            for (long j = 0; j <= i; j += LANES) {
                Vec x = Vec{} + 1.0f;
                if (decays) {
                    const WideVec distance = sums[i] - *reinterpret_cast<const LooseWideVec *>(sums + j);
                    x = exp_of_negative(__builtin_convertvector(distance, Vec));
                }
                IntVec sees = lanes + int(j) <= int(i);
                if (documents != nullptr) sees &= *reinterpret_cast<const IntVec *>(documents + j) == documents[i];
                store(pairs_of_row + j, sees ? x : Vec{});
            }
        }
    }
};

// A recurrent state [rows, width], kept * base + added, as in longctx/kernels/linear/running_state.py.
class State {
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
    const long rows, width;
    float *added;

    State(Scratch &scratch, long rows, long width)
        : wide(scratch.take<double>(rows * width)), base(scratch.take(rows * width)), rows(rows), width(width),
          added(scratch.take(rows * width)) {}

    void start(const float *from, long from_rows, long from_width) {
        std::memset(wide, 0, rows * width * sizeof(double));
        if (from != nullptr)
            for (long i = 0; i < from_rows; i++)
                for (long d = 0; d < from_width; d++) wide[i * width + d] = from[i * from_width + d];
        renew();
    }

    // Multiply by a chunk's decay. What the chunk writes is to be added to `added`, in a product that keeps what this
    // returns of it.
    Keep decay(const Decay &by) {
        const long size = rows * width;
        Keep keep(float(by.keeps));
        if (by.restarts) {
            std::memset(wide, 0, size * sizeof(double));
            renew();
            keep = true;
        } else if (chunks == CHUNKS_PER_BASE) {
            for (long i = 0; i < size; i++) wide[i] = wide[i] * kept + added[i];
            renew();
            keep = true;
        }
        kept *= by.restarts ? 0.0 : by.keeps;
        chunks++;
        return keep;
    }

    // The value's numbers, a vector at a time: a copy, which the compiler may keep in registers.
    struct Value {
        const float *base, *added, kept;
        Vec at(long i) const { return load(base + i) * kept + load(added + i); }
    };
    Value value() const { return {base, added, float(kept)}; }
    void read(float *to) const {
        const Value of = value();
        for (long i = 0, size = rows * width; i < size; i += LANES) store(to + i, of.at(i));
    }
    float dot_row(long row, const float *x) const {
        const Value of = value();
        Vec total{};
        for (long d = 0; d < width; d += LANES) total += of.at(row * width + d) * load(x + d);
        return sum(total);
    }
    void end(float *to, long to_rows, long to_width) const {
        const Value of = value();
        for (long i = 0; i < to_rows; i++)
            for (long d = 0; d < to_width; d += LANES)
                store_first(to + i * to_width + d, of.at(i * width + d), to_width - d);
    }
};

// A state, and its value as a factor of products.
template <typename F> struct StateFactor : State {
    Factor<F> factor;

    StateFactor(Scratch &scratch, long key_dim, long value_dim)
        : State(scratch, Factor<F>::width_of(key_dim), Factor<F>::width_of(value_dim)),
          factor(scratch, rows, value_dim, true) {}

    void read_rows() {
        const Value of = value();
        Factor<F> to = factor;
        for (long i = 0, size = rows * width; i < size; i += LANES) to.set_vector(i, of.at(i));
    }
    // As `read_rows` and `factor.stack`, but the rows are not kept.
    void read_stacked() {
        const Value of = value();
        Factor<F> to = factor;
        for (long i = 0; i < to.height; i += F::PER_WORD)
            for (long d = 0; d < to.width; d += LANES) {
                const Vec first = of.at(i * to.width + d);
                to.set_stacked(i, d, first, F::PER_WORD == 2 ? of.at((i + 1) * to.width + d) : first);
            }
    }
};
