"""Unions of the blocks that a few adjacent tokens chose, with a bit a token: what sparse tiles walk along."""

# mypy: allow-untyped-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minim3.kernels.triton.keys import power_of_two, row_offsets
from minim3.kernels.triton.layout import Layout

MOST_CANDIDATES = 256
"""Ids of a tile that are compared with each other."""


class Union(NamedTuple):
    """ids, members: int32 `[tiles, Hkv, candidates]`, ascending blocks and a bit for each token of the tile that chose
    them; counts: int32 `[tiles, Hkv, 3]`, how many blocks all tokens see whole (they come first), how many there are in
    all, and how many the tokens chose, each for itself."""

    ids: Tensor
    members: Tensor
    counts: Tensor


@triton.jit
def _union_kernel(
    blocks, sequences, tiles, ids_out, members_out, counts_out, stride_token, stride_head,
    COLUMNS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.load(tiles + 2 * tile)
    if sequence >= 0:
        start = tl.load(tiles + 2 * tile + 1)
        record = sequences + sequence.to(tl.int64) * COLUMNS
        num_queries = tl.load(record + 1).to(tl.int32)
        lowest = tl.load(record + 4).to(tl.int32) + start
        place = tl.arange(0, TOKENS * SLOTS)
        token = place // SLOTS
        slot = place % SLOTS
        used = (slot < TOPK) & (start + token < num_queries)
        packed = tl.load(record) + start + token
        id = tl.load(blocks + row_offsets(packed, stride_token) + head * stride_head + slot, mask=used, other=-1)
        # A block past a token's own holds nothing it may see.
        used = used & (id >= 0) & (id * BLOCK_SIZE <= lowest + token)
        id = tl.where(used, id, NONE)
        same = id[:, None] == id[None, :]
        earlier = same & (place[None, :] < place[:, None])
        first = ((tl.sum(earlier.to(tl.int32), 1) == 0) & used).to(tl.int32)
        members = tl.sum(tl.where(same, (1 << token)[None, :], 0), 1)
        rank = tl.sum(tl.where(id[None, :] < id[:, None], first[None, :], 0), 1)
        base = row_offsets(tile * HEADS + head, TOKENS * SLOTS)
        tl.store(ids_out + base + rank, id, mask=first > 0)
        tl.store(members_out + base + rank, members, mask=first > 0)
        complete = tl.sum(tl.where((id + 1) * BLOCK_SIZE - 1 <= lowest, first, 0), 0)
        counts = counts_out + row_offsets(tile * HEADS + head, 3)
        tl.store(counts, complete)
        tl.store(counts + 1, tl.sum(first, 0))
        tl.store(counts + 2, tl.sum(used.to(tl.int32), 0))


def make_union(block_indices: Tensor, layout: Layout, tokens: int, block_size: int) -> Union:
    """Of tiles of `tokens` (a power of two) tokens; `block_indices` int32 `[T, Hkv, K]`, distinct ids in any order."""
    tiles = layout.tiles(tokens)
    heads, topk = block_indices.shape[1:]
    if block_indices.stride(-1) != 1:
        block_indices = block_indices.contiguous()
    slots = power_of_two(topk)
    ids = torch.empty(tiles.shape[0], heads, tokens * slots, dtype=torch.int32, device=block_indices.device)
    members, counts = torch.empty_like(ids), ids.new_empty(tiles.shape[0], heads, 3)
    _union_kernel[tiles.shape[0], heads](
        block_indices, layout.table, tiles, ids, members, counts, block_indices.stride(0), block_indices.stride(1),
        COLUMNS=layout.table.shape[1], HEADS=heads, TOKENS=tokens, TOPK=topk, SLOTS=slots, BLOCK_SIZE=block_size,
        NONE=1 << 24, num_warps=8 if tokens * slots > 64 else 4,
    )  # fmt: skip
    return Union(ids, members, counts)


def most_tokens(topk: int) -> int:
    """Tokens of a tile at most."""
    return max(1, min(MOST_CANDIDATES // power_of_two(topk), 32))
