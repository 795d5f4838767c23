"""Block selection: index keys read once for all index heads, block scores at once, then the exact best blocks.

A program scores a run of tokens with all index heads against one block of keys after another and keeps one number a
block: a score table `[blocks, rows]` of bounded size, never `[heads, tokens, keys]`. Rows are (token, head) pairs of
runs of tokens. Beside it stands the best score of each group of adjacent blocks. The K best blocks of a row lie in its
K best groups (were one elsewhere, the best of each of these K groups would come before it), so first groups are chosen,
then blocks among those of these groups: one by one, which makes the order of ties exact. The same two passes serve
packed prefill, paged prefill and decoding, where the keys are split over many programs instead of the tokens.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from minim3.kernels.device_plan import DevicePlan
from minim3.kernels.portable.plan import PagedPlan
from minim3.kernels.sequences import Lengths, check_selection
from minim3.kernels.triton.keys import (
    LOG2_E,
    Pages,
    key_offsets,
    power_of_two,
    precision,
    row_offsets,
    rows_contiguous,
    stages,
)
from minim3.kernels.triton.layout import Layout, packed_layout, paged_layout

_TABLE_SCORES = 1 << 27
"""Scores held at once: 512 MiB."""

_PROGRAMS = 1024
"""With fewer runs of tokens than this, keys are split over programs."""

_NONE = 1 << 30
"""A block id that is none: larger than any."""

_FEW_ROWS = 2048
"""Up to so many rows of scores (decoding) each gets a program of one warp; of more, each program takes several."""

_CHOOSE_ROWS = 8
"""Rows searched by one program where there are many: 32 bytes of each line of the table."""

_CHOOSE_WARPS: int | None = None
"""Warps of such a program; None: by how many scores it searches."""

_SEARCHED = 8192
"""Scores that a program of several rows holds at most."""

_GROUP: int | None = None
"""Blocks of a group, a power of two; None: by how many there are."""


@triton.jit
def _score_block(
    query, k, start, within, first, num_keys, table_row, stride_page, stride_token, position, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LSE: tl.constexpr, MASKED: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PAGED: tl.constexpr, ONE_PAGE: tl.constexpr, PRECISION: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """Scores `[rows]` of one block; MASKED where a row may not see all of its keys."""
    channel = tl.arange(0, BLOCK_D)
    place, offset = key_offsets(
        start, within, first, num_keys - 1, table_row, stride_page, stride_token, PAGE_SIZE, PAGED, ONE_PAGE
    )
    pointers = k + place + offset[:, None] + channel[None, :]
    if MASKED:
        keys = tl.load(pointers, mask=(start + within < num_keys)[:, None] & (channel < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        keys = tl.load(pointers)
    else:
        keys = tl.load(pointers, mask=(channel < D)[None, :], other=0.0)
    scores = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision=PRECISION)
    if MASKED:
        scores = tl.where((start + within)[None, :] <= position[:, None], scores, float("-inf"))
    top = tl.max(scores, 1)
    if LSE:
        scale_log2 = scale * LOG2E
        none = top == float("-inf")
        finite = tl.where(none, 0.0, top * scale_log2)
        total = tl.sum(tl.exp2(scores * scale_log2 - finite[:, None]), 1)
        return tl.where(none, top, (finite + tl.log2(tl.where(none, 1.0, total))) / LOG2E)
    else:
        return top * scale


@triton.jit
def _score_kernel(
    q, k, scores, group_scores, sequences, tiles, page_table, stride_q, stride_q_head, stride_table,
    stride_page, stride_token, stride_head, scale, num_rows, first_tile, blocks_per_split,
    COLUMNS: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, ENOUGH: tl.constexpr,
    LSE: tl.constexpr, PAGE_SIZE: tl.constexpr, PAGED: tl.constexpr, ONE_PAGE: tl.constexpr, PRECISION: tl.constexpr,
    LOG2E: tl.constexpr,
):  # fmt: skip
    """scores `[blocks, num_rows]` of one run of tokens and one part of the keys; ENOUGH blocks or less need none.

    group_scores `[groups, num_rows]`: the best of each GROUP blocks; a part begins with a group.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.load(tiles + 2 * (first_tile + tile))
    if sequence >= 0:
        start = tl.load(tiles + 2 * (first_tile + tile) + 1)
        record = sequences + sequence.to(tl.int64) * COLUMNS
        first_query = tl.load(record)
        num_queries = tl.load(record + 1).to(tl.int32)
        first_key = tl.load(record + 2)
        num_keys = tl.load(record + 3).to(tl.int32)
        lowest = tl.load(record + 4).to(tl.int32) + start
        highest = lowest + tl.minimum(TOKENS, num_queries - start) - 1
        blocks = highest // BLOCK_SIZE + 1
        low = split * blocks_per_split
        high = tl.minimum(low + blocks_per_split, blocks)
        if (blocks > ENOUGH) & (low < high):
            row = tl.arange(0, ROWS)
            token = row // HEADS_PADDED
            head = row % HEADS_PADDED
            channel = tl.arange(0, BLOCK_D)
            used = (head < HEADS) & (token < TOKENS) & (start + token < num_queries)
            query = tl.load(
                q + row_offsets(first_query + start + token, stride_q)[:, None] + (head * stride_q_head)[:, None]
                + channel[None, :],
                mask=used[:, None] & (channel < D)[None, :], other=0.0,
            )  # fmt: skip
            position = lowest + token
            within = tl.arange(0, BLOCK_SIZE)
            table_row = page_table + sequence.to(tl.int64) * stride_table
            target = scores + tile * ROWS + row
            target_of_groups = group_scores + tile * ROWS + row
            best = tl.full([ROWS], float("-inf"), tl.float32)
            complete = tl.maximum(tl.minimum(high, (lowest + 1) // BLOCK_SIZE), low)
            for block in tl.range(low, complete):
                found = _score_block(
                    query, k, block * BLOCK_SIZE, within, first_key, num_keys, table_row, stride_page,
                    stride_token, position, scale, D, BLOCK_D, LSE, False, PAGE_SIZE, PAGED, ONE_PAGE, PRECISION, LOG2E,
                )  # fmt: skip
                tl.store(target + row_offsets(block, num_rows), found)
                if GROUP > 1:
                    best = tl.where(block % GROUP == 0, found, tl.maximum(best, found))
                    tl.store(target_of_groups + row_offsets(block // GROUP, num_rows), best)
            for block in tl.range(complete, high):
                found = _score_block(
                    query, k, block * BLOCK_SIZE, within, first_key, num_keys, table_row, stride_page,
                    stride_token, position, scale, D, BLOCK_D, LSE, True, PAGE_SIZE, PAGED, ONE_PAGE, PRECISION, LOG2E,
                )  # fmt: skip
                tl.store(target + row_offsets(block, num_rows), found)
                if GROUP > 1:
                    best = tl.where(block % GROUP == 0, found, tl.maximum(best, found))
                    tl.store(target_of_groups + row_offsets(block // GROUP, num_rows), best)


@triton.jit
def _best(values, ids, TOPK: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, NONE: tl.constexpr):
    """The ids of the TOPK largest of `values` `[n, ROWS]`, ties by id: `[SLOTS, ROWS]`, then NONE."""
    slot = tl.arange(0, SLOTS)[:, None]
    best_ids = tl.full([SLOTS, ROWS], NONE, tl.int32)
    for i in range(TOPK):
        top = tl.max(values, 0)
        chosen = tl.min(tl.where(values == top[None, :], ids, NONE), 0)
        chosen = tl.where(top > float("-inf"), chosen, NONE)
        best_ids = tl.where(slot == i, chosen[None, :], best_ids)
        values = tl.where(ids == chosen[None, :], float("-inf"), values)
    return best_ids


@triton.jit
def _store_ascending(
    out, ids, row_offset, used, TOPK: tl.constexpr, SLOTS: tl.constexpr, NONE: tl.constexpr
):  # fmt: skip
    """Write ids `[SLOTS, ROWS]` in ascending order to `out` at `row_offset`, then -1."""
    slot = tl.arange(0, SLOTS)
    keys = tl.where(ids == NONE, NONE + slot[:, None], ids)
    rank = tl.sum((keys[None, :, :] < keys[:, None, :]).to(tl.int32), 1)
    tl.store(out + row_offset[None, :] + rank, tl.where(ids == NONE, -1, ids), mask=used[None, :] & (rank < TOPK))


@triton.jit
def _rows_of(
    tiles, sequences, first_tile, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(row of the table, used, packed token, head, position) of this program's rows, all of one run of tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = first_tile + tl.program_id(0) * ROWS // TILE_ROWS
    token = row % TILE_ROWS // HEADS_PADDED
    head = row % HEADS_PADDED
    sequence = tl.load(tiles + 2 * tile)
    start = tl.load(tiles + 2 * tile + 1)
    record = sequences + tl.maximum(sequence, 0).to(tl.int64) * COLUMNS
    num_queries = tl.load(record + 1).to(tl.int32)
    used = (sequence >= 0) & (head < HEADS) & (token < TOKENS) & (start + token < num_queries)
    packed = tl.load(record) + start + token
    position = tl.load(record + 4).to(tl.int32) + start + token
    return row, used, packed, head, position


@triton.jit
def _chosen(
    scores, ids, row, current, num_rows, init_blocks, local_blocks, BLOCKS: tl.constexpr, TOPK: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """The TOPK best `[SLOTS, ROWS]` of `ids`, `[n, ROWS]` or `[n, 1]`, each of BLOCKS blocks."""
    first = ids * BLOCKS
    visible = first <= current[None, :]
    last = tl.minimum(first + BLOCKS - 1, current[None, :])
    forced = (first < init_blocks) | (last > (current - local_blocks)[None, :]) | (current < TOPK)[None, :]
    source = scores + row_offsets(ids, num_rows) + row[None, :]
    values = tl.load(source, mask=visible & (forced == 0), other=0.0)
    values = tl.where(forced, float("inf"), values)
    return _best(tl.where(visible, values, float("-inf")), ids, TOPK, SLOTS, ROWS, NONE)


@triton.jit
def _choose_kernel(
    scores, group_scores, sequences, tiles, out, num_rows, first_tile, init_blocks, local_blocks,
    COLUMNS: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """The best of at most GROUPS groups, then the best blocks of these."""
    row, used, packed, head, position = _rows_of(
        tiles, sequences, first_tile, ROWS, TILE_ROWS, HEADS, HEADS_PADDED, TOKENS, COLUMNS
    )
    current = tl.where(used, position // BLOCK_SIZE, -1)
    if tl.max(current, 0) >= 0:
        ids = _chosen(
            group_scores, tl.arange(0, GROUPS)[:, None], row, current, num_rows, init_blocks, local_blocks, GROUP, TOPK,
            SLOTS, ROWS, NONE,
        )  # fmt: skip
        if GROUP > 1:
            blocks = tl.where(ids == NONE, NONE, ids * GROUP)[:, None, :] + tl.arange(0, GROUP)[None, :, None]
            blocks = tl.reshape(blocks, [SLOTS * GROUP, ROWS])
            ids = _chosen(
                scores, blocks, row, current, num_rows, init_blocks, local_blocks, 1, TOPK, SLOTS, ROWS, NONE
            )
        _store_ascending(out, ids, row_offsets(packed * HEADS + head, TOPK), used, TOPK, SLOTS, NONE)


@triton.jit
def _row_lse_kernel(
    scores, sequences, tiles, out, num_rows, first_tile,
    COLUMNS: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp `[tokens, HEADS]` of all keys a row sees, from those of its blocks."""
    row, used, packed, head, position = _rows_of(
        tiles, sequences, first_tile, ROWS, TILE_ROWS, HEADS, HEADS_PADDED, TOKENS, COLUMNS
    )
    current = tl.where(used, position // BLOCK_SIZE, -1)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, tl.max(current, 0) + 1, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        visible = ids[:, None] <= current[None, :]
        values = tl.load(
            scores + row_offsets(ids, num_rows)[:, None] + row[None, :], mask=visible, other=float("-inf")
        )
        higher = tl.maximum(top, tl.max(values, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(values - finite[None, :]), 0)
        top = higher
    tl.store(out + packed * HEADS + head, top + tl.log(total), mask=used)


class _Table:
    """The score table of a run of tiles and that of groups of blocks, and how programs are laid over them."""

    def __init__(
        self, index_q: Tensor, keys: Tensor, page_table: Tensor | None, layout: Layout, block_size: int, topk: int = 0
    ) -> None:
        self.q, self.keys, self.layout = rows_contiguous(index_q.detach()), rows_contiguous(keys.detach()), layout
        self.heads, self.dim = index_q.shape[1:]
        self.heads_padded = power_of_two(self.heads)
        tokens_each = -(-index_q.shape[0] // max(layout.table.shape[0], 1))
        # Few queries a sequence: as few rows as a product takes. Many: 128 rows, so that keys are read seldom.
        wanted = tokens_each * self.heads_padded
        rows = 16 if wanted <= 16 else 64 if wanted <= 64 or index_q.dtype == torch.float32 else 128
        self.tokens = max(rows // self.heads_padded, 1)
        self.rows = max(self.tokens * self.heads_padded, 16)
        self.block_size = block_size
        self.blocks = max(layout.blocks(block_size), 1)
        self.tiles = layout.tiles(self.tokens)
        self.pages = Pages(self.keys, page_table, block_size)
        self.most_tiles = max(_TABLE_SCORES // (self.blocks * self.rows), 1)
        # Searching n / group groups, then topk * group blocks, costs least where both are equal.
        each = self.blocks // topk if topk else 1
        self.group = _GROUP or 1 << (max(each, 1).bit_length() - 1) // 2
        self.groups = -(-self.blocks // self.group)
        self.shape = {
            "COLUMNS": layout.table.shape[1], "HEADS": self.heads, "HEADS_PADDED": self.heads_padded,
            "TOKENS": self.tokens, "BLOCK_SIZE": block_size,
        }  # fmt: skip

    def parts(self) -> list[tuple[int, int]]:
        """(first tile, tiles) of what is scored at once."""
        count = self.tiles.shape[0]
        return [(first, min(self.most_tiles, count - first)) for first in range(0, count, self.most_tiles)]

    def score(self, first: int, count: int, scale: float, enough: int, lse: bool) -> tuple[Tensor, Tensor]:
        """Scores `[blocks, rows]` and `[groups, rows]`."""
        scores = torch.empty(self.blocks, count * self.rows, dtype=torch.float32, device=self.q.device)
        of_groups = scores
        if self.group > 1:
            of_groups = torch.empty(self.groups, scores.shape[1], dtype=torch.float32, device=self.q.device)
        splits = min(-(-_PROGRAMS // count), self.groups)
        blocks_per_split = -(-self.groups // splits) * self.group
        block_d = max(power_of_two(self.dim), 16)
        _score_kernel[count, -(-self.blocks // blocks_per_split)](
            self.q, self.keys, scores, of_groups, self.layout.table, self.tiles, stride_q=self.q.stride(0),
            stride_q_head=self.q.stride(1), scale=scale, num_rows=scores.shape[1], first_tile=first,
            blocks_per_split=blocks_per_split, ROWS=self.rows, D=self.dim, BLOCK_D=block_d,
            GROUP=self.group, ENOUGH=enough, LSE=lse, PRECISION=precision(self.q.dtype), LOG2E=LOG2_E,
            num_warps=8 if self.rows >= 128 else 4,
            num_stages=stages(self.block_size * block_d * self.q.element_size(), 3), **self.pages.arguments,
            **self.shape,
        )  # fmt: skip
        return scores, of_groups


def _select(
    index_q: Tensor, keys: Tensor, page_table: Tensor | None, layout: Layout, *, block_size: int, topk_blocks: int,
    init_blocks: int, local_blocks: int, score_type: str, scale: float | None,
) -> Tensor:  # fmt: skip
    check_selection(block_size, topk_blocks, init_blocks, local_blocks, score_type)
    scale = index_q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty(*index_q.shape[:2], topk_blocks, dtype=torch.int32, device=index_q.device)
    if not out.numel():
        return out
    table = _Table(index_q, keys, page_table, layout, block_size, topk_blocks)
    slots, groups = power_of_two(topk_blocks), power_of_two(table.groups)
    searched = max(groups, slots * table.group)
    for first, count in table.parts():
        scores, of_groups = table.score(first, count, scale, topk_blocks, score_type == "lse")
        num_rows = scores.shape[1]
        few = num_rows <= _FEW_ROWS
        rows = 1 if few else min(_CHOOSE_ROWS, max(_SEARCHED // searched, 1))
        _choose_kernel[num_rows // rows,](
            scores, of_groups, layout.table, table.tiles, out, num_rows=num_rows, first_tile=first,
            init_blocks=init_blocks, local_blocks=local_blocks, TILE_ROWS=table.rows, ROWS=rows, GROUP=table.group,
            GROUPS=groups, TOPK=topk_blocks, SLOTS=slots, NONE=_NONE,
            num_warps=_CHOOSE_WARPS or (1 if rows * searched <= 512 else 4), **table.shape,
        )  # fmt: skip
    return out


def select_blocks(
    index_q: Tensor, index_k: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *, q_offset: Lengths | None = None,
    block_size: int, topk_blocks: int, init_blocks: int = 0, local_blocks: int = 1, score_type: str = "max",
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """See the reference."""
    layout = packed_layout(cu_seqlens_q, cu_seqlens_k, q_offset, index_q, index_k)
    return _select(
        index_q, index_k, None, layout, block_size=block_size, topk_blocks=topk_blocks, init_blocks=init_blocks,
        local_blocks=local_blocks, score_type=score_type, scale=scale,
    )  # fmt: skip


def select_blocks_paged(
    index_q: Tensor, index_k_pages: Tensor, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, *,
    block_size: int, topk_blocks: int, init_blocks: int = 0, local_blocks: int = 1, score_type: str = "max",
    scale: float | None = None, plan: PagedPlan | DevicePlan | None = None,
) -> Tensor:  # fmt: skip
    """See the reference. Lengths on the device are taken as they are, unread by the host."""
    layout = paged_layout(page_table, lengths_k, cu_seqlens_q, index_k_pages.shape[-2], index_q.shape[0], plan)
    return _select(
        index_q, index_k_pages, page_table, layout, block_size=block_size, topk_blocks=topk_blocks,
        init_blocks=init_blocks, local_blocks=local_blocks, score_type=score_type, scale=scale,
    )  # fmt: skip


def index_log_sum_exp(index_q: Tensor, index_k: Tensor, layout: Layout, block_size: int, scale: float) -> Tensor:
    """Log-sum-exp fp32 `[T, Hi]` of the scores of all visible keys: the student's of a warm-up."""
    out = torch.empty(index_q.shape[:2], dtype=torch.float32, device=index_q.device)
    if not out.numel():
        return out
    table = _Table(index_q, index_k, None, layout, block_size)
    for first, count in table.parts():
        scores, _ = table.score(first, count, scale, 0, True)
        _row_lse_kernel[scores.shape[1] // _CHOOSE_ROWS,](
            scores, layout.table, table.tiles, out, num_rows=scores.shape[1], first_tile=first, TILE_ROWS=table.rows,
            ROWS=_CHOOSE_ROWS, CHUNK=min(power_of_two(table.blocks), 256), **table.shape,
        )  # fmt: skip
    return out
