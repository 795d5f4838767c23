"""Block selection: one product for all index heads per tile, the maximum of each block at once, then the best blocks.

Only blocks before a query's own are scored (the own block is forced, unless `local_blocks` is 0), so no score needs a
causal mask, and queries in the first `topk_blocks` blocks need no score at all. Shapes as in the reference.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from minim3.kernels.portable.threads import room, run_all
from minim3.kernels.sequences import (
    Lengths,
    Span,
    at_least_fp32,
    check_selection,
    query_positions,
    sequence_spans,
)

_TILE_ROWS = 1024
"""Rows (queries times index heads) of a tile of scores."""

_TILE_SCORES = 1 << 18
"""Scores of a tile: 1 MiB in fp32, which a core's own cache holds until the maximum is taken."""


class Maxima(Protocol):
    """Another way to the largest products of fp32 rows and the keys of each block; made once a sequence."""

    def __init__(self, keys: Tensor, block_size: int) -> None: ...

    @staticmethod
    def takes(block_size: int) -> bool: ...

    def into(self, rows: Tensor, blocks: int, scores: Tensor) -> None: ...


def select_blocks(
    index_q: Tensor, index_k: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *, q_offset: Lengths | None = None,
    block_size: int, topk_blocks: int, init_blocks: int = 0, local_blocks: int = 1, score_type: str = "max",
    scale: float | None = None, maxima: type[Maxima] | None = None,
) -> Tensor:  # fmt: skip
    """See the reference. `maxima` takes the place of products of torch where it has a form."""
    check_selection(block_size, topk_blocks, init_blocks, local_blocks, score_type)
    scale = index_q.shape[-1] ** -0.5 if scale is None else scale
    spans = sequence_spans(
        cu_seqlens_q, cu_seqlens_k, q_offset, num_queries=index_q.shape[0], num_keys=index_k.shape[0]
    )
    current = query_positions(spans, index_q.device) // block_size
    out = all_blocks(current, index_q.shape[1], topk_blocks)
    dtype = at_least_fp32(index_q.dtype)
    pieces: list[Callable[[], None]] = []
    has_form = dtype == torch.float32 and index_q.device.type == "cpu" and local_blocks and score_type == "max"
    own = maxima if has_form and maxima is not None and maxima.takes(block_size) else None

    def choose(queries: Tensor, keys: Tensor, found: Maxima | None, tile: Span) -> None:
        rows = slice(tile.q_start, tile.q_stop)
        queries = queries.detach().to(dtype)
        if found is None:
            scores = _block_scores(queries, keys, tile, block_size, local_blocks, score_type, scale)
        else:
            num_blocks = (tile.offset + tile.num_queries - 1) // block_size + 1
            scores = queries.new_full((*queries.shape[:2], num_blocks), float("-inf"))
            found.into(queries.flatten(0, 1), num_blocks - 1, scores.flatten(0, 1))
            scores *= scale
        out[rows] = best_blocks(scores, current[rows], topk_blocks, init_blocks, local_blocks)

    for span in spans:
        first = max(topk_blocks * block_size - span.offset, 0)  # the first query with more blocks than the budget
        if first >= span.num_queries:
            continue
        keys = index_k[span.k_start : span.k_stop].detach().to(dtype)
        found = None if own is None else own(keys, block_size)
        step = max(1, _TILE_ROWS // index_q.shape[1])
        for start in range(first, span.num_queries, step):
            count = min(step, span.num_queries - start)
            tile = Span(span.q_start + start, count, span.k_start, span.num_keys, span.offset + start)
            pieces.append(partial(choose, index_q[tile.q_start : tile.q_stop], keys, found, tile))
    run_all(pieces, index_q.device)
    return out


def all_blocks(current: Tensor, heads: int, topk_blocks: int) -> Tensor:
    """The choice where the budget covers every block: `current` block `[T]` -> int32 `[T, heads, topk_blocks]`."""
    ids = torch.arange(topk_blocks, dtype=torch.int32, device=current.device)
    ids = torch.where(ids <= current[:, None], ids, -1)
    return ids[:, None].expand(-1, heads, -1).contiguous()


def _block_scores(
    queries: Tensor, keys: Tensor, tile: Span, block_size: int, local_blocks: int, score_type: str, scale: float
) -> Tensor:  # fmt: skip
    """`[R, Hi, Di]` x `[S, Di]` -> block scores `[R, Hi, B]` for the B blocks up to the last query's own.

    Scores of a query's own and later blocks are only filled in where `local_blocks` is 0.
    """
    last = tile.offset + tile.num_queries - 1
    num_blocks = last // block_size + 1
    # With a forced own block the last column is never read.
    scored_keys = (num_blocks - 1) * block_size if local_blocks else last + 1
    rows = queries.flatten(0, 1)
    scores = queries.new_full((rows.shape[0], num_blocks), float("-inf"))
    step = max(1, _TILE_SCORES // (rows.shape[0] * block_size))
    buffer = room("index scores", min(step, num_blocks) * rows.shape[0] * block_size, queries)
    for block in range(0, num_blocks, step):
        key_start, key_stop = block * block_size, min((block + step) * block_size, scored_keys)
        if key_start >= key_stop:
            break
        blocks = -(-(key_stop - key_start) // block_size)
        part = buffer[: rows.shape[0] * blocks * block_size].view(rows.shape[0], blocks * block_size)
        torch.mm(rows, keys[key_start:key_stop].t(), out=part[:, : key_stop - key_start])
        if not local_blocks:
            key = torch.arange(key_start, key_start + part.shape[1], device=rows.device)
            position = torch.arange(tile.num_queries, device=rows.device) + tile.offset
            part.view(tile.num_queries, -1, part.shape[1]).masked_fill_(
                (key > position[:, None])[:, None], float("-inf")
            )
        part = part.view(rows.shape[0], blocks, block_size)
        if score_type == "max":
            torch.amax(part, dim=-1, out=scores[:, block : block + blocks])
        else:
            scores[:, block : block + blocks] = part.mul_(scale).logsumexp(-1)
    if score_type == "max":
        scores *= scale
    return scores.view(*queries.shape[:2], num_blocks)


def best_blocks(scores: Tensor, current: Tensor, topk_blocks: int, init_blocks: int, local_blocks: int) -> Tensor:
    """The budget's best blocks by score, ties to the lower id: `[R, Hi, B]` -> int32 `[R, Hi, topk_blocks]`, ascending.

    Forced blocks and those after the `current` one `[R]` may hold any score, NaN included.
    """
    num_blocks = scores.shape[-1]
    current = current[:, None, None]
    block = torch.arange(num_blocks, device=scores.device)
    forced = block > current - local_blocks
    if init_blocks:
        forced = forced | (block < init_blocks)
    scores = scores.masked_fill(forced, float("inf")).masked_fill_(block > current, float("-inf"))
    if num_blocks <= topk_blocks:
        return all_blocks(current[:, 0, 0], scores.shape[1], topk_blocks)
    threshold = scores.topk(topk_blocks, dim=-1).values[..., -1:]
    chosen = scores >= threshold
    if int(chosen.sum()) != chosen.shape[0] * chosen.shape[1] * topk_blocks:
        # Some row has a tie at the threshold: topk promises no order among equals, a stable sort does.
        tied = chosen.sum(-1) != topk_blocks
        best = torch.sort(scores[tied], dim=-1, descending=True, stable=True).indices[:, :topk_blocks]
        chosen[tied] = torch.zeros_like(scores[tied], dtype=torch.bool).scatter_(-1, best, True)
    ids = chosen.nonzero()[:, 2].view(*scores.shape[:2], topk_blocks)
    # A row with fewer blocks than the budget was filled up with blocks after its own: cut them off.
    return torch.where(ids <= current, ids, -1).int()
