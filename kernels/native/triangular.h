// Unit lower triangular systems of a chunk, by blocked substitution: blocks on the diagonal are inverted, all else is
// products.
#pragma once
#include "recurrence.h"

// Solves (I + P diag(b)) Z = W, U = diag(b) Z, for P [CHUNK, CHUNK] strictly lower, and the transposed system.
class TriangularSystem {
    static constexpr long SIZE = 16;
    const float *negative = nullptr, *factors = nullptr;  // -P, b
    float *inverses, *inverses_back;                      // [CHUNK / SIZE, SIZE, SIZE] of I + P diag(b), I + diag(b) P

public:
    explicit TriangularSystem(Scratch &scratch)
        : inverses(scratch.take(CHUNK * SIZE)), inverses_back(scratch.take(CHUNK * SIZE)) {}

    // Take -P, which has zeros on the diagonal and above it, and b.
    void set(const float *negative_pairs, const float *of_tokens) {
        negative = negative_pairs, factors = of_tokens;
        invert(inverses, [](const float *b, long, long j) { return b[j]; });
    }

    // Turn W [CHUNK, width], which is overwritten, into Z and U.
    void solve(float *w, long width, float *z, float *u) const {
        for (long first = 0; first < CHUNK; first += SIZE) {
            const long at = first * width;
            if (first > 0) product(SIZE, width, first, rows_of(negative + first * CHUNK, CHUNK), u, width, w + at, width, true);
            product(SIZE, width, SIZE, rows_of(inverses + first * SIZE, SIZE), w + at, width, z + at, width, false);
            for (long i = first; i < first + SIZE; i++)
                for (long d = i * width; d < (i + 1) * width; d += LANES) store(u + d, load(z + d) * factors[i]);
        }
    }

    void prepare_back() {
        invert(inverses_back, [](const float *b, long i, long) { return b[i]; });
    }

    // Turn the gradient of U [CHUNK, width], which is overwritten, into that of diag(b) W and of W.
    void solve_back(float *du, long width, float *drhs, float *dw) const {
        for (long first = CHUNK - SIZE; first >= 0; first -= SIZE) {
            const long at = first * width, after = first + SIZE;
            if (after < CHUNK)
                product(SIZE, width, CHUNK - after, {negative + after * CHUNK + first, 1, CHUNK}, dw + after * width, width,
                        du + at, width, true);
            product(SIZE, width, SIZE, columns_of(inverses_back + first * SIZE, SIZE), du + at, width, drhs + at,
                    width, false);
            for (long i = first; i < after; i++)
                for (long d = i * width; d < (i + 1) * width; d += LANES) store(dw + d, load(drhs + d) * factors[i]);
        }
    }

private:
    template <typename Factor> void invert(float *to, Factor factor) const {
        for (long first = 0; first < CHUNK; first += SIZE)
            for (long i = 0; i < SIZE; i++) {
                const float *of_row = negative + (first + i) * CHUNK + first;
                float *block = to + first * SIZE, *row = block + i * SIZE;
                std::memset(row, 0, SIZE * sizeof(float));
                row[i] = 1;
                for (long d = 0; d < SIZE; d += LANES) {
                    Vec x = load(row + d);
                    for (long j = 0; j < i; j++)
                        x += of_row[j] * factor(factors + first, i, j) * load(block + j * SIZE + d);
                    store(row + d, x);
                }
            }
    }
};
