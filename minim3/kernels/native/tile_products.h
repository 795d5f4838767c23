/* Rows of a weight times many rows of x, on tiles.
 *
 * The rows of the weight are A, split by the thread that multiplies them; those of x are B, split by each thread for
 * itself. A step pairs columns 16 apart, in both alike, which takes fewer instructions than neighbours; but neighbours
 * for BF16, whose rows are tiles as they lie in memory. What comes out is turned, [rows of the weight, rows of x]: as
 * SwiGLU's results enter the next product. A number is the same to the bit whatever other rows are computed with it.
 */
#pragma once

#include "products.h"
#include "tiles.h"

/* Rows of x from which tiles are quicker, by format: INT8, BF16 and MXFP8 need no splitting. */
#define MANY_FP32 20
#define MANY_BF16 3
#define MANY_INT8 10
#define MANY_INT4 14
#define MANY_ROWS MANY_BF16 /* of any */

#define MOST_INPUTS 256       /* rows of x multiplied at a time: their products are kept on the stack */
#define MOST_CACHED (1 << 20) /* bytes of them, which the second cache keeps while rows of the weight go by */
#define PAIR 32               /* rows of either side that are multiplied together */

#if HAVE_TILES
#define CHUNK 16 /* steps of the weight that are split at a time */

INLINE void begin_tiles(int64_t rows) {
    if (minim3_tiles && rows >= MANY_ROWS)
        configure_tiles();
}
INLINE void end_tiles(int64_t rows) {
    if (minim3_tiles && rows >= MANY_ROWS)
        _tile_release();
}

INLINE int on_tiles(const Matrix *w, int64_t count) {
    if (!minim3_tiles)
        return 0;
    switch (w->format) {
    case FP32: return count >= MANY_FP32;
    case BF16: return count >= MANY_BF16;
    case INT8:
    case MXFP8: return count >= MANY_INT8;
    default: return count >= MANY_INT4 && w->group % DEPTH == 0 && w->columns % DEPTH == 0;
    }
}

/* Numbers of a panel of so many columns. */
INLINE int64_t panel_size(int64_t columns) { return minim3_tiles ? ceil_div(columns, DEPTH) * STEP : 0; }

INLINE __mmask16 first_lanes(int64_t count) {
    return (__mmask16)(count >= LANES ? 0xffff : count > 0 ? (1 << count) - 1 : 0);
}
INLINE vec load_up_to(const float *x, int64_t count) {
    return __builtin_expect(count >= LANES, 1) ? load(x) : (vec)_mm512_maskz_loadu_ps(first_lanes(count), x);
}

/* Whether a step pairs neighbours, of these weights that multiply the same inputs. */
INLINE int neighbours(const Matrix *w) { return w->format == BF16; }

/* A panel of B, whose columns are up to 16 rows: row r is `index[r]` of x, or r. */
static void pack_inputs(int neighbours, const float *x, int64_t stride, const int32_t *index, int64_t rows,
                        int64_t columns, bf16 *to) {
    for (int64_t at = 0; at < columns; at += DEPTH, to += STEP) {
        vec half[2][SIDE];
        for (int h = 0; h < 2; h++) {
            for (int64_t r = 0; r < SIDE; r++)
                half[h][r] = load_up_to(r < rows ? x + (index ? index[r] : r) * stride + at + h * LANES : x,
                                        r < rows ? columns - at - h * LANES : 0);
            turn_lanes((__m512i *)half[h]);
        }
        const vec *column = half[0];
        for (int i = 0; i < SIDE; i++)
            neighbours ? pack_pair(column[2 * i], column[2 * i + 1], i, to) : pack_pair(column[i], column[SIDE + i], i, to);
    }
}

/* `parts` parts of 32 columns of a row of A. */
INLINE void pack_columns(const int parts, vec a, vec b, int64_t row, bf16 *to) {
    for (int p = 0; p < parts; p++, to += PART) {
        put(to + row * DEPTH, (uvec)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)((uvec)a >> 16), (__m512i)b));
        a -= (vec)((uvec)a & 0xffff0000u), b -= (vec)((uvec)b & 0xffff0000u);
    }
}

/* Parts of a number: codes of INT8, and numbers of MXFP8 with their scales, are numbers of bf16. */
INLINE int parts_of(const int format) { return format == FP32 || format == INT4 ? 3 : 1; }

/* Two panels of A: the steps `step..step + steps` of PAIR rows of a weight from `first` on, zeros past its end. */
INLINE void pack_plain(const int format, const Matrix *w, int64_t first, int64_t step, int64_t steps, bf16 *to) {
    const int parts = parts_of(format);
    const int64_t begin = step * DEPTH;
    for (int64_t r = 0; r < PAIR; r++) {
        bf16 *line = to + r / SIDE * steps * parts * PART;
        const int64_t known = first + r < w->rows ? w->columns : 0, row = least(first + r, w->rows - 1);
        const char *numbers_of = (const char *)w->codes + row * w->stride * bytes_each(format);
        const uint8_t *scales = (const uint8_t *)w->scales + row * w->group;
        for (int64_t s = 0; s < steps; s++, line += parts * PART) {
            vec half[2];
            for (int h = 0; h < 2; h++) {
                const int64_t at = begin + s * DEPTH + h * LANES;
                if (__builtin_expect(at + LANES <= known, 1))
                    half[h] = scaled(format, numbers(format, numbers_of, at), scales, at);
                else if (at < known)
                    half[h] = scaled(format, last_numbers(format, numbers_of, at, known), scales, at);
                else
                    half[h] = (vec){};
            }
            pack_columns(parts, half[0], half[1], r % SIDE, line);
        }
    }
}

/* The same of INT4, whose vectors run along the rows: they are turned. */
static void pack_int4(const Matrix *w, int64_t first, int64_t step, int64_t steps, bf16 *to) {
    const int64_t bytes = w->block / 2, offset = first % w->block;
    const uint8_t *codes = (const uint8_t *)w->codes + (first - offset) * bytes / w->block * w->columns;
    for (int64_t s = 0; s < steps; s++)
        for (int64_t v = 0; v < 2; v++) {
            /* Lane i is row `2 i + v`, or `16 v + i`. */
            const int64_t row = offset + v * SIDE, high = w->neighbours ? v : row >= bytes;
            const int64_t place = w->neighbours ? offset / 2 : row % bytes, column = (step + s) * DEPTH;
            const uint32_t *pairs = (const uint32_t *)w->scales + column / w->group * w->stride + first;
            uvec pair;
            for (int i = 0; i < SIDE; i++)
                pair[i] = pairs[w->neighbours ? 2 * i + v : v * SIDE + i];
            const vec scale = (vec)(pair << 16), zero = (vec)(pair & 0xffff0000u) - 8.0f * scale;
            vec half[2][SIDE];
            for (int h = 0; h < 2; h++) {
                for (int i = 0; i < SIDE; i++) {
                    const ivec code = unsigned_bytes(codes + (column + h * SIDE + i) * bytes + place) >> 4 * (int)high & 15;
                    half[h][i] = __builtin_convertvector(code, vec) * scale + zero;
                }
                turn_lanes((__m512i *)half[h]);
            }
            for (int64_t i = 0; i < SIDE; i++) {
                const int64_t r = w->neighbours ? 2 * i + v : v * SIDE + i;
                const int known = first + r < w->rows;
                pack_columns(3, known ? half[0][i] : (vec){}, known ? half[1][i] : (vec){}, r % SIDE,
                             to + (r / SIDE * steps + s) * STEP);
            }
        }
}

/* The same of BF16, as they lie. */
static void pack_bf16(const Matrix *w, int64_t first, int64_t step, int64_t steps, bf16 *to) {
    for (int64_t r = 0; r < PAIR; r++)
        for (int64_t s = 0; s < steps; s++) {
            const int64_t at = (step + s) * DEPTH, known = first + r < w->rows ? w->columns - at : 0;
            const bf16 *row = (const bf16 *)w->codes + least(first + r, w->rows - 1) * w->stride + at;
            const __mmask32 some = known >= DEPTH ? 0xffffffffu : known > 0 ? (1u << known) - 1 : 0;
            put(to + (r / SIDE * steps + s) * PART + r % SIDE * DEPTH, (uvec)_mm512_maskz_loadu_epi16(some, row));
        }
}

/* Where rows of BF16 are whole tiles, and need not be packed. */
INLINE int lie_as_tiles(const Matrix *w, int64_t first) {
    return w->format == BF16 && first + PAIR <= w->rows && w->columns % DEPTH == 0;
}

INLINE void pack_weight(const int format, const Matrix *w, int64_t first, int64_t step, int64_t steps, bf16 *to) {
    if (format == INT4)
        pack_int4(w, first, step, steps, to);
    else if (format == BF16)
        pack_bf16(w, first, step, steps, to);
    else
        pack_plain(format, w, first, step, steps, to);
}

/* What comes from memory while others are multiplied: for each step, `rows` pieces of `line` bytes, `stride` apart. */
typedef struct {
    const char *at;
    int64_t rows, stride, line;
} Coming;

INLINE void fetch(const Coming *coming, int64_t step) {
    for (int64_t r = 0; r < coming->rows; r++)
        for (int64_t i = 0; i < coming->line; i += 64)
            _mm_prefetch(coming->at + r * coming->stride + step * coming->line + i, _MM_HINT_T1);
}

/* Of a weight: what share `part` of `parts` of the rows `first..first + PAIR` brings from a step on. */
INLINE Coming coming_rows(const int format, const Matrix *w, int64_t first, int64_t step, int64_t part, int64_t parts) {
    if (format == INT4) {
        const int64_t line = DEPTH * w->block / 2;
        return (Coming){(const char *)w->codes + first / w->block * w->columns * w->block / 2 + step * line,
                        part == 0 && first < w->rows, 0, line};
    }
    const int64_t size = bytes_each(format), share = ceil_div(PAIR, parts), row = first + part * share;
    return (Coming){(const char *)w->codes + (row * w->stride + step * DEPTH) * size,
                    least(share, least(first + PAIR, w->rows) - row), w->stride * size, DEPTH * size};
}

/* Adds to tiles 0 and 2 the products of two panels of A of `parts` parts and one of B, and to 1 and 3 those of another
 * of B, if `two`. */
INLINE void multiply_steps(const int parts, const int two, const bf16 *a, int64_t a_next, const bf16 *b, int64_t b_next,
                           int64_t steps, const Coming *coming) {
#define B_PARTS(p) _tile_loadd(6, b + (p) * PART, 64); if (two) _tile_loadd(7, b + b_next + (p) * PART, 64)
#define PRODUCTS() _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(2, 5, 6); \
    if (two) { _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(3, 5, 7); }
    WRITTEN();
    for (int64_t s = 0; s < steps; s++, a += parts * PART, b += STEP) {
        fetch(coming, s);
        A_PART(0); B_PARTS(2); PRODUCTS();
        B_PARTS(1); PRODUCTS();
        if (parts > 1) {
            A_PART(1); PRODUCTS();
        }
        B_PARTS(0); PRODUCTS();
        if (parts > 1) {
            A_PART(2); PRODUCTS();
            A_PART(0); PRODUCTS();
        }
    }
}

/* The same for rows of BF16 from `first` on where they lie. */
INLINE void multiply_rows(const Matrix *w, int64_t first, const int two, const bf16 *b, int64_t b_next, int64_t steps,
                          const Coming *coming) {
    const char *a = (const char *)w->codes + first * w->stride * 2;
    const int64_t row = w->stride * 2;
    WRITTEN();
    for (int64_t s = 0; s < steps; s++, a += DEPTH * 2, b += STEP) {
        fetch(coming, s);
        _tile_loadd(4, a, row);
        _tile_loadd(5, a + SIDE * row, row);
        B_PARTS(2); PRODUCTS();
        B_PARTS(1); PRODUCTS();
        B_PARTS(0); PRODUCTS();
    }
}

/* Codes are scaled where they have been summed. */
INLINE void scale_rows(const int format, const Matrix *w, int64_t first, float *found, int64_t stride, int64_t count) {
    for (int64_t r = 0; format == INT8 && r < least(PAIR, w->rows - first); r++)
        for (int64_t t = 0; t < count; t += LANES)
            store(found + r * stride + t, load(found + r * stride + t) * from_bf16(w->scales[first + r]));
}

static void rows_as_they_lie(const Matrix *w, int64_t first, const bf16 *x, int64_t panels, float *out) {
    const int64_t steps = w->columns / DEPTH, size = steps * STEP;
    for (int64_t p = 0; p < panels; p += 2) {
        const Coming coming = coming_rows(BF16, w, first + PAIR, 0, p / 2, ceil_div(panels, 2));
        zero_tiles();
        if (p + 1 < panels)
            multiply_rows(w, first, 1, x + p * size, size, steps, &coming);
        else
            multiply_rows(w, first, 0, x + p * size, size, steps, &coming);
        store_tiles(out + p * SIDE, MOST_INPUTS);
    }
}

INLINE void rows_of_format(const int format, const Matrix *w, int64_t first, const bf16 *x, int64_t panels, float *out) {
    const int parts = parts_of(format);
    const int64_t steps = ceil_div(w->columns, DEPTH), size = steps * STEP;
    bf16 weight[2 * CHUNK * parts * PART] __attribute__((aligned(64)));
    for (int64_t step = 0; step < steps; step += CHUNK) {
        const int64_t n = least(CHUNK, steps - step), next = n * parts * PART;
        pack_weight(format, w, first, step, n, weight);
        /* While these are multiplied the next come, of the same rows or of those after them. */
        const int64_t after = step + CHUNK < steps ? step + CHUNK : 0;
        for (int64_t p = 0; p < panels; p += 2) {
            const Coming coming = coming_rows(format, w, after ? first : first + PAIR, after, p / 2, ceil_div(panels, 2));
            const bf16 *by = x + p * size + step * STEP;
            float *to = out + p * SIDE;
            step ? load_tiles(to, MOST_INPUTS) : zero_tiles();
            if (p + 1 < panels)
                multiply_steps(parts, 1, weight, next, by, size, n, &coming);
            else
                multiply_steps(parts, 0, weight, next, by, size, n, &coming);
            store_tiles(to, MOST_INPUTS);
        }
    }
    scale_rows(format, w, first, out, MOST_INPUTS, panels * SIDE);
}

/* out[n * MOST_INPUTS + t] = row `first + n` of the weight times row t of x, PAIR and up to MOST_INPUTS rows. */
static __attribute__((noinline)) void tile_rows(const Matrix *w, int64_t first, const bf16 *x, int64_t panels, float *out) {
    switch (w->format) {
    case FP32: rows_of_format(FP32, w, first, x, panels, out); break;
    case INT8: rows_of_format(INT8, w, first, x, panels, out); break;
    case BF16:
        if (lie_as_tiles(w, first))
            rows_as_they_lie(w, first, x, panels, out);
        else
            rows_of_format(BF16, w, first, x, panels, out);
        break;
    case MXFP8: rows_of_format(MXFP8, w, first, x, panels, out); break;
    case INT4: rows_of_format(INT4, w, first, x, panels, out); break;
    }
}

/* Turns `rows` times `count` such products, at most PAIR of either, and stores them: out[t * ld + n]; or adds them, to row
 * `index[t]` and times `factor[t]` where these are given. */
INLINE void turn_out(const float *found, int64_t stride, int64_t rows, int64_t count, float *out, int64_t ld, int add,
                     const int32_t *index, const float *factor) {
    for (int64_t t = 0; t < count; t += SIDE)
        for (int64_t n = 0; n < least(rows, PAIR); n += SIDE) {
            const __mmask16 known = first_lanes(rows - n);
            vec lane[SIDE];
            for (int i = 0; i < SIDE; i++)
                lane[i] = load(found + (n + i) * stride + t);
            turn_lanes((__m512i *)lane);
            for (int64_t j = 0; j < least(SIDE, count - t); j++) {
                float *to = out + (index ? index[t + j] : t + j) * ld + n;
                const vec before = add ? (vec)_mm512_maskz_loadu_ps(known, to) : (vec){};
                const vec value = factor ? before + lane[j] * factor[t + j] : before + lane[j];
                _mm512_mask_storeu_ps(to, known, (__m512)value);
            }
        }
}

/* out[t * ld + n] = row `first + n` of a weight times row t of x, PAIR and up to MOST_INPUTS rows; or added. */
static void tile_product(const Matrix *w, int64_t first, const bf16 *x, int64_t count, float *out, int64_t ld, int add) {
    float found[PAIR * MOST_INPUTS] __attribute__((aligned(64)));
    tile_rows(w, first, x, ceil_div(count, SIDE), found);
    turn_out(found, MOST_INPUTS, w->rows - first, count, out, ld, add, 0, 0);
}

INLINE void add_pairs(const int format, const Matrix *w, int64_t first, int64_t pairs, const bf16 *x, int64_t count,
                      bf16 *weight, float *out, int64_t ld, const int32_t *index, const float *factor) {
    const int parts = parts_of(format);
    const int64_t steps = ceil_div(w->columns, DEPTH), size = steps * STEP, next = steps * parts * PART;
    float found[PAIR * PAIR] __attribute__((aligned(64)));
    for (int64_t n = 0; n < pairs; n++)
        if (format != BF16 || !lie_as_tiles(w, first + n * PAIR))
            pack_weight(format, w, first + n * PAIR, 0, steps, weight + 2 * n * next);
    for (int64_t t = 0; t < count; t += PAIR, x += 2 * size)
        for (int64_t n = 0; n < pairs; n++) {
            const int64_t row = first + n * PAIR, share = 2 * size / pairs;
            const int64_t left = ceil_div(most(0, count - t - PAIR), SIDE);
            const Coming coming = {(const char *)(x + 2 * size) + n * share, least(2, left), 2 * size, share / steps};
            zero_tiles();
            if (format == BF16 && lie_as_tiles(w, row)) {
                if (count - t > SIDE)
                    multiply_rows(w, row, 1, x, size, steps, &coming);
                else
                    multiply_rows(w, row, 0, x, size, steps, &coming);
            } else if (count - t > SIDE)
                multiply_steps(parts, 1, weight + 2 * n * next, next, x, size, steps, &coming);
            else
                multiply_steps(parts, 0, weight + 2 * n * next, next, x, size, steps, &coming);
            store_tiles(found, PAIR);
            scale_rows(format, w, row, found, PAIR, least(PAIR, count - t));
            turn_out(found, PAIR, w->rows - row, least(PAIR, count - t), out + n * PAIR, ld, 1, index + t, factor + t);
        }
}

/* out[index[t] * ld + n] += factor[t] * row `first + n` of a weight times row t of x, for `pairs` times PAIR rows, which
 * are split once, at `weight`: x is read once. */
static __attribute__((noinline)) void tile_add(const Matrix *w, int64_t first, int64_t pairs, const bf16 *x, int64_t count,
                                               bf16 *weight, float *out, int64_t ld, const int32_t *index,
                                               const float *factor) {
    switch (w->format) {
    case FP32: add_pairs(FP32, w, first, pairs, x, count, weight, out, ld, index, factor); break;
    case INT8: add_pairs(INT8, w, first, pairs, x, count, weight, out, ld, index, factor); break;
    case BF16: add_pairs(BF16, w, first, pairs, x, count, weight, out, ld, index, factor); break;
    case MXFP8: add_pairs(MXFP8, w, first, pairs, x, count, weight, out, ld, index, factor); break;
    case INT4: add_pairs(INT4, w, first, pairs, x, count, weight, out, ld, index, factor); break;
    }
}
#else
typedef uint16_t bf16;
INLINE void begin_tiles(int64_t rows) {}
INLINE void end_tiles(int64_t rows) {}
INLINE int on_tiles(const Matrix *w, int64_t count) { return 0; }
INLINE int64_t panel_size(int64_t columns) { return 0; }
INLINE int neighbours(const Matrix *w) { return 0; }
INLINE void pack_inputs(int neighbours, const float *x, int64_t stride, const int32_t *index, int64_t rows,
                        int64_t columns, bf16 *to) {}
INLINE void tile_product(const Matrix *w, int64_t first, const bf16 *x, int64_t count, float *out, int64_t ld, int add) {}
INLINE void tile_add(const Matrix *w, int64_t first, int64_t pairs, const bf16 *x, int64_t count, bf16 *weight, float *out,
                     int64_t ld, const int32_t *index, const float *factor) {}
#endif

/* Rows of x that are multiplied at a time, at most, and of so many: whole panels, alike in number. */
INLINE int64_t most_rows(int64_t columns) {
    return least(MOST_INPUTS, most(PAIR, MOST_CACHED / (6 * columns) / PAIR * PAIR));
}
INLINE int64_t rows_of_chunk(int64_t rows, int64_t columns) {
    return ceil_div(ceil_div(rows, ceil_div(rows, most_rows(columns))), 16) * 16;
}

/* Numbers of the panels of so many. */
INLINE int64_t scratch_size(int64_t columns) { return most_rows(columns) / 16 * panel_size(columns); }
