/* Matrix products in fp32 on the tiles of bf16 that some processors multiply at once (Intel's AMX).
 *
 * Cut off after its first 8 bits, and what is left again, a number of fp32 is the sum of three of bf16, exactly. Six of
 * the nine products of two such sums are kept; what the others would add lies below the last bit of an fp32. A tile
 * multiplies sixteen times as fast as vectors do, so that a product comes out more than twice as fast as in fp32
 * (Henry, Tang and Heinecke 2019, https://arxiv.org/abs/1904.06376).
 *
 * A panel holds 16 rows of A, or 16 columns of B, a step of 32 of what is summed over at a time: [steps, 3 parts, 512].
 * For A a part is [16 rows, 32]; for B it is [16, 16 columns, 2], of which a pair stands side by side.
 */
#pragma once

#include "vectors.h"

#if LANES == 16 && defined(__AMX_BF16__) && defined(__linux__)
#define HAVE_TILES 1
#else
#define HAVE_TILES 0
#endif

/* Whether the system lets this process use them: set once by `minim3_use_tiles`. */
extern int minim3_tiles;

#if HAVE_TILES
#define SIDE 16
#define DEPTH 32
#define PART 512          /* numbers of a part */
#define STEP (3 * PART) /* of a step of a panel */

typedef uint16_t bf16;

INLINE void configure_tiles(void) {
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++)
        shape.bytes[i] = 64, shape.rows[i] = SIDE;
    _tile_loadconfig(&shape);
}

/* The three parts, each in the upper halves of 32 bits. */
INLINE void split(vec x, uvec part[3]) {
    const uvec upper = (uvec){} + 0xffff0000u;
    part[0] = (uvec)x & upper;
    const vec rest = x - (vec)part[0];
    part[1] = (uvec)rest & upper;
    part[2] = (uvec)(rest - (vec)part[1]) & upper;
}

INLINE void put(bf16 *to, uvec words) { _mm512_store_si512(to, (__m512i)words); }

/* 32 numbers of a row of A: line `row` of the parts at `to`. */
INLINE void pack_line(vec a, vec b, int64_t row, bf16 *to) {
    /* The upper halves of the one, then those of the other. */
    const __m512i odd = (__m512i)(uvec){0x030001, 0x070005, 0x0b0009, 0x0f000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d,
                                        0x230021, 0x270025, 0x2b0029, 0x2f002d, 0x330031, 0x370035, 0x3b0039, 0x3f003d};
    uvec first[3], second[3];
    split(a, first), split(b, second);
    for (int p = 0; p < 3; p++)
        put(to + p * PART + row * DEPTH, (uvec)_mm512_permutex2var_epi16((__m512i)first[p], odd, (__m512i)second[p]));
}

/* Two numbers each of 16 columns of B: line `pair` of the parts at `to`. */
INLINE void pack_pair(vec a, vec b, int64_t pair, bf16 *to) {
    uvec first[3], second[3];
    split(a, first), split(b, second);
    for (int p = 0; p < 3; p++)
        put(to + p * PART + pair * DEPTH, first[p] >> 16 | second[p]);
}

/* Sixteen vectors of 32 bits as a matrix, turned. */
INLINE void turn_lanes(__m512i x[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    for (int half = 0; half < 16; half += 8)
        for (int i = 0; i < 4; i++) {
            y[half + i] = _mm512_shuffle_i32x4(x[half + i], x[half + i + 4], 0x88);
            y[half + i + 4] = _mm512_shuffle_i32x4(x[half + i], x[half + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    }
}

/* `row`: of `columns` numbers, a multiple of LANES; zeros after them. */
INLINE vec load_within(const float *row, int64_t at, int64_t columns) { return at < columns ? load(row + at) : (vec){}; }

/* A panel of A: 16 rows with their columns, zeros where a row is null. */
INLINE void pack_rows(const float *const *rows, int64_t columns, bf16 *to) {
    for (int64_t at = 0; at < columns; at += DEPTH, to += STEP)
        for (int64_t r = 0; r < SIDE; r++) {
            const int64_t known = rows[r] ? columns : 0;
            pack_line(load_within(rows[r], at, known), load_within(rows[r], at + LANES, known), r, to);
        }
}

/* A panel of B, whose columns are these rows. */
INLINE void pack_turned(const float *const *rows, int64_t columns, bf16 *to) {
    for (int64_t at = 0; at < columns; at += DEPTH, to += STEP) {
        bf16 lines[STEP] __attribute__((aligned(64)));
        for (int64_t r = 0; r < SIDE; r++) {
            const int64_t known = rows[r] ? columns : 0;
            pack_line(load_within(rows[r], at, known), load_within(rows[r], at + LANES, known), r, lines);
        }
        for (int p = 0; p < 3; p++) {
            __m512i words[SIDE];
            for (int r = 0; r < SIDE; r++)
                words[r] = _mm512_load_si512(lines + p * PART + r * DEPTH);
            turn_lanes(words);
            for (int r = 0; r < SIDE; r++)
                put(to + p * PART + r * DEPTH, (uvec)words[r]);
        }
    }
}

/* The intrinsics do not say that they read memory. */
#define WRITTEN() __asm__ volatile("" ::: "memory")

#define A_PART(p) _tile_loadd(4, a + (p) * PART, 64); _tile_loadd(5, a + a_next + (p) * PART, 64)
#define B_PART(p) _tile_loadd(6, b + (p) * PART, 64); _tile_loadd(7, b + b_next + (p) * PART, 64)
#define MULTIPLY() _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7)

/* Adds the products of two panels of A (`a_next` apart) and two of B to tiles 0 (the first of both), 1 (first and
 * second), 2 (second and first) and 3. */
INLINE void multiply_panels(const bf16 *a, int64_t a_next, const bf16 *b, int64_t b_next, int64_t steps) {
    WRITTEN();
    for (int64_t s = 0; s < steps; s++, a += STEP, b += STEP) {
        /* One side of every product is there from the last. */
        A_PART(0); B_PART(2); MULTIPLY();
        B_PART(1); MULTIPLY();
        A_PART(1); MULTIPLY();
        B_PART(0); MULTIPLY();
        A_PART(2); MULTIPLY();
        A_PART(0); MULTIPLY();
    }
}

INLINE void zero_tiles(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Tiles 0 to 3 as a matrix [32, 32], rows `stride` numbers apart. */
INLINE void store_tiles(float *to, int64_t stride) {
    _tile_stored(0, to, 4 * stride);
    _tile_stored(1, to + SIDE, 4 * stride);
    _tile_stored(2, to + SIDE * stride, 4 * stride);
    _tile_stored(3, to + SIDE * stride + SIDE, 4 * stride);
    WRITTEN();
}

INLINE void load_tiles(const float *from, int64_t stride) {
    WRITTEN();
    _tile_loadd(0, from, 4 * stride);
    _tile_loadd(1, from + SIDE, 4 * stride);
    _tile_loadd(2, from + SIDE * stride, 4 * stride);
    _tile_loadd(3, from + SIDE * stride + SIDE, 4 * stride);
}
#endif
