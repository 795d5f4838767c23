/* Prompts: selection and attention of many queries, a block of keys at a time. Every function returns 0, or 1 where there
 * is no memory. */
#include "products.h"
#include "tile_alignment.h"
#include "tile_blocks.h"

#define ROWS 6    /* queries computed together */
#define VECTORS 4 /* of keys, or of a value */
#define CHUNK 48  /* queries whose gradients go to the keys together */

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

/* The same for ROWS rows and any number of vectors up to VECTORS. */
static void times(int64_t vv, const float *const *rows, int64_t size, const float *by, int64_t stride,
                  vec found[ROWS][VECTORS]) {
    if (vv == VECTORS) {
        multiply(ROWS, VECTORS, rows, size, by, stride, found);
        return;
    }
    for (int64_t v = 0; v < vv; v++) {
        vec one[ROWS][VECTORS];
        multiply(ROWS, 1, rows, size, by + v * LANES, stride, one);
        for (int r = 0; r < ROWS; r++)
            found[r][v] = one[r][0];
    }
}

INLINE void add(float *to, vec value) { store(to, load(to) + value); }

/* out[r * ld + b] = the largest product of row r and a key of block b. keys: [blocks, dim, block], `block` a multiple
 * of LANES: vectors run along the keys, and the maximum is taken where the products are, in registers. */
int minim3_block_maxima(const float *rows, int64_t count, int64_t dim, const float *keys, int64_t blocks, int64_t block,
                         float *out, int64_t ld) {
#if HAVE_TILES
    if (minim3_tiles && block % DEPTH == 0 && dim % LANES == 0)
        return tile_block_maxima(rows, count, dim, keys, blocks, block, out, ld);
#endif
    for (int64_t b = 0; b < blocks; b++, keys += dim * block)
        for (int64_t first = 0; first < count; first += ROWS) {
            const int64_t rr = least(ROWS, count - first);
            const float *row[ROWS];
            vec best[ROWS], found[ROWS][VECTORS];
            for (int64_t r = 0; r < ROWS; r++)
                row[r] = rows + (first + least(r, rr - 1)) * dim, best[r] = all(-INFINITY);
            for (int64_t at = 0; at < block; at += VECTORS * LANES) {
                const int64_t vv = least(VECTORS, (block - at) / LANES);
                times(vv, row, dim, keys + at, block, found);
                for (int r = 0; r < ROWS; r++)
                    for (int64_t v = 0; v < vv; v++)
                        best[r] = maximum(best[r], found[r][v]);
            }
            for (int64_t r = 0; r < rr; r++)
                out[(first + r) * ld + b] = largest(best[r]);
        }
    return 0;
}

/* turned[d * block + k] = x[k * stride + d]. */
static void turn(const float *x, int64_t stride, int64_t block, int64_t size, float *turned) {
    for (int64_t k = 0; k < block; k++)
        for (int64_t d = 0; d < size; d++)
            turned[d * block + k] = x[k * stride + d];
}

/* Adds one block of keys and values to rows of queries: sums[row] += exp(query . keys) @ values, and in the last place
 * the sum of the weights alone. queries, sums: [rows, group, dim + 1], keys: [block, dim + 1], whose last channel is one
 * against minus the reference of the query. Rows: those listed, or `count` from `first` on. `block` and `dim` are
 * multiples of LANES, but `block` may be any number on tiles; there a row also sees keys up to its number plus `shift`
 * alone. */
int minim3_add_block(const float *queries, float *sums, const int64_t *listed, int64_t first, int64_t count,
                      int64_t group, int64_t dim, const float *keys, int64_t key_stride, const float *values,
                      int64_t value_stride, int64_t block, int64_t shift) {
#if HAVE_TILES
    if (minim3_tiles) {
        const Rows rows = {listed, first, count, group, shift};
        return tile_add_block(queries, sums, rows, dim, keys, key_stride, values, value_stride, block);
    }
#endif
    (void)shift; /* all keys are seen here */
    const int64_t size = dim + 1;
    float turned[size * block], weights[ROWS * block];
    turn(keys, key_stride, block, size, turned);
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
            times(vv, row, size, turned + at, block, found);
            for (int r = 0; r < ROWS; r++)
                for (int64_t v = 0; v < vv; v++) {
                    const vec share = exponential(found[r][v]);
                    total[r] += share;
                    store(weights + r * block + at + v * LANES, share);
                }
        }
        for (int64_t d = 0; d < dim; d += VECTORS * LANES) {
            const int64_t vv = least(VECTORS, (dim - d) / LANES);
            times(vv, weight, block, values + d, value_stride, found);
            for (int64_t r = 0; r < rr; r++)
                for (int64_t v = 0; v < vv; v++)
                    add(to[r] + d + v * LANES, found[r][v]);
        }
        for (int64_t r = 0; r < rr; r++)
            to[r][dim] += sum(total[r]);
    }
    return 0;
}

/* grads[k] += sum over r of weights[r][k] times rows[r], for `kk` keys and `vv` vectors. */
INLINE void add_to_keys(const int kk, const int vv, const float *weights, int64_t count, const float *const *rows,
                        int64_t d, int64_t block, float *grads, int64_t stride) {
    vec found[ROWS][VECTORS];
    for (int k = 0; k < kk; k++)
        for (int v = 0; v < vv; v++)
            found[k][v] = load(grads + k * stride + d + v * LANES);
    for (int64_t r = 0; r < count; r++) {
        vec next[VECTORS];
        for (int v = 0; v < vv; v++)
            next[v] = load(rows[r] + d + v * LANES);
        for (int k = 0; k < kk; k++)
            for (int v = 0; v < vv; v++)
                found[k][v] += weights[r * block + k] * next[v];
    }
    for (int k = 0; k < kk; k++)
        for (int v = 0; v < vv; v++)
            store(grads + k * stride + d + v * LANES, found[k][v]);
}

static void add_to_block(const float *weights, int64_t count, const float *const *rows, int64_t dim, int64_t block,
                         float *grads, int64_t stride) {
    for (int64_t d = 0; d < dim; d += VECTORS * LANES) {
        const int64_t vv = least(VECTORS, (dim - d) / LANES);
        int64_t k = 0;
        for (; vv == VECTORS && k + ROWS <= block; k += ROWS)
            add_to_keys(ROWS, VECTORS, weights + k, count, rows, d, block, grads + k * stride, stride);
        for (; k < block; k++)
            for (int64_t v = 0; v < vv; v++)
                add_to_keys(1, 1, weights + k, count, rows, d + v * LANES, block, grads + k * stride, stride);
    }
}

/* The gradient of one block of keys and values, and what it gives those of the rows that attend it. both: [rows, group,
 * 2, dim + 1], a query (last channel: minus its log-sum-exp) and its gradient (minus delta). sums: [rows, group, dim].
 * keys, values: [block, dim + 1], with ones in the last channel. grad_k, grad_v: [block, dim]. */
int minim3_add_block_gradient(const float *both, float *sums, const int64_t *listed, int64_t first, int64_t count,
                               int64_t group, int64_t dim, const float *keys, const float *values, int64_t stride,
                               float *grad_k, float *grad_v, int64_t grad_stride, int64_t block, int64_t shift) {
#if HAVE_TILES
    if (minim3_tiles) {
        const Rows rows = {listed, first, count, group, shift};
        return tile_add_block_gradient(both, sums, rows, dim, keys, values, stride, grad_k, grad_v, grad_stride, block);
    }
#endif
    (void)shift;
    const int64_t size = dim + 1;
    float turned_k[size * block], turned_v[size * block], weights[CHUNK * block], errors[CHUNK * block];
    const float *queries[CHUNK], *gradients[CHUNK];
    turn(keys, stride, block, size, turned_k);
    turn(values, stride, block, size, turned_v);
    for (int64_t item = 0; item < count * group; item += CHUNK) {
        const int64_t items = least(CHUNK, count * group - item);
        float *to[CHUNK];
        const float *error[CHUNK];
        for (int64_t r = 0; r < CHUNK; r++) { /* past the last, the last again */
            const int64_t kept = least(r, items - 1), at = item + kept;
            const int64_t row = (listed ? listed[at / group] : first + at / group) * group + at % group;
            queries[r] = both + row * 2 * size, gradients[r] = queries[r] + size;
            to[r] = sums + row * dim, error[r] = errors + kept * block;
        }
        vec weight[ROWS][VECTORS], found[ROWS][VECTORS];
        /* A few keys for all rows, and then the next: these stay in the first cache. */
        for (int64_t at = 0; at < block; at += VECTORS * LANES)
            for (int64_t start = 0; start < items; start += ROWS) {
                const int64_t vv = least(VECTORS, (block - at) / LANES);
                times(vv, queries + start, size, turned_k + at, block, weight);
                times(vv, gradients + start, size, turned_v + at, block, found);
                for (int64_t r = 0; r < least(ROWS, items - start); r++)
                    for (int64_t v = 0; v < vv; v++) {
                        const int64_t place = (start + r) * block + at + v * LANES;
                        const vec share = exponential(weight[r][v]);
                        store(weights + place, share);
                        store(errors + place, share * found[r][v]);
                    }
            }
        for (int64_t d = 0; d < dim; d += VECTORS * LANES)
            for (int64_t start = 0; start < items; start += ROWS) {
                const int64_t vv = least(VECTORS, (dim - d) / LANES);
                times(vv, error + start, block, keys + d, stride, found);
                for (int64_t r = 0; r < least(ROWS, items - start); r++)
                    for (int64_t v = 0; v < vv; v++)
                        add(to[start + r] + d + v * LANES, found[r][v]);
            }
        add_to_block(weights, items, gradients, dim, block, grad_v, grad_stride);
        add_to_block(errors, items, queries, dim, block, grad_k, grad_stride);
    }
    return 0;
}

/* The alignment loss over one block of keys, added to `loss`, its gradient at the index queries of the rows that attend
 * it, and at the index keys. Tiles are needed. queries: [rows, group, dim + 1] and index: [rows, index_dim + 1], whose
 * last channel is minus the log-sum-exp; sums: [rows, index_dim]; keys: [block, dim + 1] and index_keys:
 * [block, index_dim + 1], with ones in the last channel; grad_keys: [block, index_dim]. Other arguments as before. */
int minim3_add_block_alignment(const float *queries, const float *index, float *sums, const int64_t *listed,
                               int64_t first, int64_t count, int64_t group, int64_t dim, int64_t index_dim,
                               const float *keys, const float *index_keys, float *grad_keys, int64_t block,
                               int64_t shift, double *loss) {
#if HAVE_TILES
    const Rows rows = {listed, first, count, 1, shift};
    return tile_add_alignment(queries, index, sums, rows, group, dim, index_dim, keys, index_keys, grad_keys, block, loss);
#else
    (void)queries, (void)index, (void)sums, (void)listed, (void)first, (void)count, (void)group, (void)dim;
    (void)index_dim, (void)keys, (void)index_keys, (void)grad_keys, (void)block, (void)shift, (void)loss;
    return 1;
#endif
}
