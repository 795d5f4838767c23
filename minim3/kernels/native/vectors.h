/* Vectors of the width of the machine, in the extension of C that gcc and clang share. Intrinsics only where gcc makes
 * scalars of a conversion. */
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

/* Loads and stores go through types that may lie anywhere and alias anything. */
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float any_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *x) { return *(const any_vec *)x; }
INLINE void store(float *x, vec value) { *(any_vec *)x = value; }
INLINE vec all(float x) { return x - (vec){}; }

/* LANES bytes, as integers. */
#if defined(__AVX512F__)
#define WIDEN(sign) (ivec)_mm512_cvtep##sign##8_epi32(_mm_loadu_si128((const __m128i *)x))
#elif defined(__AVX2__)
#define WIDEN(sign) (ivec)_mm256_cvtep##sign##8_epi32(_mm_loadl_epi64((const __m128i *)x))
#else
#define WIDEN(sign) one_by_one(x)
#define one_by_one(x) ({ ivec found; for (int i = 0; i < LANES; i++) found[i] = (x)[i]; found; })
#endif
INLINE ivec signed_bytes(const int8_t *x) { return WIDEN(i); }
INLINE ivec unsigned_bytes(const uint8_t *x) { return WIDEN(u); }

/* LANES numbers of bf16. */
#if defined(__AVX512F__)
INLINE vec widened_bf16(const uint16_t *x) {
    return (vec)((ivec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)) << 16);
}
#elif defined(__AVX2__)
INLINE vec widened_bf16(const uint16_t *x) {
    return (vec)((ivec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)) << 16);
}
#else
INLINE vec widened_bf16(const uint16_t *x) {
    ivec bits;
    for (int i = 0; i < LANES; i++)
        bits[i] = x[i] << 16;
    return (vec)bits;
}
#endif

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#else
#define SHUFFLE __builtin_shufflevector
#endif

/* Sums over the lanes, in a fixed order: they do not depend on what else is computed. */
#if LANES == 16
#define PAIR_EVEN 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define PAIR_ODD 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define QUAD_LOW 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define QUAD_HIGH 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define FOLD 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3
#elif LANES == 8
#define FOLD 4, 5, 6, 7, 0, 1, 2, 3
#define PAIR_EVEN 0, 8, 2, 10, 4, 12, 6, 14
#define PAIR_ODD 1, 9, 3, 11, 5, 13, 7, 15
#define QUAD_LOW 0, 1, 8, 9, 4, 5, 12, 13
#define QUAD_HIGH 2, 3, 10, 11, 6, 7, 14, 15
#else
#define PAIR_EVEN 0, 4, 2, 6
#define PAIR_ODD 1, 5, 3, 7
#define QUAD_LOW 0, 1, 4, 5
#define QUAD_HIGH 2, 3, 6, 7
#endif

/* out[0..3] = sums of a, b, c, d: two rounds leave those of all four side by side in every four lanes. */
INLINE void four_sums(vec a, vec b, vec c, vec d, float *out) {
    vec ab = SHUFFLE(a, b, PAIR_EVEN) + SHUFFLE(a, b, PAIR_ODD);
    vec cd = SHUFFLE(c, d, PAIR_EVEN) + SHUFFLE(c, d, PAIR_ODD);
    vec both = SHUFFLE(ab, cd, QUAD_LOW) + SHUFFLE(ab, cd, QUAD_HIGH);
#if LANES == 16
    both += SHUFFLE(both, both, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
#if LANES >= 8
    both += SHUFFLE(both, both, FOLD);
#endif
    memcpy(out, &both, 16);
}

INLINE float sum(vec x) {
    float out[4];
    four_sums(x, x, x, x, out);
    return out[0];
}

INLINE float largest(vec x) {
    float lane[LANES], found;
    memcpy(lane, &x, sizeof x);
    found = lane[0];
    for (int i = 1; i < LANES; i++)
        found = lane[i] > found ? lane[i] : found;
    return found;
}

/* 0, 1, 2, ... */
INLINE ivec lane_numbers(void) {
    ivec lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    return lane;
}

INLINE vec either(ivec first, vec a, vec b) { return (vec)((first & (ivec)a) | (~first & (ivec)b)); }
/* NaN of `a` stays. */
#if defined(__AVX512F__)
INLINE vec maximum(vec a, vec b) { return (vec)_mm512_max_ps((__m512)b, (__m512)a); }
INLINE vec minimum(vec a, vec b) { return (vec)_mm512_min_ps((__m512)b, (__m512)a); }
#else
INLINE vec maximum(vec a, vec b) { return either(b > a, b, a); }
INLINE vec minimum(vec a, vec b) { return either(b < a, b, a); }
#endif

/* exp(x) = 2^n exp(r), |r| <= ln(2) / 2, with the polynomial of Cephes' expf: 2 units in the last place. Below -87 it stays
 * at 1.6e-38, and NaN stays. */
INLINE vec exponential(vec x) {
    x = minimum(maximum(x, all(-87.0f)), all(88.0f));
    vec shifted = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer in the low bits */
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = (((ivec)shifted) << 23) + 0x3f800000;
    return p * (vec)power;
}
