"""Attention and selection over paged keys: decoding, verification of several tokens, and prefill in chunks.

A cache row is the largest run of tokens that lies in one page and in one block: all of it where page and block are
equal, gcd(page, block) tokens otherwise. Keys of one KV head are gathered by whole rows (`index_select`); what lies
past the end of a sequence is sliced off or masked before any product, so its content never matters.

Sequences with few new tokens take the row paths; the others are gathered and handed to the packed forms.
Shapes as in the reference: pages `[P, Hkv, page, D]`, index key pages `[P, page, Di]`, `page_table` `[N, max_pages]`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minim3.kernels.portable import attention, select
from minim3.kernels.portable.flash import attend
from minim3.kernels.sequences import Lengths, as_ints, at_least_fp32, check_selection

_FEW_TOKENS = 8
"""Sequences with at most this many new tokens take the row paths."""

_BATCH_ELEMENTS = 1 << 20
"""Up to this many gathered key elements sequences are padded and batched; beyond, one at a time stays in cache."""


class Request(NamedTuple):
    """One sequence: rows `q_start`... of the packed queries, its `length` in tokens with the new ones."""

    sequence: int
    q_start: int
    num_queries: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.q_start, self.q_start + self.num_queries)

    def position(self, query: int) -> int:
        return self.length - self.num_queries + query


def _requests(cu_seqlens_q: Lengths, lengths_k: Lengths, page_table: Tensor, page_size: int) -> list[Request]:
    cu, lengths = as_ints(cu_seqlens_q), as_ints(lengths_k)
    if len(cu) != len(lengths) + 1 or page_table.shape[0] != len(lengths):
        raise ValueError(
            f"cu_seqlens_q has {len(cu)} entries, lengths_k {len(lengths)} and page_table {page_table.shape[0]} rows; "
            "N sequences need N + 1, N and N"
        )
    requests = []
    for n, length in enumerate(lengths):
        count = cu[n + 1] - cu[n]
        if count > length or length > page_table.shape[1] * page_size:
            raise ValueError(
                f"sequence {n} has {count} queries, {length} tokens and room for {page_table.shape[1] * page_size} in "
                "its pages; the new tokens count in its length and every token needs a page"
            )
        if count:
            requests.append(Request(n, cu[n], count, length))
    return requests


class CacheRows(NamedTuple):
    """How logical blocks map to cache rows of `tokens` tokens: `per_block` rows a block, `per_page` a page and head."""

    tokens: int
    per_block: int
    per_page: int
    heads: int

    @classmethod
    def of(cls, pages: Tensor, block_size: int) -> "CacheRows":
        page_size = pages.shape[-2]
        tokens = math.gcd(page_size, block_size)
        heads = pages.shape[1] if pages.dim() == 4 else 1
        return cls(tokens, block_size // tokens, page_size // tokens, heads)

    def view(self, pages: Tensor) -> Tensor:
        """Pages as `[rows, tokens * D]`."""
        if not pages.is_contiguous():
            raise ValueError(f"cache pages of shape {tuple(pages.shape)} are not contiguous; allocate them whole")
        return pages.view(-1, self.tokens * pages.shape[-1])

    def physical(self, table: Tensor, rows: Tensor) -> Tensor:
        """Physical row of head 0 for logical `rows` of the sequences; int64, `rows` may be any shape.

        `table` `[max_pages]` of one sequence, or `[N, max_pages]` with `rows` `[N, ...]`. Rows past the end of a
        sequence read some other row (a table is filled up with -1 or any page): their content must be masked.
        """
        page = rows if self.per_page == 1 else rows // self.per_page
        page = page.clamp(0, table.shape[-1] - 1)
        if table.dim() == 1:
            page = table.index_select(0, page.reshape(-1)).view(page.shape)
        else:
            page = table.gather(1, page.flatten(1)).clamp_(min=0).view(page.shape)
        first = page.long() * (self.heads * self.per_page)
        return first if self.per_page == 1 else first + rows % self.per_page

    def of_blocks(self, blocks: Tensor) -> Tensor:
        """Logical rows of `blocks` `[..., K]`, in order: `[..., K * per_block]`."""
        if self.per_block == 1:
            return blocks
        within = torch.arange(self.per_block, device=blocks.device)
        return (blocks.unsqueeze(-1) * self.per_block + within).flatten(-2)

    def head_starts(self, device: torch.device) -> Tensor:
        return torch.arange(self.heads, device=device) * self.per_page


# Selection


def select_blocks_paged(
    index_q: Tensor, index_k_pages: Tensor, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, *,
    block_size: int, topk_blocks: int, init_blocks: int = 0, local_blocks: int = 1, score_type: str = "max",
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """See the reference."""
    check_selection(block_size, topk_blocks, init_blocks, local_blocks, score_type)
    requests = _requests(cu_seqlens_q, lengths_k, page_table, index_k_pages.shape[-2])
    scale = index_q.shape[-1] ** -0.5 if scale is None else scale
    dtype = at_least_fp32(index_q.dtype)
    heads = index_q.shape[1]
    cache = CacheRows.of(index_k_pages, block_size)
    index_k = cache.view(index_k_pages)
    positions = torch.tensor([r.position(i) for r in requests for i in range(r.num_queries)], device=index_q.device)
    current = positions // block_size
    out = select.all_blocks(current, heads, topk_blocks)
    batches: dict[int, list[Request]] = {}
    for r in requests:
        if (r.length - 1) // block_size < topk_blocks:
            continue
        if r.num_queries > _FEW_TOKENS or not local_blocks:
            found = _tokens(cache, page_table[r.sequence], r.length)
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
            table = page_table[group[0].sequence]
            keys = _index_keys(index_k, index_k_pages, cache, table, logical, blocks * block_size).to(dtype)
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


def _index_keys(
    index_k: Tensor, pages: Tensor, cache: CacheRows, table: Tensor, logical: Tensor, num_keys: int
) -> Tensor:
    """The first `num_keys` index keys of one sequence, `[num_keys, Di]`: a view where its pages follow each other."""
    page_size, dim = pages.shape[-2:]
    listed: list[int] = table[: -(-num_keys // page_size)].tolist()
    if listed == list(range(listed[0], listed[0] + len(listed))):
        return pages.view(-1, dim)[listed[0] * page_size : listed[0] * page_size + num_keys]
    return index_k.index_select(0, cache.physical(table, logical)).view(num_keys, dim)


# Attention


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference."""
    requests = _requests(cu_seqlens_q, lengths_k, page_table, k_pages.shape[-2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = at_least_fp32(q.dtype)
    cache = CacheRows.of(k_pages, k_pages.shape[-2])
    k, v = cache.view(k_pages), cache.view(v_pages)
    wide = q.to(dtype)
    kv_heads, dim = k_pages.shape[1], q.shape[-1]
    longest = max((r.length for r in requests), default=0)
    counts = {r.num_queries for r in requests}
    padded = len(requests) * kv_heads * (longest + cache.tokens) * dim
    if len(requests) == page_table.shape[0] > 1 == len(counts) and max(counts) <= _FEW_TOKENS and (
        padded <= _BATCH_ELEMENTS
    ):  # fmt: skip
        out, lse = _dense_batch(wide, k, v, cache, page_table, requests, longest, scale)
        return out.to(q.dtype), lse
    out, lse = torch.empty_like(wide, memory_format=torch.contiguous_format), wide.new_empty(q.shape[:2])
    for r in requests:
        keys, values = _gather((k, v), cache, _tokens(cache, page_table[r.sequence], r.length), r.length, dtype)
        if r.num_queries == 1:
            part = _attend_row(wide[r.rows], keys, values, scale)
        else:
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
    cu_seqlens_q: Lengths, *, block_size: int, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference."""
    requests = _requests(cu_seqlens_q, lengths_k, page_table, k_pages.shape[-2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = at_least_fp32(q.dtype)
    cache = CacheRows.of(k_pages, block_size)
    k, v = cache.view(k_pages), cache.view(v_pages)
    wide = q.to(dtype)
    dim = q.shape[-1]
    few = [r for r in requests if r.num_queries <= _FEW_TOKENS]
    rows = [(r.sequence, i + r.q_start, r.position(i)) for r in few for i in range(r.num_queries)]
    if len(rows) == q.shape[0] > 1 and len(rows) * cache.heads * block_indices.shape[2] * block_size * dim <= (
        _BATCH_ELEMENTS
    ):  # fmt: skip
        out, lse = _sparse_batch(wide, k, v, cache, page_table, rows, block_indices, block_size, scale)
        return out.to(q.dtype), lse
    out, lse = torch.empty_like(wide, memory_format=torch.contiguous_format), wide.new_empty(q.shape[:2])
    for sequence, row, position in rows:
        ids = block_indices[row]
        chosen = _local_last(ids, position // block_size)
        at = slice(row, row + 1)
        if chosen is None:  # the current block comes earlier, or heads chose different numbers
            part = _sparse_batch(
                wide[at], k, v, cache, page_table, [(sequence, row, position)], ids[None], block_size, scale
            )
        else:
            seen = (chosen - 1) * block_size + position % block_size + 1
            logical = cache.of_blocks(ids[:, :chosen].long())[:, : -(-seen // cache.tokens)]
            found = cache.physical(page_table[sequence], logical).add_(cache.head_starts(q.device)[:, None])
            keys, values = _gather((k, v), cache, found.flatten(), seen, dtype)
            part = _attend_row(wide[at], keys, values, scale)
        if q.shape[0] == 1:
            return part[0].to(q.dtype), part[1]
        out[at], lse[at] = part
    for r in requests:
        if r.num_queries <= _FEW_TOKENS:
            continue
        keys, values = _gather((k, v), cache, _tokens(cache, page_table[r.sequence], r.length), r.length, dtype)
        out[r.rows], lse[r.rows] = attention.block_sparse_attention(
            wide[r.rows], keys.transpose(0, 1), values.transpose(0, 1), block_indices[r.rows], [0, r.num_queries],
            [0, r.length], block_size=block_size, scale=scale,
        )  # fmt: skip
    return out.to(q.dtype), lse


def _tokens(cache: CacheRows, table: Tensor, length: int) -> Tensor:
    """Physical rows that hold the first `length` tokens of one sequence, head by head."""
    logical = torch.arange(-(-length // cache.tokens), device=table.device)
    found = cache.physical(table, logical)
    return found if cache.heads == 1 else (found + cache.head_starts(table.device)[:, None]).flatten()


def _gather(
    caches: tuple[Tensor, Tensor], cache: CacheRows, found: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence from their physical rows: each `[heads, length, D]`, nothing past the end."""
    k, v = (
        x.index_select(0, found).view(cache.heads, -1, x.shape[1] // cache.tokens)[:, :length].to(dtype) for x in caches
    )
    return k, v


def _local_last(ids: Tensor, current: int) -> int | None:
    """Number of blocks every head chose, if it is the same, the current block comes last and earlier ones before it."""
    chosen: int | None = None
    for head in ids.tolist():
        count = len(head) - head.count(-1)
        if (chosen is not None and count != chosen) or not count or head[count - 1] != current:
            return None
        if not all(0 <= block < current for block in head[: count - 1]):
            return None
        chosen = count
    return chosen


def _attend_row(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query `[1, Hq, D]` against `[Hkv, s, D]`: its query heads are the rows of each KV head."""
    grouped = q.view(1, keys.shape[0], -1, q.shape[-1])
    out, lse = attend(grouped, keys.unsqueeze(0), values.unsqueeze(0), causal=False, scale=scale)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


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
    q: Tensor, k: Tensor, v: Tensor, cache: CacheRows, page_table: Tensor, requests: list[Request], longest: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All sequences at once, padded to the longest; each has the same number of queries."""
    count, queries, dim, device = len(requests), requests[0].num_queries, q.shape[-1], q.device
    logical = torch.arange(-(-longest // cache.tokens), device=device)
    found = cache.physical(page_table, logical.expand(count, -1))[:, None] + cache.head_starts(device)[:, None]
    keys, values = (
        x.index_select(0, found.flatten()).view(count, cache.heads, -1, dim).to(q.dtype) for x in (k, v)
    )
    position = torch.arange(keys.shape[2], device=device)
    last = torch.tensor([r.length - 1 for r in requests], device=device)
    unused = position > last[:, None]
    rows = q.view(count, queries, cache.heads, -1, dim).transpose(1, 2)  # [n, Hkv, queries, G, D]
    group = rows.shape[3]
    if queries == 1:
        hidden = unused[:, None, None]
    else:
        seen = last[:, None] - torch.arange(queries - 1, -1, -1, device=device)
        hidden = (position > seen.repeat_interleave(group, dim=1)[:, :, None])[:, None]
    out, lse = _masked(rows.flatten(2, 3), keys, values, hidden, unused[:, None, :, None], scale)
    out, lse = (x.unflatten(2, (queries, group)).transpose(1, 2) for x in (out, lse))
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def _sparse_batch(
    q: Tensor, k: Tensor, v: Tensor, cache: CacheRows, page_table: Tensor, rows: Sequence[tuple[int, int, int]],
    block_indices: Tensor, block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every query by itself, all at once: `rows` (sequence, row, position) in packed order; any ids, in any order."""
    count, dim, device = len(rows), q.shape[-1], q.device
    sequence, _, position = torch.tensor(rows, device=device).t()
    ids = block_indices.long()
    logical = cache.of_blocks(ids.clamp(min=0))  # [t, Hkv, K']
    table = page_table if [r[0] for r in rows] == list(range(page_table.shape[0])) else page_table[sequence]
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
