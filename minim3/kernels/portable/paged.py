"""Attention and selection over paged keys: decoding, verification of several tokens, and prefill in chunks.

Sequences with few new tokens run all at once (`decode`), in parts of a like form; the others are gathered and handed
to the packed forms. What lies past the end of a sequence is sliced off or masked, so its content never matters.
Shapes as in the reference: pages `[P, Hkv, page, D]`, index key pages `[P, page, Di]`, `page_table` `[N, max_pages]`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minim3.kernels.portable import attention, decode, select
from minim3.kernels.portable.choice import Choice
from minim3.kernels.portable.plan import CacheRows, PagedPlan, Part, Request
from minim3.kernels.portable.products import BlockKernels
from minim3.kernels.sequences import Lengths, check_selection

FEW_TOKENS = 8
"""Sequences with at most this many new tokens run in parts, all at once."""

_PART_SCORES = 1 << 23
"""Scores of a part: 32 MiB in fp32."""


# Selection


def select_blocks_paged(
    index_q: Tensor, index_k_pages: Tensor, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, *,
    block_size: int, topk_blocks: int, init_blocks: int = 0, local_blocks: int = 1, score_type: str = "max",
    scale: float | None = None, plan: PagedPlan | None = None, maxima: type[select.Maxima] | None = None,
) -> Tensor:  # fmt: skip
    """See the reference; `maxima` as in `select.select_blocks`."""
    check_selection(block_size, topk_blocks, init_blocks, local_blocks, score_type)
    plan = _plan(plan, page_table, lengths_k, cu_seqlens_q, index_k_pages.shape[-2])
    scale = index_q.shape[-1] ** -0.5 if scale is None else scale
    queries = decode.wide(index_q) * scale
    selection: dict[str, Any] = {
        "block_size": block_size, "topk_blocks": topk_blocks, "init_blocks": init_blocks,
        "local_blocks": local_blocks, "score_type": score_type,
    }  # fmt: skip
    parts, others = _selection_parts(plan, block_size, topk_blocks, index_q.shape[1], local_blocks)
    if len(parts) == 1 and parts[0].rows is None:
        ids = choose(parts[0].plan, queries, index_k_pages, selection).int()
        plan.own_choice = ids
        return ids
    current = plan.once(("current", block_size), lambda: _positions(plan.requests, index_q.device) // block_size)
    out = select.all_blocks(current, index_q.shape[1], topk_blocks)
    for part in parts:
        assert part.rows is not None
        out.index_copy_(0, part.rows, choose(part.plan, part.take(queries), index_k_pages, selection).int())
    cache = CacheRows.of(index_k_pages, block_size)
    for r in others:
        keys = cache.view(index_k_pages).index_select(0, plan.rows(r, cache)[0]).view(-1, index_k_pages.shape[-1])
        out[r.rows] = select.select_blocks(
            queries[r.rows], keys[: r.length], [0, r.num_queries], [0, r.length], scale=1.0, maxima=maxima,
            **selection,
        )
    plan.own_choice = out if local_blocks else None
    return out


def choose(plan: PagedPlan, queries: Tensor, index_k_pages: Tensor, selection: dict[str, Any]) -> Tensor:
    """int64 `[T, Hi, topk]` from scaled `queries`, for a plan whose queries all have more blocks than the budget."""
    cache = CacheRows.of(index_k_pages, selection["block_size"])
    heads, dim = queries.shape[1:]
    choice = plan.once(
        ("choice", cache, heads, dim, *selection.values()),
        lambda: Choice(plan, cache, dim, heads, **selection),
    )
    return choice(queries, cache.view(index_k_pages))


def _selection_parts(
    plan: PagedPlan, block_size: int, topk_blocks: int, heads: int, local_blocks: int
) -> tuple[list[Part], list[Request]]:
    """The sequences to score all at once, and those to score one by one; the rest take all blocks they have."""

    def make() -> tuple[list[Part], list[Request]]:
        budget = topk_blocks * block_size
        over = [r for r in plan.requests if r.length > budget]
        few = [r for r in over if local_blocks and r.num_queries <= FEW_TOKENS and r.position(0) >= budget]
        return like_parts(plan, few, heads), [r for r in over if r not in few]

    return plan.once(("selection parts", block_size, topk_blocks, heads, local_blocks), make)


def like_parts(plan: PagedPlan, requests: Sequence[Request], heads: int) -> list[Part]:
    """Parts of as many queries a sequence and of like length, so that little is padded; scores stay within bounds."""
    parts: list[list[Request]] = []
    for r in sorted(requests, key=lambda r: (r.num_queries, r.length)):
        scores = r.num_queries * heads * r.length
        first = parts[-1][0] if parts else None
        if first is None or first.num_queries != r.num_queries or r.length > 2 * first.length or (
            (len(parts[-1]) + 1) * scores > _PART_SCORES
        ):  # fmt: skip
            parts.append([])
        parts[-1].append(r)
    return [plan.part(sorted(part, key=lambda r: r.q_start)) for part in parts]


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
    scale: float | None = None, plan: PagedPlan | None = None, blocks: BlockKernels | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference; `blocks` as in `attention.block_sparse_attention`."""
    plan = _plan(plan, page_table, lengths_k, cu_seqlens_q, k_pages.shape[-2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries = decode.wide(q) * scale
    heads = q.shape[1]
    few = [r for r in plan.requests if r.num_queries <= FEW_TOKENS]
    parts = plan.once(("dense parts", heads), lambda: like_parts(plan, few, heads))
    if len(parts) == 1 and parts[0].rows is None:
        out, lse = attend_all(parts[0].plan, queries, k_pages, v_pages, lse=True)
        assert lse is not None
        return out.to(q.dtype), lse
    out, lse = torch.empty_like(queries, memory_format=torch.contiguous_format), queries.new_empty(q.shape[:2])
    for part in parts:
        found = attend_all(part.plan, part.take(queries), k_pages, v_pages, lse=True)
        _put(part, found, out, lse)
    cache = CacheRows.of(k_pages, k_pages.shape[-2])
    for r in plan.requests:
        if r.num_queries > FEW_TOKENS:
            keys, values = _gather(k_pages, v_pages, cache, plan.rows(r, cache), r.length, queries.dtype)
            out[r.rows], lse[r.rows] = attention.varlen_attention(
                queries[r.rows], keys, values, [0, r.num_queries], [0, r.length], scale=1.0, blocks=blocks
            )
    return out.to(q.dtype), lse


def attend_all(
    plan: PagedPlan, queries: Tensor, k_pages: Tensor, v_pages: Tensor, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Scaled queries of a plan with as many of them a sequence, over all of its tokens: (out, lse if wanted)."""
    cache = CacheRows.of(k_pages, k_pages.shape[-2])
    group, dim = queries.shape[1] // cache.heads, queries.shape[2]
    dense = plan.once(("dense", cache, group, dim), lambda: decode.Dense(plan, cache, dim, group))
    return dense(queries, cache.view(k_pages), cache.view(v_pages).view(-1, dim), lse)


def block_sparse_attention_paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths_k: Lengths, block_indices: Tensor,
    cu_seqlens_q: Lengths, *, block_size: int, scale: float | None = None, plan: PagedPlan | None = None,
    blocks: BlockKernels | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference; `blocks` as in `attention.block_sparse_attention`."""
    plan = _plan(plan, page_table, lengths_k, cu_seqlens_q, k_pages.shape[-2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries = decode.wide(q) * scale
    if block_indices is not plan.own_choice:
        block_indices = _without_unused(block_indices)
    chosen, whole, rest = _sparse_parts(plan, block_indices, block_size, q.shape[1])
    if len(chosen) == 1 and chosen[0].rows is None:
        out, lse = attend_chosen(plan, queries, k_pages, v_pages, block_indices.long(), block_size, lse=True)
        assert lse is not None
        return out.to(q.dtype), lse
    out, lse = torch.empty_like(queries, memory_format=torch.contiguous_format), queries.new_empty(q.shape[:2])
    for part in chosen:
        ids = part.take(block_indices).long()
        _put(part, attend_chosen(part.plan, part.take(queries), k_pages, v_pages, ids, block_size, True), out, lse)
    for part in whole:
        _put(part, attend_all(part.plan, part.take(queries), k_pages, v_pages, True), out, lse)
    few = [(r, i) for r in rest if r.num_queries <= FEW_TOKENS for i in range(r.num_queries)]
    step = max(1, _PART_SCORES // (block_indices.shape[1] * block_indices.shape[2] * block_size * q.shape[2]))
    cache = CacheRows.of(k_pages, block_size)
    for start in range(0, len(few), step):
        some = few[start : start + step]
        at = torch.tensor([r.q_start + i for r, i in some], device=q.device)
        part_out, part_lse = _sparse_batch(
            queries[at], cache.view(k_pages), cache.view(v_pages), cache, page_table, some, block_indices[at],
            block_size, 1.0,
        )  # fmt: skip
        out.index_copy_(0, at, part_out)
        lse.index_copy_(0, at, part_lse)
    for r in rest:
        if r.num_queries <= FEW_TOKENS:
            continue
        keys, values = _gather(k_pages, v_pages, cache, plan.rows(r, cache), r.length, queries.dtype)
        out[r.rows], lse[r.rows] = attention.block_sparse_attention(
            queries[r.rows], keys, values, block_indices[r.rows], [0, r.num_queries], [0, r.length],
            block_size=block_size, scale=1.0, blocks=blocks,
        )  # fmt: skip
    return out.to(q.dtype), lse


def attend_chosen(
    plan: PagedPlan, queries: Tensor, k_pages: Tensor, v_pages: Tensor, ids: Tensor, block_size: int, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Scaled queries over their own blocks: `ids` int64 `[T, Hkv, K]`, none missing, the own block last."""
    cache = CacheRows.of(k_pages, block_size)
    group, dim, num_blocks = queries.shape[1] // cache.heads, queries.shape[2], ids.shape[2]
    chosen = plan.once(
        ("chosen", cache, group, dim, num_blocks),
        lambda: decode.Chosen(plan, cache, dim, group, block_size, num_blocks),
    )
    return chosen(queries, cache.view(k_pages), cache.view(v_pages).view(-1, dim), ids, lse)


def _sparse_parts(
    plan: PagedPlan, ids: Tensor, block_size: int, heads: int
) -> tuple[list[Part], list[Part], list[Request]]:
    """(parts that attend a full budget with the own block last, parts that attend everything, what is left)."""
    budget = ids.shape[2] * block_size
    few = [r for r in plan.requests if r.num_queries <= FEW_TOKENS]
    if ids is not plan.own_choice:
        if len(few) < len(plan.requests) or not _own_block_last(ids, plan, block_size):
            return [], [], plan.requests
        full = few
        return plan.once(("given", budget, heads), lambda: (_split(plan, full, heads * budget), [], []))

    def make() -> tuple[list[Part], list[Part], list[Request]]:
        full = [r for r in few if r.position(0) >= budget]
        whole = [r for r in few if r.length <= budget]
        rest = [r for r in plan.requests if r not in full and r not in whole]
        return _split(plan, full, heads * budget), like_parts(plan, whole, heads), rest

    return plan.once(("sparse parts", budget, heads), make)


def _split(plan: PagedPlan, requests: Sequence[Request], scores: int) -> list[Part]:
    """Parts of as many sequences as stay within bounds at so many scores a query."""
    parts: list[list[Request]] = []
    left = 0
    for r in requests:
        if left < r.num_queries:
            parts.append([])
            left = max(_PART_SCORES // scores, r.num_queries)
        parts[-1].append(r)
        left -= r.num_queries
    return [plan.part(part) for part in parts]


def _own_block_last(ids: Tensor, plan: PagedPlan, block_size: int) -> bool:
    """Whether every query's own block comes last, and only earlier ones come before it."""
    current = plan.once(("current", block_size), lambda: _positions(plan.requests, ids.device) // block_size)
    own, earlier = current[:, None, None], ids[..., :-1]
    return bool((ids[..., -1:] == own).all() and ((earlier >= 0) & (earlier < own)).all())


def _without_unused(ids: Tensor) -> Tensor:
    """`[T, Hkv, K]` without the columns at the end that hold no block."""
    used = (ids >= 0).flatten(0, 1).any(0).tolist()
    while len(used) > 1 and not used[-1]:
        used.pop()
    return ids[..., : len(used)]


def _put(part: Part, found: tuple[Tensor, Tensor | None], out: Tensor, lse: Tensor) -> None:
    part_out, part_lse = found
    assert part_lse is not None
    if part.rows is None:
        out.copy_(part_out)
        lse.copy_(part_lse)
    else:
        out.index_copy_(0, part.rows, part_out)
        lse.index_copy_(0, part.rows, part_lse)


def _gather(
    k_pages: Tensor, v_pages: Tensor, cache: CacheRows, found: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence from rows `found` `[heads, rows]`: each `[length, heads, D]`, nothing past it."""
    places, dim = found.flatten(), k_pages.shape[-1]
    k, v = (
        cache.view(x).index_select(0, places).view(cache.heads, -1, dim)[:, :length].to(dtype).transpose(0, 1)
        for x in (k_pages, v_pages)
    )
    return k, v


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
