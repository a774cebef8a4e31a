// What linear recurrences share: chunks of segments, recurrent states, and tasks.
#pragma once
#include <vector>

#include "factors.h"
#include "threads.h"

constexpr long CHUNK = 64, CHUNKS_PER_BASE = 16;
constexpr double MIN_LOG_DECAY = -800, WRITES_PER_THREAD = 1 << 22;

struct Bounds {  // of a segment: its tokens, the number of documents that start in it, the index of the first start
    long begin, end, count, first;
};
struct Segments {
    long count;
    const Bounds *bounds;
    const long *starts;  // tokens

    // Tokens before this one do not reach a segment's end state.
    long last_start(long segment) const {
        const Bounds &of = bounds[segment];
        return of.count > 0 ? starts[of.first + of.count - 1] : of.begin;
    }
    // Tokens from this one on do not read a segment's start state.
    long first_start(long segment) const {
        const Bounds &of = bounds[segment];
        return of.count > 0 ? starts[of.first] : of.end;
    }
};

static inline IntVec lane_numbers() {
    IntVec x{};
    for (int lane = 0; lane < LANES; lane++) x[lane] = lane;
    return x;
}

struct Range {  // tokens of a chunk, and the documents that start in it
    long begin, tokens;
    const long *starts;
    long count;

    // Number the tokens by document, 0 before the first start.
    void number_documents(int32_t *documents) const {
        long next = 0;
        for (long i = 0; i < CHUNK; i++) {
            while (next < count && starts[next] <= begin + i) next++;
            documents[i] = int32_t(next);
        }
    }
};

// Of a vector of scores of token i, from token j on: those of tokens that it sees, 0 for the others.
static inline Vec visible(Vec x, const int32_t *documents, long i, long j) {
    IntVec of;
    std::memcpy(&of, documents + j, sizeof of);
    return (lane_numbers() + int32_t(j) <= int32_t(i)) & (of == documents[i]) ? x : Vec{};
}

static std::vector<Range> chunks_of(const Segments &segments, long segment) {
    const Bounds &of = segments.bounds[segment];
    const long *starts = segments.starts + of.first, *last = starts + of.count;
    std::vector<Range> chunks;
    for (long begin = of.begin; begin < of.end; begin += CHUNK) {
        const long tokens = std::min(CHUNK, of.end - begin);
        const long *next = std::lower_bound(starts, last, begin + tokens);
        chunks.push_back({begin, tokens, starts, next - starts});
        starts = next;
    }
    return chunks;
}

// A chunk's rows of one head, in a tile [CHUNK, width] of float32, with zeros after them.
static void load_tile(const Tensor &x, long row, long head, const Range &chunk, long dim, float *to, long width) {
    load_rows(x, row, head, chunk.begin, chunk.tokens, CHUNK, dim, to, width);
}
static void store_tile(const Tensor &x, long row, long head, const Range &chunk, long dim, const float *from,
                       long width) {
    store_rows(x, row, head, chunk.begin, chunk.tokens, dim, from, width);
}
static void load_numbers(const Tensor &x, long row, long head, const Range &chunk, float *to) {
    load_numbers(x, row, head, chunk.begin, chunk.tokens, CHUNK, to);
}
static void store_numbers(const Tensor &x, long row, long head, const Range &chunk, const float *from) {
    store_numbers(x, row, head, chunk.begin, chunk.tokens, from);
}

// A recurrent state [rows, width], kept * base + added, as in longctx/kernels/linear/running_state.py; a row has a decay.
class State {
    double *wide, *kept;
    float *base, *kept_now, *keeps;
    long chunks;

    void renew() {
        const long size = rows * width;
        for (long i = 0; i < size; i++) base[i] = float(wide[i]);
        std::memset(added, 0, size * sizeof(float));
        for (long i = 0; i < rows; i++) kept[i] = kept_now[i] = 1;
        chunks = 0;
    }

public:
    const long rows;
    long width;
    float *added;

    // `widest`: the largest width.
    State(Scratch &scratch, long rows, long widest)
        : wide(scratch.take<double>(rows * widest)), kept(scratch.take<double>(rows)), base(scratch.take(rows * widest)),
          kept_now(scratch.take(rows)), keeps(scratch.take(rows)), rows(rows), width(widest),
          added(scratch.take(rows * widest)) {}

    // Start from a matrix [from_rows, from_width], or from zero; with `identity`, columns from `identity` on hold one.
    void start(const float *from, long from_rows, long from_width, long identity = -1) {
        std::memset(wide, 0, rows * width * sizeof(double));
        if (from != nullptr)
            for (long i = 0; i < from_rows; i++)
                for (long d = 0; d < from_width; d++) wide[i * width + d] = from[i * from_width + d];
        if (identity >= 0)
            for (long i = 0; i < rows; i++) wide[i * width + identity + i] = 1;
        renew();
    }

    // Multiply by a chunk's decay. What the chunk writes is to be added to `added`, in a product that keeps what this
    // returns of it; where there is none, `added` is as it was.
    template <typename Decay> Keep decay(const Decay &by) {
        Keep keep(keeps);
        if (by.restarts) {
            std::memset(wide, 0, rows * width * sizeof(double));
            renew();
            keep = true;
        } else if (chunks == CHUNKS_PER_BASE) {
            for (long i = 0; i < rows; i++)
                for (long d = 0; d < width; d++)
                    wide[i * width + d] = wide[i * width + d] * kept[i] + added[i * width + d];
            renew();
            keep = true;
        }
        for (long i = 0; i < rows; i++) {
            const double of_row = by.restarts ? 0.0 : by.keeps(i);
            keeps[i] = float(of_row);
            kept_now[i] = float(kept[i] *= of_row);
        }
        chunks++;
        return keep;
    }

    // Decay `added` where no product that covers it does.
    void apply(Keep keep) {
        if (keep.factors == nullptr) return;
        for (long i = 0; i < rows; i++)
            for (long d = i * width; d < (i + 1) * width; d += LANES)
                store(added + d, load(added + d) * keep.factors[i]);
    }

    // The value's numbers, a vector of a row at a time: a copy, which the compiler may keep in registers.
    struct Value {
        const float *base, *added, *kept;
        Vec at(long row, long i) const { return load(base + i) * kept[row] + load(added + i); }
    };
    Value value() const { return {base, added, kept_now}; }
    void read(float *to) const {
        const Value of = value();
        for (long i = 0, n = width; i < rows; i++)
            for (long d = i * n; d < (i + 1) * n; d += LANES) store(to + d, of.at(i, d));
    }
    // Row i times that of a matrix of the same width.
    float dot_row(long i, const float *matrix) const {
        const Value of = value();
        Vec total{};
        for (long d = i * width; d < (i + 1) * width; d += LANES) total += of.at(i, d) * load(matrix + d);
        return sum(total);
    }
    // Write columns [first, first + to_width).
    void end(float *to, long to_rows, long to_width, long first = 0) const {
        const Value of = value();
        alignas(64) float numbers[LANES];
        for (long i = 0; i < to_rows; i++)
            for (long d = first / LANES * LANES; d < first + to_width; d += LANES) {
                store(numbers, of.at(i, i * width + d));
                for (long j = std::max(first, d); j < std::min(first + to_width, d + LANES); j++)
                    to[i * to_width + j - first] = numbers[j - d];
            }
    }
};

// A state, and its value as a factor of products.
template <typename F> struct StateFactor : State {
    Factor<F> factor;

    StateFactor(Scratch &scratch, long key_dim, long widest_value)
        : State(scratch, Factor<F>::width_of(key_dim), Factor<F>::width_of(widest_value)),
          factor(scratch, rows, widest_value, true) {}

    void set_width(long to) { width = factor.width = to; }
    void read_rows() {
        set_rows(factor, [of = value(), n = width](long i, long d) { return of.at(i, i * n + d); });
    }
    // As `read_rows` and `factor.stack`, but the rows are not kept.
    void read_stacked() {
        set_stacked_rows(factor, [of = value(), n = width](long i, long d) { return of.at(i, i * n + d); });
    }
};

// A worker's task: a state, of a segment, batch row and head, and the heads of tensors that it reads.
template <typename Call> class Task {
protected:
    const Call &call;
    const long readers;  // heads of queries per state, 1 where several states share a head
    long segment = 0, row = 0, head = 0;

    explicit Task(const Call &call) : call(call), readers(std::max(1L, call.q.heads / call.heads)) {}
    void set(long task) {
        segment = task / (call.rows * call.heads), row = task / call.heads % call.rows, head = task % call.heads;
    }
    // The head of x that this state reads, of those that several states share.
    long shared_head(const Tensor &x) const { return head / (call.heads / x.heads); }
    long reader_head(const Tensor &x, long reader) const {
        return x.heads < call.heads ? shared_head(x) : head * readers + reader;
    }
    long state_number() const { return (segment * call.rows + row) * call.heads + head; }
    long state_at() const { return state_number() * call.key_dim * call.value_dim; }
};

// Tasks of a call, one per segment, batch row and head, on threads that each make a Worker.
//
// Returns 0, or 1 if there was not enough memory.
template <typename Worker, typename Call> static int on_tasks(const Call &call, void (Worker::*pass)()) {
    std::atomic<long> next{0};
    const long tasks = call.segments.count * call.rows * call.heads;
    const double writes = double(call.rows) * call.heads * call.length * call.key_dim * call.value_dim;
    return on_threads(std::min({call.threads, tasks, 1 + long(writes / WRITES_PER_THREAD)}), [&] {
        Worker worker(call);
        for (long task; (task = next.fetch_add(1)) < tasks;) {
            worker.begin(task);
            (worker.*pass)();
        }
    });
}

// Whether all tensors of a call that are multiplied are bfloat16; those that it does not have are null.
template <typename Call> static bool has_pairs(const Call &call) {
    for (const Tensor *x : {&call.q, &call.k, &call.v, &call.dout})
        if (x->data != nullptr && !x->brain) return false;
    return true;
}

// A pass of a call by Worker<Pair> where it has pairs, and this CPU multiplies them, or by Worker<Single>.
#if defined(HAS_PAIRS)
#define ON_TASKS(Worker, call, pass) \
    (has_pairs(call) ? on_tasks(call, &Worker<Pair>::pass) : on_tasks(call, &Worker<Single>::pass))
#else
#define ON_TASKS(Worker, call, pass) on_tasks(call, &Worker<Single>::pass)
#endif
