/* Stages of products: all threads of a parallel region come here together. */
#pragma once

#include "tile_products.h"

#define MOST_SLICE 64 /* rows of x that pointers are made for at a time */

/* Rows of a buffer, or those that `index` lists. */
INLINE void point(const float **rows, const float *x, int64_t stride, const int32_t *index, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        rows[i] = x + (index ? index[i] : i) * stride;
}

/* Rows of this weight that a thread takes at a time, with so many rows of x. */
INLINE int64_t rows_of_item(const Matrix *w, int64_t count) { return on_tiles(w, count) ? PAIR : item_rows(w); }

/* Packs all rows of x, if a product with one of these weights runs on tiles. */
static void pack_all(const Matrix *weights, int64_t count, const float *x, int64_t stride, int64_t rows, bf16 *panels) {
    int wanted = 0;
    for (int64_t m = 0; m < count; m++)
        wanted |= on_tiles(weights + m, rows);
    if (!wanted)
        return;
    const int64_t columns = weights->columns;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < ceil_div(rows, 16); n++)
        pack_inputs(x + n * 16 * stride, stride, 0, least(16, rows - n * 16), columns, panels + n * panel_size(columns));
}

/* out[t * ld + n] = x[t] . weight[n], or added to it. `panels`: x as packed by `pack_all`. */
static void multiply_all(const Matrix *weights, int64_t count, const float *x, int64_t stride, const bf16 *panels,
                         int64_t tokens, float *out, int64_t ld, int add) {
    int64_t items = 0;
    for (int64_t m = 0; m < count; m++)
        items += ceil_div(weights[m].rows, rows_of_item(weights + m, tokens));
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
        int64_t m = 0, column = 0, place = item;
        for (; place >= ceil_div(weights[m].rows, rows_of_item(weights + m, tokens)); m++) {
            place -= ceil_div(weights[m].rows, rows_of_item(weights + m, tokens));
            column += weights[m].rows;
        }
        const Matrix *w = weights + m;
        const int64_t each = rows_of_item(w, tokens), first = place * each, rows = least(each, w->rows - first);
        float *to = out + column + first;
        if (on_tiles(w, tokens)) {
            tile_product(w, first, panels, tokens, to, ld, add, 0, 0);
            continue;
        }
        for (int64_t from = 0; from < tokens; from += MOST_SLICE, to += MOST_SLICE * ld) {
            const int64_t n = least(MOST_SLICE, tokens - from);
            const float *pointers[MOST_SLICE];
            point(pointers, x + from * stride, stride, 0, n);
            if (!add) {
                product(w, first, rows, pointers, n, to, ld);
                continue;
            }
            float found[MOST_SLICE * MOST_BLOCK];
            product(w, first, rows, pointers, n, found, rows);
            for (int64_t t = 0; t < n; t++)
                for (int64_t i = 0; i < rows; i++)
                    to[t * ld + i] += found[t * rows + i];
        }
    }
}

static void project(const Matrix *weights, int64_t count, const float *x, int64_t stride, bf16 *panels, int64_t tokens,
                    float *out, int64_t ld, int add) {
    pack_all(weights, count, x, stride, tokens, panels);
    multiply_all(weights, count, x, stride, panels, tokens, out, ld, add);
}
