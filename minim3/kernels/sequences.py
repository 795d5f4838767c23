"""Where each packed sequence lies: the host-side arithmetic every implementation shares.

All offsets are Python integers, so that no product of heads, tokens and blocks can pass 2**31 unnoticed.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Lengths = Tensor | Sequence[int]
"""Cumulative lengths `[N + 1]`, or lengths `[N]`: an integer tensor or plain integers."""


class Span(NamedTuple):
    """One sequence of a packed batch. Its query i stands at position `offset + i` and sees the keys 0..offset + i."""

    q_start: int
    num_queries: int
    k_start: int
    num_keys: int
    offset: int

    @property
    def q_stop(self) -> int:
        return self.q_start + self.num_queries

    @property
    def k_stop(self) -> int:
        return self.k_start + self.num_keys


def as_ints(values: Lengths) -> tuple[int, ...]:
    """Lengths as plain integers (a device tensor is read back once)."""
    return tuple(values.tolist()) if isinstance(values, Tensor) else tuple(values)


def sequence_spans(
    cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, q_offset: Lengths | None, *, num_queries: int, num_keys: int
) -> tuple[Span, ...]:
    """The spans of a packed batch; `q_offset` None aligns the last query of each sequence with its last key.

    Raises `ValueError` where the lengths do not describe the tensors or a query lies beyond the keys.
    """
    offsets = None if q_offset is None else as_ints(q_offset)
    spans = _spans(as_ints(cu_seqlens_q), as_ints(cu_seqlens_k), offsets)
    for name, last, size in (("cu_seqlens_q", spans[-1].q_stop if spans else 0, num_queries),
                             ("cu_seqlens_k", spans[-1].k_stop if spans else 0, num_keys)):  # fmt: skip
        if last != size:
            raise ValueError(f"{name} ends at {last} but the packed tensor holds {size} tokens; they must agree")
    return spans


@lru_cache(maxsize=64)
def _spans(cu_q: tuple[int, ...], cu_k: tuple[int, ...], offsets: tuple[int, ...] | None) -> tuple[Span, ...]:
    if len(cu_q) != len(cu_k):
        raise ValueError(f"cu_seqlens_q has {len(cu_q)} entries and cu_seqlens_k {len(cu_k)}; both need N + 1")
    if not cu_q or cu_q[0] != 0 or cu_k[0] != 0:
        raise ValueError(f"cumulative lengths start with 0; got {cu_q[:1]} and {cu_k[:1]}")
    if offsets is not None and len(offsets) != len(cu_q) - 1:
        raise ValueError(f"q_offset has {len(offsets)} entries for {len(cu_q) - 1} sequences; it needs one each")
    spans = []
    for n in range(len(cu_q) - 1):
        num_queries, num_keys = cu_q[n + 1] - cu_q[n], cu_k[n + 1] - cu_k[n]
        offset = num_keys - num_queries if offsets is None else offsets[n]
        if num_queries < 0 or num_keys < 0:
            raise ValueError(f"cumulative lengths must not decrease; sequence {n} has {num_queries}, {num_keys} tokens")
        if offset < 0 or (num_queries and offset + num_queries > num_keys):
            raise ValueError(
                f"sequence {n}: {num_queries} queries from position {offset} on need {offset + num_queries} keys, "
                f"it has {num_keys}; pass keys for every query position"
            )
        spans.append(Span(cu_q[n], num_queries, cu_k[n], num_keys, offset))
    return tuple(spans)


def query_positions(spans: Sequence[Span], device: torch.device) -> Tensor:
    """Position of every packed query within its own sequence: int64 `[T]`."""
    return _query_positions(tuple((s.num_queries, s.offset) for s in spans), str(device))


@lru_cache(maxsize=16)
def _query_positions(lengths_offsets: tuple[tuple[int, int], ...], device: str) -> Tensor:
    if not lengths_offsets:
        return torch.empty(0, dtype=torch.int64, device=device)
    with torch.inference_mode(False):  # kept and reused: an inference tensor could not take part in a backward pass
        return torch.cat([torch.arange(offset, offset + n) for n, offset in lengths_offsets]).to(device)


def check_selection(block_size: int, topk_blocks: int, init_blocks: int, local_blocks: int, score_type: str) -> None:
    """Raise `ValueError` for a selection that cannot be honoured."""
    if block_size < 1 or topk_blocks < 1 or init_blocks < 0 or local_blocks < 0:
        raise ValueError(
            f"block_size={block_size} and topk_blocks={topk_blocks} must be positive, init_blocks={init_blocks} and "
            f"local_blocks={local_blocks} not negative"
        )
    if init_blocks + local_blocks > topk_blocks:
        raise ValueError(
            f"init_blocks={init_blocks} and local_blocks={local_blocks} are forced and count in the budget: "
            f"topk_blocks={topk_blocks} must be at least {init_blocks + local_blocks}"
        )
    if score_type not in ("max", "lse"):
        raise ValueError(f"score_type={score_type!r} is unknown; use 'max' or 'lse'")


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype computed in: fp32, or fp64 for fp64 input (finite differences)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_rows(positions: Tensor, page_table_row: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """(physical page, offset in it) of logical `positions` of one sequence; int64 throughout."""
    positions = positions.long()
    return page_table_row.long()[positions // page_size], positions % page_size
