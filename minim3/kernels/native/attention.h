/* Block selection and attention of new tokens over the pages of their sequences. */
#pragma once

#include "products.h"

/* Keys, values and index keys of one layer: `[pages, heads, page, D]`, `[pages, page, D]`. */
typedef struct {
    float *k, *v, *index_k;
} Pages;

/* How a layer selects; `topk` 0: it attends all. */
typedef struct {
    int64_t topk, block, init, local, lse;
} Selection;

/* A new token: the pages of its sequence, and how many of their tokens it sees, itself included. */
typedef struct {
    const int64_t *pages;
    int64_t visible, page_size;
} View;

#define RUN 64    /* keys whose scores are made together */
#define SPAN 512  /* keys of a share of the work: fixed, so that sums do not depend on the number of threads */
#define MOST_ROWS 32 /* query heads of a KV head, of some tokens, or index heads */

/* The keys from `start` on that follow each other in memory, up to `stop` and RUN; `*row`: the first, as a row of D. */
INLINE int64_t run_of_keys(const View *view, int64_t start, int64_t stop, int64_t heads, int64_t head, int64_t *row) {
    const int64_t offset = start % view->page_size;
    *row = (view->pages[start / view->page_size] * heads + head) * view->page_size + offset;
    return least(least(stop - start, view->page_size - offset), RUN);
}

/* Scores of the blocks `first..last` of one token, for every index head: out[head * ld + block]. */
static void score_blocks(const View *view, const Selection *s, const float *index_k, const float *const *q, int64_t heads,
                         int64_t dim, int64_t first, int64_t last, float *out, int64_t ld) {
    float scores[MOST_ROWS * RUN];
    for (int64_t b = first; b < last; b++) {
        const int64_t stop = least((b + 1) * s->block, view->visible);
        float best[MOST_ROWS], total[MOST_ROWS];
        for (int64_t h = 0; h < heads; h++)
            best[h] = -INFINITY, total[h] = 0;
        for (int64_t at = b * s->block, row, n; at < stop; at += n) {
            n = run_of_keys(view, at, stop, 1, 0, &row);
            const Matrix keys = {FP32, n, dim, dim, index_k + row * dim, 0, 0, 0, 0};
            product(&keys, 0, n, q, heads, scores, RUN);
            for (int64_t h = 0; h < heads; h++) {
                const float before = best[h], *score = scores + h * RUN;
                for (int64_t i = 0; i < n; i++)
                    best[h] = score[i] > best[h] ? score[i] : best[h];
                if (s->lse) {
                    total[h] *= expf(before - best[h]);
                    for (int64_t i = 0; i < n; i++)
                        total[h] += expf(score[i] - best[h]);
                }
            }
        }
        for (int64_t h = 0; h < heads; h++)
            out[h * ld + b] = s->lse ? best[h] + logf(total[h]) : best[h];
    }
}

/* The best `topk` of `count` blocks, ascending; forced ones first, then by score, the lower id among equals. */
static void choose_blocks(const Selection *s, int64_t count, const float *scores, int32_t *chosen) {
    float kept[s->topk];
    int64_t held = 0;
    for (int64_t b = 0; b < count; b++) {
        const float score = b < s->init || b > count - 1 - s->local ? INFINITY : scores[b];
        if (held == s->topk && !(score > kept[held - 1]))
            continue;
        int64_t place = held < s->topk ? held++ : held - 1;
        for (; place > 0 && score > kept[place - 1]; place--)
            kept[place] = kept[place - 1], chosen[place] = chosen[place - 1];
        kept[place] = score, chosen[place] = (int32_t)b;
    }
    for (int64_t i = 1; i < held; i++) {
        const int32_t id = chosen[i];
        int64_t place = i;
        for (; place > 0 && chosen[place - 1] > id; place--)
            chosen[place] = chosen[place - 1];
        chosen[place] = id;
    }
}

/* What rows of queries have of some keys: sums of exp(score - largest), alone and times the values. */
typedef struct {
    float *sum; /* [rows, dim] */
    float *largest, *total;
} Share;

/* sum[g] += shares[g] @ values, `vectors` vectors of `gg` rows at a time. */
INLINE void add_values(const int gg, const int vectors, const float *shares, const float *values, int64_t n, int64_t dim,
                       float *sum) {
    vec found[4][4];
    for (int g = 0; g < gg; g++)
        for (int v = 0; v < vectors; v++)
            found[g][v] = load(sum + g * dim + v * LANES);
    for (int64_t i = 0; i < n; i++) {
        vec value[4];
        for (int v = 0; v < vectors; v++)
            value[v] = load(values + i * dim + v * LANES);
        for (int g = 0; g < gg; g++)
            for (int v = 0; v < vectors; v++)
                found[g][v] += shares[g * RUN + i] * value[v];
    }
    for (int g = 0; g < gg; g++)
        for (int v = 0; v < vectors; v++)
            store(sum + g * dim + v * LANES, found[g][v]);
}

/* Adds `n` keys with these scores to what `rows` rows of queries have. */
static void add_run(float *scores, int64_t n, const float *values, int64_t rows, int64_t dim, const Share *share) {
    for (int64_t g = 0; g < rows; g++) {
        float *score = scores + g * RUN;
        for (int64_t i = n; i < ceil_div(n, LANES) * LANES; i++)
            score[i] = -INFINITY;
        vec best = load(score);
        for (int64_t i = LANES; i < n; i += LANES)
            best = maximum(best, load(score + i));
        const float before = share->largest[g], now = fmaxf(before, largest(best));
        vec total = {};
        for (int64_t i = 0; i < n; i += LANES) {
            vec weight = exponential(load(score + i) - now);
            store(score + i, weight);
            total += weight;
        }
        const float factor = before == -INFINITY ? 0.0f : expf(before - now); /* of nothing, where nothing was added before */
        share->largest[g] = now;
        share->total[g] = share->total[g] * factor + sum(total);
        if (before > -INFINITY && factor != 1.0f)
            for (int64_t d = 0; d < dim; d += LANES)
                store(share->sum + g * dim + d, load(share->sum + g * dim + d) * factor);
    }
    for (int64_t g = 0; g < rows; g += 4)
        for (int64_t d = 0; d < dim; d += 4 * LANES) {
            const int64_t gg = least(4, rows - g), vectors = least(4, (dim - d) / LANES);
            const float *weights = scores + g * RUN;
            float *out = share->sum + g * dim + d;
            if (gg == 4 && vectors == 4)
                add_values(4, 4, weights, values + d, n, dim, out);
            else
                for (int64_t i = 0; i < gg; i++)
                    for (int64_t j = 0; j < vectors; j++)
                        add_values(1, 1, weights + i * RUN, values + d + j * LANES, n, dim, out + i * dim + j * LANES);
        }
}

/* The keys `start..stop` of one KV head, for the `rows` query heads that share it, of `tokens` tokens in a row of one
 * sequence, each of which sees those before it. `dim` is a multiple of LANES. */
static void attend_keys(const View *views, int64_t tokens, int64_t start, int64_t stop, const Pages *pages, int64_t heads,
                        int64_t head, const float *const *q, int64_t rows, int64_t dim, const Share *shares) {
    float scores[MOST_ROWS * RUN];
    stop = least(stop, views[tokens - 1].visible);
    for (int64_t at = start, row, n; at < stop; at += n) {
        n = run_of_keys(views, at, stop, heads, head, &row);
        const float *values = pages->v + row * dim;
        for (int64_t i = 0; i < n * dim; i += 16)
            __builtin_prefetch(values + i);
        const Matrix keys = {FP32, n, dim, dim, pages->k + row * dim, 0, 0, 0, 0};
        product(&keys, 0, n, q, tokens * rows, scores, RUN);
        for (int64_t t = 0; t < tokens; t++)
            if (views[t].visible > at)
                add_run(scores + t * rows * RUN, least(n, views[t].visible - at), values, rows, dim, shares + t);
    }
}
