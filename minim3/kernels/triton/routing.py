"""The choice of experts in one launch, and the sorting of few assignments in another: dozens of operators otherwise.

Of few tokens, that is what a step of decoding spends its time on. Inference only: the choice is not differentiable,
and training takes the differentiable weights of the module.
"""

# mypy: allow-untyped-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minim3.kernels.triton.keys import power_of_two, row_offsets
from minim3.kernels.triton.layout import runs

MOST_SORTED = 256
"""Assignments that one program compares with each other."""


@triton.jit
def _route_kernel(
    logits, bias, ids_out, weights_out, factor, EXPERTS: tl.constexpr, PADDED: tl.constexpr, TOP: tl.constexpr,
    SOFTMAX: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """One token: its experts, the best first, and their weights, which add up to the factor."""
    token = tl.program_id(0)
    expert = tl.arange(0, PADDED)
    real = expert < EXPERTS
    value = tl.load(logits + row_offsets(token, EXPERTS) + expert, mask=real, other=float("-inf")).to(tl.float32)
    if SOFTMAX:
        share = tl.exp(value - tl.max(value, 0))
        scores = share / tl.sum(share, 0)
    else:
        scores = 1.0 / (1.0 + tl.exp(-value))
    choice = scores
    if BIASED:
        choice += tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)
    # NaN ranks highest, as in torch, so that it shows.
    choice = tl.where(choice == choice, choice, float("inf"))
    place = tl.full([PADDED], TOP, tl.int32)
    for i in tl.static_range(TOP):
        left = real & (place == TOP)
        top = tl.max(tl.where(left, choice, float("-inf")), 0)
        chosen = tl.min(tl.where(left & (choice == top), expert, PADDED), 0)
        place = tl.where(expert == chosen, i, place)
    picked = place < TOP
    total = tl.sum(tl.where(picked, scores, 0.0), 0)
    target = row_offsets(token, TOP) + place
    tl.store(ids_out + target, expert.to(tl.int64), mask=picked)
    tl.store(weights_out + target, scores / total * factor, mask=picked)


def route(
    logits: Tensor, bias: Tensor | None, *, top_k: int, scoring_func: str, factor: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`MiniMaxM3MoE.route` of fp32 logits `[T, E]`: ids int64 `[T, top_k]`, weights fp32 `[T, top_k]`.

    bias: `[E]`, takes part in the choice alone.
    """
    logits = logits.detach().contiguous()
    tokens, experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        _route_kernel[tokens,](
            logits, logits if bias is None else bias.detach().contiguous(), ids, weights, float(factor),
            EXPERTS=experts, PADDED=power_of_two(experts), TOP=top_k, SOFTMAX=scoring_func != "sigmoid",
            BIASED=bias is not None, num_warps=1,
        )  # fmt: skip
    return ids, weights


class Sorted(NamedTuple):
    """`[R]` assignments sorted by expert, in their order within each: all int64 but for the tiles.

    token: of each sorted row; order: its assignment; inverse: the row of each assignment; starts `[E + 1]`: the first
    row of each expert, and the end; tiles int32 `[., 2]`: (expert, first of its rows) of runs of up to `rows` rows, an
    expert of -1 where unused.
    """

    token: Tensor
    order: Tensor
    inverse: Tensor
    starts: Tensor
    tiles: Tensor
    rows: int


@triton.jit
def _sort_kernel(
    expert_ids, token_of, order, inverse, starts, tiles, count, num_tiles, PADDED: tl.constexpr,
    CHOICES: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, ROWS: tl.constexpr,
    TILES_PADDED: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """All of it in one program: the place of an assignment is the number of those that come before it."""
    place = tl.arange(0, PADDED)
    real = place < count
    id = tl.load(expert_ids + place, mask=real, other=EXPERTS).to(tl.int32)
    expert = tl.arange(0, EXPERTS_PADDED)
    rank = tl.zeros([PADDED], tl.int32)
    first = tl.zeros([EXPERTS_PADDED], tl.int32)
    for start in tl.range(0, count, SOME):
        other_place = start + tl.arange(0, SOME)
        other = tl.load(expert_ids + other_place, mask=other_place < count, other=EXPERTS).to(tl.int32)
        before = other[None, :] < id[:, None]
        before = before | ((other[None, :] == id[:, None]) & (other_place[None, :] < place[:, None]))
        rank += tl.sum(before.to(tl.int32), 1)
        first += tl.sum((other[None, :] < expert[:, None]).to(tl.int32), 1)
    tl.store(inverse + place, rank.to(tl.int64), mask=real)
    tl.store(order + rank, place.to(tl.int64), mask=real)
    tl.store(token_of + rank, (place // CHOICES).to(tl.int64), mask=real)
    tl.store(starts + expert, first.to(tl.int64), mask=expert <= EXPERTS)
    own = tl.zeros([EXPERTS_PADDED], tl.int32)
    for start in tl.range(0, count, SOME):
        other_place = start + tl.arange(0, SOME)
        other = tl.load(expert_ids + other_place, mask=other_place < count, other=EXPERTS).to(tl.int32)
        own += tl.sum((other[None, :] == expert[:, None]).to(tl.int32), 1)
    own = tl.where(expert < EXPERTS, own, 0)  # those past the end of the ids are no assignments
    needed = (own + ROWS - 1) // ROWS
    last = tl.cumsum(needed, 0)
    for i in tl.range(0, tl.max(needed, 0)):
        mask = i < needed
        tl.store(tiles + 2 * (last - needed + i), expert, mask=mask)
        tl.store(tiles + 2 * (last - needed + i) + 1, expert * 0 + i * ROWS, mask=mask)
    tile = tl.arange(0, TILES_PADDED)
    unused = (tile >= tl.sum(needed, 0)) & (tile < num_tiles)
    tl.store(tiles + 2 * tile, tile * 0 - 1, mask=unused)
    tl.store(tiles + 2 * tile + 1, tile * 0, mask=unused)


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> Sorted:
    """Of ids `[T, K]`, at least one; the same for few assignments and many, without a word to the host."""
    count = expert_ids.numel()
    each = -(-count // num_experts)
    rows = 16 if each <= 16 else 64 if each <= 64 else 128
    num_tiles = count // rows + min(num_experts, count)
    return (_sort_few if count <= MOST_SORTED else _sort_many)(expert_ids.contiguous(), num_experts, rows, num_tiles)


def _sort_few(expert_ids: Tensor, num_experts: int, rows: int, num_tiles: int) -> Sorted:
    count, device = expert_ids.numel(), expert_ids.device
    token, order, inverse = torch.empty(3, count, dtype=torch.int64, device=device)
    starts = torch.empty(num_experts + 1, dtype=torch.int64, device=device)
    tiles = torch.empty(num_tiles, 2, dtype=torch.int32, device=device)
    padded = power_of_two(count)
    _sort_kernel[1,](
        expert_ids, token, order, inverse, starts, tiles, count, num_tiles, PADDED=padded, CHOICES=expert_ids.shape[1],
        EXPERTS=num_experts, EXPERTS_PADDED=power_of_two(num_experts + 1), ROWS=rows,
        TILES_PADDED=power_of_two(num_tiles), SOME=min(padded, 16), num_warps=4,
    )  # fmt: skip
    return Sorted(token, order, inverse, starts, tiles, rows)


def _sort_many(expert_ids: Tensor, num_experts: int, rows: int, num_tiles: int) -> Sorted:
    sorted_ids, order = torch.sort(expert_ids.flatten(), stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    bounds = torch.arange(num_experts + 1, device=order.device, dtype=expert_ids.dtype)
    starts = torch.searchsorted(sorted_ids, bounds)
    tiles = runs(starts[1:] - starts[:-1], rows, num_tiles)
    return Sorted(order // expert_ids.shape[1], order, inverse, starts, tiles, rows)
