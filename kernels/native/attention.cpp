// Block attention on CPUs: softmax(scale Q K^T) V over the keys [begin, end) that each query sees, with the log-sum-exp of
// each query, and its gradients from the global out and lse (longctx/kernels/attention/block.py). Grouped heads; any widths.
//
// q, k, v and do are all float32 or all bfloat16. Products of bfloat16 factors multiply bfloat16 where the CPU can
// (avx512_bf16), float32 elsewhere: weights and their gradients are rounded to bfloat16 for that. Sums are float32.
//
// Forward, a task is a block of queries of a head, and goes through the keys that these see with an online softmax.
// Backward, a task is a key head, and goes through its keys block by block, and for each through the queries that see
// it: 5 products, and sums whose order does not depend on the number of threads.
//
// Called by longctx/kernels/attention/native.py, which mirrors `Call`.
#include <limits>

#include "factors.h"
#include "threads.h"

constexpr long BLOCK = 64;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

struct Call {
    long batch, queries, keys, heads, key_heads, key_dim, value_dim, threads;
    float scale;
    Tensor q, k, v, out, dout;
    float *lse;                   // [batch, heads, queries]: the result, or the global one
    float *dq, *dk, *dv;          // contiguous [batch, tokens, heads, dim], dq zeros at first
    const int32_t *begin, *end;   // of the keys that each query sees
    long bounds_batch, bounds_head;
};

static inline Vec largest(Vec x, Vec y) { return x > y ? x : y; }
static inline float largest(Vec x) {
    float most = x[0];
    for (int lane = 1; lane < LANES; lane++) most = x[lane] > most ? x[lane] : most;
    return most;
}

static inline bool any(IntVec x) {
    int32_t found = 0;
    for (int lane = 0; lane < LANES; lane++) found |= x[lane];
    return found != 0;
}

// The keys that queries see; begin and end grow from query to query.
struct Bounds {
    const int32_t *begin, *end;

    Bounds(const Call &call, long row, long head)
        : begin(call.begin + row * call.bounds_batch + head * call.bounds_head),
          end(call.end + row * call.bounds_batch + head * call.bounds_head) {}

    // The keys that a block of queries sees between them.
    void of_block(long first, long count, long &low, long &high) const {
        low = std::numeric_limits<long>::max(), high = 0;
        for (long i = first; i < first + count; i++)
            if (begin[i] < end[i]) low = std::min<long>(low, begin[i]), high = std::max<long>(high, end[i]);
    }

    // The queries outside of which none sees one of these keys: found by halves, so that a window's work does not grow
    // with the square of the length.
    void readers(long queries, long key, long count, long &from, long &until) const {
        from = std::upper_bound(end, end + queries, key) - end;
        until = std::lower_bound(begin, begin + queries, key + count) - begin;
    }

    // Give scores of the keys from `first` on that a query does not see the value -inf; false if it sees none of them.
    bool mask(long query, long first, float *scores) const {
        const long low = begin[query] - first, high = end[query] - first;
        if (low >= high || high <= 0 || low >= BLOCK) return false;
        for (long j = 0; j < low; j++) scores[j] = NOTHING;
        for (long j = std::max(high, 0L); j < BLOCK; j++) scores[j] = NOTHING;
        return true;
    }
};

template <typename F> class Worker {
protected:
    const Call &call;
    Scratch scratch;
    Factor<F> queries, keys, values, weights;
    float *scores;
    const float factor;  // positive, so that -inf, for what is not seen, stays

    explicit Worker(const Call &call, bool turns_values)
        : call(call), queries(scratch, BLOCK, call.key_dim, false), keys(scratch, BLOCK, call.key_dim, true),
          values(scratch, BLOCK, call.value_dim, turns_values), weights(scratch, BLOCK, BLOCK, false),
          factor(call.scale > 0 ? call.scale : 1.0f) {
        scores = weights.numbers(scratch);
    }

    void load_keys(long row, long head, long first, long count) {
        keys.load_rows(call.k, row, head, first, count, call.key_dim);
        values.load_rows(call.v, row, head, first, count, call.value_dim);
        keys.turn();
    }

    // Rows of x times columns of y, both of `width` numbers, in `to` [count, BLOCK].
    static void multiply_turned(long count, const Factor<F> &x, const Factor<F> &y, float *to) {
        product<F>(count, BLOCK, x.width / F::PER_WORD, rows_of(x), y.turned, BLOCK, to, BLOCK, false);
    }

    // The products of queries and keys; scores are these times `factor`.
    void find_scores(long count) {
        multiply_turned(count, queries, keys, scores);
        if (factor == call.scale) return;
        for (long i = 0; i < count * BLOCK; i += LANES) store(scores + i, load(scores + i) * call.scale);
    }
};

template <typename F> class Forward : Worker<F> {
    using Base = Worker<F>;
    using Base::call, Base::scratch, Base::queries, Base::values, Base::weights, Base::scores, Base::factor;
    const long value_width;
    float *sums, most[BLOCK], weight[BLOCK];

    // Turn a row of scores into weights, relative to the largest score so far.
    void weigh(long i, float *row) {
        Vec of_row = Vec{} + NOTHING;
        IntVec unordered{};
        for (long j = 0; j < BLOCK; j += LANES) {
            const Vec x = load(row + j);
            of_row = largest(x, of_row);
            unordered |= x != x;
        }
        const float before = most[i];
        const float now = any(unordered) ? std::numeric_limits<float>::quiet_NaN() : std::max(before, largest(of_row) * factor);
        most[i] = now;
        if (now == NOTHING) {
            std::memset(row, 0, BLOCK * sizeof(float));
            return;
        }
        if (now != before) {
            const float kept = before == NOTHING ? 0.0f : std::exp(before - now);
            weight[i] *= kept;
            float *sum_of = sums + i * value_width;
            for (long d = 0; d < value_width; d += LANES) store(sum_of + d, load(sum_of + d) * kept);
        }
        Vec total{};
        for (long j = 0; j < BLOCK; j += LANES) {
            const Vec x = exp_of_negative(load(row + j) * factor - now);
            store(row + j, x);
            total += x;
        }
        weight[i] += sum(total);
    }

    template <typename T> void write(T *out, long i) const {
        const float factor = weight[i] == 0 ? 0.0f : 1.0f / weight[i];
        for (long d = 0; d < call.value_dim; d += LANES)
            store_first(out + d, load(sums + i * value_width + d) * factor, call.value_dim - d);
    }

public:
    explicit Forward(const Call &call) : Base(call, false), value_width(values.width) {
        sums = scratch.take(BLOCK * value_width);
    }

    static long tasks(const Call &call) { return call.batch * call.heads * ((call.queries + BLOCK - 1) / BLOCK); }

    void run(long task) {
        const long blocks = (call.queries + BLOCK - 1) / BLOCK, head = task / blocks % call.heads;
        const long row = task / blocks / call.heads, first = task % blocks * BLOCK;
        const long count = std::min(BLOCK, call.queries - first), key_head = head / (call.heads / call.key_heads);
        const Bounds bounds(call, row, head);
        queries.load_rows(call.q, row, head, first, count, call.key_dim);
        std::memset(sums, 0, BLOCK * value_width * sizeof(float));
        for (long i = 0; i < count; i++) most[i] = NOTHING, weight[i] = 0;
        long low, high;
        bounds.of_block(first, count, low, high);
        for (long at = low; at < high; at += BLOCK) {
            this->load_keys(row, key_head, at, std::min(BLOCK, high - at));
            values.stack();
            this->find_scores(count);
            for (long i = 0; i < count; i++) {
                float *of_query = scores + i * BLOCK;
                if (bounds.mask(first + i, at, of_query))
                    weigh(i, of_query);
                else
                    std::memset(of_query, 0, BLOCK * sizeof(float));
            }
            weights.set(scores);
            product<F>(count, value_width, BLOCK / F::PER_WORD, rows_of(weights), values.stacked, value_width, sums,
                       value_width, true);
        }
        for (long i = 0; i < count; i++) {
            const long to = row * call.out.batch + (first + i) * call.out.token + head * call.out.head;
            if (call.out.brain)
                write(static_cast<Brain *>(call.out.data) + to, i);
            else
                write(static_cast<float *>(call.out.data) + to, i);
            call.lse[(row * call.heads + head) * call.queries + first + i] =
                most[i] == NOTHING ? NOTHING : most[i] + std::log(weight[i]);
        }
    }
};

template <typename F> class Backward : Worker<F> {
    using Base = Worker<F>;
    using Base::call, Base::scratch, Base::queries, Base::keys, Base::values, Base::weights, Base::scores, Base::factor;
    const long key_width, value_width;
    Factor<F> grads, dweights;
    float *dscores, *dqueries, *dkeys, *dvalues;
    std::vector<float> means;  // of each reader and query, the sum of do times out

    void find_means(long row, long first_head, long readers) {
        Scratch own;
        Factor<Single> of_grads(own, BLOCK, call.value_dim, false), of_out(own, BLOCK, call.value_dim, false);
        const long width = of_out.width;
        means.resize(readers * call.queries);
        for (long reader = 0; reader < readers; reader++)
            for (long first = 0; first < call.queries; first += BLOCK) {
                const long count = std::min(BLOCK, call.queries - first);
                of_grads.load_rows(call.dout, row, first_head + reader, first, count, call.value_dim);
                of_out.load_rows(call.out, row, first_head + reader, first, count, call.value_dim);
                for (long i = 0; i < count; i++)
                    means[reader * call.queries + first + i] = dot(of_grads.rows + i * width, of_out.rows + i * width, width);
            }
    }

    // P in `scores`, dS in `dscores`, for scores and the gradients of weights.
    void differentiate(const Bounds &bounds, long first, long count, long at, const float *lse, const float *mean) {
        for (long i = 0; i < count; i++) {
            float *p = scores + i * BLOCK, *ds = dscores + i * BLOCK;
            if (lse[i] == NOTHING || !bounds.mask(first + i, at, p)) {
                std::memset(p, 0, BLOCK * sizeof(float));
                std::memset(ds, 0, BLOCK * sizeof(float));
                continue;
            }
            for (long j = 0; j < BLOCK; j += LANES) {
                const Vec score = load(p + j) * factor, below = score - lse[i];
                // A weight is at most 1, up to rounding; those of what a query does not see are 0, whatever the gradient.
                const Vec x = exp_of_negative(below > 0 ? Vec{} : below);
                store(p + j, x);
                store(ds + j, score == NOTHING ? Vec{} : x * (load(ds + j) - mean[i]));
            }
        }
    }

    void add_query_grads(long row, long head, long first, long count) {
        for (long i = 0; i < count; i++) {
            float *to = call.dq + ((row * call.queries + first + i) * call.heads + head) * call.key_dim;
            for (long d = 0; d < call.key_dim; d += LANES) {
                const long n = call.key_dim - d;
                store_first(to + d, load_first(to + d, n) + load(dqueries + i * key_width + d) * call.scale, n);
            }
        }
    }

    void write(const float *from, long width, long dim, float factor, float *to, long row, long head, long first,
               long count) const {
        for (long j = 0; j < count; j++) {
            float *of_key = to + ((row * call.keys + first + j) * call.key_heads + head) * dim;
            for (long d = 0; d < dim; d += LANES) store_first(of_key + d, load(from + j * width + d) * factor, dim - d);
        }
    }

public:
    explicit Backward(const Call &call)
        : Base(call, true), key_width(keys.width), value_width(values.width), grads(scratch, BLOCK, call.value_dim, false),
          dweights(scratch, BLOCK, BLOCK, false) {
        dvalues = scratch.take(BLOCK * value_width);
        for (float **x : {&dqueries, &dkeys}) *x = scratch.take(BLOCK * key_width);
        dscores = dweights.numbers(scratch);
    }

    static long tasks(const Call &call) { return call.batch * call.key_heads; }

    void run(long task) {
        const long row = task / call.key_heads, key_head = task % call.key_heads;
        const long readers = call.heads / call.key_heads, first_head = key_head * readers;
        find_means(row, first_head, readers);
        for (long at = 0; at < call.keys; at += BLOCK) {
            const long seen = std::min(BLOCK, call.keys - at);
            this->load_keys(row, key_head, at, seen);
            values.turn();
            keys.stack();
            std::memset(dkeys, 0, BLOCK * key_width * sizeof(float));
            std::memset(dvalues, 0, BLOCK * value_width * sizeof(float));
            for (long reader = 0; reader < readers; reader++) add_reader(row, first_head, reader, at, seen);
            write(dkeys, key_width, call.key_dim, call.scale, call.dk, row, key_head, at, seen);
            write(dvalues, value_width, call.value_dim, 1.0f, call.dv, row, key_head, at, seen);
        }
    }

private:
    void add_reader(long row, long first_head, long reader, long at, long seen) {
        const long head = first_head + reader;
        const Bounds bounds(call, row, head);
        const float *lse = call.lse + (row * call.heads + head) * call.queries, *mean = means.data() + reader * call.queries;
        long from, until;
        bounds.readers(call.queries, at, seen, from, until);
        for (long first = from / BLOCK * BLOCK; first < until; first += BLOCK) {
            const long count = std::min(BLOCK, call.queries - first);
            queries.load_rows(call.q, row, head, first, count, call.key_dim);
            grads.load_rows(call.dout, row, head, first, count, call.value_dim);
            queries.stack();
            grads.stack();
            this->find_scores(count);
            Base::multiply_turned(count, grads, values, dscores);
            differentiate(bounds, first, count, at, lse + first, mean + first);
            for (float *x : {scores, dscores})
                std::memset(x + count * BLOCK, 0, (BLOCK - count) * BLOCK * sizeof(float));
            weights.set(scores), weights.stack();
            dweights.set(dscores), dweights.stack();
            constexpr long words = BLOCK / F::PER_WORD;
            product<F>(seen, value_width, words, columns_of(weights), grads.stacked, value_width, dvalues,
                       value_width, true);
            product<F>(seen, key_width, words, columns_of(dweights), queries.stacked, key_width, dkeys, key_width, true);
            product<F>(count, key_width, words, rows_of(dweights), keys.stacked, key_width, dqueries, key_width, false);
            add_query_grads(row, head, first, count);
        }
    }
};

// Returns 0, or 1 if there was not enough memory.
template <typename Pass> static int run(const Call &call) {
    std::atomic<long> next{0};
    const long tasks = Pass::tasks(call);
    return on_threads(std::min(call.threads, tasks), [&] {
        Pass worker(call);
        for (long task; (task = next.fetch_add(1)) < tasks;) worker.run(task);
    });
}

template <template <typename> class Pass> static int run_in(const Call &call) {
#if defined(HAS_PAIRS)
    if (call.q.brain) return run<Pass<Pair>>(call);
#endif
    return run<Pass<Single>>(call);
}

// The products that the passes above consist of, again and again: the rate that they could reach.
struct Products {
    long rows, width, count, repeats, brain, threads;
};

template <typename F> static int multiply(const Products &call) {
    return on_threads(call.threads, [&] {
        Scratch scratch;
        const long words = call.count / F::PER_WORD;
        const auto *const a = scratch.take<typename F::Word>(call.rows * words);
        const auto *const b = scratch.take<typename F::Word>(words * call.width);
        float *const c = scratch.take(call.rows * call.width);
        for (long i = 0; i < call.repeats; i++)
            product<F>(call.rows, call.width, words, {a, words, 1}, b, call.width, c, call.width, true);
    });
}

extern "C" {
int attention_products(const Products *call) {
#if defined(HAS_PAIRS)
    if (call->brain) return multiply<Pair>(*call);
#endif
    return multiply<Single>(*call);
}
int attention_forward(const Call *call) { return run_in<Forward>(*call); }
int attention_backward(const Call *call) { return run_in<Backward>(*call); }
}
