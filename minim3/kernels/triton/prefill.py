"""Attention of many queries, packed or paged: block-sparse over the union of a few tokens' blocks, or dense.

A tile is a run of adjacent tokens with all query heads of one KV head: its rows share every key that is read. Sparse
tiles walk along the union of their tokens' blocks; a row that did not choose a block is shifted out of its softmax,
which costs nothing an element. Blocks that every token sees whole need no mask and go first.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minim3.kernels.triton import by_key
from minim3.kernels.triton.keys import (
    LN_2,
    LOG2_E,
    Pages,
    key_offsets,
    load_keys,
    load_rows,
    power_of_two,
    precision,
    row_offsets,
    rows_contiguous,
    stages,
)
from minim3.kernels.triton.layout import Layout
from minim3.kernels.triton.union import Union, make_union, most_tokens

SPARSE_ROWS = 64
"""Rows (tokens times query heads of a group) of a sparse tile: more share keys better, and share fewer blocks."""

DENSE_ROWS = 128

SPARSE_KEYS = 64
"""Keys of a block taken at once."""

MANY_QUERIES = 1024
"""From so many queries on it is worth looking whether tiles share their blocks."""

FEW_SHARED = 2.5
"""How many times the blocks that a token chose its tile may walk along; beyond it, queries are gathered key by key."""

WARPS: int | None = None
STAGES: int | None = None
"""Warps of a program and loads under way; None: by the size of the tile."""


@triton.jit
def _attend(
    query, k, v, start, first_key, num_keys, table_row, stride_page, stride_token, position, member, acc,
    top, total, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    SPARSE: tl.constexpr, PAGE_SIZE: tl.constexpr, PAGED: tl.constexpr, ONE_PAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in powers of two, over KEYS keys from `start` on."""
    within = tl.arange(0, KEYS)
    place, offsets = key_offsets(
        start, within, first_key, num_keys - 1, table_row, stride_page, stride_token, PAGE_SIZE, PAGED, ONE_PAGE
    )
    seen = start + within < num_keys
    keys = load_keys(k + place, offsets, seen, D, BLOCK_D, MASKED).to(query.dtype)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if MASKED:
        if CAUSAL:
            scores = tl.where((start + within)[None, :] <= position[:, None], scores, float("-inf"))
        else:
            scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    if SPARSE:
        shares = tl.exp2(scores * scale_log2 - tl.where(member, higher, float("inf"))[:, None])
        faded = tl.where(member, tl.exp2(top - higher), 1.0)
        higher = tl.where(member, higher, top)
    else:
        shares = tl.exp2(scores * scale_log2 - higher[:, None])
        faded = tl.exp2(top - higher)
    total = total * faded + tl.sum(shares, 1)
    values = load_keys(v + place, offsets, seen, D, BLOCK_D, MASKED).to(query.dtype)
    acc = acc * faded[:, None]
    acc = tl.dot(shares.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, higher, total


@triton.jit
def _forward_kernel(
    q, k, v, out, lse, sequences, tiles, page_table, union_ids, union_members, union_counts, stride_q, stride_q_head,
    stride_table, stride_page, stride_token, stride_head, scale_log2,
    COLUMNS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, STEPS: tl.constexpr, CANDIDATES: tl.constexpr,
    CAUSAL: tl.constexpr, SPARSE: tl.constexpr, PAGE_SIZE: tl.constexpr, PAGED: tl.constexpr, ONE_PAGE: tl.constexpr,
    PRECISION: tl.constexpr, LN2: tl.constexpr,
):  # fmt: skip
    """A block is STEPS times KEYS keys."""
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
        table_row = page_table + sequence.to(tl.int64) * stride_table
        k += tl.cast(kv_head, tl.int64) * stride_head
        v += tl.cast(kv_head, tl.int64) * stride_head
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
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
            acc, top, total = _attend(
                query, k, v, place, first_key, num_keys, table_row, stride_page, stride_token, position,
                member, acc, top, total, scale_log2, D, BLOCK_D, KEYS, False, CAUSAL, SPARSE, PAGE_SIZE,
                PAGED, ONE_PAGE, PRECISION,
            )  # fmt: skip
        for step in tl.range(complete, steps):
            member = used
            place = step * KEYS
            if SPARSE:
                place = (tl.load(union_ids + base + step // STEPS) * STEPS + step % STEPS) * KEYS
                member = used & (((tl.load(union_members + base + step // STEPS) >> token) & 1) != 0)
                member = member & (place <= position)
            if place < num_keys:
                acc, top, total = _attend(
                    query, k, v, place, first_key, num_keys, table_row, stride_page, stride_token, position,
                    member, acc, top, total, scale_log2, D, BLOCK_D, KEYS, True, CAUSAL, SPARSE, PAGE_SIZE,
                    PAGED, ONE_PAGE, PRECISION,
                )  # fmt: skip
        some = total != 0.0
        acc = acc / tl.where(some, total, 1.0)[:, None]
        channel = tl.arange(0, BLOCK_D)
        target = row_offsets(first_query + token, KV_HEADS * GROUP) + head
        tl.store(
            out + (target * D)[:, None] + channel[None, :], acc.to(out.dtype.element_ty),
            mask=used[:, None] & (channel < D)[None, :],
        )  # fmt: skip
        log_sum = (top + tl.log2(tl.where(some, total, 1.0))) * LN2
        tl.store(lse + target, tl.where(some, log_sum, float("-inf")), mask=used)


class Tiles:
    """How attention lies over tiles, for the forward pass and the gradient of queries."""

    def __init__(
        self, q: Tensor, k: Tensor, block_indices: Tensor | None, layout: Layout, *, page_table: Tensor | None,
        block_size: int, causal: bool, rows: int | None = None,
    ) -> None:  # fmt: skip
        heads, dim = k.shape[1], q.shape[2]
        group = q.shape[1] // heads
        sparse = block_indices is not None
        if rows is None:
            rows = SPARSE_ROWS if sparse or q.dtype == torch.float32 else DENSE_ROWS
        longest = max(s.num_queries for s in layout.spans) if layout.spans else q.shape[0]
        self.tokens = max(1, min(rows // group, power_of_two(longest)))
        if block_indices is not None:
            self.tokens = min(self.tokens, most_tokens(block_indices.shape[2]))
        self.rows = max(16, self.tokens * group)
        self.table = layout.tiles(self.tokens)
        if q.dtype == torch.float32:
            keys = min(block_size, 32)
        else:
            keys = min(block_size, SPARSE_KEYS)
        self.union: Union | None = None
        if block_indices is not None:
            self.union = make_union(block_indices, layout, self.tokens, block_size)
        self.grid = (self.table.shape[0], heads)
        ids, members, counts = (self.table,) * 3 if self.union is None else self.union
        self.stages = stages(2 * keys * max(power_of_two(dim), 16) * q.element_size(), 3)
        self.arguments: dict[str, Any] = {
            "sequences": layout.table, "tiles": self.table, "union_ids": ids, "union_members": members,
            "union_counts": counts, "stride_q": q.stride(0), "stride_q_head": q.stride(1),
            "COLUMNS": layout.table.shape[1], "KV_HEADS": heads, "GROUP": group, "TOKENS": self.tokens,
            "ROWS": self.rows, "D": dim, "BLOCK_D": max(power_of_two(dim), 16), "KEYS": keys,
            "STEPS": block_size // keys, "CANDIDATES": 1 if self.union is None else ids.shape[2],
            "CAUSAL": causal, "SPARSE": sparse, "PRECISION": precision(q.dtype),
            **Pages(k, page_table, keys).arguments,
        }  # fmt: skip


    def share_little(self, queries: int, layout: Layout) -> bool:
        """Whether tiles would walk along far more blocks than their tokens chose (one number is read back)."""
        if self.union is None or self.tokens == 1 or queries < MANY_QUERIES or layout.spans is None:
            return False
        if self.union.counts.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        walked = self.union.counts[..., 1].sum(dtype=torch.int64)
        chosen = self.union.counts[..., 2].sum(dtype=torch.int64)
        return bool(walked * self.tokens > FEW_SHARED * chosen)


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor | None, layout: Layout, *, page_table: Tensor | None,
    block_size: int, scale: float, causal: bool = True, rows: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out `[T, Hq, D]`, lse fp32 `[T, Hq]`); k and v packed `[S, Hkv, D]`, or pages `[P, Hkv, page, D]`.

    Dense where `block_indices` is None; `block_size` is then the number of keys taken at once.
    """
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    if v.stride() != k.stride():
        k, v = k.contiguous(), v.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if out.numel():
        tiles = Tiles(
            q, k, block_indices, layout, page_table=page_table, block_size=block_size, causal=causal, rows=rows
        )
        if rows is None and tiles.share_little(q.shape[0], layout):
            assert block_indices is not None
            by_key.forward(q, k, v, block_indices, layout, page_table, block_size, scale, out, lse)
            return out, lse
        _forward_kernel[tiles.grid](
            q, k, v, out, lse, scale_log2=scale * LOG2_E, LN2=LN_2,
            num_warps=WARPS or (4 if tiles.rows <= 64 else 8), num_stages=STAGES or tiles.stages, **tiles.arguments,
        )  # fmt: skip
    return out, lse
