/* The alignment loss of an indexer over one block of keys, and its gradient, on tiles. Items are rows; the query heads of
 * the teacher come one after another. */
#pragma once

#include "tile_blocks.h"

#if HAVE_TILES
/* log(x) of a normal x > 0, with the polynomial of Cephes' logf. */
INLINE vec logarithm(vec x) {
    vec m = (vec)(((ivec)x & 0x7fffff) | 0x3f800000);
    const ivec large = m > all(1.41421356f);
    const vec power = __builtin_convertvector(((ivec)x >> 23) - 127 - large, vec);
    const vec f = either(large, m * 0.5f, m) - 1.0f, z = f * f;
    vec p = all(7.0376836292e-2f);
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    return p * f * z - power * 2.12194440e-4f - 0.5f * z + f + power * 0.693359375f;
}

static int tile_add_alignment(const float *queries, const float *index, float *sums, Rows rows, int64_t group,
                              int64_t dim, int64_t index_dim, const float *keys, const float *index_keys,
                              float *grad_keys, int64_t block, double *loss) {
    const int64_t size = dim + 1, index_size = index_dim + 1, width = filled(block), wide = filled(index_dim);
    const int64_t steps = filled(dim) / DEPTH, index_steps = wide / DEPTH;
    const int64_t by_dim = steps * STEP, by_index = index_steps * STEP, by_item = MANY / DEPTH * STEP;
    const int64_t by_block = width / DEPTH * STEP;
    /* A: keys and index keys by dimension, index keys turned by key, differences by item. B: queries of a head and index
     * queries by dimension, index queries by item, differences by key. */
    const int64_t sizes[] = {width / SIDE * by_dim, width / SIDE * by_index, wide / SIDE * by_block,
                             width / SIDE * by_item, MANY / SIDE * by_dim, MANY / SIDE * by_index,
                             wide / SIDE * by_item, MANY / SIDE * by_block};
    bf16 *panel[8];
    float *to_keys = make_panels(sizes, 8, width * (wide + MANY), panel), *teacher = to_keys + width * wide;
    if (!panel[0])
        return 1;
    memset(to_keys, 0, 4 * width * wide);
    panels(0, keys, size, block, dim, panel[0]);
    panels(0, index_keys, index_size, block, index_dim, panel[1]);
    panels_turned(index_keys, index_size, block, index_dim, panel[2]);
    configure_tiles();
    for (int64_t item = 0; item < rows.count; item += MANY) {
        const int64_t rr = least(MANY, rows.count - item);
        const float *query[MANY], *of_index[MANY];
        float *to[MANY], lse[MANY], scores[ITEMS * ITEMS] __attribute__((aligned(64)));
        int32_t seen[MANY];
        int64_t most_seen = 0, least_seen = block;
        for (int64_t r = 0; r < MANY; r++) {
            const int64_t place = place_of(&rows, item + least(r, rr - 1));
            query[r] = queries + place * group * size, of_index[r] = index + place * index_size;
            to[r] = sums + place * index_dim;
            seen[r] = r < rr ? (int32_t)least(place + rows.shift + 1, block) : 0;
            most_seen = most(most_seen, seen[r]), least_seen = least(least_seen, seen[r]);
        }
        const int64_t used = filled(most_seen);
        memset(teacher, 0, 4 * used * MANY);
        for (int64_t head = 0; head < group; head++) {
            for (int64_t r = 0; r < MANY; r += SIDE)
                pack_turned(query + r, dim, panel[4] + r / SIDE * by_dim);
            for (int64_t r = 0; r < MANY; r++)
                lse[r] = query[r][dim], query[r] += size;
            for (int64_t k = 0; k < used; k += ITEMS)
                for (int64_t r = 0; r < MANY; r += ITEMS) {
                    zero_tiles();
                    multiply_panels(panel[0] + k / SIDE * by_dim, by_dim, panel[4] + r / SIDE * by_dim, by_dim, steps);
                    store_tiles(scores, ITEMS);
                    for (int64_t i = 0; i < ITEMS; i++)
                        for (int half = 0; half < 2; half++) {
                            float *share = teacher + (k + i) * MANY + r + half * LANES;
                            const vec score = load(scores + i * ITEMS + half * LANES);
                            store(share, load(share) + exponential(score + load(lse + r + half * LANES)));
                        }
                }
        }
        for (int64_t r = 0; r < MANY; r += SIDE)
            pack_turned(of_index + r, index_dim, panel[5] + r / SIDE * by_index);
        panels_of_columns(of_index, MANY, index_dim, panel[6]);
        for (int64_t r = 0; r < MANY; r++)
            lse[r] = of_index[r][index_dim];
        vec total = {};
        for (int64_t k = 0; k < used; k += ITEMS)
            for (int64_t r = 0; r < MANY; r += ITEMS) {
                zero_tiles();
                multiply_panels(panel[1] + k / SIDE * by_index, by_index, panel[5] + r / SIDE * by_index, by_index,
                                index_steps);
                store_tiles(scores, ITEMS);
                for (int64_t i = 0; i < ITEMS; i += 2) {
                    vec difference[2][2];
                    for (int next = 0; next < 2; next++)
                        for (int half = 0; half < 2; half++) {
                            const int64_t at = (i + next) * ITEMS + half * LANES, from = r + half * LANES;
                            vec share = load(teacher + (k + i + next) * MANY + from) * (1.0f / group);
                            const vec log_student = load(scores + at) + load(lse + from);
                            vec student = exponential(log_student);
                            if (k + i + next >= least_seen) {
                                ivec visible;
                                memcpy(&visible, seen + from, sizeof visible);
                                visible = visible > (int32_t)(k + i + next);
                                share = either(visible, share, (vec){}), student = either(visible, student, (vec){});
                            }
                            total += share * (logarithm(maximum(share, all(1.17549435e-38f))) - log_student);
                            difference[next][half] = student - share;
                        }
                    for (int next = 0; next < 2; next++)
                        pack_line(difference[next][0], difference[next][1], (i + next) % SIDE,
                                  panel[3] + (k + i) / SIDE * by_item + r / DEPTH * STEP);
                    for (int half = 0; half < 2; half++)
                        pack_pair(difference[0][half], difference[1][half], i / 2,
                                  panel[7] + (r / SIDE + half) * by_block + k / DEPTH * STEP);
                }
            }
        *loss += sum(total);
        add_products(panel[3], panel[6], by_item, to_keys, used, wide);
        for (int64_t r = 0; r < rr; r += ITEMS)
            for (int64_t d = 0; d < index_dim; d += ITEMS) {
                zero_tiles();
                multiply_panels(panel[2] + d / SIDE * by_block, by_block, panel[7] + r / SIDE * by_block, by_block,
                                used / DEPTH);
                store_tiles(scores, ITEMS);
                add_turned(scores, to + r, rr - r, d, index_dim);
            }
    }
    _tile_release();
    add_rows(grad_keys, index_dim, to_keys, wide, block, index_dim);
    free(panel[0]);
    return 0;
}
#endif
