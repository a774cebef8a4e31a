// Vectors of float32: loads and stores, of bfloat16 too, exp and the logistic function.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
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

// Lanes of x, then of y, by their numbers.
template <int... NUMBERS> static inline Vec shuffled(Vec x, Vec y, std::integer_sequence<int, NUMBERS...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(x, y, NUMBERS...);
#else
    const IntVec numbers = {NUMBERS...};
    return __builtin_shuffle(x, y, numbers);
#endif
}
template <int DISTANCE, int... LANE> static inline Vec swapped(Vec x, std::integer_sequence<int, LANE...>) {
    return shuffled(x, x, std::integer_sequence<int, (LANE ^ DISTANCE)...>());
}
typedef std::make_integer_sequence<int, LANES> AllLanes;
static inline float sum(Vec x) {
#if defined(__AVX512F__)
    x += swapped<8>(x, AllLanes());
#endif
    x += swapped<4>(x, AllLanes());
    x += swapped<2>(x, AllLanes());
    x += swapped<1>(x, AllLanes());
    return x[0];
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

typedef uint32_t BitVec __attribute__((vector_size(LANES * 4)));
typedef uint16_t BrainVec __attribute__((vector_size(LANES * 2)));
typedef uint16_t LooseBrainVec __attribute__((vector_size(LANES * 2), aligned(2)));

static inline BitVec bits_of(const Brain *p) {
    const BrainVec bits = *reinterpret_cast<const LooseBrainVec *>(p);
    return __builtin_convertvector(bits, BitVec);
}
static inline void store_bits(uint32_t *p, BitVec x) { std::memcpy(p, &x, sizeof x); }
static inline Vec load(const Brain *p) {
    const BitVec wide = bits_of(p) << 16;
    Vec x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}
static inline void store(Brain *p, Vec x) {
    BitVec bits;
    std::memcpy(&bits, &x, sizeof bits);
    const BitVec rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const BitVec nan = bits | 0x400000;
    const BitVec kept = (bits & 0x7fffffff) > 0x7f800000 ? nan : rounded;
    *reinterpret_cast<LooseBrainVec *>(p) = __builtin_convertvector(kept >> 16, BrainVec);
}
// The same for the first n numbers of a vector; the others are 0.
template <typename T> static inline Vec load_first(const T *p, long n) {
    if (n >= LANES) return load(p);
    T first[LANES]{};
    std::memcpy(first, p, n * sizeof(T));
    return load(first);
}
template <typename T> static inline void store_first(T *p, Vec x, long n) {
    if (n >= LANES) return store(p, x);
    T all[LANES];
    store(all, x);
    std::memcpy(p, all, n * sizeof(T));
}

// exp(r) for |r| <= ln 2 / 2.
static inline Vec exp_near_zero(Vec r) {
    Vec p = Vec{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r) * r + r + 1.0f;
}

// exp(x) for x <= 0, 0 below the smallest normal number; relative error at most 2e-7.
#if defined(__AVX512F__)
static inline Vec exp_of_negative(Vec x) {
    const __mmask16 stays = _mm512_cmp_ps_mask(__m512(x), _mm512_set1_ps(-87.33654f), _CMP_NLT_UQ);  // NaN does
    const Vec n = Vec(_mm512_roundscale_ps(__m512(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    return Vec(_mm512_maskz_scalef_ps(stays, __m512(exp_near_zero(r)), __m512(n)));
}
#else
static inline Vec exp_of_negative(Vec x) {
    const Vec lowest = Vec{} - 87.33654f;
    const IntVec vanishes = x < lowest;
    const Vec y = vanishes ? lowest : x;
    const IntVec n = __builtin_convertvector(y * 1.44269504f - 0.5f, IntVec);  // towards 0, from below: to the nearest
    const Vec whole = __builtin_convertvector(n, Vec);
    const Vec r = (y - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
    const Vec p = exp_near_zero(r);
    const IntVec exponent = (n + 127) << 23;
    Vec scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return vanishes ? Vec{} : p * scale;
}
#endif

static inline Vec sigmoid(Vec x) {
    const Vec below = x > 0 ? -x : x;  // NaN stays
    const Vec e = exp_of_negative(below);
    return (x > 0 ? Vec{} + 1.0f : e) / (1.0f + e);
}
