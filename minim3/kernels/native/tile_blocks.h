/* What `blocks.c` does, on tiles. Items are query heads of the rows: 32 at a time, the last one again past the end.
 * Keys, dimensions and items are filled up with zeros to whole steps of tiles. */
#pragma once

#include "products.h"
#include "tiles.h"

#if HAVE_TILES
#define ITEMS 32  /* of a product */
#define MANY 64   /* items whose gradients go to the keys together */

typedef struct {
    const int64_t *listed;
    int64_t first, count, group, shift; /* row `place` sees keys up to `place + shift` */
} Rows;

INLINE int64_t place_of(const Rows *rows, int64_t item) {
    return rows->listed ? rows->listed[item / rows->group] : rows->first + item / rows->group;
}

INLINE int64_t filled(int64_t size) { return ceil_div(size, DEPTH) * DEPTH; }

/* out[i] = the sum over the lanes of x[i]. */
INLINE void sums_of_sixteen(vec *x, float *out) {
    turn_lanes((__m512i *)x);
    vec found = x[0];
    for (int i = 1; i < SIDE; i++)
        found += x[i];
    store(out, found);
}

/* Rows of x `stride` apart from row `at` on, null past `rows`. */
INLINE void sixteen(const float **row, const float *x, int64_t stride, int64_t at, int64_t rows) {
    for (int64_t r = 0; r < SIDE; r++)
        row[r] = at + r < rows ? x + (at + r) * stride : 0;
}

/* Panels of these sizes behind each other, and `floats` numbers of fp32 after them; `panel[0]` is null where there is no
 * memory for them, and to be freed. */
static float *make_panels(const int64_t *sizes, int count, int64_t floats, bf16 **panel) {
    int64_t total = 0;
    for (int i = 0; i < count; i++)
        total += sizes[i];
    panel[0] = aligned_alloc(64, ceil_div(2 * total + 4 * floats, 64) * 64);
    for (int i = 1; i < count; i++)
        panel[i] = panel[i - 1] + sizes[i - 1];
    return (float *)(panel[count - 1] + sizes[count - 1]);
}

/* Panels of A, 16 rows each; or of B, 16 columns each, which are these rows. */
static void panels(int turned, const float *x, int64_t stride, int64_t rows, int64_t columns, bf16 *to) {
    for (int64_t at = 0; at < filled(rows); at += SIDE, to += filled(columns) / DEPTH * STEP) {
        const float *row[SIDE];
        sixteen(row, x, stride, at, rows);
        turned ? pack_turned(row, columns, to) : pack_rows(row, columns, to);
    }
}

/* Panels of B, 16 columns of x each. */
static void panels_of_columns(const float *const *rows, int64_t count, int64_t columns, bf16 *to) {
    const int64_t steps = filled(count) / DEPTH, size = filled(columns);
    for (int64_t k = 0; k < filled(count); k += 2)
        for (int64_t d = 0; d < size; d += LANES) {
            const vec a = k < count ? load_within(rows[k], d, columns) : (vec){};
            const vec b = k + 1 < count ? load_within(rows[k + 1], d, columns) : (vec){};
            pack_pair(a, b, k % DEPTH / 2, to + (d / SIDE * steps + k / DEPTH) * STEP);
        }
}

/* Panels of A, 16 columns of x each: `rows` of `columns` numbers, `stride` apart. */
static void panels_turned(const float *x, int64_t stride, int64_t rows, int64_t columns, bf16 *to) {
    const int64_t size = filled(rows) / DEPTH * STEP;
    for (int64_t d = 0; d < filled(columns); d += SIDE)
        for (int64_t k = 0; k < filled(rows); k += DEPTH) {
            vec line[2][SIDE];
            for (int half = 0; half < 2; half++) {
                for (int64_t i = 0; i < SIDE; i++) {
                    const int64_t row = k + half * SIDE + i;
                    line[half][i] = load_within(x + row * stride, d, row < rows ? columns : 0);
                }
                turn_lanes((__m512i *)line[half]);
            }
            for (int64_t i = 0; i < SIDE; i++)
                pack_line(line[0][i], line[1][i], i, to + d / SIDE * size + k / DEPTH * STEP);
        }
}

/* to[r][d + i] += found[i][r], for `count` rows and the dimensions from `d` up to `dim`. */
static void add_turned(const float *found, float *const *to, int64_t count, int64_t d, int64_t dim) {
    for (int64_t i = 0; i < least(ITEMS, dim - d); i += SIDE)
        for (int half = 0; half < 2; half++) {
            __m512i lane[SIDE];
            for (int j = 0; j < SIDE; j++)
                lane[j] = (__m512i)load(found + (i + j) * ITEMS + half * SIDE);
            turn_lanes(lane);
            for (int64_t j = 0; j < least(SIDE, count - half * SIDE); j++) {
                float *grad = to[half * SIDE + j] + d + i;
                store(grad, load(grad) + (vec)lane[j]);
            }
        }
}

/* to[r][c] += A B for `rows` rows and `columns` columns, whole tiles: `size` numbers of bf16 a panel. */
static void add_products(const bf16 *a, const bf16 *b, int64_t size, float *to, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r += ITEMS)
        for (int64_t c = 0; c < columns; c += ITEMS) {
            load_tiles(to + r * columns + c, columns);
            multiply_panels(a + r / SIDE * size, size, b + c / SIDE * size, size, size / STEP);
            store_tiles(to + r * columns + c, columns);
        }
}

/* to[r][c] += x[r][c]: rows `stride` and `wide` apart. */
static void add_rows(float *to, int64_t stride, const float *x, int64_t wide, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += LANES)
            store(to + r * stride + c, load(to + r * stride + c) + load(x + r * wide + c));
}

static int tile_block_maxima(const float *rows, int64_t count, int64_t dim, const float *keys, int64_t blocks,
                              int64_t block, float *out, int64_t ld) {
    const int64_t size = filled(dim) / DEPTH * STEP, steps = size / STEP;
    const int64_t sizes[] = {filled(count) / SIDE * size, block / SIDE * size};
    bf16 *panel[2];
    make_panels(sizes, 2, 0, panel);
    if (!panel[0])
        return 1;
    bf16 *queries = panel[0], *by = panel[1];
    float scores[ITEMS * ITEMS] __attribute__((aligned(64)));
    panels(0, rows, dim, count, dim, queries);
    configure_tiles();
    for (int64_t b = 0; b < blocks; b++, keys += dim * block) {
        const float *line[dim];
        for (int64_t d = 0; d < dim; d++)
            line[d] = keys + d * block;
        panels_of_columns(line, dim, block, by);
        for (int64_t first = 0; first < count; first += ITEMS) {
            vec best[ITEMS];
            for (int r = 0; r < ITEMS; r++)
                best[r] = all(-INFINITY);
            for (int64_t k = 0; k < block; k += ITEMS) {
                zero_tiles();
                multiply_panels(queries + first / SIDE * size, size, by + k / SIDE * size, size, steps);
                store_tiles(scores, ITEMS);
                for (int r = 0; r < ITEMS; r++)
                    best[r] = maximum(best[r], maximum(load(scores + r * ITEMS), load(scores + r * ITEMS + LANES)));
            }
            for (int half = 0; half < least(2, ceil_div(count - first, SIDE)); half++) {
                float most[SIDE] __attribute__((aligned(64)));
                turn_lanes((__m512i *)best + half * SIDE);
                vec found = best[half * SIDE];
                for (int i = 1; i < SIDE; i++)
                    found = maximum(found, best[half * SIDE + i]);
                store(most, found);
                for (int64_t r = 0; r < least(SIDE, count - first - half * SIDE); r++)
                    out[(first + half * SIDE + r) * ld + b] = most[r];
            }
        }
    }
    _tile_release();
    free(queries);
    return 0;
}

static int tile_add_block(const float *queries, float *sums, Rows rows, int64_t dim, const float *keys,
                           int64_t key_stride, const float *values, int64_t value_stride, int64_t block) {
    const int64_t size = dim + 1, items = rows.count * rows.group, width = filled(block);
    const int64_t steps = filled(dim) / DEPTH, key_steps = width / DEPTH;
    const int64_t by_dim = steps * STEP, by_block = key_steps * STEP;
    const int64_t sizes[] = {width / SIDE * by_dim, filled(dim) / SIDE * by_block, 2 * by_dim, 2 * by_block};
    bf16 *panel[4];
    make_panels(sizes, 4, 0, panel);
    if (!panel[0])
        return 1;
    bf16 *by_key = panel[0], *by_value = panel[1], *query = panel[2], *weights = panel[3];
    float scores[ITEMS * ITEMS] __attribute__((aligned(64)));
    const float *value[block];
    for (int64_t k = 0; k < block; k++)
        value[k] = values + k * value_stride;
    panels(1, keys, key_stride, block, dim, by_key);
    panels_of_columns(value, block, dim, by_value);
    configure_tiles();
    for (int64_t item = 0; item < items; item += ITEMS) {
        const float *row[ITEMS];
        float *to[ITEMS];
        int64_t seen[ITEMS], most_seen = 0;
        const int64_t rr = least(ITEMS, items - item);
        for (int64_t r = 0; r < ITEMS; r++) {
            const int64_t at = item + least(r, rr - 1), place = place_of(&rows, at);
            row[r] = queries + (place * rows.group + at % rows.group) * size, to[r] = sums + (row[r] - queries);
            seen[r] = least(place + rows.shift + 1, block), most_seen = most(most_seen, seen[r]);
        }
        const int64_t used = filled(most_seen);
        pack_rows(row, dim, query), pack_rows(row + SIDE, dim, query + by_dim);
        for (int64_t r = 0; r < ITEMS; r++) { /* the next ones are on their way while these are multiplied */
            const int64_t next = least(item + ITEMS + r, items - 1);
            const int64_t at = (place_of(&rows, next) * rows.group + next % rows.group) * size;
            for (int64_t d = 0; d < size; d += LANES)
                __builtin_prefetch(queries + at + d), __builtin_prefetch(sums + at + d, 1);
        }
        vec total[ITEMS] = {};
        for (int64_t k = 0; k < used; k += ITEMS) {
            zero_tiles();
            multiply_panels(query, by_dim, by_key + k / SIDE * by_dim, by_dim, steps);
            store_tiles(scores, ITEMS);
            for (int64_t r = 0; r < ITEMS; r++) {
                const vec reference = all(row[r][dim]);
                vec share[2];
                for (int half = 0; half < 2; half++) {
                    const int64_t at = k + half * LANES;
                    share[half] = exponential(load(scores + r * ITEMS + half * LANES) + reference);
                    if (at + LANES > seen[r])
                        share[half] = either(lane_numbers() < (int32_t)(seen[r] - at), share[half], (vec){});
                }
                total[r] += share[0] + share[1];
                pack_line(share[0], share[1], r % SIDE, weights + r / SIDE * by_block + k / DEPTH * STEP);
            }
        }
        float totals[ITEMS] __attribute__((aligned(64)));
        sums_of_sixteen(total, totals), sums_of_sixteen(total + SIDE, totals + SIDE);
        for (int64_t d = 0; d < dim; d += ITEMS) {
            zero_tiles();
            multiply_panels(weights, by_block, by_value + d / SIDE * by_block, by_block, used / DEPTH);
            store_tiles(scores, ITEMS);
            for (int64_t r = 0; r < rr; r++)
                for (int64_t i = 0; i < least(ITEMS, dim - d); i += LANES)
                    store(to[r] + d + i, load(to[r] + d + i) + load(scores + r * ITEMS + i));
        }
        for (int64_t r = 0; r < rr; r++)
            to[r][dim] += totals[r];
    }
    _tile_release();
    free(by_key);
    return 0;
}

static int tile_add_block_gradient(const float *both, float *sums, Rows rows, int64_t dim, const float *keys,
                                    const float *values, int64_t stride, float *grad_k, float *grad_v,
                                    int64_t grad_stride, int64_t block) {
    const int64_t size = dim + 1, items = rows.count * rows.group, width = filled(block), wide = filled(dim);
    const int64_t steps = wide / DEPTH, key_steps = width / DEPTH;
    const int64_t by_dim = steps * STEP, by_block = key_steps * STEP, by_item = MANY / DEPTH * STEP;
    /* A: keys and values by dimension, keys turned by key, weights and errors by item. B: queries and their gradients
     * by dimension and by item, errors by key. */
    const int64_t sizes[] = {width / SIDE * by_dim, width / SIDE * by_dim, wide / SIDE * by_block,
                             width / SIDE * by_item, width / SIDE * by_item, MANY / SIDE * by_dim, MANY / SIDE * by_dim,
                             wide / SIDE * by_item, wide / SIDE * by_item, MANY / SIDE * by_block};
    bf16 *panel[10];
    float *to_keys = make_panels(sizes, 10, 2 * width * wide, panel), *to_values = to_keys + width * wide;
    if (!panel[0])
        return 1;
    memset(to_keys, 0, 8 * width * wide);
    panels(0, keys, stride, block, dim, panel[0]);
    panels(0, values, stride, block, dim, panel[1]);
    panels_turned(keys, stride, block, dim, panel[2]);
    configure_tiles();
    for (int64_t item = 0; item < items; item += MANY) {
        const int64_t rr = least(MANY, items - item);
        const float *query[MANY], *gradient[MANY];
        float *to[MANY], lse[MANY], delta[MANY];
        int32_t seen[MANY];
        int64_t most_seen = 0, least_seen = block;
        for (int64_t r = 0; r < MANY; r++) {
            const int64_t at = item + least(r, rr - 1), place = place_of(&rows, at);
            const int64_t row = place * rows.group + at % rows.group;
            query[r] = both + row * 2 * size, gradient[r] = query[r] + size, to[r] = sums + row * dim;
            lse[r] = query[r][dim], delta[r] = gradient[r][dim];
            seen[r] = r < rr ? (int32_t)least(place + rows.shift + 1, block) : 0;
            most_seen = most(most_seen, seen[r]), least_seen = least(least_seen, seen[r]);
        }
        const int64_t used = filled(most_seen);
        for (int64_t r = 0; r < MANY; r += SIDE) {
            pack_turned(query + r, dim, panel[5] + r / SIDE * by_dim);
            pack_turned(gradient + r, dim, panel[6] + r / SIDE * by_dim);
        }
        panels_of_columns(query, MANY, dim, panel[7]);
        panels_of_columns(gradient, MANY, dim, panel[8]);
        for (int64_t k = 0; k < used; k += ITEMS)
            for (int64_t r = 0; r < MANY; r += ITEMS) {
                float scores[ITEMS * ITEMS] __attribute__((aligned(64))), grads[ITEMS * ITEMS] __attribute__((aligned(64)));
                zero_tiles();
                multiply_panels(panel[0] + k / SIDE * by_dim, by_dim, panel[5] + r / SIDE * by_dim, by_dim, steps);
                store_tiles(scores, ITEMS);
                zero_tiles();
                multiply_panels(panel[1] + k / SIDE * by_dim, by_dim, panel[6] + r / SIDE * by_dim, by_dim, steps);
                store_tiles(grads, ITEMS);
                for (int64_t i = 0; i < ITEMS; i += 2) {
                    vec weight[2][2], error[2][2];
                    for (int next = 0; next < 2; next++)
                        for (int half = 0; half < 2; half++) {
                            const int64_t at = (i + next) * ITEMS + half * LANES, from = r + half * LANES;
                            vec share = exponential(load(scores + at) + load(lse + from));
                            if (k + i + next >= least_seen) {
                                ivec visible;
                                memcpy(&visible, seen + from, sizeof visible);
                                share = either(visible > (int32_t)(k + i + next), share, (vec){});
                            }
                            weight[next][half] = share;
                            error[next][half] = share * (load(grads + at) + load(delta + from));
                        }
                    const int64_t line = (k + i) / SIDE * by_item + r / DEPTH * STEP;
                    for (int next = 0; next < 2; next++) {
                        pack_line(weight[next][0], weight[next][1], (i + next) % SIDE, panel[3] + line);
                        pack_line(error[next][0], error[next][1], (i + next) % SIDE, panel[4] + line);
                    }
                    for (int half = 0; half < 2; half++)
                        pack_pair(error[0][half], error[1][half], i / 2,
                                  panel[9] + (r / SIDE + half) * by_block + k / DEPTH * STEP);
                }
            }
        add_products(panel[3], panel[8], by_item, to_values, used, wide);
        add_products(panel[4], panel[7], by_item, to_keys, used, wide);
        for (int64_t r = 0; r < rr; r += ITEMS)
            for (int64_t d = 0; d < dim; d += ITEMS) {
                float found[ITEMS * ITEMS] __attribute__((aligned(64)));
                zero_tiles();
                multiply_panels(panel[2] + d / SIDE * by_block, by_block, panel[9] + r / SIDE * by_block, by_block, used / DEPTH);
                store_tiles(found, ITEMS);
                add_turned(found, to + r, rr - r, d, dim);
            }
    }
    _tile_release();
    add_rows(grad_k, grad_stride, to_keys, wide, block, dim);
    add_rows(grad_v, grad_stride, to_values, wide, block, dim);
    free(panel[0]);
    return 0;
}
#endif
