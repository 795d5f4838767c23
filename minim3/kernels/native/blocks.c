/* Prompts: selection and attention of many queries, a block of keys at a time. */
#include "products.h"

#define ROWS 6    /* queries computed together */
#define VECTORS 4 /* of keys, or of a value */

/* found[r][v] = sum over d of rows[r][d] times vectors `v` of `by` at d: `by` is [size, stride]. */
INLINE void multiply(const int rr, const int vv, const float *const *rows, int64_t size, const float *by, int64_t stride,
                     vec found[ROWS][VECTORS]) {
    for (int r = 0; r < rr; r++)
        for (int v = 0; v < vv; v++)
            found[r][v] = (vec){};
    for (int64_t d = 0; d < size; d++) {
        vec next[VECTORS];
        for (int v = 0; v < vv; v++)
            next[v] = load(by + d * stride + v * LANES);
        for (int r = 0; r < rr; r++)
            for (int v = 0; v < vv; v++)
                found[r][v] += rows[r][d] * next[v];
    }
}

/* out[r * ld + b] = the largest product of row r and a key of block b. keys: [blocks, dim, block], `block` a multiple
 * of LANES: vectors run along the keys, and the maximum is taken where the products are, in registers. */
void minim3_block_maxima(const float *rows, int64_t count, int64_t dim, const float *keys, int64_t blocks, int64_t block,
                         float *out, int64_t ld) {
    for (int64_t b = 0; b < blocks; b++, keys += dim * block)
        for (int64_t first = 0; first < count; first += ROWS) {
            const int64_t rr = least(ROWS, count - first);
            const float *row[ROWS];
            vec best[ROWS], found[ROWS][VECTORS];
            for (int64_t r = 0; r < ROWS; r++)
                row[r] = rows + (first + least(r, rr - 1)) * dim, best[r] = all(-INFINITY);
            for (int64_t at = 0; at < block; at += VECTORS * LANES) {
                const int64_t vv = least(VECTORS, (block - at) / LANES);
                if (vv == VECTORS)
                    multiply(ROWS, VECTORS, row, dim, keys + at, block, found);
                else
                    for (int64_t v = 0; v < vv; v++) {
                        vec one[ROWS][VECTORS];
                        multiply(ROWS, 1, row, dim, keys + at + v * LANES, block, one);
                        for (int r = 0; r < ROWS; r++)
                            found[r][v] = one[r][0];
                    }
                for (int r = 0; r < ROWS; r++)
                    for (int64_t v = 0; v < vv; v++)
                        best[r] = maximum(best[r], found[r][v]);
            }
            for (int64_t r = 0; r < rr; r++)
                out[(first + r) * ld + b] = largest(best[r]);
        }
}

/* Adds one block of keys and values to rows of queries: sums[row] += exp(query . keys) @ values, and in the last place
 * the sum of the weights alone. queries, sums: [rows, group, dim + 1], keys: [block, dim + 1], whose last channel is one
 * against minus the reference of the query. Rows: those listed, or `count` from `first` on. `block` and `dim` are
 * multiples of LANES. */
void minim3_add_block(const float *queries, float *sums, const int64_t *listed, int64_t first, int64_t count,
                      int64_t group, int64_t dim, const float *keys, int64_t key_stride, const float *values,
                      int64_t value_stride, int64_t block) {
    const int64_t size = dim + 1;
    float turned[size * block], weights[ROWS * block];
    for (int64_t k = 0; k < block; k++)
        for (int64_t d = 0; d < size; d++)
            turned[d * block + k] = keys[k * key_stride + d];
    for (int64_t item = 0; item < count * group; item += ROWS) {
        const int64_t rr = least(ROWS, count * group - item);
        const float *row[ROWS], *weight[ROWS];
        float *to[ROWS];
        vec total[ROWS], found[ROWS][VECTORS];
        for (int64_t r = 0; r < ROWS; r++) {
            const int64_t at = item + least(r, rr - 1), place = listed ? listed[at / group] : first + at / group;
            row[r] = queries + (place * group + at % group) * size, to[r] = sums + (row[r] - queries);
            weight[r] = weights + r * block, total[r] = (vec){};
        }
        for (int64_t at = 0; at < block; at += VECTORS * LANES) {
            const int64_t vv = least(VECTORS, (block - at) / LANES);
            if (vv == VECTORS)
                multiply(ROWS, VECTORS, row, size, turned + at, block, found);
            else
                for (int64_t v = 0; v < vv; v++) {
                    vec one[ROWS][VECTORS];
                    multiply(ROWS, 1, row, size, turned + at + v * LANES, block, one);
                    for (int r = 0; r < ROWS; r++)
                        found[r][v] = one[r][0];
                }
            for (int r = 0; r < ROWS; r++)
                for (int64_t v = 0; v < vv; v++) {
                    const vec share = exponential(found[r][v]);
                    total[r] += share;
                    store(weights + r * block + at + v * LANES, share);
                }
        }
        for (int64_t d = 0; d < dim; d += VECTORS * LANES) {
            const int64_t vv = least(VECTORS, (dim - d) / LANES);
            if (vv == VECTORS)
                multiply(ROWS, VECTORS, weight, block, values + d, value_stride, found);
            else
                for (int64_t v = 0; v < vv; v++) {
                    vec one[ROWS][VECTORS];
                    multiply(ROWS, 1, weight, block, values + d + v * LANES, value_stride, one);
                    for (int r = 0; r < ROWS; r++)
                        found[r][v] = one[r][0];
                }
            for (int64_t r = 0; r < rr; r++)
                for (int64_t v = 0; v < vv; v++)
                    store(to[r] + d + v * LANES, load(to[r] + d + v * LANES) + found[r][v]);
        }
        for (int64_t r = 0; r < rr; r++)
            to[r][dim] += sum(total[r]);
    }
}
