/* A decoder for few new tokens of each sequence: all layers in one parallel region.
 *
 * T tokens, H hidden size. Every stage shares its work out by items and ends in a barrier; which thread takes an item,
 * and how many there are, changes no number.
 */
#include "attention.h"

#define MOST_TOKENS 256 /* of a step */
#define MOST_SLICE 16  /* of an expert at a time */

typedef struct {
    const float *scale; /* [H], the weight of the norm plus 1 */
    float eps;
} Norm;

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

typedef struct {
    Norm before_attention, before_experts;
    int64_t projections; /* q, k, index q, index k, v: side by side */
    const Matrix *project, *output;
    const float *head_scale; /* [normed heads, D]: with sqrt(D), and the scale of scores where they are queries */
    float head_eps;          /* D times that of the norm */
    int64_t heads, kv_heads, index_heads, dim;
    Selection selection;
    Experts experts;
} Layer;

typedef struct {
    int64_t hidden, layers, half; /* half: of the rotary dimensions */
    const float *frequencies;     /* [half] */
    const Layer *layer;
    Norm last;
    const Matrix *joint; /* of a MTP module: [H, 2H], or null */
    Norm before_embedding, before_hidden;
} Model;

typedef struct {
    int64_t tokens, sequences, page_size, table_stride, threads;
    const int64_t *lengths_q, *lengths_k, *positions, *slots, *page_table;
    const Pages *pages;            /* one a layer */
    const float *embeds, *hidden;  /* [T, H]; hidden: for a MTP module */
    float *out;                    /* [T, H] */
} Batch;

/* Buffers of a step. */
typedef struct {
    View *views;
    float *x, *normed, *both, *heads, *cos, *sin, *attended, *block_scores, *sums, *largest, *totals;
    float *logits, *weights, *acts;
    float *expert_weights;
    int32_t *chosen, *ids, *start, *expert_tokens;
    int64_t blocks, shares, width, widest;
} Space;

static void *take(char **at, int64_t bytes) {
    char *found = *at;
    *at += ceil_div(bytes, 64) * 64;
    return found;
}

/* Lays the buffers out from `memory` on; returns the bytes they take. */
static int64_t lay_out(const Model *m, const Batch *b, char *memory, Space *s) {
    char *at = memory;
    int64_t width = 0, heads = 0, attended = 0, dim = 0, kv_heads = 0, index_heads = 0, topk = 0, widest = 0, experts = 0;
    int64_t per_token = 0, block = 1 << 30;
    for (int64_t n = 0; n < m->layers; n++) {
        const Layer *l = m->layer + n;
        const Experts *e = &l->experts;
        int64_t all = 0;
        for (int64_t i = 0; i < l->projections; i++)
            all += l->project[i].rows;
        width = most(width, all);
        heads = most(heads, l->heads), kv_heads = most(kv_heads, l->kv_heads), dim = most(dim, l->dim);
        index_heads = most(index_heads, l->index_heads), topk = most(topk, l->selection.topk);
        if (l->selection.topk)
            block = least(block, l->selection.block);
        attended = most(attended, l->heads * l->dim);
        for (int64_t i = 0; i < e->experts + e->shared; i++)
            widest = most(widest, e->down_proj[i].columns);
        experts = most(experts, e->experts + e->shared), per_token = most(per_token, e->per_token + e->shared);
    }
    int64_t longest = 0;
    for (int64_t n = 0; n < b->sequences; n++)
        longest = most(longest, b->lengths_k[n]);
    s->blocks = ceil_div(longest, block);
    s->shares = most(ceil_div(longest, SPAN), topk);
    s->width = width, s->widest = widest;
    const int64_t t = b->tokens, rows = t * kv_heads * s->shares * (heads / most(kv_heads, 1));
    s->views = take(&at, t * sizeof(View));
    s->x = take(&at, 4 * t * m->hidden);
    s->normed = take(&at, 4 * t * m->hidden);
    s->both = take(&at, m->joint ? 8 * t * m->hidden : 0);
    s->heads = take(&at, 4 * t * width);
    s->cos = take(&at, 4 * t * m->half);
    s->sin = take(&at, 4 * t * m->half);
    s->attended = take(&at, 4 * t * attended);
    s->block_scores = take(&at, 4 * t * index_heads * s->blocks);
    s->chosen = take(&at, 4 * t * index_heads * topk);
    s->sums = take(&at, 4 * rows * dim);
    s->largest = take(&at, 4 * rows);
    s->totals = take(&at, 4 * rows);
    s->logits = take(&at, 4 * t * experts);
    s->ids = take(&at, 4 * t * per_token);
    s->weights = take(&at, 4 * t * per_token);
    s->start = take(&at, 4 * (experts + 2));
    s->expert_tokens = take(&at, 4 * t * per_token);
    s->expert_weights = take(&at, 4 * t * per_token);
    s->acts = take(&at, 4 * t * per_token * widest);
    return at - memory;
}

/* Rows of a buffer, or those that `index` lists. */
INLINE void point(const float **rows, const float *x, int64_t stride, const int32_t *index, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        rows[i] = x + (index ? index[i] : i) * stride;
}

static void norm_row(const Norm *norm, const float *x, int64_t size, float *out) {
    vec total = {};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        total += load(x + i) * load(x + i);
    for (; i < size; i++)
        rest += x[i] * x[i];
    const float root = 1.0f / sqrtf((sum(total) + rest) / size + norm->eps);
    for (i = 0; i < size; i++)
        out[i] = x[i] * root * norm->scale[i];
}

static void norm(const Norm *norm, const float *x, int64_t tokens, int64_t size, float *out, int64_t stride) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        norm_row(norm, x + t * size, size, out + t * stride);
}

/* out[t * ld + n] = x[t] . weight[n], or added to it. */
static void project(const Matrix *weights, int64_t count, const float *x, int64_t stride, int64_t tokens, float *out,
                    int64_t ld, int add) {
    int64_t items = 0;
    for (int64_t m = 0; m < count; m++)
        items += ceil_div(weights[m].rows, item_rows(weights + m));
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
        int64_t m = 0, column = 0, place = item;
        for (; place >= ceil_div(weights[m].rows, item_rows(weights + m)); m++) {
            place -= ceil_div(weights[m].rows, item_rows(weights + m));
            column += weights[m].rows;
        }
        const Matrix *w = weights + m;
        const int64_t first = place * item_rows(w), rows = least(item_rows(w), w->rows - first);
        const float *pointers[MOST_TOKENS];
        point(pointers, x, stride, 0, tokens);
        float *to = out + column + first;
        if (!add) {
            product(w, first, rows, pointers, tokens, to, ld);
            continue;
        }
        float found[MOST_TOKENS * MOST_BLOCK];
        product(w, first, rows, pointers, tokens, found, rows);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t n = 0; n < rows; n++)
                to[t * ld + n] += found[t * rows + n];
    }
}

/* Norms and rotates the heads of the new tokens where they lie, and puts keys and values in their pages. */
static void finish_heads(const Model *m, const Batch *b, const Layer *l, const Pages *pages, const Space *s, int64_t ld) {
    const int64_t dim = l->dim, half = m->half;
    const int64_t indexed = l->index_heads ? l->index_heads + 1 : 0;
    const int64_t normed = l->heads + l->kv_heads + indexed, all_heads = normed + l->kv_heads;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < b->tokens * all_heads; item++) {
        const int64_t t = item / all_heads, h = item % all_heads, slot = b->slots[t];
        const int64_t page = slot / b->page_size, offset = slot % b->page_size;
        float *x = s->heads + t * ld + h * dim, *keep = 0;
        if (h < normed) {
            const float *scale = l->head_scale + h * dim, *cos = s->cos + t * half, *sin = s->sin + t * half;
            float squares = 0;
            for (int64_t d = 0; d < dim; d += LANES)
                squares += sum(load(x + d) * load(x + d));
            const float root = 1.0f / sqrtf(squares + l->head_eps);
            for (int64_t d = 0; d < dim; d++)
                x[d] *= root * scale[d];
            for (int64_t d = 0; d < half; d++) {
                const float first = x[d], second = x[d + half];
                x[d] = first * cos[d] - second * sin[d];
                x[d + half] = second * cos[d] + first * sin[d];
            }
        }
        const int64_t key = h - l->heads, value = h - normed;
        if (key >= 0 && key < l->kv_heads)
            keep = pages->k + ((page * l->kv_heads + key) * b->page_size + offset) * dim;
        else if (value >= 0)
            keep = pages->v + ((page * l->kv_heads + value) * b->page_size + offset) * dim;
        else if (indexed && h == normed - 1)
            keep = pages->index_k + (page * b->page_size + offset) * dim;
        if (keep)
            memcpy(keep, x, 4 * dim);
    }
}

/* Whether a token of this view attends chosen blocks, and how many blocks it sees. */
INLINE int64_t seen_blocks(const Layer *l, const View *view) { return ceil_div(view->visible, l->selection.block); }
INLINE int chooses(const Layer *l, const View *view) {
    return l->selection.topk && seen_blocks(l, view) > l->selection.topk;
}

static void select_blocks(const Batch *b, const Layer *l, const Pages *pages, const Space *s, int64_t ld) {
    const Selection *how = &l->selection;
    const int64_t dim = l->dim, each = most(1, SPAN / how->block), spans = ceil_div(s->blocks, each);
    const int64_t first_head = (l->heads + l->kv_heads) * dim;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < b->tokens * spans; item++) {
        const int64_t t = item / spans, span = item % spans;
        const View *view = s->views + t;
        if (!chooses(l, view))
            continue;
        const float *q[MOST_ROWS];
        point(q, s->heads + t * ld + first_head, dim, 0, l->index_heads);
        const int64_t first = most(span * each, how->init);
        const int64_t last = least((span + 1) * each, seen_blocks(l, view) - how->local);
        if (first < last)
            score_blocks(view, how, pages->index_k, q, l->index_heads, dim, first, last,
                         s->block_scores + t * l->index_heads * s->blocks, s->blocks);
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < b->tokens * l->index_heads; item++) {
        const View *view = s->views + item / l->index_heads;
        if (chooses(l, view))
            choose_blocks(how, seen_blocks(l, view), s->block_scores + item * s->blocks, s->chosen + item * how->topk);
    }
}

/* Attention in shares of SPAN keys or one block, whichever is more, which are put together in their order. */
static void attend(const Batch *b, const Layer *l, const Pages *pages, const Space *s, int64_t ld) {
    const Selection *how = &l->selection;
    const int64_t dim = l->dim, group = l->heads / l->kv_heads, each = how->topk ? most(1, SPAN / how->block) : 0;
    const int64_t entries = b->tokens * l->kv_heads;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < entries * s->shares; item++) {
        const int64_t entry = item / s->shares, n = item % s->shares, t = entry / l->kv_heads, h = entry % l->kv_heads;
        const View *view = s->views + t;
        const int sparse = chooses(l, view);
        if (sparse ? n * each >= how->topk : n * SPAN >= view->visible)
            continue;
        const int64_t row = item * group;
        const Share share = {s->sums + row * dim, s->largest + row, s->totals + row};
        const float *q[MOST_ROWS];
        point(q, s->heads + t * ld + h * group * dim, dim, 0, group);
        memset(share.sum, 0, 4 * group * dim);
        for (int64_t g = 0; g < group; g++)
            share.largest[g] = -INFINITY, share.total[g] = 0;
        if (!sparse) {
            attend_keys(view, n * SPAN, least((n + 1) * SPAN, view->visible), pages, l->kv_heads, h, q, group, dim, &share);
            continue;
        }
        const int32_t *ids = s->chosen + (t * l->index_heads + h) * how->topk;
        for (int64_t i = n * each; i < least((n + 1) * each, how->topk); i++)
            attend_keys(view, ids[i] * how->block, least((ids[i] + 1) * how->block, view->visible), pages, l->kv_heads, h,
                        q, group, dim, &share);
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < entries * group; item++) {
        const int64_t entry = item / group, g = item % group;
        const View *view = s->views + entry / l->kv_heads;
        const int64_t shares = chooses(l, view) ? ceil_div(how->topk, each) : ceil_div(view->visible, SPAN);
        const int64_t first = entry * s->shares * group + g;
        float best = -INFINITY, total = 0, *out = s->attended + item * dim;
        for (int64_t n = 0; n < shares; n++)
            best = fmaxf(best, s->largest[first + n * group]);
        memset(out, 0, 4 * dim);
        for (int64_t n = 0; n < shares; n++) {
            const int64_t row = first + n * group;
            const float factor = expf(s->largest[row] - best);
            total += s->totals[row] * factor;
            for (int64_t d = 0; d < dim; d++)
                out[d] += s->sums[row * dim + d] * factor;
        }
        for (int64_t d = 0; d < dim; d++)
            out[d] /= total;
    }
}

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

/* Tokens and weights by expert: those of expert e are `start[e]..start[e + 1]`. */
static void group_tokens(const Experts *e, int64_t tokens, const Space *s) {
    int64_t count = 0;
    for (int64_t i = 0; i < e->experts; i++) {
        s->start[i] = (int32_t)count;
        for (int64_t j = 0; j < tokens * e->per_token; j++)
            if (s->ids[j] == i) {
                s->expert_tokens[count] = (int32_t)(j / e->per_token);
                s->expert_weights[count++] = s->weights[j];
            }
    }
    s->start[e->experts] = (int32_t)count;
    for (int64_t t = 0; e->shared && t < tokens; t++, count++)
        s->expert_tokens[count] = (int32_t)t, s->expert_weights[count] = 1.0f;
    s->start[e->experts + e->shared] = (int32_t)count;
}

static void swiglu(const Activation *a, const float *gate, const float *up, int64_t size, float *out) {
    const float limit = a->limit ? a->limit : INFINITY;
    for (int64_t i = 0; i < size; i += LANES) { /* gate, up and out have room for a whole vector */
        const vec g = minimum(load(gate + i), all(limit)), u = maximum(minimum(load(up + i), all(limit)), all(-limit));
        store(out + i, g / (1.0f + exponential(g * -a->alpha)) * (u + a->beta));
    }
}

static void add_experts(const Experts *e, const float *normed, int64_t tokens, int64_t hidden, float *x, const Space *s) {
    const int64_t count = e->experts + e->shared;
    if (e->experts) {
        const Matrix router = {FP32, e->experts, hidden, hidden, e->router, 0, 0, 0, 0};
        project(&router, 1, normed, hidden, tokens, s->logits, e->experts, 0);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            choose_experts(e, s->logits + t * e->experts, s->ids + t * e->per_token, s->weights + t * e->per_token);
    }
#pragma omp single
    group_tokens(e, tokens, s);
    int64_t items = 0;
    for (int64_t i = 0; i < count; i++)
        if (s->start[i + 1] > s->start[i])
            items += ceil_div(e->down_proj[i].columns, item_rows(e->gate_proj + i));
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
        int64_t i = 0, place = item;
        for (;; i++) {
            const int64_t own = s->start[i + 1] > s->start[i] ? ceil_div(e->down_proj[i].columns, item_rows(e->gate_proj + i)) : 0;
            if (place < own)
                break;
            place -= own;
        }
        const int64_t width = e->down_proj[i].columns, first = place * item_rows(e->gate_proj + i);
        const int64_t rows = least(item_rows(e->gate_proj + i), width - first), start = s->start[i];
        const Activation *act = i < e->experts ? &e->act : &e->shared_act;
        const float *pointers[MOST_TOKENS];
        float gate[MOST_SLICE * MOST_BLOCK + LANES], up[MOST_SLICE * MOST_BLOCK + LANES], found[MOST_BLOCK + LANES];
        for (int64_t from = start; from < s->start[i + 1]; from += MOST_SLICE) {
            const int64_t n = least(MOST_SLICE, s->start[i + 1] - from);
            point(pointers, normed, hidden, s->expert_tokens + from, n);
            product(e->gate_proj + i, first, rows, pointers, n, gate, rows);
            product(e->up_proj + i, first, rows, pointers, n, up, rows);
            for (int64_t j = 0; j < n; j++) {
                swiglu(act, gate + j * rows, up + j * rows, rows, found);
                memcpy(s->acts + (from + j) * s->widest + first, found, 4 * rows);
            }
        }
    }
    const int64_t each = item_rows(e->down_proj);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < ceil_div(hidden, each); item++) {
        const int64_t first = item * each, rows = least(each, hidden - first);
        const float *pointers[MOST_TOKENS];
        float found[MOST_TOKENS * MOST_BLOCK];
        for (int64_t i = 0; i < count; i++) {
            const int64_t start = s->start[i], n = s->start[i + 1] - start;
            if (!n)
                continue;
            point(pointers, s->acts + start * s->widest, s->widest, 0, n);
            product(e->down_proj + i, first, rows, pointers, n, found, rows);
            for (int64_t j = 0; j < n; j++) {
                float *to = x + s->expert_tokens[start + j] * hidden + first;
                for (int64_t d = 0; d < rows; d++)
                    to[d] += s->expert_weights[start + j] * found[j * rows + d];
            }
        }
    }
}

static void prepare(const Model *m, const Batch *b, const Space *s) {
    for (int64_t n = 0, t = 0; n < b->sequences; n++)
        for (int64_t i = 0; i < b->lengths_q[n]; i++, t++) {
            s->views[t] = (View){b->page_table + n * b->table_stride, b->lengths_k[n] - b->lengths_q[n] + i + 1, b->page_size};
            for (int64_t d = 0; d < m->half; d++) {
                const float angle = (float)b->positions[t] * m->frequencies[d];
                s->cos[t * m->half + d] = cosf(angle), s->sin[t * m->half + d] = sinf(angle);
            }
        }
    if (!m->joint)
        memcpy(s->x, b->embeds, 4 * b->tokens * m->hidden);
}

/* out [count, rows] = x [count, columns] times the rows of a weight. */
void minim3_product(const Matrix *w, const float *x, int64_t count, float *out, int64_t threads) {
#pragma omp parallel num_threads((int)threads)
    project(w, 1, x, w->columns, count, out, w->rows, 0);
}

int64_t minim3_lanes(void) { return LANES; }

int64_t minim3_space(const Model *m, const Batch *b) {
    Space s;
    return lay_out(m, b, 0, &s);
}

void minim3_step(const Model *m, const Batch *b, char *memory) {
    Space space, *s = &space;
    lay_out(m, b, memory, s);
    prepare(m, b, s);
    const int64_t tokens = b->tokens, hidden = m->hidden;
#pragma omp parallel num_threads((int)b->threads)
    {
        if (m->joint) {
            norm(&m->before_embedding, b->embeds, tokens, hidden, s->both, 2 * hidden);
            norm(&m->before_hidden, b->hidden, tokens, hidden, s->both + hidden, 2 * hidden);
            project(m->joint, 1, s->both, 2 * hidden, tokens, s->x, hidden, 0);
        }
        for (int64_t n = 0; n < m->layers; n++) {
            const Layer *l = m->layer + n;
            const Pages *pages = b->pages + n;
            norm(&l->before_attention, s->x, tokens, hidden, s->normed, hidden);
            project(l->project, l->projections, s->normed, hidden, tokens, s->heads, s->width, 0);
            finish_heads(m, b, l, pages, s, s->width);
            if (l->selection.topk)
                select_blocks(b, l, pages, s, s->width);
            attend(b, l, pages, s, s->width);
            project(l->output, 1, s->attended, l->heads * l->dim, tokens, s->x, hidden, 1);
            norm(&l->before_experts, s->x, tokens, hidden, s->normed, hidden);
            add_experts(&l->experts, s->normed, tokens, hidden, s->x, s);
        }
        norm(&m->last, s->x, tokens, hidden, b->out, hidden);
    }
}
