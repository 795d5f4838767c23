/* Stages of products: all threads of a parallel region come here together. */
#pragma once

#include <omp.h>

#include "tile_products.h"

#define MOST_SLICE 64 /* rows of x that pointers are made for at a time */

/* Rows of a buffer, or those that `index` lists. */
INLINE void point(const float **rows, const float *x, int64_t stride, const int32_t *index, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        rows[i] = x + (index ? index[i] : i) * stride;
}

/* Packs all rows of x. */
static void pack_all(const float *x, int64_t stride, int64_t rows, int64_t columns, bf16 *panels) {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < ceil_div(rows, 16); n++)
        pack_inputs(x + n * 16 * stride, stride, 0, least(16, rows - n * 16), columns, panels + n * panel_size(columns));
}

/* A product of some rows of a weight and some of x, `rows` of which are at `first`. */
static void vector_product(const Matrix *w, int64_t first, int64_t rows, const float *x, int64_t stride, int64_t count,
                           float *out, int64_t ld, int add) {
    const float *pointers[MOST_SLICE];
    point(pointers, x, stride, 0, count);
    if (!add) {
        product(w, first, rows, pointers, count, out, ld);
        return;
    }
    float found[MOST_SLICE * MOST_BLOCK];
    product(w, first, rows, pointers, count, found, rows);
    for (int64_t t = 0; t < count; t++)
        for (int64_t n = 0; n < rows; n++)
            out[t * ld + n] += found[t * rows + n];
}

/* out[t * ld + n] = x[t] . weight[n], or added to it, for weights whose rows are side by side. `panels`: room for those
 * of x, or null for a product that is not to run on tiles. */
static void project(const Matrix *weights, int64_t count, const float *x, int64_t stride, bf16 *panels, int64_t tokens,
                    float *out, int64_t ld, int add) {
    int tiles = panels != 0;
    int64_t columns = weights->columns, blocks = 0;
    for (int64_t m = 0; m < count; m++)
        tiles &= on_tiles(weights + m, tokens);
    if (tiles)
        pack_all(x, stride, tokens, columns, panels);
    for (int64_t m = 0; m < count; m++)
        blocks += ceil_div(weights[m].rows, tiles ? PAIR : item_rows(weights + m));
    const int64_t chunk = tiles ? rows_of_chunk(tokens, columns) : MOST_SLICE, chunks = ceil_div(tokens, chunk);
    const int run = tiles && blocks * chunks >= 32 * omp_get_num_threads() ? 4 : 1;
#pragma omp for schedule(dynamic, run)
    for (int64_t item = 0; item < blocks * chunks; item++) {
        /* On tiles the weights go by while a chunk of x stays in the cache, without them it is the other way round. */
        int64_t m = 0, column = 0, block = tiles ? item % blocks : item / chunks;
        const int64_t from = (tiles ? item / blocks : item % chunks) * chunk, n = least(chunk, tokens - from);
        for (int64_t own; block >= (own = ceil_div(weights[m].rows, tiles ? PAIR : item_rows(weights + m))); m++)
            block -= own, column += weights[m].rows;
        const Matrix *w = weights + m;
        const int64_t each = tiles ? PAIR : item_rows(w), first = block * each;
        float *to = out + from * ld + column + first;
        if (tiles)
            tile_product(w, first, panels + from / 16 * panel_size(columns), n, to, ld, add);
        else
            vector_product(w, first, least(each, w->rows - first), x + from * stride, stride, n, to, ld, add);
    }
}
