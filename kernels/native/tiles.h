// Tiles of float32 for one thread: vectors, products of small matrices, transposes, exp, rows of tensors.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef double WideVec __attribute__((vector_size(LANES * 8)));
typedef float LooseVec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef double LooseWideVec __attribute__((vector_size(LANES * 8), aligned(8)));

static inline Vec load(const float *p) { return *reinterpret_cast<const LooseVec *>(p); }
static inline void store(float *p, Vec x) { *reinterpret_cast<LooseVec *>(p) = x; }
static inline float sum(Vec x) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}
static inline long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

// bfloat16 as its bits, rounded to the nearest, ties to even.
typedef uint16_t Brain;
static inline float widen(Brain x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static inline Brain narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return Brain(bits >> 16) | 0x40;  // NaN
    return Brain((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline float get(const float *p) { return *p; }
static inline float get(const Brain *p) { return widen(*p); }
static inline void put(float *p, float x) { *p = x; }
static inline void put(Brain *p, float x) { *p = narrow(x); }

// exp(x) for x <= 0, 0 below the smallest normal number; relative error at most 2e-7.
static inline Vec exp_of_negative(Vec x) {
    const Vec lowest = Vec{} - 87.33654f;
    const IntVec vanishes = x < lowest;
    const Vec y = vanishes ? lowest : x;
    const IntVec n = __builtin_convertvector(y * 1.44269504f - 0.5f, IntVec);  // towards 0, from below: to the nearest
    const Vec whole = __builtin_convertvector(n, Vec);
    const Vec r = (y - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
    Vec p = Vec{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    const IntVec exponent = (n + 127) << 23;
    Vec scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return vanishes ? Vec{} : p * scale;
}

// ROWS x COLS vectors of C = A B, or C += A B: A's element (m, k) is a[m * row + k * step], B's rows are contiguous.
template <int ROWS, int COLS>
static inline __attribute__((always_inline)) void block_product(const float *a, long row, long step, const float *b,
                                                                long ldb, float *c, long ldc, long count, bool add) {
    Vec acc[ROWS][COLS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
        for (int n = 0; n < COLS; n++) acc[m][n] = add ? load(c + m * ldc + n * LANES) : Vec{};
    for (long k = 0; k < count; k++) {
        Vec of_b[COLS];
#pragma GCC unroll 8
        for (int n = 0; n < COLS; n++) of_b[n] = load(b + k * ldb + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
            const float x = a[m * row + k * step];
#pragma GCC unroll 8
            for (int n = 0; n < COLS; n++) acc[m][n] += x * of_b[n];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
        for (int n = 0; n < COLS; n++) store(c + m * ldc + n * LANES, acc[m][n]);
}

#if defined(__AVX512F__)
constexpr int BLOCK_ROWS = 6, BLOCK_COLS = 4;  // of 32 registers: 24 sums, 4 of B, 1 of A
#else
constexpr int BLOCK_ROWS = 4, BLOCK_COLS = 2;  // of 16
#endif

template <int COLS>
static void block_rows(int rows, const float *a, long row, long step, const float *b, long ldb, float *c, long ldc,
                       long count, bool add) {
    switch (rows) {
        case 6: return block_product<6, COLS>(a, row, step, b, ldb, c, ldc, count, add);
        case 5: return block_product<5, COLS>(a, row, step, b, ldb, c, ldc, count, add);
        case 4: return block_product<4, COLS>(a, row, step, b, ldb, c, ldc, count, add);
        case 3: return block_product<3, COLS>(a, row, step, b, ldb, c, ldc, count, add);
        case 2: return block_product<2, COLS>(a, row, step, b, ldb, c, ldc, count, add);
        default: return block_product<1, COLS>(a, row, step, b, ldb, c, ldc, count, add);
    }
}

static void block(long rows, long vectors, const float *a, long row, long step, const float *b, long ldb, float *c,
                  long ldc, long count, bool add) {
    switch (vectors) {
        case 4: return block_rows<4>(int(rows), a, row, step, b, ldb, c, ldc, count, add);
        case 3: return block_rows<3>(int(rows), a, row, step, b, ldb, c, ldc, count, add);
        case 2: return block_rows<2>(int(rows), a, row, step, b, ldb, c, ldc, count, add);
        default: return block_rows<1>(int(rows), a, row, step, b, ldb, c, ldc, count, add);
    }
}

// An operand A of a product: its element (m, k) is at[m * row + k * step].
struct Operand {
    const float *at;
    long row, step;
};
static inline Operand rows_of(const float *x, long width) { return {x, width, 1}; }
static inline Operand columns_of(const float *x, long width) { return {x, 1, width}; }

// C [m, n] = A B or C += A B, n a multiple of LANES, B and C with rows of ldb and ldc.
static void product(long m, long n, long count, Operand a, const float *b, long ldb, float *c, long ldc, bool add) {
    for (long j = 0; j < n; j += BLOCK_COLS * LANES) {
        const long vectors = std::min<long>(BLOCK_COLS, (n - j) / LANES);
        for (long i = 0; i < m; i += BLOCK_ROWS) {
            const long rows = std::min<long>(BLOCK_ROWS, m - i);
            block(rows, vectors, a.at + i * a.row, a.row, a.step, b + j, ldb, c + i * ldc + j, ldc, count, add);
        }
    }
}

// The lower triangle of C [m, m] = A B, with what its blocks have above it.
static void product_to_lower(long m, long count, Operand a, const float *b, long ldb, float *c, long ldc) {
    for (long i = 0; i < m; i += BLOCK_ROWS) {
        const long rows = std::min<long>(BLOCK_ROWS, m - i);
        for (long j = 0; j < i + rows; j += BLOCK_COLS * LANES) {
            const long vectors = std::min<long>(BLOCK_COLS, (i + rows - j + LANES - 1) / LANES);
            block(rows, vectors, a.at + i * a.row, a.row, a.step, b + j, ldb, c + i * ldc + j, ldc, count, false);
        }
    }
}

// C [m, n] += L B for a lower triangular L [m, m] with rows of `width`.
static void product_of_lower(long m, long n, const float *l, long width, const float *b, long ldb, float *c, long ldc) {
    for (long j = 0; j < n; j += BLOCK_COLS * LANES) {
        const long vectors = std::min<long>(BLOCK_COLS, (n - j) / LANES);
        for (long i = 0; i < m; i += BLOCK_ROWS) {
            const long rows = std::min<long>(BLOCK_ROWS, m - i);
            block(rows, vectors, l + i * width, width, 1, b + j, ldb, c + i * ldc + j, ldc, i + rows, true);
        }
    }
}

// C [m, n] += L^T B for a lower triangular L [m, m] with rows of `width`.
static void product_of_lower_transposed(long m, long n, const float *l, long width, const float *b, long ldb, float *c,
                                        long ldc) {
    for (long j = 0; j < n; j += BLOCK_COLS * LANES) {
        const long vectors = std::min<long>(BLOCK_COLS, (n - j) / LANES);
        for (long i = 0; i < m; i += BLOCK_ROWS) {
            const long rows = std::min<long>(BLOCK_ROWS, m - i);
            const float *first = l + i * width + i;
            block(rows, vectors, first, 1, width, b + i * ldb + j, ldb, c + i * ldc + j, ldc, m - i, true);
        }
    }
}

// The transpose of `from` [rows, width], both multiples of LANES, into `to` [width, rows].
static void transpose(const float *from, long rows, long width, float *to) {
    for (long i = 0; i < rows; i += LANES)
        for (long j = 0; j < width; j += LANES) {
            Vec x[LANES], y[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) x[r] = load(from + (i + r) * width + j);
#pragma GCC unroll 4
            for (int distance = 1; distance < LANES; distance *= 2) {
                IntVec low{}, high{};
                for (int lane = 0; lane < LANES; lane++) {
                    low[lane] = lane & distance ? LANES + lane - distance : lane;
                    high[lane] = lane & distance ? LANES + lane : lane + distance;
                }
#pragma GCC unroll 16
                for (int r = 0; r < LANES; r++) {
                    const int other = r ^ distance;
                    y[r] = r & distance ? __builtin_shuffle(x[other], x[r], high) : __builtin_shuffle(x[r], x[other], low);
                }
#pragma GCC unroll 16
                for (int r = 0; r < LANES; r++) x[r] = y[r];
            }
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) store(to + (j + r) * rows + i, x[r]);
        }
}

// Rows [rows, width] times a factor each.
static inline void scale_rows(long rows, long width, float *x, const float *factors) {
    for (long i = 0; i < rows; i++)
        for (long d = 0; d < width; d += LANES) store(x + i * width + d, load(x + i * width + d) * factors[i]);
}

static inline float dot(const float *x, const float *y, long width) {
    Vec total{};
    for (long d = 0; d < width; d += LANES) total += load(x + d) * load(y + d);
    return sum(total);
}

// Memory of one thread, aligned to cache lines, zero at first.
class Scratch {
    std::vector<void *> blocks;

public:
    template <typename T = float>
    T *take(long count) {
        const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
        void *p = std::aligned_alloc(64, std::max<size_t>(bytes, 64));
        if (p == nullptr) throw std::bad_alloc();
        std::memset(p, 0, bytes);
        blocks.push_back(p);
        return static_cast<T *>(p);
    }
    ~Scratch() {
        for (void *p : blocks) std::free(p);
    }
};
