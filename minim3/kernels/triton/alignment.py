"""Indexer KL and its closed-form gradient: over the blocks chosen, or over all keys (warm-up).

One walk along a tile's blocks finds both log-sum-exps, the student's alone where attention has left the teacher's; a
second one the loss and the gradient of index queries, while teacher and student lie side by side; a pass over the lists
of queries of each block gives the gradient of index keys.
The gradient at a scaled index score is (student - teacher) / (tokens * heads). No probability is ever stored.
"""

# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minim3.kernels.sequences import Lengths
from minim3.kernels.triton import lists as query_lists
from minim3.kernels.triton.keys import (
    LN_2,
    LOG2_E,
    key_offsets,
    load_keys,
    load_rows,
    power_of_two,
    precision,
    row_offsets,
    rows_contiguous,
)
from minim3.kernels.triton.layout import COLUMNS, Layout, packed_layout
from minim3.kernels.triton.lists import Lists, dense_lists, sparse_lists
from minim3.kernels.triton.prefill import Tiles

_DENSE_KEYS = 64
"""Keys that the warm-up takes at once."""

_ROWS = 64
"""Rows (tokens times query heads of a group) of a tile."""

_LIST_TOKENS = 32
"""Queries that the gradient of index keys takes at once."""


@triton.jit
def _index_scores(
    index_query, index_k, start, within, first_key, num_keys, stride_index_k, index_position, index_member,
    index_scale_log2, INDEX_D: tl.constexpr, BLOCK_INDEX_D: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scaled scores (base 2) of index rows, -inf where hidden; and the index keys. MASKED: some may not be seen."""
    place, offsets = key_offsets(start, within, first_key, num_keys - 1, index_k, 0, stride_index_k, 1, False, False)
    index_keys = load_keys(index_k + place, offsets, start + within < num_keys, INDEX_D, BLOCK_INDEX_D, MASKED)
    scores = tl.dot(index_query, tl.trans(index_keys), input_precision=PRECISION) * index_scale_log2
    visible = index_member[:, None]
    if MASKED:
        visible = visible & ((start + within)[None, :] <= index_position[:, None])
    return tl.where(visible, scores, float("-inf")), index_keys


@triton.jit
def _teacher_scores(
    query, k, start, within, first_key, num_keys, stride_k, position, D: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of rows, not yet scaled; MASKED: -inf where a row may not look."""
    place, offsets = key_offsets(start, within, first_key, num_keys - 1, k, 0, stride_k, 1, False, False)
    keys = load_keys(k + place, offsets, start + within < num_keys, D, BLOCK_D, MASKED)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if MASKED:
        scores = tl.where((start + within)[None, :] <= position[:, None], scores, float("-inf"))
    return scores


@triton.jit
def _add_exponentials(scores, top, total):
    """One step of an online log-sum-exp over rows of `scores`, in powers of two."""
    higher = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp2(top - finite) + tl.sum(tl.exp2(scores - finite[:, None]), 1)


@triton.jit
def _place(
    step, ids, members, used, token_of_row, index_used, token, KEYS: tl.constexpr, STEPS: tl.constexpr,
    SPARSE: tl.constexpr,
):  # fmt: skip
    """(first key, which rows, which index rows) of a step along the union, or along all keys."""
    place = step * KEYS
    if SPARSE:
        place = (tl.load(ids + step // STEPS) * STEPS + step % STEPS) * KEYS
        chosen = tl.load(members + step // STEPS)
        used = used & (((chosen >> token_of_row) & 1) != 0)
        index_used = index_used & (((chosen >> token) & 1) != 0)
    return place, used, index_used


@triton.jit
def _query_kernel(
    q, k, index_q, index_k, known_lse, lse, index_lse, loss, grad_index_q, sequences, tiles, union_ids, union_members,
    union_counts, stride_q, stride_q_head, stride_k, stride_k_head, stride_index_q, stride_index_q_head,
    stride_index_k, scale_log2, index_scale_log2, grad_scale,
    COLUMNS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, INDEX_D: tl.constexpr, BLOCK_INDEX_D: tl.constexpr, KEYS: tl.constexpr, STEPS: tl.constexpr,
    CANDIDATES: tl.constexpr, SPARSE: tl.constexpr, PRECISION: tl.constexpr, KNOWN: tl.constexpr, LOG2E: tl.constexpr,
    LN2: tl.constexpr,
):  # fmt: skip
    """One tile of tokens and one KV head: log-sum-exps (base 2), losses, gradient of index queries.

    KNOWN: the teacher's log-sum-exps are in `known_lse` (base e), and only the student's are found.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(tiles + 2 * tile)
    if sequence >= 0:
        start = tl.load(tiles + 2 * tile + 1)
        record = sequences + sequence.to(tl.int64) * COLUMNS
        first_query = tl.load(record) + start
        num_queries = tl.load(record + 1).to(tl.int32) - start
        first_key = tl.load(record + 2)
        lowest = tl.load(record + 4).to(tl.int32) + start
        num_keys = tl.minimum(tl.load(record + 3).to(tl.int32), lowest + tl.minimum(TOKENS, num_queries))
        row = tl.arange(0, TOKENS * GROUP)
        head = kv_head * GROUP + row % GROUP
        used = row // GROUP < num_queries
        position = lowest + row // GROUP
        token = tl.arange(0, TOKENS)
        index_used = token < num_queries
        index_position = lowest + token
        query = load_rows(
            q, row_offsets(first_query + row // GROUP, stride_q) + head * stride_q_head, used, D, BLOCK_D
        )
        index_query = load_rows(
            index_q, row_offsets(first_query + token, stride_index_q) + kv_head * stride_index_q_head, index_used,
            INDEX_D, BLOCK_INDEX_D,
        )  # fmt: skip
        k += tl.cast(kv_head, tl.int64) * stride_k_head
        within = tl.arange(0, KEYS)
        if SPARSE:
            base = row_offsets(tile * KV_HEADS + kv_head, CANDIDATES)
            counts = union_counts + row_offsets(tile * KV_HEADS + kv_head, 3)
            complete = tl.load(counts) * STEPS
            steps = tl.load(counts + 1) * STEPS
        else:
            base = 0
            complete = tl.minimum(lowest + 1, num_keys) // KEYS
            steps = (num_keys + KEYS - 1) // KEYS
        top = tl.full([TOKENS * GROUP], float("-inf"), tl.float32)
        total = tl.zeros([TOKENS * GROUP], tl.float32)
        index_top = tl.full([TOKENS], float("-inf"), tl.float32)
        index_total = tl.zeros([TOKENS], tl.float32)
        for masked in tl.static_range(2):  # blocks that every token sees whole come first
            for step in tl.range(complete if masked else 0, steps if masked else complete):
                place, member, index_member = _place(
                    step, union_ids + base, union_members + base, used, row // GROUP, index_used, token, KEYS, STEPS,
                    SPARSE,
                )  # fmt: skip
                if not KNOWN:
                    scores = _teacher_scores(
                        query, k, place, within, first_key, num_keys, stride_k, position, D, BLOCK_D, masked == 1,
                        PRECISION,
                    )  # fmt: skip
                    scores = tl.where(member[:, None], scores * scale_log2, float("-inf"))
                    top, total = _add_exponentials(scores, top, total)
                index_scores, _ = _index_scores(
                    index_query, index_k, place, within, first_key, num_keys, stride_index_k, index_position,
                    index_member, index_scale_log2, INDEX_D, BLOCK_INDEX_D, masked == 1, PRECISION,
                )  # fmt: skip
                index_top, index_total = _add_exponentials(index_scores, index_top, index_total)
        # Rows beyond the tile's queries saw nothing: an infinite sum makes their probabilities zero.
        flat = row_offsets(first_query + row // GROUP, KV_HEADS * GROUP) + head
        if KNOWN:
            log_sum = tl.load(known_lse + flat, mask=used, other=float("inf")) * LOG2E
            log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum)
        else:
            log_sum = tl.where(total != 0.0, top + tl.log2(tl.where(total != 0.0, total, 1.0)), float("inf"))
        index_log_sum = tl.where(
            index_total != 0.0, index_top + tl.log2(tl.where(index_total != 0.0, index_total, 1.0)), float("inf")
        )
        losses = tl.zeros([TOKENS], tl.float32)
        acc = tl.zeros([TOKENS, BLOCK_INDEX_D], tl.float32)
        for masked in tl.static_range(2):
            for step in tl.range(complete if masked else 0, steps if masked else complete):
                place, member, index_member = _place(
                    step, union_ids + base, union_members + base, used, row // GROUP, index_used, token, KEYS, STEPS,
                    SPARSE,
                )  # fmt: skip
                scores = _teacher_scores(
                    query, k, place, within, first_key, num_keys, stride_k, position, D, BLOCK_D, masked == 1, PRECISION
                )
                index_scores, index_keys = _index_scores(
                    index_query, index_k, place, within, first_key, num_keys, stride_index_k, index_position,
                    index_member, index_scale_log2, INDEX_D, BLOCK_INDEX_D, masked == 1, PRECISION,
                )  # fmt: skip
                shares = tl.exp2(scores * scale_log2 - tl.where(member, log_sum, float("inf"))[:, None])
                teacher = tl.sum(tl.reshape(shares, [TOKENS, GROUP, KEYS]), 1) / GROUP
                log_student = index_scores - index_log_sum[:, None]
                some = teacher != 0.0
                gap = tl.log2(tl.where(some, teacher, 1.0)) - tl.where(some, log_student, 0.0)
                losses += tl.sum(tl.where(some, teacher * gap, 0.0), 1)
                slope = tl.exp2(log_student) - teacher
                acc = tl.dot(slope.to(index_keys.dtype), index_keys, acc, input_precision=PRECISION)
        tl.store(lse + flat, log_sum, mask=used)
        index_flat = row_offsets(first_query + token, KV_HEADS) + kv_head
        tl.store(index_lse + index_flat, index_log_sum, mask=index_used)
        tl.store(loss + index_flat, losses * LN2, mask=index_used)
        channel = tl.arange(0, BLOCK_INDEX_D)
        tl.store(
            grad_index_q + (index_flat * INDEX_D)[:, None] + channel[None, :], acc * grad_scale,
            mask=index_used[:, None] & (channel < INDEX_D)[None, :],
        )  # fmt: skip


@triton.jit
def _key_kernel(
    q, k, index_q, index_k, lse, index_lse, parts, sequences, tokens, starts, counts, segments, blocks, num_blocks,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_index_q, stride_index_q_head, stride_index_k, scale_log2,
    index_scale_log2, grad_scale,
    COLUMNS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, INDEX_D: tl.constexpr, BLOCK_INDEX_D: tl.constexpr, KEYS: tl.constexpr,
    SEGMENT: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment of the queries of one block: its share of the gradient of index keys, fp32 `[KEYS, INDEX_D]`."""
    segment = tl.program_id(0)
    which = tl.load(segments + 2 * segment)
    if which >= 0:
        first = tl.load(segments + 2 * segment + 1)
        kv_head = which // num_blocks
        block = blocks + which % num_blocks * 2
        record = sequences + tl.load(block).to(tl.int64) * COLUMNS
        key = tl.load(block + 1) + tl.arange(0, KEYS)
        lowest = tl.load(record + 4) - tl.load(record)
        seen = key < tl.minimum(tl.load(record + 3), tl.load(record + 4) + tl.load(record + 1))
        packed = tl.load(record + 2) + key
        keys = load_keys(k, row_offsets(packed, stride_k) + kv_head * stride_k_head, seen, D, BLOCK_D, True)
        index_keys = load_keys(index_k, row_offsets(packed, stride_index_k), seen, INDEX_D, BLOCK_INDEX_D, True)
        count = tl.minimum(SEGMENT, (tl.load(counts + which) - first).to(tl.int32))
        list_start = tl.load(starts + which) + first
        acc = tl.zeros([KEYS, BLOCK_INDEX_D], tl.float32)
        for step in tl.range(0, count, TOKENS):
            place = step + tl.arange(0, TOKENS)
            used = place < count
            if LISTED:
                token = tl.load(tokens + list_start + place, mask=used, other=0)
            else:
                token = list_start + place
            visible = (key[:, None] <= (lowest + token)[None, :]) & used[None, :]
            teacher = tl.zeros([KEYS, TOKENS], tl.float32)
            for member in range(GROUP):
                head = kv_head * GROUP + member
                query = load_rows(q, row_offsets(token, stride_q) + head * stride_q_head, used, D, BLOCK_D)
                log_sum = tl.load(
                    lse + row_offsets(token, KV_HEADS * GROUP) + head, mask=used, other=float("inf")
                )
                scores = tl.dot(keys, tl.trans(query), input_precision=PRECISION)
                teacher += tl.exp2(scores * scale_log2 - log_sum[None, :])
            # What is hidden may be anything, even infinite.
            teacher = tl.where(visible, teacher, 0.0)
            index_query = load_rows(
                index_q, row_offsets(token, stride_index_q) + kv_head * stride_index_q_head, used, INDEX_D,
                BLOCK_INDEX_D,
            )  # fmt: skip
            index_log_sum = tl.load(
                index_lse + row_offsets(token, KV_HEADS) + kv_head, mask=used, other=float("inf")
            )
            index_scores = tl.dot(index_keys, tl.trans(index_query), input_precision=PRECISION) * index_scale_log2
            student = tl.exp2(tl.where(visible, index_scores, float("-inf")) - index_log_sum[None, :])
            slope = student - teacher / GROUP
            acc = tl.dot(slope.to(index_query.dtype), index_query, acc, input_precision=PRECISION)
        within = tl.arange(0, KEYS)
        channel = tl.arange(0, BLOCK_INDEX_D)
        target = parts + row_offsets(segment, KEYS * INDEX_D) + (within * INDEX_D)[:, None] + channel[None, :]
        tl.store(target, acc * grad_scale, mask=(channel < INDEX_D)[None, :])


@triton.jit
def _sum_kernel(
    parts, first_segments, blocks, sequences, grad_index_k, num_blocks,
    COLUMNS: tl.constexpr, KV_HEADS: tl.constexpr, INDEX_D: tl.constexpr, BLOCK_INDEX_D: tl.constexpr,
    KEYS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """All heads' segments of one block added up in order, SOME keys at a time."""
    block = tl.program_id(0)
    record = sequences + tl.load(blocks + 2 * block).to(tl.int64) * COLUMNS
    within = tl.program_id(1) * SOME + tl.arange(0, SOME)
    channel = tl.arange(0, BLOCK_INDEX_D)
    total = tl.zeros([SOME, BLOCK_INDEX_D], tl.float32)
    for kv_head in range(KV_HEADS):
        low = tl.load(first_segments + kv_head * num_blocks + block).to(tl.int32)
        high = tl.load(first_segments + kv_head * num_blocks + block + 1).to(tl.int32)
        for segment in range(low, high):
            source = parts + row_offsets(segment, KEYS * INDEX_D) + (within * INDEX_D)[:, None] + channel[None, :]
            total += tl.load(source, mask=(channel < INDEX_D)[None, :], other=0.0)
    key = tl.load(blocks + 2 * block + 1) + within
    tl.store(
        grad_index_k + row_offsets(tl.load(record + 2) + key, INDEX_D)[:, None] + channel[None, :], total,
        mask=(key < tl.load(record + 3))[:, None] & (channel < INDEX_D)[None, :],
    )  # fmt: skip


class _Work(NamedTuple):
    layout: Layout
    block_size: int
    scale: float
    index_scale: float


def indexer_kl(
    q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, block_indices: Tensor | None, cu_seqlens_q: Lengths,
    cu_seqlens_k: Lengths, *, q_offset: Lengths | None = None, block_size: int, scale: float | None = None,
    index_scale: float | None = None, lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See the reference."""
    work = _Work(
        packed_layout(cu_seqlens_q, cu_seqlens_k, q_offset, q, k),
        _DENSE_KEYS if block_indices is None else block_size,
        q.shape[-1] ** -0.5 if scale is None else scale,
        index_q.shape[-1] ** -0.5 if index_scale is None else index_scale,
    )
    q, k = rows_contiguous(q.detach()), rows_contiguous(k.detach())
    lse = None if lse is None else lse.detach().float().contiguous()
    return _IndexerKL.apply(q, k, rows_contiguous(index_q), rows_contiguous(index_k), block_indices, lse, work)


class _IndexerKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, ids: Tensor | None, lse: Tensor | None,
        work: _Work,
    ) -> Tensor:  # fmt: skip
        wants_grad = any(ctx.needs_input_grad)
        loss, grad_q, grad_k = _loss_and_gradient(q, k, index_q, index_k, ids, lse, work, wants_grad)
        if wants_grad:
            ctx.save_for_backward(grad_q, grad_k)
            ctx.dtypes = index_q.dtype, index_k.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k = ctx.saved_tensors
        dtype_q, dtype_k = ctx.dtypes
        return None, None, (grad_q * grad).to(dtype_q), (grad_k * grad).to(dtype_k), None, None, None


def _loss_and_gradient(
    q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, ids: Tensor | None, lse: Tensor | None, work: _Work,
    wants_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    heads, device = k.shape[1], q.device
    rows = max(index_q.shape[0] * heads, 1)
    grad_q = torch.empty(index_q.shape, dtype=torch.float32, device=device)
    grad_k = torch.empty(index_k.shape, dtype=torch.float32, device=device)
    if not q.numel():
        return torch.zeros((), dtype=torch.float32, device=device), grad_q, grad_k.zero_()
    known_lse, lse = lse, torch.empty(q.shape[:2], dtype=torch.float32, device=device)
    index_lse = torch.empty(index_q.shape[:2], dtype=torch.float32, device=device)
    losses = torch.empty_like(index_lse)
    tiles = Tiles(q, k, ids, work.layout, page_table=None, block_size=work.block_size, causal=True, rows=_ROWS)
    index_dim = index_q.shape[2]
    shape: dict[str, Any] = {
        "stride_q": q.stride(0), "stride_q_head": q.stride(1), "stride_k": k.stride(0), "stride_k_head": k.stride(1),
        "stride_index_q": index_q.stride(0), "stride_index_q_head": index_q.stride(1),
        "stride_index_k": index_k.stride(0), "scale_log2": work.scale * LOG2_E,
        "index_scale_log2": work.index_scale * LOG2_E, "grad_scale": work.index_scale / rows, "COLUMNS": COLUMNS,
        "KV_HEADS": heads, "GROUP": q.shape[1] // heads, "D": q.shape[2],
        "BLOCK_D": max(power_of_two(q.shape[2]), 16), "INDEX_D": index_dim,
        "BLOCK_INDEX_D": max(power_of_two(index_dim), 16), "PRECISION": precision(q.dtype),
    }  # fmt: skip
    known = {name: tiles.arguments[name] for name in (
        "sequences", "tiles", "union_ids", "union_members", "union_counts", "TOKENS", "KEYS", "STEPS", "CANDIDATES",
        "SPARSE",
    )}  # fmt: skip
    _query_kernel[tiles.grid](
        q, k, index_q, index_k, lse if known_lse is None else known_lse, lse, index_lse, losses, grad_q,
        KNOWN=known_lse is not None, LOG2E=LOG2_E, LN2=LN_2, num_warps=4,
        num_stages=1 if q.dtype == torch.float32 else 2, **shape, **known,
    )  # fmt: skip
    # In fp64, since millions of losses add up; in one order.
    loss = (losses.sum(dtype=torch.float64) / rows).float()
    if wants_grad:
        if ids is None:
            lists = dense_lists(work.layout, heads, work.block_size, True)
        else:
            lists = sparse_lists(ids, work.layout, work.block_size)
        _key_gradient(grad_k, q, k, index_q, index_k, lse, index_lse, lists, work, shape)
    return loss, grad_q, grad_k


def _key_gradient(
    grad_k: Tensor, q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, lse: Tensor, index_lse: Tensor,
    lists: Lists, work: _Work, shape: dict[str, Any],
) -> None:  # fmt: skip
    parts = torch.empty(
        lists.segments.shape[0], work.block_size, index_k.shape[1], dtype=torch.float32, device=k.device
    )
    num_blocks = lists.blocks.shape[0]
    _key_kernel[lists.segments.shape[0],](
        q, k, index_q, index_k, lse, index_lse, parts, work.layout.table,
        lists.starts if lists.tokens is None else lists.tokens, lists.starts, lists.counts, lists.segments,
        lists.blocks, num_blocks=num_blocks, TOKENS=_LIST_TOKENS, KEYS=work.block_size, SEGMENT=query_lists.SEGMENT,
        LISTED=lists.tokens is not None, num_warps=8, num_stages=1 if q.dtype == torch.float32 else 2, **shape,
    )  # fmt: skip
    some = min(work.block_size, 32)
    names = ("COLUMNS", "KV_HEADS", "INDEX_D", "BLOCK_INDEX_D")
    _sum_kernel[num_blocks, work.block_size // some](
        parts, lists.first_segments, lists.blocks, work.layout.table, grad_k, num_blocks=num_blocks,
        KEYS=work.block_size, SOME=some, **{name: shape[name] for name in names},
    )  # fmt: skip
