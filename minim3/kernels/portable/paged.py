"""Attention and selection over paged keys: decoding, verification of several tokens, and prefill in chunks.

Keys of one KV head are gathered by whole cache rows (`plan`), or read where they lie; what lies past the end of a
sequence is sliced off or masked before any product, so its content never matters. Sequences with few new tokens take
the row paths; the others are gathered and handed to the packed forms.
Shapes as in the reference: pages `[P, Hkv, page, D]`, index key pages `[P, page, Di]`, `page_table` `[N, max_pages]`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minim3.kernels.portable import attention, decode, select
from minim3.kernels.portable.plan import CacheRows, PagedPlan, Request
from minim3.kernels.sequences import Lengths, at_least_fp32, check_selection

_FEW_TOKENS = 8
"""Sequences with at most this many new tokens take the row paths."""

_BATCH_ELEMENTS = 1 << 20
"""Up to this many gathered key elements sequences are padded and batched; beyond, one at a time stays in cache."""


# Selection


def select_blocks_paged(
    index_q: Tensor, index_k_pages: Tensor, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, *,
    block_size: int, topk_blocks: int, init_blocks: int = 0, local_blocks: int = 1, score_type: str = "max",
    scale: float | None = None, plan: PagedPlan | None = None,
) -> Tensor:  # fmt: skip
    """See the reference."""
    check_selection(block_size, topk_blocks, init_blocks, local_blocks, score_type)
    plan = _plan(plan, page_table, lengths_k, cu_seqlens_q, index_k_pages.shape[-2])
    requests = plan.requests
    scale = index_q.shape[-1] ** -0.5 if scale is None else scale
    only = plan.only_query
    if only is not None and local_blocks and only.length > topk_blocks * block_size:
        return decode.select_row(
            index_q, index_k_pages, plan, only, block_size=block_size, topk_blocks=topk_blocks,
            init_blocks=init_blocks, local_blocks=local_blocks, score_type=score_type, scale=scale,
        )  # fmt: skip
    dtype = at_least_fp32(index_q.dtype)
    heads = index_q.shape[1]
    cache = CacheRows.of(index_k_pages, block_size)
    index_k = cache.view(index_k_pages)
    current = plan.once(("current", block_size), lambda: _positions(requests, index_q.device) // block_size)
    out = select.all_blocks(current, heads, topk_blocks)
    batches: dict[int, list[Request]] = {}
    for r in requests:
        if (r.length - 1) // block_size < topk_blocks:
            continue
        if r.num_queries > _FEW_TOKENS or not local_blocks:
            found = plan.rows(r, cache)[0]
            keys = index_k.index_select(0, found).view(-1, index_k_pages.shape[-1])[: r.length]
            out[r.rows] = select.select_blocks(
                index_q[r.rows], keys, [0, r.num_queries], [0, r.length], block_size=block_size,
                topk_blocks=topk_blocks, init_blocks=init_blocks, local_blocks=local_blocks, score_type=score_type,
                scale=scale,
            )  # fmt: skip
        else:
            batches.setdefault(r.num_queries, []).append(r)
    for num_queries, group in batches.items():
        blocks = max((r.length - 1) // block_size for r in group)  # complete ones: the own block is forced
        logical = torch.arange(blocks * cache.per_block, device=index_q.device)
        whole = len(group) == len(requests) == page_table.shape[0]
        if whole:
            queries, now = index_q.view(len(group), num_queries, heads, -1), current
        else:
            rows = torch.tensor([i for r in group for i in range(r.q_start, r.q_start + num_queries)])
            rows = rows.to(index_q.device)
            queries = index_q.index_select(0, rows).view(len(group), num_queries, heads, -1)
            now = current.index_select(0, rows)
        if len(group) == 1:
            keys = decode.index_keys(index_k_pages, plan, group[0], blocks * block_size, block_size).to(dtype)
            # A row of scores a query and head: [1, heads, keys]
            scores = (queries.to(dtype).flatten(0, 2) @ keys.t()).view(1, num_queries * heads, blocks, block_size)
        else:
            table = page_table if whole else page_table[[r.sequence for r in group]]
            found = cache.physical(table, logical.expand(len(group), -1))
            keys = index_k.index_select(0, found.flatten()).view(len(group), blocks * block_size, -1).to(dtype)
            scores = torch.bmm(queries.to(dtype).flatten(1, 2), keys.transpose(1, 2))
            scores = scores.view(len(group), num_queries * heads, blocks, block_size)
        best = scores.amax(-1).mul_(scale) if score_type == "max" else scores.mul_(scale).logsumexp(-1)
        best = torch.nn.functional.pad(best.view(len(group) * num_queries, heads, blocks), (0, 1))
        ids = select.best_blocks(best, now, topk_blocks, init_blocks, local_blocks)
        if whole:
            return ids
        out[rows] = ids
    return out


def _positions(requests: Sequence[Request], device: torch.device) -> Tensor:
    return torch.tensor([r.position(i) for r in requests for i in range(r.num_queries)], device=device)


def _plan(
    plan: PagedPlan | None, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, page_size: int
) -> PagedPlan:
    if plan is None:
        return PagedPlan(page_table, lengths_k, cu_seqlens_q, page_size)
    assert plan.page_table is page_table
    assert plan.page_size == page_size
    return plan


# Attention


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, *,
    scale: float | None = None, plan: PagedPlan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference."""
    plan = _plan(plan, page_table, lengths_k, cu_seqlens_q, k_pages.shape[-2])
    requests = plan.requests
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = at_least_fp32(q.dtype)
    wide = q.detach().to(dtype)
    if plan.only_query is not None:
        out, lse = decode.attend_dense(wide, k_pages, v_pages, plan, plan.only_query, scale)
        return out.to(q.dtype), lse
    cache = CacheRows.of(k_pages, k_pages.shape[-2])
    k, v = cache.view(k_pages), cache.view(v_pages)
    kv_heads, dim = k_pages.shape[1], q.shape[-1]
    longest = max((r.length for r in requests), default=0)
    counts = {r.num_queries for r in requests}
    padded = len(requests) * kv_heads * (longest + cache.tokens) * dim
    if len(requests) == page_table.shape[0] > 1 == len(counts) and max(counts) <= _FEW_TOKENS and (
        padded <= _BATCH_ELEMENTS
    ):  # fmt: skip
        out, lse = _dense_batch(wide, k, v, cache, plan, scale)
        return out.to(q.dtype), lse
    out, lse = torch.empty_like(wide, memory_format=torch.contiguous_format), wide.new_empty(q.shape[:2])
    for r in requests:
        if r.num_queries == 1:
            part = decode.attend_dense(wide[r.rows], k_pages, v_pages, plan, r, scale)
        else:
            keys, values = _gather((k, v), cache, plan.rows(r, cache), r.length, dtype)
            part = attention.varlen_attention(
                wide[r.rows], keys.transpose(0, 1), values.transpose(0, 1), [0, r.num_queries], [0, r.length],
                scale=scale,
            )  # fmt: skip
        if len(requests) == 1:
            return part[0].to(q.dtype), part[1]
        out[r.rows], lse[r.rows] = part
    return out.to(q.dtype), lse


def block_sparse_attention_paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths_k: Lengths, block_indices: Tensor,
    cu_seqlens_q: Lengths, *, block_size: int, scale: float | None = None, plan: PagedPlan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference."""
    plan = _plan(plan, page_table, lengths_k, cu_seqlens_q, k_pages.shape[-2])
    requests = plan.requests
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = at_least_fp32(q.dtype)
    cache = CacheRows.of(k_pages, block_size)
    k, v = cache.view(k_pages), cache.view(v_pages)
    wide = q.detach().to(dtype)
    dim = q.shape[-1]
    few = [(r, i) for r in requests if r.num_queries <= _FEW_TOKENS for i in range(r.num_queries)]
    if len(few) == q.shape[0] > 1 and len(few) * cache.heads * block_indices.shape[2] * block_size * dim <= (
        _BATCH_ELEMENTS
    ):  # fmt: skip
        out, lse = _sparse_batch(wide, k, v, cache, page_table, few, block_indices, block_size, scale)
        return out.to(q.dtype), lse
    out, lse = torch.empty_like(wide, memory_format=torch.contiguous_format), wide.new_empty(q.shape[:2])
    for r, query in few:
        at = slice(r.q_start + query, r.q_start + query + 1)
        ids, position = block_indices[at], r.position(query)
        chosen = _local_last(ids[0], position // block_size)
        if chosen is None:  # the current block comes earlier, or heads chose different numbers
            part = _sparse_batch(wide[at], k, v, cache, page_table, [(r, query)], ids, block_size, scale)
        else:
            seen = (chosen - 1) * block_size + position % block_size + 1
            logical = cache.of_blocks(ids[0, :, :chosen].long())[:, : -(-seen // cache.tokens)]
            found = plan.rows(r, cache).gather(1, logical)
            part = decode.attend_rows(wide[at], k, v, found, seen, scale, plan)
        if q.shape[0] == 1:
            return part[0].to(q.dtype), part[1]
        out[at], lse[at] = part
    for r in requests:
        if r.num_queries <= _FEW_TOKENS:
            continue
        keys, values = _gather((k, v), cache, plan.rows(r, cache), r.length, dtype)
        out[r.rows], lse[r.rows] = attention.block_sparse_attention(
            wide[r.rows], keys.transpose(0, 1), values.transpose(0, 1), block_indices[r.rows], [0, r.num_queries],
            [0, r.length], block_size=block_size, scale=scale,
        )  # fmt: skip
    return out.to(q.dtype), lse


def _gather(
    caches: tuple[Tensor, Tensor], cache: CacheRows, found: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence from rows `found` `[heads, rows]`: each `[heads, length, D]`, nothing past it."""
    places = found.flatten()
    k, v = (
        x.index_select(0, places).view(cache.heads, -1, x.shape[1] // cache.tokens)[:, :length].to(dtype)
        for x in caches
    )
    return k, v


def _local_last(ids: Tensor, current: int) -> int | None:
    """Number of blocks every head chose, if it is the same, the current block comes last and earlier ones before it."""
    chosen: int | None = None
    for head in ids.tolist():
        count = len(head) - head.count(-1)
        if (chosen is not None and count != chosen) or not count or head[count - 1] != current:
            return None
        if count > 1 and (min(head[: count - 1]) < 0 or max(head[: count - 1]) >= current):
            return None
        chosen = count
    return chosen


def _masked(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, unused: Tensor, scale: float) -> (
    tuple[Tensor, Tensor]
):  # fmt: skip
    """q `[n, Hkv, r, D]`, keys, values `[n, Hkv, s, D]`, `hidden` `[n, Hkv|1, r|1, s]`, `unused` `[n, Hkv|1, s, 1]`.

    Unused places may hold NaN, which a zero probability would not cancel: values are zeroed before the product.
    """
    scores = torch.matmul(q * scale, keys.transpose(-1, -2)).masked_fill_(hidden, float("-inf"))
    probabilities = scores.softmax(-1)
    # The largest probability is exp(largest score - lse); exponentials of -inf would be slow outside the softmax.
    lse = scores.amax(-1) - probabilities.amax(-1).log()
    return torch.matmul(probabilities, values.masked_fill_(unused, 0.0)), lse


def _dense_batch(
    q: Tensor, k: Tensor, v: Tensor, cache: CacheRows, plan: PagedPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """All sequences at once, padded to the longest; each has the same number of queries."""
    count, queries, dim = len(plan.requests), plan.requests[0].num_queries, q.shape[-1]
    rows = q.view(count, queries, cache.heads, -1, dim).transpose(1, 2)  # [n, Hkv, queries, G, D]
    group = rows.shape[3]
    found, hidden, unused = plan.once(("dense batch", cache, group), lambda: _dense_tables(cache, plan, group))
    keys, values = (x.index_select(0, found).view(count, cache.heads, -1, dim).to(q.dtype) for x in (k, v))
    out, lse = _masked(rows.flatten(2, 3), keys, values, hidden, unused, scale)
    out, lse = (x.unflatten(2, (queries, group)).transpose(1, 2) for x in (out, lse))
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def _dense_tables(cache: CacheRows, plan: PagedPlan, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a dense batch: rows to gather, places hidden `[n, 1, queries * G, s]` and unused `[n, 1, s, 1]`."""
    count, queries, device = len(plan.requests), plan.requests[0].num_queries, plan.page_table.device
    longest = max(r.length for r in plan.requests)
    logical = torch.arange(-(-longest // cache.tokens), device=device)
    found = cache.physical(plan.page_table, logical.expand(count, -1))[:, None] + cache.head_starts(device)[:, None]
    position = torch.arange(logical.shape[0] * cache.tokens, device=device)
    last = torch.tensor([r.length - 1 for r in plan.requests], device=device)
    unused = position > last[:, None]
    seen = last[:, None] - torch.arange(queries - 1, -1, -1, device=device)
    hidden = position > seen.repeat_interleave(group, dim=1)[:, :, None]
    return found.flatten(), hidden[:, None], unused[:, None, :, None]


def _sparse_batch(
    q: Tensor, k: Tensor, v: Tensor, cache: CacheRows, page_table: Tensor, queries: Sequence[tuple[Request, int]],
    block_indices: Tensor, block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every query (the i-th of its sequence) by itself, all at once, in packed order; any ids, in any order."""
    count, dim, device = len(queries), q.shape[-1], q.device
    sequence, position = torch.tensor([(r.sequence, r.position(i)) for r, i in queries], device=device).t()
    ids = block_indices.long()
    logical = cache.of_blocks(ids.clamp(min=0))  # [t, Hkv, K']
    table = page_table if [r.sequence for r, _ in queries] == list(range(page_table.shape[0])) else page_table[sequence]
    found = cache.physical(table, logical) + cache.head_starts(device)[:, None]
    keys, values = (
        x.index_select(0, found.flatten()).view(count, cache.heads, -1, dim).to(q.dtype) for x in (k, v)
    )
    within = torch.arange(block_size, device=device)
    key_position = (ids.unsqueeze(-1) * block_size + within).flatten(2)  # negative where there is no block
    unused = (key_position < 0) | (key_position > position[:, None, None])
    grouped = q.view(count, cache.heads, -1, dim)
    out, lse = _masked(grouped, keys, values, unused.unsqueeze(2), unused.unsqueeze(-1), scale)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])
