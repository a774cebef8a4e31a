// RMSNorm, with a weight or a gate or both, and SwiGLU: rows of float32 or bfloat16, computed in float32, rounded once.
//
// The equations are those of longctx/kernels/pointwise.py. A row is read from memory once, and written once.
#include "threads.h"
#include "vectors.h"

// Rows with contiguous columns; data is null where there are none.
struct Rows {
    void *data;
    long stride;
    template <typename T> T *at(long row) const { return static_cast<T *>(data) + row * stride; }
};
struct Call {
    long rows, width, brain, threads;
    long activation;  // of the gate: 0 none, 1 silu, 2 sigmoid
    float eps;
    const float *weight;  // [width], or null where `scale` has a row for each
    float *dweight;       // [width]
    Rows x, scale, gate, grad, out, dscale, dgate;
};

constexpr long TASK_ELEMENTS = 1 << 15;  // of the rows of a task, which the order of sums depends on
constexpr long THREAD_ELEMENTS = 1 << 17;

struct Blocks {
    long size, count;
    Blocks(const Call &call)
        : size(std::max<long>(1, TASK_ELEMENTS / std::max<long>(call.width, 1))), count((call.rows + size - 1) / size) {}
};

// Calls make() on each thread, and its result with the first and the last row of each block and the block's number.
template <typename Make> static int over_blocks(const Call &call, const Make &make) {
    const Blocks blocks(call);
    std::atomic<long> next{0};
    const long elements = call.rows * call.width;
    return on_threads(std::min({call.threads, blocks.count, 1 + elements / THREAD_ELEMENTS}), [&] {
        auto work = make();
        for (long block; (block = next.fetch_add(1)) < blocks.count;)
            work(block * blocks.size, std::min((block + 1) * blocks.size, call.rows), block);
    });
}

struct Activated {
    Vec value, slope;
};
static inline Activated activate(Vec gate, long activation) {
    const Vec s = sigmoid(gate);
    if (activation == 2) return {s, s * (1.0f - s)};
    const Vec silu = s * gate;
    return {silu, silu - silu * s + s};
}

// Copy a row to float32, and return 1 / rms.
template <typename T> static float inverse_rms(const Call &call, const T *x, float *wide) {
    Vec squares[4]{};
    for (long j = 0; j < call.width; j += LANES) {
        const Vec value = load_first(x + j, call.width - j);
        store(wide + j, value);
        squares[j / LANES % 4] += value * value;
    }
    const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    return 1.0f / std::sqrt(total / float(call.width) + call.eps);
}

template <typename T> static int norm(const Call &call) {
    return over_blocks(call, [&call] {
        return [&call, wide = std::vector<float>(padded(call.width))](long first, long last, long) mutable {
            for (long row = first; row < last; row++) {
                const float inverse = inverse_rms(call, call.x.at<const T>(row), wide.data());
                const T *scale = call.scale.at<const T>(row), *gate = call.gate.at<const T>(row);
                T *out = call.out.at<T>(row);
                for (long j = 0; j < call.width; j += LANES) {
                    const long n = call.width - j;
                    Vec y = load(wide.data() + j) * inverse;
                    y *= call.weight != nullptr ? load_first(call.weight + j, n) : load_first(scale + j, n);
                    if (call.activation) y *= activate(load_first(gate + j, n), call.activation).value;
                    store_first(out + j, y, n);
                }
            }
        };
    });
}

template <typename T> static int norm_grad(const Call &call) {
    const long width = padded(call.width);
    const Blocks blocks(call);
    std::vector<float> sums(call.weight != nullptr ? blocks.count * width : 0);
    const int failed = over_blocks(call, [&] {
        return [&, x = std::vector<float>(width), dnormed = std::vector<float>(width)](long first, long last,
                                                                                      long block) mutable {
            float *sum_of = sums.data() + (call.weight != nullptr ? block * width : 0);
            for (long row = first; row < last; row++) {
                const float inverse = inverse_rms(call, call.x.at<const T>(row), x.data());
                const T *scale = call.scale.at<const T>(row), *gate = call.gate.at<const T>(row);
                const T *grad = call.grad.at<const T>(row);
                Vec dots[4]{};
                for (long j = 0; j < call.width; j += LANES) {
                    const long n = call.width - j;
                    const Vec normed = load(x.data() + j) * inverse;
                    const Vec by = call.weight != nullptr ? load_first(call.weight + j, n) : load_first(scale + j, n);
                    Vec g = load_first(grad + j, n);
                    if (call.activation) {
                        const Activated a = activate(load_first(gate + j, n), call.activation);
                        store_first(call.dgate.at<T>(row) + j, g * normed * by * a.slope, n);
                        g *= a.value;
                    }
                    const Vec of_scale = g * normed;
                    if (call.weight != nullptr)
                        store(sum_of + j, load(sum_of + j) + of_scale);
                    else
                        store_first(call.dscale.at<T>(row) + j, of_scale, n);
                    g *= by;
                    store(dnormed.data() + j, g);
                    dots[j / LANES % 4] += g * normed;
                }
                const float mean = sum((dots[0] + dots[1]) + (dots[2] + dots[3])) / float(call.width);
                T *out = call.out.at<T>(row);
                for (long j = 0; j < call.width; j += LANES) {
                    const Vec normed = load(x.data() + j) * inverse;
                    store_first(out + j, (load(dnormed.data() + j) - normed * mean) * inverse, call.width - j);
                }
            }
        };
    });
    if (call.weight != nullptr && !failed) {
        std::vector<double> total(width);
        for (long block = 0; block < blocks.count; block++)
            for (long j = 0; j < width; j++) total[j] += sums[block * width + j];
        for (long j = 0; j < call.width; j++) call.dweight[j] = float(total[j]);
    }
    return failed;
}

// `width` is that of the result, half of that of x.
template <typename T> static int swiglu(const Call &call) {
    return over_blocks(call, [&call] {
        return [&call](long first, long last, long) {
            for (long row = first; row < last; row++) {
                const T *gate = call.x.at<const T>(row), *up = gate + call.width;
                T *out = call.out.at<T>(row);
                for (long j = 0; j < call.width; j += LANES) {
                    const long n = call.width - j;
                    const Vec g = load_first(gate + j, n);
                    store_first(out + j, sigmoid(g) * g * load_first(up + j, n), n);
                }
            }
        };
    });
}

template <typename T> static int swiglu_grad(const Call &call) {
    return over_blocks(call, [&call] {
        return [&call](long first, long last, long) {
            for (long row = first; row < last; row++) {
                const T *gate = call.x.at<const T>(row), *up = gate + call.width, *grad = call.grad.at<const T>(row);
                T *dgate = call.out.at<T>(row), *dup = dgate + call.width;
                for (long j = 0; j < call.width; j += LANES) {
                    const long n = call.width - j;
                    const Activated a = activate(load_first(gate + j, n), 1);
                    const Vec g = load_first(grad + j, n);
                    store_first(dup + j, g * a.value, n);
                    store_first(dgate + j, a.slope * load_first(up + j, n) * g, n);
                }
            }
        };
    });
}

// Each returns 0, or 1 if there was not enough memory.
#define OPERATOR(name)                                                                         \
    int pointwise_##name(const Call *call) {                                                   \
        try {                                                                                  \
            return call->brain ? name<Brain>(*call) : name<float>(*call);                      \
        } catch (const std::bad_alloc &) {                                                     \
            return 1;                                                                          \
        }                                                                                      \
    }
extern "C" {
OPERATOR(norm)
OPERATOR(norm_grad)
OPERATOR(swiglu)
OPERATOR(swiglu_grad)
}
