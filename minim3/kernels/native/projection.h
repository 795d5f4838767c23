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

/* Room of each thread, `size` numbers apart; a thread has packed its own inputs when it multiplies them. */
typedef struct {
    bf16 *memory;
    int64_t size;
} Scratch;

INLINE bf16 *own(const Scratch *scratch) { return scratch->memory + omp_get_thread_num() * scratch->size; }

/* Panels of `count` rows of x: those at `index`, or as they follow. */
static void pack_chunk(int neighbours, const float *x, int64_t stride, const int32_t *index, int64_t count,
                       int64_t columns, bf16 *to) {
    for (int64_t n = 0; n < count; n += 16)
        pack_inputs(neighbours, index ? x : x + n * stride, stride, index ? index + n : 0, least(16, count - n), columns,
                    to + n / 16 * panel_size(columns));
}

/* out[t * ld + n] = row `first + n` of a weight times row t of x, at most MOST_SLICE, or added to it. */
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

/* Blocks of rows of weights: items of vectors, or PAIR rows on tiles. */
INLINE int64_t rows_of_block(const Matrix *w, int tiles) { return tiles ? PAIR : item_rows(w); }

/* The weight that has the block, whose number within it is left; `*column`: where its rows begin among those of all. */
INLINE const Matrix *find_block(const Matrix *w, int tiles, int64_t *block, int64_t *column) {
    int64_t own;
    for (*column = 0; *block >= (own = ceil_div(w->rows, rows_of_block(w, tiles))); w++)
        *block -= own, *column += w->rows;
    return w;
}

/* `blocks` blocks go by while a chunk of x stays in the cache of a thread, which therefore takes many at first. */
static void project_on_tiles(const Matrix *weights, int64_t blocks, const float *x, int64_t stride, bf16 *panels,
                             int64_t tokens, float *out, int64_t ld, int add) {
    const int64_t chunk = rows_of_chunk(tokens, weights->columns);
    int64_t packed = -1;
#pragma omp for schedule(guided)
    for (int64_t item = 0; item < blocks * ceil_div(tokens, chunk); item++) {
        const int64_t from = item / blocks * chunk, n = least(chunk, tokens - from);
        int64_t block = item % blocks, column;
        const Matrix *w = find_block(weights, 1, &block, &column);
        if (packed != from)
            pack_chunk(neighbours(w), x + from * stride, stride, 0, n, w->columns, panels);
        packed = from;
        tile_product(w, block * PAIR, panels, n, out + from * ld + column + block * PAIR, ld, add);
    }
}

/* Chunks of x go by for each block. */
static void project_by_vectors(const Matrix *weights, int64_t blocks, const float *x, int64_t stride, int64_t tokens,
                               float *out, int64_t ld, int add) {
    const int64_t chunks = ceil_div(tokens, MOST_SLICE);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < blocks * chunks; item++) {
        const int64_t from = item % chunks * MOST_SLICE, n = least(MOST_SLICE, tokens - from);
        int64_t block = item / chunks, column;
        const Matrix *w = find_block(weights, 0, &block, &column);
        const int64_t each = item_rows(w), first = block * each;
        vector_product(w, first, least(each, w->rows - first), x + from * stride, stride, n,
                       out + from * ld + column + first, ld, add);
    }
}

/* out[t * ld + n] = x[t] . weight[n], or added to it, for weights whose rows are side by side. `scratch`: for panels of
 * x, or null for a product that is not to run on tiles. */
static void project(const Matrix *weights, int64_t count, const float *x, int64_t stride, const Scratch *scratch,
                    int64_t tokens, float *out, int64_t ld, int add) {
    int tiles = scratch != 0;
    int64_t blocks = 0;
    for (int64_t m = 0; m < count; m++)
        tiles &= on_tiles(weights + m, tokens) && neighbours(weights + m) == neighbours(weights);
    for (int64_t m = 0; m < count; m++)
        blocks += ceil_div(weights[m].rows, rows_of_block(weights + m, tiles));
    if (tiles)
        project_on_tiles(weights, blocks, x, stride, own(scratch), tokens, out, ld, add);
    else
        project_by_vectors(weights, blocks, x, stride, tokens, out, ld, add);
}
