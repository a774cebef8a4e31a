// Tiles of float32 for one thread: products of small matrices, transposes, scratch memory.
#pragma once
#include <cstdlib>
#include <new>
#include <type_traits>
#include <vector>

#include "vectors.h"

// What a product multiplies: float32 numbers, or pairs of bfloat16 numbers that are neighbours along the sum, as one word,
// the first in its lower half. Sums are float32.
struct Single {
    typedef float Word;
    typedef Vec Words;
    static constexpr long PER_WORD = 1;
    static inline Words spread(Word x) { return Vec{} + x; }
    static inline Words load_words(const Word *p) { return load(p); }
    static inline Vec multiply_add(Vec sum, Words a, Words b) { return sum + a * b; }
};
#if defined(__AVX512BF16__)
#define HAS_PAIRS
struct Pair {
    typedef uint32_t Word;
    typedef __m512i Words;
    static constexpr long PER_WORD = 2;
    static inline Words spread(Word x) { return _mm512_set1_epi32(int(x)); }
    static inline Words load_words(const Word *p) { return _mm512_loadu_si512(p); }
    static inline Vec multiply_add(Vec sum, Words a, Words b) {
        return Vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
    }
};
#endif

// Rows of memory that later work reads or writes: products fetch them into the cache while they compute, a line at a time.
class Ahead {
    struct Rows {
        const char *at;
        long stride, lines, rows;
    };
    static constexpr int MOST = 8;
    static constexpr long LINE = 64, PRODUCTS_PER_LINE = 40;  // vectors of products
    Rows waiting[MOST];
    int count = 0, first = 0;
    long row = 0, line = 0, products = 0;

public:
    // Fetch `rows` rows of `bytes` bytes, `stride` bytes apart.
    void add(const void *at, long stride, long bytes, long rows) {
        if (first == count) first = count = 0;
        if (count < MOST) waiting[count++] = {static_cast<const char *>(at), stride, (bytes + LINE - 1) / LINE, rows};
    }
    void drop() { first = count = 0, row = line = 0; }
    void fetch(long of_products) {
        for (products += of_products; products > 0 && first < count; products -= PRODUCTS_PER_LINE) {
            const Rows &from = waiting[first];
            __builtin_prefetch(from.at + row * from.stride + line * LINE, 0, 2);
            if (++line < from.lines) continue;
            line = 0;
            if (++row < from.rows) continue;
            row = 0, first++;
        }
        if (products > 0) products = 0;
    }
};

// What C was is replaced (C = A B), or multiplied by a factor, the same or one per row, and added to (C = keep C + A B).
struct Keep {
    bool any;
    float factor = 1;
    const float *factors = nullptr;

    // Of a bool alone: a pointer or a number would become one.
    template <typename T, typename = std::enable_if_t<std::is_same<T, bool>::value>> Keep(T any) : any(any) {}
    explicit Keep(float factor) : any(true), factor(factor) {}
    explicit Keep(const float *factors) : any(true), factors(factors) {}
    Keep from(long row) const {
        Keep keep = *this;
        if (factors != nullptr) keep.factors += row;
        return keep;
    }
};

// ROWS x COLS vectors of C = A B, or C = keep C + A B: A's word (m, k) is a[m * row + k * step], B's rows are contiguous.
template <typename F, int ROWS, int COLS>
static inline __attribute__((always_inline)) void block_product(const typename F::Word *a, long row, long step,
                                                                const typename F::Word *b, long ldb, float *c, long ldc,
                                                                long count, Keep keep) {
    Vec acc[ROWS][COLS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
        const float factor = keep.factors != nullptr ? keep.factors[m] : keep.factor;
#pragma GCC unroll 8
        for (int n = 0; n < COLS; n++) acc[m][n] = keep.any ? load(c + m * ldc + n * LANES) * factor : Vec{};
    }
    for (long k = 0; k < count; k++) {
        typename F::Words of_b[COLS];
#pragma GCC unroll 8
        for (int n = 0; n < COLS; n++) of_b[n] = F::load_words(b + k * ldb + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
            const typename F::Words x = F::spread(a[m * row + k * step]);
#pragma GCC unroll 8
            for (int n = 0; n < COLS; n++) acc[m][n] = F::multiply_add(acc[m][n], x, of_b[n]);
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

template <typename F, int COLS>
static void block_rows(int rows, const typename F::Word *a, long row, long step, const typename F::Word *b, long ldb,
                       float *c, long ldc, long count, Keep keep) {
    switch (rows) {
        case 6: return block_product<F, 6, COLS>(a, row, step, b, ldb, c, ldc, count, keep);
        case 5: return block_product<F, 5, COLS>(a, row, step, b, ldb, c, ldc, count, keep);
        case 4: return block_product<F, 4, COLS>(a, row, step, b, ldb, c, ldc, count, keep);
        case 3: return block_product<F, 3, COLS>(a, row, step, b, ldb, c, ldc, count, keep);
        case 2: return block_product<F, 2, COLS>(a, row, step, b, ldb, c, ldc, count, keep);
        default: return block_product<F, 1, COLS>(a, row, step, b, ldb, c, ldc, count, keep);
    }
}

template <typename F>
static void block(long rows, long vectors, const typename F::Word *a, long row, long step, const typename F::Word *b,
                  long ldb, float *c, long ldc, long count, Keep keep, Ahead *ahead) {
    if (ahead != nullptr) ahead->fetch(rows * vectors * count);
    switch (vectors) {
        case 4: return block_rows<F, 4>(int(rows), a, row, step, b, ldb, c, ldc, count, keep);
        case 3: return block_rows<F, 3>(int(rows), a, row, step, b, ldb, c, ldc, count, keep);
        case 2: return block_rows<F, 2>(int(rows), a, row, step, b, ldb, c, ldc, count, keep);
        default: return block_rows<F, 1>(int(rows), a, row, step, b, ldb, c, ldc, count, keep);
    }
}

// An operand A of a product: its word (m, k) is at[m * row + k * step].
template <typename F> struct OperandOf {
    const typename F::Word *at;
    long row, step;
};
typedef OperandOf<Single> Operand;
static inline Operand rows_of(const float *x, long width) { return {x, width, 1}; }
static inline Operand columns_of(const float *x, long width) { return {x, 1, width}; }

// Products of A and B, n a multiple of LANES, B and C with rows of ldb and ldc. `ahead`: what to fetch meanwhile.
//
// C [m, n] = A B or C = keep C + A B over `count` words.
template <typename F = Single>
static void product(long m, long n, long count, OperandOf<F> a, const typename F::Word *b, long ldb, float *c, long ldc,
                    Keep keep, Ahead *ahead = nullptr) {
    for (long j = 0; j < n; j += BLOCK_COLS * LANES) {
        const long vectors = std::min<long>(BLOCK_COLS, (n - j) / LANES);
        for (long i = 0; i < m; i += BLOCK_ROWS) {
            const long rows = std::min<long>(BLOCK_ROWS, m - i);
            block<F>(rows, vectors, a.at + i * a.row, a.row, a.step, b + j, ldb, c + i * ldc + j, ldc, count, keep.from(i),
                     ahead);
        }
    }
}

// The lower triangle of C [m, m] = A B over `count` words, with what its blocks have above it.
template <typename F = Single>
static void product_to_lower(long m, long count, OperandOf<F> a, const typename F::Word *b, long ldb, float *c, long ldc,
                             Ahead *ahead = nullptr) {
    for (long i = 0; i < m; i += BLOCK_ROWS) {
        const long rows = std::min<long>(BLOCK_ROWS, m - i);
        for (long j = 0; j < i + rows; j += BLOCK_COLS * LANES) {
            const long vectors = std::min<long>(BLOCK_COLS, (i + rows - j + LANES - 1) / LANES);
            block<F>(rows, vectors, a.at + i * a.row, a.row, a.step, b + j, ldb, c + i * ldc + j, ldc, count, false, ahead);
        }
    }
}

// C [m, n] = keep C + L B for a lower triangular L [m, m], given by its rows of `width` words.
template <typename F = Single>
static void product_of_lower(long m, long n, const typename F::Word *l, long width, const typename F::Word *b, long ldb,
                             float *c, long ldc, Keep keep = true, Ahead *ahead = nullptr) {
    for (long j = 0; j < n; j += BLOCK_COLS * LANES) {
        const long vectors = std::min<long>(BLOCK_COLS, (n - j) / LANES);
        for (long i = 0; i < m; i += BLOCK_ROWS) {
            const long rows = std::min<long>(BLOCK_ROWS, m - i), words = (i + rows + F::PER_WORD - 1) / F::PER_WORD;
            block<F>(rows, vectors, l + i * width, width, 1, b + j, ldb, c + i * ldc + j, ldc, words, keep.from(i),
                     ahead);
        }
    }
}

// C [m, n] = keep C + L^T B for a lower triangular L [m, m], given by its rows, one or two to a word, of `width` words.
template <typename F = Single>
static void product_of_lower_transposed(long m, long n, const typename F::Word *l, long width, const typename F::Word *b,
                                        long ldb, float *c, long ldc, Keep keep = true, Ahead *ahead = nullptr) {
    static_assert(BLOCK_ROWS % F::PER_WORD == 0, "blocks begin with a word");
    const long all = (m + F::PER_WORD - 1) / F::PER_WORD;
    for (long j = 0; j < n; j += BLOCK_COLS * LANES) {
        const long vectors = std::min<long>(BLOCK_COLS, (n - j) / LANES);
        for (long i = 0; i < m; i += BLOCK_ROWS) {
            const long rows = std::min<long>(BLOCK_ROWS, m - i), first = i / F::PER_WORD;
            const typename F::Word *of_l = l + first * width + i, *of_b = b + first * ldb + j;
            block<F>(rows, vectors, of_l, 1, width, of_b, ldb, c + i * ldc + j, ldc, all - first, keep.from(i), ahead);
        }
    }
}

// One step of a transpose: of rows r and r + DISTANCE, blocks of DISTANCE lanes beside the diagonal change places.
template <int DISTANCE, int... LANE>
static inline void swap_blocks(Vec (&x)[LANES], std::integer_sequence<int, LANE...>) {
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) {
        if (r & DISTANCE) continue;
        const Vec upper = x[r], lower = x[r + DISTANCE];
        x[r] = shuffled(upper, lower, std::integer_sequence<int, (LANE & DISTANCE ? LANES + LANE - DISTANCE : LANE)...>());
        x[r + DISTANCE] =
            shuffled(upper, lower, std::integer_sequence<int, (LANE & DISTANCE ? LANES + LANE : LANE + DISTANCE)...>());
    }
}

// The transpose of `from` [rows, width], both multiples of LANES, into `to` [width, rows].
static void transpose(const float *from, long rows, long width, float *to) {
    for (long i = 0; i < rows; i += LANES)
        for (long j = 0; j < width; j += LANES) {
            Vec x[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) x[r] = load(from + (i + r) * width + j);
            swap_blocks<1>(x, AllLanes());
            swap_blocks<2>(x, AllLanes());
            swap_blocks<4>(x, AllLanes());
#if defined(__AVX512F__)
            swap_blocks<8>(x, AllLanes());
#endif
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) store(to + (j + r) * rows + i, x[r]);
        }
}

template <typename T> static inline float dot(const T *x, const float *y, long width) {
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
