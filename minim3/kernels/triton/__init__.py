"""Kernels in Triton, for NVIDIA GPUs from compute capability 8.0 on, behind the same functions as everything else.

Imported only where asked for. With TRITON_INTERPRET=1 in the environment they run, slowly, on tensors of the CPU.
"""

from minim3.kernels.triton.alignment import indexer_kl
from minim3.kernels.triton.attention import block_sparse_attention, varlen_attention
from minim3.kernels.triton.experts import grouped_experts
from minim3.kernels.triton.norm import rms_norm
from minim3.kernels.triton.paged import block_sparse_attention_paged, paged_attention
from minim3.kernels.triton.rotation import norm_rope_store
from minim3.kernels.triton.select import select_blocks, select_blocks_paged
from minim3.kernels.triton.swiglu import swiglu_oai

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
