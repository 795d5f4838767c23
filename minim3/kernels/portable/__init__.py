"""Fast plain PyTorch, on any device: really skips the blocks nobody selected; CPU-only operators where they pay."""

from minim3.kernels.reference import (
    block_sparse_attention,
    block_sparse_attention_paged,
    grouped_experts,
    indexer_kl,
    paged_attention,
    select_blocks,
    select_blocks_paged,
    varlen_attention,
)

__all__ = [
    "block_sparse_attention",
    "block_sparse_attention_paged",
    "grouped_experts",
    "indexer_kl",
    "paged_attention",
    "select_blocks",
    "select_blocks_paged",
    "varlen_attention",
]
