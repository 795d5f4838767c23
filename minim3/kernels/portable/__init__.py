"""Fast plain PyTorch, on any device: really skips the blocks nobody selected; CPU-only operators where they pay."""

from minim3.kernels.portable.alignment import indexer_kl
from minim3.kernels.portable.attention import block_sparse_attention, varlen_attention
from minim3.kernels.portable.experts import grouped_experts
from minim3.kernels.portable.norm import rms_norm
from minim3.kernels.portable.paged import block_sparse_attention_paged, paged_attention, select_blocks_paged
from minim3.kernels.portable.rotation import norm_rope_store
from minim3.kernels.portable.select import select_blocks
from minim3.kernels.portable.swiglu import swiglu_oai

__all__ = [
    "block_sparse_attention",
    "block_sparse_attention_paged",
    "grouped_experts",
    "indexer_kl",
    "norm_rope_store",
    "paged_attention",
    "rms_norm",
    "select_blocks",
    "select_blocks_paged",
    "swiglu_oai",
    "varlen_attention",
]
