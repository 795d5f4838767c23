"""Gradients of attention: of queries tile by tile, as in the forward pass; of keys and values list by list.

Probabilities are computed again from the log-sum-exp. Nothing is added atomically: sums run in a fixed order, so a
repetition gives the same bits.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from minim3.kernels.triton import lists as query_lists
from minim3.kernels.triton.keys import LOG2_E, key_offsets, load_keys, load_rows, power_of_two, precision, row_offsets
from minim3.kernels.triton.layout import COLUMNS, Layout
from minim3.kernels.triton.lists import Lists, dense_lists, sparse_lists
from minim3.kernels.triton.prefill import Tiles

_LIST_ROWS = 64
"""Rows (queries times heads of a group) that the gradient of keys takes at once."""

QUERY_WARPS: int | None = None
"""Warps of a program for the gradient of queries; None: by the size of the tile."""

KEY_WARPS = 8
KEY_STAGES = 2
"""Warps of a program for the gradient of keys, and loads under way."""


@triton.jit
def _delta_kernel(out, grad, delta, num_rows, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets = row_offsets(row, D)
    a = load_rows(out, offsets, row < num_rows, D, BLOCK_D).to(tl.float32)
    b = load_rows(grad, offsets, row < num_rows, D, BLOCK_D).to(tl.float32)
    tl.store(delta + row, tl.sum(a * b, 1), mask=row < num_rows)


@triton.jit
def _query_step(
    query, grad, k, v, start, first_key, num_keys, position, member, log_sum, delta, acc, stride_token, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    within = tl.arange(0, KEYS)
    place, offsets = key_offsets(start, within, first_key, num_keys - 1, k, 0, stride_token, 1, False, False)
    seen = start + within < num_keys
    keys = load_keys(k + place, offsets, seen, D, BLOCK_D, MASKED)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    # A row that did not choose the block has an infinite sum: its probabilities are zero.
    shares = tl.exp2(scores * scale_log2 - tl.where(member, log_sum, float("inf"))[:, None])
    if MASKED:
        visible = seen[None, :]
        if CAUSAL:
            visible = visible & ((start + within)[None, :] <= position[:, None])
        shares = tl.where(visible, shares, 0.0)
    values = load_keys(v + place, offsets, seen, D, BLOCK_D, MASKED)
    slope = shares * (tl.dot(grad, tl.trans(values), input_precision=PRECISION) - delta[:, None])
    return tl.dot(slope.to(keys.dtype), keys, acc, input_precision=PRECISION)


@triton.jit
def _query_kernel(
    q, k, v, grad_out, lse, deltas, grad_q, sequences, tiles, page_table, union_ids, union_members, union_counts,
    stride_q, stride_q_head, stride_table, stride_page, stride_token, stride_head, scale, scale_log2,
    COLUMNS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, STEPS: tl.constexpr, CANDIDATES: tl.constexpr,
    CAUSAL: tl.constexpr, SPARSE: tl.constexpr, PAGE_SIZE: tl.constexpr, PAGED: tl.constexpr, ONE_PAGE: tl.constexpr,
    PRECISION: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """The walk of the forward pass, for grad_q."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(tiles + 2 * tile)
    if sequence >= 0:
        start = tl.load(tiles + 2 * tile + 1)
        record = sequences + sequence.to(tl.int64) * COLUMNS
        first_query = tl.load(record) + start
        num_queries = tl.load(record + 1).to(tl.int32) - start
        first_key = tl.load(record + 2)
        num_keys = tl.load(record + 3).to(tl.int32)
        lowest = tl.load(record + 4).to(tl.int32) + start
        if CAUSAL:
            # What no query of the tile sees is not read: it may hold anything.
            num_keys = tl.minimum(num_keys, lowest + tl.minimum(TOKENS, num_queries))
        row = tl.arange(0, ROWS)
        token = row // GROUP
        head = kv_head * GROUP + row % GROUP
        used = (token < TOKENS) & (token < num_queries)
        position = lowest + token
        query = load_rows(q, row_offsets(first_query + token, stride_q) + head * stride_q_head, used, D, BLOCK_D)
        flat = row_offsets(first_query + token, KV_HEADS * GROUP) + head
        grad = load_rows(grad_out, flat * D, used, D, BLOCK_D)
        log_sum = tl.load(lse + flat, mask=used, other=float("inf")) * LOG2E
        delta = tl.load(deltas + flat, mask=used, other=0.0)
        k += tl.cast(kv_head, tl.int64) * stride_head
        v += tl.cast(kv_head, tl.int64) * stride_head
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        if SPARSE:
            base = row_offsets(tile * KV_HEADS + kv_head, CANDIDATES)
            counts = union_counts + row_offsets(tile * KV_HEADS + kv_head, 3)
            complete = tl.load(counts) * STEPS
            steps = tl.load(counts + 1) * STEPS
        else:
            base = 0
            if CAUSAL:
                complete = tl.minimum(lowest + 1, num_keys) // KEYS
            else:
                complete = num_keys // KEYS
            steps = (num_keys + KEYS - 1) // KEYS
        for step in tl.range(0, complete):
            member = used
            place = step * KEYS
            if SPARSE:
                place = (tl.load(union_ids + base + step // STEPS) * STEPS + step % STEPS) * KEYS
                member = used & (((tl.load(union_members + base + step // STEPS) >> token) & 1) != 0)
            acc = _query_step(
                query, grad, k, v, place, first_key, num_keys, position, member, log_sum, delta, acc, stride_token,
                scale_log2, D, BLOCK_D, KEYS, False, CAUSAL, PRECISION,
            )  # fmt: skip
        for step in tl.range(complete, steps):
            member = used
            place = step * KEYS
            if SPARSE:
                place = (tl.load(union_ids + base + step // STEPS) * STEPS + step % STEPS) * KEYS
                member = used & (((tl.load(union_members + base + step // STEPS) >> token) & 1) != 0)
            acc = _query_step(
                query, grad, k, v, place, first_key, num_keys, position, member, log_sum, delta, acc, stride_token,
                scale_log2, D, BLOCK_D, KEYS, True, CAUSAL, PRECISION,
            )  # fmt: skip
        channel = tl.arange(0, BLOCK_D)
        tl.store(
            grad_q + (flat * D)[:, None] + channel[None, :], (acc * scale).to(grad_q.dtype.element_ty),
            mask=used[:, None] & (channel < D)[None, :],
        )  # fmt: skip


@triton.jit
def _key_step(
    q, grad_out, lse, deltas, keys, values, key, tokens, list_start, step, count, lowest, kv_head, stride_q,
    stride_q_head, scale_log2, grad_k, grad_v,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, MASKED: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row % GROUP
    place = step + row // GROUP
    used = (row // GROUP < TOKENS) & (place < count)
    if LISTED:
        token = tl.load(tokens + list_start + place, mask=used, other=0)
    else:
        token = list_start + place
    query = load_rows(q, row_offsets(token, stride_q) + head * stride_q_head, used, D, BLOCK_D)
    flat = row_offsets(token, KV_HEADS * GROUP) + head
    grad = load_rows(grad_out, flat * D, used, D, BLOCK_D)
    log_sum = tl.load(lse + flat, mask=used, other=float("inf")) * LOG2E
    delta = tl.load(deltas + flat, mask=used, other=0.0)
    scores = tl.dot(keys, tl.trans(query), input_precision=PRECISION)
    shares = tl.exp2(scores * scale_log2 - log_sum[None, :])
    if MASKED:
        shares = tl.where(key[:, None] <= (lowest + token)[None, :], shares, 0.0)
    grad_v = tl.dot(shares.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    slope = shares * (tl.dot(values, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
    grad_k = tl.dot(slope.to(query.dtype), query, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def _key_kernel(
    q, k, v, grad_out, lse, deltas, parts, sequences, tokens, starts, counts, segments, blocks, num_blocks, stride_q,
    stride_q_head, stride_k, stride_k_head, scale, scale_log2,
    COLUMNS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, SEGMENT: tl.constexpr, CAUSAL: tl.constexpr,
    LISTED: tl.constexpr, PRECISION: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """One segment of the queries of one block: its share of the gradients of keys and values, fp32 `[2, KEYS, D]`."""
    segment = tl.program_id(0)
    which = tl.load(segments + 2 * segment)
    if which >= 0:
        first = tl.load(segments + 2 * segment + 1)
        kv_head = which // num_blocks
        block = blocks + which % num_blocks * 2
        record = sequences + tl.load(block).to(tl.int64) * COLUMNS
        key = tl.load(block + 1) + tl.arange(0, KEYS)
        first_query = tl.load(record)
        lowest = tl.load(record + 4) - first_query
        limit = tl.load(record + 3)
        if CAUSAL:
            limit = tl.minimum(limit, tl.load(record + 4) + tl.load(record + 1))
        seen = key < limit
        key_rows = row_offsets(tl.load(record + 2) + key, stride_k) + kv_head * stride_k_head
        keys = load_keys(k, key_rows, seen, D, BLOCK_D, True)
        values = load_keys(v, key_rows, seen, D, BLOCK_D, True)
        count = tl.minimum(SEGMENT, (tl.load(counts + which) - first).to(tl.int32))
        list_start = tl.load(starts + which) + first
        grad_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
        grad_v = tl.zeros([KEYS, BLOCK_D], tl.float32)
        near = 0
        if CAUSAL:
            # Queries come in order: only the first few can lie in the block themselves, the others see all of it.
            near = tl.minimum((tl.maximum(KEYS - first, 0) + TOKENS - 1) // TOKENS * TOKENS, count)
            for step in tl.range(0, near, TOKENS):
                grad_k, grad_v = _key_step(
                    q, grad_out, lse, deltas, keys, values, key, tokens, list_start, step, count, lowest, kv_head,
                    stride_q, stride_q_head, scale_log2, grad_k, grad_v, KV_HEADS, GROUP, TOKENS, ROWS, D, BLOCK_D,
                    True, LISTED, PRECISION, LOG2E,
                )  # fmt: skip
        for step in tl.range(near, count, TOKENS):
            grad_k, grad_v = _key_step(
                q, grad_out, lse, deltas, keys, values, key, tokens, list_start, step, count, lowest, kv_head,
                stride_q, stride_q_head, scale_log2, grad_k, grad_v, KV_HEADS, GROUP, TOKENS, ROWS, D, BLOCK_D, False,
                LISTED, PRECISION, LOG2E,
            )  # fmt: skip
        within = tl.arange(0, KEYS)
        channel = tl.arange(0, BLOCK_D)
        target = parts + row_offsets(segment, 2 * KEYS * D) + (within * D)[:, None] + channel[None, :]
        tl.store(target, grad_k * scale, mask=(channel < D)[None, :])
        tl.store(target + KEYS * D, grad_v, mask=(channel < D)[None, :])


@triton.jit
def _sum_kernel(
    parts, first_segments, blocks, sequences, grad_k, grad_v, num_blocks,
    COLUMNS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    SOME: tl.constexpr,
):  # fmt: skip
    """The segments of one list added up in order, SOME keys at a time."""
    which = tl.program_id(0)
    kv_head = which // num_blocks
    block = blocks + which % num_blocks * 2
    record = sequences + tl.load(block).to(tl.int64) * COLUMNS
    within = tl.program_id(1) * SOME + tl.arange(0, SOME)
    channel = tl.arange(0, BLOCK_D)
    sum_k = tl.zeros([SOME, BLOCK_D], tl.float32)
    sum_v = tl.zeros([SOME, BLOCK_D], tl.float32)
    low = tl.load(first_segments + which).to(tl.int32)
    high = tl.load(first_segments + which + 1).to(tl.int32)
    for segment in range(low, high):
        source = parts + row_offsets(segment, 2 * KEYS * D) + (within * D)[:, None] + channel[None, :]
        sum_k += tl.load(source, mask=(channel < D)[None, :], other=0.0)
        sum_v += tl.load(source + KEYS * D, mask=(channel < D)[None, :], other=0.0)
    key = tl.load(block + 1) + within
    mask = (key < tl.load(record + 3))[:, None] & (channel < D)[None, :]
    target = (row_offsets(tl.load(record + 2) + key, KV_HEADS * D) + kv_head * D)[:, None] + channel[None, :]
    tl.store(grad_k + target, sum_k.to(grad_k.dtype.element_ty), mask=mask)
    tl.store(grad_v + target, sum_v.to(grad_v.dtype.element_ty), mask=mask)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block_indices: Tensor | None,
    layout: Layout, *, block_size: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of packed q `[T, Hq, D]` and k, v `[S, Hkv, D]`, each in its own dtype; arguments as `forward` took."""
    grad_out = grad_out.contiguous()
    grad_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not q.numel():
        return torch.empty_like(q), grad_k.zero_(), grad_v.zero_()
    delta = torch.empty_like(lse)
    dim, block_d = q.shape[2], max(power_of_two(q.shape[2]), 16)
    _delta_kernel[-(-lse.numel() // 32),](
        out, grad_out, delta, num_rows=lse.numel(), ROWS=32, D=dim, BLOCK_D=block_d
    )
    grad_q = query_gradient(grad_out, q, k, v, lse, delta, block_indices, layout, block_size, scale, causal)
    heads = k.shape[1]
    if block_indices is None:
        lists = dense_lists(layout, heads, block_size, causal)
    else:
        lists = sparse_lists(block_indices, layout, block_size)
    key_gradients(grad_k, grad_v, q, k, v, grad_out, lse, delta, lists, layout, block_size, scale, causal)
    return grad_q, grad_k, grad_v


def query_gradient(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, block_indices: Tensor | None,
    layout: Layout, block_size: int, scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """Gradient of `q`; `delta` `[T, Hq]`: the products of `out` and its gradient."""
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tiles = Tiles(q, k, block_indices, layout, page_table=None, block_size=block_size, causal=causal)
    _query_kernel[tiles.grid](
        q, k, v, grad_out, lse, delta, grad_q, scale=scale, scale_log2=scale * LOG2_E, LOG2E=LOG2_E,
        num_warps=QUERY_WARPS or (4 if tiles.rows <= 64 else 8), num_stages=min(tiles.stages, 2), **tiles.arguments,
    )  # fmt: skip
    return grad_q


def key_gradients(
    grad_k: Tensor, grad_v: Tensor, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor,
    lists: Lists, layout: Layout, block_size: int, scale: float, causal: bool,
) -> None:  # fmt: skip
    """Fill `grad_k` and `grad_v`."""
    heads, dim, group = k.shape[1], k.shape[2], q.shape[1] // k.shape[1]
    block_d = max(power_of_two(dim), 16)
    parts = torch.empty(lists.segments.shape[0], 2, block_size, dim, dtype=torch.float32, device=k.device)
    fp32 = q.dtype == torch.float32
    tokens = max(1, (_LIST_ROWS // 2 if fp32 else _LIST_ROWS) // group)
    shape = {"COLUMNS": COLUMNS, "KV_HEADS": heads, "D": dim, "BLOCK_D": block_d, "KEYS": block_size}
    _key_kernel[lists.segments.shape[0],](
        q, k, v, grad_out, lse, delta, parts, layout.table, lists.starts if lists.tokens is None else lists.tokens,
        lists.starts, lists.counts, lists.segments, lists.blocks, num_blocks=lists.blocks.shape[0],
        stride_q=q.stride(0), stride_q_head=q.stride(1), stride_k=k.stride(0), stride_k_head=k.stride(1), scale=scale,
        scale_log2=scale * LOG2_E, GROUP=group, TOKENS=tokens, ROWS=max(16, tokens * group),
        SEGMENT=query_lists.SEGMENT, CAUSAL=causal, LISTED=lists.tokens is not None, PRECISION=precision(q.dtype),
        LOG2E=LOG2_E, num_warps=KEY_WARPS, num_stages=1 if fp32 else KEY_STAGES, **shape,
    )  # fmt: skip
    some = min(block_size, 32)
    _sum_kernel[lists.counts.shape[0], block_size // some](
        parts, lists.first_segments, lists.blocks, layout.table, grad_k, grad_v, num_blocks=lists.blocks.shape[0],
        SOME=some, **shape,
    )  # fmt: skip
