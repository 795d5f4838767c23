"""Figures of a whole layer: how its index heads selected, and how evenly its experts were loaded.

Shape legend: Q positions of one sequence, H index heads, B blocks of it, K selected or routed.
"""

import torch
from torch import Tensor

from minim3.inspection.data import ExpertLoad, SelectionStatistics

_ADJACENT = 8


def selection_statistics(
    block_indices: Tensor, block_size: int, topk_blocks: int, init_blocks: int, local_blocks: int
) -> SelectionStatistics:
    """`block_indices` int32 `[Q, H, K]`, -1 = none, of the positions 0..Q-1 of one sequence."""
    num_queries, num_heads, _ = block_indices.shape
    own = torch.arange(num_queries) // block_size
    num_blocks = int(own[-1]) + 1
    chosen = torch.zeros(num_queries, num_heads, num_blocks + 1, dtype=torch.bool)
    ids = block_indices.long()
    chosen.scatter_(-1, torch.where(ids < 0, num_blocks, ids), True)
    chosen_QHB = chosen[..., :num_blocks]

    block = torch.arange(num_blocks)
    visible_QB = block <= own[:, None]
    choosing = own + 1 > topk_blocks
    counted = choosing if bool(choosing.any()) else torch.ones_like(choosing)
    counted_QHB = chosen_QHB[counted]
    num_selected = max(1, int(counted_QHB.sum()))
    init_QB = (block < init_blocks) & visible_QB
    local_QB = (block > own[:, None] - local_blocks) & visible_QB

    num_bins = _bin(num_blocks - 1) + 1
    bins = torch.tensor([_bin(distance) for distance in range(num_blocks)])
    distance_QB = (own[:, None] - block).clamp(min=0)[counted]
    selected_B = torch.zeros(num_blocks, dtype=torch.int64)
    selected_B.index_add_(0, distance_QB.flatten(), counted_QHB.sum(1).flatten())
    available_B = torch.zeros(num_blocks, dtype=torch.int64)
    available_B.index_add_(0, distance_QB.flatten(), num_heads * visible_QB[counted].long().flatten())

    # Those that are counted are the last ones of the sequence, hence adjacent.
    new = (counted_QHB[1:] & ~counted_QHB[:-1]).sum(-1).float()
    groups = counted_QHB.shape[0] // _ADJACENT
    together = counted_QHB[: groups * _ADJACENT].unflatten(0, (groups, _ADJACENT)).any(1) if groups else None
    return SelectionStatistics(
        num_queries=num_queries * num_heads,
        num_choosing=int(choosing.sum()) * num_heads,
        mean_selected=round(float(counted_QHB.sum(-1).float().mean()), 3),
        share_init=round(int((counted_QHB & init_QB[counted][:, None]).sum()) / num_selected, 4),
        share_local=round(int((counted_QHB & local_QB[counted][:, None]).sum()) / num_selected, 4),
        selected_at=_in_bins(selected_B, bins, num_bins),
        available_at=_in_bins(available_B, bins, num_bins),
        new_blocks=round(float(new.mean()), 3) if new.numel() else 0.0,
        distinct_of_8=None if together is None else round(float(together.sum(-1).float().mean()), 3),
        head_overlap=_head_overlap(counted_QHB),
    )


def expert_load(expert_ids: Tensor, num_prompt_queries: int, num_experts: int) -> ExpertLoad:
    """`expert_ids` int64 `[Q, K]`, of which the first `num_prompt_queries` positions only fill the cache."""
    prompt, answer = (
        torch.bincount(part.flatten(), minlength=num_experts)
        for part in (expert_ids[:num_prompt_queries], expert_ids[num_prompt_queries:])
    )
    share = (prompt + answer).double() / max(1, expert_ids.numel())
    entropy = float(-torch.special.xlogy(share, share).sum()) / max(1e-9, float(torch.tensor(num_experts).log()))
    return ExpertLoad(
        tuple(prompt.tolist()), tuple(answer.tolist()), round(float(share.max()) * num_experts, 3), round(entropy, 4)
    )


def _bin(distance: int) -> int:
    """0, 1, 2, 3-4, 5-8, 9-16, ... blocks back: bins 0, 1, 2, 3, 4, 5, ..."""
    return 0 if distance <= 0 else (distance - 1).bit_length() + 1


def _in_bins(counts: Tensor, bins: Tensor, num_bins: int) -> tuple[int, ...]:
    return tuple(torch.zeros(num_bins, dtype=torch.int64).index_add_(0, bins, counts).tolist())


def _head_overlap(chosen_QHB: Tensor) -> float | None:
    num_heads = chosen_QHB.shape[1]
    shares = [
        (chosen_QHB[:, a] & chosen_QHB[:, b]).sum(-1) / (chosen_QHB[:, a] | chosen_QHB[:, b]).sum(-1)
        for a in range(num_heads)
        for b in range(a)
    ]
    return round(float(torch.stack(shares).mean()), 4) if shares else None
