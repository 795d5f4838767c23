/* Rows of a weight times a few rows of x.
 *
 * One accumulator a number, filled along the columns in order: a product is the same to the bit whatever other rows are
 * computed with it, and on however many threads.
 */
#pragma once

#include "vectors.h"

enum { FP32, INT8, INT4, BF16, MXFP8 };

/* `[rows, columns]`, as in `minim3.model.weight_formats`.
 * FP32: numbers, `stride` apart. INT8: codes `stride` bytes apart, scales bf16 `[rows]`.
 * INT4: two codes a byte in blocks of `block` rows, `[rows / block, columns, block / 2]`, the two of a byte neighbours
 * or half a block apart; scales and zeros bf16 pairs, `[columns / group, rows]`, groups `stride` pairs apart.
 * BF16: numbers, `stride` apart. MXFP8: e4m3 codes `stride` apart, a scale (e8m0) for each 32 columns, rows of them `group`
 * apart. */
typedef struct {
    int64_t format, rows, columns, stride;
    const void *codes;
    const uint16_t *scales;
    int64_t group, block, neighbours;
} Matrix;

#define TILE 4  /* rows of a weight computed together */
#define WIDE 6  /* rows of x computed together, at most */
#define ITEM 16 /* rows of a weight that a thread takes at a time */
#define MOST_BLOCK 64
#define MOST_SCALE 246
#define AHEAD 8 /* rows of a weight that are fetched while others are multiplied */

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE vec widened(const int8_t *codes) { return __builtin_convertvector(signed_bytes(codes), vec); }

/* Numbers of e4m3 times 2^-8: of the halves (fp16), whose exponent has one bit more, and which know the smallest ones. */
INLINE vec from_e4m3(const uint8_t *codes) {
#if defined(__AVX512BW__)
    const __m256i upper = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes)), 8);
    const __m256i half = _mm256_and_si256(_mm256_srai_epi16(upper, 1), _mm256_set1_epi16((short)0xbfff));
    const __m256i sign = _mm256_set1_epi16((short)0x8000), last = _mm256_set1_epi16((short)0xff00);
    const __mmask16 none = _mm256_cmpeq_epi16_mask(_mm256_or_si256(upper, sign), last);
    return (vec)_mm512_mask_blend_ps(none, _mm512_cvtph_ps(half), (__m512)all(NAN));
#else
    const ivec code = unsigned_bytes(codes), size = code & 127;
    const ivec normal = (size << 20) + (112 << 23);
    const vec small = __builtin_convertvector(size, vec) * 0x1p-17f;
    const ivec bits = (ivec)either(size > 7, (vec)normal, small) | (code & 128) << 24;
    return either(size == 127, all(NAN), (vec)bits);
#endif
}

/* 2^(scale - 127), and the 2^8 that the codes lack; of scales up to MOST_SCALE. */
INLINE float from_e8m0(uint8_t scale) {
    const uint32_t bits = (uint32_t)(scale + 8) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE int64_t bytes_each(const int format) { return format == FP32 ? 4 : format == BF16 ? 2 : 1; }

/* LANES numbers of a row from column i on; of MXFP8 without and of INT8 without their scales. */
INLINE vec numbers(const int format, const char *row, int64_t i) {
    switch (format) {
    case INT8: return widened((const int8_t *)row + i);
    case BF16: return widened_bf16((const uint16_t *)row + i);
    case MXFP8: return from_e4m3((const uint8_t *)row + i);
    default: return load((const float *)row + i);
    }
}

INLINE vec scaled(const int format, vec w, const uint8_t *scales, int64_t i) {
    return format == MXFP8 ? w * from_e8m0(scales[i / 32]) : w;
}

/* The last columns of a row, zeros after them. */
static __attribute__((unused)) vec last_numbers(const int format, const char *row, int64_t i, int64_t columns) {
    char copy[4 * LANES] = {0};
    memcpy(copy, row + i * bytes_each(format), (columns - i) * bytes_each(format));
    return numbers(format, copy, 0);
}

/* out[t * ld + n] for `nn` rows of a weight and `tt` rows of x; all but pointers are constants where it is inlined. */
INLINE void tile(const int format, const int nn, const int tt, const char *weight, int64_t stride, const void *scales,
                 int64_t scale_stride, const float *const *x, int64_t columns, float *out, int64_t ld) {
    const int64_t row = stride * bytes_each(format);
    vec total[TILE][WIDE];
    for (int n = 0; n < nn; n++)
        for (int t = 0; t < tt; t++)
            total[n][t] = (vec){};
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) {
        vec w[TILE];
        for (int n = 0; n < nn; n++) {
            w[n] = scaled(format, numbers(format, weight + n * row, i), (const uint8_t *)scales + n * scale_stride, i);
            __builtin_prefetch(weight + (n + AHEAD) * row + i * bytes_each(format));
        }
        for (int t = 0; t < tt; t++) {
            vec value = load(x[t] + i);
            for (int n = 0; n < nn; n++)
                total[n][t] += w[n] * value;
        }
    }
    vec rest[TILE];
    for (int n = 0; n < nn && i < columns; n++)
        rest[n] = scaled(format, last_numbers(format, weight + n * row, i, columns),
                         (const uint8_t *)scales + n * scale_stride, i);
    for (int t = 0; t < tt; t++) {
        float found[TILE];
        four_sums(total[0][t], total[nn > 1 ? 1 : 0][t], total[nn > 2 ? 2 : 0][t], total[nn > 3 ? 3 : 0][t], found);
        for (int n = 0; n < nn; n++) {
            for (int64_t j = i; j < columns; j++)
                found[n] += rest[n][j - i] * x[t][j];
            out[t * ld + n] = format == INT8 ? found[n] * from_bf16(((const uint16_t *)scales)[n]) : found[n];
        }
    }
}

INLINE void tiles_of_rows(const int format, const int nn, const Matrix *w, int64_t first, const float *const *x,
                          int64_t count, float *out, int64_t ld) {
    const char *weight = (const char *)w->codes + first * w->stride * bytes_each(format);
    const char *scales = (const char *)w->scales + first * (format == INT8 ? 2 : w->group);
    for (int64_t tiles = ceil_div(count, WIDE); tiles; tiles--) { /* alike in size */
        const int64_t tt = ceil_div(count, tiles);
#define CASE(n) case n: tile(format, nn, n, weight, w->stride, scales, w->group, x, w->columns, out, ld); break;
        switch (tt) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
        x += tt, out += tt * ld, count -= tt;
    }
}

INLINE void plain_product(const int format, const Matrix *w, int64_t first, int64_t rows, const float *const *x,
                          int64_t count, float *out, int64_t ld) {
    int64_t n = 0;
    for (; n + TILE <= rows; n += TILE)
        tiles_of_rows(format, TILE, w, first + n, x, count, out + n, ld);
    for (; n < rows; n++)
        tiles_of_rows(format, 1, w, first + n, x, count, out + n, ld);
}

/* A block of INT4 rows times `tt` rows of x: vectors run along the rows, `half` of them over the low halves of the bytes
 * and as many over the high ones. Sums of a group of columns are scaled once. */
INLINE void int4_block(const int tt, const int half, const Matrix *w, int64_t first, const float *const *x,
                       float out[][MOST_BLOCK]) {
    const uint8_t *codes = (const uint8_t *)w->codes + first * w->columns / 2;
    const int64_t bytes = w->block / 2, step = w->neighbours ? 2 : 1;
    vec total[2][4];
    for (int t = 0; t < tt; t++)
        for (int v = 0; v < 2 * half; v++)
            total[t][v] = (vec){};
    for (int64_t start = 0, g = 0; start < w->columns; start += w->group, g++) {
        vec even[2][4], odd[2][4];
        for (int t = 0; t < tt; t++)
            for (int v = 0; v < 2 * half; v++)
                even[t][v] = odd[t][v] = (vec){};
        float inputs[2] = {0, 0};
        for (int64_t k = start; k < start + w->group; k += 2) {
            for (int v = 0; v < half; v++) {
                const uint8_t *place = codes + k * bytes + v * LANES;
                ivec now = unsigned_bytes(place);
                ivec next = unsigned_bytes(place + bytes);
                vec low = __builtin_convertvector(now & 15, vec), high = __builtin_convertvector(now >> 4, vec);
                vec next_low = __builtin_convertvector(next & 15, vec);
                vec next_high = __builtin_convertvector(next >> 4, vec);
                for (int t = 0; t < tt; t++) {
                    even[t][v] += low * x[t][k];
                    even[t][half + v] += high * x[t][k];
                    odd[t][v] += next_low * x[t][k + 1];
                    odd[t][half + v] += next_high * x[t][k + 1];
                }
            }
            for (int t = 0; t < tt; t++)
                inputs[t] += x[t][k] + x[t][k + 1];
        }
        for (int v = 0; v < 2 * half; v++) {
            const int high = v >= half;
            const int64_t row = first + (w->neighbours ? high : high * bytes) + (v - high * half) * LANES * step;
            /* A pair is 32 bits, the scale in the low half: as floats, the one shifted and the other masked. */
            const uint32_t *pairs = (const uint32_t *)w->scales + g * w->stride + row;
            uvec pair;
            for (int i = 0; i < LANES; i++)
                pair[i] = pairs[i * step];
            vec scale = (vec)(pair << 16), zero = (vec)(pair & 0xffff0000u) - 8.0f * scale;
            for (int t = 0; t < tt; t++)
                total[t][v] += (even[t][v] + odd[t][v]) * scale + inputs[t] * zero;
        }
    }
    for (int t = 0; t < tt; t++)
        for (int v = 0; v < 2 * half; v++)
            for (int i = 0; i < LANES; i++) {
                const int64_t high = v >= half, lane = (v - high * half) * LANES + i;
                out[t][w->neighbours ? 2 * lane + high : high * bytes + lane] = total[t][v][i];
            }
}

static void int4_product(const Matrix *w, int64_t first, int64_t rows, const float *const *x, int64_t count, float *out,
                         int64_t ld) {
    const int64_t start = first / w->block * w->block;
    float found[2][MOST_BLOCK];
    for (int64_t block = start; block < first + rows; block += w->block)
        for (int64_t t = 0; t < count; t += 2) {
            const int64_t pair = count - t > 1 ? 2 : 1;
            if (w->block == 2 * LANES)
                pair == 2 ? int4_block(2, 1, w, block, x + t, found) : int4_block(1, 1, w, block, x + t, found);
            else
                pair == 2 ? int4_block(2, 2, w, block, x + t, found) : int4_block(1, 2, w, block, x + t, found);
            for (int64_t n = 0; n < w->block; n++)
                if (block + n >= first && block + n < first + rows)
                    for (int64_t i = 0; i < pair; i++)
                        out[(t + i) * ld + block + n - first] = found[i][n];
        }
}

/* out[t * ld + n] = row `first + n` of the weight times x[t]. */
static __attribute__((noinline, unused)) void product(const Matrix *w, int64_t first, int64_t rows, const float *const *x, int64_t count, float *out,
                    int64_t ld) {
    switch (w->format) {
    case FP32: plain_product(FP32, w, first, rows, x, count, out, ld); break;
    case INT8: plain_product(INT8, w, first, rows, x, count, out, ld); break;
    case BF16: plain_product(BF16, w, first, rows, x, count, out, ld); break;
    case MXFP8: plain_product(MXFP8, w, first, rows, x, count, out, ld); break;
    case INT4: int4_product(w, first, rows, x, count, out, ld); break;
    }
}

/* Rows of this weight that a thread takes at a time. */
INLINE int64_t item_rows(const Matrix *w) { return w->format == INT4 ? w->block : ITEM; }
