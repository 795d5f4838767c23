/* The experts of a layer: routing, and their products with the tokens that chose them. */
#pragma once

#include "projection.h"

#define MOST_PAIRS 4 /* times PAIR rows of down projections that are split together */

/* SwiGLU-OAI; `limit` 0: none. */
typedef struct {
    float alpha, limit, beta;
} Activation;

/* Experts, or the one MLP of a dense layer (or the shared expert) as the last of them, which takes every token. */
typedef struct {
    int64_t experts, per_token, softmax, shared;
    const float *router, *bias; /* [experts, H], [experts] */
    float factor;             /* of the routed weights, which are normalized to one before */
    Activation act, shared_act;
    const Matrix *gate_proj, *up_proj, *down_proj; /* [experts + shared] */
} Experts;

/* Buffers. Expert i has the tokens from `start[i]` on, the items from `item[i]` on in the work of the first two products,
 * and the panels from `panel[i]` on, if it runs on tiles. */
typedef struct {
    float *logits, *weights, *acts, *expert_weights;
    int32_t *ids, *start, *item, *panel, *expert_tokens;
    bf16 *act_panels;
    Scratch scratch;
    int64_t widest;
} Listed;

/* The experts of a token and their weights, from its logits: the lower number among equals. */
static void choose_experts(const Experts *e, float *logits, int32_t *ids, float *weights) {
    float best = -INFINITY, total = 0;
    for (int64_t i = 0; i < e->experts; i++)
        best = fmaxf(best, logits[i]);
    for (int64_t i = 0; i < e->experts; i++)
        total += logits[i] = e->softmax ? expf(logits[i] - best) : 1.0f / (1.0f + expf(-logits[i]));
    for (int64_t i = 0; e->softmax && i < e->experts; i++)
        logits[i] /= total;
    total = 0;
    for (int64_t j = 0; j < e->per_token; j++) {
        int64_t found = -1;
        float highest = 0;
        for (int64_t i = 0; i < e->experts; i++) {
            const float score = logits[i] + (e->bias ? e->bias[i] : 0);
            int taken = 0;
            for (int64_t k = 0; k < j; k++)
                taken |= ids[k] == i;
            /* NaN ranks highest, as in torch, so that it shows. */
            if (!taken && (found < 0 || score > highest || (score != score && highest == highest)))
                found = i, highest = score;
        }
        ids[j] = (int32_t)found;
        total += weights[j] = logits[found];
    }
    for (int64_t j = 0; j < e->per_token; j++)
        weights[j] *= e->factor / total;
}

INLINE int expert_on_tiles(const Experts *e, int64_t i, int64_t count) {
    const Matrix *gate = e->gate_proj + i, *up = e->up_proj + i;
    return on_tiles(gate, count) && on_tiles(up, count) && on_tiles(e->down_proj + i, count) &&
           neighbours(gate) == neighbours(up);
}

INLINE int64_t steps_of(const Experts *e, int64_t i) { return ceil_div(e->down_proj[i].columns, PAIR); }

/* Into how many pieces the width of expert i is cut on tiles, each of which packs its inputs: one, unless threads would
 * have nothing to do. */
INLINE int64_t pieces_of(const Experts *e, int64_t i) {
    return least(steps_of(e, i), ceil_div(2 * omp_get_num_threads(), e->experts + 1));
}

/* Rows of the down projections that a thread takes at a time where some run on tiles. */
INLINE int64_t rows_of_down(const Experts *e, int64_t hidden) {
    return PAIR * most(1, least(MOST_PAIRS, hidden / (2 * PAIR * omp_get_num_threads())));
}

/* Where the lists begin of what follows expert i, which has so many tokens. */
INLINE void list_expert(const Experts *e, int64_t i, int64_t count, const Listed *s) {
    const int64_t width = e->down_proj[i].columns, hidden = e->gate_proj[i].columns;
    const int tiles = expert_on_tiles(e, i, count);
    int64_t items = count ? ceil_div(width, item_rows(e->gate_proj + i)) : 0;
    if (tiles)
        items = ceil_div(count, rows_of_chunk(count, hidden)) * pieces_of(e, i);
    s->start[i + 1] = s->start[i] + (int32_t)count;
    s->item[i + 1] = s->item[i] + (int32_t)items;
    s->panel[i + 1] = s->panel[i] + (int32_t)(tiles ? ceil_div(count, 16) : 0);
}

/* Tokens and weights by expert, in the order of the tokens. */
static void group_tokens(const Experts *e, int64_t tokens, const Listed *s) {
    const int64_t listed = tokens * e->per_token;
    int32_t next[e->experts + 1];
    memset(next, 0, sizeof next);
    for (int64_t j = 0; j < listed; j++)
        next[s->ids[j]]++;
    s->start[0] = s->item[0] = s->panel[0] = 0;
    for (int64_t i = 0; i < e->experts; i++) {
        list_expert(e, i, next[i], s);
        next[i] = s->start[i];
    }
    for (int64_t j = 0; j < listed; j++) {
        const int32_t place = next[s->ids[j]]++;
        s->expert_tokens[place] = (int32_t)(j / e->per_token), s->expert_weights[place] = s->weights[j];
    }
    if (e->shared)
        list_expert(e, e->experts, tokens, s);
    for (int64_t t = 0; e->shared && t < tokens; t++)
        s->expert_tokens[listed + t] = (int32_t)t, s->expert_weights[listed + t] = 1.0f;
}

/* SwiGLU of a vector, NaN stays. */
INLINE vec activated(const Activation *a, vec gate, vec up) {
    const float limit = a->limit ? a->limit : INFINITY;
    const vec g = minimum(gate, all(limit)), u = maximum(minimum(up, all(limit)), all(-limit));
    return g / (1.0f + exponential(g * -a->alpha)) * (u + a->beta);
}

/* The activations of `rows` of an expert's width from `first` on, for its tokens. */
static void activate(const Experts *e, int64_t i, int64_t first, int64_t rows, const float *normed, int64_t hidden,
                     const Listed *s) {
    const Activation *act = i < e->experts ? &e->act : &e->shared_act;
    const float *pointers[MOST_SLICE];
    float gate[MOST_SLICE * MOST_BLOCK + LANES], up[MOST_SLICE * MOST_BLOCK + LANES]; /* room for a whole vector */
    for (int64_t from = s->start[i]; from < s->start[i + 1]; from += MOST_SLICE) {
        const int64_t n = least(MOST_SLICE, s->start[i + 1] - from);
        point(pointers, normed, hidden, s->expert_tokens + from, n);
        product(e->gate_proj + i, first, rows, pointers, n, gate, rows);
        product(e->up_proj + i, first, rows, pointers, n, up, rows);
        for (int64_t j = 0; j < n; j++) {
            float found[MOST_BLOCK + LANES];
            for (int64_t k = 0; k < rows; k += LANES)
                store(found + k, activated(act, load(gate + j * rows + k), load(up + j * rows + k)));
            memcpy(s->acts + (from + j) * s->widest + first, found, 4 * rows);
        }
    }
}

/* The same on tiles for `count` of its tokens from number `from` on, and `steps` times PAIR rows: each PAIR of them is a step
 * of the next product. */
static void tile_activate(const Experts *e, int64_t i, int64_t from, int64_t count, int64_t step, int64_t steps,
                          const float *normed, const Listed *s) {
#if HAVE_TILES
    const Activation *act = i < e->experts ? &e->act : &e->shared_act;
    const int64_t hidden = e->gate_proj[i].columns, panels = ceil_div(count, SIDE);
    const int64_t size = panel_size(e->down_proj[i].columns);
    float gate[PAIR * MOST_INPUTS] __attribute__((aligned(64))), up[PAIR * MOST_INPUTS] __attribute__((aligned(64)));
    bf16 *inputs = own(&s->scratch);
    bf16 *acts = s->act_panels + s->panel[i] * panel_size(s->widest) + from / SIDE * size;
    const int paired = neighbours(e->down_proj + i);
    pack_chunk(neighbours(e->gate_proj + i), normed, hidden, s->expert_tokens + s->start[i] + from, count, hidden, inputs);
    for (int64_t n = step; n < step + steps; n++) {
        tile_rows(e->gate_proj + i, n * PAIR, inputs, panels, gate);
        tile_rows(e->up_proj + i, n * PAIR, inputs, panels, up);
        for (int64_t p = 0; p < panels; p++)
            for (int64_t r = 0; r < SIDE; r++) {
                const int64_t at = (paired ? 2 * r : r) * MOST_INPUTS + p * SIDE;
                const int64_t next = at + (paired ? 1 : SIDE) * MOST_INPUTS;
                const vec first = activated(act, load(gate + at), load(up + at));
                pack_pair(first, activated(act, load(gate + next), load(up + next)), r, acts + p * size + n * STEP);
            }
    }
#endif
}

/* Adds the products of the activations with rows `first...` of an expert's down projection to the tokens. */
static void add_down(const Experts *e, int64_t i, int64_t first, int64_t rows, float *x, int64_t hidden, const Listed *s) {
    const Matrix *w = e->down_proj + i;
    const float *pointers[MOST_SLICE];
    float found[MOST_SLICE * MOST_BLOCK];
    for (int64_t from = s->start[i]; from < s->start[i + 1]; from += MOST_SLICE) {
        const int64_t n = least(MOST_SLICE, s->start[i + 1] - from);
        point(pointers, s->acts + from * s->widest, s->widest, 0, n);
        product(w, first, rows, pointers, n, found, rows);
        for (int64_t j = 0; j < n; j++) {
            float *to = x + s->expert_tokens[from + j] * hidden + first;
            for (int64_t d = 0; d < rows; d++)
                to[d] += s->expert_weights[from + j] * found[j * rows + d];
        }
    }
}

/* Stages: x += the experts of `normed`, both [tokens, hidden]. A token gets its experts in their order. */
static void add_experts(const Experts *e, const float *normed, int64_t tokens, int64_t hidden, float *x, const Listed *s) {
    const int64_t count = e->experts + e->shared;
    if (e->experts) {
        const Matrix router = {FP32, e->experts, hidden, hidden, e->router, 0, 0, 0, 0};
        project(&router, 1, normed, hidden, 0, tokens, s->logits, e->experts, 0);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            choose_experts(e, s->logits + t * e->experts, s->ids + t * e->per_token, s->weights + t * e->per_token);
    }
#pragma omp single
    group_tokens(e, tokens, s);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < s->item[count]; item++) {
        int64_t i = 0;
        while (s->item[i + 1] <= item)
            i++;
        const int64_t place = item - s->item[i], here = s->start[i + 1] - s->start[i];
        if (s->panel[i + 1] > s->panel[i]) {
            const int64_t pieces = pieces_of(e, i), each = ceil_div(steps_of(e, i), pieces), step = place % pieces * each;
            const int64_t chunk = rows_of_chunk(here, hidden), from = place / pieces * chunk;
            tile_activate(e, i, from, least(chunk, here - from), step, least(each, steps_of(e, i) - step), normed, s);
        } else {
            const int64_t each = item_rows(e->gate_proj + i), first = place * each;
            activate(e, i, first, least(each, e->down_proj[i].columns - first), normed, hidden, s);
        }
    }
    const int64_t each = s->panel[count] ? rows_of_down(e, hidden) : item_rows(e->down_proj);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < ceil_div(hidden, each); item++)
        for (int64_t i = 0; i < count; i++) {
            const int64_t first = item * each, rows = least(each, hidden - first), start = s->start[i];
            if (s->panel[i + 1] > s->panel[i])
                tile_add(e->down_proj + i, first, ceil_div(rows, PAIR), s->act_panels + s->panel[i] * panel_size(s->widest),
                         s->start[i + 1] - start, own(&s->scratch), x + first, hidden,
                         s->expert_tokens + start, s->expert_weights + start);
            else
                for (int64_t n = 0; n < rows; n += MOST_BLOCK)
                    add_down(e, i, first + n, least(MOST_BLOCK, rows - n), x, hidden, s);
        }
}
