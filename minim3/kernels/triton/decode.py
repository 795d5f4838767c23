"""Attention of few queries a sequence over pages: the chosen blocks (or all keys) split over programs, then merged.

Every query walks along its own blocks; rows are the query heads of one KV head. The number of programs depends on
shapes alone, so a CUDA graph can hold the step; splits that find nothing to do leave a log-sum-exp of -inf, which the
merge leaves out.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

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

_PROGRAMS = 264
"""Two programs for each multiprocessor of an H100."""

_MOST_SPLITS = 64


@triton.jit
def _split_kernel(
    q, k, v, blocks, sequences, tiles, page_table, part_out, part_lse, stride_q, stride_q_head, stride_blocks,
    stride_blocks_head, stride_table, stride_page, stride_token, stride_head, scale_log2, splits,
    steps_per_split,
    COLUMNS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, KEYS: tl.constexpr, STEPS: tl.constexpr, TOPK: tl.constexpr, SPARSE: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGED: tl.constexpr, ONE_PAGE: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
    LN2: tl.constexpr,
):  # fmt: skip
    """One query, one KV head, one part of its keys: out and log-sum-exp (to the base 2) of that part.

    WHOLE: the part is all there is, and its log-sum-exp is to the base e.
    A query before position 0 (padding of a graph) sees nothing: `//` cuts off towards 0, so that it begins at block 0.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = tl.load(tiles + 2 * tile)
    if sequence >= 0:
        start = tl.load(tiles + 2 * tile + 1)
        record = sequences + sequence.to(tl.int64) * COLUMNS
        packed = tl.load(record) + start
        num_keys = tl.load(record + 3).to(tl.int32)
        position = tl.load(record + 4).to(tl.int32) + start
        row = tl.arange(0, ROWS)
        head = kv_head * GROUP + row
        query = load_rows(q, row_offsets(packed, stride_q) + head * stride_q_head, row < GROUP, D, BLOCK_D)
        table_row = page_table + sequence.to(tl.int64) * stride_table
        k += tl.cast(kv_head, tl.int64) * stride_head
        v += tl.cast(kv_head, tl.int64) * stride_head
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        within = tl.arange(0, KEYS)
        if SPARSE:
            low = split * steps_per_split
            high = tl.minimum(low + steps_per_split, TOPK * STEPS)
            chosen = blocks + row_offsets(packed, stride_blocks) + kv_head * stride_blocks_head
        else:
            # The parts of a short sequence are as many as those of a long one, and shorter.
            steps = position // KEYS + 1
            each = (steps + splits - 1) // splits
            low = split * each
            high = tl.minimum(low + each, steps)
            chosen = blocks
        for step in tl.range(low, high):
            place = step * KEYS
            if SPARSE:
                id = tl.load(chosen + step // STEPS)
                place = tl.where(id < 0, num_keys, (id * STEPS + step % STEPS) * KEYS)
            seen = place + within <= position
            base, offsets = key_offsets(
                tl.minimum(place, position // KEYS * KEYS), within, 0, num_keys - 1, table_row, stride_page,
                stride_token, PAGE_SIZE, PAGED, ONE_PAGE,
            )  # fmt: skip
            keys = load_keys(k + base, offsets, seen, D, BLOCK_D, True).to(query.dtype)
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1) * scale_log2)
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            shares = tl.exp2(scores * scale_log2 - finite[:, None])
            faded = tl.exp2(top - finite)
            total = total * faded + tl.sum(shares, 1)
            values = load_keys(v + base, offsets, seen, D, BLOCK_D, True).to(query.dtype)
            acc = tl.dot(shares.to(values.dtype), values, acc * faded[:, None], input_precision=PRECISION)
            top = higher
        some = total != 0.0  # NaN is something, and shows
        acc = acc / tl.where(some, total, 1.0)[:, None]
        channel = tl.arange(0, BLOCK_D)
        target = row_offsets(packed * (KV_HEADS * GROUP) + head, splits) + split
        real = row < GROUP
        tl.store(
            part_out + (target * D)[:, None] + channel[None, :], acc.to(part_out.dtype.element_ty),
            mask=real[:, None] & (channel < D)[None, :],
        )  # fmt: skip
        log_sum = top + tl.log2(tl.where(some, total, 1.0))
        if WHOLE:
            log_sum *= LN2
        tl.store(part_lse + target, tl.where(some, log_sum, float("-inf")), mask=real)


@triton.jit
def _merge_kernel(
    part_out, part_lse, out, lse, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS_PADDED: tl.constexpr,
    LN2: tl.constexpr,
):  # fmt: skip
    """One query head: the parts weighted by their share of the softmax."""
    row = tl.program_id(0)
    split = tl.arange(0, SPLITS_PADDED)
    channel = tl.arange(0, BLOCK_D)
    source = row_offsets(row, splits) + split
    part = tl.load(part_lse + source, mask=split < splits, other=float("-inf"))
    top = tl.max(part, 0)
    some = top != float("-inf")
    share = tl.exp2(part - tl.where(some, top, 0.0))
    total = tl.where(some, tl.sum(share, 0), 1.0)
    outs = tl.load(
        part_out + (source * D)[:, None] + channel[None, :],
        mask=((split < splits) & (part != float("-inf")))[:, None] & (channel < D)[None, :], other=0.0,
    )  # fmt: skip
    merged = tl.sum(outs * (share / total)[:, None], 0)
    tl.store(out + row_offsets(row, D) + channel, merged.to(out.dtype.element_ty), mask=channel < D)
    tl.store(lse + row, tl.where(some, (top + tl.log2(total)) * LN2, float("-inf")))


def decode(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, block_indices: Tensor | None, layout: Layout, *,
    block_size: int, scale: float, splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out `[T, Hq, D]`, lse fp32 `[T, Hq]`), causal, over pages `[P, Hkv, page, D]`; dense without block ids."""
    q, k_pages, v_pages = rows_contiguous(q), rows_contiguous(k_pages), rows_contiguous(v_pages)
    if v_pages.stride() != k_pages.stride():
        k_pages, v_pages = k_pages.contiguous(), v_pages.contiguous()
    queries, heads, dim = q.shape
    kv_heads = k_pages.shape[1]
    group = heads // kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    sparse = block_indices is not None
    keys = min(block_size, 64)
    steps = block_size // keys
    ids = layout.table if block_indices is None else rows_contiguous(block_indices)
    topk = ids.shape[2] if sparse else 1
    most = topk * steps if sparse else max(-(-layout.most_keys // keys), 1)
    wanted = -(-_PROGRAMS // (queries * kv_heads)) if splits is None else splits
    splits = max(1, min(wanted, most, _MOST_SPLITS))
    per_split = -(-most // splits)
    splits = -(-most // per_split)
    part_out, part_lse = out, lse
    if splits > 1:
        part_out = torch.empty(queries, heads, splits, dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(queries, heads, splits, dtype=torch.float32, device=q.device)
    block_d = max(power_of_two(dim), 16)
    tiles = layout.tiles(1)
    _split_kernel[tiles.shape[0], kv_heads, splits](
        q, k_pages, v_pages, ids, layout.table, tiles, part_out=part_out, part_lse=part_lse, stride_q=q.stride(0),
        stride_q_head=q.stride(1), stride_blocks=ids.stride(0), stride_blocks_head=ids.stride(1) if sparse else 0,
        scale_log2=scale * LOG2_E, splits=splits, steps_per_split=per_split, COLUMNS=layout.table.shape[1],
        KV_HEADS=kv_heads, GROUP=group, ROWS=max(16, group), D=dim, BLOCK_D=block_d, KEYS=keys, STEPS=steps, TOPK=topk,
        SPARSE=sparse, PRECISION=precision(q.dtype), WHOLE=splits == 1, LN2=LN_2, num_warps=4,
        num_stages=stages(2 * keys * block_d * q.element_size(), 3),
        **Pages(k_pages, page_table, keys).arguments,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[queries * heads,](
            part_out, part_lse, out, lse, splits, D=dim, BLOCK_D=block_d, SPLITS_PADDED=power_of_two(splits),
            LN2=LN_2, num_warps=2,
        )  # fmt: skip
    return out, lse
