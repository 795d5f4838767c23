"""How much of dense attention the chosen blocks would keep: what an indexer is judged by.

T packed queries, S packed keys, Hq / Hkv query and KV heads, D their dimension, K blocks a query may choose.
"""

import torch
from torch import Tensor

from minim3.kernels.reference import selected_keys_mask
from minim3.kernels.sequences import at_least_fp32, query_positions, sequence_spans
from minim3.model.batch import ForwardBatch


@torch.no_grad()
def selection_recall(
    q: Tensor, k: Tensor, block_indices: Tensor, batch: ForwardBatch, block_size: int, num_queries: int
) -> Tensor:
    """The share of each query head's dense attention that falls on keys of the chosen blocks: mean, a scalar.

    `q` `[T, Hq, D]`, `k` `[S, Hkv, D]`, `block_indices` `[T, Hkv, K]`. Measured on at most `num_queries` queries,
    spread evenly over those with more blocks behind them than they may choose: the others keep everything.
    """
    spans = sequence_spans(batch.cu_seqlens_q, batch.cu_seqlens_k, None, num_queries=q.shape[0], num_keys=k.shape[0])
    positions = query_positions(spans, q.device)
    choosing = (positions // block_size >= block_indices.shape[-1]).nonzero().squeeze(1)
    assert choosing.numel(), "no query has a choice"
    num_queries = min(num_queries, choosing.numel())
    sample = choosing[torch.linspace(0, choosing.numel() - 1, num_queries, dtype=torch.float64).long()]
    dtype, heads, total = at_least_fp32(q.dtype), k.shape[1], q.new_zeros((), dtype=at_least_fp32(q.dtype))
    for span in spans:
        rows = sample[(sample >= span.q_start) & (sample < span.q_stop)]
        if not rows.numel():
            continue
        keys = k[span.k_start : span.k_stop].to(dtype)
        scores = torch.einsum("thgd,shd->thgs", q[rows].to(dtype).unflatten(1, (heads, -1)), keys) * q.shape[-1] ** -0.5
        seen = torch.arange(span.num_keys, device=q.device) <= positions[rows, None]
        attention = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        chosen = selected_keys_mask(block_indices[rows], span.num_keys, block_size)
        total += (attention * chosen[:, :, None]).sum(-1).mean((1, 2)).sum()
    return total / sample.numel()
