"""Block selection: index keys read once for all index heads, block scores at once, then the exact best blocks.

A program scores a run of tokens with all index heads against one block of keys after another and keeps one number a
block: a score table `[blocks, rows]` of bounded size, never `[heads, tokens, keys]`. Rows are (token, head) pairs of
runs of tokens. Then each row's best blocks are taken one by one, which makes the order of ties exact; long rows in
chunks whose winners are merged. The same two passes serve packed prefill, paged prefill and decoding, where the keys
are split over many programs instead of the tokens.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from minim3.kernels.device_plan import DevicePlan
from minim3.kernels.portable.plan import PagedPlan
from minim3.kernels.sequences import Lengths, check_selection
from minim3.kernels.triton.keys import Pages, key_offsets, power_of_two, precision, row_offsets, rows_contiguous, stages
from minim3.kernels.triton.layout import Layout, packed_layout, paged_layout

_TABLE_SCORES = 1 << 27
"""Scores held at once: 512 MiB."""

_PROGRAMS = 1024
"""With fewer runs of tokens than this, keys are split over programs."""

_NONE = 1 << 30
"""A block id that is none: larger than any."""


@triton.jit
def _score_block(
    query, k, start, within, first, num_keys, table_row, page_size, stride_page, stride_token, position, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LSE: tl.constexpr, MASKED: tl.constexpr, PAGED: tl.constexpr,
    ONE_PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores `[rows]` of one block; MASKED where a row may not see all of its keys."""
    channel = tl.arange(0, BLOCK_D)
    offset = key_offsets(
        start, within, first, num_keys - 1, table_row, page_size, stride_page, stride_token, PAGED, ONE_PAGE
    )
    pointers = k + offset[:, None] + channel[None, :]
    if MASKED:
        keys = tl.load(pointers, mask=(start + within < num_keys)[:, None] & (channel < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        keys = tl.load(pointers)
    else:
        keys = tl.load(pointers, mask=(channel < D)[None, :], other=0.0)
    scores = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision=PRECISION)
    if MASKED:
        scores = tl.where((start + within)[None, :] <= position[:, None], scores, float("-inf"))
    if LSE:
        scores *= scale
        top = tl.max(scores, 1)
        finite = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp(scores - finite[:, None]), 1)
        return tl.where(top == float("-inf"), top, finite + tl.log(tl.where(top == float("-inf"), 1.0, total)))
    else:
        return tl.max(scores, 1) * scale


@triton.jit
def _score_kernel(
    q, k, scores, sequences, tiles, page_table, stride_q, stride_q_head, stride_table, page_size, stride_page,
    stride_token, stride_head, scale, num_rows, first_tile, blocks_per_split,
    COLUMNS: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, ENOUGH: tl.constexpr, LSE: tl.constexpr,
    PAGED: tl.constexpr, ONE_PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores `[blocks, num_rows]` of one run of tokens and one part of the keys; ENOUGH blocks or less need none."""
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
            complete = tl.maximum(tl.minimum(high, (lowest + 1) // BLOCK_SIZE), low)
            for block in tl.range(low, complete):
                found = _score_block(
                    query, k, block * BLOCK_SIZE, within, first_key, num_keys, table_row, page_size, stride_page,
                    stride_token, position, scale, D, BLOCK_D, LSE, False, PAGED, ONE_PAGE, PRECISION,
                )  # fmt: skip
                tl.store(target + row_offsets(block, num_rows), found)
            for block in tl.range(complete, high):
                found = _score_block(
                    query, k, block * BLOCK_SIZE, within, first_key, num_keys, table_row, page_size, stride_page,
                    stride_token, position, scale, D, BLOCK_D, LSE, True, PAGED, ONE_PAGE, PRECISION,
                )  # fmt: skip
                tl.store(target + row_offsets(block, num_rows), found)


@triton.jit
def _best(values, ids, TOPK: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, NONE: tl.constexpr):
    """The TOPK largest of `values` `[n, ROWS]`, ties by id: values and ids `[SLOTS, ROWS]`, then -inf and NONE."""
    slot = tl.arange(0, SLOTS)[:, None]
    best_values = tl.full([SLOTS, ROWS], float("-inf"), tl.float32)
    best_ids = tl.full([SLOTS, ROWS], NONE, tl.int32)
    for i in range(TOPK):
        top = tl.max(values, 0)
        chosen = tl.min(tl.where(values == top[None, :], ids, NONE), 0)
        chosen = tl.where(top > float("-inf"), chosen, NONE)
        best_values = tl.where(slot == i, top[None, :], best_values)
        best_ids = tl.where(slot == i, chosen[None, :], best_ids)
        values = tl.where(ids == chosen[None, :], float("-inf"), values)
    return best_values, best_ids


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
def _choose_kernel(
    scores, sequences, tiles, out, part_values, part_ids, num_rows, first_tile, init_blocks, local_blocks,
    COLUMNS: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr, TOPK: tl.constexpr,
    SLOTS: tl.constexpr, NONE: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """The best blocks of a chunk of scores: to `out` if there is but one chunk, else to parts `[chunk, SLOTS, row]`."""
    row, used, packed, head, position = _rows_of(
        tiles, sequences, first_tile, ROWS, TILE_ROWS, HEADS, HEADS_PADDED, TOKENS, COLUMNS
    )
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    current = tl.where(used, position // BLOCK_SIZE, -1)
    if tl.max(current, 0) >= chunk * CHUNK:
        visible = ids[:, None] <= current[None, :]
        forced = (ids < init_blocks)[:, None] | (ids[:, None] > (current - local_blocks)[None, :])
        forced = forced | (current < TOPK)[None, :]
        values = tl.load(
            scores + row_offsets(ids, num_rows)[:, None] + row[None, :], mask=visible & (forced == 0), other=0.0
        )
        values = tl.where(forced, float("inf"), values)
        values = tl.where(visible, values, float("-inf"))
        best_values, best_ids = _best(values, ids[:, None], TOPK, SLOTS, ROWS, NONE)
        if FINAL:
            _store_ascending(out, best_ids, row_offsets(packed * HEADS + head, TOPK), used, TOPK, SLOTS, NONE)
        else:
            slot = chunk * SLOTS + tl.arange(0, SLOTS)
            target = row_offsets(slot, num_rows)[:, None] + row[None, :]
            tl.store(part_values + target, best_values)
            tl.store(part_ids + target, best_ids)


@triton.jit
def _merge_kernel(
    sequences, tiles, out, part_values, part_ids, num_rows, first_tile,
    COLUMNS: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """The best of the best blocks of all chunks."""
    row, used, packed, head, position = _rows_of(
        tiles, sequences, first_tile, ROWS, TILE_ROWS, HEADS, HEADS_PADDED, TOKENS, COLUMNS
    )
    highest = tl.max(tl.where(used, position // BLOCK_SIZE, -1), 0)
    candidate = tl.arange(0, CHUNKS * SLOTS)
    # Chunks that nobody sees were never written.
    written = (candidate // SLOTS * CHUNK <= highest)[:, None] & used[None, :]
    source = row_offsets(candidate, num_rows)[:, None] + row[None, :]
    values = tl.load(part_values + source, mask=written, other=float("-inf"))
    ids = tl.load(part_ids + source, mask=written, other=NONE)
    _, best_ids = _best(values, ids, TOPK, SLOTS, ROWS, NONE)
    _store_ascending(out, best_ids, row_offsets(packed * HEADS + head, TOPK), used, TOPK, SLOTS, NONE)


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
    """The score table of a run of tiles, and how programs are laid over it."""

    def __init__(self, index_q: Tensor, keys: Tensor, page_table: Tensor | None, layout: Layout, block_size: int):
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
        self.chunk = min(power_of_two(self.blocks), _CHUNK)
        self.shape = {
            "COLUMNS": layout.table.shape[1], "HEADS": self.heads, "HEADS_PADDED": self.heads_padded,
            "TOKENS": self.tokens, "BLOCK_SIZE": block_size,
        }  # fmt: skip

    def parts(self) -> list[tuple[int, int]]:
        """(first tile, tiles) of what is scored at once."""
        count = self.tiles.shape[0]
        return [(first, min(self.most_tiles, count - first)) for first in range(0, count, self.most_tiles)]

    def score(self, first: int, count: int, scale: float, enough: int, lse: bool) -> Tensor:
        scores = torch.empty(self.blocks, count * self.rows, dtype=torch.float32, device=self.q.device)
        splits = min(-(-_PROGRAMS // count), self.blocks)
        blocks_per_split = -(-self.blocks // splits)
        block_d = max(power_of_two(self.dim), 16)
        _score_kernel[count, -(-self.blocks // blocks_per_split)](
            self.q, self.keys, scores, self.layout.table, self.tiles, stride_q=self.q.stride(0),
            stride_q_head=self.q.stride(1), scale=scale, num_rows=scores.shape[1], first_tile=first,
            blocks_per_split=blocks_per_split, ROWS=self.rows, D=self.dim, BLOCK_D=block_d,
            ENOUGH=enough, LSE=lse, PRECISION=precision(self.q.dtype), num_warps=8 if self.rows >= 128 else 4,
            num_stages=stages(self.block_size * block_d * self.q.element_size(), 3), **self.pages.arguments,
            **self.shape,
        )  # fmt: skip
        return scores


_CHUNK = 1024
"""Block scores of a row that are searched at once."""

_CHOOSE_WARPS = 4

_CHOOSE_ROWS = 8
"""Rows searched by one program: 32 bytes of each line of the table."""


def _select(
    index_q: Tensor, keys: Tensor, page_table: Tensor | None, layout: Layout, *, block_size: int, topk_blocks: int,
    init_blocks: int, local_blocks: int, score_type: str, scale: float | None,
) -> Tensor:  # fmt: skip
    check_selection(block_size, topk_blocks, init_blocks, local_blocks, score_type)
    scale = index_q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty(*index_q.shape[:2], topk_blocks, dtype=torch.int32, device=index_q.device)
    if not out.numel():
        return out
    table = _Table(index_q, keys, page_table, layout, block_size)
    slots = power_of_two(topk_blocks)
    chunks = -(-table.blocks // table.chunk)
    for first, count in table.parts():
        scores = table.score(first, count, scale, topk_blocks, score_type == "lse")
        num_rows = scores.shape[1]
        run = {
            "num_rows": num_rows, "first_tile": first, "TILE_ROWS": table.rows, "ROWS": _CHOOSE_ROWS,
            "CHUNK": table.chunk, "TOPK": topk_blocks, "SLOTS": slots, "NONE": _NONE, **table.shape,
        }  # fmt: skip
        values = ids = scores
        if chunks > 1:
            values = torch.empty(chunks * slots, num_rows, dtype=torch.float32, device=out.device)
            ids = torch.empty(chunks * slots, num_rows, dtype=torch.int32, device=out.device)
        _choose_kernel[num_rows // _CHOOSE_ROWS, chunks](
            scores, layout.table, table.tiles, out, values, ids, init_blocks=init_blocks, local_blocks=local_blocks,
            FINAL=chunks == 1, num_warps=_CHOOSE_WARPS, **run,
        )  # fmt: skip
        if chunks > 1:
            _merge_kernel[num_rows // _CHOOSE_ROWS,](
                layout.table, table.tiles, out, values, ids, CHUNKS=power_of_two(chunks), num_warps=_CHOOSE_WARPS, **run
            )
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
        scores = table.score(first, count, scale, 0, True)
        _row_lse_kernel[scores.shape[1] // _CHOOSE_ROWS,](
            scores, layout.table, table.tiles, out, num_rows=scores.shape[1], first_tile=first, TILE_ROWS=table.rows,
            ROWS=_CHOOSE_ROWS, CHUNK=table.chunk, **table.shape,
        )  # fmt: skip
    return out
