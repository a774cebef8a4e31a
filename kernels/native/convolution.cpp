// Short causal convolution per channel: tokens of float32 or bfloat16, computed in float32, rounded once.
//
// The equations are those of longctx/kernels/convolution.py. Memory is read once and written once: GROUP tokens at a time
// share the rows that they see, and the gradients of the activation's inputs stay in cache until those of the tokens are
// computed from them. A token sees the rows of its document alone; the others are not read.
#include <type_traits>

#include "threads.h"
#include "vectors.h"

// Tokens [segment, batch, token, channel] with contiguous channels; without segments, the stride of those is 0.
struct Tokens {
    void *data;
    long segment, batch, token;
    template <typename T> T *at(long s, long b, long t) const {
        return static_cast<T *>(data) + s * segment + b * batch + t * token;
    }
};
struct Call {
    long batch, length, width, taps, brain, silu, threads, segment_count, start_count;
    const long *bounds;                      // begin and end of each segment
    const long *starts;                      // of documents, in all segments, ascending
    const float *weight, *bias;              // [width, taps] and [width], or null
    float *dweight, *dbias;                  // likewise
    Tokens x, before, out;                   // `before` has the taps - 1 tokens before each segment
    Tokens dout, dx, dbefore;
    long reach() const { return taps - 1; }
};

constexpr long GROUP = 4;                  // tokens that are computed together
constexpr long TASK_ELEMENTS = 1 << 17;    // at least, if there are as many
constexpr long TASK_WINDOWS = 32;          // likewise: the first window of a task is computed by the one before it too
constexpr long MOST_TASKS = 256;           // about: each has sums of its own
constexpr long CACHED_ELEMENTS = 1 << 13;  // gradients that are kept until they are used
constexpr long SUMMED_TOKENS = 128;        // at least, and a block of cached gradients: in float32, these sums in float64

// Tokens [begin, end) of a segment in a row of the batch.
struct Unit {
    long segment, row, begin, end;
};

// The units of all tasks. They depend on the shapes alone, so that sums do not depend on the number of threads.
struct Plan {
    std::vector<Unit> units;
    std::vector<long> tasks;  // the first unit of each, and the number of units
    Plan(const Call &call) {
        const long most = std::max(TASK_ELEMENTS / call.width, call.batch * call.length / MOST_TASKS);
        const long size = std::max(most, TASK_WINDOWS * call.taps);
        long filled = size;
        for (long s = 0; s < call.segment_count; s++)
            for (long row = 0; row < call.batch; row++) {
                long begin = call.bounds[2 * s];
                const long last = call.bounds[2 * s + 1];
                do {  // once for an empty segment
                    const long end = std::min(begin + size, last);
                    if (filled >= size) {
                        tasks.push_back(long(units.size()));
                        filled = 0;
                    }
                    units.push_back({s, row, begin, end});
                    filled += end - begin;
                    begin = end;
                } while (begin < last);
            }
        tasks.push_back(long(units.size()));
    }
    long count() const { return long(tasks.size()) - 1; }
};

// Calls make() on each thread, and its result with the units of each task, from the first to the one after the last, and
// the task's number.
template <typename Make> static int over_tasks(const Call &call, const Plan &plan, const Make &make) {
    std::atomic<long> next{0};
    const long useful = 1 + call.batch * call.length * call.width / TASK_ELEMENTS;
    return on_threads(std::min({call.threads, plan.count(), useful}), [&] {
        auto work = make();
        for (long task; (task = next.fetch_add(1)) < plan.count();)
            work(&plan.units[plan.tasks[task]], plan.units.data() + plan.tasks[task + 1], task);
    });
}

// The documents of a segment, one after the other; the first may have begun in the tokens before it.
class Documents {
    const long *next, *stop;
    long last;
    void find_end() { end = next < stop ? *next : last; }

public:
    long begin, end;
    Documents(const Call &call, long segment, long token) {
        const long first = call.bounds[2 * segment], *const starts = call.starts;
        last = call.bounds[2 * segment + 1];
        stop = std::lower_bound(starts, starts + call.start_count, last);
        next = std::upper_bound(starts, stop, std::max(token, first - 1));
        begin = next > starts && next[-1] >= first ? next[-1] : first - call.reach();
        find_end();
    }
    // Go on to the document of a token.
    void find(long token) {
        while (end <= token && next < stop) {
            begin = *next++;
            find_end();
        }
    }
};

// Rows [taps, width] of float32, each padded to whole vectors.
struct Filter {
    long taps, width;
    std::vector<float> numbers;
    Filter(const Call &call, bool reversed) : taps(call.taps), width(padded(call.width)), numbers(taps * width) {
        for (long i = 0; i < taps; i++)
            for (long c = 0; c < call.width; c++)
                numbers[(reversed ? taps - 1 - i : i) * width + c] = call.weight[c * taps + i];
    }
    const float *row(long tap) const { return numbers.data() + tap * width; }
};

// Calls each(j, n) with the n columns from j on: whole vectors, whose n is known to the compiler, and what remains.
template <typename Each> static inline void over_columns(long width, const Each &each) {
    long j = 0;
    for (; j + LANES <= width; j += LANES) each(j, std::integral_constant<long, LANES>{});
    if (j < width) each(j, width - j);
}

// What ROWS tokens see of n columns from j on: rows i to i + ROWS - 1 for tap i. TAPS is their number of taps, or 0 for
// any; what is known is loaded once.
template <int TAPS, int ROWS, typename T> class Window {
    const T *const *rows;
    long j, n;
    Vec loaded[TAPS ? TAPS + ROWS - 1 : 1];

public:
    inline __attribute__((always_inline)) Window(const T *const *rows, long j, long n) : rows(rows), j(j), n(n) {
        if (TAPS)
#pragma GCC unroll 8
            for (int i = 0; i < TAPS + ROWS - 1; i++) loaded[i] = load_first(rows[i] + j, n);
    }
    inline Vec operator[](long i) const { return TAPS ? loaded[i] : load_first(rows[i] + j, n); }
};

// The taps that `filter` has from `tap` on, times the window's rows.
template <int TAPS, int ROWS, typename T>
static inline __attribute__((always_inline)) void add_taps(Vec *sums, const Window<TAPS, ROWS, T> &window,
                                                           const float *filter, long width, long taps) {
#pragma GCC unroll 4
    for (long i = 0; i < (TAPS ? TAPS : taps); i++) {
        const Vec w = load(filter + i * width);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) sums[m] += w * window[m + i];
    }
}

// Fetch the rows of the next group, `stride` numbers after one another: a row is too short for the CPU to foresee it.
template <int ROWS, typename T> static inline void prefetch(const T *const *rows, long j, long stride) {
    if (ROWS == GROUP)
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) __builtin_prefetch(rows[m] + j + GROUP * stride);
}

// The `taps` that `filter` has from `tap` on, times ROWS x `taps` of the `rows`, which begin with those of the first token.
template <int TAPS, int ROWS, typename In, typename Out>
static void convolve(const Call &call, const In *const *rows, long ahead, const Filter &filter, long tap, long taps,
                     const float *bias, bool silu, Out *const *out) {
    over_columns(call.width, [&](long j, auto n) {
        prefetch<ROWS>(rows + taps - 1, j, ahead);
        Vec sums[ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) sums[m] = bias != nullptr ? load_first(bias + j, n) : Vec{};
        add_taps(sums, Window<TAPS, ROWS, In>(rows, j, n), filter.row(tap) + j, filter.width, taps);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) store_first(out[m] + j, silu ? sigmoid(sums[m]) * sums[m] : sums[m], n);
    });
}

// The gradients of the activation's inputs, and, unless `dweight` is null, their products with the rows, added to it, and
// they themselves, added to `dbias`.
template <int TAPS, int ROWS, typename T>
static void gradients(const Call &call, const T *const *rows, const Filter &filter, long tap, long taps,
                      const T *const *dout, float *const *out, float *dweight, float *dbias) {
    over_columns(call.width, [&](long j, auto n) {
        prefetch<ROWS>(rows + taps - 1, j, call.x.token);
        prefetch<ROWS>(dout, j, call.dout.token);
        const Window<TAPS, ROWS, T> window(rows, j, n);
        Vec g[ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) g[m] = load_first(dout[m] + j, n);
        if (call.silu) {
            Vec sums[ROWS];
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) sums[m] = call.bias != nullptr ? load_first(call.bias + j, n) : Vec{};
            add_taps(sums, window, filter.row(tap) + j, filter.width, taps);
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) {
                const Vec s = sigmoid(sums[m]), silu = s * sums[m];
                g[m] *= silu - silu * s + s;
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) store(out[m] + j, g[m]);
        if (dweight == nullptr) return;
        Vec total = load(dbias + j);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) total += g[m];
        store(dbias + j, total);
#pragma GCC unroll 4
        for (long i = 0; i < (TAPS ? TAPS : taps); i++) {
            float *const to = dweight + (tap + i) * filter.width + j;
            Vec product = load(to);
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) product += g[m] * window[m + i];
            store(to, product);
        }
    });
}

// Calls function<TAPS, ROWS>(arguments) for `count` taps and `tokens` tokens, 1 or GROUP; 4 taps are the usual number.
#define DISPATCH(function, count, tokens, ...)                                        \
    do {                                                                              \
        if (tokens == GROUP)                                                          \
            count == 4 ? function<4, GROUP>(__VA_ARGS__) : function<0, GROUP>(__VA_ARGS__); \
        else                                                                          \
            count == 4 ? function<4, 1>(__VA_ARGS__) : function<0, 1>(__VA_ARGS__);   \
    } while (false)

// The rows that a group of tokens of one segment sees.
template <typename T> class Rows {
    const Call &call;
    std::vector<const T *> rows;

public:
    long tap, count, tokens;  // the first tap that reaches into the document, the taps that do, the tokens
    Rows(const Call &call) : call(call), rows(call.reach() + GROUP) {}
    // A group that begins with token t and ends before `end`, in the document that Documents has found.
    const T *const *find(const Unit &unit, const Documents &document, long t, long end) {
        count = std::min(call.taps, t - document.begin + 1);
        tap = call.taps - count;
        tokens = count == call.taps && std::min(document.end, end) - t >= GROUP ? GROUP : 1;
        const long first = call.bounds[2 * unit.segment];
        for (long i = 0; i < count + tokens - 1; i++) {
            const long token = t - count + 1 + i;
            rows[i] = token >= first ? call.x.at<const T>(0, unit.row, token)
                                     : call.before.at<const T>(unit.segment, unit.row, token - first + call.reach());
        }
        return rows.data();
    }
};

template <typename T> static int forward(const Call &call) {
    const Plan plan(call);
    const Filter filter(call, false);
    return over_tasks(call, plan, [&] {
        return [&, seen = Rows<T>(call)](const Unit *unit, const Unit *stop, long) mutable {
            for (; unit != stop; unit++) {
                Documents document(call, unit->segment, unit->begin);
                for (long t = unit->begin; t < unit->end; t += seen.tokens) {
                    document.find(t);
                    const T *const *rows = seen.find(*unit, document, t, unit->end);
                    T *out[GROUP];
                    for (long m = 0; m < seen.tokens; m++) out[m] = call.out.at<T>(0, unit->row, t + m);
                    DISPATCH(convolve, seen.count, seen.tokens, call, rows, call.x.token, filter, seen.tap, seen.count,
                             call.bias, call.silu != 0, out);
                }
            }
        };
    });
}

// What one thread needs for gradients.
template <typename T> class Backward {
    const Call &call;
    const Filter &filter, &reversed;
    Rows<T> seen;
    long block, kept;               // tokens whose gradients are computed at a time; those that are in cache
    std::vector<float> cached;      // gradients of the activation's inputs, [kept, width], of token t in row t % kept
    std::vector<const float *> line;
    std::vector<float> sums;        // of the weight, by taps, and of the bias
    long summed = 0;                // tokens

    float *gradient(long t) { return cached.data() + t % kept * filter.width; }

    // Compute the gradients of the activation's inputs of tokens [begin, end).
    void differentiate(const Unit &unit, Documents &document, long begin, long end) {
        for (long t = begin; t < end; t += seen.tokens) {
            const bool own = t < unit.end;  // not of the window after the unit
            document.find(t);
            const T *const *rows = seen.find(unit, document, t, own ? std::min(unit.end, end) : end);
            const T *dout[GROUP];
            float *out[GROUP];
            for (long m = 0; m < seen.tokens; m++) {
                dout[m] = call.dout.at<const T>(0, unit.row, t + m);
                out[m] = gradient(t + m);
            }
            float *const dweight = own ? sums.data() : nullptr, *const dbias = sums.data() + call.taps * filter.width;
            DISPATCH(gradients, seen.count, seen.tokens, call, rows, filter, seen.tap, seen.count, dout, out, dweight,
                     dbias);
            summed += own ? seen.tokens : 0;
        }
    }

    // Compute the gradient of token t and, if they see as many, of those after it; return their number.
    long transpose(const Unit &unit, const Documents &document, long t, long end) {
        const long first = call.bounds[2 * unit.segment];
        const long skipped = std::max(0L, first - t);  // of the taps: a token before the segment
        const long count = std::max(0L, std::min(call.taps, document.end - t) - skipped);
        const bool whole = count == call.taps && end - t >= GROUP && document.end - t >= call.reach() + GROUP;
        const long tokens = whole && t >= first ? GROUP : 1;
        for (long i = 0; i < count + tokens - 1; i++) line[i] = gradient(t + skipped + i);
        T *out[GROUP];
        for (long m = 0; m < tokens; m++)
            out[m] = t >= first ? call.dx.at<T>(0, unit.row, t + m)
                                : call.dbefore.at<T>(unit.segment, unit.row, t - first + call.reach());
        const float *const *rows = line.data();
        DISPATCH(convolve, count, tokens, call, rows, filter.width, reversed, skipped, count, nullptr, false, out);
        return tokens;
    }

public:
    Backward(const Call &call, const Filter &filter, const Filter &reversed)
        : call(call), filter(filter), reversed(reversed), seen(call),
          block(std::max(2 * GROUP, CACHED_ELEMENTS / call.width)), kept(block + call.reach()),
          cached(kept * filter.width), line(call.reach() + GROUP), sums((call.taps + 1) * filter.width) {}

    // Compute the gradients of a unit's tokens, and of those before a segment.
    void run(const Unit &unit, double *total) {
        const long first = call.bounds[2 * unit.segment], last = call.bounds[2 * unit.segment + 1];
        long done = unit.begin == first ? first - call.reach() : unit.begin;
        Documents seeing(call, unit.segment, unit.begin), seen_by(call, unit.segment, done);
        const auto finish = [&](long end) {
            while (done < end) {
                seen_by.find(done);
                done += transpose(unit, seen_by, done, end);
            }
        };
        const long end = std::min(unit.end + call.reach(), last);
        for (long begin = unit.begin; begin < end; begin += block) {
            const long stop = std::min(begin + block, end);
            differentiate(unit, seeing, begin, stop);
            finish(std::min(stop - call.reach(), unit.end));
            if (summed >= SUMMED_TOKENS) collect(total);
        }
        finish(unit.end);
    }

    // Add the sums to those of the task.
    void collect(double *total) {
        for (size_t i = 0; i < sums.size(); i++) total[i] += sums[i];
        std::fill(sums.begin(), sums.end(), 0.0f);
        summed = 0;
    }
};

template <typename T> static int backward(const Call &call) {
    const Plan plan(call);
    const Filter filter(call, false), reversed(call, true);
    const long size = (call.taps + 1) * filter.width;
    std::vector<double> sums(plan.count() * size);
    const int failed = over_tasks(call, plan, [&] {
        return [&, work = Backward<T>(call, filter, reversed)](const Unit *unit, const Unit *stop, long task) mutable {
            double *const total = sums.data() + task * size;
            for (; unit != stop; unit++) work.run(*unit, total);
            work.collect(total);
        };
    });
    for (long task = 1; task < plan.count(); task++)
        for (long i = 0; i < size; i++) sums[i] += sums[task * size + i];
    sums.resize(size);  // zeros without a task
    for (long c = 0; c < call.width; c++) {
        for (long i = 0; i < call.taps; i++) call.dweight[c * call.taps + i] = float(sums[i * filter.width + c]);
        if (call.dbias != nullptr) call.dbias[c] = float(sums[call.taps * filter.width + c]);
    }
    return failed;
}

// Each returns 0, or 1 if there was not enough memory.
#define OPERATOR(name)                                                                         \
    int convolution_##name(const Call *call) {                                                 \
        try {                                                                                  \
            return call->brain ? name<Brain>(*call) : name<float>(*call);                      \
        } catch (const std::bad_alloc &) {                                                     \
            return 1;                                                                          \
        }                                                                                      \
    }
extern "C" {
OPERATOR(forward)
OPERATOR(backward)
}
