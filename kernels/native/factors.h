// Tensors in memory, and tiles of them as factors of products, in float32 or in pairs of bfloat16 numbers.
#pragma once
#include "tiles.h"

struct Tensor {  // [batch, tokens, heads, dim] with contiguous dim, or [batch, tokens, heads]; strides in elements
    void *data;
    long brain, batch, token, head, heads;

    long at(long row, long first, long of_head) const { return row * batch + first * token + of_head * head; }
    // Fetch rows [first, first + count) of a head, of `dim` elements.
    void fetch(Ahead &ahead, long row, long of_head, long first, long count, long dim) const {
        const long size = brain ? sizeof(Brain) : sizeof(float);
        ahead.add(static_cast<const char *>(data) + at(row, first, of_head) * size, token * size, dim * size, count);
    }
};

template <typename T>
static void copy_rows_in(const T *from, long stride, long count, long dim, float *to, long width) {
    for (long i = 0; i < count; i++) {
        for (long d = 0; d < dim; d += LANES) store(to + i * width + d, load_first(from + i * stride + d, dim - d));
        for (long d = padded(dim); d < width; d += LANES) store(to + i * width + d, Vec{});
    }
}
template <typename T>
static void copy_rows_out(const float *from, long width, long count, long dim, T *to, long stride) {
    for (long i = 0; i < count; i++)
        for (long d = 0; d < dim; d += LANES) store_first(to + i * stride + d, load(from + i * width + d), dim - d);
}

// Read rows [first, first + count) of a head into `to`, which has `height` rows of `width` numbers, with zeros after
// them and after each.
static void load_rows(const Tensor &x, long row, long head, long first, long count, long height, long dim, float *to,
                      long width) {
    const long at = x.at(row, first, head);
    if (x.brain)
        copy_rows_in(static_cast<const Brain *>(x.data) + at, x.token, count, dim, to, width);
    else
        copy_rows_in(static_cast<const float *>(x.data) + at, x.token, count, dim, to, width);
    std::memset(to + count * width, 0, (height - count) * width * sizeof(float));
}

// Write rows [first, first + count) of a head from `from`, which has rows of `width` numbers.
static void store_rows(const Tensor &x, long row, long head, long first, long count, long dim, const float *from,
                       long width) {
    const long at = x.at(row, first, head);
    if (x.brain)
        copy_rows_out(from, width, count, dim, static_cast<Brain *>(x.data) + at, x.token);
    else
        copy_rows_out(from, width, count, dim, static_cast<float *>(x.data) + at, x.token);
}

// A number per token, [first, first + count) of a head; zeros up to `height`.
static void load_numbers(const Tensor &x, long row, long head, long first, long count, long height, float *to) {
    const long at = x.at(row, first, head);
    for (long i = 0; i < height; i++) {
        if (i >= count)
            to[i] = 0;
        else if (x.brain)
            to[i] = get(static_cast<const Brain *>(x.data) + at + i * x.token);
        else
            to[i] = get(static_cast<const float *>(x.data) + at + i * x.token);
    }
}
static void store_numbers(const Tensor &x, long row, long head, long first, long count, const float *from) {
    float *to = static_cast<float *>(x.data) + x.at(row, first, head);
    for (long i = 0; i < count; i++) to[i * x.token] = from[i];
}

static inline Vec masked_product(Vec x, Vec by) { return by == 0 ? Vec{} : x * by; }

// A tile of `height` rows of `width` numbers as a factor of products: the words of its rows (pairs along a row), of its
// rows stacked (pairs of rows), and of its columns (the rows turned, pairs along a row).
template <typename F> struct Factor;

template <> struct Factor<Single> {
    typedef float Number;
    long height, width;
    float *rows, *stacked, *turned = nullptr;

    static long width_of(long dim) { return padded(dim); }
    Factor(Scratch &scratch, long height, long dim, bool turns) : height(height), width(width_of(dim)) {
        rows = stacked = scratch.take(height * width);
        if (turns) turned = scratch.take(height * width);
    }

    float *row(long i) { return rows + i * width; }
    const float *row(long i) const { return rows + i * width; }
    // Memory for numbers that are computed, to be given to `set`.
    float *numbers(Scratch &) { return rows; }
    void set(const float *) {}  // computed in place
    // Set number i to i + LANES of the rows, or d to d + LANES of row i (and the next one, in a tile of pairs) as stacked.
    void set_vector(long i, Vec x) { store(rows + i, x); }
    void set_stacked(long i, long d, Vec x, Vec) { store(stacked + i * width + d, x); }
    // Numbers [count, width] times those of `by`, 0 where these are, whatever the numbers; zeros up to `height`.
    void set_product(const float *x, const float *by, long count) {
        for (long i = 0; i < count * width; i += LANES) store(rows + i, masked_product(load(x + i), load(by + i)));
        std::memset(row(count), 0, (height - count) * width * sizeof(float));
    }
    // The rows of another times a factor each, stacked.
    void stack_scaled(const Factor &x, const float *factors) {
        for (long i = 0; i < height; i++)
            for (long d = 0; d < width; d += LANES) store(row(i) + d, load(x.row(i) + d) * factors[i]);
    }
    // Rows [first, first + count) of a head; zeros up to `height`.
    void load_rows(const Tensor &x, long of_row, long head, long first, long count, long dim) {
        ::load_rows(x, of_row, head, first, count, height, dim, rows, width);
    }
    void stack() {}
    void turn() { turn(rows); }
    // The numbers of another place, turned.
    void turn(const float *x) { transpose(x, height, width, turned); }
};

#if defined(HAS_PAIRS)
// Two vectors of numbers, rounded to bfloat16, as pairs.
static inline __m512i round_pairs(Vec low, Vec high) {
    const __m512i lows = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(__m512(low))));
    const __m512i highs = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(__m512(high))));
    return _mm512_or_si512(lows, _mm512_slli_epi32(highs, 16));
}

template <> struct Factor<Pair> {
    typedef Brain Number;
    long height, width;
    uint32_t *rows, *stacked, *turned = nullptr;

    static long width_of(long dim) { return (dim + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }
    Factor(Scratch &scratch, long height, long dim, bool turns) : height(height), width(width_of(dim)) {
        rows = scratch.take<uint32_t>(height * width / 2), stacked = scratch.take<uint32_t>(height * width / 2);
        if (turns) turned = scratch.take<uint32_t>(height * width / 2);
    }

    Brain *row(long i) { return reinterpret_cast<Brain *>(rows + i * width / 2); }
    const Brain *row(long i) const { return reinterpret_cast<const Brain *>(rows + i * width / 2); }
    float *numbers(Scratch &scratch) { return scratch.take(height * width); }
    static inline void put_row(Brain *to, Vec x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), __m256i(_mm512_cvtneps_pbh(__m512(x))));
    }
    void set_vector(long i, Vec x) { put_row(row(0) + i, x); }
    void set_stacked(long i, long d, Vec low, Vec high) {
        _mm512_storeu_si512(stacked + i / 2 * width + d, round_pairs(low, high));
    }
    void set(const float *x) {
        Brain *to = row(0);
        for (long i = 0, size = height * width; i < size; i += LANES) put_row(to + i, load(x + i));
    }
    void set_product(const float *x, const float *by, long count) {
        Brain *to = row(0);
        for (long i = 0, size = count * width; i < size; i += LANES) put_row(to + i, masked_product(load(x + i), load(by + i)));
        std::memset(row(count), 0, (height - count) * width * sizeof(Brain));
    }
    // The rows of another times a factor each, stacked; the rows themselves are not kept.
    void stack_scaled(const Factor &x, const float *factors) {
        const Brain *from = x.row(0);
        uint32_t *to = stacked;
        const long n = width;
        for (long i = 0; i < height; i += 2) {
            const Vec first = Vec{} + factors[i], second = Vec{} + factors[i + 1];
            for (long d = 0; d < n; d += LANES)
                _mm512_storeu_si512(to + i / 2 * n + d,
                                    round_pairs(load(from + i * n + d) * first, load(from + (i + 1) * n + d) * second));
        }
    }
    void load_rows(const Tensor &x, long of_row, long head, long first, long count, long dim) {
        const Brain *from = static_cast<const Brain *>(x.data) + x.at(of_row, first, head);
        for (long i = 0; i < count; i++) std::memcpy(row(i), from + i * x.token, dim * sizeof(Brain));
        std::memset(row(count), 0, (height - count) * width * sizeof(Brain));
    }
    void stack() {
        const Brain *from = row(0);
        uint32_t *to = stacked;
        const long n = width;
        for (long i = 0; i < height; i += 2)
            for (long d = 0; d < n; d += LANES) {
                const BitVec low = bits_of(from + i * n + d), high = bits_of(from + (i + 1) * n + d);
                store_bits(to + i / 2 * n + d, low | high << 16);
            }
    }
    void turn() {
        transpose(reinterpret_cast<const float *>(rows), height, width / 2, reinterpret_cast<float *>(turned));
    }
    void turn(const float *x) { set(x), turn(); }
};
#endif

template <typename F> static OperandOf<F> rows_of(const Factor<F> &x) { return {x.rows, x.width / F::PER_WORD, 1}; }
template <typename F> static OperandOf<F> columns_of(const Factor<F> &x) { return {x.stacked, 1, x.width}; }

// Set a factor's rows to numbers: of(i, d) is a vector of row i, from d on.
template <typename F, typename Of> static void set_rows(Factor<F> to, Of of) {
    for (long i = 0, n = to.width; i < to.height; i++)
        for (long d = 0; d < n; d += LANES) to.set_vector(i * n + d, of(i, d));
}
// As this and `stack`, but the rows are not kept.
template <typename F, typename Of> static void set_stacked_rows(Factor<F> to, Of of) {
    for (long i = 0, n = to.width; i < to.height; i += F::PER_WORD)
        for (long d = 0; d < n; d += LANES) {
            const Vec first = of(i, d);
            to.set_stacked(i, d, first, F::PER_WORD == 2 ? of(i + 1, d) : first);
        }
}

// A factor and its numbers before they are rounded, which are its rows where they are not.
template <typename F> struct Tile : Factor<F> {
    float *const exact;

    Tile(Scratch &scratch, long height, long dim, bool turns = false)
        : Factor<F>(scratch, height, dim, turns), exact(this->numbers(scratch)) {}

    void round() { this->set(exact); }
    void round_stacked() {
        if constexpr (F::PER_WORD > 1)
            set_stacked_rows<F>(*this, [x = exact, n = this->width](long i, long d) { return load(x + i * n + d); });
    }
};
// Rows of a tile times decays, for `set_rows` and `set_stacked_rows`.
template <typename F, typename By> static auto rows_times(const Tile<F> &tile, By by, float factor = 1) {
    const float *x = tile.exact;
    const long n = tile.width;
    return [=](long i, long d) { return load(x + i * n + d) * by.at(i, d) * factor; };
}
// Rows of float32 times decays, in place.
template <typename By> static void scale_rows(float *x, long count, long n, By by, float factor = 1) {
    for (long i = 0; i < count; i++)
        for (long d = 0; d < n; d += LANES) store(x + i * n + d, load(x + i * n + d) * by.at(i, d) * factor);
}
