"""Which queries attend each block of keys: the transpose of the selection, for gradients of keys and values.

Made by one stable sort of the chosen (head, block) pairs, so that the queries of a block stay in order and sums over
them are the same every time. Long lists are cut into segments, which are summed apart and added up in order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minim3.kernels.triton.layout import Layout, runs

SEGMENT = 2048
"""Queries of a segment at most."""


class Lists(NamedTuple):
    """One list for each KV head and block of keys, in this order.

    tokens: int32 packed queries, list after list; None where a list is a run of adjacent queries.
    starts: int64 `[lists]`, where each list starts in `tokens` (or at which query); counts: int64 `[lists]`.
    segments: int32 `[segments, 2]` of (list, first of its entries), (-1, 0) in unused rows.
    first_segments: int64 `[lists + 1]`. blocks: int32 `[blocks, 2]` of (sequence, first key).
    """

    tokens: Tensor | None
    starts: Tensor
    counts: Tensor
    segments: Tensor
    first_segments: Tensor
    blocks: Tensor


def sparse_lists(block_indices: Tensor, layout: Layout, block_size: int) -> Lists:
    """Of chosen blocks int32 `[T, Hkv, K]`; those that hold nothing a query may see are left out."""
    order, lists = sorted_choices(block_indices, layout, block_size, 0)
    return lists._replace(tokens=(order // (block_indices.shape[1] * block_indices.shape[2])).int())


def sorted_choices(block_indices: Tensor, layout: Layout, block_size: int, first: int) -> tuple[Tensor, Lists]:
    """Of the blocks `[t, Hkv, K]` that queries from `first` on chose: where each entry of the lists stands among them.

    The lists come without `tokens`.
    """
    tokens, heads, topk = block_indices.shape
    blocks, first_block = layout.key_blocks(block_size)
    num_blocks, device = blocks.shape[0], block_indices.device
    sequence, start = layout.tiles(1)[first : first + tokens].unbind(1)
    record = layout.table[sequence.long()]
    current = ((record[:, 4] + start) // block_size)[:, None, None]
    head = torch.arange(heads, device=device)[:, None] * num_blocks
    chosen = (block_indices >= 0) & (block_indices <= current)
    first_list = head + first_block[sequence.long()][:, None, None]
    lists = torch.where(chosen, block_indices + first_list, heads * num_blocks)
    lists, order = torch.sort(lists.int().flatten(), stable=True)
    bounds = torch.searchsorted(lists, torch.arange(heads * num_blocks + 1, dtype=torch.int32, device=device))
    counts = bounds[1:] - bounds[:-1]
    return order, _cut(None, bounds[:-1], counts, tokens * heads * topk, blocks)


def dense_lists(layout: Layout, heads: int, block_size: int, causal: bool) -> Lists:
    """Of all visible keys: runs of queries."""
    assert layout.spans is not None
    blocks, _ = layout.key_blocks(block_size)
    sequence, first_key = blocks.long().unbind(1)
    record = layout.table[sequence]
    first = (first_key - record[:, 4]).clamp(min=0) if causal else torch.zeros_like(first_key)
    counts = (record[:, 1] - first).clamp(min=0).repeat(heads)
    starts = (record[:, 0] + first).repeat(heads)
    entries = heads * sum(-(-s.num_keys // block_size) * s.num_queries for s in layout.spans)
    return _cut(None, starts, counts, entries, blocks)


def _cut(tokens: Tensor | None, starts: Tensor, counts: Tensor, entries: int, blocks: Tensor) -> Lists:
    segments = runs(counts, SEGMENT, entries // SEGMENT + counts.shape[0])
    first = torch.zeros(counts.shape[0] + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum((counts + SEGMENT - 1) // SEGMENT, 0, out=first[1:])
    return Lists(tokens, starts, counts, segments, first, blocks)
