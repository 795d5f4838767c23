/* Scores of whole blocks of keys for many queries: the selection of a prompt. */
#include "products.h"

#define ROWS 6    /* queries computed together */
#define VECTORS 4 /* of keys */

/* Raises best[r] to the largest products of `rr` rows and `vv` vectors of keys. keys: [dim, block]. */
INLINE void raise(const int rr, const int vv, const float *rows, int64_t dim, const float *keys, int64_t block, vec *best) {
    vec total[ROWS][VECTORS];
    for (int r = 0; r < rr; r++)
        for (int v = 0; v < vv; v++)
            total[r][v] = (vec){};
    for (int64_t d = 0; d < dim; d++) {
        vec key[VECTORS];
        for (int v = 0; v < vv; v++)
            key[v] = load(keys + d * block + v * LANES);
        for (int r = 0; r < rr; r++)
            for (int v = 0; v < vv; v++)
                total[r][v] += rows[r * dim + d] * key[v];
    }
    for (int r = 0; r < rr; r++)
        for (int v = 0; v < vv; v++)
            best[r] = maximum(best[r], total[r][v]);
}

/* out[r * ld + b] = the largest product of row r and a key of block b. keys: [blocks, dim, block], `block` a multiple
 * of LANES: vectors run along the keys, and the maximum is taken where the products are, in registers. */
void minim3_block_maxima(const float *rows, int64_t count, int64_t dim, const float *keys, int64_t blocks, int64_t block,
                         float *out, int64_t ld) {
    for (int64_t b = 0; b < blocks; b++, keys += dim * block)
        for (int64_t r = 0; r < count; r += ROWS) {
            const int64_t rr = least(ROWS, count - r);
            vec best[ROWS];
            for (int i = 0; i < ROWS; i++)
                best[i] = all(-INFINITY);
            for (int64_t at = 0; at < block; at += VECTORS * LANES) {
                const int64_t vv = least(VECTORS, (block - at) / LANES);
                const float *first = rows + r * dim;
                if (rr == ROWS && vv == VECTORS)
                    raise(ROWS, VECTORS, first, dim, keys + at, block, best);
                else
                    for (int64_t i = 0; i < rr; i++)
                        for (int64_t v = 0; v < vv; v++)
                            raise(1, 1, first + i * dim, dim, keys + at + v * LANES, block, best + i);
            }
            for (int64_t i = 0; i < rr; i++)
                out[(r + i) * ld + b] = largest(best[i]);
        }
}
