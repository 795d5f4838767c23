/* A decoder for few new tokens of each sequence: all layers in one parallel region.
 *
 * T tokens, H hidden size. Every stage shares its work out by items and ends in a barrier; which thread takes an item,
 * and how many there are, changes no number.
 */
#include "attention.h"
#include "experts.h"

typedef struct {
    const float *scale; /* [H], the weight of the norm plus 1 */
    float eps;
} Norm;

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
    int32_t *chosen;
    Listed listed;
    int32_t *run; /* tokens of one sequence whose attention is computed together: run n is `run[n]..run[n + 1]` */
    int64_t blocks, longest, width, runs, run_tokens;
} Space;

static void *take(char **at, int64_t bytes) {
    char *found = *at;
    *at += ceil_div(bytes, 64) * 64;
    return found;
}

/* Into how many shares the keys of a token are cut, at most: all of them, or those of the blocks that it chooses. */
INLINE int64_t shares_of(const Layer *l, int64_t longest) {
    const Selection *how = &l->selection;
    if (!how->topk || ceil_div(longest, how->block) <= how->topk)
        return ceil_div(longest, SPAN);
    return most(ceil_div(how->topk, most(1, SPAN / how->block)), ceil_div(how->topk * how->block, SPAN));
}

/* Lays the buffers out from `memory` on; returns the bytes they take. */
static int64_t lay_out(const Model *m, const Batch *b, char *memory, Space *s) {
    char *at = memory;
    int64_t width = 0, heads = 0, attended = 0, dim = 0, kv_heads = 0, index_heads = 0, topk = 0, widest = 0, experts = 0;
    int64_t per_token = 0, block = 1 << 30, group = 1, shares = 1, scratch = 0;
    for (int64_t n = 0; n < m->layers; n++) {
        const Layer *l = m->layer + n;
        const Experts *e = &l->experts;
        int64_t all = 0;
        for (int64_t i = 0; i < l->projections; i++)
            all += l->project[i].rows;
        width = most(width, all);
        heads = most(heads, l->heads), kv_heads = most(kv_heads, l->kv_heads), dim = most(dim, l->dim);
        group = most(group, l->heads / l->kv_heads);
        index_heads = most(index_heads, l->index_heads), topk = most(topk, l->selection.topk);
        if (l->selection.topk)
            block = least(block, l->selection.block);
        attended = most(attended, l->heads * l->dim), scratch = most(scratch, scratch_size(l->heads * l->dim));
        for (int64_t i = 0; i < e->experts + e->shared; i++)
            widest = most(widest, e->down_proj[i].columns);
        experts = most(experts, e->experts + e->shared), per_token = most(per_token, e->per_token + e->shared);
    }
    int64_t longest = 0;
    for (int64_t n = 0; n < b->sequences; n++)
        longest = most(longest, b->lengths_k[n]);
    s->blocks = ceil_div(longest, block);
    s->longest = longest;
    for (int64_t n = 0; n < m->layers; n++)
        shares = most(shares, shares_of(m->layer + n, longest));
    s->width = width, s->listed.widest = widest;
    const int64_t t = b->tokens, rows = t * shares * heads;
    s->run_tokens = most(1, MOST_ROWS / group);
    s->views = take(&at, t * sizeof(View));
    s->run = take(&at, 4 * (t + 1));
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
    Listed *e = &s->listed;
    const int64_t listed = t * per_token;
    const int tiles = t >= MANY_ROWS;
    e->logits = take(&at, 4 * t * experts);
    e->ids = take(&at, 4 * listed);
    e->weights = take(&at, 4 * listed);
    e->start = take(&at, 4 * (experts + 1));
    e->item = take(&at, 4 * (experts + 1));
    e->panel = take(&at, 4 * (experts + 1));
    e->expert_tokens = take(&at, 4 * listed);
    e->expert_weights = take(&at, 4 * listed);
    e->acts = take(&at, 4 * listed * widest);
    e->scratch.size = most(scratch_size(m->hidden), 2 * MOST_PAIRS * panel_size(widest));
    e->scratch.size = most(e->scratch.size, most(scratch, m->joint ? scratch_size(2 * m->hidden) : 0));
    e->scratch.memory = take(&at, tiles ? 2 * b->threads * e->scratch.size : 0);
    e->act_panels = take(&at, tiles ? 2 * (listed / 16 + experts) * panel_size(widest) : 0);
    return at - memory;
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
            vec squares = {};
            for (int64_t d = 0; d < dim; d += LANES)
                squares += load(x + d) * load(x + d);
            const float root = 1.0f / sqrtf(sum(squares) + l->head_eps);
            for (int64_t d = 0; d < dim; d += LANES)
                store(x + d, load(x + d) * (root * load(scale + d)));
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

/* Where the share of a token is kept, empty: the only one lies where the result does. */
INLINE Share empty_share(const Layer *l, const Space *s, int64_t t, int64_t head, int64_t n) {
    const int64_t group = l->heads / l->kv_heads, shares = shares_of(l, s->longest);
    const int64_t row = ((t * l->kv_heads + head) * shares + n) * group;
    const Share share = {(shares > 1 ? s->sums : s->attended) + row * l->dim, s->largest + row, s->totals + row};
    memset(share.sum, 0, 4 * group * l->dim);
    for (int64_t g = 0; g < group; g++)
        share.largest[g] = -INFINITY, share.total[g] = 0;
    return share;
}

/* One share of the keys of one KV head, for tokens of one sequence; together, where all attend all keys. */
static void attend_share(const Layer *l, const Pages *pages, const Space *s, int64_t ld, int64_t t, int64_t tokens,
                         int64_t head, int64_t n) {
    const Selection *how = &l->selection;
    const View *views = s->views + t;
    const int64_t dim = l->dim, group = l->heads / l->kv_heads, each = how->topk ? most(1, SPAN / how->block) : 0;
    const float *q[MOST_ROWS];
    Share shares[MOST_ROWS];
    if (tokens > 1 && chooses(l, views + tokens - 1)) {
        for (int64_t i = 0; i < tokens; i++)
            attend_share(l, pages, s, ld, t + i, 1, head, n);
        return;
    }
    const int sparse = chooses(l, views);
    if (sparse ? n * each >= how->topk : n * SPAN >= views[tokens - 1].visible)
        return;
    for (int64_t i = 0; i < tokens; i++) {
        point(q + i * group, s->heads + (t + i) * ld + head * group * dim, dim, 0, group);
        shares[i] = empty_share(l, s, t + i, head, n);
    }
    if (!sparse) {
        attend_keys(views, tokens, n * SPAN, (n + 1) * SPAN, pages, l->kv_heads, head, q, group, dim, shares);
        return;
    }
    const int32_t *ids = s->chosen + (t * l->index_heads + head) * how->topk;
    for (int64_t i = n * each; i < least((n + 1) * each, how->topk); i++)
        attend_keys(views, 1, ids[i] * how->block, (ids[i] + 1) * how->block, pages, l->kv_heads, head, q, group, dim, shares);
}

/* Attention in shares of SPAN keys or one block, whichever is more, which are put together in their order. */
static void attend(const Batch *b, const Layer *l, const Pages *pages, const Space *s, int64_t ld) {
    const Selection *how = &l->selection;
    const int64_t dim = l->dim, group = l->heads / l->kv_heads, each = how->topk ? most(1, SPAN / how->block) : 0;
    const int64_t most_shares = shares_of(l, s->longest);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < s->runs * l->kv_heads * most_shares; item++) {
        const int64_t run = item / (l->kv_heads * most_shares), head = item / most_shares % l->kv_heads;
        attend_share(l, pages, s, ld, s->run[run], s->run[run + 1] - s->run[run], head, item % most_shares);
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < b->tokens * l->heads; item++) {
        const int64_t entry = item / group, g = item % group;
        const View *view = s->views + entry / l->kv_heads;
        const int64_t shares = chooses(l, view) ? ceil_div(how->topk, each) : ceil_div(view->visible, SPAN);
        const int64_t first = entry * most_shares * group + g;
        float best = -INFINITY, total = 0, *out = s->attended + item * dim;
        if (most_shares == 1) {
            total = s->totals[first];
        } else {
            for (int64_t n = 0; n < shares; n++)
                best = fmaxf(best, s->largest[first + n * group]);
            memset(out, 0, 4 * dim);
            for (int64_t n = 0; n < shares; n++) {
                const int64_t row = first + n * group;
                const float factor = expf(s->largest[row] - best);
                total += s->totals[row] * factor;
                for (int64_t d = 0; d < dim; d += LANES)
                    store(out + d, load(out + d) + load(s->sums + row * dim + d) * factor);
            }
        }
        for (int64_t d = 0; d < dim; d += LANES)
            store(out + d, load(out + d) / total);
    }
}

static void prepare(const Model *m, const Batch *b, Space *s) {
    s->runs = 0;
    for (int64_t n = 0, t = 0; n < b->sequences; n++)
        for (int64_t i = 0; i < b->lengths_q[n]; i++, t++) {
            if (i % s->run_tokens == 0)
                s->run[s->runs++] = (int32_t)t;
            s->views[t] = (View){b->page_table + n * b->table_stride, b->lengths_k[n] - b->lengths_q[n] + i + 1, b->page_size};
            for (int64_t d = 0; d < m->half; d++) {
                const float angle = (float)b->positions[t] * m->frequencies[d];
                s->cos[t * m->half + d] = cosf(angle), s->sin[t * m->half + d] = sinf(angle);
            }
        }
    s->run[s->runs] = (int32_t)b->tokens;
    if (!m->joint)
        memcpy(s->x, b->embeds, 4 * b->tokens * m->hidden);
}

/* out [count, rows] = x [count, columns] times the rows of a weight. */
void minim3_product(const Matrix *w, const float *x, int64_t count, float *out, int64_t threads) {
    Scratch scratch = {0, scratch_size(w->columns)};
    if (on_tiles(w, count))
        scratch.memory = aligned_alloc(64, 2 * threads * scratch.size);
#pragma omp parallel num_threads((int)threads)
    {
        begin_tiles(count);
        project(w, 1, x, w->columns, scratch.memory ? &scratch : 0, count, out, w->rows, 0);
        end_tiles(count);
    }
    free(scratch.memory);
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
        begin_tiles(tokens);
        if (m->joint) {
            norm(&m->before_embedding, b->embeds, tokens, hidden, s->both, 2 * hidden);
            norm(&m->before_hidden, b->hidden, tokens, hidden, s->both + hidden, 2 * hidden);
            project(m->joint, 1, s->both, 2 * hidden, &s->listed.scratch, tokens, s->x, hidden, 0);
        }
        for (int64_t n = 0; n < m->layers; n++) {
            const Layer *l = m->layer + n;
            const Pages *pages = b->pages + n;
            norm(&l->before_attention, s->x, tokens, hidden, s->normed, hidden);
            project(l->project, l->projections, s->normed, hidden, &s->listed.scratch, tokens, s->heads, s->width, 0);
            finish_heads(m, b, l, pages, s, s->width);
            if (l->selection.topk)
                select_blocks(b, l, pages, s, s->width);
            attend(b, l, pages, s, s->width);
            project(l->output, 1, s->attended, l->heads * l->dim, &s->listed.scratch, tokens, s->x, hidden, 1);
            norm(&l->before_experts, s->x, tokens, hidden, s->normed, hidden);
            add_experts(&l->experts, s->normed, tokens, hidden, s->x, &s->listed);
        }
        norm(&m->last, s->x, tokens, hidden, b->out, hidden);
        end_tiles(tokens);
    }
}
