"""Sparse attention block of keys by block of keys: for selections that adjacent tokens do not share.

Each block gathers the queries that chose it, so every product is of full size and made once; the price is that the
parts of a query meet only in a second pass, which weights them by their log-sum-exp. A run of queries at a time, so
that the parts stay bounded. Parts are normalised and kept in the dtype of the output.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from minim3.kernels.triton import lists as query_lists
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
)
from minim3.kernels.triton.layout import COLUMNS, Layout

ROWS = 64
"""Rows (queries times heads of a group) that meet a block at once."""

WARPS = 4
STAGES = 2
"""So that registers and shared memory hold two programs: one multiplies while the other takes exponents."""

_PART_ELEMENTS = 1 << 30
"""Elements of the parts of one run of queries: 2 GiB in 16 bits."""


@triton.jit
def _part(
    keys, values, query, visible, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """(normalised out, log-sum-exp to the base 2) of rows over one block."""
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    top = tl.max(scores, 1) * scale_log2
    finite = tl.where(top == float("-inf"), 0.0, top)
    shares = tl.exp2(scores * scale_log2 - finite[:, None])
    total = tl.sum(shares, 1)
    some = total != 0.0
    total = tl.where(some, total, 1.0)
    out = tl.dot(shares.to(values.dtype), values, input_precision=PRECISION) * (1.0 / total)[:, None]
    return out, tl.where(some, top + tl.log2(total), float("-inf"))


@triton.jit
def _step(
    q, keys, values, key, order, parts, part_lse, list_start, step, count, first_query, lowest, kv_head, stride_q,
    stride_q_head, scale_log2,
    HEADS_TOPK: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    place = step + row // GROUP
    used = (row // GROUP < TOKENS) & (place < count)
    entry = tl.load(order + list_start + place, mask=used, other=0)
    token = first_query + entry // HEADS_TOPK
    query = load_rows(
        q, row_offsets(token, stride_q) + (kv_head * GROUP + row % GROUP) * stride_q_head, used, D, BLOCK_D
    )
    visible = key[None, :] <= (lowest + token)[:, None]
    out, log_sum = _part(keys, values, query, visible, scale_log2, MASKED, PRECISION)
    target = row_offsets(entry, GROUP) + row % GROUP
    channel = tl.arange(0, BLOCK_D)
    tl.store(
        parts + (target * D)[:, None] + channel[None, :], out.to(parts.dtype.element_ty),
        mask=used[:, None] & (channel < D)[None, :],
    )  # fmt: skip
    tl.store(part_lse + target, log_sum, mask=used)


@triton.jit
def _block_kernel(
    q, k, v, parts, part_lse, sequences, order, starts, counts, segments, blocks, page_table, num_blocks, first_query,
    stride_q, stride_q_head, stride_table, stride_page, stride_token, stride_head, scale_log2,
    COLUMNS: tl.constexpr, HEADS_TOPK: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, SEGMENT: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGED: tl.constexpr, ONE_PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment of the queries of one block."""
    segment = tl.program_id(0)
    which = tl.load(segments + 2 * segment)
    if which >= 0:
        first = tl.load(segments + 2 * segment + 1)
        kv_head = which // num_blocks
        block = blocks + which % num_blocks * 2
        sequence = tl.load(block).to(tl.int64)
        record = sequences + sequence * COLUMNS
        start = tl.load(block + 1)
        within = tl.arange(0, BLOCK_SIZE)
        key = start + within
        lowest = tl.load(record + 4) - tl.load(record)
        limit = tl.minimum(tl.load(record + 3), tl.load(record + 4) + tl.load(record + 1)).to(tl.int32)
        place, offsets = key_offsets(
            start, within, tl.load(record + 2), limit - 1, page_table + sequence * stride_table, stride_page,
            stride_token, PAGE_SIZE, PAGED, ONE_PAGE,
        )  # fmt: skip
        place += row_offsets(kv_head, stride_head)
        keys = load_keys(k + place, offsets, key < limit, D, BLOCK_D, True).to(q.dtype.element_ty)
        values = load_keys(v + place, offsets, key < limit, D, BLOCK_D, True).to(q.dtype.element_ty)
        count = tl.minimum(SEGMENT, (tl.load(counts + which) - first).to(tl.int32))
        list_start = tl.load(starts + which) + first
        # Queries come in order: only the first few can lie in the block themselves, the others see all of it.
        near = (tl.maximum(BLOCK_SIZE - first, 0) + TOKENS - 1) // TOKENS * TOKENS
        near = tl.minimum(near, count)
        for step in tl.range(0, near, TOKENS):
            _step(
                q, keys, values, key, order, parts, part_lse, list_start, step, count, first_query, lowest, kv_head,
                stride_q, stride_q_head, scale_log2, HEADS_TOPK, GROUP, TOKENS, ROWS, D, BLOCK_D, True, PRECISION,
            )  # fmt: skip
        for step in tl.range(near, count, TOKENS):
            _step(
                q, keys, values, key, order, parts, part_lse, list_start, step, count, first_query, lowest, kv_head,
                stride_q, stride_q_head, scale_log2, HEADS_TOPK, GROUP, TOKENS, ROWS, D, BLOCK_D, False, PRECISION,
            )  # fmt: skip


@triton.jit
def _merge_kernel(
    parts, part_lse, out, lse, first_query,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOPK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    LN2: tl.constexpr,
):  # fmt: skip
    """One query and one KV head: its parts, weighted by their shares of the softmax."""
    token = tl.program_id(0)
    kv_head = tl.program_id(1)
    member = tl.arange(0, GROUP)
    channel = tl.arange(0, BLOCK_D)
    entry = row_offsets(token * KV_HEADS + kv_head, TOPK)
    top = tl.full([GROUP], float("-inf"), tl.float32)
    for slot in range(TOPK):
        top = tl.maximum(top, tl.load(part_lse + (entry + slot) * GROUP + member))
    finite = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([GROUP], tl.float32)
    acc = tl.zeros([GROUP, BLOCK_D], tl.float32)
    for slot in range(TOPK):
        source = (entry + slot) * GROUP + member
        share = tl.exp2(tl.load(part_lse + source) - finite)
        mask = (share > 0.0)[:, None] & (channel < D)[None, :]  # an empty slot's part was never written
        part = tl.load(parts + (source * D)[:, None] + channel[None, :], mask=mask, other=0.0)
        acc += part.to(tl.float32) * share[:, None]
        total += share
    some = total != 0.0
    total = tl.where(some, total, 1.0)
    target = row_offsets(first_query + token, KV_HEADS * GROUP) + kv_head * GROUP + member
    tl.store(
        out + (target * D)[:, None] + channel[None, :], (acc / total[:, None]).to(out.dtype.element_ty),
        mask=(channel < D)[None, :] & (member < GROUP)[:, None],
    )  # fmt: skip
    tl.store(lse + target, tl.where(some, (top + tl.log2(total)) * LN2, float("-inf")))


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, layout: Layout, page_table: Tensor | None,
    block_size: int, scale: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fill `out` and `lse`; the arguments are those of `prefill.forward`."""
    heads, (queries, query_heads, dim) = k.shape[1], q.shape
    group, topk = query_heads // heads, block_indices.shape[2]
    block_d = max(power_of_two(dim), 16)
    rows = ROWS if q.dtype != torch.float32 else min(ROWS, 32)
    tokens = max(1, rows // group)
    pages = Pages(k, page_table, block_size).arguments
    run = max(1, _PART_ELEMENTS // (query_heads * topk * dim))
    for first in range(0, queries, run):
        ids = block_indices[first : first + run].contiguous()
        order, lists = query_lists.sorted_choices(ids, layout, block_size, first)
        parts = torch.empty(ids.numel(), group, dim, dtype=out.dtype, device=q.device)
        # A slot without a block has no part: its share is zero.
        part_lse = torch.full(parts.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
        _block_kernel[lists.segments.shape[0],](
            q, k, v, parts, part_lse, layout.table, order, lists.starts, lists.counts, lists.segments, lists.blocks,
            num_blocks=lists.blocks.shape[0], first_query=first, stride_q=q.stride(0), stride_q_head=q.stride(1),
            scale_log2=scale * LOG2_E, COLUMNS=COLUMNS, HEADS_TOPK=heads * topk, GROUP=group, TOKENS=tokens,
            ROWS=max(16, tokens * group), D=dim, BLOCK_D=block_d, BLOCK_SIZE=block_size, SEGMENT=query_lists.SEGMENT,
            PRECISION=precision(q.dtype), num_warps=WARPS, num_stages=1 if q.dtype == torch.float32 else STAGES,
            **pages,
        )  # fmt: skip
        _merge_kernel[ids.shape[0], heads](
            parts, part_lse, out, lse, first_query=first, KV_HEADS=heads, GROUP=group, TOPK=topk, D=dim,
            BLOCK_D=block_d, LN2=LN_2, num_warps=4,
        )  # fmt: skip
